"""Puts images of different requests through the model together: what is ready when it is free is one batch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from exporter.runtime import Prediction, Prepared


@dataclass(frozen=True)
class _Submitted:
    """The images of one request, and where their predictions are waited for."""

    images: Sequence[Prepared]
    top: int
    answer: Future[list[Prediction]]


class Batcher:
    """A thread that classifies what is submitted. `submit` may be called from any thread.

    It never waits for a batch to fill up: a lone request is answered at once, and under load the requests that came
    while the model was busy make the next batch.
    """

    def __init__(
        self,
        classify: Callable[[Sequence[Prepared], int], list[Prediction]],
        max_batch: int,
        observe: Callable[[int], None] = lambda images: None,
    ) -> None:
        """`classify`: images and the number of classes to list (0: all) -> a prediction for each, by one release.
        `max_batch`: number of images from which on no more requests are added to a batch. `observe`: is told the number
        of images of every batch."""
        self._classify = classify
        self._max_batch = max_batch
        self._observe = observe
        self._waiting: queue.SimpleQueue[_Submitted | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, images: Sequence[Prepared], top: int) -> Future[list[Prediction]]:
        """Give a future of the predictions for `images`, or of what `classify` raised; `top`: classes to list, 0 for
        all.
        """
        answer: Future[list[Prediction]] = Future()
        self._waiting.put(_Submitted(images, top, answer))
        return answer

    @property
    def alive(self) -> bool:
        """Whether the thread runs; without it nothing submitted is ever answered."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Answer what was submitted, then end."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            one = self._waiting.get()
            batch: list[_Submitted] = []
            size = 0
            while one is not None:
                # False where the client has gone and its request was cancelled; from here on it cannot be any more.
                if one.answer.set_running_or_notify_cancel():
                    batch.append(one)
                    size += len(one.images)
                if size >= self._max_batch:
                    break
                try:
                    one = self._waiting.get_nowait()
                except queue.Empty:
                    break
            else:  # the None of `close`, which comes after everything submitted before it
                ended = True
            if batch:
                self._answer(batch)

    def _answer(self, batch: Sequence[_Submitted]) -> None:
        images = [image for one in batch for image in one.images]
        # The largest `top` of all: each request's own is cut from its answers below.
        top = 0 if any(one.top == 0 for one in batch) else max(one.top for one in batch)
        self._observe(len(images))
        try:
            predictions = iter(self._classify(images, top))
            for one in batch:
                own = [next(predictions) for _ in one.images]
                cut = one.top or None
                one.answer.set_result([Prediction(p.labels[:cut], p.scores[:cut], p.release) for p in own])
        except Exception as error:  # told to who waits; the thread goes on with the next batch
            for one in batch:
                if not one.answer.done():
                    one.answer.set_exception(error)
