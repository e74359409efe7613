"""One decoder process as its owner sees it: started, asked, and killed where it outlasts its limits.

Untrusted images are decoded there and nowhere else: what an image can break is this one process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from exporter.decoder_child import (
    ANSWER,
    NO_MEMORY,
    ORDER,
    PICTURE,
    PICTURE_HEAD,
    PIXELS,
    REFUSED,
    SHARED_BYTES,
    SPARE_BYTES,
    address_space,
)
from exporter.image_header import REASONS, ImageError, memory_limit

CPU_S, CPU_S_PER_PIXEL = 3.0, 2e-7
"""Seconds of processor time that an image may take, and for each of its pixels. With less, a slow machine would reject
good images; with more, a bad one keeps a core busy for longer."""

WALL_TIMES = 4
"""How many times its processor time an image may take by the clock. Chosen by hand: on a machine with four times as
much to do as it has cores, decoders wait, too."""

START_S = 60
"""Seconds within which a process must be ready: it takes 0.15 s, and a disk under load a hundred times that."""

MAX_IMAGES = 20_000
"""Images after which a process is replaced, which costs 0.15 s: with decoders that leak a little, it ends in time."""

_DETAIL_CHARS = 1000
"""Characters of a refusal's detail that are taken; a process that sends more was taken over."""

_ENVIRONMENT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONUSERBASE")
"""Variables that Python may need to start. The others may be secrets, and are kept from the decoders."""

_SETTINGS = {"OPENBLAS_NUM_THREADS": "1"}
"""Variables that keep a decoder small: of one thread. Not MALLOC_ARENA_MAX: with it malloc asks the kernel for every
image's memory anew."""

_PROGRAM = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from exporter.decoder_child import main; main(*map(int, sys.argv[2:]))"
)
"""What Python runs in the process. Not multiprocessing, which imports the owner's main module again, and torch with it.
The owner's paths are handed over, so that both run the same code."""

Buffer = bytes | memoryview
"""Pixels as they come from a process."""


class DecodersError(OSError):
    """An image could not be decoded for reasons of the machine; nothing is known of the image."""


class DecoderDied(Exception):
    """The process is gone before it answered; the message says how."""

    def __init__(self, how: str, fault: Literal["start", "time", "late", "crash"]) -> None:
        """`fault`: `start` where it did not come up; `time` where the image took its processor time; `late` where the
        process was killed since no answer came though it did not; `crash` for any other end."""
        super().__init__(how)
        self.fault = fault


@dataclass(frozen=True)
class Order:
    """This is an image to decode, and what to make of it."""

    image: bytes
    work: bytes
    """JSON of a Preprocess, or what `picture_work` gives."""
    pixels: int
    """Number of pixels that the image's header tells."""
    answer_bytes: int
    """Length of the pixels, or of the largest picture."""

    @property
    def cpu_s(self) -> float:
        """Seconds of processor time that it may take."""
        return CPU_S + CPU_S_PER_PIXEL * self.pixels


