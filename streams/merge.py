"""Partitions joined into one order that depends on the records alone, so that the same log gives the same tasks.

The next item is always the one with the smallest (timestamp, topic, partition) among the first items of the partitions.
That is certain while every partition has an item waiting, or is known to have had none up to some time after the
timestamp in question. Before it is certain the item is held back; so a stream in which one partition is silent runs
`wait_s` behind. What cannot be certain: a record that its producer dated more than `wait_s` before the broker had it
may come out at another place than it would when read again.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Iterable
from typing import Generic, TypeVar

from streams.record import Partition

Entry = TypeVar("Entry")


class Merge(Generic[Entry]):
    """Takes the entries of partitions in their order and gives them out in the joint one. Times are in milliseconds.

    Not safe for threads, but for `waiting`, which others may ask.
    """

    def __init__(self, wait_s: float) -> None:
        """`wait_s`: how many seconds after its own time a record may reach the broker and still find its place."""
        self._wait_ms = wait_s * 1000
        self._waiting: dict[Partition, deque[tuple[int, Entry]]] = {}
        self._quiet: dict[Partition, float] = {}

    def track(self, partitions: Iterable[Partition]) -> None:
        """Count these partitions from now on."""
        for partition in partitions:
            self._waiting.setdefault(partition, deque())
            self._quiet.setdefault(partition, float("-inf"))

    def add(self, partition: Partition, entries: Iterable[tuple[int, Entry]]) -> None:
        """Take entries of one partition with their timestamps, in the partition's order."""
        self._waiting[partition].extend(entries)

    def quiet(self, partition: Partition, time_ms: float) -> None:
        """Note that at `time_ms` the partition had no record that was not added before."""
        self._quiet[partition] = max(self._quiet[partition], time_ms)

    def waiting(self, partition: Partition) -> int:
        """Give the number of entries of a partition that are held back."""
        return len(self._waiting[partition])

    @property
    def blocking(self) -> Collection[Partition]:
        """The partitions without an entry that keep others' entries back; empty when nothing is held back."""
        if not any(self._waiting.values()):
            return ()
        return [partition for partition, entries in self._waiting.items() if not entries]

    def take(self, uncertain: bool = False) -> list[Entry]:
        """Take the entries whose place is certain; with `uncertain`, also the others as far as they are known."""
        if len(self._waiting) == 1:
            (only,) = self._waiting.values()
            entries = [entry for _, entry in only]
            only.clear()
            return entries
        taken: list[Entry] = []
        # A Partition is a tuple, so equal times go by topic and number: the order never depends on what came first.
        heads = [(queue[0][0], partition) for partition, queue in self._waiting.items() if queue]
        heapq.heapify(heads)
        certain = float("inf") if uncertain else self._certain_ms()
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
                if not uncertain:  # what comes next of this partition is not known
                    certain = min(certain, self._quiet[first] - self._wait_ms)
        return taken

    def _certain_ms(self) -> float:
        """Give the timestamp that whatever comes will have at least."""
        silent = [self._quiet[partition] for partition, queue in self._waiting.items() if not queue]
        return min(silent, default=float("inf")) - self._wait_ms
