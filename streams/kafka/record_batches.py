"""Record batches as they lie in a fetch response, read so that no content of theirs can stop or starve the client.

kafka-python 3.0 decompresses a batch without any bound, fails on a header name that is not UTF-8, and once an exception
left its unpacking, every later poll spins for ever. `guard` closes the three for one consumer.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import lz4.frame  # type: ignore[import-untyped]
import snappy  # type: ignore[import-untyped]
import zstandard
from kafka import KafkaConsumer
from kafka.consumer.fetcher import Fetcher
from kafka.errors import CorruptRecordError
from kafka.protocol.consumer import IsolationLevel
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.util import decode_varint

from streams.kafka.connection import describe_error
from streams.record import Partition, Reason, Rejected

MAX_INFLATED = 128 * 2**20
"""Bytes a batch may have once decompressed. A producer's batches have 1 MiB or less, and images hardly compress."""


class BatchTooLarge(Exception):
    """The batch would take more than MAX_INFLATED bytes of memory."""


class Message(NamedTuple):
    """One message as it came."""

    offset: int
    timestamp_ms: int
    """-1 when it has none."""
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """In the place of messages: those of a batch from `offset` up to `next_offset` cannot be had."""

    offset: int
    next_offset: int
    error: Exception


def rejections(where: Partition, lost: Unreadable) -> list[Rejected]:
    """One for each record of a batch that cannot be read; there is nothing of them to keep but where they were."""
    reason = Reason.TOO_LARGE if isinstance(lost.error, BatchTooLarge) else Reason.UNDECODABLE
    detail = f"its batch ({lost.offset} to {lost.next_offset - 1}) cannot be read: {describe_error(lost.error)}"
    return [Rejected(where, offset, reason, detail) for offset in range(lost.offset, lost.next_offset)]


def guard(consumer: KafkaConsumer) -> None:
    """Make `consumer.poll` give Message, and an Unreadable where it would raise; its header names are escaped."""
    consumer._fetcher.PartitionRecords = _PartitionRecords


class _PartitionRecords(Fetcher.PartitionRecords):
    def _unpack_records(self: Any, tp: Any, records: Any, *_: Any) -> Iterator[Message | Unreadable]:
        while (batch := records.next_batch()) is not None:
            try:
                if self.check_crcs and not batch.validate_crc():
                    raise CorruptRecordError(f"the batch at offset {batch.base_offset} fails its checksum")
                if batch.magic < 2:
                    yield from self._old_messages(batch)
                    continue
                if not self._is_skipped(batch):
                    for message in messages(batch):
                        self.next_fetch_offset = message.offset + 1
                        yield message
            except Exception as error:
                if batch.magic < 2:
                    raise
                first = max(self.next_fetch_offset, batch.base_offset)
                end = max(first + 1, _end(batch, records))
                yield Unreadable(first, end, error)
                self.next_fetch_offset = end
                continue
            # What compaction removed at the batch's end is passed as well.
            self.next_fetch_offset = batch.next_offset
        self.drain()

    def _is_skipped(self: Any, batch: Any) -> bool:
        """True for marks of transactions and for what an aborted one wrote, as Fetcher.PartitionRecords has it."""
        self.leader_epoch = batch.leader_epoch
        if self.isolation_level == IsolationLevel.READ_COMMITTED and batch.has_producer_id():
            self._consume_aborted_transactions_up_to(batch.last_offset)
            if self._contains_abort_marker(batch):
                self.aborted_producer_ids.discard(batch.producer_id)
            elif self._is_batch_aborted(batch):
                return True
        return batch.is_control_batch

    def _old_messages(self: Any, batch: Any) -> Iterator[Message]:
        """Of a batch written before Kafka 0.11: it has no headers."""
        for record in batch:
            self.next_fetch_offset = record.offset + 1
            yield Message(
                record.offset, -1 if record.timestamp is None else record.timestamp, record.key, record.value, ()
            )


def _end(batch: Any, records: Any) -> int:
    """Offset after a batch that cannot be read. One that fails its checksum may lie about it: the next one is believed
    more, and without it the smaller of the two numbers that say how much the batch has."""
    counted = batch.base_offset + batch.records_count
    if batch.validate_crc():
        return batch.next_offset
    if (following := _readable_base(records)) is not None and following > batch.base_offset:
        return min(following, max(batch.next_offset, counted))
    return min(batch.next_offset, counted)


