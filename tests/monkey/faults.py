"""Fails every operation on the disk in turn, fills the disk, sets the clock, and damages every file of a state folder.

`python -m tests.monkey.faults --count 500 --seed 7`. Each case is an agent in a forked process that learns a short
stream, with a learner that keeps a chain of hashes; whatever happens to it, the next one must end with the same bytes.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import logging
import os
import random
import shutil
import subprocess
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import exporter.files
from agent.process import is_ours
from streams.dead_letters import FileDeadLetters
from streams.record import Reason, Rejected
from tests.fakes import LIST, ListSource, pipeline, records
from tests.monkey.runs import Failed, Run

WRITING = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)
"""What a disk says when it takes nothing."""
READING = (errno.EIO, errno.EACCES)
"""What it says when it gives nothing."""

_READS = ("read", "scandir", "listdir", "open to read")


class Faults:
    """Counts the operations of this process below a folder, and fails those that `fails` chooses. Never taken back."""

    def __init__(self, folder: Path, fails: Callable[[int, bool], int]) -> None:
        """`fails`: from an operation's number, from 1, and whether it reads, to the error it ends with, or 0."""
        self._folder, self._fails = str(folder), fails
        self.operations = 0
        self.failed = ""
        for name in ("fsync", "rename", "replace", "write", "link", "symlink", "mkdir", "rmdir", "unlink", "remove",
                     "scandir", "listdir", "sendfile", "truncate", "ftruncate"):  # fmt: skip
            setattr(os, name, partial(self._call, name, getattr(os, name)))
        self._os_open, self._io_open = os.open, io.open
        os.open = self._open_descriptor
        io.open = builtins.open = self._open

    def hit(self, operation: str, place: Any, folder: int | None = None) -> None:
        if isinstance(place, int):
            place = Path(f"/proc/self/fd/{place}").readlink()
        elif folder is not None:
            place = Path(f"/proc/self/fd/{folder}").readlink() / place
        if not os.fspath(place).startswith(self._folder):
            return
        self.operations += 1
        if number := self._fails(self.operations, operation in _READS):
            self.failed = f"{operation} of {os.fspath(place).removeprefix(self._folder)}: {errno.errorcode[number]}"
            raise OSError(number, os.strerror(number), os.fspath(place))

    def _call(self, name: str, function: Any, place: Any = ".", *others: Any, **named: Any) -> Any:
        self.hit(name, place, named.get("dir_fd"))
        return function(place, *others, **named)

    def _open_descriptor(self, place: Any, flags: int, *others: Any, **named: Any) -> int:
        self.hit("open" if flags & (os.O_WRONLY | os.O_RDWR) else "open to read", place, named.get("dir_fd"))
        return self._os_open(place, flags, *others, **named)

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *others: Any, **named: Any) -> Any:
        if isinstance(file, int) or not os.fspath(file).startswith(self._folder):
            return self._io_open(file, mode, buffering, *others, **named)
        reads = not set(mode) & set("wax+")
        self.hit("open to read" if reads else "open", file)
        raw = _File(self, file, mode.replace("b", "").replace("t", ""))
        binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedReader(raw) if reads else io.BufferedWriter(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, *others, **named)


class _File(io.FileIO):
    def __init__(self, faults: Faults, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._faults = faults

    def write(self, data: Any) -> int:
        self._faults.hit("write", self.name)
        return super().write(data)

    def readinto(self, buffer: Any) -> int:
        self._faults.hit("read", self.name)
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self._faults.hit("read", self.name)
        return super().readall()


def stream(length: int = 9) -> ListSource:
    """Three tasks; one record is rejected at intake, one in the trainer, one task is halved and a sample set aside."""
    items = [*records("a", "late b"), Rejected(LIST, 2, Reason.TRUNCATED, "cut short"), *records("c", "d", start=3)]
    items += [*records("raise", "e", "f", "g", start=5)]
    return ListSource(items[:length])


def learn(state: Path, length: int = 9) -> bytes:
    """Runs an agent to the end of the stream; returns the learner's state."""
    letters = FileDeadLetters(state / "dead_letters", 10**6)
    agent = pipeline(state, stream(length), dead_letters=letters, keep=2, quarantine=True)
    commit = agent.run()
    letters.close()
    agent.commits.close()
    assert commit is not None
    return (commit.path / "learner.safetensors").read_bytes()


def letters(state: Path) -> set[tuple[int, str]]:
    lines = [line for file in (state / "dead_letters").glob("*.jsonl") for line in file.open()]
    return {(letter["offset"], letter["reason"]) for letter in map(json.loads, filter(str.strip, lines))}


def in_a_fork(function: Callable[[], Any]) -> tuple[int, str]:
    """Calls `function` in a forked process: 0, 1 (it stopped with a message for people) or 70, and what it said."""
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        code, told = 70, ""
        try:
            code, told = 0, str(function())
        except Exception as error:
            code, told = 1, str(error)
            if not told or not (is_ours(error) or isinstance(error, OSError)):
                code, told = 70, traceback.format_exc()
        finally:
            os.write(writing, told.encode()[:60_000])
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def damage(state: Path, chance: random.Random, everything: bool = False) -> str:
    """Damages one file of a commit, or, with `everything`, any file or link of the state folder; says what was done."""
    found = (path for path in state.rglob("*") if path.is_symlink() or path.is_file())
    file = chance.choice(sorted(path for path in found if everything or "commits" in path.parts))
    name = file.relative_to(state)
    content = file.read_bytes() if file.is_file() else b""
    how = chance.choice(("flipped", "cut", "emptied", "deleted", "longer", "replaced"))
    if file.is_symlink():
        file.unlink()
        if how == "flipped":
            file.symlink_to("nowhere")
        elif how == "replaced":
            file.mkdir()
        elif how == "emptied":
            file.touch()
    elif how == "flipped" and content:
        at = chance.randrange(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :])
    elif how == "deleted":
        file.unlink()
    elif how == "replaced":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(content[: chance.randrange(len(content))] if how == "cut" and content else
                         content + b"\0" if how == "longer" else b"")  # fmt: skip
    return f"{name} {how}"


