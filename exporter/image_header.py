"""Looks at an encoded image without decoding it: its format, its size, and what decoding it would take.

It runs in processes that must not die, so nothing here trusts a length that the bytes claim, and no decoder is asked.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats that are decoded, by Pillow's names. Anything else is `unsupported_format`, however well Pillow would do:
each of its forty plugins is code that hostile bytes can reach."""

REASONS = ("empty", "unsupported_format", "undecodable", "truncated", "bomb", "bad_dimensions")
"""Why bytes give no usable image, see ImageError."""

MAX_ASPECT = 100
"""Longer side over shorter side of the narrowest image that is taken. Resizing the shorter side to 224 would make 50
gigapixels of a 1 x 1,000,000 image. The same as in streams.record, which cannot be imported here; a test compares the
two."""

MAX_SCANS = 64
"""Scans of the JPEG with the most that is decoded. Encoders write 1 to 12 (libjpeg's progressive script: 10), each over
all pixels again; 400 scans made 28 s of work out of 316 kB. A larger number gives such files more time."""

MAX_SLOW_VALUES = 2_000_000
"""Values (pixels times channels) of the largest image in a form that Pillow decodes in Python: a plain PPM, a PPM of
unusual depth, a run-length BMP. A value takes up to 0.8 microseconds there, a hundred times what it takes elsewhere."""

MEMORY_BYTES_PER_PIXEL = 11
"""Bytes of memory that a decoder has for each pixel of the largest image that is allowed. Measured with 10 million
pixels: JPEG 8 (progressive 10, of four channels 12), PNG and GIF 9, BMP, PPM and TIFF of 8 bits 8, AVIF 10.4; these may
be as large as allowed, and so may 16-bit grey (11). WebP takes 18, so fewer pixels of it are decoded."""

MEMORY_BYTES = 64 * 2**20
"""Bytes of memory a decoder has beside those for pixels: for the encoded image and what it carries beside its pixels
(Pillow takes up to 64 MB of text). With less, small images of large files fail."""

_JPEG_MARKER = re.compile(rb"\xff[\x01-\xfe]")
"""A marker in a JPEG's header. What is between two segments is skipped, as Pillow and libjpeg do."""

_JPEG_MARKER_IN_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""A marker that ends a scan: neither a stuffed zero nor a restart."""

_JPEG_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
"""Markers of frame headers, of every kind of JPEG."""

_JPEG_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
"""Frame markers of the kinds that refine all pixels scan by scan."""

_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})
"""Markers that no segment follows."""

_JPEG_SEGMENTS = 2000
"""Segments of a JPEG that are looked at. Real files have a dozen, or two for each scan; megabytes of empty ones would
take seconds to walk."""

_JPEG_JUNK = 64 * 1024
"""Bytes without a marker that are skipped in a JPEG's header. Real files have none, or a few to fill up."""

_JPEG_WALK = 16 * 2**20
"""Bytes of a JPEG in which scans are looked for one by one, where that is necessary: 2 ms for each MB, 15 ms where that
is made to be slow. Scans beyond are left to the decoder's limit of time."""

_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Channels of each colour type of a PNG."""

_AVIF_BRANDS = (b"avif", b"avis", b"mif1", b"msf1")
"""Brands of the files that Pillow's AVIF plugin takes."""

_AVIF_SIZE = b"\0\0\0\x14ispe"
"""The beginning of an AVIF property box that holds an image's width and height."""

_AVIF_BOXES = 256
"""Such boxes that are looked at: one for each tile of the image, its alpha and its thumbnails."""

_TIFF_TAGS = {256: "width", 257: "height", 258: "bits", 277: "channels"}
"""Numbers of the tags of a TIFF that are looked at."""

_TIFF_CODES = {1: "B", 3: "H", 4: "I", 16: "Q"}
"""Types of whole numbers in a TIFF, and how `struct` names them."""

_TIFF_ENTRIES = 1000
"""Tags of a TIFF that are looked at. They are sorted by number, and the ones wanted are among the first."""

_PPM = re.compile(rb"P([1-6])" + 3 * rb"(?:(?:\s|#[^\r\n]*[\r\n])++(\d{1,10}))?")
"""Magic number, width, height and largest value of a PPM (a bitmap has no such value), with comments between them."""

_PPM_HEADER = 64 * 1024
"""Bytes within which the header of a PPM must end, comments included. Pillow reads them one by one."""

_OUTSIDE = (struct.error, IndexError, OverflowError)
"""What reading outside of the data raises; the last for places beyond 64 bits."""


