"""What a long-running command does to its own process: the log on standard error, and how it is told to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from exporter.masking import masked

if TYPE_CHECKING:
    from agent.config import Config

LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
"""The same for agent and trainer, whose lines come out mixed on one standard error; the name tells them apart."""


REPEATS = 20
"""Lines that one place in the code may log in REPEATS_S; what comes beyond is counted and left out. Chosen by hand: no
place that says something new each time comes near it, and a peer that provokes a line thousands of times a second does.
"""

REPEATS_S = 60
"""Seconds for which these lines are counted together. A longer time hides longer that it goes on."""


class Repeats(logging.Filter):
    """Leaves out what one place in the code logs more than REPEATS times in REPEATS_S seconds, and says how much it
    was."""

    def __init__(self) -> None:
        """Begin with nothing counted; there are no more entries than places that log."""
        super().__init__()
        self._places: dict[tuple[str, int], tuple[float, int]] = {}
        """Place -> when its time began, and how many lines came since."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the line is written. The last one before a silence says so, the first one after it how many."""
        if record.levelno < logging.INFO:  # who asks for these wants all of them
            return True
        place, now = (record.pathname, record.lineno), time.monotonic()
        began, lines = self._places.get(place, (now, 0))
        note = ""
        if now - began > REPEATS_S:
            if lines > REPEATS:
                note = f" ({lines - REPEATS} lines from the same place were left out)"
            began, lines = now, 0
        lines += 1
        self._places[place] = began, lines
        if lines == REPEATS:
            note = f" (more lines from the same place are left out for {REPEATS_S} s)"
        if note:
            record.msg, record.args = record.getMessage() + note, ()
        return lines <= REPEATS


class _Masked(logging.Formatter):
    """Writes a line, tracebacks included, without the credentials inside URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def stderr_handler() -> logging.Handler:
    """Give what writes the log of a process to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Masked(LOG_FORMAT))
    handler.addFilter(Repeats())
    return handler


def log_to_stderr(config: Config) -> None:
    """Log what happens to standard error, at the configured level."""
    logging.basicConfig(level=config.agent.log_level, handlers=[stderr_handler()])
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
