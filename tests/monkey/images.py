"""Images changed where a decoder looks: each gives pixels or a known reason, in bounded time and memory.

`python -m tests.monkey.images --count 5000 --seed 7`. An image is taken apart into what its format is made of (segments
and scans of a JPEG, chunks of a PNG, WebP, GIF, entries of a TIFF, fields of a header), some parts are changed,
repeated, left out or cut, and it is put together again with lengths and checksums that are right, as a rule. `planes`
is what the trainer and `gapstream serve` have in common; intake comes before it.
"""

from __future__ import annotations

import functools
import os
import random
import struct
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from PIL import Image

from exporter.image_header import MEMORY_BYTES, MEMORY_BYTES_PER_PIXEL, ImageError
from exporter.preprocess import Preprocess, planes
from streams.record import Reason, Unusable, check_image
from tests.bad_images import encoded, jpeg_with_scans, picture, png_chunk
from tests.monkey.runs import Failed, Run, peak_mb, reset_peak

MAX_BYTES, MAX_PIXELS = 2**20, 2**20
SECONDS = 10.0
"""Of processor time that any image of MAX_PIXELS may take. The slowest that are let pass take 2."""
MEGABYTES = (MEMORY_BYTES + MEMORY_BYTES_PER_PIXEL * MAX_PIXELS) / 2**20 + 64
"""Of memory that any may take: what a decoder is given, and what freed memory this process keeps."""

EDGES = (
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    64,
    127,
    128,
    255,
    256,
    1024,
    32767,
    32768,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
)
PREPROCESS = Preprocess(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

Parts = list[bytes]


@functools.cache
def seeds() -> dict[str, list[bytes]]:
    """Whole images of every kind, by format."""
    first, *others = (picture(seed=seed) for seed in range(3))
    film = {"save_all": True, "append_images": others}
    large = picture(size=(300, 200))
    huge = Image.radial_gradient("L").resize((1024, 1024)).convert("RGB")  # MAX_PIXELS
    grey, colours, deep, alpha = (picture(mode) for mode in ("L", "P", "I;16", "RGBA"))
    exif = b"Exif\0\0II*\0" + bytes(40)
    sources: dict[str, list[tuple[Image.Image, dict[str, Any]]]] = {
        "JPEG": [
            (first, {}), (first, {"progressive": True}), (first, {"exif": exif, "comment": b"x" * 99}), (grey, {}),
            (picture("CMYK"), {}), (large, {"quality": 30, "restart_marker_blocks": 2}), (huge, {"progressive": True}),
            (huge, {}),
        ],
        "PNG": [
            (first, {}), (grey, {}), (colours, {}), (colours, {"transparency": 0}), (deep, {}), (alpha, {}),
            (picture("1"), {}), (picture("LA"), {}), (first, film), (large, {}), (huge, {}),
            (huge.convert("L").convert("I;16"), {}), (huge.convert("1"), {}),
        ],
        "WEBP": [
            (first, {}), (alpha, {"lossless": True}), (large, {"exif": exif}), (first, film), (huge, {"method": 0}),
        ],
        "GIF": [(colours, {}), (first, film), (picture("1"), {}), (huge.convert("P"), {})],
        "BMP": [(first, {}), (grey, {}), (colours, {}), (picture("1"), {}), (alpha, {})],
        "TIFF": [
            (first, {}), (first, {"compression": "tiff_lzw"}), (first, {"compression": "jpeg"}),
            (picture("1"), {"compression": "group4"}), (deep, {"compression": "tiff_deflate"}),
            (picture("CMYK"), {"compression": "packbits"}), (picture("LA"), {}),
        ],
        "PPM": [(first, {}), (grey, {}), (picture("1"), {})],
        "AVIF": [(first, {}), (alpha, {})],
    }  # fmt: skip
    made = {kind: [encoded(image, kind, **options) for image, options in those] for kind, those in sources.items()}
    made["JPEG"].append(jpeg_with_scans(40))
    made["BMP"].append(rle_bmp())
    made["PPM"] += [b"P3\n4 2 # a comment\n255\n" + b" 7" * 24, b"P2 3 1 65535 1 2 3", b"P1 8 1 10101010"]
    made["PPM"] += [b"P6 2 1 1023 " + bytes(12)]
    return made


def rle_bmp() -> bytes:
    """A BMP of 8 bits in runs."""
    rows = b"".join(bytes((16, colour, 0, 0)) for colour in range(8)) + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, 16, 8, 1, 8, 1, len(rows), 0, 0, 256, 0)
    body = header + bytes(1024) + rows
    return b"BM" + struct.pack("<IHHI", len(body) + 14, 0, 0, 14 + 40 + 1024) + body


