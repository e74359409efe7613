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

One transaction is under way while the next messages are taken. What was taken before the group moved its partitions is
void: it is taken again, by whoever has them then. A transaction that would still pass some of it belongs to an older
generation of the group, and the brokers refuse it; one that has reached them is waited for, before the move and again
where the positions are read.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
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

_REVOKED_S = 5
"""Seconds that a rebalance waits for the transaction under way, which is refused once the group has gone on. The client
sends no heartbeats meanwhile: half of _SESSION_MS."""

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


class Moved(StreamError):
    """The group moves its partitions: what was taken and is not in a transaction yet is taken again."""


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


class _Transaction(NamedTuple):
    """A transaction under way."""

    outcome: Future[None]
    messages: int
    """How many it passes."""
    next_offsets: Mapping[Partition, int]
    due: float
    """When it is given up, by time.monotonic()."""


class Exchange:
    """One member of a consumer group, and the replies it gives. Used from one thread, but for `joined`.

    `take` gives what follows the messages taken before, and `commit` begins to answer the first of those that it has
    not answered yet, while the next are taken. Whatever fails is raised as StreamError, from there or from the next
    call, and has changed nothing: the next `take` connects anew and begins where the group is.
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
        self._revoked, self._assigned = threading.Event(), threading.Event()
        self._positions: dict[Partition, int] = {}
        self._taken: list[Arrival] = []
        """What was taken and is in no transaction yet, in its order."""
        self._under_way: _Transaction | None = None
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

        Raises Moved when those taken before and not committed are void, and StreamError.
        """
        with self._unless_it_fails("nothing can be read"):
            if self._consumer is None:
                self._connect()
            assert self._consumer is not None
            polled = self._consumer.poll(timeout_ms=int(timeout_s * 1000), max_records=self._max_records)
            # Here, not when the commit needs it: a membership lost meanwhile would be empty by then, and fence nothing.
            self._member = self._consumer.group_metadata()
            if not (self._revoked.is_set() or self._assigned.is_set()) and self.joined:
                arrivals = [
                    arrival
                    for topic_partition, messages in polled.items()
                    for arrival in self._arrivals(topic_partition, messages)
                ]
                self._taken += arrivals
                return arrivals
        void = len(self._taken)
        self.settle()
        with self._unless_it_fails("nothing can be read"):
            # First what came last: what was taken before it lies further back.
            for topic_partition, messages in polled.items():
                self._consumer.seek(topic_partition, messages[0].offset)
            self._put_back()
            self._realign()
        if void:
            raise Moved(f"the group moves its partitions; {void} messages are taken again")
        return ()

    def take_again(self) -> None:
        """Have `take` begin anew with the first message that no transaction has passed. Raises StreamError when the
        transaction under way has failed."""
        self.settle()
        with self._unless_it_fails("nothing can be read"):
            self._put_back()

    def commit(self, arrivals: Sequence[Arrival], replies: Sequence[Reply]) -> Future[None]:
        """Begin to send `replies` and to pass `arrivals`, the first of what was taken; gives what becomes of it. The
        transaction before is waited for.

        Readers of committed replies see all of them once it has ended well, and the group's offsets agree; else none.
        Raises StreamError when the transaction before has failed.
        """
        self.settle()
        producer, member = self._producer, self._member
        if producer is None or self._taken[: len(arrivals)] != list(arrivals):
            raise StreamError("what was taken belongs to a connection that is gone; it is taken again")
        next_offsets = {arrival.item.partition: arrival.item.offset + 1 for arrival in arrivals}
        outcome = in_background(lambda: _transact(producer, self._output, replies, next_offsets, member), "transaction")
        self._under_way = _Transaction(outcome, len(arrivals), next_offsets, time.monotonic() + _COMMIT_S)
        del self._taken[: len(arrivals)]
        return outcome

    def settle(self) -> None:
        """Wait for the transaction under way, if there is one. Raises StreamError when it has failed."""
        transaction, self._under_way = self._under_way, None
        if transaction is None:
            return
        with self._unless_it_fails(f"{transaction.messages} messages were not answered"):
            transaction.outcome.result(max(0, transaction.due - time.monotonic()))
        passed = transaction.next_offsets
        self._positions |= passed
        self._fetched_again = {
            (partition, offset) for partition, offset in self._fetched_again if offset >= passed.get(partition, 0)
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
        """Leave the group, so that others get the partitions at once. A transaction under way is waited for."""
        if self._under_way is not None:
            wait([self._under_way.outcome], max(0, self._under_way.due - time.monotonic()))
            self._under_way = None
        consumer, self._consumer = self._consumer, None
        producer, self._producer = self._producer, None
        self._member = None
        self._taken = []
        self._positions = {}
        if producer is not None:
            abandon(producer)
        if consumer is not None:
            try:
                consumer.close(autocommit=False, timeout_ms=_CLOSE_MS)
            except Exception as error:
                log.debug("closing the Kafka client: %s", describe_error(error))

    def _connect(self) -> None:
        self._revoked.clear()
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
        self._consumer.subscribe(self._topics, listener=_Listener(self._on_revoked, self._on_assigned))

    def _on_revoked(self) -> None:
        """Void what is taken, once what is under way has passed what it passes; called in a thread of the client."""
        self._revoked.set()
        if (transaction := self._under_way) is not None:
            wait([transaction.outcome], _REVOKED_S)

    def _on_assigned(self) -> None:
        self._assigned.set()
        self._revoked.clear()

    @contextlib.contextmanager
    def _unless_it_fails(self, what: str) -> Iterator[None]:
        """Make of a failure in the block the StreamError that says `what`, with both clients given up."""
        try:
            yield
        except Exception as error:
            raise self._disconnected(what, error) from error

    def _disconnected(self, what: str, error: Exception) -> StreamError:
        """Give up both clients; returns the error that says so."""
        self.close()
        why = describe_error(error) if str(error) else "no answer in time"
        return StreamError(f"{what} ({self._connection}: {why}); nothing is lost, it is taken again")

    def _put_back(self) -> None:
        """Have what was taken polled again, as far as its partitions are held still: those that are kept in a rebalance
        keep their positions, and the group may have no offset for them yet."""
        if self._consumer is not None:
            held = self._consumer.assignment()
            for arrival in reversed(self._taken):
                if (where := TopicPartition(*arrival.item.partition)) in held:
                    self._consumer.seek(where, arrival.item.offset)
        self._taken = []

    def _realign(self) -> None:
        """Put every position where the group is: what was polled may be what others answered already."""
        assert self._consumer is not None
        if self._revoked.is_set() or not self.joined:
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
    """Says that partitions are taken away and assigned; called in a thread of the client, while `poll` waits for it."""

    def __init__(self, on_revoked: Callable[[], None], on_assigned: Callable[[], None]) -> None:
        self._on_revoked, self._on_assigned = on_revoked, on_assigned

    def on_partitions_revoked(self, revoked: Any) -> None:
        self._on_revoked()

    def on_partitions_assigned(self, assigned: Any) -> None:
        self._on_assigned()


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
