"""Messages of a consumer group in, a reply to each out, and the group's offsets: all in one transaction of Kafka.

Whoever reads the replies with isolation.level=read_committed sees one for every message, however often a process of the
group is killed, and the partitions move between those that live.

kafka-python 3.0 has what that takes (idempotent sends, offsets in the transaction, fencing by the group's generation,
offsets that wait for open transactions), with gaps that are closed here:

- A batch of messages that could not be delivered in time does not fail its transaction, which would be committed
  without it: the outcome of every send is looked at first.
- The offsets an aborted transaction had are sent again with the next one: after any failure producer and consumer are
  replaced, and begin at what the group has.
- A membership lost in the background empties `group_metadata`, and brokers let everything pass then: it is taken when
  the messages are.
- A member that was thrown out and joins again goes on where it was in the partitions it gets back, whatever others did
  in between: after every assignment all positions are those of the group.
- Where the group has no offset, "newest" is another place at every connection: the first becomes the group's offset
  before anything is taken.
- Waiting for a commit has no end while the brokers are away: here it has.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from kafka import ConsumerRebalanceListener, KafkaConsumer, KafkaProducer, OffsetAndMetadata, TopicPartition
from kafka.admin import KafkaAdminClient
from kafka.errors import (
    CommitFailedError,
    KafkaTimeoutError,
    RebalanceInProgressError,
    TopicAlreadyExistsError,
)

from streams.background import in_background
from streams.formats import Claim, Codec
from streams.kafka.connection import (
    METADATA_MS,
    PARTITION_BYTES,
    UNKNOWN_TOPIC,
    Connection,
    abandon,
    connecting,
    describe_error,
    longest_message,
)
from streams.kafka.record_batches import Unreadable, guard, rejections
from streams.kafka.topics import named
from streams.kafka.transport import take_large_pieces
from streams.record import Item, Partition, Raw
from streams.source import NotThere, StreamError

log = logging.getLogger(__name__)

_REQUEST_MS = 10_000
"""Time for an answer, and for room to send; the client's default is 30 s. It must be shorter than a transaction."""

_SESSION_MS = 10_000
"""Time without a heartbeat after which the group goes on without a member; brokers allow 6 s to 30 minutes by default.
With the client's default, 45 s, the partitions of a killed process would stand still for that time."""

_TRANSACTION_MS = 15_000
"""Time after which the broker gives up a transaction, and the producer a message. A killed process holds up readers of
its replies, and whoever gets its partitions, for this time and a bit."""

_COMMIT_S = 20
"""Seconds that a commit is waited for: longer than the transaction it belongs to can last. Waiting without end, as
kafka-python does, would outlast every outage unseen."""

_COMMITTED_MS = 1_000
"""Time that one look at the group's offsets may take. A look that fails is tried again at the next `take`, which must
not take much longer than it was told."""

_CLOSE_MS = 2_000
"""Time to leave the group in; without it the group waits for _SESSION_MS."""

_RETRY_MS = 20
"""Time that kafka-python sleeps before it sends a request of a transaction again. Brokers refuse the first one while
they still finish the transaction before; with the client's default, 100 ms, a quick row of them would mostly sleep."""

_BATCH_BYTES = 2**17
"""Bytes of a batch of replies: all of a transaction as a rule, where the client's default, 16 KiB, makes several."""


class TopicMissing(NotThere):
    """Topics that are needed are not there."""

    def __init__(self, connection: Connection, topics: Sequence[str]) -> None:
        super().__init__(f"{connection} has no topic {', '.join(topics)}; create it")
        self.topics = list(topics)


class Arrival(NamedTuple):
    """A message that came, and what it stands for."""

    item: Item | Claim
    timestamp_ms: int | None
    """None where the message has no time."""
    raw: Raw | None
    """None where its batch cannot be read; the item is Rejected then."""


class Reply(NamedTuple):
    """A message to be sent."""

    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]]


