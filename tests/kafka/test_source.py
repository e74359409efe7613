"""KafkaSource against a real broker: every record once and in order, through whatever happens to the log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from kafka import KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient

from streams.formats import Codec, encode_control, encode_image
from streams.kafka.breaker import Breaker
from streams.kafka.connection import Connection
from streams.kafka.source import KafkaSource
from streams.record import Control, ControlKind, Item, Offsets, Partition, Reason, Record, Rejected
from streams.source import PositionError, StreamError
from tests.bad_images import encoded, picture

JPEG = encoded(picture(), "JPEG")
CODEC = Codec(max_image_bytes=2**20, max_image_pixels=10**7, max_label_chars=200)
Open = Callable[..., KafkaSource]


@pytest.fixture
def open_source(bootstrap: str) -> Iterator[Open]:
    """`open_source(*topics, at=offsets, **options)` gives a source that reads from `at`."""
    opened: list[KafkaSource] = []

    def make(*topics: str, at: Offsets | None = None, **options: Any) -> KafkaSource:
        source = KafkaSource(Connection([bootstrap]), topics, CODEC, **{"merge_wait_s": 0.2, "group": "", **options})
        opened.append(source)
        source.seek(at or {})
        return source

    yield make
    for source in opened:
        source.close()


def read(source: KafkaSource, count: int, timeout_s: float = 20) -> list[Item]:
    """The next `count` items; fails when they do not come."""
    items: list[Item] = []
    deadline = time.monotonic() + timeout_s
    while len(items) < count:
        items += source.poll(0.5)
        assert time.monotonic() < deadline, f"{len(items)} of {count} items within {timeout_s} s"
    assert len(items) == count
    return items


def send(producer: KafkaProducer, topic: str, labels: Sequence[str], partition: int = 0, **options: Any) -> None:
    for label in labels:
        value, headers = encode_image(label, JPEG)
        producer.send(topic, value, label.encode(), headers, partition=partition, **options)
    producer.flush()


def labels(items: Sequence[Item]) -> list[str]:
    return [item.label for item in items if isinstance(item, Record)]


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


def test_reading_goes_on_where_a_commit_ends(open_source: Open, producer: KafkaProducer, new_topic: Any) -> None:
    topic = new_topic(2)
    send(producer, topic, ["a0", "a1", "a2"], 0)
    send(producer, topic, ["b0", "b1"], 1)
    source = open_source(topic, at={Partition(topic, 0): 2, Partition(topic, 1): 1})
    assert labels(read(source, 2)) == ["a2", "b1"]
    assert source.positions == {Partition(topic, 0): 2, Partition(topic, 1): 1}


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


@pytest.mark.parametrize("start", ["earliest", "latest", "time"])
def test_without_a_commit_reading_begins_where_it_is_told(
    start: str, open_source: Open, producer: KafkaProducer, new_topic: Any
) -> None:
    topic = new_topic(**{"retention.ms": "-1"})  # the broker looks every second
    send(producer, topic, ["old"], timestamp_ms=1_600_000_000_000)
    send(producer, topic, ["middle"], timestamp_ms=1_700_000_000_000)
    source = open_source(topic, start="2023-01-01T00:00:00Z" if start == "time" else start)
    send(producer, topic, ["new"])
    expected = {"earliest": ["old", "middle", "new"], "latest": ["new"], "time": ["middle", "new"]}[start]
    assert labels(read(source, len(expected))) == expected


def test_commits_are_copied_to_the_group_and_read_only_when_asked(
    open_source: Open, producer: KafkaProducer, new_topic: Any, admin: KafkaAdminClient
) -> None:
    topic = new_topic()
    send(producer, topic, ["a", "b", "c"])
    source = open_source(topic, group=f"g-{topic}")
    read(source, 3)
    source.acknowledge({Partition(topic, 0): 2})
    source.close()

    offsets = admin.list_group_offsets(f"g-{topic}")
    assert [answer.offset for answer in offsets[f"g-{topic}"].values()] == [2]
    assert labels(read(open_source(topic, group=f"g-{topic}"), 3)) == ["a", "b", "c"]
    assert labels(read(open_source(topic, group=f"g-{topic}", start="group"), 1)) == ["c"]


def test_partitions_added_while_running_are_read_from_their_beginning(
    open_source: Open, producer: KafkaProducer, new_topic: Any, admin: KafkaAdminClient
) -> None:
    topic = new_topic(1)
    source = open_source(topic, start="latest", discover_s=0.2)
    admin.create_partitions({topic: 2})
    deadline = time.monotonic() + 20
    while True:  # the producer learns of the partition a little later than the broker
        try:
            send(producer, topic, ["new"], 1)
            break
        except AssertionError:
            assert time.monotonic() < deadline
            producer._metadata.request_update()
            time.sleep(0.1)
    items = read(source, 1)
    assert labels(items) == ["new"] and items[0].partition == Partition(topic, 1)


def test_what_retention_deleted_stops_or_is_skipped_and_counted(
    open_source: Open, producer: KafkaProducer, new_topic: Any, admin: KafkaAdminClient
) -> None:
    topic = new_topic()
    send(producer, topic, ["a", "b", "c", "d"])
    admin.delete_records({TopicPartition(topic, 0): 3})
    here = {Partition(topic, 0): 1}

    with pytest.raises(PositionError, match=r"the log has 3 to 4, next was 1.*on_lost"):
        open_source(topic, at=here)
    skipping = open_source(topic, at=here, on_lost="skip")
    assert labels(read(skipping, 1)) == ["d"]
    assert skipping.skipped == {topic: 2}


def test_records_deleted_while_they_wait_stop_the_source(
    open_source: Open, producer: KafkaProducer, new_topic: Any, admin: KafkaAdminClient
) -> None:
    topic = new_topic()
    send(producer, topic, ["a"])
    source = open_source(topic, fetch_bytes=1)
    source.throttle(True)
    time.sleep(1)  # until the fetch that is under way has come back empty
    send(producer, topic, ["b", "c"])
    admin.delete_records({TopicPartition(topic, 0): -1})
    source.throttle(False)
    assert labels(read(source, 1)) == ["a"]
    with pytest.raises(PositionError, match="retention deleted"):
        read(source, 1)


def test_a_commit_beyond_the_log_stops(open_source: Open, producer: KafkaProducer, new_topic: Any) -> None:
    topic = new_topic()
    send(producer, topic, ["a"])
    with pytest.raises(PositionError, match="next was 7"):
        open_source(topic, at={Partition(topic, 0): 7})


def test_a_topic_created_again_is_noticed_at_the_start_and_while_running(
    open_source: Open, producer: KafkaProducer, new_topic: Any, admin: KafkaAdminClient
) -> None:
    topic = new_topic()
    send(producer, topic, ["old", "older"])
    before = open_source(topic, discover_s=0.2)
    read(before, 2)
    admin.delete_topics([topic])
    while True:
        try:
            new_topic(name=topic)
            break
        except Exception as error:
            assert "AlreadyExists" in type(error).__name__
    with pytest.raises(PositionError, match=r"again|was there before"):
        read(before, 1)

    after = KafkaSource(before._connection, [topic], CODEC, group="")
    with pytest.raises(PositionError, match="created again"):
        after.continues(before.fingerprint)
    after.close()
    skipping = KafkaSource(before._connection, [topic], CODEC, group="", on_lost="skip")
    assert skipping.continues(before.fingerprint) and not skipping.continues("9f86d081884c7d65")
    skipping.seek({Partition(topic, 0): 2})
    send(producer, topic, ["new"])
    assert labels(read(skipping, 1)) == ["new"]
    skipping.close()


def test_a_topic_that_is_not_read_for_a_while_goes_on_where_it_was(
    open_source: Open, producer: KafkaProducer, new_topic: Any, bootstrap: str
) -> None:
    # given a commit of two topics
    one, other = new_topic(), new_topic()
    send(producer, one, ["a0", "a1"])
    send(producer, other, ["b0", "b1"])
    before = open_source(one, other)
    offsets = {Partition(one, 0): 2, Partition(other, 0): 1}
    # when the agent runs with one of them, and then with both again
    alone, again = (KafkaSource(Connection([bootstrap]), topics, CODEC, group="") for topics in ([one], [one, other]))
    try:
        assert alone.continues(before.fingerprint)
        alone.seek(offsets)
        assert alone.positions == offsets and alone.lag().keys() <= {(one, 0)}
        assert again.continues(alone.fingerprint)
        again.seek(alone.positions)
        # then nothing of the other is read a second time
        assert labels(read(again, 1)) == ["b1"]
    finally:
        alone.close()
        again.close()


def test_a_topic_that_is_not_there_and_a_cluster_that_does_not_answer_say_so(open_source: Open) -> None:
    with pytest.raises(StreamError, match="no topic absent"):
        open_source("absent")


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
    from tests.kafka.conftest import start_broker

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


def test_header_names_that_are_not_text_do_not_stop_the_stream(
    open_source: Open, producer: KafkaProducer, new_topic: Any
) -> None:
    class Odd(str):
        def encode(self, *_: Any) -> bytes:
            return b"x\xff"

    topic = new_topic()
    producer.send(topic, JPEG, None, [(Odd("x"), b"1"), ("label", b"cat")])
    producer.flush()
    send(producer, topic, ["dog"])
    first, second = read(open_source(topic), 2)
    assert isinstance(first, Record) and first.raw and first.raw.headers[0] == ("x\\xff", b"1")
    assert labels([second]) == ["dog"]


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
def test_a_decompression_bomb_is_rejected_and_the_stream_goes_on(
    codec: str, open_source: Open, bootstrap: str, new_topic: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.kafka.record_batches.inflate.__defaults__", (2**20,))
    topic = new_topic()
    squeezing = KafkaProducer(
        bootstrap_servers=bootstrap, compression_type=codec, max_request_size=2**24, batch_size=2**24, linger_ms=200
    )
    squeezing.send(topic, bytes(2**20), b"a")
    squeezing.send(topic, bytes(2**20), b"b")
    squeezing.flush()
    squeezing.send(topic, JPEG, None, [("label", b"cat")])
    squeezing.flush()
    squeezing.close()

    *bombs, good = read(open_source(topic), 3)

    assert labels([good]) == ["cat"]
    assert [(item.offset, item.reason) for item in bombs if isinstance(item, Rejected)] == [
        (0, Reason.TOO_LARGE),
        (1, Reason.TOO_LARGE),
    ]


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


def test_aborted_transactions_are_not_learned(open_source: Open, bootstrap: str, new_topic: Any) -> None:
    topic = new_topic()
    client = KafkaProducer(bootstrap_servers=bootstrap, transactional_id=topic, enable_idempotence=True)
    client.init_transactions()
    for label, keep in (("no", False), ("yes", True)):
        client.begin_transaction()
        send(client, topic, [label])
        (client.commit_transaction if keep else client.abort_transaction)()
    client.close()
    assert labels(read(open_source(topic), 1)) == ["yes"]
