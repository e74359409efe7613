"""The images of claims, fetched ahead of the stream and handed on in its order; a store that is away is waited for."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import islice

from streams.background import in_background
from streams.formats import Claim
from streams.record import Item, Record, Rejected, Unreachable

log = logging.getLogger(__name__)

_FETCHES = 8
"""Images fetched from elsewhere at a time. Chosen by hand: more hide more of the store's latency, and each may take the
memory of the largest image allowed."""

_LOOK_S = 0.25
"""Seconds between two looks at a fetch under way: chosen by hand, far below `source.kafka.stall_s`."""

_WAIT_S = 0.5
"""Seconds before the second attempt on a store that does not answer; each further pause is twice as long. Chosen by
hand: a store that restarts is back after a few of them."""

_STORE_WAIT_S = 30
"""Longest seconds between attempts on a store of images that does not answer; the first is _WAIT_S. Chosen by hand:
a store that comes back is read again within about half a minute."""


class ClaimedImages:
    """It fetches the images of claims a few at a time ahead of the stream. Used from the reader's thread."""

    def __init__(
        self,
        fetch: Callable[[Claim], Record | Rejected],
        stopping: threading.Event,
        alive: Callable[[], None],
        hold: Callable[[str], None],
    ) -> None:
        """`fetch` raises Unreachable where the store is away. `alive` is told that the thread lives, and `hold` why
        nothing is read, or an empty text once it is again."""
        self._fetch = fetch
        self._stopping = stopping
        self._alive = alive
        self._hold = hold

    def resolved(self, entries: Iterable[tuple[Item | Claim, int]]) -> Iterator[tuple[Item, int]]:
        """Yield every item with its memory in bytes, claims as what they became; ends early when the source stops."""
        coming = iter(entries)
        ahead: deque[tuple[Item | Claim, Future[Record | Rejected] | None, int]] = deque()
        while not self._stopping.is_set():
            for item, size in islice(coming, _FETCHES - len(ahead)):
                ahead.append((item, self._fetching(item) if isinstance(item, Claim) else None, size))
            if not ahead:
                return
            item, fetching, size = ahead.popleft()
            if isinstance(item, Claim):
                assert fetching is not None
                fetched = self._fetched(item, fetching)
                if fetched is None:
                    return  # stopping
                item = fetched
                size += len(item.image) if isinstance(item, Record) else 0
            self._alive()
            yield item, size

    def _fetched(self, claim: Claim, fetching: Future[Record | Rejected]) -> Record | Rejected | None:
        """Wait for what a claim becomes, however long its store is away; None when the end came first."""
        failures = 0
        while not self._stopping.is_set():
            self._alive()
            try:
                fetched = fetching.result(_LOOK_S)
            except TimeoutError:
                continue
            except Unreachable as error:
                wait = min(_WAIT_S * 2**failures, _STORE_WAIT_S)
                failures += 1
                why = f"images cannot be fetched, so nothing is read until they can: {error}"
                self._hold(why)
                log.log(logging.ERROR if failures == 1 else logging.DEBUG, "%s", why)
                until = time.monotonic() + wait
                while (left := until - time.monotonic()) > 0 and not self._stopping.wait(min(left, _LOOK_S)):
                    self._alive()  # the pause may be longer than a reader may be silent
                fetching = self._fetching(claim)
                continue
            if failures:
                log.info("images can be fetched again")
                self._hold("")
            return fetched
        return None

    def _fetching(self, claim: Claim) -> Future[Record | Rejected]:
        return in_background(lambda: self._fetch(claim), "image-fetch")
