"""The path of the data through the agent process: polled, cut into tasks, learned, committed. The file to read first.

`Pipeline.run` is the whole path. It never waits for anything but the source's short poll: learning happens in the
worker, and a commit is a rename. The trainer's half of the path is agent/trainer.py; what a crash leaves, and how the
next start goes on from it, is told in agent/commits.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from agent.commits import CommitStore, Provenance, counted
from agent.layout import has_learned
from agent.values import Commit, Outcome, Progress
from agent.worker import Worker, WorkerDied
from streams.buffer import Task, TaskBuffer
from streams.record import Item, Reason, Rejected
from streams.source import DeadLetterDelayed, DeadLetterError, DeadLetters, PositionError, Source
from streams.spool import Sample, Spool

log = logging.getLogger(__name__)

ATTEMPTS = 2
"""A task that failed this number of times is given up. One repetition gets over what passes by itself, such as a kill
when memory was short; what fails for the task's own sake fails again, and each attempt may take an hour."""

_BUSY_POLL_S = 0.1
"""Longest poll of the source while something is being learned: the end of the update is noticed that much later at
most. A shorter one turns the loop more often for nothing."""

_DEAD_LETTERS_A_PASS = 200
"""Dead letters of a task that go out between two polls: chosen by hand. A task set aside may have many thousands; all
at once they would keep the loop from polling and from its heartbeat, and would be in memory together."""

_FLUSH_S = 0.5
"""Longest wait for the dead letters' acknowledgement, as long as an idle poll. When it is over the loop turns and asks
again, so a larger one only makes the agent slower to hear a signal."""


class AgentError(Exception):
    """The agent stops; nothing that was learned since the last commit is kept, and nothing is lost.

    AgentError
    └── TaskFailed      a task could not be learned
    """


class TaskFailed(AgentError):
    """A task failed ATTEMPTS times, and may not be set aside."""


@dataclass(frozen=True)
class Rules:
    """What the agent does at the edges of its work; the values are those of the configuration."""

    poll_timeout_s: float = 0.5
    """Longest poll of the source while nothing is being learned."""
    learn_at_end: bool = True
    """At the end of the stream, learn what no rule has cut."""
    learn_at_stop: bool = False
    """At a clean stop, learn what was read before."""
    quarantine: bool = False
    """Dead-letter a task that was given up, and go on; else stop with TaskFailed."""
    stop_timeout_s: float = 5.0
    """Time the trainer has to end by itself at the end; then it is killed."""


class Metrics(Protocol):
    """What the pipeline tells of its work; every call is cheap. See exporter.metrics.Metrics."""

    def state(self, name: str) -> None: ...
    def heartbeat(self, loop: str, now: float) -> None: ...
    def polled(self, now: float) -> None: ...
    def consumed(self, item: Item, now: float) -> None: ...
    def spooled(self, records: int, bytes: int, capacity_bytes: int) -> None: ...
    def lag(self, lag: Mapping[tuple[str, int], int]) -> None: ...
    def clamped(self, clamped: Mapping[str, int]) -> None: ...
    def holding(self, why: str) -> None: ...
    def skipped(self, skipped: Mapping[str, int]) -> None: ...
    def cut(self, reason: str, samples: int, classes: int) -> None: ...
    def progressed(self, progress: Progress) -> None: ...
    def committed(self, commit: Commit, outcome: Outcome) -> None: ...
    def restored(self, commit: Commit) -> None: ...
    def rejected(self, item: Rejected, now: float) -> None: ...
    def dead_lettered(self, ok: bool) -> None: ...
    def dead_letters_removed(self, removed: int) -> None: ...
    def task_failed(self, kind: str) -> None: ...