class Case:
    """An agent's state folder, what is done to it, and how it must end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.expected = learn(folder / "undisturbed")
        self.letters = letters(folder / "undisturbed")

        def count() -> int:
            faults = Faults(folder / "counted", lambda number, reads: 0)
            learn(folder / "counted")
            return faults.operations

        code, told = in_a_fork(count)
        assert code == 0, told
        self.operations = int(told)
        """Operations of a run that nothing disturbs."""
        exporter.files.READ_PAUSE_S = 0

    def fault(self, state: Path, chance: random.Random) -> str:
        """One operation fails, or all from it on, or all of which one in ten."""
        number, write, read = chance.randint(1, self.operations), chance.choice(WRITING), chance.choice(READING)
        lasting = chance.choice((1, 1, 1, 10**9, 10))

        def fails(at: int, reads: bool) -> int:
            hit = number <= at < number + lasting
            return 0 if not hit else read if reads else 0 if lasting > 1 and reads else write

        def run() -> str:
            faults = Faults(state, fails)
            try:
                learn(state)
            except Exception as error:
                error.add_note(faults.failed)
                raise
            return faults.failed

        what = f"operation {number} and {lasting - 1} more with {errno.errorcode[write]}"
        code, told = in_a_fork(run)
        if code not in (0, 1):
            raise Failed(f"{what} ended the agent with {code}: {told}")
        self.judge(state, what)
        return "fault: stopped" if code else "fault: survived"

    def clock(self, state: Path, chance: random.Random) -> str:
        """The time of day jumps by days between any two looks at it."""

        def run() -> None:
            clock, ahead = time.time, 0.0

            def jumping() -> float:
                nonlocal ahead
                if chance.random() < 0.2:
                    ahead += chance.choice((-1, 1)) * chance.choice((0.5, 60, 86_400, 86_400 * 400))
                return clock() + ahead

            time.time = jumping
            learn(state)

        code, told = in_a_fork(run)
        if code:
            raise Failed(f"a clock that is set ended the agent with {code}: {told}")
        self.judge(state, "a clock that is set")
        return "clock set"

    def damaged(self, state: Path, chance: random.Random) -> str:
        """A file of the state folder is damaged between two starts: the next goes on, or refuses."""
        learn(state, 6)
        done = damage(state, chance, everything=True)
        code, told = in_a_fork(partial(learn, state))
        if code not in (0, 1):
            raise Failed(f"{done}: the agent ended with {code}: {told}")
        if code == 1 and not done.startswith(("CURRENT", "RELEASE", "lock", "dead_letters")):
            raise Failed(f"{done}: the agent refused to start, though there is an intact commit: {told}")
        if code == 1:  # as the message says
            for name in ("CURRENT", "RELEASE", "lock", "dead_letters/00000001.jsonl"):
                if done.startswith(name):
                    shutil.rmtree(state / name) if (state / name).is_dir() else (state / name).unlink()
        # Letters that were damaged are lost; those that come later are not.
        self.judge(state, done, letters_too="dead_letters" not in done)
        return f"damaged: {'went on' if code == 0 else 'refused'}"

    def full(self, state: Path, chance: random.Random) -> str:
        """A small disk fills up, and is made larger until the stream has been learned."""
        state.mkdir()
        size = chance.randint(4, 60)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 4096}", "tmpfs", str(state)]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            return "full: skipped, as no tmpfs may be mounted here"
        try:
            stops = 0
            while (found := in_a_fork(partial(learn, state)))[0]:
                code, told = found
                if code != 1 or not any(word in told for word in ("space", "No space", "room", "write")):
                    raise Failed(f"a full disk ended the agent with {code}: {told}")
                size, stops = size + chance.randint(1, 8), stops + 1
                subprocess.run(["mount", "-o", f"remount,size={size * 4096}", str(state)], check=True)
            self.judge(state, f"a disk that was full {stops} times")
        finally:
            subprocess.run(["umount", str(state)], check=True)
        return "full" if stops else "full: large enough"

    def judge(self, state: Path, what: str, letters_too: bool = True) -> None:
        """The next start must end with what an undisturbed one ends with."""
        code, told = in_a_fork(lambda: str(learn(state) == self.expected))
        if (code, told) != (0, "True"):
            raise Failed(f"after {what} the next agent ended with {code}, and the same bytes: {told}")
        if letters_too and letters(state) != self.letters:
            raise Failed(f"after {what} other records are set aside: {letters(state)}, expected {self.letters}")
        left = [path.name for path in state.rglob("*") if path.suffix in (".staging", ".pruned", ".new")]
        if left or list((state / "spool").glob("*")):
            raise Failed(f"after {what} files are left: {left}, {list((state / 'spool').glob('*'))}")


def main(run: Run) -> None:
    logging.disable()  # what an agent says of every fault
    os.fsync = lambda descriptor: None  # which only a power cut would tell; `Faults` makes it fail all the same
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        case = Case(Path(folder))
        kinds = (case.fault, case.fault, case.fault, case.fault, case.damaged, case.damaged, case.clock, case.full)
        for number in run.numbers:
            state = Path(folder) / str(number)
            with run.case(number) as chance:
                found[chance.choice(kinds)(state, chance)] += 1
            shutil.rmtree(state)
            run.done(number + 1 - run.first)
    run.figures(operations_of_a_run=case.operations, **found)


if __name__ == "__main__":
    Run("faults", 500).watched(main)
