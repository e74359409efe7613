"""Small pictures of rejected records for the status page, decoded in a process that lives as long as somebody looks.

What was rejected may be made to break decoders: there it ends that process at most (exporter.decoders).
"""

from __future__ import annotations

import base64
import io
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass

from exporter.decoders import Decoders, DecodersError
from exporter.image_header import ImageError

COUNT = 12
"""Rejected records that have a picture, the newest. Chosen by hand: most of those the page lists (LAST_REJECTED in
exporter.metrics); each more is a process to start."""

MAX_BYTES = 8 * 2**20
"""Encoded bytes kept in all until somebody looks: a memory budget for something that is nice to have. With less, fewer
large images have a picture."""

MAX_PIXELS = 12_000_000
"""Pixels of the largest image that is decoded: a 12-megapixel photograph."""

SIDE = 96
"""Longer side of a picture in pixels. Chosen by hand between sharp and small: the page shows it in a frame of 60, on
screens that may have two pixels to one of the page's."""

LOOK_S = 2.0
"""Seconds after which a look begins no further picture; the rest is left for the next look. Chosen by hand: a request
waits for them."""

PAUSE_S = 4.0
"""Seconds between two looks that decode. With LOOK_S it bounds what a flood of rejected records costs while the page is
open: a third of one core."""


def pictures_of(images: Iterable[bytes]) -> Generator[bytes | None, None, None]:
    """Make a JPEG of each encoded image, by exporter.decoders; None where nothing can be made."""
    # At a low priority: the agent learns and answers on the same cores.
    with closing(Decoders(MAX_PIXELS, workers=1, nice=10)) as decoders:
        for data in images:
            try:
                small = decoders.picture(data, SIDE)
            except (ImageError, DecodersError):
                yield None
                continue
            out = io.BytesIO()
            small.save(out, "JPEG", quality=80)
            yield out.getvalue()


@dataclass
class _KeptImage:
    """It holds a rejected record's bytes, and then its picture."""

    number: int
    data: bytes | None
    """The encoded bytes; None once the picture was made, or is not wanted any more."""
    picture: str | None = None
    """Data URI of the picture; None while it is not made, and where none can be made."""


class Thumbnails:
    """These are pictures of the newest rejected records. Bytes are kept as they came, and decoded only when somebody
    asks.

    Every method may be called from any thread.
    """

    def __init__(
        self,
        max_bytes: int = MAX_BYTES,
        make: Callable[[Iterable[bytes]], Generator[bytes | None, None, None]] = pictures_of,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_bytes`: encoded bytes kept in all; `make`: of encoded images a JPEG each, or None where there is
        nothing to see; `clock`: seconds that only grow."""
        self._max_bytes = max_bytes
        self._make = make
        self._clock = clock
        self._lock = threading.Lock()
        """Held for a moment, by whoever looks into or changes what is kept."""
        self._making = threading.Lock()
        """Held while decoders run, so that many open pages start no more of them than one does."""
        self._kept: deque[_KeptImage] = deque()
        self._bytes = 0
        self._not_before = 0.0

    def add(self, number: int, data: bytes) -> None:
        """Keep what may be an image under `number`; of all that is kept, the newest that are within COUNT and
        `max_bytes`. One that has more bytes alone is not kept, and pushes out no others."""
        if len(data) > self._max_bytes:
            return
        with self._lock:
            self._kept.append(_KeptImage(number, data))
            self._bytes += len(data)
            while len(self._kept) > COUNT or self._bytes > self._max_bytes:
                self._forget(self._kept.popleft())

    @property
    def numbers(self) -> set[int]:
        """The numbers of all that is kept: they have a picture now, or will be tried."""
        with self._lock:
            return {kept.number for kept in self._kept}

    def pictures(self) -> dict[int, str | None]:
        """Give number -> data URI of a JPEG of at most SIDE x SIDE pixels, or None where none can be made.

        A picture that is not made yet is left out; a later call has it. May take seconds.
        """
        with self._making:
            if self._clock() >= self._not_before:
                self._make_all()
        with self._lock:
            return {kept.number: kept.picture for kept in self._kept if kept.data is None}

    def _make_all(self) -> None:
        with self._lock:
            waiting = [(kept, kept.data) for kept in self._kept if kept.data is not None]
        if not waiting:
            return
        waiting.reverse()  # the newest first: the oldest may be pushed out before anybody sees them
        until = self._clock() + LOOK_S
        with closing(self._make(data for _, data in waiting)) as pictures:
            for (kept, _), jpeg in zip(waiting, pictures, strict=True):
                with self._lock:
                    kept.picture = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode() if jpeg else None
                    self._forget(kept)
                if self._clock() > until:
                    break
        self._not_before = self._clock() + PAUSE_S

    def _forget(self, kept: _KeptImage) -> None:
        """Let go of the bytes, with `_lock` held."""
        self._bytes -= len(kept.data or b"")
        kept.data = None