class Exchange:
    """One member of a consumer group, and the replies it gives. Used from one thread, but for `joined`.

    Whatever fails is raised as StreamError and has changed nothing: the next `take` connects anew and begins where the
    group is.
    """

    def __init__(
        self,
        connection: Connection,
        topics: Sequence[str],
        output: str,
        codec: Codec,
        *,
        group: str,
        start: Literal["earliest", "latest"] = "earliest",
        max_records: int = 256,
        fetch_bytes: int = 16 * 2**20,
        create: bool = True,
    ) -> None:
        """`start`: where the group begins in a partition it has no offset of. `max_records`: messages in a transaction.
        `fetch_bytes`: what is fetched and not yet taken, about. `create`: whether to make `output` where it is missing.

        Raises TopicMissing, NotThere when no cluster answers, and StreamError when a topic may not be used.
        """
        self._connection = connection
        self._topics = tuple(topics)
        self._output = output
        self._codec = codec
        self._group = group
        self._start = start
        self._max_records = max_records
        self._fetch_bytes = fetch_bytes
        # Of this process alone. The group's generation fences a member that was thrown out, not a name shared by all.
        self._transactional_id = f"{group}-{uuid.uuid4().hex}"
        self._consumer: KafkaConsumer | None = None
        self._producer: KafkaProducer | None = None
        self._member: Any = None
        self._assigned = threading.Event()
        self._positions: dict[Partition, int] = {}
        self._taken: Sequence[Arrival] = ()
        self._fetched_again: set[tuple[Partition, int]] = set()
        self.max_reply_bytes = 0
        """Bytes that the output topic takes as one message; 0 before the first messages, read anew after a failure."""
        try:
            with self._admin() as admin:
                self._check_topics(admin, create)
        except StreamError:
            raise
        except Exception as error:
            # A broker that has just started answers that it is not ready yet, which the client calls retriable.
            failure = NotThere if getattr(error, "retriable", False) else StreamError
            raise failure(
                f"cannot use {', '.join([*topics, output])} on {connection}: {describe_error(error)}"
            ) from error

    @property
    def joined(self) -> bool:
        """Whether the group has this member; it may have no partitions nevertheless. Any thread may ask."""
        member = self._member  # once, as it may be gone with the next step
        return member is not None and member.generation_id >= 0

    def take(self, timeout_s: float) -> Sequence[Arrival]:
        """Take the next messages to reply to, in the order of their partitions; none when none came within `timeout_s`.

        Those taken before and not passed by `commit` come again. Raises StreamError.
        """
        try:
            if self._consumer is None:
                self._connect()
            assert self._consumer is not None
            for arrival in reversed(self._taken):
                self._consumer.seek(TopicPartition(*arrival.item.partition), arrival.item.offset)
            self._taken = ()
            polled = self._consumer.poll(timeout_ms=int(timeout_s * 1000), max_records=self._max_records)
            # Here, not when the commit needs it: a membership lost meanwhile would be empty by then, and fence nothing.
            self._member = self._consumer.group_metadata()
            if self._assigned.is_set() or not self.joined:
                self._realign(polled)
                return ()
            self._taken = [
                arrival
                for topic_partition, messages in polled.items()
                for arrival in self._arrivals(topic_partition, messages)
            ]
            return self._taken
        except Exception as error:
            raise self._disconnected("nothing can be read", error) from error

    def commit(self, arrivals: Sequence[Arrival], replies: Sequence[Reply]) -> None:
        """Send `replies` and pass `arrivals`, which are the first of what was taken.

        Raises StreamError: readers of committed replies see none of them then, or all, and the group's offsets agree.
        """
        if self._consumer is None or self._producer is None:
            raise StreamError("what was taken belongs to a connection that is gone; it is taken again")
        next_offsets = {arrival.item.partition: arrival.item.offset + 1 for arrival in arrivals}
        producer, member = self._producer, self._member
        try:
            transaction = in_background(
                lambda: _transact(producer, self._output, replies, next_offsets, member), "transaction"
            )
            transaction.result(_COMMIT_S)
        except Exception as error:
            raise self._disconnected(f"{len(arrivals)} messages were not answered", error) from error
        self._taken = self._taken[len(arrivals) :]
        self._positions |= next_offsets
        self._fetched_again = {
            (partition, offset) for partition, offset in self._fetched_again if offset >= next_offsets.get(partition, 0)
        }

    def lag(self) -> Mapping[Partition, int]:
        """Count the messages that wait for a reply, by partition; those of which nothing is known yet are left out."""
        lags: dict[Partition, int] = {}
        if self._consumer is not None:
            for topic_partition in self._consumer.assignment():
                partition = Partition(*topic_partition)
                end, position = self._consumer.highwater(topic_partition), self._positions.get(partition)
                if end is not None and position is not None:
                    lags[partition] = max(0, end - position)
        return lags

    def close(self) -> None:
        """Leave the group, so that others get the partitions at once."""
        consumer, self._consumer = self._consumer, None
        producer, self._producer = self._producer, None
        self._member = None
        self._taken = ()
        self._positions = {}
        if producer is not None:
            abandon(producer)
        if consumer is not None:
            try:
                consumer.close(autocommit=False, timeout_ms=_CLOSE_MS)
            except Exception as error:
                log.debug("closing the Kafka client: %s", describe_error(error))

    def _connect(self) -> None:
        self._assigned.clear()
        take_large_pieces()
        with self._admin() as admin:
            self.max_reply_bytes = longest_message(admin, self._output)
        with connecting(self._connection):
            self._producer = KafkaProducer(
                **self._connection.producer_settings(),
                transactional_id=self._transactional_id,
                transaction_timeout_ms=_TRANSACTION_MS,
                request_timeout_ms=_REQUEST_MS,
                delivery_timeout_ms=_TRANSACTION_MS,
                max_block_ms=_REQUEST_MS,
                retry_backoff_ms=_RETRY_MS,
                batch_size=_BATCH_BYTES,
                allow_auto_create_topics=False,
            )
            # What a producer before this one left open is settled here.
            self._producer.init_transactions()
            self._consumer = KafkaConsumer(
                **self._connection.settings(),
                group_id=self._group,
                enable_auto_commit=False,
                auto_offset_reset="earliest",  # also where retention deleted the next messages; `_realign` knows latest
                isolation_level="read_committed",
                allow_auto_create_topics=False,
                session_timeout_ms=_SESSION_MS,
                fetch_max_bytes=self._fetch_bytes,
                max_partition_fetch_bytes=min(self._fetch_bytes, PARTITION_BYTES),
                metadata_max_age_ms=METADATA_MS,
                metrics_enabled=False,
            )
        guard(self._consumer)
        self._consumer.subscribe(self._topics, listener=_Listener(self._assigned))

    def _disconnected(self, what: str, error: Exception) -> StreamError:
        """Give up both clients; returns the error that says so."""
        self.close()
        why = describe_error(error) if str(error) else "no answer in time"
        return StreamError(f"{what} ({self._connection}: {why}); nothing is lost, it is taken again")

    def _realign(self, polled: Mapping[TopicPartition, Sequence[Any]]) -> None:
        """Put every position where the group is, and what was polled back: it may be what others answered already."""
        assert self._consumer is not None
        for topic_partition, messages in polled.items():
            self._consumer.seek(topic_partition, messages[0].offset)
        if not self.joined:
            return
        self._assigned.clear()
        # An answer that came too late for the call that asked is kept there for the next one, however old it is then.
        self._consumer._coordinator._offset_fetch_futures.clear()
        self._positions = {}
        assigned = sorted(self._consumer.assignment())
        try:
            offsets = {
                topic_partition: self._consumer.committed(topic_partition, timeout_ms=_COMMITTED_MS)
                for topic_partition in assigned
            }
            new = [topic_partition for topic_partition, offset in offsets.items() if offset is None]
            if new and self._start == "latest":
                ends = self._consumer.end_offsets(new, timeout_ms=_COMMITTED_MS)
                begins = {topic_partition: OffsetAndMetadata(end, "", -1) for topic_partition, end in ends.items()}
                self._consumer.commit(begins, timeout_ms=_COMMITTED_MS)
                offsets |= ends
        except (KafkaTimeoutError, CommitFailedError, RebalanceInProgressError):
            # The transaction of someone who was killed is still open, or the group goes through another change.
            self._assigned.set()
            return
        for topic_partition, offset in offsets.items():
            if offset is not None:
                self._consumer.seek(topic_partition, offset)
                self._positions[Partition(*topic_partition)] = offset
        given = named(Partition(*topic_partition) for topic_partition in assigned) or "no partition"
        log.info("group %s gives this process %s", self._group, given)

    def _arrivals(self, topic_partition: TopicPartition, messages: Sequence[Any]) -> Iterable[Arrival]:
        partition = Partition(*topic_partition)
        self._positions.setdefault(partition, messages[0].offset)
        for message in messages:
            if isinstance(message, Unreadable):
                # Once it may have been the network. The error gives up the clients, and the batch is fetched again.
                if (partition, message.offset) not in self._fetched_again:
                    self._fetched_again.add((partition, message.offset))
                    raise message.error
                yield from (Arrival(rejected, None, None) for rejected in rejections(partition, message))
                continue
            raw, timestamp_ms = message.raw, message.timestamp_ms
            item = self._codec.decode(partition, message.offset, raw, None)
            yield Arrival(item, timestamp_ms if timestamp_ms >= 0 else None, raw)

    @contextlib.contextmanager
    def _admin(self) -> Iterator[KafkaAdminClient]:
        with connecting(self._connection):
            admin = KafkaAdminClient(**self._connection.settings(), request_timeout_ms=_REQUEST_MS)
        try:
            yield admin
        finally:
            admin.close()

    def _check_topics(self, admin: KafkaAdminClient, create: bool) -> None:
        """See to it that the topics are there and may be used. Raises TopicMissing, StreamError."""
        found = {topic["name"]: topic for topic in admin.describe_topics([*self._topics, self._output])}
        missing = [name for name, topic in found.items() if topic["error_code"] == UNKNOWN_TOPIC]
        needed = [name for name in missing if not (create and name == self._output)]
        if needed:
            raise TopicMissing(self._connection, needed)
        if missing:
            # As many as the input has: replies keep their message's key, so they keep its order too.
            partitions = max(len(found[topic]["partitions"]) for topic in self._topics)
            log.info("creating topic %s with %d partition(s)", self._output, partitions)
            _create_topic(admin, self._output, partitions)
        for name, operation in [*((topic, "READ") for topic in self._topics), (self._output, "WRITE")]:
            allowed = found[name]["authorized_operations"]
            if found[name]["error_code"] not in (0, UNKNOWN_TOPIC) or (allowed and operation not in allowed):
                raise StreamError(f"{self._connection} does not let us {operation} topic {name}; allow it there")


class _Listener(ConsumerRebalanceListener):
    """Says that partitions were assigned; called in the client's thread."""

    def __init__(self, assigned: threading.Event) -> None:
        self._assigned = assigned

    def on_partitions_revoked(self, revoked: Any) -> None: ...

    def on_partitions_assigned(self, assigned: Any) -> None:
        self._assigned.set()


def _transact(
    producer: KafkaProducer, output: str, replies: Sequence[Reply], next_offsets: Mapping[Partition, int], member: Any
) -> None:
    producer.begin_transaction()
    sent = [producer.send(output, reply.value, reply.key, reply.headers) for reply in replies]
    producer.flush()
    for future in sent:
        future.get(0)  # raises for a message that was not delivered; the commit would not
    offsets = {
        TopicPartition(*partition): OffsetAndMetadata(offset, "", -1) for partition, offset in next_offsets.items()
    }
    producer.send_offsets_to_transaction(offsets, member)
    producer.commit_transaction()


def _create_topic(admin: KafkaAdminClient, topic: str, partitions: int) -> None:
    try:
        admin.create_topics({topic: {"num_partitions": partitions}}, wait_for_metadata=True)
    except TopicAlreadyExistsError:
        admin.wait_for_topics([topic])
