"""Decodes untrusted images in a few processes of their own (exporter.decoder), fairly among those who ask.

A poison image costs itself: its process is killed and replaced. The images of a request are a turn. Whoever has the
fewest images at work and has used the least time goes next, so that a lone image never waits for all of another's.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from exporter.decoder import Decoder, DecoderDied, DecodersError, Order
from exporter.decoder_child import PICTURE_HEAD, picture_work
from exporter.image_header import Header, ImageError, check_header
from exporter.preprocess import Preprocess

log = logging.getLogger(__name__)

MAX_WORKERS = 8
"""Processes at most where their number is not said. Eight take 320 MB, and decode 1,500 photographs of
500 x 400 pixels a second at 5 ms each. Chosen by hand: one for each core of a large machine would not fit into a
small container on it."""

REQUEST_IMAGES = 4
"""How many images of the largest size allowed have the pixels that one request may have: with 50 million, 200 million,
which take about two seconds of one core. Chosen by hand; with more, one request keeps all decoders busy for longer."""

WAITING_IMAGES = 8
"""The same for what waits or is worked on of all requests together."""

SMALL_REQUEST = 1 / 4
"""Share of the largest image up to which a request is taken however much of others waits. With serve.max_requests
there are at most so many of them: else whoever sends enough large images would shut out everybody."""

WAITING_BYTES = 64 * 2**20
"""Encoded bytes that wait or are worked on before `pixels` reads more: a memory budget, a few of the largest images."""

TRIP_IMAGES, TRIP_BYTES, TRIP_PIXELS = 16, 128 * 1024, 1_000_000
"""Images that go to a process together, their encoded bytes and their pixels at most. Chosen by hand: of small images
enough to pay for the trip (the processes wake each other up), and of none so many that others wait for long."""

ATTEMPTS = 3
"""Processes that an image may end before it is taken for the reason. More than one, as processes are also killed from
outside: for lack of memory, or by hand."""

STUCK_S = 30
"""Seconds by which an answer is late when a decoder counts as stuck: it should have been killed at once. Chosen by
hand, for machines short of CPU."""


class Busy(Exception):
    """So much waits already that a request is not taken; it may be later."""


class TooManyPixels(Exception):
    """A request has more pixels than one may have."""


@dataclass(frozen=True)
class Checked:
    """This is an encoded image with what its header says."""

    data: bytes
    header: Header | ImageError

    @property
    def pixels(self) -> int:
        """Number of pixels that are to be decoded; 0 where none can be."""
        return self.header.pixels if isinstance(self.header, Header) else 0


@dataclass(eq=False, repr=False)
class _Turn:
    """It has the images of one who asked."""

    waiting: deque[_Job] = field(default_factory=deque)
    running: int = 0
    """Images that are at work now."""
    used_s: float = 0
    """Seconds of decoders that its images took, counted from where the turn with the fewest was when this one came."""


@dataclass(eq=False, repr=False)
class _Job:
    """It is an image on its way, and where its answer is waited for."""

    order: Order
    turn: _Turn
    finish: Callable[[Any], Any]
    """Makes of a decoder's answer what is waited for."""
    answer: Future[Any] = field(default_factory=Future)
    attempts: int = 0

    @property
    def size(self) -> int:
        """Encoded bytes."""
        return len(self.order.image)


