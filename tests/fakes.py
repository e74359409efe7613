"""Hand-written stand-ins shared by the tests. Nothing here imports torch."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from prometheus_client import CollectorRegistry
from safetensors import SafetensorError

from agent.commits import CommitStore
from agent.config import Config
from agent.pipeline import Pipeline, Rules, resume
from agent.scoring.report import Report, TaskReport
from agent.sealing import seal
from agent.values import Commit, LateRejection, OnProgress, Outcome, Progress
from agent.worker import Learner, RankLost, TaskFault, WorkerDied, _Failed
from exporter import release
from exporter.metrics import Metrics
from exporter.preprocess import Preprocess
from streams.buffer import CutRule, Task, TaskBuffer
from streams.record import Item, Offsets, Partition, Reason, Record, Rejected
from streams.source import DeadLetterError, SpoolError
from streams.spool import Spool

FAKE_LEARNER = "tests.fakes:FakeLearner"
FAULTS = {
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "broken": OSError(errno.EIO, "Input/output error"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "readonly": OSError(errno.EROFS, "Read-only file system"),
    "spool": SpoolError("cannot read a sample"),
    "memory": MemoryError("Unable to allocate 16.0 GiB"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    "cuda": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "rank": RankLost("rank 1, there (process 7, cuda:0), is gone"),
}
"""What a machine does to a learner, whatever the task."""
LIST = Partition("list", 0)


class FakeLearner:
    """Learns by folding every sample's position, label and bytes into a chain of hashes: a sample that is lost, learned
    twice or learned in another order gives another `learner.safetensors`.

    Images (or class names) that begin with a word misbehave: `late` is rejected while decoding, `raise` blames the
    task, `break NAME` raises one of FAULTS, `die` kills the process, `die-once PATH` does so unless PATH is there,
    `hang` says nothing more, `busy SECONDS` spins in pure Python, `strain SECONDS` does so and
    blames the task.
    """

    def __init__(self, config: Config, commit: Path | None) -> None:
        self.config = config
        self.state: dict[str, Any] = {"chain": "", "learned": [], "classes": []}
        self.report = Report(task=0)
        if commit is not None:
            self.state = json.loads((commit / "learner.safetensors").read_text())
            self.report = Report.read(commit / "report.json")

    def learn(self, task: Task, staging: Path, on_progress: OnProgress) -> Outcome:
        rejected = []
        for step, sample in enumerate(task.samples):
            on_progress(Progress("train", task.number, epoch=1, epochs=1, step=step, steps=len(task.samples)))
            image = sample.read()
            word, _, argument = image.decode(errors="replace").partition(" ")
            if word == "late":
                rejected.append(LateRejection(sample.partition, sample.offset, Reason.TRUNCATED, "cut short"))
                continue
            misbehave(word, argument)
            misbehave(*sample.label.partition(" ")[::2])
            facts = f"{self.state['chain']}{sample.partition}{sample.offset}{sample.label}".encode()
            self.state["chain"] = hashlib.sha256(facts + image).hexdigest()
            self.state["learned"].append([*sample.partition, sample.offset])
        self.state["classes"] += [name for name in task.classes if name not in self.state["classes"]]
        entry = TaskReport(task=task.number, classes=task.classes, samples=len(task.samples))
        self.report = replace(self.report, task=task.number, history=(*self.report.history, entry))
        for name, content in (("learner.safetensors", self.state), ("learner.json", {})):
            (staging / name).write_text(json.dumps(content))
        self.report.write(staging / "report.json")
        write_release(staging / "release", self.state["classes"], self.state["chain"])
        return Outcome(
            task=task.number,
            next_offsets=task.next_offsets,
            staging=staging,
            files=seal(staging),
            report=self.report,
            classes=tuple(self.state["classes"]),
            update=None,
            release_refused=None,
            rejected=tuple(rejected),
        )


def misbehave(word: str, argument: str) -> None:
    if word == "raise":
        raise TaskFault from RuntimeError("told to raise")
    if word == "break":
        raise FAULTS[argument]
    if word == "die-once" and not Path(argument).exists():
        Path(argument).touch()
        word = "die"
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "hang":
        threading.Event().wait()
    if word in ("busy", "strain"):
        logging.getLogger(__name__).info("busy now")
        until = time.monotonic() + float(argument)
        while time.monotonic() < until:
            pass
    if word == "strain":
        raise TaskFault from RuntimeError("told to raise in the end")


class UnbuildableLearner:
    def __init__(self, config: Config, commit: Path | None) -> None:
        raise ValueError("no weights for this model;\n  put them there")


class InlineWorker:
    """A worker in this process: `poll` learns the whole task before it returns."""

    def __init__(self, config: Config | None = None, learner: str = FAKE_LEARNER) -> None:
        self._config = config or Config()
        self._class = learner
        self._learner: Learner | None = None
        self._task: tuple[Task, Path] | None = None

    @property
    def idle(self) -> bool:
        return self._task is None

    @property
    def ready(self) -> bool:
        return self._learner is not None

    def start(self, commit: Path | None) -> None:
        self._learner = resolve_name(self._class)(self._config, commit)

    def submit(self, task: Task, staging: Path, commit: Path | None) -> None:
        assert self.idle, "one task at a time"
        if self._learner is None:
            self.start(commit)
        self._task = task, staging

    def poll(self) -> Progress | Outcome | None:
        if self._task is None or self._learner is None:
            return None
        (task, staging), self._task = self._task, None
        try:
            return self._learner.learn(task, staging, lambda progress: None)
        except Exception as error:
            self._learner = None
            failed = _Failed.now(error)
            raise WorkerDied("error", failed.message, failed.details, failed.blames_task) from error

    def stop(self, timeout_s: float) -> None:
        self._task = self._learner = None


class ListSource:
    """Brings the given items, `batch` in a poll; with `live` it never ends."""

    holding = ""
    retention_s = math.inf

    def __init__(self, items: Sequence[Item], batch: int = 7, live: bool = False, fingerprint: str = "list") -> None:
        self.items = list(items)
        self.skipped: dict[str, int] = {}
        self.live = live
        self.clamped: dict[str, int] = {}
        self.fingerprint = fingerprint
        self.acknowledged: list[dict[Partition, int]] = []
        self.resumed_epochs: Mapping[Partition, int] | None = None
        self.judgements: list[tuple[int, int]] = []
        self.closed = False
        self.throttled = False
        self._batch = batch
        self._at = 0

    @property
    def exhausted(self) -> bool:
        return not self.live and self._at >= len(self.items)

    def continues(self, fingerprint: str) -> bool:
        return fingerprint == self.fingerprint

    def seek(self, offsets: Offsets, epochs: Mapping[Partition, int] | None = None) -> None:
        self.resumed_epochs = epochs
        self.positions = dict(offsets)
        self._at = sum(item.offset < offsets.get(item.partition, 0) for item in self.items)

    def poll(self, timeout_s: float) -> Sequence[Item]:
        if self.throttled or self._at >= len(self.items):
            time.sleep(min(timeout_s, 0.002))
            return ()
        items = self.items[self._at : self._at + self._batch]
        self._at += len(items)
        return items

    def throttle(self, full: bool) -> None:
        self.throttled = full

    def vouches(self, timeout_s: float) -> bool:
        return True

    def past_marks(self, offsets: Offsets) -> Offsets:
        return offsets

    def epochs(self, offsets: Offsets) -> dict[Partition, int]:
        return {}

    def acknowledge(self, offsets: Offsets) -> None:
        self.acknowledged.append(dict(offsets))

    def judged(self, samples: int, rejected: int) -> None:
        self.judgements.append((samples, rejected))

    def lag(self) -> dict[tuple[str, int], int]:
        return {}

    def close(self) -> None:
        self.closed = True


class MemoryDeadLetters:
    """Keeps what was put; `failures` are raised by the next flushes, one each."""

    removed = 0

    def __init__(self, failures: Sequence[DeadLetterError] = ()) -> None:
        self.passed: list[Offsets] = []
        self.waiting: list[Rejected] = []
        self.acknowledged: list[Rejected] = []
        self._failures = list(failures)

    def put(self, rejected: Rejected) -> None:
        self.waiting.append(rejected)

    def flush(self, timeout_s: float) -> None:
        if self._failures:
            raise self._failures.pop(0)
        self.acknowledged += self.waiting
        self.waiting = []

    def committed(self, offsets: Offsets) -> None:
        self.passed.append(offsets)

    def close(self) -> None: ...


def records(*images: str, label: str = "cat", start: int = 0) -> list[Item]:
    """One record per text, at offsets from `start` on."""
    return [Record(LIST, start + index, label, image.encode()) for index, image in enumerate(images)]


def pipeline(
    state: Path,
    source: Any,
    worker: Any = None,
    dead_letters: Any = None,
    stop: threading.Event | None = None,
    rule: CutRule | None = None,
    keep: int = 3,
    config: Config | None = None,
    **rules: Any,
) -> Pipeline:
    """An agent on `state`, wired like the real one; with a FakeLearner in this process when no worker is given."""
    commits = CommitStore(state, keep)
    commits.lock()
    commit = resume(commits, source)
    spool = Spool(state / "spool", 2**30)
    known, done = (commit.seen, commit.tasks) if commit else ((), 0)
    return Pipeline(
        source=source,
        buffer=TaskBuffer(rule or CutRule(samples=3), spool, known, done + 1, source.positions),
        spool=spool,
        worker=worker or InlineWorker(config),
        commits=commits,
        dead_letters=dead_letters or MemoryDeadLetters(),
        metrics=Metrics(CollectorRegistry()),
        stop=stop or threading.Event(),
        rules=Rules(**{"poll_timeout_s": 0.01, **rules}),
        config={},
        commit=commit,
    )


def learned(commit: Commit) -> list[int]:
    """Offsets a FakeLearner has learned up to `commit`, in the order of learning."""
    return [offset for _, _, offset in json.loads((commit.path / "learner.safetensors").read_text())["learned"]]


def write_release(folder: Path, classes: Sequence[str], content: str) -> None:
    """A release that can be read, with `content` for a model."""
    folder.mkdir()
    (folder / release.MODEL).write_text(content)
    release.write(
        release.Release(
            path=folder,
            created="2026-01-01T00:00:00+00:00",
            classes=tuple(classes),
            preprocess=Preprocess(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            facts={},
            opset=20,
            ir_version=10,
            precision="fp32",
            parity=release.Parity(0, 0, 0, 1, 1, 1, (1,), "CPUExecutionProvider"),
            atol=1e-3,
            files={release.MODEL: release.digest(folder / release.MODEL)},
            versions={},
            seconds={},
        )
    )
