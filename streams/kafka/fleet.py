"""The topic where the sites of a fleet meet: chunks of blobs out and in; what they are says streams/blobs.py."""

from __future__ import annotations

import contextlib
import logging
import zlib
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kafka import KafkaProducer
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
from kafka.errors import KafkaError, TopicAlreadyExistsError

from streams.blobs import Chunk
from streams.kafka.client import Client
from streams.kafka.connection import (
    LINGER_MS,
    REQUEST_MS,
    UNKNOWN_TOPIC,
    Connection,
    abandon,
    connecting,
    longest_message,
)
from streams.kafka.record_batches import Unreadable
from streams.record import Offsets, Partition, Raw
from streams.source import StreamError

log = logging.getLogger(__name__)

_LARGEST_CHUNK = 2**20
"""Bytes of a chunk at most, also where the topic takes longer messages: chosen by hand. A state of 56 MB is some sixty
messages then, and a lost one of them is soon sent again; larger ones only take more memory on both sides."""

_OVERHEAD = 1024
"""Bytes of a message that its chunk does not get: key and header have some 400."""

_FETCH_BYTES = 16 * 2**20
"""Bytes that a fetch may bring, about; as source.kafka.fetch_bytes has it."""

_IN_FLIGHT = 4
"""Chunks on their way at once: chosen by hand, enough for the next one to be ready when one is acknowledged. All are in
memory."""

_SEND_S = 30
"""Seconds that the acknowledgement of a chunk is waited for: as long as the client goes on trying by itself. After it
the whole state is sent again."""

_BLOCK_MS = 10_000
"""Time that the client may hold up a `send` for metadata or room. It is in a thread where nothing else waits."""


@dataclass(frozen=True)
class Described:
    """It is what a cluster says of the topic."""

    partitions: int
    policy: str
    """Its cleanup.policy; empty where we may not ask."""
    chunk_bytes: int
    """Bytes of a state that a message takes: not above 0 where key and header alone are too long for it."""
    messages: int
    """Offsets from its beginning to its end; compaction has taken some of the messages."""


def describe(connection: Connection, topic: str) -> Described | None:
    """Look at the topic and change nothing; None where it does not exist. Raises StreamError, KafkaError."""
    with connecting(connection):
        admin = KafkaAdminClient(**connection.settings(), request_timeout_ms=REQUEST_MS)
        try:
            [described] = admin.describe_topics([topic])
            if described["error_code"] == UNKNOWN_TOPIC:
                return None
            if described["error_code"]:
                raise StreamError(
                    f"{connection} does not describe topic {topic} (error {described['error_code']}); is reading it "
                    "allowed?"
                )
            policy, chunk_bytes = _policy(admin, topic), _chunk_bytes(admin, topic)
        finally:
            admin.close()
        client = Client(connection, "", _FETCH_BYTES)
    with contextlib.closing(client):
        partitions = [Partition(topic, one["partition_index"]) for one in described["partitions"]]
        first, ends = client.beginnings(partitions), client.ends(partitions)
    return Described(len(partitions), policy, chunk_bytes, sum(ends[where] - first[where] for where in partitions))