def jpeg_parts(data: bytes) -> Parts:
    """The start, each segment (the entropy-coded bytes after a scan's are a part too), and the end."""
    parts, at = [data[:2]], 2
    while at + 4 <= len(data):
        if data[at] != 0xFF or data[at + 1] in (0x00, 0xFF) or 0xD0 <= data[at + 1] <= 0xD9:
            end = at + 2
            while end < len(data) and not (data[end - 1] == 0xFF and data[end] not in (0, *range(0xD0, 0xD8))):
                end += 1
            end = min(max(end - 1, at + 1), len(data))
        else:
            end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        parts.append(data[at:end])
        at = end
    return [*parts, data[at:]]


def png_parts(data: bytes) -> Parts:
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 12 + struct.unpack_from(">I", data, at)[0]
        parts.append(data[at:end])
        at = end
    return parts


def riff_parts(data: bytes) -> Parts:
    parts, at = [data[:12]], 12
    while at + 8 <= len(data):
        size = struct.unpack_from("<I", data, at + 4)[0]
        parts.append(data[at : at + 8 + size + size % 2])
        at += 8 + size + size % 2
    return parts


def gif_parts(data: bytes) -> Parts:
    """The header with its colours, extensions, frames, the end."""
    table = 3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0
    parts, at = [data[: 13 + table]], 13 + table
    while at < len(data) and data[at] != 0x3B:
        start = at
        at += 2 if data[at] == 0x21 else 11 + (3 << (data[at + 9] & 7) + 1 if data[at + 9] & 0x80 else 0)
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
        parts.append(data[start:at])
    return [*parts, data[at:]]


def tiff_parts(data: bytes) -> Parts:
    """Header and pixels, the twelve bytes of each entry, the rest."""
    order = "<" if data.startswith(b"II") else ">"
    at = struct.unpack_from(order + "I", data, 4)[0]
    count = struct.unpack_from(order + "H", data, at)[0]
    entries = [data[at + 2 + 12 * n : at + 14 + 12 * n] for n in range(count)]
    return [data[: at + 2], *entries, data[at + 2 + 12 * count :]]


def box_parts(data: bytes) -> Parts:
    parts, at = [], 0
    while at + 8 <= len(data):
        end = at + max(8, struct.unpack_from(">I", data, at)[0])
        parts.append(data[at:end])
        at = end
    return parts


def lines(data: bytes) -> Parts:
    return [*data[:60].split(b" "), data[60:]]


TAKEN_APART: dict[str, Callable[[bytes], Parts]] = {
    "JPEG": jpeg_parts, "PNG": png_parts, "WEBP": riff_parts, "GIF": gif_parts, "TIFF": tiff_parts, "AVIF": box_parts,
    "BMP": lambda data: [data[:14], data[14:54], data[54:]], "PPM": lines,
}  # fmt: skip


def put_together(kind: str, parts: Parts, honest: bool) -> bytes:
    """The image of these parts; with `honest` its lengths and checksums are right."""
    if not honest:
        return b"".join(parts)
    if kind == "PNG":
        chunks = (png_chunk(part[4:8], part[8:-4]) if len(part) >= 12 else part for part in parts[1:])
        return parts[0] + b"".join(chunks) if parts else b""
    if kind == "WEBP" and parts and len(parts[0]) == 12:
        chunks = [
            part[:4] + struct.pack("<I", len(part) - 8) + part[8:] + bytes(len(part) % 2) if len(part) >= 8 else part
            for part in parts[1:]
        ]
        body = b"".join(chunks)
        return parts[0][:4] + struct.pack("<I", len(body) + 4) + parts[0][8:] + body
    if kind == "JPEG":
        return b"".join(
            part[:2] + struct.pack(">H", min(len(part) - 2, 65535)) + part[4:]
            if len(part) >= 4 and part[0] == 0xFF and 0xC0 <= part[1] <= 0xFE and not 0xD0 <= part[1] <= 0xD9 else part
            for part in parts
        )  # fmt: skip
    if kind == "AVIF":
        return b"".join(struct.pack(">I", len(part)) + part[4:] if len(part) >= 8 else part for part in parts)
    return b"".join(parts)


