"""Rejected records of topics, sent to dead-letter topics."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaError, MessageSizeTooLargeError, TopicAlreadyExistsError

from streams.background import in_background
from streams.dead_letter_format import dead_letter
from streams.kafka.connection import (
    LINGER_MS,
    NOTHING_LOST,
    REQUEST_MS,
    UNKNOWN_TOPIC,
    Connection,
    abandon,
    describe_error,
    longest_message,
)
from streams.record import Offsets, Rejected
from streams.source import DeadLetterDelayed, DeadLetterError, StreamError

log = logging.getLogger(__name__)

_RETRY_S = 5
"""Seconds before `put` tries again after a letter could not be sent; `flush` always tries. Chosen by hand: a try may
hold up the agent's loop for _PUT_S."""

_PUT_S = 0.05
"""Seconds after which `put` sends no further letter: records go on arriving while the cluster is slow."""

_PATIENCE_S = 2
"""Seconds that `put` waits for answers before it gives up because too much waits for one. Chosen by hand: a burst of
rejected records is no outage, and the agent's loop may stand still for this long."""

_BLOCK_MS = 500
"""Time that the client may hold up a `send` for the topic's metadata or room in its buffer; its default is a minute."""

_RECONNECT_MS = 2000
"""Longest pause between attempts to connect; the client's default of 30 s would be added to the end of every outage."""

_SHORTEST_LIMIT = 8192
"""Bytes below which a topic's limit is not halved: a letter without key, value and headers always fits into them."""


