"""Blows that fall on real agents and trainers at a moment of their work, and how such an agent lives and ends.

Agents and trainers are the real ones, from the command line of `gapstream run` on; only the CLIP is tiny. A trainer
takes seconds to import torch and to trace its first release, so one process does both once (`prepare`), every agent is
forked from it, and every trainer from its agent. Both tell through a pipe what they do; its end says that nobody is
left.
"""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import random
import select
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; a fork of a process with a thread pool hangs

import numpy as np
from PIL import Image

import agent.trainer
import agent.worker
from agent import cli
from agent.commits import CommitStore
from agent.pipeline import Pipeline
from agent.worker import ProcessWorker
from tests.bad_images import encoded
from tests.monkey.runs import Failed
from tests.test_trainer import Bench
from tests.tiny import tiny_clip

SECONDS_OF_A_LIFE = 300
"""Within which an agent must have ended, or been killed. An undisturbed one takes two; the rest is a busy machine."""

PHASES = {
    ("trainer", "export"): 8,
    ("trainer", "commit"): 8,
    ("agent", "commit"): 8,
    ("trainer", "start"): 1,
    ("trainer", "decode"): 1,
    ("trainer", "train"): 1,
    ("trainer", "evaluate"): 1,
    ("agent", "start"): 2,
    ("agent", "read"): 2,
}
"""Whose phase a blow falls into -> how often, relative to the others."""

HOWS = {"kill": 12, "kill agent": 4, "stop": 2, "ENOSPC": 1, "EIO": 1, "EROFS": 1, "EDQUOT": 1, "clock": 1}
"""What a blow is -> how often: a signal to whose phase it is (or to its agent), an error of the disk, a clock that is
set by days."""

_CHANGES = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.scandir",
    "os.truncate",
)


@dataclass(frozen=True)
class Blow:
    """What happens to a process, and when."""

    who: str
    phase: str
    occurrence: int
    """How often the phase is let pass before: which task it hits."""
    step: int
    """Before which look at, or change of, the state folder within the phase; 0: after `delay_s`."""
    delay_s: float
    """Seconds into the phase, or for which a stopped process stands still."""
    how: str


@dataclass
class Spy:
    """What an agent or a trainer knows of its own state: it sees every step, tells of it, and deals the blow."""

    state: str = ""
    told: int = -1
    who: str = "agent"
    phase: str = ""
    steps: int = 0
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    agent_blow: Blow | None = None
    trainer_blows: list[Blow] = field(default_factory=list)
    blow: Blow | None = None
    clock_s: float = 0

    def tell(self, what: str, *more: object) -> None:
        os.write(self.told, (" ".join(map(str, (what, os.getpid(), self.who, self.phase, *more))) + "\n").encode())

    def enter(self, phase: str) -> None:
        if phase == self.phase or self.told < 0:
            return
        self.tell("left", self.steps)
        self.phase, self.steps = phase, 0
        self.tell("in")
        blow = self.blow
        if blow and (blow.who, blow.phase) == (self.who, phase):
            self.seen[self.who, phase] += 1
            if not blow.step and self.seen[self.who, phase] > blow.occurrence:
                self.deal()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.told < 0 or event not in _CHANGES or not str(arguments[0]).startswith(self.state):
            return
        self.steps += 1
        blow = self.blow
        here = self.who, self.phase
        if blow and (blow.who, blow.phase) == here and blow.step == self.steps and self.seen[here] > blow.occurrence:
            self.deal(f"{event} {Path(str(arguments[0])).name}")

    def deal(self, where: str = "timed") -> None:
        assert self.blow
        blow, self.blow = self.blow, None
        if blow.how == "clock":
            self.tell("clock", blow.delay_s)
            self.clock_s += random.Random(blow.delay_s).choice((-1, 1)) * 86400 * 3
        elif blow.how in errno.__dict__:
            if blow.step:
                self.tell("fault", blow.how, where)
                raise OSError(getattr(errno, blow.how), os.strerror(getattr(errno, blow.how)), where)
        elif not blow.step:
            self.tell("timed", blow.delay_s, blow.how)
        elif blow.how == "stop":
            self.tell("stopped", blow.delay_s, where)
            os.kill(os.getpid(), signal.SIGSTOP)
        elif blow.how == "kill agent" and self.who == "trainer":
            self.tell("killed-agent", where)
            os.kill(os.getppid(), signal.SIGKILL)
        else:
            self.tell("killed", where)
            os.kill(os.getpid(), signal.SIGKILL)


SPY = Spy()


def prepare(folder: Path, method: str) -> None:
    """Do once what every agent and trainer would do first: make the CLIP, and trace a release."""
    clip = tiny_clip()
    assert clip.tokenizer  # is kept once it is made
    agent.trainer.load_clip = lambda settings: tiny_clip()
    evaluation = {"holdout_fraction": 0.2}
    release = {"max_batch": 4}
    settings = {"method": {"name": method}, "model": {"threads": 1}}
    bench = Bench(folder, evaluation=evaluation, release=release, **settings)
    learner = agent.trainer.Trainer(bench.config, None)
    bench.learn(learner, bench.task([(name, image(name, 0)) for name in ("one", "two", "three")]))
    agent.trainer.load_clip = lambda settings: clip  # untouched so far, and each fork has its own
    agent.trainer.OnnxExporter = lambda *settings: learner._exporter
    bench.store.close()
    gc.collect()
    gc.freeze()  # or every fork's first collection copies all of this process's pages


