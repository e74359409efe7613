"""What the reader's thread and the agent's tell each other: items within a bound, a commit, a failure, the end."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

from streams.kafka.connection import NOTHING_LOST, describe_error
from streams.record import Item, Offsets
from streams.source import StreamError

log = logging.getLogger(__name__)

_WAIT_S = 0.25
"""Seconds that the reader waits for room before it shows that it lives, and looks for a commit to copy."""


class Handover:
    """Holds about `max_bytes` of items, each part of them with the size it is counted for.

    All that both threads change is guarded by one condition, which is notified with every change.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._ready: deque[tuple[list[Item], int]] = deque()
        self._bytes = 0
        self._committed: Offsets | None = None
        self._failure: StreamError | None = None
        self._throttled = False
        self._last_sign = time.monotonic()
        self.stopping = threading.Event()

    # The agent's thread.

    def take(self, timeout_s: float) -> Sequence[Item]:
        """Take the next part of the items; none when none came within `timeout_s`, or while throttled.

        Raises what the reader failed with, once everything before it was taken.
        """
        if self._throttled:
            self.stopping.wait(timeout_s)
        with self._changed:
            if not self._ready and not self._failure and not self._throttled:
                self._changed.wait(timeout_s)
            if self._ready and not self._throttled:
                items, size = self._ready.popleft()
                self._bytes -= size
                self._changed.notify_all()
                return items
        if self._failure:
            raise self._failure
        return ()

    def throttle(self, full: bool) -> None:
        """Hand out nothing while `full`."""
        self._throttled = full

    def acknowledge(self, offsets: Offsets) -> None:
        """Leave a commit's offsets for the reader to copy; only the newest ones count."""
        with self._changed:
            self._committed = dict(offsets)

    def stop(self) -> None:
        """End every wait of the reader."""
        self.stopping.set()
        with self._changed:
            self._changed.notify_all()

    @property
    def silent_s(self) -> float:
        """Seconds since the reader was last known to be alive."""
        return time.monotonic() - self._last_sign

    # The reader's thread.

    def alive(self) -> None:
        """Show that the reader is alive. It must come at least within the source's `stall_s`, also while it waits."""
        self._last_sign = time.monotonic()

    @property
    def bytes(self) -> int:
        """What waits to be taken, in bytes of memory."""
        return self._bytes

    def wait_for_room(self) -> bool:
        """Wait a little where there is no room, and tell whether there is some now."""
        with self._changed:
            if self._bytes < self._max_bytes:
                return True
            self._changed.wait(_WAIT_S)
            return False

    def put(self, items: list[Item], size: int) -> None:
        """Hand items over, once there is room: those too large for it go in alone."""
        with self._changed:
            while self._bytes >= self._max_bytes and not self.stopping.is_set():
                self.alive()
                self._changed.wait(_WAIT_S)
            self._ready.append((items, size))
            self._bytes += size
            self._changed.notify_all()

    def fail(self, error: StreamError) -> None:
        """End the stream with `error`."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def acknowledged(self) -> Offsets | None:
        """Give the offsets to copy, where there are any since the last call."""
        with self._changed:
            offsets, self._committed = self._committed, None
        return offsets


@contextlib.contextmanager
def no_record_lost() -> Iterator[None]:
    """Between the client's hands and ours a new client cannot help: what fails there ends the stream."""
    try:
        yield
    except StreamError:
        raise
    except Exception as error:
        log.exception("records could not be handed over")
        why = f"records could not be handed over ({describe_error(error)})"
        raise StreamError(f"{why}; stopping. {NOTHING_LOST}") from error
