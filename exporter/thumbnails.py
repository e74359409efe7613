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

from exporter.preprocess import FORMATS, upright_rgb

COUNT = 12
"""So many of the newest are kept."""
MAX_BYTES = 8 * 2**20
"""Encoded bytes kept in all until somebody looks."""
MAX_PIXELS = 12_000_000
SIDE = 96
"""Longer side of a picture, in pixels."""
LOOK_S = 2.0
"""About so long one look decodes; what is left is for the next."""
PAUSE_S = 4.0
"""Between two looks that decode, so that a flood of rejected records with the page open costs little."""

_MEMORY = 768 * 2**20
_CPU_S = 5
_WAIT_S = 15
_PICTURE_BYTES = 32 * 1024
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "PYTHONUSERBASE")
"""What Python may need to start and to find its packages. The rest may be secrets, and is kept from the decoders."""


def picture_of(data: bytes) -> bytes | None:
    """JPEG of an encoded image, decoded by a short-lived process; None where that makes nothing of it."""
    try:
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
class _Kept:
    number: int
    data: bytes | None
    """None once the picture was made, or is not wanted any more."""
    picture: str | None = None


class Thumbnails:
    """Keeps encoded bytes as they came; pictures are made when somebody asks. Safe from any thread."""

    def __init__(
        self,
        max_bytes: int = MAX_BYTES,
        make: Callable[[bytes], bytes | None] = picture_of,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`make`: encoded bytes -> a JPEG, or None where there is nothing to see."""
        self._max_bytes = max_bytes
        self._make = make
        self._clock = clock
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._kept: deque[_Kept] = deque()
        self._bytes = 0
        self._not_before = 0.0

    def add(self, number: int, data: bytes) -> None:
        """Keep what may be an image under `number`, and no more than COUNT and `max_bytes` of the newest; one that has
        more bytes than that alone is not kept, and pushes out no others."""
        if len(data) > self._max_bytes:
            return
        with self._lock:
            self._kept.append(_Kept(number, data))
            self._bytes += len(data)
            while len(self._kept) > COUNT or self._bytes > self._max_bytes:
                self._forget(self._kept.popleft())

    @property
    def numbers(self) -> set[int]:
        """Of everything kept."""
        with self._lock:
            return {kept.number for kept in self._kept}

    def pictures(self) -> dict[int, str | None]:
        """Number -> data URI of a JPEG of at most SIDE x SIDE pixels; None where none can be made. One that is not made
        yet is left out."""
        with self._making:
            if self._clock() >= self._not_before:
                self._make_all()
        with self._lock:
            return {kept.number: kept.picture for kept in self._kept if kept.data is None}

    def _make_all(self) -> None:
        with self._lock:
            waiting = [(kept, kept.data) for kept in self._kept if kept.data is not None]
        until = self._clock() + LOOK_S
        for kept, data in reversed(waiting):
            if self._clock() > until:
                break
            jpeg = self._make(data)
            with self._lock:
                kept.picture = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode() if jpeg else None
                self._forget(kept)
        if waiting:
            self._not_before = self._clock() + PAUSE_S

    def _forget(self, kept: _Kept) -> None:
        self._bytes -= len(kept.data or b"")
        kept.data = None


def _shrink(data: bytes) -> bytes:
    """Raises nearly anything."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS} are decoded")
        image.draft("RGB", (2 * SIDE, 2 * SIDE))
        small = upright_rgb(image)
    small.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return out.getvalue()


def _main() -> None:
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # of one that is cut short, as far as it goes
    sys.stdout.buffer.write(_shrink(sys.stdin.buffer.read()))


if __name__ == "__main__":
    _main()
