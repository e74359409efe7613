"""What a stream carries: a record, a rejected record or a control mark, each with its position.

Images stay encoded bytes. Nothing here touches a network, a disk or a tensor.
"""

from __future__ import annotations

import enum
import re
import struct
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple


class Partition(NamedTuple):
    """A partition is one ordered log: partition `number` of `topic`. An archive is one topic with the single partition
    0.
    """

    topic: str
    number: int
    """From 0."""


Offsets = Mapping[Partition, int]
"""Next offset to read for every partition: what follows everything that was learned, held out or set aside."""


class Reason(enum.StrEnum):
    """Why a record cannot be used: the label of a metric and a header of a dead letter.

    The list is closed, as a metric must not get a series for every text somebody writes. deploy/wire-format.md says
    what each means; exporter.instruments repeats the list, and a test compares the two.
    """

    EMPTY = "empty"
    TOO_LARGE = "too_large"
    BAD_ENVELOPE = "bad_envelope"
    BAD_SCHEMA = "bad_schema"
    MISSING_LABEL = "missing_label"
    LABEL_TYPE = "label_type"
    UNDECODABLE = "undecodable"
    TRUNCATED = "truncated"
    BOMB = "bomb"
    BAD_DIMENSIONS = "bad_dimensions"
    UNSUPPORTED_FORMAT = "unsupported_format"
    FETCH_FAILED = "fetch_failed"
    FETCH_FORBIDDEN = "fetch_forbidden"
    TASK_FAILED = "task_failed"


MESSAGE_OVERHEAD = 500
"""Bytes of memory for the Python objects around a message. Measured: 354 for a message and its record; the rest is for
the queues they wait in. Without it small messages would take many times the memory they are counted for."""

_HEADER_OVERHEAD = 150
"""Bytes of memory for the Python objects of a header. Measured: 152 to 166."""


MAX_HEADERS = 256
"""Headers of a message that are read. Messages have a dozen as a rule; without a bound one message of 1 MB had
3 million empty ones, which took 1.6 GB of memory. A poll of a thousand messages with 256 each takes 40 MB."""

MAX_HEADER_BYTES = 64 * 2**10
"""Bytes of a message's headers, names and lengths included, that are read. Chosen by hand, what web servers allow at
the most: no image belongs there, and labels and URLs take a few hundred."""

MAX_KEY_BYTES = 64 * 2**10
"""Bytes of a usable record's key, which is kept with it on disk until it is learned. Chosen by hand; keys have a few
dozen as a rule."""


class Raw(NamedTuple):
    """The message as it came, kept so that a dead letter can carry it unchanged."""

    # This and a record are tuples, as one of each is made for every message: in half the time of a frozen dataclass.

    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()
    dropped: str = ""
    """What was not read because it is beyond a bound, as a text for people; such a message is never a record."""

    @property
    def header_bytes(self) -> int:
        """The bytes of the headers' names (in characters) and values."""
        size = 0
        for name, value in self.headers:
            size += len(name) + len(value or b"")
        return size

    @property
    def memory_bytes(self) -> int:
        """The bytes that the message takes in memory, about: what it carries, and the objects around it."""
        around = MESSAGE_OVERHEAD + _HEADER_OVERHEAD * len(self.headers) + self.header_bytes
        return around + len(self.key or b"") + len(self.value or b"")


class Record(NamedTuple):
    """A record is one labelled image with its position; `image` is still encoded (JPEG, PNG, ...)."""

    partition: Partition
    offset: int
    label: str
    """The canonical class name (see `canonical_label`)."""
    image: bytes
    timestamp_s: float | None = None
    """When the record was produced, seconds since the epoch; None when the stream does not say."""
    raw: Raw | None = None
    """What a dead letter must repeat beside the image: the headers or envelope around it, the path of its file."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that cannot be used: counted, dead-lettered, never fatal."""

    partition: Partition
    offset: int
    reason: Reason
    detail: str
    raw: Raw | None = None


class ControlKind(enum.StrEnum):
    """What a mark says; the values are those of the wire format."""

    TASK_BOUNDARY = "task-boundary"
    FLUSH = "flush"


@dataclass(frozen=True, slots=True)
class Control:
    """A mark in the stream that is not an image: ends the task before it (both kinds cut; `flush` also at the end)."""

    partition: Partition
    offset: int
    kind: ControlKind


