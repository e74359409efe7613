"""The path of the data through the agent process: polled, cut into tasks, learned, committed. The file to read first.

`Pipeline.run` is the whole path. It never waits for anything but the source's short poll: learning happens in the
worker, and a commit is a rename. The trainer's half of the path is agent/trainer.py; what a crash leaves, and how the
next start goes on from it, is told in agent/commits.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from agent.commits import CommitStore, Provenance
from agent.layout import has_learned
from agent.values import Commit, Outcome, Progress
from agent.worker import Worker, WorkerDied
from streams.buffer import Task, TaskBuffer, halves
from streams.record import Item, Offsets, Reason, Rejected
from streams.source import DeadLetterDelayed, DeadLetterError, DeadLetters, PositionError, Source
from streams.spool import Sample, Spool

log = logging.getLogger(__name__)

ATTEMPTS = 2
"""A task that failed this number of times is given up. One repetition gets over what passes by itself, such as a kill
when memory was short; what fails for the task's own sake fails again, and each attempt may take an hour."""

RANK_ATTEMPTS = 10
"""The same where the last of these failures is the loss of a rank, for which neither task nor trainer can help: chosen
by hand. It bounds how often an update begins anew where a machine that joins it dies every time."""

HALVINGS = 64
"""Times that a task which fails for its data is cut in two, it and its halves together: each guilty sample of n takes
about log2(n), so these find four in a task of 65,536. Parts that fail after them are set aside whole. Chosen by hand: a
larger one saves more samples of a task that is bad all through, at an attempt and a start of the trainer each."""

_BUSY_POLL_S = 0.1
"""Longest poll of the source while something is being learned: the end of the update is noticed that much later at
most. A shorter one turns the loop more often for nothing."""

_DEAD_LETTERS_A_PASS = 200
"""Dead letters of a task that go out between two polls: chosen by hand. A task set aside may have many thousands; all
at once they would keep the loop from polling and from its heartbeat, and would be in memory together."""

_SETTLE_S = 0.5
"""Longest wait for the dead letters' acknowledgement, and for the source to vouch; as long as an idle poll. When it is
over the loop turns and asks again, so a larger one only makes the agent slower to hear a signal."""

_PASS_S = 300.0
"""Seconds after which the offsets of rejected records and marks are committed when nothing else comes: chosen by hand.
An agent that is killed sets aside again what it rejected in this time at most; a shorter one writes more commits."""


class AgentError(Exception):
    """The agent stops; nothing that was learned since the last commit is kept, and nothing is lost."""


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
    """Dead-letter the samples for which a task fails, and go on; else stop with TaskFailed."""
    stop_timeout_s: float = 5.0
    """Time the trainer has to end by itself at the end; then it is killed."""


