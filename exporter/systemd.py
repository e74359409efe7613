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
"""Seconds between two datagrams, unless the watchdog asks for more of them. Chosen by hand: it is how old the line in
`systemctl status` may be, and how late READY=1 and STOPPING=1."""

_EXTEND = "EXTEND_TIMEOUT_USEC=60000000"
"""Sent while the agent starts or stops, which may take long (a large model, a clean stop): as long as its loops live,
systemd waits another minute from each datagram on. A minute also covers stretches in which this thread does not get to
run; with a longer time a start that hangs is noticed later."""


@dataclass
class Notifier:
    """A loop that tells systemd about the process. When one of the process's loops hangs, the watchdog pings end, and
    systemd ends the process."""

    address: str
    """Path of systemd's socket; one that begins with @ is abstract."""
    watchdog_s: float | None
    """Seconds within which systemd expects a ping; None where it has no watchdog."""
    live: Callable[[], list[str]]
    """Gives the reasons why the process is not alive; empty when it is."""
    ready: Callable[[], bool]
    """Whether the process can do its work, for the first time."""
    doing: Callable[[], str]
    """Gives one line for `systemctl status`."""
    stop: threading.Event
    """Set when the process was told to stop."""
    _ended: threading.Event = field(default_factory=threading.Event, init=False)
    _failing: bool = field(default=False, init=False)
    """Whether the last datagram could not be sent: the log tells it once, not every second."""

    def run(self) -> None:
        """Notify until `end`."""
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
            # A third of what the watchdog allows: one datagram may be late, and the next is still in time.
            self._ended.wait(min(_PERIOD_S, (self.watchdog_s or _PERIOD_S) / 3))

    def end(self) -> None:
        """Make `run` return."""
        self._ended.set()

    def _send(self, lines: list[str]) -> None:
        # systemd writes @ for the zero byte that makes an address abstract.
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
                to.settimeout(1)  # a full queue must not hold up the pings for longer than a period
                to.sendto("\n".join(lines).encode(), address)
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("systemd does not listen at %s (%s); it may end this process", self.address, error)
            self._failing = True


@contextmanager
def supervised(
    live: Callable[[], list[str]],
    ready: Callable[[], bool],
    doing: Callable[[], str],
    stop: threading.Event,
    env: Mapping[str, str] = os.environ,
) -> Iterator[None]:
    """Tell systemd about the process while the block runs, when systemd asked for that in `env`.

    The callables and `stop` are those of `Notifier`; a thread of its own calls them about once a second.
    """
    address = env.get("NOTIFY_SOCKET")
    if not address:
        yield
        return
    # A watchdog that is meant for another process, as a wrapper's child inherits it, is not ours to feed.
    watched = env.get("WATCHDOG_USEC") and env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    notifier = Notifier(address, int(env["WATCHDOG_USEC"]) / 1e6 if watched else None, live, ready, doing, stop)
    thread = threading.Thread(target=notifier.run, name="systemd", daemon=True)
    thread.start()
    try:
        yield
    finally:
        notifier.end()
        thread.join()