class Decoders:
    """These are a few processes that decode images, started as they are needed. Any thread may call any method.

    A process has about 40 MB, and up to `exporter.image_header.memory_limit` more while it decodes.
    """

    def __init__(self, max_pixels: int, workers: int = 0, nice: int = 0) -> None:
        """`max_pixels`: an image of more is refused. `workers`: processes at most; 0 is one for each core, up to
        MAX_WORKERS. `nice`: how much they step back behind other processes."""
        self._max_pixels = max_pixels
        self._workers = workers or min(MAX_WORKERS, os.cpu_count() or 1)
        self._nice = nice
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        """Told when there is something to decode, and at the end."""
        self._room = threading.Condition(self._lock)
        """Told when less waits than before, and at the end."""
        self._turns: dict[_Turn, None] = {}
        """Those with images that wait, in the order in which they came."""
        self._pixels = self._bytes = self._images = 0
        """What waits or is worked on, of all."""
        self._idle = 0
        self._threads: list[threading.Thread] = []
        self._decoders: set[Decoder] = set()
        self._closed = False

    def check(self, images: Iterable[bytes]) -> list[Checked]:
        """Read the headers of images. Takes microseconds for each, and milliseconds for megabytes made to be slow."""
        return [self._checked(data) for data in images]

    def submit(self, images: Sequence[Checked], preprocess: Preprocess) -> list[Future[NDArray[np.float32]]]:
        """Take the images of one request, all or none: a future of each one's pixels float32 [3, size, size].

        A future raises ImageError for an unusable image and DecodersError where the machine is the reason; one that is
        cancelled in time is never decoded. Raises TooManyPixels, or Busy when too much waits already.
        """
        wanted, most = sum(image.pixels for image in images), REQUEST_IMAGES * self._max_pixels
        if wanted > most:
            raise TooManyPixels(
                f"the images have {wanted} pixels in all, at most {most} are decoded for one request; send fewer or "
                "smaller images"
            )
        turn = _Turn()
        jobs = [self._job(image, turn, preprocess) for image in images]
        with self._lock:
            waiting = self._pixels
            if wanted > SMALL_REQUEST * self._max_pixels and waiting + wanted > WAITING_IMAGES * self._max_pixels:
                raise Busy(f"images of {waiting} pixels wait to be decoded, no {wanted} more are taken; come again")
            for job in jobs:
                self._add(job)
        return [job.answer for job in jobs]

    def pixels(
        self, images: Iterable[bytes | ImageError], preprocess: Preprocess
    ) -> Generator[NDArray[np.float32] | ImageError, None, None]:
        """Give the pixels float32 [3, size, size] of every image, or why it is unusable, in order; an ImageError among
        `images` comes back in its place.

        As many images are read ahead as keep the processes busy. Those not begun are dropped when the caller ends
        before. Raises DecodersError, and what reading `images` raises.
        """
        turn = _Turn()
        ahead: deque[Future[NDArray[np.float32]]] = deque()
        try:
            for image in images:
                if len(ahead) >= 2 * TRIP_IMAGES * self._workers:
                    yield _result(ahead.popleft())
                checked = Checked(b"", image) if isinstance(image, ImageError) else self._checked(image)
                job = self._job(checked, turn, preprocess)
                ahead.append(job.answer)
                with self._lock:
                    self._room.wait_for(lambda job=job: self._closed or self._has_room(job))  # type: ignore[misc]
                    self._add(job)
            while ahead:
                yield _result(ahead.popleft())
        finally:
            for answer in ahead:
                answer.cancel()

    def picture(self, data: bytes, side: int) -> Image.Image:
        """Make an RGB picture of at most `side` x `side` pixels of what can be seen of an image, also of one that was
        cut short. Raises ImageError, DecodersError."""
        checked = self._checked(data)
        order = Order(data, picture_work(side), checked.pixels, PICTURE_HEAD.size + 3 * side * side)
        job = _Job(order, _Turn(), lambda image: image)
        if isinstance(checked.header, ImageError):
            raise checked.header
        with self._lock:
            self._add(job)
        return job.answer.result()

    def why_not_alive(self) -> list[str]:
        """Give the reasons why nothing more can be expected of it; empty when all is well. Takes no time."""
        late = max((decoder.late_s for decoder in tuple(self._decoders)), default=0)
        reasons = [f"a decoder has been stuck for {late:.0f} s"] if late > STUCK_S else []
        if not self._closed and not all(thread.is_alive() for thread in tuple(self._threads)):
            reasons.append("a thread that decodes images has died")
        return reasons

    def close(self) -> None:
        """Kill the processes. What is not decoded yet fails with DecodersError, also what is asked for later."""
        with self._lock:
            self._closed = True
            self._work.notify_all()
            self._room.notify_all()
            left = [job for turn in self._turns for job in turn.waiting]
            self._turns.clear()
            for decoder in self._decoders:
                decoder.kill()
        for job in left:
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(_closed())
        for thread in self._threads:
            thread.join()

    def _checked(self, data: bytes) -> Checked:
        try:
            return Checked(data, check_header(data, self._max_pixels))
        except ImageError as error:
            return Checked(data, error)

    def _job(self, image: Checked, turn: _Turn, preprocess: Preprocess) -> _Job:
        work, shape = _work_of(preprocess)
        order = Order(image.data, work, image.pixels, math.prod(shape))
        job = _Job(order, turn, lambda planes: preprocess.scale(np.frombuffer(planes, np.uint8).reshape(shape)))
        if isinstance(image.header, ImageError):
            job.answer.set_exception(image.header)
        return job

    def _has_room(self, job: _Job) -> bool:
        return not self._images or (
            self._pixels + job.order.pixels <= WAITING_IMAGES * self._max_pixels
            and self._bytes + job.size <= WAITING_BYTES
        )

    def _add(self, job: _Job) -> None:
        """Let a job wait, with the lock held. Raises DecodersError when it is closed."""
        if self._closed:
            raise _closed()
        if job.answer.done():  # its header says that there is nothing to decode
            return
        if not self._idle and len(self._threads) < self._workers:
            self._threads.append(self._thread())
        self._count(job, 1)
        if job.turn not in self._turns:
            others = [turn.used_s for turn in self._turns]
            job.turn.used_s = max(job.turn.used_s, min(others, default=0))
            self._turns[job.turn] = None
        job.turn.waiting.append(job)
        job.answer.add_done_callback(lambda _: self._done(job))
        if self._idle:
            self._idle -= 1  # here, not where it wakes up: else several images would be left to one thread
            self._work.notify()

    def _thread(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise DecodersError(f"a thread to decode images could not be started: {error}") from error
        return thread

    def _count(self, job: _Job, sign: int) -> None:
        self._images += sign
        self._pixels += sign * job.order.pixels
        self._bytes += sign * job.size

    def _done(self, job: _Job) -> None:
        """Note that a job is answered or cancelled. Called without the lock, which a future must not be told with."""
        with self._lock:
            self._count(job, -1)
            if job in job.turn.waiting:  # it was cancelled
                job.turn.waiting.remove(job)
                if not job.turn.waiting:
                    self._turns.pop(job.turn, None)
            self._room.notify_all()

    def _take(self) -> list[_Job]:
        """Wait for images to decode: one, or several where they are small. Empty when it is closed."""
        with self._lock:
            while not self._closed:
                trip: list[_Job] = []
                # Not more than leaves the other processes something to do.
                most = min(TRIP_IMAGES, -(-sum(len(turn.waiting) for turn in self._turns) // self._workers))
                size = pixels = 0
                while self._turns and len(trip) < most:
                    turn = min(self._turns, key=lambda turn: (turn.running, turn.used_s))
                    job = turn.waiting[0]
                    size, pixels = size + job.size, pixels + job.order.pixels
                    if trip and (size > TRIP_BYTES or pixels > TRIP_PIXELS):
                        break
                    turn.waiting.popleft()
                    if not turn.waiting:
                        del self._turns[turn]
                    if job.answer.set_running_or_notify_cancel():  # from here on it cannot be cancelled any more
                        turn.running += 1
                        trip.append(job)
                if trip:
                    return trip
                self._idle += 1
                self._work.wait()
            return []

    def _run(self) -> None:
        """Live a thread's whole life: decode what comes in one process after the other."""
        decoder: Decoder | None = None
        while jobs := deque(self._take()):
            alone = False
            while jobs:
                part = [jobs[0]] if alone else list(jobs)
                try:
                    decoder = decoder or self._start()
                    self._decode(decoder, part, jobs)
                except DecoderDied as died:
                    self._end(decoder)
                    alone, decoder = True, None
                    self._judge(died, jobs)
                except Exception as error:  # the thread must go on: nobody would start another
                    self._end(decoder)
                    decoder = None
                    if not isinstance(error, DecodersError):
                        log.exception("images could not be decoded; the next ones are")
                    while jobs:
                        self._settle(jobs.popleft(), error)
            if decoder is not None and decoder.spent:
                self._end(decoder)
                decoder = None
        self._end(decoder)

    def _start(self) -> Decoder:
        decoder = Decoder(self._max_pixels, self._nice)
        with self._lock:
            self._decoders.add(decoder)
            if self._closed:
                decoder.kill()
        return decoder

    def _end(self, decoder: Decoder | None) -> None:
        if decoder is not None:
            with self._lock:
                self._decoders.discard(decoder)
            decoder.close()

    def _decode(self, decoder: Decoder, part: Sequence[_Job], jobs: deque[_Job]) -> None:
        """Have the images of `part` decoded, which begins `jobs`; those that are answered leave it."""
        began = time.monotonic()
        for answer in decoder.decode([job.order for job in part]):
            now = time.monotonic()
            with self._lock:
                jobs[0].turn.used_s += now - began
            began = now
            self._settle(jobs.popleft(), answer)

    def _judge(self, died: DecoderDied, jobs: deque[_Job]) -> None:
        """Say what the first of `jobs` has to do with a death; nothing yet where it may be tried again."""
        if self._closed:
            while jobs:
                self._settle(jobs.popleft(), _closed())
            return
        job = jobs[0]
        job.attempts += 1
        if died.fault == "time":
            detail = f"takes more than {job.order.cpu_s:.1f} s of processor time to decode"
            self._settle(jobs.popleft(), ImageError("bomb", detail))
        elif job.attempts >= ATTEMPTS:
            detail = f"the decoder process {died}, {ATTEMPTS} times"
            machine = died.fault in ("start", "late")
            self._settle(jobs.popleft(), DecodersError(detail) if machine else ImageError("undecodable", detail))

    def _settle(self, job: _Job, answer: Any) -> None:
        """Tell a job's answer to who waits for it."""
        with self._lock:
            job.turn.running -= 1
        try:
            if isinstance(answer, Exception):
                raise answer
            job.answer.set_result(job.finish(answer))
        except Exception as error:
            job.answer.set_exception(error)


@lru_cache(maxsize=8)
def _work_of(preprocess: Preprocess) -> tuple[bytes, tuple[int, int, int]]:
    """Give the work of an order, and the shape of its answer."""
    return json.dumps(preprocess.to_dict()).encode(), (3, preprocess.size, preprocess.size)


def _result(answer: Future[NDArray[np.float32]]) -> NDArray[np.float32] | ImageError:
    try:
        return answer.result()
    except ImageError as error:
        return error


def _closed() -> DecodersError:
    return DecodersError("the decoders are closed")
