"""Plays a stream of records and marks into a topic, at a given rate, each message acknowledged by all replicas."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaError, KafkaTimeoutError, TopicAlreadyExistsError

from streams.formats import encode_control, encode_image
from streams.kafka.connection import CONNECT_S, LINGER_MS, Connection, connecting
from streams.record import Item, Record, Rejected
from streams.source import NotThere, StreamError

_IN_FLIGHT = 1000
"""Messages sent and not acknowledged yet at most: what is read of the archive waits in memory. Chosen by hand; fewer
would leave a fast cluster waiting."""

_PROGRESS_S = 0.1
"""Seconds between two calls of `on_progress` at least: for a bar that moves, and no call for every record."""

_BATCH_BYTES = 2**17
"""Bytes of a batch. The client's default, 16 KiB, holds a single small image, and every batch is stored and
acknowledged by itself."""


@dataclass
class Played:
    """What has been acknowledged until now, and what was left out."""

    records: int = 0
    bytes: int = 0
    """Bytes of the images."""
    boundaries: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Images that cannot be used and were not sent, by reason."""


def create_topic(connection: Connection, topic: str, partitions: int) -> bool:
    """Create `topic`; False when it is there already.

    Raises NotThere when no cluster answers, and StreamError.
    """
    with connecting(connection):
        admin = KafkaAdminClient(**connection.settings())
    try:
        admin.create_topics(
            {topic: {"num_partitions": partitions, "replication_factor": -1}},  # -1: the cluster's default
            wait_for_metadata=True,
        )
    except TopicAlreadyExistsError:
        return False
    except KafkaError as error:
        failure = NotThere if error.retriable else StreamError  # a broker that has just started may not be ready yet
        raise failure(f"topic {topic} could not be created on {connection}: {error}") from error
    finally:
        admin.close()
    return True


def play(
    items: Iterable[Item],
    connection: Connection,
    topic: str,
    *,
    rate: float = 0,
    on_progress: Callable[[Played], None] = lambda played: None,
    stop: threading.Event | None = None,
    compression: str | None = None,
) -> Played:
    """Send every Record and Control of `items` to `topic` and wait until they are acknowledged; count the Rejected.

    The key of a record is its class name and number, so that records spread over the partitions; timestamps rise
    through a mark, so that readers of several partitions see it at its place. `rate`: records a second; 0 is as fast as
    they are taken. `on_progress` is called with what was acknowledged until now. Setting `stop` ends it after the
    records sent. Raises NotThere before it takes any of `items`, and StreamError; what was acknowledged stays there.
    """
    played = Played()
    producer = _producer(connection, compression)
    stop = stop or threading.Event()
    failures: list[BaseException] = []
    slots = threading.Semaphore(_IN_FLIGHT)

    # Both are called in the client's thread.
    def acknowledged(_: object, size: int = 0, boundary: bool = False) -> None:
        played.records += not boundary
        played.boundaries += boundary
        played.bytes += size
        slots.release()

    def failed(error: BaseException) -> None:
        failures.append(error)
        slots.release()

    try:
        try:
            producer.partitions_for(topic)  # waits for the topic's metadata, once, instead of failing at every `send`
        except KafkaTimeoutError:
            raise NotThere(f"{connection} has no topic {topic}; create it first") from None
        began, shown = time.time(), 0.0
        sent, last_ms = 0, 0
        for item in items:
            if stop.is_set() or failures:
                break
            now = time.time()
            if now - shown > _PROGRESS_S:
                on_progress(played)
                shown = now
            if isinstance(item, Rejected):
                played.skipped[item.reason] += 1
                continue
            last_ms = max(last_ms, int(now * 1000))  # clocks are set back at times; the joint order must not be
            slots.acquire()
            if isinstance(item, Record):
                value, headers = encode_image(item.label, item.image)
                key = f"{item.label}/{item.offset}".encode()
                size = len(item.image)
                future = producer.send(topic, value, key, headers, timestamp_ms=last_ms)
                future.add_callback(acknowledged, size=size)
                sent += 1
                if rate and (ahead := sent / rate - (time.time() - began)) > 0:
                    stop.wait(ahead)
            else:
                _, marks = encode_control(item.kind)
                # Alone with its time: later than all records before it and earlier than all after it.
                future = producer.send(topic, None, b"mark", marks, timestamp_ms=last_ms + 1)
                future.add_callback(acknowledged, boundary=True)
                last_ms += 2
            future.add_errback(failed)
        producer.flush()
        if failures:
            raise failures[0]
    except KafkaError as error:
        raise StreamError(
            f"playing into {topic} on {connection} stopped after {played.records} acknowledged records: {error}"
        ) from error
    finally:
        producer.close()  # waits for what was sent, so that `played` is final
    on_progress(played)
    return played


def _producer(connection: Connection, compression: str | None) -> KafkaProducer:
    with connecting(connection):
        return KafkaProducer(
            **connection.producer_settings(),
            linger_ms=LINGER_MS,
            batch_size=_BATCH_BYTES,
            max_block_ms=CONNECT_S * 1000,
            compression_type=compression,
            allow_auto_create_topics=False,  # its partitions would be the cluster's default, not what was asked for
        )