def changed(part: bytes, chance: random.Random) -> bytes:
    """A part with a field, some bits, or all of its compressed bytes changed, or cut, or longer."""
    content = bytearray(part)
    how = chance.randrange(8)
    if how <= 2 and content:  # a field, most of which lie in front
        size = chance.choice((1, 2, 2, 4, 4))
        at = chance.randrange(min(len(content), chance.choice((16, 32, 64, 10**9))))
        value = chance.choice(EDGES) & (1 << 8 * size) - 1
        content[at : at + size] = value.to_bytes(size, chance.choice(("big", "little")))
    elif how == 3:
        for _ in range(chance.randint(1, 8)):
            if content:
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif how == 4:
        del content[chance.randrange(len(content) + 1) :]
    elif how == 5:
        content += content[-chance.randint(1, 200) :] * chance.choice((1, 3, 300))
    elif how == 6 and part[4:8] in (b"IDAT", b"zTXt", b"iCCP", b"fdAT"):  # what inflates far
        content[8:] = zlib.compress(bytes(chance.choice((10, 10**5, 10**7))), 9) + bytes(4)
    else:
        at = chance.randrange(len(content) + 1)
        content[at:at] = chance.randbytes(chance.choice((1, 2, 100, 5000)))
    return bytes(content)


def mutants(chance: random.Random, kinds: dict[str, list[bytes]]) -> tuple[str, bytes]:
    """A format, and an image that was one of it."""
    kind = chance.choice(list(kinds))
    data = chance.choice(kinds[kind])
    parts = TAKEN_APART[kind](data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        if not parts:
            break
        at = chance.randrange(len(parts))
        how = chance.randrange(10)
        if how == 0:
            del parts[at]
        elif how == 1:
            parts[at:at] = [parts[at]] * chance.choice((1, 2, 30, 70, 500))
        elif how == 2:
            other = chance.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif how == 3:  # a part of another image, perhaps of another format
            stranger = chance.choice(kinds[kind if chance.random() < 0.8 else chance.choice(list(kinds))])
            parts[at:at] = [chance.choice(TAKEN_APART[kind](stranger) if kind in ("JPEG", "PNG") else [stranger])]
        else:
            parts[at] = changed(parts[at], chance)
    return kind, put_together(kind, parts, chance.random() < 0.8)[: MAX_BYTES + 1]


def outcome(data: bytes) -> str:
    """What becomes of an image on its way through intake, decoder and preprocessing. Raises what it must not raise."""
    taken = ""
    try:
        check_image(data, MAX_BYTES, MAX_PIXELS)
    except Unusable as why:
        taken = str(why.reason)
    try:
        pixels = planes(data, MAX_PIXELS, PREPROCESS)
    except ImageError as error:
        if error.reason not in set(Reason):
            raise Failed(f"unknown reason {error.reason}") from error
        return f"rejected as {error.reason}" + ("" if taken else " by the decoder alone")
    answer = PREPROCESS.scale(pixels)
    if answer.shape != (3, 32, 32) or not abs(answer).max() <= 1:
        raise Failed("preprocessed to other values than -1 to 1")
    return f"pixels, but rejected as {taken} at intake" if taken else "pixels"


def main(run: Run) -> None:
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff says there what it finds
    kinds = seeds()
    for images in kinds.values():
        for data in images:
            if outcome(data) != "pixels":
                raise SystemExit(f"a whole image became {outcome(data)}")
    found: Counter[str] = Counter()
    by_kind: Counter[str] = Counter()
    slowest, largest = (0.0, ""), (0.0, "")
    for number in run.numbers:
        with run.case(number) as chance:
            kind, data = mutants(chance, kinds)
            reset_peak()
            before, began = peak_mb(), time.thread_time()
            what = outcome(data)
            took, grew = time.thread_time() - began, peak_mb() - before
            slowest = max(slowest, (took, f"{kind}, {len(data)} bytes, case {number}"))
            largest = max(largest, (grew, f"{kind}, {len(data)} bytes, case {number}"))
            if took > SECONDS or grew > MEGABYTES:
                raise Failed(f"a {kind} of {len(data)} bytes took {took:.1f} s and {grew:.0f} MB, and became {what}")
        found[what] += 1
        by_kind[f"{kind} decoded"] += what == "pixels"
        run.done(number + 1 - run.first)
    run.figures(
        images=run.count,
        slowest=f"{slowest[0]:.2f} s ({slowest[1]})",
        most_memory=f"{largest[0]:.0f} MB ({largest[1]})",
        **dict(found.most_common()),
        **by_kind,
    )


if __name__ == "__main__":
    Run("images", 5000).watched(main)
