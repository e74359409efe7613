"""Partitions joined into one order that depends on the records alone, so that the same log gives the same tasks.

The next item is always the one with the smallest (timestamp, topic, partition) among the first items of the partitions.
That is certain while every partition has an item waiting, or is known to have had none up to some time after the
timestamp in question. Before it is certain the item is held back; so a stream in which one partition is silent runs
`wait_s` behind. What cannot be certain: a record that its producer dated more than `wait_s` before the broker had it
may come out at another place than it would when read again.

A date far ahead of its arrival is not believed: it would hold back its partition until that time comes. A partition of
which nothing can be learned is waited for a while, and then not any more.
"""

from __future__ import annotations

import heapq
import logging
from collections import Counter, deque
from collections.abc import Collection, Iterable
from typing import Generic, TypeVar

from streams.record import Partition

Entry = TypeVar("Entry")

log = logging.getLogger(__name__)

AHEAD_S = 10
"""Seconds that a record's time may be ahead of its arrival. Chosen by hand: clocks that are kept differ by less than a
second. With more, a producer whose clock is wrong holds up its partition by that much; with less, order is lost earlier
between producers whose clocks differ."""

PATIENCE_S = 60
"""Seconds that entries wait for a partition of which nothing is known. Chosen by hand: a partition without a leader has
a new one within seconds as a rule. Longer stops the stream for longer, shorter gives up the order sooner."""


class Merge(Generic[Entry]):
    """Takes the entries of partitions in their order and gives them out in the joint one. Times are in milliseconds.

    Not safe for threads, but for `waiting`, which others may ask.
    """

    def __init__(self, wait_s: float) -> None:
        """`wait_s`: how many seconds after its own time a record may reach the broker and still find its place."""
        self._wait_ms = wait_s * 1000
        self._waiting: dict[Partition, deque[tuple[int, Entry]]] = {}
        self._quiet: dict[Partition, float] = {}
        self._unknown_s: dict[Partition, float] = {}
        self._given_up: set[Partition] = set()
        self.clamped: Counter[str] = Counter()
        """Entries by topic whose time was more than AHEAD_S ahead of their arrival."""

    def track(self, partitions: Iterable[Partition]) -> None:
        """Count these partitions from now on."""
        for partition in partitions:
            self._waiting.setdefault(partition, deque())
            self._quiet.setdefault(partition, float("-inf"))
            self._unknown_s.setdefault(partition, 0)

    def add(self, partition: Partition, entries: Iterable[tuple[int, Entry]], arrived_ms: float) -> None:
        """Take entries of one partition with their timestamps, in the partition's order.

        A timestamp more than AHEAD_S after `arrived_ms` counts as one that is just that far ahead.
        """
        latest = int(arrived_ms + AHEAD_S * 1000)
        waiting = self._waiting[partition]
        for entry in entries:
            if entry[0] > latest:
                entry = latest, entry[1]
                self.clamped[partition.topic] += 1
            waiting.append(entry)
        self._unknown_s[partition] = 0

    def quiet(self, partition: Partition, time_ms: float) -> None:
        """Note that at `time_ms` the partition had no record that was not added before."""
        self._quiet[partition] = max(self._quiet[partition], time_ms)
        self._unknown_s[partition] = 0

    def waiting(self, partition: Partition) -> int:
        """Give the number of entries of a partition that are held back."""
        return len(self._waiting[partition])

    @property
    def blocking(self) -> Collection[Partition]:
        """The partitions without an entry that keep others' entries back; empty when nothing is held back."""
        if not any(self._waiting.values()):
            return ()
        return [partition for partition, entries in self._waiting.items() if not entries]

    def take(self, elapsed_s: float = 0) -> list[Entry]:
        """The entries whose place is certain, or would be but for partitions that were waited for PATIENCE_S.

        `elapsed_s`: how many seconds were spent since the last call on learning of all partitions. Of each partition
        its own time counts: whatever others deliver meanwhile, no other is held back longer for its sake.
        """
        if len(self._waiting) == 1:
            (only,) = self._waiting.values()
            entries = [entry for _, entry in only]
            only.clear()
            return entries
        taken: list[Entry] = []
        # A Partition is a tuple, so equal times go by topic and number: the order never depends on what came first.
        heads = [(queue[0][0], partition) for partition, queue in self._waiting.items() if queue]
        heapq.heapify(heads)
        certain = self._certain_ms(self._not_waited_for(elapsed_s))
        while heads:
            timestamp, first = heads[0]
            if timestamp >= certain:  # also when equal: a partition that goes before may still bring one of this time
                break
            queue = self._waiting[first]
            taken.append(queue.popleft()[1])
            if queue:
                heapq.heapreplace(heads, (queue[0][0], first))
            else:
                heapq.heappop(heads)
                # What comes next of this partition is not known.
                certain = min(certain, self._quiet[first] - self._wait_ms)
        return taken

    def _not_waited_for(self, elapsed_s: float) -> set[Partition]:
        blocking = self.blocking
        for partition in blocking:
            self._unknown_s[partition] += elapsed_s
        given_up = {partition for partition in blocking if self._unknown_s[partition] >= PATIENCE_S}
        if given_up - self._given_up:
            names = ", ".join(f"{topic}/{number}" for topic, number in sorted(given_up))
            log.warning("records waited %d s for those of %s, of which nothing is known; they go on", PATIENCE_S, names)
        self._given_up = given_up
        return given_up

    def _certain_ms(self, without: Collection[Partition]) -> float:
        """The timestamp that whatever comes will have at least, of all partitions but some."""
        silent = [
            self._quiet[partition]
            for partition, queue in self._waiting.items()
            if not queue and partition not in without
        ]
        return min(silent, default=float("inf")) - self._wait_ms
