"""Batches are unpacked with all they have, and one that is broken, a bomb or odd costs only itself."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import pytest
from kafka import KafkaProducer, TopicPartition
from kafka.record.memory_records import MemoryRecords, MemoryRecordsBuilder

from streams.kafka.record_batches import Message, PartitionRecords
from streams.record import MAX_HEADER_BYTES, MAX_HEADERS, Raw, Reason, Record, Rejected
from tests.kafka.records import JPEG, Open, labels, read, send


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
        Message(offset, 7, Raw(b"k", value, (("label", b"cat"), ("none", None))), 0)
        for offset, value in ((1, b"b"), (2, b"c"))
    ]
    assert records.next_fetch_offset == 3 and not records


def batch_with(headers: list[tuple[str, bytes | None]]) -> list[Message]:
    """What is read of a batch of three messages, of which the second has `headers`."""
    builder = MemoryRecordsBuilder(2, 0, 10**9)
    for value, own in ((b"a", []), (b"b", headers), (b"c", [])):
        builder.append(timestamp=7, key=b"k", value=value, headers=own)
    builder.close()
    return list(PartitionRecords(0, TopicPartition("t", 0), MemoryRecords(bytes(builder.buffer()))).take())


def test_headers_up_to_their_bounds_are_read_and_no_more() -> None:
    for most in ([("a", b"")] * MAX_HEADERS, [("a", bytes(MAX_HEADER_BYTES - 5))]):
        assert batch_with(most)[1] == Message(1, 7, Raw(b"k", b"b", tuple(most)), 0)
    for more in ([("a", b"")] * (MAX_HEADERS + 1), [("a", bytes(MAX_HEADER_BYTES - 4))]):
        before, over, after = batch_with(more)
        assert (before.raw.value, after.raw.value) == (b"a", b"c") and not before.raw.dropped
        assert over.raw.headers == () and over.raw.dropped.startswith(f"{len(more)} headers of ")
        assert over.raw == Raw(b"k", b"b", (), over.raw.dropped)


def test_a_million_empty_headers_take_no_memory() -> None:
    builder = MemoryRecordsBuilder(2, 0, 10**9)
    builder.append(timestamp=7, key=b"k", value=b"v", headers=[("", b"")] * 10**6)
    builder.close()
    records = PartitionRecords(0, TopicPartition("t", 0), MemoryRecords(bytes(builder.buffer())))
    tracemalloc.start()
    (message,) = records.take()
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()
    assert message.raw.dropped == "1000000 headers of 2000000 bytes"


def test_a_batch_with_a_wrong_checksum_or_length_costs_only_itself() -> None:
    data = batches(b"a", b"b", b"c")
    size = len(data) // 3
    data[size + 70] ^= 1
    records = PartitionRecords(0, TopicPartition("t", 0), MemoryRecords(bytes(data)))
    first, lost, last = records.take()
    assert (first.raw.value, last.raw.value) == (b"a", b"c")
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
    assert first.raw.value == b"a" and (lost.offset, lost.next_offset) == (1, 2)
    assert [message.raw.value for message in others] == ([] if last else [b"c"])


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
