"""Offsets that hold no record for us: marks of transactions, records of aborted ones, what compaction removed.

A position right before such offsets and one right behind them mean the same, until retention removes them: then the
first is no longer in the log, and would look as if records had been lost.
"""

from __future__ import annotations

from itertools import takewhile

from streams.record import Offsets, Partition

_MOST = 10_000
"""Gaps that are remembered of a partition, about 1 MB: chosen by hand. A transaction leaves one, and all are forgotten
with the commit that passes them. A position in a forgotten gap is only committed as it is, before the gap."""


class Gaps:
    """What lies between the records of each partition. One thread changes it; any thread may ask `past`."""

    def __init__(self) -> None:
        self._last: dict[Partition, int] = {}
        self._ends: dict[Partition, dict[int, int]] = {}
        """Where each gap ends, by the offset at which it begins, in their order."""

    def begin(self, positions: Offsets) -> None:
        """Begin anew: from now on these partitions are read, from these offsets on."""
        for partition, offset in positions.items():
            self._last[partition] = offset
            self._ends[partition] = {}

    def read(self, partition: Partition, offset: int, next_offset: int) -> None:
        """Note that the next records of a partition are those from `offset` up to `next_offset`."""
        if offset > self._last[partition]:
            self.nothing_before(partition, offset)
        self._last[partition] = next_offset

    def nothing_before(self, partition: Partition, position: int) -> None:
        """Note that between the last record that was read and `position` there is none."""
        last = self._last[partition]
        if position > last:
            ends = self._ends[partition]
            ends[last] = position
            if len(ends) > _MOST:
                del ends[next(iter(ends))]

    def past(self, offsets: Offsets) -> dict[Partition, int]:
        """Give the offsets, each moved behind the gap that begins there."""
        return {partition: self._ends.get(partition, {}).get(at, at) for partition, at in offsets.items()}

    def forget(self, offsets: Offsets) -> None:
        """Forget the gaps that nobody will ask for again, after a commit of `offsets`."""
        for partition, committed in offsets.items():
            ends = self._ends.get(partition, {})
            # Not the one that ends at the commit: until the record there is taken, `past` is asked for its beginning.
            for start in list(takewhile(lambda start: ends[start] < committed, ends)):  # noqa: B023
                del ends[start]
