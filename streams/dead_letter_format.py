"""The message that sets a rejected record aside, with what is needed to send it again. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from streams.record import (
    Partition,
    Raw,
    Rejected,
)

_DETAIL_BYTES = 4096


def dead_letter(rejected: Rejected, max_bytes: int) -> Raw:
    """The message that sets a record aside: its own key, value and headers, and where it came from and why.

    Origin and reason are headers named as Kafka Connect names them. A header without a value and a message without key
    and value, which clients cannot send, are written so that `original` gives them back. What would be longer than
    `max_bytes` goes without its value (hash and length stay), and if need be without key and headers.
    """
    raw = rejected.raw or Raw(None, None)
    topic, partition = rejected.partition
    notes: dict[str, object] = {
        "__connect.errors.topic": topic,
        "__connect.errors.partition": partition,
        "__connect.errors.offset": rejected.offset,
        "__connect.errors.connector.name": "gapstream",
        "__connect.errors.task.id": 0,
        "__connect.errors.stage": "VALUE_CONVERTER",
        "__connect.errors.class.name": "streams.formats.Codec",
        "__connect.errors.exception.class.name": f"gapstream.{rejected.reason}",
        "__connect.errors.exception.message": _text(rejected.detail)[:_DETAIL_BYTES].decode("utf-8", "ignore"),
        "gapstream.errors.reason": rejected.reason,
    }
    nulls = [str(index) for index, (_, value) in enumerate(raw.headers) if value is None]
    if nulls:
        notes["gapstream.errors.null-headers"] = ",".join(nulls)
    key, value, headers = raw.key, raw.value, raw.headers
    if message_size(key, value, headers) + 512 + _DETAIL_BYTES > max_bytes and value is not None:
        notes["gapstream.errors.dropped"] = "value"
        notes["gapstream.errors.value-bytes"] = len(value)
        notes["gapstream.errors.value-sha256"] = hashlib.sha256(value).hexdigest()
        value = None
    if message_size(key, value, headers) + 512 + _DETAIL_BYTES > max_bytes:
        notes["gapstream.errors.dropped"] = "key, value and headers"
        key, headers = None, ()
    if key is None and value is None:
        notes["gapstream.errors.null-key"] = "true"
        key = f"{topic}-{partition}-{rejected.offset}".encode()
    written = tuple((name, content or b"") for name, content in headers)
    notes["gapstream.errors.headers"] = len(written)
    return Raw(key, value, written + tuple((name, str(note).encode()) for name, note in notes.items()))


def _text(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")  # JSON can spell half a surrogate pair


def message_size(key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes | None]]) -> int:
    """Bytes a message takes, about and at least."""
    written = sum(len(name.encode()) + len(content or b"") + 10 for name, content in headers)
    return len(key or b"") + len(value or b"") + written


@dataclass(frozen=True, slots=True)
class Origin:
    """What a dead letter says about its record."""

    partition: Partition
    offset: int
    reason: str
    detail: str
    dropped: str
    """What was too large to be kept; empty: nothing."""


def origin(letter: Raw) -> Origin:
    """Raises ValueError for a message that `dead_letter` did not write."""
    notes = {name: (value or b"").decode("utf-8", "replace") for name, value in letter.headers}
    try:
        return Origin(
            Partition(notes["__connect.errors.topic"], int(notes["__connect.errors.partition"])),
            int(notes["__connect.errors.offset"]),
            notes["gapstream.errors.reason"],
            notes["__connect.errors.exception.message"],
            notes.get("gapstream.errors.dropped", ""),
        )
    except KeyError as missing:
        raise ValueError(f"not a dead letter of gapstream: no header {missing}") from None


def original(letter: Raw) -> Raw:
    """The message as it was before it became a dead letter, to be sent again.

    Raises ValueError when parts of it were dropped, or for a message that `dead_letter` did not write.
    """
    notes = dict(letter.headers)
    if "gapstream.errors.dropped" in notes:
        dropped = (notes["gapstream.errors.dropped"] or b"").decode()
        raise ValueError(f"cannot be sent again: its {dropped} was too large to be kept")
    try:
        count = int(notes["gapstream.errors.headers"] or b"")
    except KeyError as missing:
        raise ValueError(f"not a dead letter of gapstream: no header {missing}") from None
    nulls = {int(index) for index in (notes.get("gapstream.errors.null-headers") or b"").split(b",") if index}
    headers = tuple((name, None if at in nulls else value) for at, (name, value) in enumerate(letter.headers[:count]))
    return Raw(None if "gapstream.errors.null-key" in notes else letter.key, letter.value, headers)