class ImageError(Exception):
    """Bytes that give no usable image."""

    def __init__(self, reason: str, detail: str) -> None:
        """`reason`: one of REASONS; `bomb` is for more pixels, memory or time than allowed, `bad_dimensions` for sides
        that differ too much. `detail`: what was found."""
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Header:
    """What an encoded image says about itself."""

    format: str
    """One of FORMATS."""
    width: int
    """Pixels in a row, as stored: the image may have to be turned."""
    height: int
    channels: int = 3
    """Values of a pixel in the file; a palette's index is one."""
    bits: int = 8
    """Bits of a value."""
    scans: int = 1
    """Scans of a JPEG, or one more than are allowed; 1 for other formats."""
    keeps_coefficients: bool = False
    """Whether a decoder must hold all of a JPEG's coefficients, because more than one scan writes to them."""
    slow: bool = False
    """Whether Pillow decodes it in Python, value by value."""

    @property
    def pixels(self) -> int:
        """Number of pixels of the (first) frame."""
        return self.width * self.height

    @property
    def memory_bytes(self) -> int:
        """Bytes that the pixels take at the most while they are decoded, about, see MEMORY_BYTES_PER_PIXEL."""
        if self.format == "JPEG":
            # Pillow's pixels take 4 bytes, and a turned copy as many; a coefficient takes 2.
            return self.pixels * max(8, 4 + 2 * self.channels * self.keeps_coefficients)
        if self.format == "WEBP":
            return self.pixels * 18  # two canvases, a frame, and Pillow's pixels
        if self.format == "AVIF":
            return self.pixels * (11 if self.bits <= 8 else 17)  # deep planes take 2 bytes a value, twice
        return self.pixels * (9 + (self.channels if self.format == "TIFF" else 0))  # a strip may be all of the image


def memory_limit(max_pixels: int) -> int:
    """Bytes of memory a decoder has for an image where `max_pixels` are allowed."""
    return MEMORY_BYTES + MEMORY_BYTES_PER_PIXEL * max_pixels


def check_header(data: bytes, max_pixels: int) -> Header:
    """Read the header of an encoded image, and refuse an image that must not be decoded.

    Takes some microseconds, and a few milliseconds for megabytes made to be slow. Raises ImageError with a reason:
    `empty`; `unsupported_format` for what does not begin like one of FORMATS; `truncated` or `undecodable` for a header
    that ends early or is broken; `bad_dimensions` for a side of 0 or sides that differ more than MAX_ASPECT times;
    `bomb` for more than `max_pixels` pixels, more than MAX_SCANS scans, more than MAX_SLOW_VALUES values that are
    decoded slowly, or more memory than `memory_limit`.
    """
    if not data:
        raise ImageError("empty", "got 0 bytes, expected an encoded image")
    try:
        header = _read(data)
    except _OUTSIDE:
        raise ImageError("truncated", f"{len(data)} bytes end inside the image's header") from None
    width, height = header.width, header.height
    if width <= 0 or height <= 0 or max(width, height) > MAX_ASPECT * min(width, height):
        detail = f"{width} x {height} pixels; sides from 1, one at most {MAX_ASPECT} times the other"
        raise ImageError("bad_dimensions", detail)
    if header.pixels > max_pixels:
        raise ImageError("bomb", f"{width} x {height} pixels, at most {max_pixels} are decoded")
    if header.scans > MAX_SCANS:
        raise ImageError("bomb", f"the JPEG has more than {MAX_SCANS} scans")
    if header.slow and header.pixels * header.channels > MAX_SLOW_VALUES:
        detail = f"{width} x {height} pixels in a rare form of {header.format}, at most {MAX_SLOW_VALUES} values"
        raise ImageError("bomb", detail)
    copies = 3 if header.format == "WEBP" else 1  # of the encoded image; Pillow's WebP plugin makes two
    needed, given = header.memory_bytes + copies * len(data), memory_limit(max_pixels)
    if needed > given:
        detail = f"{width} x {height} pixels take {needed >> 20} MiB to decode, at most {given >> 20} MiB are used"
        raise ImageError("bomb", detail)
    return header


def _read(data: bytes) -> Header:
    """The header by the format that the first bytes tell. Raises one of _OUTSIDE where the data ends too early."""
    if data.startswith(b"\xff\xd8\xff"):
        return _read_jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        kind, width, height, bits, colour = struct.unpack_from(">4sIIBB", data, 12)
        if kind != b"IHDR":
            raise ImageError("undecodable", f"PNG begins with chunk {kind!r}, not IHDR")
        return Header("PNG", width, height, _PNG_CHANNELS.get(colour, 4), bits)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _read_webp(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        width, height = struct.unpack_from("<HH", data, 6)
        return Header("GIF", width, height, 1)
    if data.startswith(b"BM"):
        return _read_bmp(data)
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return _read_tiff(data)
    if data[:1] == b"P" and data[1:2] in b"123456":
        return _read_ppm(data)
    if data[4:8] == b"ftyp" and data[8:12] in _AVIF_BRANDS:
        return _read_avif(data)
    found = f"{len(data)} bytes beginning with {data[:12]!r}"
    raise ImageError("unsupported_format", f"{found}, expected one of {', '.join(FORMATS)}")


def _read_jpeg(data: bytes) -> Header:
    at = 2
    for _ in range(_JPEG_SEGMENTS):
        marker, at = _next_marker(_JPEG_MARKER, data, at, at + _JPEG_JUNK)
        if marker in _JPEG_FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 2)
            scans = _count_scans(data, at)
            several = marker in _JPEG_PROGRESSIVE or scans > 1
            return Header("JPEG", width, height, channels, bits, scans, several)
        if marker in (0xD9, 0xDA):
            raise ImageError("undecodable", "JPEG has no frame header before its pixels")
        if marker not in _JPEG_BARE:
            at += data[at] << 8 | data[at + 1]
    raise ImageError("undecodable", f"JPEG has no frame header in its first {_JPEG_SEGMENTS} segments")


