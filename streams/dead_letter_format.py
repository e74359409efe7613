"""The message that sets a rejected record aside, with what is needed to send it again. Pure.

This is the one home of its header names; deploy/wire-format.md lists them for readers in any language.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from streams.record import MAX_HEADER_BYTES, MAX_HEADERS, Partition, Raw, Rejected

# Named as Kafka Connect names them (its DeadLetterQueueReporter), so that tools made for Connect show them.
CONNECT_TOPIC = "__connect.errors.topic"
CONNECT_PARTITION = "__connect.errors.partition"
CONNECT_OFFSET = "__connect.errors.offset"
CONNECT_CONNECTOR = "__connect.errors.connector.name"
CONNECT_TASK = "__connect.errors.task.id"
CONNECT_STAGE = "__connect.errors.stage"
CONNECT_CLASS = "__connect.errors.class.name"
CONNECT_EXCEPTION = "__connect.errors.exception.class.name"
CONNECT_MESSAGE = "__connect.errors.exception.message"

# Ours: why, and what `original` needs to give the message back as it was. Letters already written have these names.
REASON = "gapstream.errors.reason"
OWN_HEADERS = "gapstream.errors.headers"  # how many of the first headers are the record's own
NULL_HEADERS = "gapstream.errors.null-headers"  # which of them had no value
NULL_KEY = "gapstream.errors.null-key"  # the key was made up, as there was neither key nor value
DROPPED = "gapstream.errors.dropped"  # what was too large to be kept
VALUE_BYTES = "gapstream.errors.value-bytes"  # of a value that was dropped, like the next
VALUE_SHA256 = "gapstream.errors.value-sha256"

_DETAIL_BYTES = 4096
"""Bytes that the message text may have. A detail repeats what a producer sent, which has no bound of its own."""

_ADDED_BYTES = 512
"""Room for the headers added here beside the message text; they take about 510 bytes and the topic's name. With too
little of it the broker refuses a letter that just fits, and KafkaDeadLetters tries again with half the limit."""


_ADDED_HEADERS = 16
"""Headers that are added here, at most, with some room for more."""


def dead_letter(rejected: Rejected, max_bytes: int) -> Raw:
    """Make the message that sets a record aside: its own key, value and headers, and where it came from and why.

    Origin and reason are headers named as Kafka Connect names them. A header without a value and a message without key
    and value, which clients cannot send, are written so that `original` gives them back. What would be longer than
    `max_bytes` goes without its value (hash and length stay), and where that is not enough without key and headers.
    Without headers go those to which ours cannot be added within the bounds of streams.record.
    """
    raw = rejected.raw or Raw(None, None)
    topic, partition = rejected.partition
    notes: dict[str, object] = {
        CONNECT_TOPIC: topic,
        CONNECT_PARTITION: partition,
        CONNECT_OFFSET: rejected.offset,
        CONNECT_CONNECTOR: "gapstream",
        CONNECT_TASK: 0,
        CONNECT_STAGE: "VALUE_CONVERTER",
        CONNECT_CLASS: "streams.formats.Codec",
        CONNECT_EXCEPTION: f"gapstream.{rejected.reason}",
        CONNECT_MESSAGE: _utf8(rejected.detail)[:_DETAIL_BYTES].decode("utf-8", "ignore"),
        REASON: rejected.reason,
    }
    key, value, headers = raw.key, raw.value, raw.headers
    dropped = [raw.dropped] if raw.dropped else []
    own_bytes = message_size(None, None, headers) + _ADDED_BYTES + _DETAIL_BYTES
    if message_size(key, value, headers) + _ADDED_BYTES + _DETAIL_BYTES > max_bytes and value is not None:
        dropped.append("value")
        notes[VALUE_BYTES] = len(value)
        notes[VALUE_SHA256] = hashlib.sha256(value).hexdigest()
        value = None
    if message_size(key, value, headers) + _ADDED_BYTES + _DETAIL_BYTES > max_bytes:
        dropped = ["key, value and headers"]
        key, headers = None, ()
    if headers and (len(headers) + _ADDED_HEADERS > MAX_HEADERS or own_bytes > MAX_HEADER_BYTES):
        dropped.append("headers")  # with ours beside them they could not be read again
        headers = ()
    if dropped:
        notes[DROPPED] = " and ".join(dropped)
    if key is None and value is None:
        notes[NULL_KEY] = "true"
        key = f"{topic}-{partition}-{rejected.offset}".encode()
    # kafka-python fails on a header without a value; which ones had none is in NULL_HEADERS.
    nulls = [str(index) for index, (_, value) in enumerate(headers) if value is None]
    if nulls:
        notes[NULL_HEADERS] = ",".join(nulls)
    written = tuple((name, content or b"") for name, content in headers)
    # The record may be a dead letter itself, or be made to look like one. Its own headers come first, and this, the
    # very last, says where they end.
    notes[OWN_HEADERS] = len(written)
    return Raw(key, value, written + tuple((name, str(note).encode()) for name, note in notes.items()))


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")  # JSON can spell half a surrogate pair


def message_size(key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes | None]]) -> int:
    """Give the bytes that a message takes, about and at least."""
    written = sum(len(name.encode()) + len(content or b"") + 10 for name, content in headers)
    return len(key or b"") + len(value or b"") + written


@dataclass(frozen=True, slots=True)
class Origin:
    """What a dead letter says about its record."""

    partition: Partition
    offset: int
    reason: str
    """Any text: letters outlive the program that wrote them, and its list of reasons."""
    detail: str
    dropped: str
    """What was too large to be kept; empty when nothing was."""


def _notes(letter: Raw) -> tuple[int, dict[str, bytes | None]]:
    """The number of the record's own headers, which come first, and the headers that `dead_letter` added to them.

    Whoever may write a record may give it headers with our names; only those that follow its own are ours.
    """
    name, written = letter.headers[-1] if letter.headers else ("", None)
    try:
        count = int(written or b"") if name == OWN_HEADERS else -1
    except ValueError:
        count = -1
    if not 0 <= count < len(letter.headers):
        raise ValueError(f"not a dead letter of gapstream: its last header is not {OWN_HEADERS} with their number")
    return count, dict(letter.headers[count:])


def origin(letter: Raw) -> Origin:
    """Tell where a dead letter's record came from and why it was rejected.

    Raises ValueError for a message that `dead_letter` did not write.
    """
    notes = {name: (value or b"").decode("utf-8", "replace") for name, value in _notes(letter)[1].items()}
    try:
        return Origin(
            Partition(notes[CONNECT_TOPIC], int(notes[CONNECT_PARTITION])),
            int(notes[CONNECT_OFFSET]),
            notes[REASON],
            notes[CONNECT_MESSAGE],
            notes.get(DROPPED, ""),
        )
    except KeyError as missing:
        raise ValueError(f"not a dead letter of gapstream: no header {missing}") from None


def original(letter: Raw) -> Raw:
    """Restore the message as it was before it became a dead letter, to be sent again.

    Raises ValueError when parts of it were dropped, or for a message that `dead_letter` did not write.
    """
    count, notes = _notes(letter)
    if DROPPED in notes:
        dropped = (notes[DROPPED] or b"").decode()
        raise ValueError(f"cannot be sent again: its {dropped} was too large to be kept")
    nulls = {int(index) for index in (notes.get(NULL_HEADERS) or b"").split(b",") if index}
    headers = tuple((name, None if at in nulls else value) for at, (name, value) in enumerate(letter.headers[:count]))
    return Raw(None if NULL_KEY in notes else letter.key, letter.value, headers)
