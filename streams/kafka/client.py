"""The calls that reading topics makes to a cluster, in our own words."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
from kafka.errors import KafkaError

from streams.kafka.connection import METADATA_MS, PARTITION_BYTES, REQUEST_MS, Connection, describe_error
from streams.kafka.epochs import ends_of
from streams.kafka.record_batches import Message, Unreadable, guard
from streams.kafka.transport import take_large_pieces
from streams.record import Offsets, Partition

log = logging.getLogger(__name__)

_POLL_RECORDS = 1000
"""Messages that one poll gives at most: what is decoded before the reader's thread looks at anything else. Chosen by
hand, twice the client's default."""

_CLOSE_MS = 500
"""Time that closing may take while the cluster is away; KafkaSource must be closed within seconds."""

_LAST_COMMIT_MS = 1500
"""Time that the copy of the last commit may take at the end; only lag tools miss it."""


def ask_anew(
    connection: Connection, topics: Iterable[str], epochs: Mapping[Partition, int]
) -> tuple[list[dict[str, Any]], dict[Partition, int | None]]:
    """Do what Client.describe and Client.epoch_ends do, over a connection of its own."""
    admin = KafkaAdminClient(**connection.settings(), request_timeout_ms=REQUEST_MS)
    try:
        described = admin.describe_topics(list(topics))
        there = {topic["name"] for topic in described if not topic["error_code"]}
        return described, ends_of(admin, {where: epoch for where, epoch in epochs.items() if where.topic in there})
    finally:
        admin.close()


