"""What a long-running command does to its own process: the log on standard error, and how it is told to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from agent.config import Config

LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
"""The same for agent and trainer, whose lines come out mixed on one standard error; the name tells them apart."""


def log_to_stderr(config: Config) -> None:
    """Log what happens to standard error, at the configured level."""
    logging.basicConfig(level=config.agent.log_level, format=LOG_FORMAT)
    if config.agent.log_level != "DEBUG":
        # The client has lines for every connection and attempt; streams.kafka says what came of them.
        for handler in logging.getLogger().handlers:
            handler.addFilter(lambda record: not record.name.startswith("kafka."))


@contextlib.contextmanager
def stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """Let SIGTERM and SIGINT set `stop`; a second one ends the process at once, which loses nothing either."""

    def handle(number: int, _: Any) -> None:
        # No more than this: a handler runs between any two instructions, and a lock taken here may be held already.
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_ours(error: BaseException) -> bool:
    """Tell whether an exception is of a class of this project, so that its message is written for people."""
    return type(error).__module__.partition(".")[0] in ("agent", "exporter", "streams")
