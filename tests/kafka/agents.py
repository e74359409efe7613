"""A whole agent on Kafka as a process, a learner that decodes, and how to tell what was learned."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from agent.commits import CommitStore, StateError
from agent.config import Config
from agent.layout import has_learned
from agent.scoring.report import Report
from agent.sealing import seal
from agent.values import Commit, LateRejection, OnProgress, Outcome, Progress
from exporter.preprocess import ImageError, decode
from streams.buffer import Task
from streams.record import Reason
from tests.fakes import write_release


class DecodingLearner:
    """Decodes every image as the trainer does; remembers what it learned, as a list and as a chain of hashes."""

    def __init__(self, config: Config, commit: Path | None) -> None:
        self.state: dict[str, Any] = {"chain": "", "learned": [], "classes": []}
        if commit is not None:
            self.state = json.loads((commit / "learner.safetensors").read_text())

    def learn(self, task: Task, staging: Path, on_progress: OnProgress) -> Outcome:
        on_progress(Progress("train", task.number))
        rejected = []
        for sample in task.samples:
            image = sample.read()
            try:
                decode(image, 10**6)
            except ImageError as error:
                rejected.append(LateRejection(sample.partition, sample.offset, Reason(error.reason), error.detail))
                continue
            seen = f"{self.state['chain']}{sample.partition}{sample.offset}{sample.label}".encode()
            self.state["chain"] = hashlib.sha256(seen + image).hexdigest()
            self.state["learned"].append([*sample.partition, sample.offset])
        self.state["classes"] += [name for name in task.classes if name not in self.state["classes"]]
        for name, content in (("learner.safetensors", self.state), ("learner.json", {})):
            (staging / name).write_text(json.dumps(content))
        report = Report(task=task.number)
        report.write(staging / "report.json")
        write_release(staging / "release", self.state["classes"], self.state["chain"])
        files, classes = seal(staging), tuple(self.state["classes"])
        return Outcome(task.number, task.next_offsets, staging, files, report, classes, None, None, tuple(rejected))


class Agent:
    """An agent process on `state` that reads `topics`; `log` holds what it printed."""

    def __init__(self, state: Path, bootstrap: str, topics: list[str], **settings: object) -> None:
        """`settings`: configuration keys with `__` for the dot."""
        keys = {
            "source.kind": "kafka",
            "source.kafka.bootstrap_servers": json.dumps([bootstrap]),
            "source.kafka.topics": json.dumps(topics),
            "source.kafka.group": "",
            "source.kafka.merge_wait_s": "0.5",
            **{key.replace("__", "."): str(value) for key, value in settings.items()},
        }
        state.mkdir(exist_ok=True)
        self.log = state / "agent.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.fake_agent",
                    state,
                    "bundled",
                    *(f"{key}={text}" for key, text in keys.items()),
                ],
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def url(self) -> str:
        """Of the status server, once it is there."""
        found: list[str] = []
        wait_until(lambda: found.extend(re.findall(r"(http://[\d.:]+)/", self.log.read_text())) or found, 30)
        return found[-1]

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def kill_trainer(self) -> None:
        for child in psutil.Process(self.process.pid).children():
            if "spawn_main" in " ".join(child.cmdline()):
                child.kill()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


def current(state: Path) -> Commit | None:
    """Look without changing anything, since an agent may be at work; None also where it removes what is looked at."""
    try:
        return CommitStore(state, 3).verified()
    except (OSError, StateError):
        return None


def model(state: Path) -> str:
    commit = current(state)
    return (commit.path / "learner.safetensors").read_text() if commit and has_learned(commit.path) else ""


def wait_until(done: Callable[[], Any], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.05)
