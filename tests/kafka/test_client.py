"""KafkaSource with a client that misbehaves: a new one is made, or the agent is told; it never hangs silently."""

from __future__ import annotations

import hashlib
import struct
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from kafka import TopicPartition
from kafka.errors import KafkaConnectionError
from kafka.record.memory_records import MemoryRecords, MemoryRecordsBuilder

from streams.claims import ImageStore
from streams.kafka.breaker import Breaker
from streams.kafka.connection import Connection
from streams.kafka.record_batches import Message, PartitionRecords, Unreadable
from streams.kafka.source import KafkaSource
from streams.record import Item, Partition, Reason, Record, Rejected
from streams.source import PositionError, StreamError
from tests.kafka.agents import wait_until
from tests.kafka.test_source import CODEC, JPEG, read

HERE = Partition("t", 0)


def message(offset: int, label: str = "cat") -> Message:
    return Message(offset, 1000 + offset, None, JPEG, (("label", label.encode()),))


class FakeClient:
    """Stands in for streams.kafka.source.Client: `script` is what the polls of all clients do, one after the other."""

    script: list[Any]
    made: list[FakeClient]

    def __init__(self, connection: Connection, group: str, fetch_bytes: int) -> None:
        self.made.append(self)
        self.positions: dict[Partition, int] = {}
        self.sought: list[int] = []
        self.closed = False

    def poll(self, timeout_s: float) -> dict[Partition, list[Any]]:
        step = self.script.pop(0) if self.script else None
        if isinstance(step, Exception):
            raise step
        if callable(step):
            step()
        if not isinstance(step, list):
            time.sleep(0.01)
            return {}
        return {HERE: step}

    def describe(self, topics: Iterable[str]) -> list[dict[str, Any]]:
        return [{"name": "t", "error_code": 0, "topic_id": "id", "partitions": [{"partition_index": 0}]}]

    def assign(self, positions: dict[Partition, int]) -> None:
        self.positions = dict(positions)

    def seek(self, where: Partition, offset: int) -> None:
        self.sought.append(offset)

    def beginnings(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return dict.fromkeys(partitions, 0)

    def ends(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return dict.fromkeys(partitions, 100)

    def end(self, where: Partition) -> int:
        return 100

    def pause(self, wanted: set[Partition]) -> None: ...

    def commit(self, offsets: dict[Partition, int], wait: bool) -> None: ...

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`scripted(step, ...)` gives a source and the clients it makes."""
    opened: list[KafkaSource] = []

    def make(*steps: Any, **options: Any) -> tuple[KafkaSource, list[FakeClient]]:
        own = type("Own", (FakeClient,), {"script": list(steps), "made": []})
        monkeypatch.setattr("streams.kafka.source.Client", own)
        monkeypatch.setattr("streams.kafka.source._BACKOFF_S", 0.001)
        opened.append(KafkaSource(Connection(["x:1"]), ["t"], CODEC, **options))
        opened[-1].seek({})
        return opened[-1], own.made

    yield make
    for source in opened:
        source.close()


def offsets(items: Iterable[Item]) -> list[int]:
    return [item.offset for item in items]


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


def batches(*images: bytes) -> bytearray:
    """Each image in a batch of its own, at offsets 0, 1, ..."""
    data = bytearray()
    for offset, image in enumerate(images):
        builder = MemoryRecordsBuilder(2, 0, 10**6)
        builder.append(timestamp=7, key=b"k", value=image, headers=[("label", b"cat"), ("none", None)])
        builder.close()
        batch = bytearray(builder.buffer())
        struct.pack_into(">q", batch, 0, offset)  # the broker sets the base offset, which no checksum covers
        data += batch
    return data


def test_messages_are_unpacked_with_all_they_have() -> None:
    records = PartitionRecords(1, TopicPartition("t", 0), MemoryRecords(bytes(batches(b"a", b"b", b"c"))))
    assert records.take() == [
        Message(offset, 7, b"k", value, (("label", b"cat"), ("none", None))) for offset, value in ((1, b"b"), (2, b"c"))
    ]
    assert records.next_fetch_offset == 3 and not records


def test_a_batch_with_a_wrong_checksum_or_length_costs_only_itself() -> None:
    data = batches(b"a", b"b", b"c")
    size = len(data) // 3
    data[size + 70] ^= 1
    records = PartitionRecords(0, TopicPartition("t", 0), MemoryRecords(bytes(data)))
    first, lost, last = records.take()
    assert (first.value, last.value) == (b"a", b"c")
    assert (lost.offset, lost.next_offset) == (1, 2) and "checksum" in str(lost.error)

    unchecked = PartitionRecords(0, TopicPartition("t", 0), MemoryRecords(bytes(data)), check_crcs=False)
    assert len(unchecked.take()) == 3  # whatever the byte was, nothing is raised


LAST_OFFSET_DELTA, COUNT = 23, 57
"""Where a batch has how far its offsets go, and how many records it has; both under its checksum."""


@pytest.mark.parametrize("field", [LAST_OFFSET_DELTA, COUNT])
@pytest.mark.parametrize("says", [2**31 - 1, 1000, -5])
@pytest.mark.parametrize("last", [False, True])
def test_what_a_broken_batch_says_of_its_length_is_not_believed(field: int, says: int, last: bool) -> None:
    data = batches(b"a", b"b", b"c")
    size = len(data) // 3
    struct.pack_into(">i", data, size + field, says)
    if last:
        del data[2 * size :]
    first, lost, *others = PartitionRecords(0, TopicPartition("t", 0), MemoryRecords(bytes(data))).take()
    assert first.value == b"a" and (lost.offset, lost.next_offset) == (1, 2)
    assert [message.value for message in others] == ([] if last else [b"c"])


def test_topics_may_be_added_and_removed_between_commits_but_not_created_again(scripted: Callable[..., Any]) -> None:
    source, _ = scripted()
    assert source.fingerprint == "kafka t=id"
    assert (
        source.continues("kafka t=id") and source.continues("kafka t=id u=other") and source.continues("kafka u=other")
    )
    assert not source.continues("0123456789abcdef")
    with pytest.raises(PositionError, match="created again"):
        source.continues("kafka t=before")


def test_images_elsewhere_come_in_their_place_with_the_right_reasons(
    scripted: Callable[..., Any], tmp_path: Path
) -> None:
    digest = hashlib.sha256(JPEG).hexdigest().encode()
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "b.jpg").write_bytes(b"other")

    def claim(offset: int, url: str) -> Message:
        headers = (("label", b"far"), ("image-url", url.encode()), ("image-sha256", digest))
        return Message(offset, 7, b"k", None, headers)

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


def test_messages_without_a_value_fill_the_memory_too(scripted: Callable[..., Any]) -> None:
    empty = [[Message(offset, 7, None, None, ()) for offset in range(at, at + 10)] for at in range(0, 500, 10)]
    source, _ = scripted(*empty, fetch_bytes=10_000)
    wait_until(lambda: source._handover.bytes >= 10_000, 10)
    assert sum(len(items) for items, _ in source._handover._ready) <= 20
    assert offsets(read(source, 500)) == list(range(500)) and source._handover.bytes == 0

    heavy = Message(0, 7, b"k" * 3000, JPEG, (("label", b"cat"), ("note", bytes(4000))))
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
