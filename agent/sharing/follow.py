"""The process of a rank other than the trainer, from its start (agent.sharing.start) to its end."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from contextlib import closing
from typing import Any

from agent.config import Config
from agent.process import stderr_handler
from agent.sharing.members import Connection, Gone, Refused, join
from agent.sharing.start import EXIT_REFUSED

log = logging.getLogger("agent.sharing.follow")

_AGAIN_S = 2.0
"""Seconds between two attempts to reach the trainer: chosen by hand; it restarts in some seconds."""


def main() -> int:
    """Live the process's whole life, with what start.RankProcess writes to standard input."""
    _end_with_parent()
    order = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_at_end_of_input, name="parent-watch", daemon=True).start()
    config = Config.model_validate(order["config"])
    logging.basicConfig(level=config.agent.log_level, handlers=[stderr_handler()])
    logging.getLogger("agent.methods").setLevel(logging.ERROR)  # the trainer says the same
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says when to end
    threads = config.model.threads or max(1, (os.cpu_count() or 1) // config.training.processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read once, when torch is imported below
    from agent.model.clip import ModelError
    from agent.sharing.machine import SharingError
    from agent.sharing.rank import Rank

    try:
        rank = Rank(config, order["number"], threads)
        host, port = order["address"]
        number = order["number"] if order["own"] else None
        connection = _joined(rank, (host, port), bytes.fromhex(order["secret"]), number)
    except (Refused, SharingError, ModelError) as error:
        log.error("this rank may not join: %s", error)
        return EXIT_REFUSED
    with closing(connection):
        rank.follow(connection, host)
    return 0


def _joined(rank: Any, address: tuple[str, int], secret: bytes, number: int | None) -> Connection:
    """Join the trainer, as soon as there is one."""
    facts = {"host": socket.gethostname(), "process": os.getpid(), "device": rank.device, "number": number}
    said = ""
    while True:
        try:
            connection = join(address, secret, rank.terms, facts)
        except (OSError, Gone) as error:
            if str(error) != said:
                log.info("no trainer at %s:%d yet: %s", *address, error)
                said = str(error)
            time.sleep(_AGAIN_S)
        else:
            log.info("joined the trainer at %s:%d", *address)
            return connection


def _end_with_parent() -> None:
    """On Linux, die with the parent however it ends, and whatever this process does then."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _end_at_end_of_input() -> None:
    # Not sys.stdin: Python's end would wait for the lock that its reader holds, and abort.
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
