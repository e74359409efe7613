"""A week of an agent's life in minutes: nothing that it keeps grows, in memory, on the disk or in what it answers.

Everything is real but the clock, the cluster and the model: the source reads a scripted client of three partitions, the
learner hashes instead of training, and a record comes every ten simulated seconds. The short form is one day. A week:

    python -m pytest tests/test_days.py -m slow -s
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import random
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from agent.config import Config
from agent.layout import current_commit
from agent.scoring.formulas import extended
from agent.scoring.holdout import HoldOut
from agent.scoring.report import HISTORY, LearnerIdentity, ModelIdentity, ReleaseSummary, Report, TaskReport
from agent.sealing import seal
from agent.values import Commit, LateRejection, OnProgress, Outcome
from agent.worker import TaskFault
from exporter.http import StatusServer
from exporter.metrics import Metrics
from streams.buffer import CutRule, Task
from streams.dead_letters import FileDeadLetters
from streams.kafka.connection import Connection
from streams.kafka.record_batches import Message
from streams.kafka.source import KafkaSource
from streams.record import Partition, Raw, Reason
from tests.bad_images import encoded, picture
from tests.fakes import InlineWorker, pipeline, write_release
from tests.kafka.fake_client import FakeClient
from tests.kafka.records import CODEC

PARTITIONS = (Partition("a", 0), Partition("a", 1), Partition("b", 0))
RECORD_S = 10
"""Simulated seconds between two records."""
CLASSES = 40
"""They come in the first quarter of the time."""
JPEG = encoded(picture(), "JPEG")
LETTER_BYTES = 2**19


class Feed(FakeClient):
    """A cluster of three partitions in which every 50th offset is a mark, a leader is elected every 1000 offsets, and
    one record in seven is bad: of no image, without a label, or such that the learner rejects it, or fails for it."""

    began_ms: int
    days: float

    def poll(self, timeout_s: float) -> dict[Partition, list[Any]]:
        found: dict[Partition, list[Any]] = {}
        for where, at in self.positions.items():
            found[where] = [self.record(where, offset) for offset in range(at, at + 40) if offset % 50 != 49]
            self.positions[where] = at + 40
        return found

    def record(self, where: Partition, offset: int) -> Message:
        number = offset * len(PARTITIONS) + PARTITIONS.index(where)
        chance = random.Random(number)
        come = min(1, 4 * number * RECORD_S / (self.days * 86_400))
        label = f"class {chance.randrange(1 + int(come * (CLASSES - 1)))}".encode()
        value, headers = JPEG + number.to_bytes(8, "big"), [("label", label), ("note", bytes(chance.randrange(50)))]
        match chance.randrange(70):
            case 0 | 1 | 2:
                value = b"text " * chance.randrange(200)
            case 3 | 4 | 5:
                headers = headers[1:]
            case 6 | 7 | 8:
                value = JPEG + b"late"
            case 9 if number % 20 == 0:
                value = JPEG + b"raise"
        raw = Raw(b"k", value, tuple(headers))
        return Message(offset, self.began_ms + number * RECORD_S * 1000, raw, offset // 1000)

    def describe(self, topics: Iterable[str]) -> list[dict[str, Any]]:
        counts = {topic: [part.number for part in PARTITIONS if part.topic == topic] for topic in topics}
        return [
            {"name": name, "error_code": 0, "topic_id": name, "partitions": [{"partition_index": n} for n in numbers]}
            for name, numbers in counts.items()
        ]

    def reached(self) -> dict[Partition, tuple[int, int]]:
        return {where: (at, (at - 1) // 1000) for where, at in self.positions.items()}

    def ends(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return {where: self.positions.get(where, 0) + 100 for where in partitions}

    def retention_s(self, topics: Iterable[str]) -> float:
        return 7 * 86_400

    def end(self, where: Partition) -> int:
        return self.positions[where] + 100


class HashingLearner:
    """Holds images out and reports as the trainer does, and remembers a hash where others have a model."""

    def __init__(self, config: Config, commit: Path | None) -> None:
        state = json.loads((commit / "learner.safetensors").read_text()) if commit else {"chain": "", "samples": 0}
        self.state = state
        self.report = Report.read(commit / "report.json") if commit else Report(task=0)
        self.holdout = HoldOut.load(commit, 0.3, 1)

    def learn(self, task: Task, staging: Path, on_progress: OnProgress) -> Outcome:
        parent = current_commit(staging.parents[1])
        if parent is not None and (parent / "holdout").is_dir():
            self.holdout.moved(parent)
        images = {sample: sample.read() for sample in task.samples}
        if any(image.endswith(b"raise") for image in images.values()):
            raise TaskFault from ValueError("told to raise")
        late = [sample for sample, image in images.items() if image.endswith(b"late")]
        good = [sample for sample in task.samples if sample not in late]
        self.holdout.split(good)
        for sample in good:
            self.state["chain"] = hashlib.sha256(self.state["chain"].encode() + images[sample]).hexdigest()
        self.state["samples"] += len(good)
        self.report = self._reported(task)
        (staging / "learner.safetensors").write_text(json.dumps(self.state))
        (staging / "learner.json").write_text("{}")
        self.report.write(staging / "report.json")
        write_release(staging / "release", self.report.classes, self.state["chain"])
        self.holdout.write(staging, parent)
        files = seal(staging)
        self.holdout.moved(staging.with_suffix(""))
        rejected = tuple(LateRejection(one.partition, one.offset, Reason.TRUNCATED, "cut short") for one in late)
        outcome = Outcome(
            task.number, task.next_offsets, staging, files, self.report, self.report.classes, None, None, rejected
        )
        return outcome

    def _reported(self, task: Task) -> Report:
        past = self.report.shortened(HISTORY - 1)
        new = tuple(name for name in task.classes if name not in past.classes)
        entry = TaskReport(
            task=task.number, classes=task.classes, new_classes=new, accuracy=0.5, details={"drifts": [0.1] * 20}
        )
        row = tuple(0.5 if one.new_classes else None for one in (*past.history, entry))
        report = replace(
            past,
            task=task.number,
            classes=(*past.classes, *new),
            matrix=extended(past.matrix, row, HISTORY // 2),
            first=(*past.first, row[-1]),
            best=(*past.best, row[-1]),
            history=(*past.history, entry),
            held_out=len(self.holdout),
        )
        learner = LearnerIdentity(model=ModelIdentity(name="none"), method="none", fusion="none")
        return report.completed(learner, ReleaseSummary(), {"decode": 0.1, "export": 0.2})


@dataclass(frozen=True)
class Size:
    """What an agent takes, after so many tasks."""

    blocks: int
    """Blocks of memory that Python has allocated."""
    resident: int
    """Bytes of this process in memory."""
    files: int
    disk: int
    report: int
    status: int
    series: int
    lines: float
    """Lines of the log a task, since the look before."""


class Watch:
    """Scrapes an agent over HTTP, as others do all the time, and measures it now and then."""

    def __init__(self, state: Path, metrics: Metrics, registry: CollectorRegistry, log: Lines) -> None:
        self._state, self._log = state, log
        self.sizes: list[Size] = []
        self._before = (0, 0)
        self.server = StatusServer(
            "127.0.0.1", 0, registry, lambda: [], lambda: [], metrics.status, metrics.heartbeat, metrics.pictures
        )
        self.server.start()

    def scrape(self) -> dict[str, bytes]:
        paths = ("metrics", "status.json", "report.json", "livez", "readyz", "")
        found = {}
        for path in paths:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.server.port}/{path}", timeout=60) as answer:
                found[path] = answer.read()
        return found

    def measure(self, tasks: int) -> None:
        scraped = self.scrape()
        gc.collect()
        kept = [path for path in self._state.rglob("*") if path.is_file() and ".staging" not in str(path)]
        lines, before = (self._log.count, tasks), self._before
        self._before = lines
        self.sizes.append(
            Size(
                blocks=sys.getallocatedblocks(),
                resident=int(Path("/proc/self/statm").read_text().split()[1]) * 4096,
                files=len(kept),
                disk=sum(path.stat().st_size for path in kept),
                report=len(scraped["report.json"]),
                status=len(scraped["status.json"]),
                series=sum(not line.startswith(b"#") for line in scraped["metrics"].splitlines()),
                lines=(lines[0] - before[0]) / (lines[1] - before[1]),
            )
        )
        print(tasks, self.sizes[-1], flush=True)


class Lines(logging.Handler):
    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


@pytest.mark.parametrize(
    ("days", "samples", "history"),
    [(1, 36, 40), pytest.param(7, 20, HISTORY, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
)
def test_nothing_grows_with_the_days(
    days: int, samples: int, history: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given an agent on a stream of so many days, with bad records, marks, elections and samples that learning fails for
    lines = Lines(logging.INFO)
    root = logging.getLogger()
    # In the place of pytest's own handlers, which keep every record with all that it is about.
    monkeypatch.setattr(root, "handlers", [lines])
    monkeypatch.setattr(root, "level", logging.INFO)
    began_s = time.time() - (days + 1) * 86_400
    feed = type(
        "Own", (Feed,), {"script": [], "made": [], "log_ends": {}, "began_ms": int(began_s * 1000), "days": days}
    )
    monkeypatch.setattr("streams.kafka.source.Client", feed)
    monkeypatch.setattr("tests.test_days.HISTORY", history)
    monkeypatch.setattr("os.fsync", lambda file: None)  # no power is cut here, and it takes most of the time
    monkeypatch.setattr(
        "streams.kafka.topics.ask_anew", lambda connection, names, epochs: (feed.describe(None, names), {})
    )
    source = KafkaSource(Connection(["x:1"]), ["a", "b"], CODEC, fetch_bytes=2**20)
    stop, registry = threading.Event(), CollectorRegistry()
    agent = pipeline(
        tmp_path, source, InlineWorker(learner="tests.test_days:HashingLearner"), stop=stop,
        dead_letters=FileDeadLetters(tmp_path / "dead_letters", LETTER_BYTES),
        rule=CutRule(samples=samples, age_s=3.5 * 86_400),
        quarantine=True,
    )  # fmt: skip

    def now_s() -> float:
        return began_s + RECORD_S * sum(agent.buffer.next_offsets.values())

    agent.metrics, agent.clock, agent.monotonic, agent.buffer._clock = Metrics(registry), now_s, now_s, now_s
    agent.spool.max_bytes = 2**20  # what is read ahead is soon as much as it may be
    watch = Watch(tmp_path, agent.metrics, registry, lines)
    tasks = int(days * 86_400 / RECORD_S / samples * 0.8)

    def committed(commit: Commit) -> None:
        if commit.tasks % 10 == 0:
            watch.scrape()
        if commit.tasks >= (len(watch.sizes) + 1) * tasks // 12:
            watch.measure(commit.tasks)
        if len(watch.sizes) == 12:
            stop.set()

    agent.published = committed

    # when they are over
    try:
        commit = agent.run()
    finally:
        watch.server.stop()
        source.close()

    # then all was learned but what is bad, the bounds were reached, and from the middle on nothing grows
    assert commit is not None and len(commit.classes) == CLASSES
    assert commit.tasks >= tasks and len(commit.report.history) <= history + CLASSES
    assert commit.report.earlier is not None
    assert agent.dead_letters.removed and commit.totals["rejected_task_failed"] >= 1
    for one in fields(Size):
        middle = max(getattr(size, one.name) for size in watch.sizes[5:8])
        last = max(getattr(size, one.name) for size in watch.sizes[9:])
        slack = {"blocks": 5000, "resident": 2**24, "disk": 2**18, "report": 1000, "status": 1000}.get(one.name, 5)
        assert last <= middle * 1.02 + slack, (one.name, [getattr(size, one.name) for size in watch.sizes])
