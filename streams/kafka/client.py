"""The calls that reading topics makes to a cluster, in our own words."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.admin import KafkaAdminClient

from streams.kafka.connection import REQUEST_MS, Connection, describe_error
from streams.kafka.record_batches import guard
from streams.record import Offsets, Partition

log = logging.getLogger(__name__)

_POLL_RECORDS = 1000


class Client:
    """The calls we make to a cluster, in our own words. Every one is bounded in time."""

    def __init__(self, connection: Connection, group: str, fetch_bytes: int) -> None:
        settings = connection.settings()
        self._consumer = KafkaConsumer(
            **settings,
            group_id=group or None,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            allow_auto_create_topics=False,
            fetch_max_bytes=fetch_bytes,
            max_partition_fetch_bytes=min(fetch_bytes, 4 * 2**20),
            request_timeout_ms=30_000,
            metadata_max_age_ms=30_000,
            metrics_enabled=False,
        )
        guard(self._consumer)
        self._group = group
        try:
            self._admin = KafkaAdminClient(**settings, request_timeout_ms=REQUEST_MS)
        except BaseException:
            self._consumer.close(timeout_ms=0)
            raise

    def close(self) -> None:
        for part in (lambda: self._consumer.close(autocommit=False, timeout_ms=500), self._admin.close):
            try:
                part()
            except Exception as error:
                log.debug("closing the Kafka client: %s", describe_error(error))

    def describe(self, topics: Iterable[str]) -> list[dict[str, Any]]:
        return self._admin.describe_topics(list(topics))

    def assign(self, positions: Offsets) -> None:
        self._consumer.assign([TopicPartition(*where) for where in positions])
        for where, offset in positions.items():
            self.seek(where, offset)

    def seek(self, where: Partition, offset: int) -> None:
        self._consumer.seek(TopicPartition(*where), offset)

    def poll(self, timeout_s: float) -> dict[Partition, list[Any]]:
        polled = self._consumer.poll(timeout_ms=int(timeout_s * 1000), max_records=_POLL_RECORDS)
        return {Partition(*where): messages for where, messages in polled.items()}

    def pause(self, wanted: set[Partition]) -> None:
        """Exactly these are paused from now on."""
        paused = {Partition(*where) for where in self._consumer.paused()}
        self._consumer.pause(*(TopicPartition(*where) for where in wanted - paused))
        self._consumer.resume(*(TopicPartition(*where) for where in paused - wanted))

    def position(self, where: Partition) -> int:
        return self._consumer.position(TopicPartition(*where), timeout_ms=REQUEST_MS) or 0

    def end(self, where: Partition) -> int | None:
        """As the last fetch had it."""
        return self._consumer.highwater(TopicPartition(*where))

    def ends(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return self._asked(self._consumer.end_offsets, partitions)

    def beginnings(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return self._asked(self._consumer.beginning_offsets, partitions)

    @staticmethod
    def _asked(ask: Callable[..., Mapping[Any, int]], partitions: Iterable[Partition]) -> dict[Partition, int]:
        wanted = [TopicPartition(*where) for where in partitions]
        answer = ask(wanted, timeout_ms=REQUEST_MS) if wanted else {}
        return {Partition(*where): offset for where, offset in answer.items()}

    def at_time(self, partitions: Iterable[Partition], moment: datetime) -> dict[Partition, int]:
        """First offset from `moment` on; the end where there is none yet."""
        wanted = {TopicPartition(*where): int(moment.timestamp() * 1000) for where in partitions}
        found = self._consumer.offsets_for_times(wanted, timeout_ms=REQUEST_MS)
        known = {Partition(*where): answer.offset for where, answer in found.items() if answer and answer.offset >= 0}
        return self.ends(Partition(*where) for where in wanted) | known

    def committed(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        answers = {
            where: self._consumer.committed(TopicPartition(*where), timeout_ms=REQUEST_MS) for where in partitions
        }
        return {where: offset for where, offset in answers.items() if offset is not None}

    def commit(self, offsets: Offsets, wait: bool) -> None:
        wanted = {TopicPartition(*where): OffsetAndMetadata(offset, "", -1) for where, offset in offsets.items()}
        if wait:
            self._consumer.commit(wanted, timeout_ms=1500)
        else:
            self._consumer.commit_async(wanted, callback=self._committed)

    def _committed(self, offsets: Any, answer: Any) -> None:
        if isinstance(answer, Exception):
            log.warning(
                "offsets were not copied to group %s: %s; lag tools are behind", self._group, describe_error(answer)
            )
