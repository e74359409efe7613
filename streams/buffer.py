"""Records in, tasks out: the cutting rule, and the offsets that follow each cut.

A task is a contiguous range of every partition, so one next offset per partition says what it covers. All cuts but
`idle` and `age` depend on the items alone, not on how they were polled: the same stream gives the same tasks.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from streams.record import ControlKind, Item, Offsets, Partition, Record, Rejected
from streams.spool import Sample, Spool

_QUIET_S = 10.0
"""Seconds without an item after which the age of records counts, and not only how long they have waited here. Chosen by
hand: while a backlog is read, old records come without such a pause, and tasks are to fill as they would have then."""


@dataclass(frozen=True)
class CutRule:
    """A task is cut at the first of these that holds; 0 or False switches one off. A `flush` mark always cuts."""

    new_classes: int = 0
    """Classes not known before that a task may have: the record that would begin one more is the next task's first."""
    samples: int = 0
    """Samples a task has at most."""
    bytes: int = 0
    """Bytes of encoded images after which a task ends."""
    idle_s: float = 0
    """Seconds without an item after which a task ends."""
    age_s: float = 0
    """Seconds after its first sample came at which a task ends: what it holds is in no commit yet. In a stream that is
    quiet they count from when its oldest sample was made, or agents that are restarted often would never cut."""
    kept_s: float = math.inf
    """Seconds for which the stream keeps records. One that is older than this when it comes is not kept by its own time
    but by those beside it, so its time says nothing: a date of 1970 must not make a task of every pause."""
    boundaries: bool = True
    """Whether a task boundary mark ends a task."""


@dataclass(frozen=True)
class Task:
    """A cut of the stream that one update learns."""

    number: int
    """Tasks are counted from 1."""
    classes: tuple[str, ...]
    """The class names of the samples, in order of first appearance."""
    samples: tuple[Sample, ...]
    """At least one, in order of arrival; none only where what is learned is to be released anew."""
    next_offsets: dict[Partition, int]
    """The offset that follows the task, for every partition seen so far."""
    reason: str
    """Why it was cut: new_classes | samples | bytes | boundary | idle | age | end | stop | renewal."""
    bytes: int
    """Bytes of the samples' encoded images."""
    records: int
    """Items consumed for it, rejected ones and marks included."""
    rejected: dict[str, int]
    """Rejected records among them, by reason."""


def halves(task: Task) -> tuple[Task, Task]:
    """Cut a task of two samples or more in two.

    The offsets after the first half are those of the first samples of the second: what was rejected before them has its
    dead letters, and these are flushed before any commit. The second ends where the task does.
    """
    middle = len(task.samples) // 2
    first, second = task.samples[:middle], task.samples[middle:]
    waiting: dict[Partition, int] = {}
    for sample in second:
        waiting.setdefault(sample.partition, sample.offset)

    def part(samples: tuple[Sample, ...], **changed: Any) -> Task:
        classes, size = tuple(dict.fromkeys(s.label for s in samples)), sum(s.length for s in samples)
        return replace(task, samples=samples, classes=classes, bytes=size, **changed)

    return (
        part(first, next_offsets=task.next_offsets | waiting, records=len(first), rejected={}),
        part(second, records=task.records - len(first)),
    )


