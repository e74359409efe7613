"""What a stream carries: a record, a rejected record or a control mark, each with its position.

Images stay encoded bytes. Nothing here touches a network, a disk or a tensor.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Partition(NamedTuple):
    """One ordered log. An archive is one topic with the single partition 0."""

    topic: str
    number: int


Offsets = Mapping[Partition, int]
"""Next offset to read for every partition: what follows everything that was learned, held out or set aside."""


class Reason(enum.StrEnum):
    """Why a record cannot be used. Closed: it is the label of a metric and a header of a dead letter."""

    EMPTY = "empty"
    TOO_LARGE = "too_large"
    BAD_ENVELOPE = "bad_envelope"
    BAD_SCHEMA = "bad_schema"
    MISSING_LABEL = "missing_label"
    LABEL_TYPE = "label_type"
    UNKNOWN_LABEL = "unknown_label"
    UNDECODABLE = "undecodable"
    TRUNCATED = "truncated"
    BOMB = "bomb"
    BAD_DIMENSIONS = "bad_dimensions"
    UNSUPPORTED_FORMAT = "unsupported_format"
    FETCH_FAILED = "fetch_failed"
    FETCH_FORBIDDEN = "fetch_forbidden"
    DUPLICATE = "duplicate"
    STALE = "stale"
    TASK_FAILED = "task_failed"


@dataclass(frozen=True, slots=True)
class Raw:
    """The message as it came, kept so that a dead letter can carry it unchanged."""

    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """One labelled image with its position; `image` is still encoded (JPEG, PNG, ...)."""

    partition: Partition
    offset: int
    label: str
    """Canonical class name: see `canonical_label`."""
    image: bytes
    timestamp_s: float | None = None
    """When the record was produced, seconds since the epoch; None when the stream does not say."""
    raw: Raw | None = None
    """Present when the image came inside something else (headers, an envelope) that a dead letter must repeat."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that cannot be used: counted, dead-lettered, never fatal."""

    partition: Partition
    offset: int
    reason: Reason
    detail: str
    raw: Raw | None = None


class ControlKind(enum.StrEnum):
    TASK_BOUNDARY = "task-boundary"
    FLUSH = "flush"


@dataclass(frozen=True, slots=True)
class Control:
    """A mark in the stream that is not an image: ends the task before it (both kinds cut; `flush` also at the end)."""

    partition: Partition
    offset: int
    kind: ControlKind


Item = Record | Rejected | Control
