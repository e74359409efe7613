"""Knows how often the metrics are read, so that the last values of an archive are not lost between two scrapes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Metric

LONGEST_S = 60
"""Seconds that are waited for a scrape at most: Prometheus's default interval, and hardly anyone takes a longer one.
More would only hold up the end of an archive whose reader went away."""

_LATE = 1.5
"""Intervals after which a scrape does not come any more. Chosen by hand: a scrape may be late, but not by so much."""

_STEP_S = 0.2
"""Seconds between two looks. It is also the time that an answer has to reach its reader."""


class Scrapes:
    """A collector without metrics of its own: `registry` asks it whenever its metrics are read."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._read: deque[float] = deque(maxlen=2)
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """Note that the metrics are being read, and give none."""
        self._read.append(self._clock())
        return ()

    def wait_for_next(self, stop: threading.Event, on_wait: Callable[[], None] = lambda: None) -> None:
        """Return after the next scrape; at once where none is to be expected, and when `stop` is set.

        A scrape is expected as long after the last one as that came after the one before. `on_wait` is called again and
        again meanwhile.
        """
        if len(self._read) < 2:
            return
        before, last = self._read
        until = last + min(_LATE * (last - before), LONGEST_S)
        while not stop.is_set() and self._clock() < until:
            was_read = self._read[-1] != last
            on_wait()
            stop.wait(_STEP_S)
            if was_read:
                return
