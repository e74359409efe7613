"""What runs in a decoder process: it takes encoded images, and gives pixels back, within limits that the kernel holds.

A trip is one byte with the number of its orders (ORDER, work, encoded image), and then the orders. Each is answered in
its turn by ANSWER and a body; the first answer of all says that the process is ready. Pixels that fit go through shared
memory, which has an equal part for each order of a trip, and their body is empty. Nothing here is secret, and nothing
that comes from here is trusted: exporter.decoder is the other end.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import mmap
import os
import resource
import signal
import socket
import struct
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import AvifImagePlugin, Image, ImageFile

from exporter.image_header import FORMATS, ImageError, check_header, memory_limit
from exporter.preprocess import Preprocess, planes, upright_rgb

ORDER = struct.Struct(">dHI")
"""Head of an order: seconds of processor time that the image may take, length of the work, length of the image."""

ANSWER = struct.Struct(">BI")
"""Head of an answer: one of the four below, and the length of the body."""

PIXELS, PICTURE, REFUSED, NO_MEMORY = 0, 1, 2, 3
"""Kinds of answers. Their bodies: uint8 [3, size, size]; PICTURE_HEAD and RGB; JSON of reason and detail; nothing."""

PICTURE_HEAD = struct.Struct(">HH")
"""Width and height of a picture."""

SHARED_BYTES = 4 * 2**20
"""Bytes of the shared memory: 16 images of 295 x 295 pixels. Larger ones, or more, go through the socket."""

SPARE_BYTES = 64 * 2**20
"""Bytes by which a process may grow beyond what an image takes, before it must end: what Pillow and the allocator keep.
Chosen by hand; more only delays the end of one that leaks."""

_KEPT_BYTES = 8 * 2**20
"""Half of the bytes that the allocator keeps between two images: enough for those of a million pixels."""

_SIDE_KEY = "side"
"""The key of the work that makes a picture; any other work is a Preprocess."""


def address_space(pid: int) -> int:
    """Bytes of address space of a process on Linux. Raises OSError when it is gone."""
    return int(Path(f"/proc/{pid}/statm").read_bytes().split()[0]) * resource.getpagesize()


def main(handle: int, shared_handle: int, parent: int, max_pixels: int, nice: int) -> None:
    """Work for the process `parent` at the other end of the socket `handle` until it closes it or dies.

    `shared_handle`: a file of SHARED_BYTES in memory.
    """
    # These reach a whole process group, or a unit of systemd; when this one ends is for its parent to say.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # at the end of its time the kernel kills it, whatever it is doing
    _limit_self(max_pixels, nice)
    if os.getppid() != parent:
        return  # it died before it could be tied to this process
    # glibc keeps freed memory for the next image up to twice the largest block that was ever freed, and else asks the
    # kernel for every image's anew: 0.4 ms for one of 500 x 400 pixels.
    bytearray(_KEPT_BYTES)
    shared = mmap.mmap(shared_handle, SHARED_BYTES)
    os.close(shared_handle)
    with socket.socket(fileno=handle) as connection, connection.makefile("rwb") as stream:
        stream.write(ANSWER.pack(PIXELS, 0))
        stream.flush()
        # What was said until here is for the log, as standard error; from here on it may be the doing of an image.
        os.dup2(1, 2)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while count := stream.read(1):
                # All of them are read first: else both ends could wait for the other to read.
                orders = [_read_order(stream) for _ in range(count[0])]
                part = SHARED_BYTES // len(orders)
                for number in range(len(orders)):
                    kind, body = _answer(*orders[number], max_pixels)
                    if kind == PIXELS and len(body) <= part:
                        shared[number * part : number * part + len(body)] = body
                        body = b""
                    stream.write(ANSWER.pack(kind, len(body)))
                    stream.write(body)
                    stream.flush()


def _limit_self(max_pixels: int, nice: int) -> None:
    """Hand over to the kernel what this process may take, and when it must end."""
    os.nice(nice)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each would take its own stack and heap of the address space
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        # Where memory runs out, the kernel takes this process first.
        Path("/proc/self/oom_score_adj").write_bytes(b"1000")
        most = address_space(os.getpid()) + memory_limit(max_pixels) + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _read_order(stream: Any) -> tuple[float, bytes, bytes]:
    cpu_s, work, image = ORDER.unpack(stream.read(ORDER.size))
    return cpu_s, stream.read(work), stream.read(image)


def _answer(cpu_s: float, work: bytes, image: bytes, max_pixels: int) -> tuple[int, bytes]:
    """Do one order; gives the kind of answer and its body."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        wanted = _work(work)
        if isinstance(wanted, Preprocess):
            return PIXELS, planes(image, max_pixels, wanted).tobytes()
        return PICTURE, _picture(image, max_pixels, wanted)
    except ImageError as error:
        return REFUSED, json.dumps([error.reason, error.detail]).encode()
    except MemoryError:
        return NO_MEMORY, b""
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@lru_cache(maxsize=8)
def _work(text: bytes) -> Preprocess | int:
    """Read what is to be made of an image: the preprocessing, or the longest side of a picture."""
    values = json.loads(text)
    return values[_SIDE_KEY] if _SIDE_KEY in values else Preprocess.from_dict(values)


def picture_work(side: int) -> bytes:
    """Write the work that makes a picture of at most `side` x `side` pixels."""
    return json.dumps({_SIDE_KEY: side}).encode()


def _picture(data: bytes, max_pixels: int, side: int) -> bytes:
    """Make a small upright RGB picture of what can be seen. Raises ImageError, MemoryError."""
    check_header(data, max_pixels)
    try:
        # What is there of an image that was cut short is worth seeing. Only here: training must reject it.
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # A JPEG is then decoded at a half, a quarter or an eighth of its size, where that is still large enough.
            image.draft("RGB", (2 * side, 2 * side))
            small = upright_rgb(image)
        small.thumbnail((side, side))
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # on hostile bytes Pillow raises nearly anything
        raise ImageError("undecodable", str(error) or type(error).__name__) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    return PICTURE_HEAD.pack(*small.size) + np.asarray(small).tobytes()
