"""The wire format: golden messages, limits and fuzz."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from streams.dead_letter_format import dead_letter, origin, original
from streams.formats import Claim, Codec, encode_control, encode_image
from streams.record import Control, ControlKind, Partition, Raw, Reason, Record, Rejected
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