class FleetTopic:
    """It reads the topic, and writes the chunks of one site. Used from one thread; every call is bounded in time.

    Every method raises KafkaError or StreamError when the cluster does not do as asked; then this is closed, and
    another one made.
    """

    def __init__(self, connection: Connection, topic: str, positions: Offsets) -> None:
        """Connect, and make the topic where it does not exist. Reading begins at `positions` where they are still
        there, and elsewhere at the topic's beginning."""
        self._topic = topic
        self._producer: KafkaProducer | None = None
        self._connection = connection
        with connecting(connection):
            admin = KafkaAdminClient(**connection.settings(), request_timeout_ms=REQUEST_MS)
            try:
                _prepare(admin, topic)
                self.chunk_bytes = _chunk_bytes(admin, topic)
            finally:
                admin.close()
            self._client = Client(connection, "", _FETCH_BYTES)
        try:
            [described] = self._client.describe([topic])
            partitions = [Partition(topic, one["partition_index"]) for one in described["partitions"]]
            self._partitions = len(partitions)
            self._ends = self._client.ends(partitions)
            first = self._client.beginnings(partitions)
            there = {
                where: offset
                for where, offset in positions.items()
                if where in first and first[where] <= offset <= self._ends[where]
            }
            self.anew = there.keys() != first.keys()
            """Whether the whole topic is read, from its beginning."""
            self._client.assign(first if self.anew else there, {})
        except BaseException:
            self._client.close()
            raise

    def read(self, timeout_s: float) -> list[Raw]:
        """Give the messages that came, perhaps none; what cannot be read is passed with a warning."""
        found: list[Raw] = []
        for where, messages in self._client.poll(timeout_s).items():
            for message in messages:
                if isinstance(message, Unreadable):
                    log.warning("%s/%d:%d cannot be read: %s", *where, message.offset, message.error)
                    self._client.seek(where, message.next_offset)
                else:
                    found.append(message.raw)
        return found

    @property
    def positions(self) -> dict[Partition, int]:
        """Where reading goes on."""
        return {where: offset for where, (offset, _) in self._client.reached().items()}

    @property
    def caught_up(self) -> bool:
        """Whether all is read that there was when this was made."""
        positions = self.positions
        return all(positions.get(where, -1) >= end for where, end in self._ends.items())

    def send(self, site: str, chunks: Iterable[Chunk]) -> None:
        """Write chunks of a site, in order; when it returns, all are acknowledged."""
        if self._producer is None:
            with connecting(self._connection):
                self._producer = KafkaProducer(
                    **self._connection.producer_settings(), max_block_ms=_BLOCK_MS, linger_ms=LINGER_MS
                )
        # All of a site in one partition, and so in order: the keys alone would scatter its chunks.
        partition = zlib.crc32(site.encode()) % self._partitions
        waiting: deque[Any] = deque()
        for chunk in chunks:
            waiting.append(
                self._producer.send(self._topic, chunk.value, chunk.key, list(chunk.headers), partition=partition)
            )
            if len(waiting) >= _IN_FLIGHT:
                waiting.popleft().get(_SEND_S)
        while waiting:
            waiting.popleft().get(_SEND_S)

    def close(self) -> None:
        """Close the connections; what is not acknowledged is lost."""
        if self._producer is not None:
            abandon(self._producer)
        self._client.close()


def _prepare(admin: KafkaAdminClient, topic: str) -> None:
    """See to it that the topic exists, and say so where it may lose what is in it."""
    [described] = admin.describe_topics([topic])
    if described["error_code"] == UNKNOWN_TOPIC:
        log.info("creating fleet topic %s", topic)
        with contextlib.suppress(TopicAlreadyExistsError):  # another site was faster
            admin.create_topics({topic: {"num_partitions": 1, "configs": {"cleanup.policy": "compact"}}})
        admin.wait_for_topics([topic])
        return
    policy = _policy(admin, topic)
    if "delete" in policy:
        log.warning(
            "fleet topic %s has cleanup.policy=%s: it deletes the states of sites that learn nothing for its retention "
            "time; set it to compact",
            topic, policy,
        )  # fmt: skip


def _chunk_bytes(admin: KafkaAdminClient, topic: str) -> int:
    return min(_LARGEST_CHUNK, longest_message(admin, topic)) - _OVERHEAD


def _policy(admin: KafkaAdminClient, topic: str) -> str:
    """Ask for cleanup.policy; empty where we may not."""
    wanted = ConfigResource(ConfigResourceType.TOPIC, topic, {"cleanup.policy": None})
    try:
        found: Mapping[str, Any] = admin.describe_configs([wanted], config_filter="all")["topic"][topic]
        return str(found["cleanup.policy"]["value"])
    except (KafkaError, KeyError, TypeError):
        return ""
