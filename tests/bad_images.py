"""Images of every kind a stream may bring, made at run time: broken ones with their reason, odd ones that are fine.

`stage` says who finds out: `intake` is `streams.record.check_image` (header only), `decode` is the full decode in the
trainer. A decoder must refuse the `intake` ones as well; where Pillow tells less than the header check, its reason may
be UNDECODABLE.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from functools import cache
from typing import Any, Literal, NamedTuple

from PIL import Image

from streams.record import Reason

MAX_BYTES = 1_000_000
MAX_PIXELS = 1_000_000
"""The bounds under which the expected reasons hold."""


class OddImage(NamedTuple):
    name: str
    data: bytes
    reason: Reason | None
    """None: the image must be accepted and decode to RGB."""
    stage: Literal["intake", "decode"]
    """Where a broken image is found out; meaningless where `reason` is None."""


def slow_image(rows: int) -> bytes:
    """Give an image whose values are decoded in Python, one by one, in some 0.7 ms of the processor for every row on a
    core that is fast, and more on others; each row has 6 kB."""
    return b"P3 1000 %d 255\n" % rows + b"0 " * 3000 * rows


TOO_SLOW = 666
"""Rows of an image of nearly as many values as are taken; it takes some times the 0.1 s that tests give it."""


def picture(mode: str = "RGB", size: tuple[int, int] = (48, 32), seed: int = 0) -> Image.Image:
    """Noise over a gradient: nothing in it compresses away. `size` is (width, height)."""
    image = Image.frombytes("RGB", size, _pixels(size, seed))
    if mode == "I;16":
        grey = [value * 257 for value in image.convert("L").tobytes()]
        return Image.frombytes("I;16", size, struct.pack(f"<{len(grey)}H", *grey))
    if mode in ("RGBA", "LA"):
        image.putalpha(image.convert("L").point(lambda value: 255 - value))
    return image.convert(mode)


@cache
def _pixels(size: tuple[int, int], seed: int) -> bytes:
    noise = random.Random(seed)
    width, height = size
    places = ((x, y, c) for y in range(height) for x in range(width) for c in range(3))
    return bytes((x * 5 + y * 3 + c * 60 + noise.randrange(32)) % 256 for x, y, c in places)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, pixels: bytes = b"") -> bytes:
    """An 8-bit grey PNG that claims `width` x `height` whatever its `pixels` (raw scan lines with filter bytes) are."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, data) for kind, data in chunks)


