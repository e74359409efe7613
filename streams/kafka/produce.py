"""Plays a stream of records and marks into a topic, as fast as told, each message acknowledged by all replicas."""

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
from streams.kafka.connection import CONNECT_S, Connection, connecting
from streams.record import Item, Record, Rejected
from streams.source import StreamError

_IN_FLIGHT = 1000
_REPORT_S = 0.1


@dataclass
class Played:
    """What has been acknowledged so far, and what was left out."""

    records: int = 0
    bytes: int = 0
    """Of images."""
    boundaries: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Images that cannot be used and were not sent, by reason."""


def create_topic(connection: Connection, topic: str, partitions: int, replication: int = -1) -> bool:
    """Create `topic` (`replication` -1: as the cluster has it by default); False when it is there already.

    Raises StreamError.
    """
    with connecting(connection):
        admin = KafkaAdminClient(**connection.settings())
    try:
        admin.create_topics(
            {topic: {"num_partitions": partitions, "replication_factor": replication}}, wait_for_metadata=True
        )
    except TopicAlreadyExistsError:
        return False
    except KafkaError as error:
        raise StreamError(f"topic {topic} could not be created on {connection}: {error}") from error
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
    clock: Callable[[], float] = time.time,
) -> Played:
    """Send every Record and Control of `items` to `topic` and wait until they are acknowledged; count the Rejected.

    The key of a record is its class name and number, so that records spread over the partitions; timestamps rise
    through a mark, so that readers of several partitions see it at its place. `rate`: records a second, 0 is as fast as
    they are taken. Raises StreamError; what was acknowledged until then stays in the topic.
    """
    played = Played()
    producer = _producer(connection, compression)
    stop = stop or threading.Event()
    failures: list[BaseException] = []
    slots = threading.Semaphore(_IN_FLIGHT)

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
            producer.partitions_for(topic)
        except KafkaTimeoutError:
            raise StreamError(f"{connection} has no topic {topic}; create it first") from None
        began, reported = clock(), 0.0
        sent, last_ms = 0, 0
        for item in items:
            if stop.is_set() or failures:
                break
            now = clock()
            if now - reported > _REPORT_S:
                on_progress(played)
                reported = now
            if isinstance(item, Rejected):
                played.skipped[item.reason] += 1
                continue
            last_ms = max(last_ms, int(now * 1000))
            slots.acquire()
            if isinstance(item, Record):
                value, headers = encode_image(item.label, item.image)
                key = f"{item.label}/{item.offset}".encode()
                size = len(item.image)
                future = producer.send(topic, value, key, headers, timestamp_ms=last_ms)
                future.add_callback(acknowledged, size=size)
                sent += 1
                if rate and (ahead := sent / rate - (clock() - began)) > 0:
                    stop.wait(ahead)
            else:
                _, marks = encode_control(item.kind)
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
        producer.close()
    on_progress(played)
    return played


def _producer(connection: Connection, compression: str | None) -> KafkaProducer:
    with connecting(connection):
        return KafkaProducer(
            **connection.settings(),
            acks="all",
            enable_idempotence=True,
            linger_ms=5,
            batch_size=2**17,
            max_request_size=2**30,
            max_block_ms=CONNECT_S * 1000,
            compression_type=compression,
            allow_auto_create_topics=False,
            metrics_enabled=False,
        )
