"""Leader epochs: under which leader of its partition the records up to an offset were written (KIP-320).

An offset alone does not say which record is meant: after an unclean election of a leader the log may end before our
position and grow beyond it again, with other records. The epoch of the last record that was read tells the two logs
apart: the broker knows where in its own log that epoch ended.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping

from kafka import TopicPartition
from kafka.admin import KafkaAdminClient
from kafka.errors import NotLeaderForPartitionError, RetriableError, UnsupportedVersionError, for_code
from kafka.protocol.consumer import OffsetForLeaderEpochRequest

from streams.kafka.connection import REQUEST_MS, log
from streams.record import Offsets, Partition

_UNKNOWN = -1
"""The protocol's number where an epoch or an offset is not known."""

_VERSION = 3
"""The request of Kafka 2.3: the first that a consumer may send which may describe the topic."""

_RETRY_S = 0.1
"""Seconds between two questions while a partition is changing its leader; the client's default."""


class Epochs:
    """The leader epochs of what was read of each partition. One thread changes it; any thread may ask `before`."""

    def __init__(self) -> None:
        self._end: dict[Partition, int] = {}
        self._starts: dict[Partition, list[tuple[int, int]]] = {}
        """(first offset, epoch) of each run of the same epoch, in order."""

    def begin(self, positions: Offsets, epochs: Mapping[Partition, int]) -> None:
        """Begin anew: these partitions are read from these offsets on, which follow a record of this epoch."""
        for partition, offset in positions.items():
            self._end[partition] = offset
            self._starts[partition] = [(offset - 1, epochs.get(partition, _UNKNOWN))]

    def read(self, partition: Partition, next_offset: int, epoch: int) -> None:
        """Note that all from the end of what is known up to `next_offset` was written in `epoch` at the latest."""
        if next_offset <= self._end[partition]:
            return
        if epoch != self._starts[partition][-1][1]:
            # From the end of what is known: marks between two records may be of the later epoch already.
            self._starts[partition].append((self._end[partition], epoch))
        self._end[partition] = next_offset

    def before(self, offsets: Offsets) -> dict[Partition, int]:
        """Give the epoch of what lies right before each of the offsets, where it is known."""
        found = {}
        for partition, offset in offsets.items():
            starts = self._starts.get(partition, ())
            at = bisect_left(starts, (offset, _UNKNOWN)) - 1
            if at >= 0 and starts[at][1] != _UNKNOWN:
                found[partition] = starts[at][1]
        return found

    def forget(self, offsets: Offsets) -> None:
        """Forget what nobody will ask for again, after a commit of `offsets`."""
        for partition, offset in offsets.items():
            starts = self._starts.get(partition, [])
            # A new list: `before` may be looking at the old one.
            self._starts[partition] = starts[max(0, bisect_left(starts, (offset, _UNKNOWN)) - 1) :]


def ends_of(admin: KafkaAdminClient, epochs: Mapping[Partition, int]) -> dict[Partition, int | None]:
    """Ask where in each partition's log its epoch ended: the offset after its last record, or the log's end.

    None stands for an epoch that the log has never had, and all where no log of the cluster has epochs (Kafka before
    2.3). Raises errors of the client when a leader does not answer in time.
    """
    missing = {TopicPartition(*partition): epoch for partition, epoch in epochs.items()}
    found: dict[Partition, int | None] = {}
    deadline = time.monotonic() + REQUEST_MS / 1000
    while missing:
        try:
            found |= admin._manager.run(_ask, admin, missing)
        except UnsupportedVersionError as error:
            log.debug("the cluster does not tell where leader epochs end: %s", error)
            return {}
        except RetriableError:
            if time.monotonic() > deadline:
                raise
        for partition in found:
            missing.pop(TopicPartition(*partition), None)
        if missing and time.monotonic() > deadline:
            raise NotLeaderForPartitionError(f"no leader of {sorted(missing)} tells where its epochs end")
        if missing:
            time.sleep(_RETRY_S)
    return found


async def _ask(admin: KafkaAdminClient, epochs: Mapping[TopicPartition, int]) -> dict[Partition, int | None]:
    """Ask every leader once. A partition whose leader is another by now is not in the answer."""
    found: dict[Partition, int | None] = {}
    for leader, partitions in (await admin._async_get_leader_for_partitions(epochs)).items():
        by_topic = defaultdict(list)
        for topic, number in partitions:
            # The epoch of the leader itself is left open: we know it from no other place than the answer before.
            by_topic[topic].append((number, _UNKNOWN, epochs[TopicPartition(topic, number)]))
        request = OffsetForLeaderEpochRequest(replica_id=-1, topics=list(by_topic.items()), min_version=_VERSION)
        answer = await admin._manager.send(request, node_id=leader)
        for of_topic in answer.topics:
            for one in of_topic.partitions:
                error = for_code(one.error_code)
                if issubclass(error, RetriableError):
                    continue
                if one.error_code:
                    raise error(f"{of_topic.topic}/{one.partition}: where a leader epoch ends")
                known = one.end_offset != _UNKNOWN and one.leader_epoch != _UNKNOWN
                found[Partition(of_topic.topic, one.partition)] = one.end_offset if known else None
    return found