class Client:
    """This is one connection to a cluster: a consumer with partitions assigned by hand, and an admin client.

    Every call is bounded in time, and may raise any error of the client library. Used from one thread.
    """

    def __init__(self, connection: Connection, group: str, fetch_bytes: int) -> None:
        """`group`: where commits are copied to; empty for nowhere. `fetch_bytes`: what one fetch may bring, about."""
        take_large_pieces()
        settings = connection.settings()
        # No deserializers: what one raises makes every later poll of kafka-python 3.0 spin for ever.
        self._consumer = KafkaConsumer(
            **settings,
            group_id=group or None,
            enable_auto_commit=False,  # it would commit what was fetched and perhaps never learned
            auto_offset_reset="none",  # a position that is gone is an error, which `on_lost` decides
            isolation_level="read_committed",
            allow_auto_create_topics=False,  # a misspelt topic is an error and not a new topic
            fetch_max_bytes=fetch_bytes,
            max_partition_fetch_bytes=min(fetch_bytes, PARTITION_BYTES),
            metadata_max_age_ms=METADATA_MS,
            metrics_enabled=False,  # nobody reads them, and they cost work at every fetch
        )
        guard(self._consumer)
        self._group = group
        try:
            self._admin = KafkaAdminClient(**settings, request_timeout_ms=REQUEST_MS)
        except BaseException:
            self._consumer.close(timeout_ms=0)
            raise

    def close(self) -> None:
        """Close both connections; a failure is only logged."""
        for part in (lambda: self._consumer.close(autocommit=False, timeout_ms=_CLOSE_MS), self._admin.close):
            try:
                part()
            except Exception as error:
                log.debug("closing the Kafka client: %s", describe_error(error))

    def describe(self, topics: Iterable[str]) -> list[dict[str, Any]]:
        """Give what the cluster says of topics: `name`, `error_code`, `topic_id` and `partitions` of each."""
        return self._admin.describe_topics(list(topics))

    def retention_s(self, topics: Iterable[str]) -> float:
        """The shortest time in seconds for which one of the topics keeps its messages.

        It is infinite where none is deleted for its age, or where we may not ask.
        """
        names = ("retention.ms", "cleanup.policy")
        wanted = [ConfigResource(ConfigResourceType.TOPIC, topic, dict.fromkeys(names)) for topic in topics]
        shortest = math.inf
        try:
            for of_topic in self._admin.describe_configs(wanted, config_filter="all")["topic"].values():
                kept_ms, policy = (of_topic[name]["value"] for name in names)
                if "delete" in policy and int(kept_ms) >= 0:
                    shortest = min(shortest, int(kept_ms) / 1000)
        except (KafkaError, KeyError, ValueError, TypeError) as error:
            log.warning(
                "how long the topics keep records is not known (%s); a task that fills more slowly may lose its own, "
                "which task.idle_s prevents",
                describe_error(error),
            )
        return shortest

    def epoch_ends(self, epochs: Mapping[Partition, int]) -> dict[Partition, int | None]:
        """Give the offset at which an epoch of each partition ended, see streams.kafka.epochs.ends_of."""
        return ends_of(self._admin, epochs)

    def assign(self, positions: Offsets, epochs: Mapping[Partition, int]) -> None:
        """Read exactly these partitions from now on, each from its offset; `epochs`: of what lies before them."""
        self._consumer.assign([TopicPartition(*partition) for partition in positions])
        assignment = self._consumer._subscription.assignment
        for partition, offset in positions.items():
            # Not KafkaConsumer.seek, which takes no epoch: with it the client notices a truncation while it reads.
            position = OffsetAndMetadata(offset, "", epochs.get(partition, -1))
            assignment[TopicPartition(*partition)].seek(position)

    def seek(self, partition: Partition, offset: int) -> None:
        """Go on at `offset`; what was fetched beyond it is dropped."""
        self._consumer.seek(TopicPartition(*partition), offset)

    def poll(self, timeout_s: float) -> dict[Partition, list[Message | Unreadable]]:
        """Give the messages that arrived, at most a thousand, by partition and in order."""
        polled = self._consumer.poll(timeout_ms=int(timeout_s * 1000), max_records=_POLL_RECORDS)
        return {Partition(*partition): messages for partition, messages in polled.items()}

    def pause(self, wanted: set[Partition]) -> None:
        """Pause exactly these partitions from now on."""
        paused = {Partition(*partition) for partition in self._consumer.paused()}
        self._consumer.pause(*(TopicPartition(*partition) for partition in wanted - paused))
        self._consumer.resume(*(TopicPartition(*partition) for partition in paused - wanted))

    def reached(self) -> dict[Partition, tuple[int, int]]:
        """Give `position` of every partition, as far as it is known, with the leader epoch of what lies before it (-1
        where that is not known), at the cost of no request."""
        # Not KafkaConsumer.position, each call of which goes through all partitions and may wait for the network.
        assignment = self._consumer._subscription.assignment
        return {
            Partition(*where): (state.position.offset, state.position.leader_epoch)
            for where, state in assignment.items()
            if state.position
        }

    def position(self, partition: Partition) -> int:
        """Give the offset that the next poll begins with; the fetched and not yet polled lie behind it."""
        return self._consumer.position(TopicPartition(*partition), timeout_ms=REQUEST_MS) or 0

    def end(self, partition: Partition) -> int | None:
        """Give the end of a partition as the last fetch had it; None before the first. It costs no request."""
        return self._consumer.highwater(TopicPartition(*partition))

    def ends(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """Give the offset after the last message of each partition."""
        return self._ask(self._consumer.end_offsets, partitions)

    def beginnings(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """Give the offset of the first message that each partition still has."""
        return self._ask(self._consumer.beginning_offsets, partitions)

    @staticmethod
    def _ask(ask: Callable[..., Mapping[Any, int]], partitions: Iterable[Partition]) -> dict[Partition, int]:
        wanted = [TopicPartition(*partition) for partition in partitions]
        answer = ask(wanted, timeout_ms=REQUEST_MS) if wanted else {}
        return {Partition(*partition): offset for partition, offset in answer.items()}

    def at_time(self, partitions: Iterable[Partition], moment: datetime) -> dict[Partition, int]:
        """Give the first offset from `moment` on of each partition; its end where there is none yet."""
        wanted = {TopicPartition(*partition): int(moment.timestamp() * 1000) for partition in partitions}
        answers = self._consumer.offsets_for_times(wanted, timeout_ms=REQUEST_MS)
        found = {
            Partition(*partition): answer.offset
            for partition, answer in answers.items()
            if answer and answer.offset >= 0
        }
        return self.ends(Partition(*partition) for partition in wanted) | found

    def committed(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """Give the group's offsets, of the partitions it has any for."""
        answers = {
            partition: self._consumer.committed(TopicPartition(*partition), timeout_ms=REQUEST_MS)
            for partition in partitions
        }
        return {partition: offset for partition, offset in answers.items() if offset is not None}

    def commit(self, offsets: Offsets, wait: bool) -> None:
        """Write the group's offsets; a failure is logged where nobody waits for the answer."""
        # -1: no leader epoch is known, as positions are sought by their offset alone.
        wanted = {
            TopicPartition(*partition): OffsetAndMetadata(offset, "", -1) for partition, offset in offsets.items()
        }
        if wait:
            self._consumer.commit(wanted, timeout_ms=_LAST_COMMIT_MS)
        else:
            self._consumer.commit_async(wanted, callback=self._on_committed)

    def _on_committed(self, offsets: Any, answer: Any) -> None:
        if isinstance(answer, Exception):
            log.warning(
                "offsets were not copied to group %s: %s; lag tools are behind", self._group, describe_error(answer)
            )