def _readable_base(records: Any) -> int | None:
    """Where the batch that comes next begins, if it passes its checksum."""
    if records._next_slice is None:
        return None
    try:
        following = DefaultRecordBatch(records._next_slice)
        return following.base_offset if following.magic == 2 and following.validate_crc() else None
    except (struct.error, IndexError):
        return None


def messages(batch: Any) -> Iterator[Message]:
    """The messages of a batch of format 2. Raises CorruptRecordError, BatchTooLarge and errors of decompression."""
    buffer = bytes(memoryview(batch._buffer)[batch._pos :])  # bytes give out parts of them in one copy
    if batch.compression_type != batch.CODEC_NONE:
        buffer = inflate(batch.compression_type, buffer)
    base_offset, base_ms = batch.base_offset, batch.first_timestamp
    appended_ms = batch.max_timestamp if batch.timestamp_type == batch.LOG_APPEND_TIME else None
    end = 0
    for _ in range(batch.records_count):
        length, start = decode_varint(buffer, end)
        end = start + length
        elapsed_ms, pos = decode_varint(buffer, start + 1)
        offset, pos = decode_varint(buffer, pos)
        key, pos = _field(buffer, pos)
        value, pos = _field(buffer, pos)
        count, pos = decode_varint(buffer, pos)
        headers = []
        for _ in range(count):
            name, pos = _field(buffer, pos)
            content, pos = _field(buffer, pos)
            headers.append((_NAMES.get(name) or _name(name), content))
        if pos != end or end > len(buffer):
            raise CorruptRecordError(f"record at byte {start} says it ends at {end} and ends at {pos} of {len(buffer)}")
        timestamp_ms = base_ms + elapsed_ms if appended_ms is None else appended_ms
        yield Message(base_offset + offset, timestamp_ms, key, value, tuple(headers))


_NAMES: dict[bytes | None, str] = {
    name.encode(): name for name in ("label", "content-type", "ce_id", "ce_type", "ce_time")
}
"""Names of many headers, decoded once."""


def _name(name: bytes | None) -> str:
    return (name or b"").decode("utf-8", "backslashreplace")


def _field(buffer: bytes, pos: int) -> tuple[bytes | None, int]:
    """A field of a length and so many bytes; None for a negative length."""
    length = buffer[pos]
    if length & 0x80:
        length, pos = decode_varint(buffer, pos)
    elif length & 1:
        return None, pos + 1
    else:
        length >>= 1
        pos += 1
    if length < 0:
        return None, pos
    end = pos + length
    return buffer[pos:end], end


def inflate(codec: int, data: bytes, limit: int = MAX_INFLATED) -> bytes:
    """`data` decompressed; `codec` is Kafka's number of it. Raises BatchTooLarge beyond `limit` bytes."""
    if codec == DefaultRecordBatch.CODEC_GZIP:
        inflated = zlib.decompressobj(wbits=31).decompress(data, limit + 1)
    elif codec == DefaultRecordBatch.CODEC_SNAPPY:
        inflated = _inflate_snappy(data, limit)
    elif codec == DefaultRecordBatch.CODEC_LZ4:
        inflated = lz4.frame.LZ4FrameDecompressor().decompress(data, limit + 1)
    elif codec == DefaultRecordBatch.CODEC_ZSTD:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True) as reader:
            inflated = reader.read(limit + 1)
    else:
        raise CorruptRecordError(f"compression codec {codec} is not known")
    if len(inflated) > limit:
        raise BatchTooLarge(f"a batch of {len(data)} bytes has more than {limit} once decompressed")
    return inflated


def _inflate_snappy(data: bytes, limit: int) -> bytes:
    """One snappy block, or the framing of the Java client: a header of 16 bytes, then blocks with their length."""
    blocks = [data]
    if data.startswith(b"\x82SNAPPY\x00"):
        blocks, at = [], 16
        while at < len(data):
            (size,) = struct.unpack_from(">i", data, at)
            blocks.append(data[at + 4 : at + 4 + size])
            at += 4 + size
    announced = 0
    for block in blocks:  # a block begins with its decompressed length
        shift = 0
        for byte in block[:5]:
            announced += (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
    if announced > limit:
        raise BatchTooLarge(f"a batch of {len(data)} bytes announces {announced} once decompressed, at most {limit}")
    return b"".join(snappy.decompress(block) for block in blocks)
