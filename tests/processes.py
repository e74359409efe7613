"""gapstream as the processes an operator has: started, asked over HTTP, and ended."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def running(command: Sequence[str | Path], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process for as long as the block runs; what it says goes to `log`."""
    with log.open("wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    """A port that is free, and stays so though other tests connect all the time: Linux gives their ends higher ones."""
    chance = random.SystemRandom()
    while True:
        port = chance.randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def gapstream(command: str, **settings: object) -> list[str]:
    """The command line of a gapstream process; a double underscore is the dot of a key."""
    sets = (f"--set={key.replace('__', '.')}={value}" for key, value in settings.items())
    return [sys.executable, "-m", "agent", command, *sets]


def get(url: str, data: bytes | None = None) -> Any:
    """The JSON behind it; None where nothing (good) comes."""
    try:
        with urllib.request.urlopen(url, data, timeout=10) as answer:
            return json.load(answer)
    except (OSError, ValueError):
        return None


def until(condition: Callable[[], Any], what: str, log: Path, timeout_s: float = 90) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s\n{log.read_text()[-3000:]}"
        time.sleep(0.2)
    return found