def spied_upon() -> None:
    """Let SPY see what this process and its children do from now on."""
    context = multiprocessing.get_context("fork")
    agent.worker.multiprocessing.get_context = lambda kind: context
    clock = time.time
    time.time = lambda: clock() + SPY.clock_s
    sys.addaudithook(SPY)

    def around(owner: Any, name: str, phase: str, after: str) -> None:
        wrapped = getattr(owner, name)

        def spied(*arguments: Any) -> Any:
            SPY.enter(phase)
            try:
                return wrapped(*arguments)
            finally:
                SPY.enter(after)

        setattr(owner, name, spied)

    around(CommitStore, "commit", "commit", "read")
    around(CommitStore, "carry", "commit", "read")
    around(Pipeline, "run", "read", "end")
    start, sender, main = ProcessWorker.start, agent.worker._ProgressSender.__call__, agent.worker._child_main

    def started(worker: ProcessWorker, commit: Path | None) -> None:
        start(worker, commit)
        if SPY.trainer_blows:  # this one has taken it
            SPY.trainer_blows.pop(0)

    def progressed(self: Any, progress: Any) -> None:
        SPY.enter(progress.phase)
        sender(self, progress)

    def child_main(*arguments: Any) -> None:
        SPY.who, SPY.phase, SPY.seen = "trainer", "", Counter()
        SPY.blow = SPY.trainer_blows[0] if SPY.trainer_blows else None
        SPY.enter("start")
        main(*arguments)

    ProcessWorker.start = started
    agent.worker._ProgressSender.__call__ = progressed
    agent.worker._child_main = child_main


@dataclass
class Life:
    """What became of an agent, from its start to its end."""

    status: int
    events: list[list[str]]

    def count(self, *kinds: str) -> int:
        return sum(event[0] in kinds for event in self.events)


def live(
    settings: Mapping[str, object],
    log: Path,
    agent_blow: Blow | None = None,
    trainer_blows: Sequence[Blow] = (),
    enough: Callable[[], bool] = lambda: False,
) -> Life:
    """An agent's whole life on `settings`, and those of its trainers; it is told to stop once there is `enough`.

    Raises Failed when somebody does not end.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.close(reading)
            with log.open("ab") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            SPY.state, SPY.told = str(settings["state.path"]), writing
            SPY.agent_blow = SPY.blow = agent_blow
            SPY.trainer_blows = list(trainer_blows)
            SPY.enter("start")
            pairs = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
            code = cli.main(["run", *pairs])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    events: list[list[str]] = []
    due: list[tuple[float, int, int]] = []
    deadline = time.monotonic() + SECONDS_OF_A_LIFE
    rest, told = b"", False
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while True:
            now = time.monotonic()
            for when, target, number in [one for one in due if one[0] <= now]:
                due.remove((when, target, number))
                if number == signal.SIGSTOP:
                    due.append((now + 0.2, target, signal.SIGCONT))
                try:
                    os.kill(target, number)
                except ProcessLookupError:
                    continue
                if number != signal.SIGCONT:
                    phase = [event[2:4] for event in events if event[0] == "in" and int(event[1]) == target][-1]
                    events.append(["killed" if number == signal.SIGKILL else "stopped", str(target), *phase, "timed"])
            wait_s = max(0.0, min([now + 0.2, *(when for when, *_ in due)]) - now)
            if not told and enough():
                os.kill(pid, signal.SIGTERM)
                told = True
            if now > deadline:
                os.kill(pid, signal.SIGKILL)
                raise Failed(f"an agent or trainer did not end in {SECONDS_OF_A_LIFE} s\n{log.read_text()[-3000:]}")
            if not select.select([pipe], [], [], wait_s)[0]:
                continue
            if not (chunk := pipe.read(65536)):
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                event = [*line.decode().split(" "), str(time.monotonic())]
                events.append(event)
                target, who = int(event[1]), event[2]
                if event[0] == "timed":
                    how = {"stop": signal.SIGSTOP}.get(event[5], signal.SIGKILL)
                    due.append((now + float(event[4]), pid if event[5] == "kill agent" else target, how))
                elif event[0] == "stopped":
                    due.append((now + float(event[4]), target, signal.SIGCONT))
                elif event[0] == "killed-agent":
                    events.append(["killed", str(pid), "agent", f"{who}'s {event[3]}", *event[4:]])
    return Life(os.waitpid(pid, 0)[1], events)


def image(name: str, number: int) -> bytes:
    pixels = np.random.default_rng([number, *name.encode()]).integers(0, 256, (16, 16, 3), np.uint8)
    return encoded(Image.fromarray(pixels), "PNG")


def measured(life: Life) -> tuple[dict[tuple[str, str], list[int]], dict[tuple[str, str], list[float]]]:
    """How many steps, and how many seconds, each phase took each time."""
    steps: dict[tuple[str, str], list[int]] = defaultdict(list)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    began: dict[tuple[str, str], float] = {}
    for kind, _, who, phase, *more in life.events:
        if kind == "in":
            began[who, phase] = float(more[-1])
        elif kind == "left" and phase:
            steps[who, phase].append(int(more[0]))
            seconds[who, phase].append(float(more[-1]) - began[who, phase])
    return steps, seconds


def tally(life: Life) -> Counter[str]:
    """The blows of a life by what they were, whose and in which phase."""
    kinds = {"killed": "kill", "stopped": "stop", "fault": "fault", "clock": "clock"}
    return Counter(f"{kinds[kind]} {who} in {phase}" for kind, _, who, phase, *_ in life.events if kind in kinds)
