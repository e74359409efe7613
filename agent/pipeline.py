"""The path of the data through the agent process: polled, cut into tasks, learned, committed. The file to read first.

`Pipeline.run` never waits for anything but the source's short poll: learning happens in the worker, and a commit is a
rename. The trainer's half of the path is agent/trainer.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from agent.commits import CommitStore, Provenance
from agent.layout import has_learned
from agent.values import Commit, Outcome, Progress
from agent.worker import Worker, WorkerDied
from streams.buffer import Task, TaskBuffer
from streams.record import Reason, Rejected
from streams.source import DeadLetterDelayed, DeadLetterError, DeadLetters, PositionError, Source
from streams.spool import Spool

log = logging.getLogger(__name__)

ATTEMPTS = 2
"""A task that fails so often is given up."""
_BUSY_POLL_S = 0.1
"""Poll timeout while something is being learned, so that its end is not noticed late."""
_LETTERS_A_PASS = 200
_FLUSH_S = 0.5


class AgentError(Exception):
    """The agent stops; nothing that was learned since the last commit is kept, and nothing is lost.

    AgentError
    └── TaskFailed      a task could not be learned
    """


class TaskFailed(AgentError): ...


@dataclass(frozen=True)
class Rules:
    """What the agent does at the edges of its work; the values are those of the configuration."""

    poll_timeout_s: float = 0.5
    learn_at_end: bool = True
    """At the end of the stream, learn what no rule has cut."""
    learn_at_stop: bool = False
    """At a clean stop, learn what was read before."""
    quarantine: bool = False
    """Dead-letter a task that was given up, and go on; else stop with TaskFailed."""
    stop_timeout_s: float = 5.0


class Metrics(Protocol):
    """What the pipeline tells; every call is cheap."""

    def state(self, name: str) -> None: ...
    def heartbeat(self, loop: str, now: float) -> None: ...
    def polled(self, now: float) -> None: ...
    def consumed(self, item: Any, now: float) -> None: ...
    def spooled(self, records: int, bytes: int, capacity_bytes: int) -> None: ...
    def lag(self, lag: Mapping[tuple[str, int], int]) -> None: ...
    def skipped(self, skipped: Mapping[str, int]) -> None: ...
    def cut(self, reason: str, samples: int, classes: int) -> None: ...
    def progressed(self, progress: Any) -> None: ...
    def committed(self, commit: Any, outcome: Any) -> None: ...
    def restored(self, commit: Any) -> None: ...
    def rejected(self, item: Any, now: float) -> None: ...
    def dead_lettered(self, ok: bool) -> None: ...
    def task_failed(self, kind: str) -> None: ...


@dataclass
class _Settlement:
    """A task that is over: its dead letters must be out before its offsets are committed."""

    letters: Iterator[Rejected]
    commit: Callable[[], Commit]
    blocked: bool = False


def resume(commits: CommitStore, source: Source) -> Commit | None:
    """Find the commit to go on from and bring `source` to where it ends. `commits` is locked.

    Raises StateError, and PositionError when the commit belongs to another stream.
    """
    commits.sweep()
    commit = commits.current()
    if commit is None:
        source.seek({})
        return None
    if not source.continues(commit.fingerprint):
        raise PositionError(
            f"{commit.path} was learned from another stream (fingerprint {commit.fingerprint[:12]}, this one has "
            f"{source.fingerprint[:12]}), so its offsets mean nothing here; set [source] back to that stream and its "
            "order, or state.path to a new folder"
        )
    source.seek(commit.offsets)
    return commit


@dataclass
class Pipeline:
    """The agent's loop over parts that are handed in; it owns none but the worker, which it starts and stops."""

    source: Source
    buffer: TaskBuffer
    spool: Spool
    worker: Worker
    commits: CommitStore
    dead_letters: DeadLetters
    metrics: Metrics
    stop: threading.Event
    rules: Rules
    config: Mapping[str, Any]
    """The resolved configuration, recorded in every commit."""
    commit: Commit | None
    """Where to continue from, see `resume`; later the last commit."""
    clock: Callable[[], float] = time.time
    """Seconds since the epoch."""
    monotonic: Callable[[], float] = time.monotonic
    published: Callable[[Commit], None] = lambda commit: None
    """Told of every commit with a release; must return at once."""

    _task: Task | None = field(default=None, init=False)
    """In the worker's hands, or being settled."""
    _settlement: _Settlement | None = field(default=None, init=False)
    _failures: list[str] = field(default_factory=list, init=False)
    """Since the last commit."""
    _held: bool = field(default=False, init=False)
    """The source does not read, as it said."""
    _draining: bool = field(default=False, init=False)

    def run(self) -> Commit | None:
        """Learn until the stream ends or `stop` is set; returns the last commit.

        Raises AgentError, StateError and StreamError, with the state folder as the last commit left it.
        """
        try:
            self.worker.start(self._learned)
            self.metrics.state("consuming")
            while not (self.stop.is_set() and self._must_leave()):
                if self._task is None and not self._begin_task():
                    break
                self._read()
                if self._settlement is None:
                    self._listen()
                if self._settlement is not None and self._letters_out(self._settlement):
                    self._conclude(self._settlement)
                self._report()
        finally:
            self.worker.stop(self.rules.stop_timeout_s)
        self._pass_rejected()
        log.info("ended at commit %06d", self.commit.number if self.commit else 0)
        return self.commit

    def _must_leave(self) -> bool:
        if not self._draining:
            log.info("stopping%s", ": learning what was read first" if self.rules.learn_at_stop else "")
            self.metrics.state("draining")
            self._draining = True
        return not self.rules.learn_at_stop

    def _read(self) -> None:
        """Take what has arrived into the buffer; while draining, leave it for the next start."""
        busy = self._task is not None
        items = self.source.poll(min(self.rules.poll_timeout_s, _BUSY_POLL_S) if busy else self.rules.poll_timeout_s)
        now = self.clock()
        self.metrics.polled(now)
        self.metrics.heartbeat("pipeline", now)
        for item in items if not self._draining else ():
            self.buffer.add(item)
            self.metrics.consumed(item, now)
            if isinstance(item, Rejected):
                self.dead_letters.put(item)
                self.metrics.dead_lettered(True)

    def _begin_task(self) -> bool:
        """Give the worker the next task, if one is cut; False when none will ever be."""
        ended = self._draining or self.source.exhausted
        task = self.buffer.cut(self.monotonic())
        if task is None and ended and (self._draining or self.rules.learn_at_end):
            task = self.buffer.end("stop" if self._draining else "end")
        if task is None:
            return not ended
        log.info("%s cut (%s): %d classes", _name(task), task.reason, len(task.classes))
        self.metrics.cut(task.reason, len(task.samples), len(task.classes))
        self.worker.submit(task, self.commits.stage(), self._learned)
        self._task = task
        return True

    def _listen(self) -> None:
        """Hear from the worker; a task it is through with goes into settlement."""
        try:
            match self.worker.poll():
                case Progress() as progress:
                    self.metrics.progressed(progress)
                case Outcome() as outcome:
                    assert self._task is not None
                    self._settlement = self._outcome(self._task, outcome)
        except WorkerDied as died:
            self._settlement = self._after_failure(died)

    def _outcome(self, task: Task, outcome: Outcome) -> _Settlement:
        def commit() -> Commit:
            made = self.commits.commit(outcome, self._provenance(task, self._totals(task, outcome)))
            self.metrics.committed(made, outcome)
            return made

        self.source.judged(len(task.samples), len(outcome.rejected))
        return _Settlement(_late_letters(task, outcome, self.spool), commit)

    def _quarantine(self, task: Task, why: str) -> _Settlement:
        def commit() -> Commit:
            made = self.commits.carry(task.next_offsets, task.number, self._provenance(task, self._totals(task, None)))
            self.metrics.restored(made)
            return made

        return _Settlement(_letters(task, why, self.spool), commit)

    def _after_failure(self, died: WorkerDied) -> _Settlement | None:
        """Try the task again; when it was tried often enough set it aside as dead letters, or stop."""
        log.error("trainer failed: %s%s", died, f"\n{died.details}" if died.details else "")
        self.metrics.task_failed(died.kind)
        self._failures.append(str(died))
        task = self._task
        if died.kind == "start":
            raise AgentError(f"the trainer could not be set up: {died}") from died
        if len(self._failures) < ATTEMPTS:
            if task is None:
                self.worker.start(self._learned)
            else:
                log.warning("%s is tried again", _name(task))
                self.worker.submit(task, self.commits.stage(), self._learned)
            return None
        if task is None:
            raise AgentError(f"the trainer ended {ATTEMPTS} times before it was set up: {died}") from died
        if not self.rules.quarantine or not died.blames_task:
            raise TaskFailed(
                f"{_name(task)} failed {ATTEMPTS} times ({'; '.join(self._failures)}); stopping before it with nothing "
                "of it committed. The next start tries again; agent.on_task_failure = 'quarantine' would set it aside"
            ) from died
        log.error("%s failed %d times and is set aside as dead letters", _name(task), ATTEMPTS)
        self.worker.start(self._learned)
        return self._quarantine(task, str(died))

    def _letters_out(self, settlement: _Settlement) -> bool:
        """True once every dead letter is acknowledged. A few go out in each pass; a delay holds up only the commit."""
        letters = list(islice(settlement.letters, _LETTERS_A_PASS))
        for letter in letters:
            self.dead_letters.put(letter)
            self.metrics.rejected(letter, self.clock())
            self.metrics.dead_lettered(True)
        if letters:
            return False
        try:
            self.dead_letters.flush(_FLUSH_S)
        except DeadLetterDelayed as error:
            if not settlement.blocked:
                log.error("rejected records cannot be set aside; nothing is committed until they can: %s", error)
                self.metrics.dead_lettered(False)
            settlement.blocked = True
            return False
        return True

    def _conclude(self, settlement: _Settlement) -> None:
        assert self._task is not None
        self.commit = settlement.commit()
        log.info("commit %06d after %s: %d classes", self.commit.number, _name(self._task), len(self.commit.classes))
        if self.commit.release is not None:
            self.published(self.commit)
        self.buffer.committed(self._task)
        self.source.acknowledge(self.commit.offsets)
        self._task = self._settlement = None
        self._failures.clear()

    def _pass_rejected(self) -> None:
        """Commit the offsets when only rejected records and marks were read since the last commit, so that they are not
        set aside again at every start."""
        offsets = self.buffer.next_offsets
        if self.buffer.records or offsets == (self.commit.offsets if self.commit else {}):
            return
        try:
            self.dead_letters.flush(_FLUSH_S)
        except DeadLetterError as error:
            log.warning("what was rejected since the last commit will be read again: %s", error)
            return
        tasks, totals = (self.commit.tasks, self.commit.totals) if self.commit else (0, {})
        self.commit = self.commits.carry(offsets, tasks, self._provenance(None, totals))
        self.source.acknowledge(self.commit.offsets)

    def _report(self) -> None:
        self.source.throttle(self._draining or self.buffer.full)
        self.metrics.spooled(self.buffer.records, self.buffer.bytes, self.spool.max_bytes)
        self.metrics.lag(self.source.lag())
        self.metrics.skipped(self.source.skipped)
        if bool(self.source.holding) != self._held and not self._draining:
            self._held = not self._held
            self.metrics.state("paused" if self._held else "consuming")

    @property
    def _learned(self) -> Path | None:
        """Folder of the commit a learner is set up from; None while nothing has been learned."""
        return self.commit.path if self.commit and has_learned(self.commit.path) else None

    def _provenance(self, task: Task | None, totals: Mapping[str, float]) -> Provenance:
        return Provenance(self.source.fingerprint, task.classes if task else (), totals, self.config)

    def _totals(self, task: Task, outcome: Outcome | None) -> dict[str, float]:
        """The counters after `task`; `outcome` is None when it was quarantined."""
        totals = Counter(self.commit.totals if self.commit else {})
        totals.update(records=task.records, samples=len(task.samples), bytes=task.bytes)
        totals.update({f"rejected_{reason}": count for reason, count in task.rejected.items()})
        if outcome is None:
            totals.update({f"rejected_{Reason.TASK_FAILED}": len(task.samples)})
        else:
            totals.update(f"rejected_{late.reason}" for late in outcome.rejected)
            if outcome.update is not None:
                update = outcome.update
                totals.update(training_samples=update.samples * update.epochs_run, training_steps=update.steps)
        return dict(totals)


def _late_letters(task: Task, outcome: Outcome, spool: Spool) -> Iterator[Rejected]:
    samples = {(sample.partition, sample.offset): sample for sample in task.samples}
    for late in outcome.rejected:
        raw = spool.raw(samples[late.partition, late.offset])
        yield Rejected(late.partition, late.offset, late.reason, late.detail, raw)


def _letters(task: Task, why: str, spool: Spool) -> Iterator[Rejected]:
    for sample in task.samples:
        yield Rejected(sample.partition, sample.offset, Reason.TASK_FAILED, why, spool.raw(sample))


def _name(task: Task) -> str:
    ends = ", ".join(f"{topic}/{number}:{offset}" for (topic, number), offset in sorted(task.next_offsets.items()))
    return f"task {task.number} ({len(task.samples)} samples up to {ends})"