def _next_marker(pattern: re.Pattern[bytes], data: bytes, at: int, end: int) -> tuple[int, int]:
    """The next marker between `at` and `end`, and where it ends. Raises IndexError when there is none."""
    found = pattern.search(data, at, end)
    if found is None:
        raise IndexError
    return data[found.start() + 1], found.end()


def _count_scans(data: bytes, at: int) -> int:
    """Scans of a JPEG from its frame header at `at` on, or MAX_SCANS + 1 if there are more."""
    # Where no such bytes are, no scan begins. They may also be part of a thumbnail, or of a film after the image.
    possible = data.count(b"\xff\xda", at)
    if possible <= MAX_SCANS:
        return possible
    scans, end = 0, at + _JPEG_WALK
    for _ in range(_JPEG_SEGMENTS):
        try:
            marker, at = _next_marker(_JPEG_MARKER_IN_SCAN, data, at, end)
            if marker not in _JPEG_BARE and marker != 0xD9:
                at += data[at] << 8 | data[at + 1]
        except IndexError:  # what is there counts
            return scans
        scans += marker == 0xDA
        if marker == 0xD9 or scans > MAX_SCANS:
            return scans
    return MAX_SCANS + 1


def _read_webp(data: bytes) -> Header:
    (size,) = struct.unpack_from("<I", data, 4)
    if size + 8 > len(data):
        raise ImageError("truncated", f"WEBP of {size + 8} bytes ends after {len(data)}")
    kind = data[12:16]
    if kind == b"VP8X":
        canvas = struct.unpack_from("<HBHB", data, 24)
        width, height = (low + (high << 16) + 1 for low, high in (canvas[:2], canvas[2:]))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        raise ImageError("undecodable", f"WEBP begins with chunk {kind!r}")
    return Header("WEBP", width, height, 4)


def _read_bmp(data: bytes) -> Header:
    (header_size,) = struct.unpack_from("<I", data, 14)
    if header_size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        return Header("BMP", width, height, max(1, bits // 8))
    width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    return Header("BMP", width, abs(height), max(1, bits // 8), slow=compression in (1, 2))


def _read_tiff(data: bytes) -> Header:
    order = "<" if data.startswith(b"II") else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    first, count, entry, number = (8, "Q", "HHQ", "Q") if big else (4, "H", "HHI", "I")
    inline = struct.calcsize(number)
    (at,) = struct.unpack_from(order + number, data, first)
    (entries,) = struct.unpack_from(order + count, data, at)
    at += struct.calcsize(count)
    found: dict[str, int] = {}
    for _ in range(min(entries, _TIFF_ENTRIES)):
        try:
            tag, kind, values = struct.unpack_from(order + entry, data, at)
            at += struct.calcsize("=" + entry)
            code = _TIFF_CODES.get(kind)
            if tag in _TIFF_TAGS and code:
                place = at
                if values * struct.calcsize(code) > inline:
                    (place,) = struct.unpack_from(order + number, data, at)
                (value,) = struct.unpack_from(order + code, data, place)
                found.setdefault(_TIFF_TAGS[tag], value)  # of a tag that comes twice Pillow takes the first
        except _OUTSIDE:  # a tag outside of the data, which Pillow passes over
            pass
        at += inline
    if "width" not in found or "height" not in found:
        raise ImageError("undecodable", "TIFF does not say how large its image is")
    return Header("TIFF", found["width"], found["height"], found.get("channels", 1), found.get("bits", 1))


def _read_ppm(data: bytes) -> Header:
    found = _PPM.match(data[:_PPM_HEADER])
    kind, width, height, largest = found.groups() if found else (b"", None, None, None)
    bitmap = kind in b"14"
    if width is None or height is None or (largest is None and not bitmap):
        raise ImageError("undecodable", f"PPM has no complete header in its first {_PPM_HEADER} bytes")
    most = 1 if bitmap else int(largest or 0)
    deep = most > 255
    raw = kind == b"4" or (kind in b"56" and most == 255) or (kind == b"5" and most == 65535)
    return Header("PPM", int(width), int(height), 3 if kind in b"36" else 1, 16 if deep else 8, slow=not raw)


def _read_avif(data: bytes) -> Header:
    sizes: list[tuple[int, int]] = []
    at = data.find(_AVIF_SIZE)
    while at >= 0 and len(sizes) < _AVIF_BOXES:
        width, height = struct.unpack_from(">II", data, at + len(_AVIF_SIZE) + 4)  # four bytes of version and flags
        sizes.append((width, height))
        at = data.find(_AVIF_SIZE, at + 1)
    if not sizes:
        raise ImageError("undecodable", "AVIF does not say how large its image is")
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    codec = data.find(b"av1C")
    deep = codec >= 0 and bool(data[codec + 6] & 0x40)
    return Header("AVIF", width, height, 4, 12 if deep else 8)
