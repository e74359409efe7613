"""What learning costs: the parameters an optimiser steps, memory at its peak, the device it ran on."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

INTERVAL_S = 0.02
"""Time between two looks at this process's memory. Chosen by hand: a look takes less than 0.1 ms, so fifty a second
cost nothing, and what lives shorter than this is missed. A CUDA device remembers its peak by itself."""


@contextmanager
def optimised() -> Iterator[dict[int, Tensor]]:
    """Collect every parameter that an optimiser steps, by id (and kept alive, so that no id comes twice).

    The steps are watched rather than `requires_grad`, which is also true for what no optimiser was given.
    """
    found: dict[int, Tensor] = {}

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            found.update((id(p), p) for p in group["params"] if p.requires_grad)

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def peak_memory(device: torch.device, interval_s: float = INTERVAL_S) -> Iterator[Callable[[], int]]:
    """Give a function for the most memory in use since the block began, in bytes beyond what was in use then.

    It is the device's on CUDA; else it is this process's own (mapped files do not count), looked at every `interval_s`.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - start
        return
    # glibc keeps what the run before freed, and would hand it out again without this process growing.
    ctypes.CDLL(None).malloc_trim(0)
    start = peak = _own_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(interval_s):
            peak = max(peak, _own_memory())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: max(peak, _own_memory()) - start
    finally:
        done.set()
        thread.join()


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was given: CUDA works on after a call has returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Name the device for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _own_memory() -> int:
    """Read the bytes this process has for itself: RssAnon leaves out mapped files, such as tokens beyond memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon; memory is measured on Linux 4.5 or newer")
