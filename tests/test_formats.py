"""The wire format: golden messages, limits and fuzz."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from streams.dead_letter_format import dead_letter, origin, original
from streams.formats import MAX_JSON_DEPTH, MAX_JSON_PARTS, MAX_URL_CHARS, Claim, Codec, encode_control, encode_image
from streams.record import (
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_KEY_BYTES,
    Control,
    ControlKind,
    Partition,
    Raw,
    Reason,
    Record,
    Rejected,
)
from tests.bad_images import MAX_BYTES, MAX_PIXELS, OddImage, all_images

GOLDEN = sorted((Path(__file__).parent / "kafka/golden").glob("*.json"))
HERE = Partition("images", 3)
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYPgPAAEDAQAIicLsAAAAAElFTkSuQmCC")


def codec(max_image_bytes: int = 2**20) -> Codec:
    return Codec(max_image_bytes=max_image_bytes, max_image_pixels=10**7, max_label_chars=200)


def read(field: Any) -> bytes | None:
    """A key, value or header of a golden file: null, text, or {"base64": ...}."""
    if field is None:
        return None
    return field.encode() if isinstance(field, str) else binascii.a2b_base64(field["base64"])


def message(golden: dict[str, Any]) -> Raw:
    sent = golden["message"]
    headers = tuple((name, read(value)) for name, value in sent["headers"])
    return Raw(read(sent["key"]), read(sent["value"]), headers)


def described(item: object) -> dict[str, Any]:
    match item:
        case Record():
            return {"record": {"label": item.label, "image_sha256": hashlib.sha256(item.image).hexdigest()}}
        case Claim():
            return {"claim": {"label": item.label, "url": item.url, "sha256": item.sha256, "size": item.size}}
        case Control():
            return {"control": item.kind}
        case Rejected():
            return {"rejected": item.reason}
    raise AssertionError(item)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_every_golden_message_decodes_as_its_file_says(path: Path) -> None:
    golden = json.loads(path.read_text())
    raw = message(golden)

    item = codec().decode(HERE, 42, raw, 1.5)

    assert described(item) == golden["expect"], getattr(item, "detail", "")
    assert (item.partition, item.offset) == (HERE, 42)
    assert isinstance(item, Control) or item.raw == raw


def test_every_reason_a_codec_can_give_has_a_golden_message() -> None:
    of_golden = {json.loads(path.read_text())["expect"].get("rejected") for path in GOLDEN}
    elsewhere = {"undecodable", "fetch_failed", "fetch_forbidden", "task_failed"}
    assert set(Reason) - of_golden == elsewhere


def test_what_is_encoded_decodes_to_the_same() -> None:
    value, headers = encode_image("maple tree", PNG)
    record = codec().decode(HERE, 0, Raw(b"k", value, tuple(headers)), None)
    assert isinstance(record, Record) and (record.label, record.image) == ("maple tree", PNG)
    for kind in ControlKind:
        nothing, headers = encode_control(kind)
        assert codec().decode(HERE, 0, Raw(b"k", nothing, tuple(headers)), None) == Control(HERE, 0, kind)


@pytest.mark.parametrize("kind", ["image", "envelope", "claim"])
def test_an_image_beyond_the_limit_is_too_large_in_every_format(kind: str) -> None:
    big = PNG + bytes(2000)
    small = codec(max_image_bytes=1000)
    digest = hashlib.sha256(big).hexdigest()
    if kind == "claim":
        claim = small.decode(
            HERE, 0, Raw(None, None, (("label", b"a"), ("image-url", b"u"), ("image-sha256", digest.encode()))), None
        )
        assert isinstance(claim, Claim)
        item: object = small.redeem(claim, big)
    elif kind == "envelope":
        text = json.dumps({"label": "a", "image": base64.b64encode(big).decode()})
        item = small.decode(HERE, 0, Raw(None, text.encode()), None)
    else:
        item = small.decode(HERE, 0, Raw(None, big, (("label", b"a"),)), None)
    assert isinstance(item, Rejected) and item.reason == Reason.TOO_LARGE


@pytest.mark.parametrize("odd", all_images(), ids=lambda odd: odd.name)
def test_odd_images_get_the_reason_their_header_deserves(odd: OddImage) -> None:
    limits = Codec(max_image_bytes=MAX_BYTES, max_image_pixels=MAX_PIXELS, max_label_chars=200)
    item = limits.decode(HERE, 0, Raw(None, odd.data, (("label", b"a"), ("content-type", b"image/jpeg"))), None)
    if odd.reason and odd.stage == "intake":
        assert isinstance(item, Rejected) and item.reason == odd.reason
    else:
        assert isinstance(item, Record)


def rejected(raw: Raw) -> Rejected:
    item = codec().decode(HERE, 0, raw, None)
    assert isinstance(item, Rejected)
    return item


def test_headers_that_were_not_read_reject_their_message_and_its_letter_says_so() -> None:
    item = rejected(Raw(b"k", PNG, (), "3000000 headers of 6000000 bytes"))
    assert item.reason == Reason.TOO_LARGE
    assert item.detail == f"3000000 headers of 6000000 bytes, at most {MAX_HEADERS} of {MAX_HEADER_BYTES} bytes in all"
    letter = dead_letter(item, 2**20)
    assert origin(letter).dropped == "3000000 headers of 6000000 bytes" and letter.value == PNG
    with pytest.raises(ValueError, match="cannot be sent again"):
        original(letter)


def test_a_key_may_have_its_bound_and_no_byte_more() -> None:
    label = (("label", b"a"),)
    assert isinstance(codec().decode(HERE, 0, Raw(bytes(MAX_KEY_BYTES), PNG, label), None), Record)
    assert rejected(Raw(bytes(MAX_KEY_BYTES + 1), PNG, label)).reason == Reason.TOO_LARGE


def envelope(**fields: Any) -> Raw:
    return Raw(None, json.dumps({"label": "a", "image": base64.b64encode(PNG).decode()} | fields).encode())


def nested(levels: int) -> Any:
    return json.loads("[" * levels + "]" * levels)


def test_an_envelope_may_be_nested_to_its_bound_and_no_deeper() -> None:
    # the envelope itself is a level; brackets in texts are none
    deepest = envelope(other=nested(MAX_JSON_DEPTH - 1), text='[[[\\"[[[' * 50)
    assert isinstance(codec().decode(HERE, 0, deepest, None), Record)
    item = rejected(envelope(other=nested(MAX_JSON_DEPTH)))
    assert (item.reason, item.detail) == (Reason.BAD_ENVELOPE, "JSON nested more than 32 levels deep")
    assert rejected(Raw(None, b'{"a":' * 5000)).reason == Reason.BAD_ENVELOPE


def test_an_envelope_may_have_values_up_to_its_bound_and_no_more() -> None:
    # of label, image and other there are two commas and two brackets
    assert isinstance(codec().decode(HERE, 0, envelope(other=[1] * (MAX_JSON_PARTS - 3)), None), Record)
    item = rejected(envelope(other=[1] * (MAX_JSON_PARTS - 2)))
    assert item.reason == Reason.BAD_ENVELOPE and item.detail == "JSON of about 10001 values, at most 10000"


def test_an_envelope_of_a_large_image_takes_little_more_memory_than_the_image() -> None:
    big = Codec(max_image_bytes=2**24, max_image_pixels=10**7, max_label_chars=200)
    attack = b'{"label": "a", "image": "", "x": [' + b"[]," * 7_000_000 + b"[]]}"
    tracemalloc.start()
    assert isinstance(big.decode(HERE, 0, Raw(None, attack), None), Rejected)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_json_that_is_not_utf_8_is_no_envelope_but_a_byte_order_mark_is_fine() -> None:
    text = (envelope().value or b"").decode()
    headers = (("content-type", b"application/json"),)
    assert isinstance(codec().decode(HERE, 0, Raw(None, text.encode("utf-8-sig"), headers), None), Record)
    assert rejected(Raw(None, text.encode("utf-16"), headers)).reason == Reason.BAD_ENVELOPE


@pytest.mark.parametrize("field", ["label", "image_url", "sha256", "size", "control"])
def test_what_a_rejection_repeats_of_a_field_is_cut(field: str) -> None:
    claim = {"image_url": "https://x/", "sha256": "0" * 64, "size": 1}
    for odd in ("x" * 2**17, ["x" * 1000] * 100, {"a": "y" * 2**17}):
        raw = Raw(None, json.dumps({"label": "a"} | claim | {field: odd}).encode())
        item = codec().decode(HERE, 0, raw, None)
        assert isinstance(item, Rejected) and len(item.detail) <= 400, item


def test_a_url_may_be_as_long_as_servers_take() -> None:
    def claim(length: int) -> object:
        url = "https://x/".ljust(length, "a")
        return codec().decode(HERE, 0, envelope(image_url=url, sha256="0" * 64), None)

    assert isinstance(claim(MAX_URL_CHARS), Claim)
    too_long = claim(MAX_URL_CHARS + 1)
    assert isinstance(too_long, Rejected) and too_long.reason == Reason.BAD_SCHEMA


def test_a_fetched_image_must_be_the_announced_one() -> None:
    digest = hashlib.sha256(PNG).hexdigest()
    claim = Claim(HERE, 1, "a", "https://x/", digest, len(PNG), None, Raw(None, None))
    assert isinstance(codec().redeem(claim, PNG), Record)
    other = codec().redeem(claim, PNG[:-1] + b"x")
    shorter = codec().redeem(claim, PNG[:-1])
    assert isinstance(other, Rejected) and other.reason == Reason.FETCH_FAILED and digest in other.detail
    assert isinstance(shorter, Rejected) and shorter.reason == Reason.FETCH_FAILED


def test_no_bytes_whatever_make_the_codec_raise() -> None:
    rng = random.Random(7)
    messages = [message(json.loads(path.read_text())) for path in GOLDEN]
    for _ in range(5000):
        raw = rng.choice(messages)
        value = bytearray(raw.value or b"")[:5000]
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(value) + 1)
            value[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        headers = [(name, rng.choice([content, None, rng.randbytes(4)])) for name, content in raw.headers]
        rng.shuffle(headers)
        mutated = Raw(raw.key, rng.choice([bytes(value), rng.randbytes(30), None]), tuple(headers))

        item = codec().decode(HERE, 0, mutated, None)

        if isinstance(item, Rejected):
            assert original(dead_letter(item, 2**20)) == mutated
            assert origin(dead_letter(item, 2**20)).reason == item.reason
