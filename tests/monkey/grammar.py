"""Messages of a topic that know every field and every limit of the wire format, and what must become of each."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lz4.frame
import snappy
import zstandard
from kafka.record.util import calc_crc32c, encode_varint

from streams.formats import _ENVELOPE_EXTRA, MAX_JSON_DEPTH, MAX_JSON_PARTS, MAX_URL_CHARS
from streams.record import LABEL_BYTES_PER_CHAR, MAX_HEADER_BYTES, MAX_HEADERS, MAX_KEY_BYTES, Reason
from tests.bad_images import OddImage, all_images, encoded, picture

MAX_BYTES, MAX_PIXELS, MAX_LABEL = 100_000, 20_000, 20
"""The limits of these messages: so small that a message at or beyond each is cheap."""

LONGEST_ENVELOPE = MAX_BYTES * 4 // 3 + _ENVELOPE_EXTRA

IMAGES = [one for one in all_images() if len(one.data) <= MAX_BYTES and (one.stage == "intake" or one.reason is None)]
GOOD = [encoded(picture(), kind) for kind in ("JPEG", "PNG", "WEBP")]
CONTROL = "gapstream.control"

Expected = Reason | None | str
"""A reason; None for a sample; 'mark'; 'any' where a message was mutated."""


@dataclass
class Message:
    """A message before it is written down, and what must become of it."""

    key: bytes | None = b"key"
    value: bytes | None = b""
    headers: list[tuple[bytes, bytes | None]] = field(default_factory=list)
    timestamp_ms: int = 0
    expected: Expected = None
    url: str = ""

    def set(self, name: str, value: bytes | None) -> None:
        self.headers.append((name.encode(), value))


def text(chance: random.Random, length: int) -> str:
    """`length` characters of several scripts, none of which normalising changes or takes away."""
    return "".join(chance.choice("aZ9-äßłжאبนह漢字あ한🐈‍") for _ in range(length)).strip() or "x"


LABELS: list[Callable[[random.Random], tuple[bytes, Expected]]] = [
    lambda c: (text(c, c.randint(1, MAX_LABEL)).encode(), None),
    lambda c: (("a" * MAX_LABEL).encode(), None),
    lambda c: (("a" * (MAX_LABEL + 1)).encode(), Reason.LABEL_TYPE),
    lambda c: (b"a" + b" " * (MAX_LABEL * LABEL_BYTES_PER_CHAR - 1), None),
    lambda c: (b"a" + b" " * (MAX_LABEL * LABEL_BYTES_PER_CHAR), Reason.LABEL_TYPE),
    lambda c: ("\u1112\u1161\u11ab".encode() * MAX_LABEL, None),
    lambda c: ("\u1112\u1161\u11ab".encode() * (MAX_LABEL + 1), Reason.LABEL_TYPE),
    lambda c: (b"a" + "\u0301\u0323".encode() * (MAX_LABEL * 3 - 1), Reason.LABEL_TYPE),
    lambda c: ("\u0344\u0f73".encode() * c.randint(10**3, 10**4), Reason.LABEL_TYPE),
    lambda c: (c.choice((b"", b" ", b"\t\n ", "\u00a0\u2003\u3000".encode())), Reason.MISSING_LABEL),
    lambda c: (b"cat" + c.choice((b"\0", b"\x07", b"\x1b", b"\x7f", "\u0080".encode())) + b"x", Reason.LABEL_TYPE),
    lambda c: (c.choice((b"\xff\xfe", b"\xc3(", b"\xed\xa0\x80", b"cat\x80")), Reason.LABEL_TYPE),
    lambda c: (" \u00a0 Two\n\twords ".encode(), None),
]

JSON_LABELS: list[tuple[Any, Expected]] = [
    ("cat", None), (None, Reason.MISSING_LABEL), (3, Reason.LABEL_TYPE), (True, Reason.LABEL_TYPE),
    (1e308, Reason.LABEL_TYPE), ([], Reason.LABEL_TYPE), ({"a": 1}, Reason.LABEL_TYPE), ("", Reason.MISSING_LABEL),
    ("\ud800", Reason.LABEL_TYPE), ("a\0b", Reason.LABEL_TYPE), ("a" * 10**5, Reason.LABEL_TYPE),
    ([["cat"] * 99] * 9, Reason.LABEL_TYPE),
]  # fmt: skip

PLACES = ["https://images.example/pub/", "http://images.example:8080/pub/", "s3://bucket/pub/"]
"""Where images may be; who has a folder of images adds it."""

STEPS = ("a", "b.png", "..", ".", "..;", "..;x=1", "%2e%2e", "%252e%252e", "%25252e%25252e", "..%5c", "..%5C",
         "..%2f", "%2F", "%5c", "\\", "..\\", ".%2e", "%2e.", "%c0%ae%c0%ae", "%u002e", " ..", "..%20", "..%00", "%00",
         "", "a;b", "?x=../..", "#a", "..?", "ä", "%", "%zz", "@evil", ":80", "...", "good", "link", "folder", "pipe",
         "a" * 300)  # fmt: skip
OTHERS = ("https://images.example.evil/pub/a", "https://images.example/pubs/a", "https://images.example@evil/pub/a",
          "HTTPS://images.example/pub/a", "https://evil/", "file:///etc/passwd", "s3://other/pub/a",
          "gopher://x/", "//images.example/pub/a",
          "https://images.example/pub", "https://images.example/", "javascript:1",
          " https://images.example/pub/a", "https:/images.example/pub/a")  # fmt: skip


def urls(chance: random.Random) -> tuple[str, Expected]:
    """A URL below an allowed place, or one that pretends to be, or of another."""
    if chance.random() < 0.2:
        return chance.choice(OTHERS), Reason.FETCH_FORBIDDEN
    place = chance.choice(PLACES)
    if chance.random() < 0.2:
        return place + "good", None
    if chance.random() < 0.1:
        length = MAX_URL_CHARS + chance.choice((-1, 0, 1))
        url = place + "a" * (length - len(place))
        return url, Reason.BAD_SCHEMA if length > MAX_URL_CHARS else "any"
    return place + "/".join(chance.choices(STEPS, k=chance.randint(1, 5))), "any"


def label(message: Message, chance: random.Random) -> None:
    """A header `label` that is good, as a rule."""
    raw, expected = (b"cat", None) if chance.random() < 0.6 else chance.choice(LABELS)(chance)
    name = "label" if chance.random() < 0.8 else "ce_label"
    message.set(name, raw)
    message.expected = expected


def image(chance: random.Random) -> tuple[bytes, Expected]:
    """An image, whole or broken at a limit."""
    if chance.random() < 0.5:
        return chance.choice(GOOD), None
    if chance.random() < 0.3:
        length = MAX_BYTES + chance.choice((-1, 0, 1))
        return GOOD[0] + bytes(length - len(GOOD[0])), Reason.TOO_LARGE if length > MAX_BYTES else None
    odd: OddImage = chance.choice(IMAGES)
    return odd.data, "any" if odd.reason in (Reason.BOMB, Reason.TOO_LARGE, Reason.BAD_DIMENSIONS) else odd.reason


def plain(chance: random.Random) -> Message:
    """The value is the image."""
    message = Message()
    message.value, found = image(chance)
    label(message, chance)
    message.expected = message.expected or found
    kinds = (
        None,
        b"image/jpeg",
        b"image/x;q=1",
        b"IMAGE/PNG",
        b"application/octet-stream",
        b" application/octet-stream ;a",
    )
    if (kind := chance.choice(kinds)) is not None:
        message.set("content-type", kind)
    if chance.random() < 0.2:
        version = chance.choice((b"1.0", b"1.0", b"0.3", b"1.0 ", b"", None, b"\xff" * 999))
        message.set("ce_specversion", version)
        if version != b"1.0":
            message.expected = Reason.BAD_SCHEMA
    return message


def unknown_type(chance: random.Random) -> Message:
    message = plain(chance)
    message.set("content-type", chance.choice((b"text/html", b"", b"\xff", b"application/jsonp", b"a" * 60_000)))
    message.expected = Reason.BAD_SCHEMA
    return message


def mark(chance: random.Random) -> Message:
    """A control mark, known or not, in a header or an envelope."""
    known = chance.random() < 0.5
    word = chance.choice(("flush", "task-boundary") if known else ("FLUSH", "", "flush ", "x" * 5000, "\ud800"))
    message = Message(expected="mark" if known else Reason.BAD_SCHEMA)
    if chance.random() < 0.5:
        message.value = chance.choice((None, b"", b"anything", b"{"))
        message.set(CONTROL, word.encode("utf-8", "surrogatepass"))
    else:
        message.value = json.dumps({"control": word}).encode()
    return message


def envelope(chance: random.Random) -> Message:
    """A JSON envelope with an image, at or over one of its limits now and then."""
    message = Message()
    data, message.expected = image(chance)
    content: dict[str, Any] = {"image": base64.b64encode(data).decode()}
    if len(data) > MAX_BYTES:
        message.expected = Reason.TOO_LARGE
    given, expected = ("cat", None) if chance.random() < 0.5 else chance.choice(JSON_LABELS)
    content["label"] = given
    message.expected = expected or message.expected
    twist = chance.randrange(14)
    if twist == 0:
        good = base64.b64encode(GOOD[0]).decode()
        forms = (good + "=", good[:-5], f"\n{good}", good[:60] + " " + good[60:], "====", "!!", "YQ", "ä")
        content["image"], message.expected = chance.choice(forms), expected or Reason.BAD_ENVELOPE
    elif twist == 1:
        content["image"] = chance.choice((None, 3, [], {}, True))
        message.expected = expected or Reason.BAD_SCHEMA
    elif twist == 2:
        depth = MAX_JSON_DEPTH + chance.choice((-1, 0))
        content["deep"] = nested(depth)
        if depth >= MAX_JSON_DEPTH:  # the envelope itself is a level
            message.expected = Reason.BAD_ENVELOPE
    elif twist == 3:
        parts = (
            MAX_JSON_PARTS
            + chance.choice((0, 1))
            - len(content)
            - 1
            - json.dumps(content).count("[")
            - json.dumps(content).count(",")
        )
        content["many"] = [0] * max(0, parts)
        value = json.dumps(content)
        if value.count("[") + value.count("{") + value.count(",") > MAX_JSON_PARTS:
            message.expected = Reason.BAD_ENVELOPE
    elif twist == 4:
        content["text"] = "[{" * chance.randint(1, 2000) + '"\\'
    message.value = json.dumps(content, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    if twist == 5:
        cut = chance.randrange(1, len(message.value))
        message.value, message.expected = message.value[:cut], Reason.BAD_ENVELOPE
    elif twist == 6:
        odd = (
            b"[]",
            b"3",
            b"null",
            b'"x"',
            b"\xff{}",
            message.value.decode("utf-8", "replace").encode("utf-16"),
            b"{'a': 1}",
            b'{"a":' + b"1" * 5000 + b"}",
            b"{" * 40_000,
        )
        message.value, message.expected = chance.choice(odd), Reason.BAD_ENVELOPE
        message.set("content-type", b"application/json")
    elif twist == 7:
        missing = LONGEST_ENVELOPE + chance.choice((0, 1)) - len(message.value)
        message.value = message.value[:-1] + b" " * missing + b"}"
    elif twist == 8:
        message.value, message.expected = None, Reason.EMPTY
        message.set("content-type", b"application/json")
    elif twist == 9:
        message.value = b"\xef\xbb\xbf" + message.value
        message.set("content-type", b"application/json")
    elif twist in (10, 11):
        event: dict[str, Any] = {"specversion": "1.0", "data": content}
        if chance.random() < 0.5:
            event = {"specversion": "1.0", "label": content["label"], "data_base64": content["image"]}
        if chance.random() < 0.2:
            event["specversion"] = chance.choice((None, 1.0, "0.3", ["1.0"], "x" * 999))
            message.expected = Reason.BAD_SCHEMA
        message.value = json.dumps(event).encode("utf-8", "surrogatepass")
        message.set("content-type", b"application/cloudevents+json; charset=utf-8")
    elif twist == 12:
        message.value = message.value[:-1] + b', "label": "dog"}'
        if expected:  # of a field that is there twice the last one counts
            message.expected = "any"
    if message.value and len(message.value) > LONGEST_ENVELOPE:
        message.expected = Reason.TOO_LARGE
    return message


def nested(levels: int) -> Any:
    found: Any = 0
    for _ in range(levels):
        found = [found]
    return found


def claim(chance: random.Random) -> Message:
    """An image elsewhere, in headers or an envelope."""
    message = Message(value=None)
    message.url, expected = urls(chance)
    sha256: Any = hashlib.sha256(GOOD[0]).hexdigest()
    size: Any = chance.choice((None, None, len(GOOD[0])))
    twist = chance.randrange(8)
    if twist == 0:
        sha256 = chance.choice((None, "", sha256[:-1], sha256 + "0", "g" * 64, sha256.upper(), "é" * 64))
        expected = expected if sha256 and sha256.lower() == hashlib.sha256(GOOD[0]).hexdigest() else Reason.BAD_SCHEMA
    elif twist == 1:
        size = chance.choice((MAX_BYTES, MAX_BYTES + 1, 10**17, "x", "-1", "1.5", "9" * 5000, "\u0661"))
        number = size if isinstance(size, int) else None
        bad = Reason.BAD_SCHEMA if number is None else Reason.TOO_LARGE if number > MAX_BYTES else "any"
        expected = expected if expected is Reason.BAD_SCHEMA else bad
    if chance.random() < 0.5:
        label(message, chance)
        message.set("image-url", message.url.encode("utf-8", "surrogatepass"))
        for name, content in (("image-sha256", sha256), ("image-size", size)):
            if content is not None:
                message.set(name, str(content).encode())
    else:
        message.value = json.dumps({"label": "cat", "image_url": message.url, "sha256": sha256, "size": size}).encode()
    message.expected = message.expected or expected
    return message


def crowded(chance: random.Random) -> Message:
    """Headers and key at, or over, what is read of them."""
    message = plain(chance)
    which = chance.randrange(5)
    over = chance.randrange(2)
    if which == 0:
        count = MAX_HEADERS + over - len(message.headers)
        message.headers = [(b"x", chance.choice((b"", None)))] * count + message.headers
    elif which == 1:
        size = len(b"".join(_header(*header) for header in message.headers))
        message.headers.insert(0, (b"x", bytes(MAX_HEADER_BYTES - size - 5 + over)))  # 5: two lengths and the name
    elif which == 2:
        message.key = bytes(MAX_KEY_BYTES + over)
        message.expected = Reason.TOO_LARGE if over else message.expected
    elif which == 3:
        message.headers = [(b"", b"")] * (10**5 if chance.random() < 0.02 else 1000)
    else:
        message.headers.insert(0, (bytes(chance.randint(0, 99)), b"\xff"))
    return message


FORMS = (plain, plain, plain, envelope, envelope, claim, claim, mark, crowded, unknown_type)


def timestamp(chance: random.Random, now_ms: int) -> int:
    """When a producer says that it was: as a rule about now."""
    if chance.random() < 0.9:
        return now_ms - chance.randrange(3000)
    return chance.choice((-1, 0, 1, now_ms + 9_999, now_ms + 10_001, now_ms + 3_000_000, now_ms * 1000, now_ms // 1000,
                          2**62, now_ms - 10**10, 253_402_300_800_000))  # fmt: skip


def message(chance: random.Random, now_ms: int) -> Message:
    """Some message; one in three is mutated."""
    made = chance.choice(FORMS)(chance)
    if len(made.headers) > MAX_HEADERS or sum(len(_header(*header)) for header in made.headers) > MAX_HEADER_BYTES:
        made.expected = Reason.TOO_LARGE
    made.timestamp_ms = timestamp(chance, now_ms)
    if chance.random() < 0.3:
        made.expected = "any"
        if made.headers and chance.random() < 0.5:
            at = chance.randrange(len(made.headers))
            name, value = made.headers[at]
            made.headers[at] = (
                (name, mutated(value, chance)) if chance.random() < 0.8 else (mutated(name, chance), value)
            )
            if chance.random() < 0.2:
                made.headers += [chance.choice(made.headers)]
        else:
            made.value = mutated(made.value, chance)
    return made


def mutated(data: bytes | None, chance: random.Random) -> Any:
    """`data` with a few bytes changed, left out, repeated or put in."""
    if data is None:
        return chance.randbytes(chance.randrange(20))
    content = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(content) + 1)
        end = min(len(content), at + chance.choice((1, 2, 8, 100)))
        how = chance.randrange(5)
        if how == 0 and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            del content[at:end]
        elif how == 2:
            content[at:at] = content[at:end] * chance.choice((1, 1, 50))
        elif how == 3:
            content[at:end] = chance.choice((b"\0", b"\xff" * 4, b"{", b'"', b"[" * 40, b"\\u0000", b"1e999", b"NaN"))
        else:
            content[at:at] = chance.randbytes(chance.randrange(1, 9))
    return bytes(content)


def _varint(number: int) -> bytes:
    out = bytearray()
    encode_varint(number, out.append)
    return bytes(out)


def _field(data: bytes | None) -> bytes:
    return _varint(-1) if data is None else _varint(len(data)) + data


@functools.lru_cache(256)
def _header(name: bytes, value: bytes | None) -> bytes:
    return _field(name) + _field(value)


def _framed_snappy(data: bytes) -> bytes:
    block = snappy.compress(data)
    return b"\x82SNAPPY\x00" + struct.pack(">ii", 1, 1) + struct.pack(">i", len(block)) + block


def _gzip(data: bytes) -> bytes:
    packer = zlib.compressobj(1, wbits=31)
    return packer.compress(data) + packer.flush()


CODECS: Sequence[Callable[[bytes], bytes]] = (
    bytes, _gzip, _framed_snappy, lz4.frame.compress, zstandard.ZstdCompressor(1).compress,
)  # fmt: skip
"""What a batch's records are packed with, by Kafka's number of it."""


def batch(messages: Sequence[Message], base_offset: int, codec: int, spoil: Callable[[bytes], bytes] = bytes) -> bytes:
    """A record batch as a broker has it; `spoil` changes its records before their checksum is taken."""
    first = messages[0].timestamp_ms
    records = bytearray()
    for delta, one in enumerate(messages):
        body = b"\0" + _varint(one.timestamp_ms - first) + _varint(delta) + _field(one.key) + _field(one.value)
        body += _varint(len(one.headers)) + b"".join(_header(*header) for header in one.headers)
        records += _varint(len(body)) + body
    packed = CODECS[codec](spoil(bytes(records)))
    latest = max(one.timestamp_ms for one in messages)
    checked = struct.pack(">hiqqqhii", codec, len(messages) - 1, first, latest, -1, -1, -1, len(messages)) + packed
    return struct.pack(">qiibI", base_offset, len(checked) + 9, 0, 2, calc_crc32c(checked)) + checked