@dataclass
class _Settlement:
    """A task that is over: its dead letters must be acknowledged before its offsets are committed, or a crash between
    the two would lose them. In this order it can only set them aside twice."""

    dead_letters: Iterator[Rejected]
    commit: Callable[[], Commit]
    delayed: bool = False
    """True once it was logged that the dead letters are held up."""


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
    """Seconds that no correction of the system's time changes, for the idle rule."""
    published: Callable[[Commit], None] = lambda commit: None
    """Is told of every commit with a release, and returns at once."""

    _task: Task | None = field(default=None, init=False)
    """The task that the worker has in hand, or that is being settled."""
    _settlement: _Settlement | None = field(default=None, init=False)
    _failures: list[str] = field(default_factory=list, init=False)
    """What the trainer died of since the last commit."""
    _paused: bool = field(default=False, init=False)
    """True while the source itself does not read."""
    _draining: bool = field(default=False, init=False)
    """True once a stop was asked for."""

    def run(self) -> Commit | None:
        """Learn until the stream ends or `stop` is set; returns the last commit.

        Raises AgentError, StateError and StreamError, with the state folder as the last commit left it.
        """
        try:
            self.worker.start(self._learned)  # it loads its model while the first records are read
            self.metrics.state("consuming")
            while not (self.stop.is_set() and self._must_leave()):
                if self._task is None and not self._begin_task():
                    break
                self._read()
                if self._settlement is None:
                    self._listen()
                if self._settlement is not None and self._set_aside(self._settlement):
                    self._conclude(self._settlement)
                self.source.throttle(self._draining or self.buffer.full)
                self._tell()
        finally:
            # Also on an error: no trainer may write to the state folder when its lock is let go.
            self.worker.stop(self.rules.stop_timeout_s)
        self._pass_rejected()
        log.info("ended at commit %06d", self.commit.number if self.commit else 0)
        return self.commit

    def _must_leave(self) -> bool:
        """Begin to stop: True when what was read is to be left for the next start, and not to be learned first."""
        if not self._draining:
            log.info("stopping%s", ": learning what was read first" if self.rules.learn_at_stop else "")
            self.metrics.state("draining")
            self._draining = True
        return not self.rules.learn_at_stop

    def _read(self) -> None:
        """Take what has arrived into the buffer; while draining, leave it for the next start.

        The source is polled in every pass, also while it is throttled: a source that failed says so only there, and its
        wait is what gives the loop its pace.
        """
        busy = self._task is not None
        items = self.source.poll(min(self.rules.poll_timeout_s, _BUSY_POLL_S) if busy else self.rules.poll_timeout_s)
        now = self.clock()
        self.metrics.polled(now)
        self.metrics.heartbeat("pipeline", now)
        # What a draining agent does not take is not lost: its offsets are not committed.
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
                    self._settlement = self._settle_learned(self._task, outcome)
        except WorkerDied as died:
            self._settlement = self._after_failure(died)

    def _settle_learned(self, task: Task, outcome: Outcome) -> _Settlement:
        """Settle a task that was learned."""

        def commit() -> Commit:
            made = self.commits.commit(outcome, self._provenance(task, outcome))
            self.metrics.committed(made, outcome)
            return made

        self.source.judged(len(task.samples), len(outcome.rejected))
        sample_at = {(sample.partition, sample.offset): sample for sample in task.samples}
        undecodable = (
            self._rejected(sample_at[late.partition, late.offset], late.reason, late.detail)
            for late in outcome.rejected
        )
        return _Settlement(undecodable, commit)

    def _settle_given_up(self, task: Task, why: str) -> _Settlement:
        """Settle a task that was given up: all of it is set aside, and only its offsets are committed."""

        def commit() -> Commit:
            made = self.commits.carry(task.next_offsets, task.number, self._provenance(task, None))
            self.metrics.restored(made)
            return made

        return _Settlement((self._rejected(sample, Reason.TASK_FAILED, why) for sample in task.samples), commit)

    def _rejected(self, sample: Sample, reason: Reason, why: str) -> Rejected:
        return Rejected(sample.partition, sample.offset, reason, why, self.spool.raw(sample))

    def _after_failure(self, died: WorkerDied) -> _Settlement | None:
        """Try the task again; after ATTEMPTS set it aside as dead letters, or stop. Raises AgentError."""
        log.error("trainer failed: %s%s", died, f"\n{died.details}" if died.details else "")
        self.metrics.task_failed(died.kind)
        self._failures.append(str(died))
        task = self._task
        if died.kind == "start":  # a configuration that cannot work: another attempt would end the same way
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
        # A broken disk or driver must not empty the whole stream into the dead letters, task by task.
        if not self.rules.quarantine or not died.blames_task:
            raise TaskFailed(
                f"{_name(task)} failed {ATTEMPTS} times ({'; '.join(self._failures)}); stopping before it with nothing "
                "of it committed. The next start tries again; agent.on_task_failure = 'quarantine' would set it aside"
            ) from died
        log.error("%s failed %d times and is set aside as dead letters", _name(task), ATTEMPTS)
        self.worker.start(self._learned)  # it is set up again while the dead letters go out
        return self._settle_given_up(task, str(died))

    def _set_aside(self, settlement: _Settlement) -> bool:
        """Send the dead letters, a few in each pass; True once all are acknowledged. A delay holds up only the commit:
        reading goes on."""
        sent = list(islice(settlement.dead_letters, _DEAD_LETTERS_A_PASS))
        for rejected in sent:
            self.dead_letters.put(rejected)
            self.metrics.rejected(rejected, self.clock())
            self.metrics.dead_lettered(True)
        if sent:  # even if these were all: the flush, which may wait, is for a pass of its own
            return False
        try:
            self.dead_letters.flush(_FLUSH_S)
        except DeadLetterDelayed as error:
            if not settlement.delayed:
                log.error("rejected records cannot be set aside; nothing is committed until they can: %s", error)
                self.metrics.dead_lettered(False)
            settlement.delayed = True
            return False
        return True

    def _conclude(self, settlement: _Settlement) -> None:
        """Commit the settled task. The commit comes first, and is the truth; whoever is told later may miss it."""
        assert self._task is not None
        self.commit = settlement.commit()
        log.info("commit %06d after %s: %d classes", self.commit.number, _name(self._task), len(self.commit.classes))
        if self.commit.release is not None:
            self.published(self.commit)
        self.buffer.committed(self._task)  # only now may the samples leave the disk
        self.source.acknowledge(self.commit.offsets)
        self.dead_letters.committed(self.commit.offsets)
        self._task = self._settlement = None
        self._failures.clear()

    def _pass_rejected(self) -> None:
        """At the end, commit the offsets when only rejected records and marks were read since the last commit, so that
        they are not set aside again at every start."""
        offsets = self.buffer.next_offsets
        if self.buffer.records or offsets == (self.commit.offsets if self.commit else {}):
            return
        try:
            self.dead_letters.flush(_FLUSH_S)
        except DeadLetterError as error:
            log.warning("what was rejected since the last commit will be read again: %s", error)
            return
        tasks = self.commit.tasks if self.commit else 0
        self.commit = self.commits.carry(offsets, tasks, self._provenance(None, None))
        self.source.acknowledge(self.commit.offsets)

    def _tell(self) -> None:
        """Tell the metrics where the agent is, after every pass."""
        self.metrics.spooled(self.buffer.records, self.buffer.bytes, self.spool.max_bytes)
        self.metrics.lag(self.source.lag())
        self.metrics.clamped(self.source.clamped)
        self.metrics.holding(self.source.holding)
        self.metrics.skipped(self.source.skipped)
        self.metrics.dead_letters_removed(self.dead_letters.removed)
        if bool(self.source.holding) != self._paused and not self._draining:
            self._paused = not self._paused
            self.metrics.state("paused" if self._paused else "consuming")

    @property
    def _learned(self) -> Path | None:
        """The folder of the commit that a learner is set up from; None while nothing has been learned."""
        return self.commit.path if self.commit and has_learned(self.commit.path) else None

    def _provenance(self, task: Task | None, outcome: Outcome | None) -> Provenance:
        """What the next commit records. task: None when it carries offsets alone; outcome: None for a task given up."""
        totals: Mapping[str, float] = self.commit.totals if self.commit else {}
        if task is not None:
            totals = counted(totals, task, outcome)
        return Provenance(self.source.fingerprint, task.classes if task else (), totals, self.config)


def _name(task: Task) -> str:
    """A task as logs and errors call it: by its number, its size and where it ends."""
    ends = ", ".join(f"{topic}/{number}:{offset}" for (topic, number), offset in sorted(task.next_offsets.items()))
    return f"task {task.number} ({len(task.samples)} samples up to {ends})"
