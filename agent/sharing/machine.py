"""What a rank takes of its machine: a device, CPU threads, a network interface."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress

import torch

from agent.config import Config

_SIOCGIFADDR = 0x8915
"""Linux's number of the request for an interface's IPv4 address."""


class SharingError(Exception):
    """Updates cannot be shared as configured; the message says what to do."""


def device_of(config: Config, number: int) -> str:
    """Choose the device of this machine's rank of that number: `cpu`, `cuda:<number>`. Raises SharingError."""
    wanted, count = config.model.device, torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not count):
        return "cpu"
    if ":" in wanted and config.training.processes == 1:
        return wanted
    if ":" in wanted:
        raise SharingError(
            f"model.device is {wanted}, which only one rank can have, but training.processes is "
            f"{config.training.processes}; set model.device to cuda"
        )
    if config.training.processes > count:
        raise SharingError(
            f"training.processes is {config.training.processes}, but this machine has {count} CUDA device(s), and each "
            "rank needs its own; lower it, or set model.device to cpu"
        )
    return f"cuda:{number}"


def threads_of(config: Config) -> int:
    """Give the CPU threads of each of this machine's ranks."""
    return config.model.threads or max(1, (os.cpu_count() or 1) // config.training.processes)


def use_interface(name: str) -> None:
    """Let Gloo and NCCL use this network interface; empty leaves the choice to them, as a user's own setting does."""
    if name:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ[variable] = _chosen.get(variable) or name


_chosen = {name: os.environ.get(name, "") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
"""What the user has set before this process began."""


def interface_of(address: str) -> str:
    """Find the network interface with this IPv4 address; empty where it is not to be found. Left to itself, Gloo takes
    what the machine's name leads to, which often is another one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""
