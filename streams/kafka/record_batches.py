"""Record batches as they lie in a fetch response, read so that no content of theirs can stop or starve the client.

kafka-python 3.0 decompresses a batch without any bound (204 kB of gzip became 200 MiB), fails on a header name that is
not UTF-8, reads headers without a bound, and once an exception left its unpacking, every later poll spins for ever at
full load, deaf to its time-out: `Fetcher.fetched_records` waits for the broken batch to give something. `guard` closes
the four for one consumer.

Batches are unpacked here rather than by the client's DefaultRecordBatch, which makes an object per record and decodes
every header name anew.
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
from streams.memo import Memo
from streams.record import MAX_HEADER_BYTES, MAX_HEADERS, Partition, Raw, Reason, Rejected

MAX_INFLATED = 128 * 2**20
"""Bytes a batch may have once decompressed; beyond it all of its records are rejected. Batches have 1 MiB or less as a
rule, and images hardly compress. While a batch is unpacked, it and the copies of its parts take twice this."""


class BatchTooLarge(Exception):
    """The batch would take more than MAX_INFLATED bytes of memory."""


class Message(NamedTuple):
    """One message as it came."""

    offset: int
    timestamp_ms: int
    """When it was produced, or appended where the topic says so; -1 when it has no time."""
    raw: Raw
    epoch: int = -1
    """The leader epoch that it was written in; -1 where it is not known."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What comes in the place of messages that cannot be had: those of a batch from `offset` up to `next_offset`."""

    offset: int
    next_offset: int
    error: Exception


def rejections(partition: Partition, lost: Unreadable) -> list[Rejected]:
    """Reject each record of a batch that cannot be read; nothing of them can be kept but where they were."""
    reason = Reason.TOO_LARGE if isinstance(lost.error, BatchTooLarge) else Reason.UNDECODABLE
    detail = f"its batch ({lost.offset} to {lost.next_offset - 1}) cannot be read: {describe_error(lost.error)}"
    return [Rejected(partition, offset, reason, detail) for offset in range(lost.offset, lost.next_offset)]


def guard(consumer: KafkaConsumer) -> None:
    """Make `consumer.poll` give Message, and an Unreadable where it would raise; its header names are escaped.

    This replaces a private class of the client, which is why its version is pinned to 3.0.
    """
    consumer._fetcher.PartitionRecords = PartitionRecords


class PartitionRecords(Fetcher.PartitionRecords):
    """What a fetch brought of one partition, as the client's `poll` takes from it."""

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
                if batch.magic < 2:  # such a batch does not say where it ends
                    raise
                # What was given out already is not lost with the rest of the batch.
                first = max(self.next_fetch_offset, batch.base_offset)
                end = max(first + 1, _offset_after(batch, records))
                self.leader_epoch = -1  # its own cannot be believed, and that of the batch before may be too early
                yield Unreadable(first, end, error)
                self.next_fetch_offset = end
                continue
            # What compaction removed at the batch's end is passed as well.
            self.next_fetch_offset = batch.next_offset
        self.drain()

    def _is_skipped(self: Any, batch: Any) -> bool:
        """Tell whether a batch is a mark of a transaction, or written by an aborted one.

        The same as in the client's `_unpack_records`, which keeps it in the middle of what is replaced here.
        """
        self.leader_epoch = batch.leader_epoch
        if self.isolation_level == IsolationLevel.READ_COMMITTED and batch.has_producer_id():
            self._consume_aborted_transactions_up_to(batch.last_offset)
            if self._contains_abort_marker(batch):
                self.aborted_producer_ids.discard(batch.producer_id)
            elif self._is_batch_aborted(batch):
                return True
        return batch.is_control_batch

    def _old_messages(self: Any, batch: Any) -> Iterator[Message]:
        """Give the messages of a batch written before Kafka 0.11, which have no headers.

        They are rare enough to be left to the client, decompression included; KafkaSource gives up after five failures.
        """
        for record in batch:
            self.next_fetch_offset = record.offset + 1
            yield Message(
                record.offset, -1 if record.timestamp is None else record.timestamp, Raw(record.key, record.value)
            )


def _offset_after(batch: Any, records: Any) -> int:
    """Give the offset after a batch that cannot be read.

    A batch that fails its checksum may lie about it: the next batch is believed more, and without one the smaller of
    the two numbers that say how many records the batch has. Too large an offset would lose good records of the next
    batch; too small a one only costs another fetch of this one.
    """
    counted = batch.base_offset + batch.records_count
    if batch.validate_crc():
        return batch.next_offset
    if (following := _next_base_offset(records)) is not None and following > batch.base_offset:
        return min(following, max(batch.next_offset, counted))
    return min(batch.next_offset, counted)


