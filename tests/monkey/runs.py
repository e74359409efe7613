"""What the parts of the monkey share: their command line, their progress, and how a case that fails is run again."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import mmap
import os
import random
import resource
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

_TELL_EVERY_S = 10

_SILENT_S = 900
"""Within which a case must end; the longest take half a minute. The rest is a busy machine."""


class Failed(Exception):
    """The product did what it must not do; the message says what."""


class Run:
    """The cases of one part, numbered. Each draws from a generator of its own, so that it can be run again alone."""

    def __init__(self, part: str, count: int) -> None:
        """`count`: cases where the command line says nothing."""
        parser = argparse.ArgumentParser(prog=f"python -m tests.monkey.{part}")
        parser.add_argument("--seed", type=int, default=1)
        parser.add_argument("--count", type=int, default=count, help="how many cases (kills: blows) there are")
        parser.add_argument("--first", type=int, default=0, help="number of the first case (kills: episode)")
        asked = parser.parse_args()
        self.part, self.seed, self.count, self.first = part, asked.seed, asked.count, asked.first
        self.numbers = range(self.first, self.first + self.count)
        self._began = self._told = time.monotonic()
        self._resident: list[float] = []
        self._at = mmap.mmap(-1, 8)  # shared with the process that watches

    def watched(self, main: Callable[[Run], None]) -> NoReturn:
        """Runs `main` in a child, and tells which case a crash or a hang of it belongs to; ends the process."""
        if not (pid := os.fork()):
            faulthandler.enable()
            code = 1
            try:
                main(self)
                code = 0
            except SystemExit as error:
                print(end="" if error.code == 1 else error.code)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        at, since = bytes(8), time.monotonic()
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if self._at[:] != at:
                at, since = self._at[:], time.monotonic()
            if time.monotonic() - since > _SILENT_S:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code < 0:
            (number,) = struct.unpack("q", self._at)
            self.say(f"case {number} ended with {signal.Signals(-code).name}, or took more than {_SILENT_S} s")
            self._say_again(number)
        raise SystemExit(code and 1)

    @contextlib.contextmanager
    def case(self, number: int) -> Iterator[random.Random]:
        """Gives a case's generator; what it raises ends the process, which says how to run the case again."""
        self._at[:] = struct.pack("q", number)
        try:
            yield random.Random(f"{self.part} {self.seed} {number}")
        except Exception as error:
            told = str(error) if isinstance(error, Failed) else traceback.format_exc()
            self.say(f"case {number} failed: {told}")
            self._say_again(number)
            raise SystemExit(1) from None

    def _say_again(self, number: int) -> None:
        self.say(f"again: python -m tests.monkey.{self.part} --seed {self.seed} --first {number} --count 1")

    def done(self, cases: int) -> None:
        """Notes that so many cases are done, and tells of it now and then."""
        while cases >= self.count * (len(self._resident) + 1) / 4:
            self._resident.append(memory_mb())
        if time.monotonic() - self._told > _TELL_EVERY_S:
            self._told = time.monotonic()
            self.say(f"{cases} of {self.count}, {cases / (self._told - self._began):.1f} a second")

    def figures(self, **figures: Any) -> None:
        """Prints the last line: what was counted, how long it took and what memory this process had."""
        seconds = time.monotonic() - self._began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        told = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in figures.items())
        quarters = ", ".join(f"{megabytes:.0f}" for megabytes in self._resident)
        self.say(f"seed {self.seed}; {told}; {seconds:.0f} s; MB after each quarter: {quarters}; peak {peak:.0f} MB")

    def say(self, text: str) -> None:
        print(f"{self.part}: {text}", flush=True)


def memory_mb() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def reset_peak() -> None:
    """Let `peak_mb` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """The most resident memory that this process had since the last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