class TaskBuffer:
    """It cuts a stream into tasks, in order. Used from one thread.

    `known` are the class names of the commit the stream continues from, `offsets` its positions, `next_number` the
    number of the next task. Labels that differ only in case are one class, spelled as in `known` or as first seen.
    `clock` gives seconds since the epoch.
    """

    def __init__(
        self,
        rule: CutRule,
        spool: Spool,
        known: Collection[str],
        next_number: int,
        offsets: Offsets,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rule = rule
        self._clock = clock
        self._spool = spool
        self._next_offsets: dict[Partition, int] = dict(offsets)
        self._number = next_number
        self._known = set(known)
        self._spelling: dict[str, str] = {}
        for name in known:
            self._spelling.setdefault(name.casefold(), name)
        self._cut_tasks: deque[Task] = deque()
        self._samples_held = 0
        self._oldest: deque[tuple[int, float]] = deque()
        """Samples of each cut task that is not committed, and when the oldest of them was made."""
        self._quiet_since: float | None = None
        self._filling_since: float | None = None
        self._begin()

    @property
    def records(self) -> int:
        """The number of samples on the spool: waiting in cut and uncut tasks, or being learned."""
        return self._samples_held

    @property
    def bytes(self) -> int:
        """The bytes that the samples take on disk."""
        return self._spool.bytes

    @property
    def age_s(self) -> float:
        """Seconds since the oldest sample that waits for its commit was made, or read where its record has no time."""
        oldest = min((oldest for _, oldest in self._oldest), default=self._oldest_s)
        return max(0.0, self._clock() - min(oldest, self._oldest_s)) if self._samples_held else 0.0

    @property
    def full(self) -> bool:
        """Whether fetching should stop until a task is committed. `add` still takes what was fetched already."""
        return self._spool.full

    @property
    def next_offsets(self) -> dict[Partition, int]:
        """The offsets after everything added. They may be committed alone while no sample waits (`records` is 0)."""
        return dict(self._next_offsets)

    def add(self, item: Item) -> None:
        """Take the next item of a partition. One from before the partition's position came twice and is ignored.

        Raises SpoolError.
        """
        partition, offset = item.partition, item.offset
        if offset < self._next_offsets.get(partition, 0):
            return
        self._quiet_since = None
        # Before its offset counts: a record that begins the next task must not be among what this one has passed.
        if isinstance(item, Record):
            self._add_sample(item)
        self._next_offsets[partition] = offset + 1
        self._records += 1
        if isinstance(item, Record):
            rule = self._rule
            if rule.samples and len(self._samples) >= rule.samples:
                self._end_task("samples")
            # A task that fills the spool alone is cut too: nothing else could ever free room.
            elif (rule.bytes and self._image_bytes >= rule.bytes) or self._spool_bytes >= self._spool.max_bytes:
                self._end_task("bytes")
        elif isinstance(item, Rejected):
            self._rejected[str(item.reason)] += 1
        elif self._samples and (self._rule.boundaries or item.kind is ControlKind.FLUSH):
            self._end_task("boundary")

    def cut(self, now: float) -> Task | None:
        """The oldest task not handed out yet, or None. `now`: seconds of a monotonic clock, for idle and age alone."""
        # The idle rule counts from the first call without an item: a poll that took long is no silence of the stream.
        if self._quiet_since is None:
            self._quiet_since = now
        if self._samples and self._filling_since is None:
            self._filling_since = now
        if not self._cut_tasks and self._samples and 0 < self._rule.idle_s <= now - self._quiet_since:
            self._end_task("idle")
        elif self._filling_since is not None and self._rule.age_s:
            quiet = now - self._quiet_since >= _QUIET_S
            age = max(now - self._filling_since, self._clock() - self._oldest_s if quiet else 0)
            if age >= self._rule.age_s:
                self._end_task("age")
        return self._cut_tasks.popleft() if self._cut_tasks else None

    def end(self, reason: str) -> Task | None:
        """Cut what remains and hand out the oldest task; None when no sample is left.

        `reason`: `end` of the stream, or `stop` of the agent. Called again it hands out the next.
        """
        if self._samples:
            self._end_task(reason)
        return self._cut_tasks.popleft() if self._cut_tasks else None

    def committed(self, task: Task) -> None:
        """Take the samples of a task off the spool, now that it is committed. Raises SpoolError."""
        self._spool.release(task.samples)
        self._samples_held -= len(task.samples)
        left = len(task.samples)
        while self._oldest and left:  # tasks are committed in order, but perhaps in parts
            count, oldest = self._oldest.popleft()
            if count > left:
                self._oldest.appendleft((count - left, oldest))
            left = max(0, left - count)

    def _begin(self) -> None:
        self._filling_since = None
        self._oldest_s = math.inf
        self._samples: list[Sample] = []
        self._classes: dict[str, None] = {}
        self._new_classes = 0
        self._image_bytes = 0
        self._spool_bytes = 0
        self._records = 0
        self._rejected: Counter[str] = Counter()

    def _add_sample(self, record: Record) -> None:
        # One class for all spellings: `Cat` and `cat` as two would compete for the same images.
        label = self._spelling.setdefault(record.label.casefold(), record.label)
        if label != record.label:
            record = record._replace(label=label)
        if label not in self._classes:
            new = label not in self._known
            if new and 0 < self._rule.new_classes <= self._new_classes:
                self._end_task("new_classes")
            self._new_classes += new
            self._classes[label] = None
        before = self._spool.bytes
        self._samples.append(self._spool.append(record))
        self._spool_bytes += self._spool.bytes - before
        self._image_bytes += len(record.image)
        self._samples_held += 1
        now = self._clock()
        made_s = record.timestamp_s
        if made_s is None or made_s > now or now - made_s >= self._rule.kept_s:
            made_s = now
        if made_s < self._oldest_s:
            self._oldest_s = made_s

    def _end_task(self, reason: str) -> None:
        # The trainer is another process: it must find every byte. And a segment of this task alone goes when it does.
        self._spool.end_segment()
        task = Task(
            number=self._number,
            classes=tuple(self._classes),
            samples=tuple(self._samples),
            next_offsets=dict(self._next_offsets),
            reason=reason,
            bytes=self._image_bytes,
            records=self._records,
            rejected=dict(self._rejected),
        )
        self._cut_tasks.append(task)
        self._oldest.append((len(task.samples), self._oldest_s))
        self._number += 1
        # Also if nothing of it will be learned: read again, the stream must be cut at the same places.
        self._known |= self._classes.keys()
        self._begin()
