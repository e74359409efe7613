"""Waits for a cluster or a topic that is on its way, as where broker, producer and servers are started together."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from streams.source import NotThere

log = logging.getLogger(__name__)

WAIT_S = 60
"""Seconds that something may take to come. Chosen by hand: a single broker starts in about ten. A mistyped address is
an error only after this time, though the log says at once what is waited for."""

_PAUSE_S = 1
"""Seconds between two attempts; what came is noticed that much later."""

Found = TypeVar("Found")


def when_there(attempt: Callable[[], Found], stop: threading.Event) -> Found | None:
    """What `attempt` returns; it is tried again while it raises NotThere. None when `stop` was set first.

    Raises NotThere after WAIT_S seconds, and whatever else `attempt` raises.
    """
    until = time.monotonic() + WAIT_S
    told = ""
    while not stop.is_set():
        try:
            return attempt()
        except NotThere as error:
            if time.monotonic() > until:
                raise
            if str(error) != told:
                log.warning("%s. Waiting for it, at most %d s", error, WAIT_S)
                told = str(error)
            stop.wait(_PAUSE_S)
    return None
