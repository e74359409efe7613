"""Small pictures of rejected records for the status page, each decoded in a process of its own.

What was rejected may be made to break decoders: there it ends that process at most, within limits of memory and time.
"""

from __future__ import annotations

import base64
import io
import os
import resource
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageFile

from exporter.image_header import FORMATS
from exporter.preprocess import upright_rgb

COUNT = 12
"""Rejected records that have a picture, the newest. Chosen by hand: most of those the page lists (LAST_REJECTED in
exporter.metrics); each more is a process to start."""

MAX_BYTES = 8 * 2**20
"""Encoded bytes kept in all until somebody looks: a memory budget for something that is nice to have. With less, fewer
large images have a picture."""

MAX_PIXELS = 12_000_000
"""Pixels of the largest image that is decoded: a 12-megapixel photograph. Decoded as RGBA that is 48 MB, far below
_MEMORY, which is not the place to notice it."""

SIDE = 96
"""Longer side of a picture in pixels. Chosen by hand between sharp and small: the page shows it in a frame of 60, on
screens that may have two pixels to one of the page's."""

LOOK_S = 2.0
"""Seconds after which a look begins no further picture; the rest is left for the next look. Chosen by hand: a request
waits for them."""

PAUSE_S = 4.0
"""Seconds between two looks that decode. With LOOK_S it bounds what a flood of rejected records costs while the page is
open: a third of one core."""

_MEMORY = 768 * 2**20
"""Bytes of address space of a decoder, which bounds what a hostile image can take. Python with Pillow maps 110 MB of it
before anything is decoded (and OpenBLAS much more, were it not held to one thread); an image of MAX_PIXELS takes a few
times its 48 MB."""

_CPU_S = 5
"""Seconds of processor time after which the kernel ends a decoder. Chosen by hand: the largest JPEG that
is decoded takes a fifth of one."""

_WAIT_S = 15
"""Seconds that a picture is waited for, three times _CPU_S: on a busy machine a decoder, at its low priority, waits
too."""

_PICTURE_BYTES = 32 * 1024
"""Bytes of the largest picture that is taken. A JPEG of 96 x 96 pixels of pure noise has 7 kB; a decoder that sends
several times that was taken over."""

_ENVIRONMENT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "PYTHONUSERBASE")
"""Variables that Python may need to start and to find its packages. The others may be secrets, and are kept from the
decoders."""


def picture_of(data: bytes) -> bytes | None:
    """Make a JPEG of an encoded image in a short-lived process; None where that process makes nothing of it."""
    try:
        # -P: without it Python would import from the working directory first, where anybody may have put a file.
        done = subprocess.run(
            [sys.executable, "-P", "-m", "exporter.thumbnails"],
            input=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_WAIT_S,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | {"OPENBLAS_NUM_THREADS": "1"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 and len(done.stdout) <= _PICTURE_BYTES else None


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
        make: Callable[[bytes], bytes | None] = picture_of,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_bytes`: encoded bytes kept in all; `make`: encoded bytes -> a JPEG, or None where there is nothing to
        see; `clock`: seconds that only grow."""
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
        until = self._clock() + LOOK_S
        for kept, data in reversed(waiting):  # the newest first: the oldest may be pushed out before anybody sees them
            if self._clock() > until:
                break
            jpeg = self._make(data)
            with self._lock:
                kept.picture = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode() if jpeg else None
                self._forget(kept)
        if waiting:
            self._not_before = self._clock() + PAUSE_S

    def _forget(self, kept: _KeptImage) -> None:
        """Let go of the bytes, with `_lock` held."""
        self._bytes -= len(kept.data or b"")
        kept.data = None


def _shrink(data: bytes) -> bytes:
    """Make a JPEG of an encoded image. Raises nearly anything on hostile bytes."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS} are decoded")
        # A JPEG is then decoded at a half, a quarter or an eighth of its size, where that is still large enough.
        image.draft("RGB", (2 * SIDE, 2 * SIDE))
        small = upright_rgb(image)
    small.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return out.getvalue()


def _main() -> None:
    """Read an image from standard input, and write its picture to standard output, within limits the kernel holds."""
    os.nice(10)  # the agent learns and answers on the same cores
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What is there of an image that was cut short is worth seeing. Only here: training must reject it.
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    sys.stdout.buffer.write(_shrink(sys.stdin.buffer.read()))


if __name__ == "__main__":
    _main()