class Metrics(Protocol):
    """It is told of the pipeline's work, in cheap calls; each method's sentence is in exporter.metrics.Metrics."""

    def state(self, name: str) -> None: ...
    def heartbeat(self, loop: str, now: float) -> None: ...
    def polled(self, now: float) -> None: ...
    def consumed(self, item: Item, now: float) -> None: ...
    def spooled(self, records: int, bytes: int, capacity_bytes: int) -> None: ...
    def lag(self, lag: Mapping[tuple[str, int], int]) -> None: ...
    def clamped(self, clamped: Mapping[str, int]) -> None: ...
    def holding(self, why: str) -> None: ...
    def waiting(self, age_s: float, retention_s: float) -> None: ...
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
    # A merged learner has read from no stream: whichever it is given begins where a new folder would begin with it.
    if commit.fingerprint and not source.continues(commit.fingerprint):
        raise PositionError(
            f"{commit.path} was learned from another stream (fingerprint {commit.fingerprint[:12]}, this one has "
            f"{source.fingerprint[:12]}), so its offsets mean nothing here; set [source] back to that stream and its "
            "order, or state.path to a new folder"
        )
    source.seek(commit.offsets, commit.epochs)
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
    renewal_due: Callable[[Commit | None], bool] = lambda commit: False
    """Tells whether what is learned is to be released anew, as others have learned something to answer with."""

    _task: Task | None = field(default=None, init=False)
    """The task that the worker has in hand, or that is being settled."""
    _parts: list[Task] = field(default_factory=list, init=False)
    """What is left of a task that was cut in two, in order; each part is learned and committed as a task."""
    _halvings: int = field(default=0, init=False)
    """Times that the task in hand was cut in two, it and its parts together."""
    _settlement: _Settlement | None = field(default=None, init=False)
    _failures: list[str] = field(default_factory=list, init=False)
    """What the trainer died of since the last commit."""
    _only_rejected_since: float | None = field(default=None, init=False)
    """When (`monotonic`) the first record came that only a commit without a task passes; None where there is none."""
    _paused: bool = field(default=False, init=False)
    """True while the source itself does not read."""
    _draining: bool = field(default=False, init=False)
    """True once a stop was asked for."""

    def run(self) -> Commit | None:
        """Learn until the stream ends or `stop` is set; returns the last commit.

        Raises AgentError, StateError and StreamError, with the state folder as the last commit left it.
        """
        self._commit_beginning()
        try:
            self.worker.start(self._learned)  # it loads its model while the first records are read
            self.metrics.state("consuming")
            while not (self.stop.is_set() and self._must_leave()):
                if self._task is None and not self._begin_task():
                    break
                self._read()
                self._pass_in_time()
                if self._settlement is None:
                    self._listen()
                if self._settlement is not None and self._set_aside(self._settlement):
                    self._conclude(self._settlement)
                self.source.throttle(self._draining or self.buffer.full)
                self._tell()
        finally:
            # Also on an error: no trainer may write to the state folder when its lock is let go.
            self.worker.stop(self.rules.stop_timeout_s)
        try:
            self._pass_rejected()
        except DeadLetterError as error:
            log.warning("what was rejected since the last commit will be read again: %s", error)
        log.info("ended at commit %06d", self.commit.number if self.commit else 0)
        return self.commit

    def _commit_beginning(self) -> None:
        """Make it durable where a live stream is read from, before anything is taken of it. Without a commit the next
        start would begin elsewhere: at the newest record there is then, or at the oldest that retention has left."""
        # An archive begins at the same item at every start, so a commit would say nothing new.
        if not self.source.live:
            return
        known = (self.commit.fingerprint, self.commit.offsets) if self.commit else ("", {})
        if self.source.positions and (self.source.fingerprint, self.source.positions) != known:
            self._carry(self.source.positions)
            assert self.commit is not None
            log.info("commit %06d holds where reading begins", self.commit.number)
            self.metrics.restored(self.commit)

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
        if self._parts:
            self._submit(self._parts.pop(0))
            return True
        self._halvings = 0
        ended = self._draining or self.source.exhausted
        task = self.buffer.cut(self.monotonic())
        if task is None and ended and (self._draining or self.rules.learn_at_end):
            task = self.buffer.end("stop" if self._draining else "end")
        if task is None:
            if not ended and self.renewal_due(self.commit):
                # Without samples and with the number of the last one: it learns nothing, and moves no offset.
                number, offsets = (self.commit.tasks, self.commit.offsets) if self.commit else (0, {})
                self._work_on(Task(number, (), (), dict(offsets), "renewal", 0, 0, {}))
            return not ended
        log.info("%s cut (%s): %d classes", _name(task), task.reason, len(task.classes))
        self.metrics.cut(task.reason, len(task.samples), len(task.classes))
        self._submit(task)
        return True

    def _submit(self, task: Task) -> None:
        # Numbered here: the parts of a task that was cut in two have taken numbers that the buffer knows nothing of.
        self._work_on(replace(task, number=(self.commit.tasks if self.commit else 0) + 1))

    def _work_on(self, task: Task) -> None:
        self._task = task
        self.worker.submit(task, self.commits.stage(), self._learned)

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
            learned = replace(outcome, next_offsets=self.source.past_marks(outcome.next_offsets))
            made = self.commits.commit(learned, self._provenance(learned.next_offsets, task, outcome))
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
            offsets = self.source.past_marks(task.next_offsets)
            made = self.commits.carry(offsets, task.number, self._provenance(offsets, task, None))
            self.metrics.restored(made)
            return made

        return _Settlement((self._rejected(sample, Reason.TASK_FAILED, why) for sample in task.samples), commit)

    def _rejected(self, sample: Sample, reason: Reason, why: str) -> Rejected:
        return Rejected(sample.partition, sample.offset, reason, why, self.spool.raw(sample))

    def _after_failure(self, died: WorkerDied) -> _Settlement | None:
        """Try the task again, or in two halves when its data are to blame; set aside what remains, or stop.

        Raises AgentError.
        """
        log.error("trainer failed: %s%s", died, f"\n{died.details}" if died.details else "")
        self.metrics.task_failed(died.kind)
        self._failures.append(str(died))
        task = self._task
        if died.at_start:  # a configuration that cannot work: another attempt would end the same way
            raise AgentError(f"the trainer could not be set up: {died}") from died
        # A broken disk or driver must not empty the whole stream into the dead letters, task by task.
        quarantined = self.rules.quarantine and died.blames_task
        if quarantined and task is not None and len(task.samples) > 1 and self._halvings < HALVINGS:
            self._halve(task)
            return None
        if len(self._failures) < (RANK_ATTEMPTS if died.kind == "rank" else ATTEMPTS):
            if task is None:
                self.worker.start(self._learned)
            else:
                log.warning("%s is tried again", _name(task))
                self.worker.submit(task, self.commits.stage(), self._learned)
            return None
        if task is not None and not task.samples:
            log.error("nothing is released anew after %d failures; the release before serves on", ATTEMPTS)
            self._task = None
            self._failures.clear()
            self.worker.start(self._learned)
            return None
        if task is None:
            raise AgentError(f"the trainer ended {len(self._failures)} times before it was set up: {died}") from died
        if not quarantined:
            advice = (
                "agent.on_task_failure = 'quarantine' would set aside the samples it fails for"
                if died.blames_task
                else "its samples are not known to be the reason, so none is set aside"
            )
            raise TaskFailed(
                f"{_name(task)} failed {len(self._failures)} times ({'; '.join(self._failures)}); stopping before it "
                f"with nothing of it committed. The next start tries again; {advice}"
            ) from died
        log.error("%s failed %d times and is set aside as dead letters", _name(task), ATTEMPTS)
        self.worker.start(self._learned)  # it is set up again while the dead letters go out
        return self._settle_given_up(task, str(died))

    def _halve(self, task: Task) -> None:
        """Learn `task` as two, the earlier samples first, so that the offsets of each commit pass nothing unsettled."""
        log.warning("%s fails for its data and is tried in two halves", _name(task))
        self._parts[:0] = halves(task)
        self._halvings += 1
        self._task = None
        self._failures.clear()

    def _set_aside(self, settlement: _Settlement) -> bool:
        """Send the dead letters, a few in each pass; True once all are acknowledged and the source vouches for the
        offsets. A delay holds up only the commit: reading goes on. Raises PositionError."""
        sent = list(islice(settlement.dead_letters, _DEAD_LETTERS_A_PASS))
        for rejected in sent:
            self.dead_letters.put(rejected)
            self.metrics.rejected(rejected, self.clock())
            self.metrics.dead_lettered(True)
        if sent:  # even if these were all: the flush, which may wait, is for a pass of its own
            return False
        try:
            self.dead_letters.flush(_SETTLE_S)
        except DeadLetterDelayed as error:
            if not settlement.delayed:
                log.error("rejected records cannot be set aside; nothing is committed until they can: %s", error)
                self.metrics.dead_lettered(False)
            settlement.delayed = True
            return False
        return self.source.vouches(_SETTLE_S)

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

    def _pass_in_time(self) -> None:
        """Pass what was rejected while nothing else comes, every _PASS_S: a killed agent does not come to its end."""
        if not self._only_rejected:
            self._only_rejected_since = None
            return
        now = self.monotonic()
        if self._only_rejected_since is None:
            self._only_rejected_since = now
        elif now - self._only_rejected_since >= _PASS_S:
            self._only_rejected_since = None
            try:
                self._pass_rejected()
            except DeadLetterDelayed as error:
                log.error("rejected records cannot be set aside yet, and are not passed: %s", error)

    @property
    def _only_rejected(self) -> bool:
        """Whether only rejected records and marks were read since the last commit."""
        offsets = self.commit.offsets if self.commit else {}
        return not self.buffer.records and self.source.past_marks(self.buffer.next_offsets) != offsets

    def _pass_rejected(self) -> None:
        """Commit the offsets when only rejected records and marks were read since the last commit, so that they are not
        set aside again at the next start. Raises DeadLetterError."""
        if not self._only_rejected:
            return
        self.dead_letters.flush(_SETTLE_S)
        if self.source.vouches(_SETTLE_S):
            self._carry(self.source.past_marks(self.buffer.next_offsets))
        else:
            log.warning("rejected records are not passed yet: the stream cannot be asked whether it is still the same")

    def _carry(self, offsets: Offsets) -> None:
        """Commit `offsets` alone."""
        tasks = self.commit.tasks if self.commit else 0
        self.commit = self.commits.carry(offsets, tasks, self._provenance(offsets, None, None))
        self.dead_letters.committed(self.commit.offsets)
        self.source.acknowledge(self.commit.offsets)

    def _tell(self) -> None:
        """Tell the metrics where the agent is, after every pass."""
        self.metrics.spooled(self.buffer.records, self.buffer.bytes, self.spool.max_bytes)
        self.metrics.waiting(self.buffer.age_s, self.source.retention_s)
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

    def _provenance(self, offsets: Offsets, task: Task | None, outcome: Outcome | None) -> Provenance:
        """Say what a commit of `offsets` records. task: None when it carries offsets alone; outcome: None for a task
        given up.
        """
        totals: Mapping[str, float] = self.commit.totals if self.commit else {}
        if task is not None:
            totals = counted(totals, task, outcome)
        classes = task.classes if task else ()
        return Provenance(self.source.fingerprint, classes, totals, self.config, self.source.epochs(offsets))


def counted(totals: Mapping[str, float], task: Task, outcome: Outcome | None) -> dict[str, float]:
    """Add `task` to the counters that go on over restarts; `outcome` is None when it was set aside as a whole.

    The counters are `records`, `samples`, `bytes`, `training_samples`, `training_steps` and `rejected_<reason>`.
    """
    after = Counter(totals)
    after.update(records=task.records, samples=len(task.samples), bytes=task.bytes)
    after.update({f"rejected_{reason}": count for reason, count in task.rejected.items()})
    if outcome is None:
        after.update({f"rejected_{Reason.TASK_FAILED}": len(task.samples)})
    else:
        after.update(f"rejected_{late.reason}" for late in outcome.rejected)
        if outcome.update is not None:
            update = outcome.update
            after.update(training_samples=update.samples * update.epochs_run, training_steps=update.steps)
    return dict(after)


def _name(task: Task) -> str:
    """Name a task as logs and errors call it: by its number, its size and where it ends."""
    ends = ", ".join(f"{topic}/{number}:{offset}" for (topic, number), offset in sorted(task.next_offsets.items()))
    return f"task {task.number} ({len(task.samples)} samples up to {ends})"
