"""KafkaSource: every record once and in order, through whatever happens to the cluster; with a client that misbehaves a
new one is made, or the agent is told. It never hangs silently."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaConnectionError

from streams.claims import ImageStore
from streams.formats import encode_control
from streams.kafka.breaker import Breaker
from streams.kafka.connection import Connection
from streams.kafka.record_batches import Message, Unreadable
from streams.kafka.source import KafkaSource
from streams.record import Control, ControlKind, Partition, Raw, Reason, Record, Rejected, Unreachable
from streams.source import StreamError
from tests.kafka.agents import wait_until
from tests.kafka.broker import start_broker
from tests.kafka.fake_client import HERE, message
from tests.kafka.records import CODEC, JPEG, Open, labels, offsets, read, send


def test_records_come_with_their_bytes_positions_and_times(
    open_source: Open, producer: KafkaProducer, new_topic: Any
) -> None:
    topic = new_topic()
    producer.send(topic, JPEG, b"k", [("label", b"cat")], timestamp_ms=1_700_000_000_123)
    producer.send(topic, None, b"mark", encode_control(ControlKind.FLUSH)[1])
    producer.send(topic, b"text", b"k", [("label", b"cat")])
    producer.flush()

    record, mark, rejected = read(open_source(topic), 3)

    here = Partition(topic, 0)
    assert isinstance(record, Record) and isinstance(rejected, Rejected) and record.raw
    assert (record.partition, record.offset, record.label, record.image) == (here, 0, "cat", JPEG)
    assert record.timestamp_s == 1_700_000_000.123
    assert (record.raw.key, record.raw.headers) == (b"k", (("label", b"cat"),))
    assert mark == Control(here, 1, ControlKind.FLUSH)
    assert (rejected.offset, rejected.reason) == (2, Reason.UNSUPPORTED_FORMAT)


def test_partitions_of_two_topics_come_in_one_order_by_time(
    open_source: Open, producer: KafkaProducer, new_topic: Any
) -> None:
    one, other = sorted([new_topic(2), new_topic(1)])
    now = int(time.time() * 1000)
    expected = []
    for number in range(60):
        send(producer, one if number % 3 else other, [f"n{number:02}"], timestamp_ms=now + number)
        expected.append(f"n{number:02}")

    first = labels(read(open_source(one, other), 60))
    second = labels(read(open_source(other, one, fetch_bytes=2**16), 60))

    assert first == second == expected


def test_a_silent_partition_holds_the_others_back_only_for_the_wait(
    open_source: Open, producer: KafkaProducer, new_topic: Any
) -> None:
    topic = new_topic(3)
    source = open_source(topic, merge_wait_s=0.5)
    send(producer, topic, ["now"], 1)
    began = time.monotonic()
    assert labels(read(source, 1)) == ["now"]
    assert time.monotonic() - began < 5


def test_while_throttled_nothing_is_handed_out_and_little_is_fetched(
    open_source: Open, producer: KafkaProducer, new_topic: Any
) -> None:
    topic = new_topic()
    for number in range(64):
        producer.send(topic, JPEG + bytes(2**16), None, [("label", b"cat"), ("n", b"%d" % number)])
    producer.flush()
    source = open_source(topic, fetch_bytes=2**20)
    source.throttle(True)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        assert not source.poll(0.05)
        time.sleep(0.02)
    assert source._handover.bytes <= 3 * 2**20
    assert source.lag()[topic, 0] > 0
    source.throttle(False)
    assert [item.offset for item in read(source, 64)] == list(range(64))


def test_a_broker_that_goes_and_comes_back_costs_nothing(tmp_path: Any) -> None:
    broker = start_broker(tmp_path / "broker")
    try:
        connection = Connection([broker.bootstrap])
        admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
        admin.create_topics({"t": {"num_partitions": 2, "replication_factor": 1}}, wait_for_metadata=True)
        admin.close()
        producer = KafkaProducer(bootstrap_servers=broker.bootstrap, enable_idempotence=True)
        send(producer, "t", ["a0", "a1"], 0)
        send(producer, "t", ["b0"], 1)
        producer.close()
        source = KafkaSource(connection, ["t"], CODEC, merge_wait_s=0.2, discover_s=0.5)
        source.seek({})
        first = read(source, 3)
        broker.kill()
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:  # the loop goes on at its pace meanwhile
            began = time.monotonic()
            assert not source.poll(0.1)
            assert time.monotonic() - began < 0.5
        broker.start()
        producer = KafkaProducer(bootstrap_servers=broker.bootstrap, enable_idempotence=True)
        send(producer, "t", ["a2"], 0)
        producer.close()
        assert labels(first) == ["a0", "a1", "b0"] and labels(read(source, 1, 60)) == ["a2"]
        source.close()
    finally:
        broker.kill()


def test_the_breaker_opens_when_nearly_all_is_rejected_and_lets_go_again(
    open_source: Open, producer: KafkaProducer, new_topic: Any
) -> None:
    topic = new_topic()
    for _ in range(100):
        producer.send(topic, b"text", b"k", [("label", b"a")])
    producer.flush()
    source = open_source(topic, breaker=Breaker(window=50, pause_s=0.5))
    first = list(source.poll(5))
    assert len(first) >= 50 and "were rejected" in source.holding
    rest = read(source, 100 - len(first)) if len(first) < 100 else []
    assert len(first + rest) == 100
    deadline = time.monotonic() + 5
    while source.holding and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not source.holding


def test_after_a_failure_a_new_client_goes_on_at_the_same_place(scripted: Callable[..., Any]) -> None:
    source, made = scripted([message(0), message(1)], ValueError("odd"), [message(2)])
    assert offsets(read(source, 3)) == [0, 1, 2]
    assert len(made) == 2 and made[0].closed and made[1].positions == {HERE: 2}


def test_a_client_that_fails_again_and_again_ends_with_a_message(scripted: Callable[..., Any]) -> None:
    source, made = scripted([message(0)], *[ValueError("odd")] * 9)
    assert offsets(read(source, 1)) == [0]
    with pytest.raises(StreamError, match=r"failed 5 times, last with ValueError: odd; stopping\. Nothing is lost"):
        read(source, 1)
    assert len(made) == 5


def test_a_broker_that_is_away_is_waited_for(scripted: Callable[..., Any]) -> None:
    source, made = scripted(*[KafkaConnectionError("gone")] * 9, [message(0)])
    assert offsets(read(source, 1)) == [0]
    assert len(made) == 10


def test_a_poll_that_never_comes_back_ends_with_a_message(scripted: Callable[..., Any]) -> None:
    let_go = threading.Event()
    source, _ = scripted([message(0)], let_go.wait, stall_s=0.3)
    assert offsets(read(source, 1)) == [0]
    with pytest.raises(StreamError, match="has not come back"):
        read(source, 1)
    let_go.set()


def test_an_unreadable_batch_is_fetched_once_more_and_then_rejected_record_by_record(
    scripted: Callable[..., Any],
) -> None:
    broken = Unreadable(1, 4, ValueError("checksum"))
    source, (client,) = scripted([message(0), broken, message(4)], [broken, message(4)])
    first, *rejected, last = read(source, 5)
    assert client.sought == [1] and isinstance(first, Record) and offsets([last]) == [4]
    assert offsets(rejected) == [1, 2, 3]
    assert all(isinstance(item, Rejected) and item.reason == Reason.UNDECODABLE for item in rejected)


def test_images_elsewhere_come_in_their_place_with_the_right_reasons(
    scripted: Callable[..., Any], tmp_path: Path
) -> None:
    digest = hashlib.sha256(JPEG).hexdigest().encode()
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "b.jpg").write_bytes(b"other")

    def claim(offset: int, url: str) -> Message:
        headers = (("label", b"far"), ("image-url", url.encode()), ("image-sha256", digest))
        return Message(offset, 7, Raw(b"k", None, headers))

    urls = [f"file://{tmp_path}/{name}" for name in ("a.jpg", "b.jpg", "none.jpg")]
    steps = [message(0), claim(1, urls[0]), claim(2, urls[1]), claim(3, urls[2]), claim(4, "file:///etc/hostname")]
    source, _ = scripted([*steps, message(5)], images=ImageStore([f"file://{tmp_path}/"], 10**6))

    items = read(source, 6)

    assert offsets(items) == [0, 1, 2, 3, 4, 5]
    assert isinstance(items[1], Record) and (items[1].label, items[1].image) == ("far", JPEG)
    reasons = [item.reason for item in items if isinstance(item, Rejected)]
    assert reasons == [Reason.FETCH_FAILED, Reason.FETCH_FAILED, Reason.FETCH_FORBIDDEN]

    nowhere, _ = scripted([claim(0, urls[0])])
    (item,) = read(nowhere, 1)
    assert isinstance(item, Rejected) and item.reason == Reason.FETCH_FORBIDDEN


def test_a_store_of_images_that_is_away_is_waited_for_and_rejects_nothing(
    scripted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a store that does not answer, behind a record that needs it
    monkeypatch.setattr("streams.kafka.claimed_images._WAIT_S", 0.01)
    away = threading.Event()
    away.set()

    class Store:
        def fetch(self, url: str) -> bytes:
            if away.is_set():
                raise Unreachable("nobody at home")
            return JPEG

    headers = (("image-url", b"https://x/a"), ("image-sha256", hashlib.sha256(JPEG).hexdigest().encode()))
    claims = [Message(offset, 7, Raw(b"k", None, (("label", b"far"), *headers))) for offset in (1, 2)]
    source, _ = scripted([message(0), *claims, message(3)], images=Store(), stall_s=1.0)

    # when it is away for longer than the reader may be silent
    assert offsets(read(source, 1)) == [0]
    wait_until(lambda: "nobody at home" in source.holding, 10)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        assert source.poll(0.1) == ()

    # then all is learned once it is back
    away.clear()
    items = read(source, 3)
    assert offsets(items) == [1, 2, 3] and all(isinstance(item, Record) for item in items)
    assert source.holding == ""


def test_messages_without_a_value_fill_the_memory_too(scripted: Callable[..., Any]) -> None:
    empty = [[Message(offset, 7, Raw(None, None)) for offset in range(at, at + 10)] for at in range(0, 500, 10)]
    source, _ = scripted(*empty, fetch_bytes=10_000)
    wait_until(lambda: source._handover.bytes >= 10_000, 10)
    assert sum(len(items) for items, _ in source._handover._ready) <= 20
    assert offsets(read(source, 500)) == list(range(500)) and source._handover.bytes == 0

    heavy = Message(0, 7, Raw(b"k" * 3000, JPEG, (("label", b"cat"), ("note", bytes(4000)))))
    full, _ = scripted([heavy], [message(1)], fetch_bytes=7000)
    wait_until(lambda: full._handover._ready, 10)
    assert full._handover.bytes > 7000


def test_the_breaker_opens_for_what_only_decoding_finds(scripted: Callable[..., Any]) -> None:
    source, _ = scripted([message(0)], breaker=Breaker(window=100, pause_s=60))
    assert offsets(read(source, 1)) == [0]
    source.judged(5000, 4000)  # not nearly everything
    source.judged(90, 90)
    assert not source.holding
    source.judged(100, 99)
    wait_until(lambda: "were rejected" in source.holding, 10)
