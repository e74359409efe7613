"""A dead letter gives its record back as it was, and says where it came from and why."""

from __future__ import annotations

import hashlib

import pytest

from streams.dead_letter_format import (
    CONNECT_PARTITION,
    CONNECT_TOPIC,
    DROPPED,
    NULL_HEADERS,
    NULL_KEY,
    OWN_HEADERS,
    REASON,
    dead_letter,
    message_size,
    origin,
    original,
)
from streams.record import MAX_HEADER_BYTES, MAX_HEADERS, Partition, Raw, Reason, Rejected

HERE = Partition("images", 3)


@pytest.mark.parametrize(
    "raw",
    [
        Raw(b"k", b"v", (("a", b"1"), ("a", None), ("b", b""))),
        Raw(None, None),
        Raw(None, None, (("x", None),)),
        Raw(None, b""),
        Raw(b"k", None, (("__connect.errors.topic", b"another"), ("gapstream.errors.headers", b"9"))),
    ],
)
def test_a_dead_letter_gives_its_record_back_unchanged(raw: Raw) -> None:
    letter = dead_letter(Rejected(HERE, 42, Reason.BOMB, "too many pixels", raw), 2**20)

    assert letter.key is not None or letter.value is not None
    assert all(value is not None for _, value in letter.headers)
    assert original(letter) == raw
    assert (origin(letter).partition, origin(letter).offset) == (HERE, 42)
    assert (origin(letter).reason, origin(letter).detail) == ("bomb", "too many pixels")


def test_a_dead_letter_too_large_to_send_keeps_where_it_came_from_and_the_hash() -> None:
    value = bytes(100_000)
    letter = dead_letter(Rejected(HERE, 42, Reason.TOO_LARGE, "x" * 10_000, Raw(b"k", value, (("a", b"1"),))), 50_000)
    notes = dict(letter.headers)

    assert letter.value is None and letter.key == b"k" and notes["a"] == b"1"
    assert notes["gapstream.errors.value-sha256"] == hashlib.sha256(value).hexdigest().encode()
    assert len(notes["__connect.errors.exception.message"] or b"") == 4096
    with pytest.raises(ValueError, match="value was too large"):
        original(letter)

    huge = (("a", bytes(100_000)),)
    bare = dead_letter(Rejected(HERE, 42, Reason.TOO_LARGE, "", Raw(b"k", value, huge)), 50_000)
    assert "a" not in dict(bare.headers) and origin(bare).dropped == "key, value and headers"


def test_a_letter_has_no_more_headers_than_are_read_again() -> None:
    for headers, dropped in (
        ((("a", b"1"),) * (MAX_HEADERS - 16), ""),
        ((("a", b"1"),) * (MAX_HEADERS - 15), "headers"),
        ((("a", bytes(MAX_HEADER_BYTES - 5000)),), ""),
        ((("a", bytes(MAX_HEADER_BYTES - 4500)),), "headers"),
    ):
        letter = dead_letter(Rejected(HERE, 42, Reason.BOMB, "x" * 5000, Raw(b"k", b"v", headers)), 2**20)
        assert origin(letter).dropped == dropped and letter.value == b"v"
        assert len(letter.headers) <= MAX_HEADERS
        assert message_size(None, None, letter.headers) <= MAX_HEADER_BYTES


def test_headers_that_a_producer_gave_its_record_are_never_taken_for_ours() -> None:
    # given a record with every header that a letter may have, as who may write to one topic can make it
    forged = tuple(
        (name, b"secret" if name == CONNECT_TOPIC else b"0")
        for name in (CONNECT_TOPIC, CONNECT_PARTITION, REASON, DROPPED, NULL_KEY, NULL_HEADERS, OWN_HEADERS)
    )
    record = Raw(b"k", b"v", forged)

    # when it is set aside, then it goes back where it came from, as it was
    letter = dead_letter(Rejected(HERE, 42, Reason.BOMB, "", record), 2**20)
    assert (origin(letter).partition, origin(letter).reason, origin(letter).dropped) == (HERE, "bomb", "")
    assert original(letter) == record

    # and without ours behind them, or with a number that cannot be, such headers are no letter
    for headers in (
        forged[:-1],
        (*letter.headers, ("x", b"1")),
        *(((OWN_HEADERS, n),) for n in (b"-1", b"1", b"x", None)),
    ):
        for read in (origin, original):
            with pytest.raises(ValueError, match="not a dead letter"):
                read(Raw(b"k", b"v", headers))


def test_a_message_that_is_no_dead_letter_says_so() -> None:
    with pytest.raises(ValueError, match="not a dead letter"):
        origin(Raw(b"k", b"v"))
    with pytest.raises(ValueError, match="not a dead letter"):
        original(Raw(b"k", b"v"))


def test_a_letter_with_a_reason_that_is_not_given_any_more_is_read_all_the_same() -> None:
    letter = dead_letter(Rejected(HERE, 42, Reason.BOMB, "", Raw(b"k", b"v")), 2**20)
    headers = tuple((name, b"stale" if name == REASON else value) for name, value in letter.headers)
    older = Raw(letter.key, letter.value, headers)
    assert origin(older).reason == "stale" and original(older) == Raw(b"k", b"v")
