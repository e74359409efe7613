"""Samples of unfinished tasks on disk, filled as records arrive: a cache, never the truth.

Images are appended to segment files as they came. A segment is deleted when every sample in it is released, so the disk
in use follows what is not yet committed. Whatever an earlier run left is deleted at the start: the records are read
again from the commit's offsets.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from streams.memo import Memo
from streams.record import Partition, Raw, Record
from streams.source import SpoolError

LEAST = 4096
"""Bytes that a sample counts for at least: a block of most file systems. Each takes 150 bytes of memory too (measured),
so that 2 GiB of images of 40 bytes would be 4 GB of it; counted like this it is a 27th of `max_bytes` at most."""


class Sample(NamedTuple):
    """A sample is one record of a task; its image waits in a segment of the spool."""

    label: str
    partition: Partition
    offset: int
    path: Path
    start: int
    length: int
    """Bytes of the encoded image, which begins at byte `start` of the file `path`."""

    def read(self) -> bytes:
        """Read the encoded image. Raises SpoolError when the segment is gone or shorter than it was."""
        return _read(self.path, self.start, self.length)


class Spool:
    """It keeps the segments in `folder`. Used from one thread.

    It holds about `max_bytes`: nothing is refused beyond them, but `full` asks to stop fetching. A segment of
    `segment_bytes` is closed: smaller ones free the disk sooner, larger ones are fewer files. Raises SpoolError.
    """

    def __init__(self, folder: Path, max_bytes: int, segment_bytes: int = 64 * 2**20):
        self.max_bytes = max_bytes
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._segments: dict[Path, _Segment] = {}
        self._open: _Segment | None = None
        self._number = 0
        self.bytes = 0
        """The bytes of all segments that still hold a sample, each sample counted for LEAST at least."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("*.segment"):  # no others: the folder may be somebody's own
                left.unlink()
        except OSError as error:
            raise self._error(error) from error

    @property
    def full(self) -> bool:
        """Whether the bound is reached."""
        return self.bytes >= self.max_bytes

    def append(self, record: Record) -> Sample:
        """Keep the record's image (and what a late dead letter needs of the message around it).

        The bytes are on disk for other processes after `end_segment`. Raises SpoolError when the disk takes no more.
        """
        # On disk and not in memory, as a task may take an hour and its messages may have large headers.
        around = _NOTHING if record.raw is None else _pack(record.raw, record.image)
        try:
            segment = self._open
            if segment is None or segment.bytes >= self._segment_bytes:
                segment = self._next_segment()
            segment.file.write(record.image)
            segment.file.write(around)
        except OSError as error:
            raise self._error(error) from error
        length = len(record.image)
        sample = Sample(record.label, record.partition, record.offset, segment.path, segment.bytes, length)
        stored = length + len(around)
        counted = stored if stored > LEAST else LEAST
        segment.bytes += stored
        segment.counted += counted
        segment.samples += 1
        self.bytes += counted
        return sample

    def end_segment(self) -> None:
        """Hand everything appended to the operating system; the next sample begins a new segment."""
        # Closed and not fsynced: after a crash of the machine nothing here is used, and the stream is read again.
        segment, self._open = self._open, None
        if segment is not None:
            try:
                segment.file.close()
            except OSError as error:
                raise self._error(error) from error

    def raw(self, sample: Sample) -> Raw:
        """Read the message the sample came in. A record without `raw` has no key, no headers, and the image as value.

        Raises SpoolError like `Sample.read`.
        """
        after = sample.start + sample.length
        (size,) = _LENGTH.unpack(_read(sample.path, after, _LENGTH.size))
        image = sample.read()
        if not size:
            return Raw(None, image)
        return _unpack(_read(sample.path, after + _LENGTH.size, size), image)

    def release(self, samples: Iterable[Sample]) -> None:
        """Forget samples; segments left without one are deleted."""
        for path, count in Counter(sample.path for sample in samples).items():
            segment = self._segments[path]
            segment.samples -= count
            if not segment.samples:
                self._delete(segment)

    def _next_segment(self) -> _Segment:
        self.end_segment()
        self._number += 1  # never used twice: a name stands for the same bytes as long as somebody knows it
        path = self._folder / f"{self._number:08d}.segment"
        # A write for every MiB instead of the usual 8 KiB: images of 20 kB would be a call each.
        self._open = self._segments[path] = _Segment(path, path.open("wb", buffering=2**20))
        return self._open

    def _delete(self, segment: _Segment) -> None:
        if segment is self._open:
            self.end_segment()
        del self._segments[segment.path]
        self.bytes -= segment.counted
        try:
            segment.path.unlink(missing_ok=True)
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> SpoolError:
        return SpoolError(
            f"cannot keep samples in {self._folder}: {error.strerror or error}; make room there or lower"
            " spool.max_bytes and start again. Nothing is lost: records after the last commit are read again"
        )


@dataclass(slots=True)
class _Segment:
    path: Path
    file: BinaryIO
    bytes: int = 0
    counted: int = 0
    samples: int = 0


def _read(path: Path, start: int, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(length)
    except OSError as error:
        raise SpoolError(f"cannot read a sample from {path}: {error.strerror or error}") from error
    if len(data) != length:
        raise SpoolError(f"{path} ends after {start + len(data)} bytes, expected a sample up to {start + length}")
    return data


# After the image stand the size of what follows, then key, value and headers as fields: a length and its bytes.
_LENGTH = struct.Struct("<i")
"""A length. 32 bits are enough: no message is longer than a Kafka request, which has a length of 32 bits itself."""
_NOTHING = _LENGTH.pack(0)
"""In the place of the size: the record came without a message around it."""
_NULL = _LENGTH.pack(-1)
"""In the place of a field: null, which Kafka tells from empty."""
_THE_IMAGE = _LENGTH.pack(-2)
"""In the place of the value: the image itself, as nearly always; it is not written twice."""


def _pack(raw: Raw, image: bytes) -> bytes:
    key = raw.key
    packed = _NULL if key is None else _LENGTH.pack(len(key)) + key
    packed += _THE_IMAGE if raw.value == image else _field(raw.value)
    headers = _PACKED.get(raw.headers)
    if headers is None:
        # Whatever stands in a header name, the letter repeats it.
        pairs = ((name.encode("utf-8", "surrogateescape"), value) for name, value in raw.headers)
        headers = b"".join(_field(part) for pair in pairs for part in pair)
        _PACKED.keep(raw.headers, headers, len(headers))
    return _LENGTH.pack(len(packed) + len(headers)) + packed + headers


_PACKED: Memo[tuple[tuple[str, bytes | None], ...], bytes] = Memo()
"""Headers of messages as they are written."""


def _field(content: bytes | None) -> bytes:
    return _NULL if content is None else _LENGTH.pack(len(content)) + content


def _unpack(packed: bytes, image: bytes) -> Raw:
    fields: list[bytes | None] = []
    at = 0
    while at < len(packed):
        (size,) = _LENGTH.unpack_from(packed, at)
        at += _LENGTH.size
        if size < 0:
            fields.append(None if size == -1 else image)
        else:
            fields.append(packed[at : at + size])
            at += size
    key, value, *headers = fields
    names = [(name or b"").decode("utf-8", "surrogateescape") for name in headers[::2]]
    return Raw(key, value, tuple(zip(names, headers[1::2], strict=True)))