class KafkaDeadLetters:
    """Sends rejected records to the dead-letter topic of the topic they came from. Used from one thread.

    A letter waits to be sent, then for its acknowledgement; what fails waits to be sent again, in the same order. After
    a crash, or an outage longer than the client goes on trying, the same coordinates may come twice.
    """

    removed = 0

    def __init__(
        self,
        connection: Connection,
        topics: Sequence[str],
        name: str = "{topic}.dlq",
        create: bool = True,
        max_pending_bytes: int = 64 * 2**20,
    ) -> None:
        """`name`: the dead-letter topic's, with {topic} for the source's. `create`: whether to make it where there is
        none. `max_pending_bytes`: memory for the letters that are not acknowledged yet.

        Raises DeadLetterError when a dead-letter topic cannot be had.
        """
        self._connection = connection
        self._names = {topic: name.format(topic=topic) for topic in topics}
        self._max_pending = max_pending_bytes
        self._unsent: deque[tuple[Rejected, int]] = deque()
        self._pending: deque[tuple[Any, Rejected, int]] = deque()
        self._waiting_bytes = 0
        self._failure = ""
        self._retry_at = 0.0
        self._connecting: Future[KafkaProducer] | None = None
        try:
            self._limits = self._prepare_topics(create)
            self._producer: KafkaProducer | None = self._new_producer()
        except StreamError:
            raise
        except Exception as error:
            names = ", ".join(self._names.values())
            raise DeadLetterError(f"no dead-letter topic {names} on {connection}: {describe_error(error)}") from error

    def put(self, rejected: Rejected) -> None:
        """Send a record, without waiting for the answer. Raises DeadLetterError when too much waits for one."""
        self._look_at_answers()
        if self._waiting_bytes > self._max_pending:
            with contextlib.suppress(DeadLetterDelayed):
                self.flush(_PATIENCE_S)
        if self._waiting_bytes > self._max_pending:
            raise DeadLetterError(
                f"{self._waiting_bytes} bytes of dead letters wait for {self._connection} "
                f"({self._failure or 'no answer'}), at most {self._max_pending} may; stopping. {NOTHING_LOST}"
            )
        size = _memory_bytes(rejected)
        self._waiting_bytes += size
        # Always through the queue, so that letters keep their order.
        self._unsent.append((rejected, size))
        if time.monotonic() >= self._retry_at:
            self._send_all(time.monotonic() + _PUT_S)

    def flush(self, timeout_s: float) -> None:
        """Return when every letter is acknowledged. Raises DeadLetterDelayed when some are not after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        self._look_at_answers()
        while self._pending or self._unsent:
            sent = self._send_all(deadline)
            left = max(0.0, deadline - time.monotonic())
            if self._pending:
                with contextlib.suppress(KafkaError):  # `_look_at_answers` looks at the outcome
                    self._pending[0][0].get(left)
            elif not sent:
                time.sleep(min(left, 0.1))
            self._look_at_answers()
            if time.monotonic() >= deadline:
                break
        if self._pending or self._unsent:
            waiting = len(self._pending) + len(self._unsent)
            failure = self._failure or "no answer"
            raise DeadLetterDelayed(f"{waiting} dead letters wait for {self._connection} ({failure})")
        self._failure = ""

    def committed(self, offsets: Offsets) -> None:
        """Do nothing: the dead-letter topic's own retention decides what stays."""

    def close(self) -> None:
        """Let go of the producer. Letters that no `flush` followed may be lost."""
        if self._connecting is not None:
            self._connecting.add_done_callback(_abandon_late)
        if self._producer is not None:
            abandon(self._producer)

    def _send_all(self, deadline: float) -> bool:
        """Send what waits to be sent, until `deadline` has passed or one cannot be sent; False for the latter."""
        while self._unsent:
            producer = self._connected(deadline)
            if producer is None or not self._send(producer, *self._unsent[0]):
                self._retry_at = time.monotonic() + _RETRY_S
                return False
            self._unsent.popleft()
            if time.monotonic() >= deadline:
                break
        return True

    def _send(self, producer: KafkaProducer, rejected: Rejected, size: int) -> bool:
        topic = rejected.partition.topic
        letter = dead_letter(rejected, self._limits[topic])
        try:
            future = producer.send(self._names[topic], letter.value, letter.key, list(letter.headers))
        except KafkaError as error:
            self._failure = describe_error(error)
            return False
        self._pending.append((future, rejected, size))
        return True

    def _look_at_answers(self) -> None:
        """Forget the letters that are acknowledged; what failed waits to be sent again, shorter if it was too long."""
        # Only from the front: letters are acknowledged in order, and a later one can be sent again with the first.
        while self._pending and self._pending[0][0].is_done:
            future, rejected, size = self._pending[0]
            if future.exception is not None:
                self._failure = describe_error(future.exception)
                if isinstance(future.exception, MessageSizeTooLargeError):
                    topic = rejected.partition.topic
                    self._limits[topic] = max(_SHORTEST_LIMIT, self._limits[topic] // 2)
                self._drop_producer()
                return
            self._pending.popleft()
            self._waiting_bytes -= size

    def _drop_producer(self) -> None:
        """Give up the producer, and send what it has not delivered with another one, as soon as one is needed."""
        # An idempotent producer that gave up on a message (KafkaTimeoutError after `delivery_timeout_ms`) has a gap in
        # its sequence and may refuse all that follow. A new one is not made at once: that may take as long as the
        # cluster is away.
        failed = []
        for future, rejected, size in self._pending:
            if future.is_done and future.succeeded():
                self._waiting_bytes -= size
            else:
                failed.append((rejected, size))
        self._unsent.extendleft(reversed(failed))
        self._pending.clear()
        if self._producer is not None:
            abandon(self._producer)
        self._producer = None

    def _connected(self, deadline: float) -> KafkaProducer | None:
        """Give a producer, made in a thread of its own where there is none; None when it is not there by `deadline`."""
        if self._producer is not None:
            return self._producer
        # In the background, as kafka-python blocks until it has found a broker.
        if self._connecting is None:
            self._connecting = in_background(self._new_producer, "dead-letters")
        try:
            error = self._connecting.exception(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            return None
        if error is None:
            self._producer = self._connecting.result()
        else:
            self._failure = describe_error(error)
        self._connecting = None
        return self._producer

    def _new_producer(self) -> KafkaProducer:
        return KafkaProducer(
            **self._connection.producer_settings(),
            max_block_ms=_BLOCK_MS,
            reconnect_backoff_max_ms=_RECONNECT_MS,
            linger_ms=LINGER_MS,
        )

    def _prepare_topics(self, create: bool) -> dict[str, int]:
        """See to it that the dead-letter topics exist; returns the longest message each takes, by source topic."""
        admin = KafkaAdminClient(**self._connection.settings(), request_timeout_ms=REQUEST_MS)
        try:
            names = sorted(set(self._names.values()))
            missing = [topic["name"] for topic in admin.describe_topics(names) if topic["error_code"] == UNKNOWN_TOPIC]
            if missing and not create:
                raise DeadLetterError(
                    f"{self._connection} has no dead-letter topic {', '.join(missing)}; create it, or set "
                    "source.kafka.dead_letter_create = true"
                )
            for name in missing:
                log.info("creating dead-letter topic %s", name)
                # `delete`, as compaction would keep only the newest letter of a key; one partition, like Kafka Connect.
                with contextlib.suppress(TopicAlreadyExistsError):  # somebody was faster
                    admin.create_topics({name: {"num_partitions": 1, "configs": {"cleanup.policy": "delete"}}})
            if missing:
                admin.wait_for_topics(missing)
            return {topic: longest_message(admin, name) for topic, name in self._names.items()}
        finally:
            admin.close()


def _abandon_late(connecting: Future[KafkaProducer]) -> None:
    """End a producer that nobody waits for any more."""
    if connecting.exception() is None:
        abandon(connecting.result())


def _memory_bytes(rejected: Rejected) -> int:
    """Estimate the memory a letter takes while it waits, in bytes; 1 KiB for the headers that are added to it."""
    return 1024 + len(rejected.detail) + (rejected.raw.memory_bytes if rejected.raw else 0)