Item = Record | Rejected | Control
"""What a source hands out."""


MAX_DETAIL_CHARS = 1000
"""Characters of a rejection's detail. It may repeat what a producer sent, which has no bound, and it waits in memory,
in the status page and in dead letters. Chosen by hand: some ten lines."""


class Unusable(Exception):
    """A label or an image that makes its record `Rejected`: carries the `reason` and a `detail` for the dead letter."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(f"{reason}: {detail[:MAX_DETAIL_CHARS]}")
        self.reason = reason
        self.detail = detail[:MAX_DETAIL_CHARS]


class Unreachable(Exception):
    """The store of images does not answer: nothing is known of the image, which may be had later."""


LABEL_BYTES_PER_CHAR = 12
"""Raw bytes (of text: characters) of a label for each one it may have once it is canonical. A composed character has up
to 9 before (three parts of a Korean syllable), and white space is removed. Before it is bounded nothing is done with a
label: to put 88 kB of combining marks in order took 3.6 s, with all threads standing still."""


def canonical_label(raw: str | bytes, max_chars: int) -> str:
    """Give the class name that `raw` means: NFC, no space at the ends, every run of white space inside is one space.

    Case is kept: which of two spellings counts is for the buffer, which knows the one seen first. Raises `Unusable`:
    MISSING_LABEL when nothing is left, LABEL_TYPE for what is not UTF-8, has control characters, more than `max_chars`
    characters, or more than LABEL_BYTES_PER_CHAR times as many before it is looked at.
    """
    if len(raw) > max_chars * LABEL_BYTES_PER_CHAR:
        most = max_chars * LABEL_BYTES_PER_CHAR
        raise Unusable(Reason.LABEL_TYPE, f"label of {len(raw)} bytes or characters, at most {most}: {raw[:80]!r}...")
    return _canonical(raw, max_chars)


@lru_cache(maxsize=4096)
def _canonical(raw: str | bytes, max_chars: int) -> str:
    # Cached, as a stream has few class names and many records: 0.1 microseconds instead of 1.4.
    try:
        text = raw.decode() if isinstance(raw, bytes) else raw
        text.encode()
    except UnicodeError:
        raise Unusable(Reason.LABEL_TYPE, f"label {raw[:80]!r} is not UTF-8 text") from None
    label = " ".join(unicodedata.normalize("NFC", text).split())
    if not label:
        raise Unusable(Reason.MISSING_LABEL, f"label {raw[:80]!r} is empty")
    if len(label) > max_chars:
        raise Unusable(Reason.LABEL_TYPE, f"label of {len(label)} characters, at most {max_chars}: {label[:80]!r}...")
    if any(unicodedata.category(c) == "Cc" for c in label):
        raise Unusable(Reason.LABEL_TYPE, f"label {label[:80]!r} has control characters")
    return label


MAX_ASPECT = 100
"""Longest over shortest side. Beyond it the resize of the shortest side to the model's input is itself a bomb: at 224
pixels a needle of 1 x 500,000 would become one of 224 x 112,000,000. Chosen by hand, far beyond any panorama.
The same as in exporter.image_header, which cannot be imported here; a test compares the two."""

_JPEG_SEGMENTS = 2000
"""Segments that are walked to find the frame header. Real files have a dozen; to walk megabytes of empty ones would
take seconds."""


def check_image(data: bytes, max_bytes: int, max_pixels: int) -> None:
    """Look at the first bytes of an encoded image and raise `Unusable` when it cannot or must not be decoded.

    Takes some microseconds, and a few milliseconds for megabytes made to be slow, and decodes nothing: what only a
    decoder finds (a cut or damaged body) passes. The format is known by content: JPEG, PNG, WEBP, GIF,
    BMP, TIFF, PPM or AVIF. Reasons: EMPTY, TOO_LARGE (more than `max_bytes`), UNSUPPORTED_FORMAT, TRUNCATED or
    UNDECODABLE (no complete, sensible header),
    BAD_DIMENSIONS (a side is 0, or one is more than MAX_ASPECT times the other), BOMB (more than `max_pixels`, or
    work or memory out of all proportion: see `_check_cost`).
    """
    if not data:
        raise Unusable(Reason.EMPTY, "no bytes")
    if len(data) > max_bytes:
        raise Unusable(Reason.TOO_LARGE, f"{len(data)} bytes, at most {max_bytes}")
    try:
        width, height, frame = _dimensions(data)
    except _OUTSIDE:
        raise Unusable(Reason.TRUNCATED, f"{len(data)} bytes end inside the image's header") from None
    if width <= 0 or height <= 0 or max(width, height) > MAX_ASPECT * min(width, height):
        detail = f"{width} x {height} pixels; sides from 1, one at most {MAX_ASPECT} times the other"
        raise Unusable(Reason.BAD_DIMENSIONS, detail)
    if width * height > max_pixels:
        raise Unusable(Reason.BOMB, f"{width} x {height} pixels, at most {max_pixels} in all")
    _check_cost(data, width * height, frame, max_pixels)


MAX_SCANS = 64
"""Scans of a JPEG. Encoders write 1 to 12 (libjpeg's progressive script: 10), each over all pixels again; 400 scans
made 28 s of work out of 316 kB. As in exporter.image_header, which cannot be imported here."""

_MAX_SLOW_VALUES = 2_000_000
"""Values (pixels times channels) of an image that Pillow decodes in Python, about a microsecond each: plain PPM and
run-length BMP."""

_USUAL_BYTES, _WEBP_BYTES = 11, 18
"""Bytes of memory for a pixel while it is decoded, measured: of other formats at most, of WEBP. That may have fewer
pixels, so that no image takes more memory than the largest of the others."""

_SPARE_BYTES = 64 * 2**20
"""Bytes of memory that any image may take, whatever `max_pixels` is."""

_JPEG_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
"""Markers of the frames that are refined scan by scan."""

_JPEG_SEGMENT = frozenset(0xFF00 | marker for marker in {*range(0xC0, 0xD0), *range(0xD9, 0xFF)})
"""Markers of a JPEG that the length of a segment follows, and the one of its end."""

_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""A marker of a JPEG that ends a scan: neither a stuffed zero nor a restart."""


def _check_cost(data: bytes, pixels: int, frame: int, max_pixels: int) -> None:
    """Raise Unusable with BOMB for an image that takes far more work or memory than others of its size. `frame` is
    where the frame header of a JPEG begins, or 0 where its scans are no matter."""
    if frame:
        if _jpeg_scans(data, frame) > MAX_SCANS:
            raise Unusable(Reason.BOMB, f"JPEG of more than {MAX_SCANS} scans")
        return
    slow = data[:2] in (b"P1", b"P2", b"P3") or (data[:2] == b"BM" and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0"))
    if slow and pixels * (3 if data[:2] == b"P3" else 1) > _MAX_SLOW_VALUES:
        raise Unusable(Reason.BOMB, f"{pixels} pixels in a rare form, at most {_MAX_SLOW_VALUES} values of it")
    most = _SPARE_BYTES + _USUAL_BYTES * max_pixels
    if data.startswith(b"RIFF") and pixels * _WEBP_BYTES > most:
        detail = f"{pixels} pixels of {_WEBP_BYTES} bytes of memory each to decode, at most {most} in all"
        raise Unusable(Reason.BOMB, detail)


def _jpeg_scans(data: bytes, at: int) -> int:
    """Scans that are decoded of a JPEG whose frame header is at `at`, or MAX_SCANS + 1 if there are more, or too many
    segments to tell."""
    scans, components, progressive = 0, 0, False
    last = len(data) - 10
    for _ in range(_JPEG_SEGMENTS):
        # As a rule one segment follows upon the other, and nothing has to be searched.
        marker, length = _JPEG_HEAD.unpack_from(data, at) if at <= last else (0, 0)
        if marker in _JPEG_TABLES:
            at += 2 + length
            continue
        if marker in _JPEG_SEGMENT:
            at += 2
            marker &= 0xFF
        else:
            found = _JPEG_MARKER.search(data, at)
            if found is None or found.end() + 8 > len(data):
                return scans
            marker, at = data[found.start() + 1], found.end()
        if marker in _JPEG_FRAMES:
            components, progressive = data[at + 7], marker in _JPEG_PROGRESSIVE
        elif marker == 0xDA:
            # One scan over all components is decoded in one pass, and what follows is never looked at.
            if not scans and not progressive and data[at + 2] >= components:
                return 1
            # Where no such bytes are no scan begins; they may also be part of a film after the image.
            if not scans and (possible := data.count(b"\xff\xda", at)) < MAX_SCANS:
                return possible + 1
            scans += 1
        if marker == 0xD9 or scans > MAX_SCANS:
            return scans
        if marker not in (0x01, 0xD8):
            at += data[at] << 8 | data[at + 1]
    return MAX_SCANS + 1


_PNG = b"\x89PNG\r\n\x1a\n"
"""First bytes of a PNG."""

_JPEG_TABLES = frozenset(0xFF00 | marker for marker in {0xC4, 0xC8, 0xCC, *range(0xDB, 0xFF), *range(0x02, 0xC0)})
"""Markers of a JPEG's segments before its frame header: tables, comments, EXIF."""

_JPEG_HEAD = struct.Struct(">HH")
"""A marker and the length of its segment; also the height and width of a JPEG."""

_USUAL_JPEG = re.compile(
    rb"\xff\xd8(?:\xff\xe0\x00\x10.{14})?"  # JFIF
    rb"(?:\xff\xdb(?:\x00\x43.{65}|\x00\x84.{130})){1,4}+"  # tables of quantization, one or two in a segment
    rb"\xff[\xc0\xc1]\x00\x11.(.{4})\x03.{9}"  # sequential frame of three components: height, width
    rb"(?:\xff\xc4(?:\x00\x1f.{29}|\x00\xb5.{179}|\x01\xa2.{416})){1,4}+"  # the Huffman tables of the standard
    rb"\xff\xda\x00\x0c\x03",  # one scan of all components
    re.DOTALL,
)
"""The beginning of a JPEG as most encoders write it where nobody asks for more. What it says is what `_jpeg_frame` and
`_jpeg_scans` would find, in a fifth of the time: 0.4 instead of 1.9 us for every record."""

_OUTSIDE = (struct.error, IndexError, OverflowError)
"""What reading outside of the data raises; the last for places beyond 64 bits."""

_JPEG_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
"""Markers of a JPEG's frame headers (SOF0 to SOF15); the three left out are tables and extensions among them."""


def _dimensions(data: bytes) -> tuple[int, int, int]:
    """Give the width and height from the header, and where the frame header of a JPEG begins whose scans are not known
    to be one (0 for all others).

    What is in _OUTSIDE means that the data ends too early.
    """
    if usual := _USUAL_JPEG.match(data):
        height, width = _JPEG_HEAD.unpack_from(data, usual.start(1))
        return width, height, 0
    if data.startswith(b"\xff\xd8\xff"):
        frame = _jpeg_frame(data)
        height, width = _JPEG_HEAD.unpack_from(data, frame + 5)
        return width, height, frame
    return *_other_dimensions(data), 0


def _other_dimensions(data: bytes) -> tuple[int, int]:
    # By hand, as this is done for every record: one or two microseconds, where Pillow takes 12 (PNG) to 100 (WEBP),
    # and up to seconds for what is made to be slow. exporter.image_header, which cannot be imported here, has the same
    # rules; a test compares the two.
    if data.startswith(_PNG):
        kind, width, height = struct.unpack_from(">4sII", data, 12)
        if kind != b"IHDR":
            raise Unusable(Reason.UNDECODABLE, f"PNG begins with chunk {kind!r}, not IHDR")
        return width, height
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp_dimensions(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        width, height = struct.unpack_from("<HH", data, 6)
        return width, height
    if data.startswith(b"BM"):
        (header_size,) = struct.unpack_from("<I", data, 14)  # 12 is OS/2's header, with sides of 16 bits
        width, height = struct.unpack_from("<HH" if header_size == 12 else "<ii", data, 18)
        return width, abs(height)  # negative: the rows come from the top
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return _tiff_dimensions(data)
    if data[:1] == b"P" and data[1:2] in b"123456":
        return _ppm_dimensions(data)
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis", b"mif1", b"msf1"):
        return _avif_dimensions(data)
    found = f"begins with {data[:12]!r}"
    raise Unusable(Reason.UNSUPPORTED_FORMAT, f"{found}; expected JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM or AVIF")


def _jpeg_frame(data: bytes) -> int:
    """Find where the frame header of a JPEG begins, with its marker."""
    at = 2
    for _ in range(_JPEG_SEGMENTS):
        marker, length = _JPEG_HEAD.unpack_from(data, at)
        if marker in _JPEG_TABLES:
            at += 2 + length
            continue
        if marker >> 8 != 0xFF:
            raise Unusable(Reason.UNDECODABLE, f"JPEG has no marker at byte {at}")
        marker &= 0xFF
        if marker in _JPEG_FRAMES:
            return at
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in (0x00, 0xD9, 0xDA):
            raise Unusable(Reason.UNDECODABLE, "JPEG has no frame header before its pixels")
        else:  # markers without a segment
            at += 2
    raise Unusable(Reason.UNDECODABLE, f"JPEG has no frame header in its first {_JPEG_SEGMENTS} segments")


def _webp_dimensions(data: bytes) -> tuple[int, int]:
    (size,) = struct.unpack_from("<I", data, 4)
    if size + 8 > len(data):
        raise Unusable(Reason.TRUNCATED, f"WEBP of {size + 8} bytes ends after {len(data)}")
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        raise Unusable(Reason.UNDECODABLE, f"WEBP begins with chunk {kind!r}")
    return width, height


_TIFF_SIDES = (256, 257)
"""Tags of a TIFF that hold its width and height."""

_TIFF_CODES = {1: "B", 3: "H", 4: "I", 16: "Q"}
"""Types of whole numbers in a TIFF, and how `struct` names them."""

_TIFF_TAGS = 1000
"""Tags of a TIFF that are looked at. They are sorted by number, and the two wanted are among the first. Pillow reads
all: 65,535 took it 0.6 s, in the agent's own loop."""


def _tiff_dimensions(data: bytes) -> tuple[int, int]:
    order = "<" if data.startswith(b"II") else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    first, count, entry, number = (8, "Q", "HHQ", "Q") if big else (4, "H", "HHI", "I")
    (at,) = struct.unpack_from(order + number, data, first)
    (tags,) = struct.unpack_from(order + count, data, at)
    at += struct.calcsize(count)
    size = struct.calcsize("=" + entry + number)
    sides: dict[int, int] = {}
    for tag_at in range(at, at + size * min(tags, _TIFF_TAGS), size):
        try:
            tag, kind, values = struct.unpack_from(order + entry, data, tag_at)
            code = _TIFF_CODES.get(kind)
            if tag in _TIFF_SIDES and code:
                place = tag_at + struct.calcsize("=" + entry)
                if values * struct.calcsize(code) > struct.calcsize(number):
                    (place,) = struct.unpack_from(order + number, data, place)
                (value,) = struct.unpack_from(order + code, data, place)
                sides.setdefault(tag, value)  # of a tag that comes twice Pillow takes the first
        except _OUTSIDE:  # a tag outside of the data, which Pillow passes over
            pass
    if len(sides) < 2:
        raise Unusable(Reason.UNDECODABLE, "TIFF does not say how large its image is")
    return sides[256], sides[257]


_PPM = re.compile(rb"P([1-6])" + 3 * rb"(?:(?:\s|#[^\r\n]*[\r\n])++(\d{1,10}))?")
"""Magic number, width, height and largest value of a PPM (a bitmap has no such value), with comments between them."""

_PPM_HEADER = 64 * 1024
"""Bytes within which the header of a PPM must end, comments included."""


def _ppm_dimensions(data: bytes) -> tuple[int, int]:
    found = _PPM.match(data[:_PPM_HEADER])
    kind, width, height, largest = found.groups() if found else (b"", None, None, None)
    if width is None or height is None or (largest is None and kind not in b"14"):
        raise Unusable(Reason.UNDECODABLE, f"PPM has no complete header in its first {_PPM_HEADER} bytes")
    return int(width), int(height)


_AVIF_SIZE = b"\0\0\0\x14ispe"
"""The beginning of an AVIF property box that holds an image's width and height."""

_AVIF_BOXES = 256
"""Such boxes that are looked at: one for each tile of the image, its alpha and its thumbnails."""


def _avif_dimensions(data: bytes) -> tuple[int, int]:
    sizes: list[tuple[int, int]] = []
    at = data.find(_AVIF_SIZE)
    while at >= 0 and len(sizes) < _AVIF_BOXES:
        width, height = struct.unpack_from(">II", data, at + len(_AVIF_SIZE) + 4)  # four bytes of version and flags
        sizes.append((width, height))
        at = data.find(_AVIF_SIZE, at + 1)
    if not sizes:
        raise Unusable(Reason.UNDECODABLE, "AVIF does not say how large its image is")
    return max(sizes, key=lambda size: size[0] * size[1])
