"""Hand-written stand-ins shared by the tests. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from agent.commits import seal
from agent.config import Config
from agent.values import LateRejection, Outcome, Progress
from exporter import release
from exporter.preprocess import Preprocess
from streams.buffer import Task
from streams.record import Reason


class FakeLearner:
    """Learns by folding every sample's position, label and bytes into a chain of hashes: a sample that is lost, learned
    twice or learned in another order gives another `learner.safetensors`.

    Images that begin with a word misbehave: `late` is rejected while decoding, `raise` raises, `die` kills the process,
    `hang` says nothing more, `busy` spins with the interpreter lock held for a second.
    """

    def __init__(self, config: Config, commit: Path | None) -> None:
        self.config = config
        self.state: dict[str, Any] = {"chain": "", "learned": [], "classes": []}
        self.report: dict[str, Any] = {"history": []}
        if commit is not None:
            self.state = json.loads((commit / "learner.safetensors").read_text())
            self.report = json.loads((commit / "report.json").read_text())

    def learn(self, task: Task, staging: Path, report: Callable[[Progress], None]) -> Outcome:
        rejected = []
        for step, sample in enumerate(task.samples):
            report(Progress("train", task.number, epoch=1, epochs=1, step=step, steps=len(task.samples)))
            image = sample.read()
            word = image.split(b" ")[0].decode(errors="replace")
            if word == "late":
                rejected.append(LateRejection(sample.partition, sample.offset, Reason.TRUNCATED, "cut short"))
                continue
            self._misbehave(word)
            facts = f"{self.state['chain']}{sample.partition}{sample.offset}{sample.label}".encode()
            self.state["chain"] = hashlib.sha256(facts + image).hexdigest()
            self.state["learned"].append([*sample.partition, sample.offset])
        self.state["classes"] += [name for name in task.classes if name not in self.state["classes"]]
        self.report["history"].append({"task": task.number, "classes": task.classes, "samples": len(task.samples)})
        for name, content in (("learner.safetensors", self.state), ("learner.json", {}), ("report.json", self.report)):
            (staging / name).write_text(json.dumps(content))
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

    def _misbehave(self, word: str) -> None:
        if word == "raise":
            raise RuntimeError("told to raise")
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "hang":
            threading.Event().wait()
        if word == "busy":
            until = time.monotonic() + 1
            while time.monotonic() < until:
                pass


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