def _next_base_offset(records: Any) -> int | None:
    """Give the first offset of the batch that comes next, if that passes its checksum."""
    if records._next_slice is None:
        return None
    try:
        following = DefaultRecordBatch(records._next_slice)
        return following.base_offset if following.magic == 2 and following.validate_crc() else None
    except (struct.error, IndexError):
        return None


def messages(batch: Any) -> Iterator[Message]:
    """Read a batch of format 2. Raises CorruptRecordError, BatchTooLarge and errors of decompression."""
    buffer = bytes(memoryview(batch._buffer)[batch._pos :])  # bytes give out parts of them in one copy
    if batch.compression_type != batch.CODEC_NONE:
        buffer = inflate(batch.compression_type, buffer)
    base_offset, base_ms, epoch = batch.base_offset, batch.first_timestamp, batch.leader_epoch
    appended_ms = batch.max_timestamp if batch.timestamp_type == batch.LOG_APPEND_TIME else None
    new, end = tuple.__new__, 0  # as Raw(...) and Message(...) do by a call more: 0.4 us for both
    for _ in range(batch.records_count):
        length, start = decode_varint(buffer, end)
        end = start + length
        elapsed_ms, pos = decode_varint(buffer, start + 1)  # after the attributes, which are unused
        offset, pos = decode_varint(buffer, pos)
        key, pos = _field(buffer, pos)
        value, pos = _field(buffer, pos)
        if not pos < end <= len(buffer):
            raise CorruptRecordError(f"record at byte {start} says it ends at {end} of {len(buffer)}, and is at {pos}")
        # As they are written: most records of a topic have the same headers.
        written = buffer[pos : min(end, pos + MAX_HEADER_BYTES + _COUNT_BYTES)]
        headers = _HEADERS.get(written)
        dropped = ""
        if headers is None:
            headers, dropped = _read_headers(written, end - pos)
        timestamp_ms = base_ms + elapsed_ms if appended_ms is None else appended_ms
        raw = new(Raw, (key, value, headers, dropped))
        yield new(Message, (base_offset + offset, timestamp_ms, raw, epoch))


_COUNT_BYTES = 10
"""Longest varint that is read: of the number of headers, which stands before them."""

_HEADERS: Memo[bytes, tuple[tuple[str, bytes | None], ...]] = Memo()
"""Headers, by how they are written in a record."""


def _read_headers(written: bytes, size: int) -> tuple[tuple[tuple[str, bytes | None], ...], str]:
    """Read the headers of a record, which take `size` bytes; none where they are beyond a bound, and then what they
    are. Raises CorruptRecordError."""
    count, pos = decode_varint(written)
    # Both are known before a header is read: 3 million empty ones lie in 1 MB, and take 1.6 GB once they are read.
    if count > MAX_HEADERS or size - pos > MAX_HEADER_BYTES:
        return (), f"{count} headers of {size - pos} bytes"
    headers = []
    for _ in range(count):
        name, pos = _field(written, pos)
        content, pos = _field(written, pos)
        headers.append(((name or b"").decode("utf-8", "backslashreplace"), content))
    if pos != size:
        raise CorruptRecordError(f"a record has headers of {size} bytes that end at byte {pos}")
    return _HEADERS.keep(written, tuple(headers), size), ""


def _field(buffer: bytes, pos: int) -> tuple[bytes | None, int]:
    """Give the field at `pos`, a length and its bytes, and the position after it; None for a negative length."""
    # The length is a zigzag varint. Most are one byte, for which a call of `decode_varint` is saved.
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
    """Decompress `data`; `codec` is Kafka's number of how. Raises BatchTooLarge beyond `limit` bytes."""
    # Every codec is asked for one byte more than allowed, instead of for all there is.
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
    """Decompress the content of a snappy block, or of the Java client's framing: 16 bytes of header, then blocks with
    lengths.
    """
    blocks = [data]
    if data.startswith(b"\x82SNAPPY\x00"):
        blocks, at = [], 16
        while at < len(data):
            (size,) = struct.unpack_from(">i", data, at)
            blocks.append(data[at + 4 : at + 4 + size])
            at += 4 + size
    # python-snappy takes no bound, but a block begins with its decompressed length, a varint of 5 bytes at most.
    announced = 0
    for block in blocks:
        shift = 0
        for byte in block[:5]:
            announced += (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
    if announced > limit:
        raise BatchTooLarge(f"a batch of {len(data)} bytes announces {announced} once decompressed, at most {limit}")
    return b"".join(snappy.decompress(block) for block in blocks)
