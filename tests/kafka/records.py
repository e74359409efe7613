"""Labelled images sent to a topic, and what a source brings back of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kafka import KafkaProducer

from streams.formats import Codec, encode_image
from streams.kafka.source import KafkaSource
from streams.record import Item, Partition, Raw, Reason, Record, Rejected
from tests.bad_images import encoded, picture

JPEG = encoded(picture(), "JPEG")
CODEC = Codec(max_image_bytes=2**20, max_image_pixels=10**7, max_label_chars=200)
Open = Callable[..., KafkaSource]
"""What the fixture `open_source` gives."""


def read(source: KafkaSource, count: int, timeout_s: float = 20) -> list[Item]:
    """The next `count` items; fails when they do not come."""
    items: list[Item] = []
    deadline = time.monotonic() + timeout_s
    while len(items) < count:
        items += source.poll(0.5)
        assert time.monotonic() < deadline, f"{len(items)} of {count} items within {timeout_s} s"
    assert len(items) == count
    return items


def send(producer: KafkaProducer, topic: str, labels: Sequence[str], partition: int = 0, **options: Any) -> None:
    for label in labels:
        value, headers = encode_image(label, JPEG)
        producer.send(topic, value, label.encode(), headers, partition=partition, **options)
    producer.flush()


def labels(items: Sequence[Item]) -> list[str]:
    return [item.label for item in items if isinstance(item, Record)]


def offsets(items: Iterable[Item]) -> list[int]:
    return [item.offset for item in items]


def rejected(topic: str, offset: int, raw: Raw | None, reason: Reason = Reason.BOMB) -> Rejected:
    return Rejected(Partition(topic, 0), offset, reason, "why", raw)
