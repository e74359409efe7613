"""A call in a thread that ends with the process, however long it takes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(call: Callable[[], T], name: str) -> Future[T]:
    """Give a future for what `call` gives or raises; `name` is the name of its thread."""
    # No ThreadPoolExecutor: Python waits for its threads at exit, and a call may never return while a cluster is away.
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return outcome
