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
from typing import Any

import lz4.frame  # type: ignore[import-untyped]
import snappy  # type: ignore[import-untyped]
import zstandard
from kafka import KafkaConsumer
from kafka.consumer.fetcher import Fetcher
from kafka.errors import CorruptRecordError
from kafka.record.default_records import DefaultRecord, DefaultRecordBatch
from kafka.record.util import decode_varint

MAX_INFLATED = 128 * 2**20
"""Bytes a batch may have once decompressed. A producer's batches have 1 MiB or less, and images hardly compress."""


class BatchTooLarge(Exception):
    """The batch would take more than MAX_INFLATED bytes of memory."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """In the place of messages: the records of a batch from `offset` up to `next_offset` cannot be had."""

    offset: int
    next_offset: int
    error: Exception


def guard(consumer: KafkaConsumer) -> None:
    """Make `consumer.poll` give an `Unreadable` where it would raise, and header names not in UTF-8 escaped."""
    consumer._fetcher.PartitionRecords = _PartitionRecords


class _PartitionRecords(Fetcher.PartitionRecords):
    def _unpack_records(self: Any, tp: Any, records: Any, *deserializers: Any) -> Iterator[Any]:
        batches = _Batches(records)
        while True:
            try:
                yield from Fetcher.PartitionRecords._unpack_records(self, tp, batches, *deserializers)
                return
            except Exception as error:
                batch = batches.last
                if batch is None or batch.next_offset <= self.next_fetch_offset:
                    raise
                lost = Unreadable(max(self.next_fetch_offset, batch.base_offset), batch.next_offset, error)
                self.next_fetch_offset = batch.next_offset
                yield lost


class _Batches:
    """The batches of a fetch response for one partition, each a `_Batch`."""

    def __init__(self, records: Any) -> None:
        self._records = records
        self.last: Any = None

    def next_batch(self) -> Any:
        batch = self._records.next_batch()
        if type(batch) is DefaultRecordBatch:
            batch.__class__ = _Batch
        if batch is not None:
            self.last = batch
        return batch


class _Batch(DefaultRecordBatch):
    __slots__ = ()

    def _maybe_uncompress(self: Any) -> None:
        if self._decompressed:
            return
        data = bytes(memoryview(self._buffer)[self._pos :])  # bytes give out parts of them in one copy
        self._buffer = data if self.compression_type == self.CODEC_NONE else inflate(self.compression_type, data)
        self._pos = 0
        self._decompressed = True

    def _read_msg(self: Any, decode_varint: Any = decode_varint) -> DefaultRecord:
        if self.is_control_batch:
            return DefaultRecordBatch._read_msg(self)
        buffer = self._buffer
        length, start = decode_varint(buffer, self._pos)
        elapsed, pos = decode_varint(buffer, start + 1)
        offset, pos = decode_varint(buffer, pos)
        key, pos = _field(buffer, pos)
        value, pos = _field(buffer, pos)
        count, pos = decode_varint(buffer, pos)
        headers = []
        for _ in range(count):
            name, pos = _field(buffer, pos)
            content, pos = _field(buffer, pos)
            headers.append(((name or b"").decode("utf-8", "backslashreplace"), content))
        if pos - start != length:
            raise CorruptRecordError(f"record says it has {length} bytes and has {pos - start}")
        self._pos = pos
        timestamp = self.first_timestamp + elapsed
        if self.timestamp_type == self.LOG_APPEND_TIME:
            timestamp = self.max_timestamp
        return DefaultRecord(length, self.base_offset + offset, timestamp, self.timestamp_type, key, value, headers)


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