class Decoder:
    """This is a process that decodes images. Used from one thread, but for `kill` and `late_s`.

    Linux kills it when that thread ends, and it ends by itself once its owner is gone.
    """

    def __init__(self, max_pixels: int, nice: int = 0) -> None:
        """Start it, without a wait. `nice`: how much it steps back behind others. Raises DecodersError."""
        self._limit = memory_limit(max_pixels)
        self._images = 0
        self._due: float | None = None
        """When the answer that is waited for is late; None while none is."""
        # Sealed: a process that makes it smaller would end this one, which reads beyond its end then.
        memory = os.memfd_create("pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        own, other = socket.socketpair()
        try:
            with other:
                os.ftruncate(memory, SHARED_BYTES)
                fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
                self._shared = memoryview(mmap.mmap(memory, SHARED_BYTES))
                self._process = subprocess.Popen(
                    # -P: without it Python would look for modules in the working directory before it is told where.
                    [sys.executable, "-P", "-c", _PROGRAM, json.dumps(sys.path)]
                    + [str(number) for number in (other.fileno(), memory, os.getpid(), max_pixels, nice)],
                    pass_fds=[other.fileno(), memory],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | _SETTINGS,
                )
        except OSError as error:
            own.close()
            raise DecodersError(error.errno, f"a decoder process could not be started: {error.strerror}") from error
        finally:
            os.close(memory)
        self._socket = own
        self._size = 0
        """Bytes of address space when it was ready; 0 before."""

    def decode(self, orders: Sequence[Order]) -> Iterator[Buffer | Image.Image | ImageError]:
        """Give the answers to at most 255 orders in their order, each as soon as it is there: uint8 [3, size, size],
        which are good until the next call, a picture, or why the image is unusable.

        Raises DecoderDied when the process is gone before the next answer, or was killed since that was late; it cannot
        be used any more then. Raises DecodersError when the machine has no memory for an image.
        """
        if not self._size:
            self._await_start()
        self._due = time.monotonic() + WALL_TIMES * sum(order.cpu_s for order in orders)
        parts = [bytes([len(orders)])]
        for order in orders:
            parts += ORDER.pack(order.cpu_s, len(order.work), len(order.image)), order.work, order.image
        self._send(b"".join(parts))
        part = SHARED_BYTES // len(orders)
        for number, order in enumerate(orders):
            self._due = time.monotonic() + WALL_TIMES * order.cpu_s
            kind, length = ANSWER.unpack(self._receive(ANSWER.size))
            if length > max(order.answer_bytes, 10 * _DETAIL_CHARS):
                raise self._death("answered what no decoder answers")
            body = self._receive(length)
            self._due = None
            self._images += 1
            if kind == PIXELS and not body and order.answer_bytes <= part:
                yield self._shared[number * part : number * part + order.answer_bytes]
            else:
                yield self._understood(kind, body, order)

    @property
    def spent(self) -> bool:
        """Whether it should be replaced: it has decoded MAX_IMAGES, or keeps more than SPARE_BYTES of memory."""
        if self._images >= MAX_IMAGES:
            return True
        try:
            return sys.platform == "linux" and address_space(self._process.pid) > self._size + SPARE_BYTES
        except (OSError, IndexError):
            return True

    @property
    def late_s(self) -> float:
        """Seconds by which an answer is late; it is noticed at once unless this thread or the machine hangs."""
        due = self._due
        return 0 if due is None else max(0, time.monotonic() - due)

    def kill(self) -> None:
        """End it now, whatever it does; who waits for its answer gets DecoderDied. May be called from any thread."""
        self._process.kill()

    def close(self) -> None:
        """End it and clean up after it."""
        self.kill()
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)  # killed processes are gone at once, but for those that hang in the kernel

    def _await_start(self) -> None:
        self._due = time.monotonic() + START_S
        try:
            self._receive(ANSWER.size)
            self._size = address_space(self._process.pid) if sys.platform == "linux" else 1
        except (DecoderDied, OSError) as error:
            raise DecoderDied(f"could not be started: {error}", "start") from error

    def _understood(self, kind: int, body: bytes, order: Order) -> Buffer | Image.Image | ImageError:
        if kind == PIXELS and len(body) == order.answer_bytes:
            return body
        if kind == PICTURE and len(body) >= PICTURE_HEAD.size:
            size = PICTURE_HEAD.unpack_from(body)
            if len(body) == PICTURE_HEAD.size + 3 * size[0] * size[1]:
                return Image.frombytes("RGB", size, body[PICTURE_HEAD.size :])
        if kind == REFUSED:
            with contextlib.suppress(ValueError):
                reason, detail = json.loads(body)
                if reason in REASONS:
                    return ImageError(reason, str(detail)[:_DETAIL_CHARS])
        if kind == NO_MEMORY:
            if not _has_memory(self._limit):
                raise DecodersError(f"the machine has no {self._limit >> 20} MiB of memory left to decode an image")
            return ImageError("bomb", f"takes more than {self._limit >> 20} MiB of memory to decode")
        raise self._death("answered what no decoder answers")

    def _send(self, data: bytes) -> None:
        try:
            self._socket.settimeout(self._left_s())
            self._socket.sendall(data)
        except OSError as error:
            raise self._death(str(error), late=isinstance(error, TimeoutError)) from error

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            try:
                self._socket.settimeout(self._left_s())
                got = self._socket.recv_into(view)
            except OSError as error:
                raise self._death(str(error), late=isinstance(error, TimeoutError)) from error
            if not got:
                raise self._death("closed its connection")
            view = view[got:]
        return bytes(data)

    def _left_s(self) -> float:
        """Seconds until the answer that is waited for is late. Raises TimeoutError when it is."""
        left = self._due - time.monotonic() if self._due is not None else START_S
        if left <= 0:
            raise TimeoutError
        return left

    def _death(self, how: str, late: bool = False) -> DecoderDied:
        """End the process and say how it ended: by its exit code, or `how` where it has none yet."""
        code = None
        if not late:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(1)  # the connection ends a moment before the exit code is known
        self.close()
        self._due = None
        if late:
            return DecoderDied("did not answer in time", "late")
        if code == -signal.SIGPROF:
            return DecoderDied("was ended at its limit of processor time", "time")
        if code is None:
            return DecoderDied(how, "crash")
        name = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return DecoderDied(name, "crash")


def _has_memory(size: int) -> bool:
    """Whether the machine would give this process `size` bytes now."""
    try:
        mmap.mmap(-1, size).close()
    except OSError:
        return False
    return True