def jpeg_of(width: int, height: int) -> bytes:
    """A small JPEG whose frame header claims `width` x `height`."""
    data = bytearray(encoded(picture(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_with_scans(scans: int, size: tuple[int, int] = (48, 32)) -> bytes:
    """A progressive JPEG whose last scan is repeated until there are `scans`; it is decoded to the same pixels."""
    data = encoded(Image.new("RGB", size, (90, 120, 30)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * (scans - data.count(b"\xff\xda")) + data[-2:]


def webp_of(width: int, height: int) -> bytes:
    """A WebP of 38 bytes that claims a canvas of `width` x `height`, and has an empty frame."""
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sides + b"VP8L" + bytes(4)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _frames(mode: str = "RGB") -> list[Image.Image]:
    return [picture(mode, seed=seed) for seed in range(3)]


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), "JPEG", exif=exif)


def good_images() -> list[OddImage]:
    """Unusual, but images: none may be rejected."""
    first, *others = _frames()
    return [
        OddImage(name, data, None, "decode")
        for name, data in {
            "jpeg": encoded(picture(), "JPEG"),
            "jpeg, progressive": encoded(picture(), "JPEG", progressive=True),
            "jpeg, grey": encoded(picture("L"), "JPEG"),
            "jpeg, CMYK": encoded(picture("CMYK"), "JPEG"),
            "jpeg, EXIF says turn right": _turned(),
            "jpeg, bytes after the end": encoded(picture(), "JPEG") + b"appended by a camera",
            "png": encoded(picture(), "PNG"),
            "png, alpha": encoded(picture("RGBA"), "PNG"),
            "png, grey and alpha": encoded(picture("LA"), "PNG"),
            "png, palette": encoded(picture("P"), "PNG"),
            "png, palette with transparency": encoded(picture("P"), "PNG", transparency=0),
            "png, one bit": encoded(picture("1"), "PNG"),
            "png, 16 bit": encoded(picture("I;16"), "PNG"),
            "png, end mark missing": encoded(picture(), "PNG")[:-12],
            "png, animated": encoded(first, "PNG", save_all=True, append_images=others),
            "png, one pixel": encoded(picture(size=(1, 1)), "PNG"),
            "gif": encoded(picture("P"), "GIF"),
            "gif, animated": encoded(first, "GIF", save_all=True, append_images=others),
            "webp": encoded(picture(), "WEBP"),
            "webp, lossless with alpha": encoded(picture("RGBA"), "WEBP", lossless=True),
            "webp, animated": encoded(first, "WEBP", save_all=True, append_images=others),
            "bmp": encoded(picture(), "BMP"),
            "tiff": encoded(picture(), "TIFF"),
            "tiff, 16 bit": encoded(picture("I;16"), "TIFF"),
            "ppm": encoded(picture(), "PPM"),
        }.items()
    ]


def bad_images() -> list[OddImage]:
    """Every kind of broken image, with the reason it is rejected for under MAX_BYTES and MAX_PIXELS."""
    jpeg, png, webp = (encoded(picture(), kind) for kind in ("JPEG", "PNG", "WEBP"))
    gif, bmp = encoded(picture("P"), "GIF"), encoded(picture(), "BMP")
    noise = random.Random(1).randbytes(2000)
    damaged = bytearray(png)
    middle = damaged.index(b"IDAT") + 200
    damaged[middle : middle + 64] = bytes(64)
    return [
        OddImage("no bytes", b"", Reason.EMPTY, "intake"),
        OddImage("more bytes than allowed", jpeg + bytes(MAX_BYTES), Reason.TOO_LARGE, "intake"),
        OddImage("random bytes", noise, Reason.UNSUPPORTED_FORMAT, "intake"),
        OddImage("one byte", b"\xff", Reason.UNSUPPORTED_FORMAT, "intake"),
        OddImage("zeros", bytes(1000), Reason.UNSUPPORTED_FORMAT, "intake"),
        OddImage("an error page", b"<!DOCTYPE html><title>404 Not Found</title>", Reason.UNSUPPORTED_FORMAT, "intake"),
        OddImage("svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', Reason.UNSUPPORTED_FORMAT, "intake"),
        OddImage("pdf", encoded(picture(), "PDF"), Reason.UNSUPPORTED_FORMAT, "intake"),
        OddImage("ico", encoded(picture(), "ICO"), Reason.UNSUPPORTED_FORMAT, "intake"),
        OddImage("zip", b"PK\x03\x04" + bytes(60), Reason.UNSUPPORTED_FORMAT, "intake"),
        OddImage("jpeg, nothing after the magic", jpeg[:4], Reason.TRUNCATED, "intake"),
        OddImage("jpeg, cut inside the header", jpeg[:100], Reason.TRUNCATED, "intake"),
        OddImage("jpeg, noise after the first segment", jpeg[:20] + noise, Reason.UNDECODABLE, "intake"),
        OddImage("jpeg, fill bytes without end", jpeg[:2] + b"\xff" * 500_000, Reason.UNDECODABLE, "intake"),
        OddImage("jpeg, cut in half", jpeg[: len(jpeg) // 2 + 300], Reason.TRUNCATED, "decode"),
        OddImage("jpeg, bomb", jpeg_of(65_000, 65_000), Reason.BOMB, "intake"),
        OddImage("jpeg, no rows", jpeg_of(48, 0), Reason.BAD_DIMENSIONS, "intake"),
        OddImage("png, cut inside the header", png[:20], Reason.TRUNCATED, "intake"),
        OddImage("png, no header chunk", png[:8] + png_chunk(b"tEXt", b"a\0b" * 10), Reason.UNDECODABLE, "intake"),
        OddImage("png, cut in half", png[: len(png) // 2], Reason.TRUNCATED, "decode"),
        OddImage("png, damaged pixels", bytes(damaged), Reason.UNDECODABLE, "decode"),
        OddImage("png, bomb", png_of(100_000, 100_000), Reason.BOMB, "intake"),
        OddImage("png, no columns", png_of(0, 32), Reason.BAD_DIMENSIONS, "intake"),
        OddImage("png, a needle", png_of(500_000, 1, bytes(500_001)), Reason.BAD_DIMENSIONS, "intake"),
        OddImage("webp, cut in half", webp[: len(webp) // 2], Reason.TRUNCATED, "intake"),
        OddImage("webp, magic and noise", webp[:12] + noise, Reason.UNDECODABLE, "intake"),
        OddImage("gif, cut inside the header", gif[:8], Reason.TRUNCATED, "intake"),
        OddImage("gif, cut in half", gif[: len(gif) // 2 + 200], Reason.TRUNCATED, "decode"),
        OddImage("bmp, cut in half", bmp[: len(bmp) // 2], Reason.TRUNCATED, "decode"),
        OddImage("tiff, noise after the magic", b"II*\0" + noise, Reason.TRUNCATED, "intake"),
        OddImage("ppm, bomb", b"P6 100000 100000 255\n", Reason.BOMB, "intake"),
        OddImage("bmp, bomb", bmp[:18] + struct.pack("<ii", 60_000, 60_000) + bmp[26:], Reason.BOMB, "intake"),
    ]


def all_images() -> list[OddImage]:
    return good_images() + bad_images()
