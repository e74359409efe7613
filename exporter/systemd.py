"""Tells systemd that the agent is ready, what it does and that its loops are alive; does nothing where systemd is not.

The protocol is that of sd_notify(3): datagrams of KEY=VALUE lines to the socket named in NOTIFY_SOCKET.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

_PERIOD_S = 1.0
_EXTEND = "EXTEND_TIMEOUT_USEC=60000000"
"""Loading a large model and a clean stop may take long; while the loops live systemd waits another minute each time."""


@dataclass
class Supervisor:
    """A thread that reports to systemd. A loop that hangs ends the watchdog pings, and systemd ends the process."""

    address: str
    """Path of the socket; one that begins with @ is abstract."""
    watchdog_s: float | None
    """A ping is expected this often; None: no watchdog."""
    live: Callable[[], list[str]]
    """Why the process is not alive; empty when it is."""
    ready: Callable[[], bool]
    doing: Callable[[], str]
    """One line for `systemctl status`."""
    stop: threading.Event
    """Set when the process was told to stop."""
    _ended: threading.Event = field(default_factory=threading.Event, init=False)
    _deaf: bool = field(default=False, init=False)

    def run(self) -> None:
        """Report until `end`."""
        is_ready = stopping = False
        while not self._ended.is_set():
            lines = [f"STATUS={self.doing()}"]
            alive = not self.live()
            if not is_ready and self.ready():
                is_ready = True
                lines.append("READY=1")
            if not stopping and self.stop.is_set():
                stopping = True
                lines.append("STOPPING=1")
            if alive:
                lines.append("WATCHDOG=1")
                if stopping or not is_ready:
                    lines.append(_EXTEND)
            self._send(lines)
            self._ended.wait(min(_PERIOD_S, (self.watchdog_s or _PERIOD_S) / 3))

    def end(self) -> None:
        self._ended.set()

    def _send(self, lines: list[str]) -> None:
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
                to.settimeout(1)
                to.sendto("\n".join(lines).encode(), address)
            self._deaf = False
        except OSError as error:
            if not self._deaf:
                log.warning("systemd does not listen at %s (%s); it may end this process", self.address, error)
            self._deaf = True


@contextmanager
def supervised(
    live: Callable[[], list[str]],
    ready: Callable[[], bool],
    doing: Callable[[], str],
    stop: threading.Event,
    env: Mapping[str, str] = os.environ,
) -> Iterator[None]:
    """Report to systemd for as long as the block runs, when it asked for that in `env`."""
    address = env.get("NOTIFY_SOCKET")
    if not address:
        yield
        return
    watched = env.get("WATCHDOG_USEC") and env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    supervisor = Supervisor(address, int(env["WATCHDOG_USEC"]) / 1e6 if watched else None, live, ready, doing, stop)
    thread = threading.Thread(target=supervisor.run, name="systemd", daemon=True)
    thread.start()
    try:
        yield
    finally:
        supervisor.end()
        thread.join()
