"""Dead letters read back: listed, and sent again to the topics they came from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, OffsetAndMetadata, TopicPartition
from kafka.errors import KafkaError

from streams.dead_letter_format import Origin, origin, original
from streams.kafka.connection import Connection, connecting
from streams.kafka.record_batches import Unreadable, guard
from streams.record import Raw
from streams.source import StreamError

_POLL_MS = 1000
_SILENT_POLLS = 30


@dataclass(frozen=True)
class DeadLetter:
    """One dead letter. After a crash several may have the same origin."""

    origin: Origin
    timestamp_s: float
    """When it was set aside, seconds since the epoch."""
    raw: Raw
    partition: Any
    """Where it lies itself, as the client has it."""
    offset: int


def dead_letters(connection: Connection, topics: Sequence[str]) -> Iterator[DeadLetter]:
    """Every dead letter in the dead-letter `topics` up to now. Raises StreamError."""
    with _Reader(connection, topics, None) as reader:
        yield from reader.dead_letters({})


def replay(
    connection: Connection, topics: Sequence[str], reasons: Collection[str], group: str, again: bool = False
) -> Counter[str]:
    """Send the messages behind the dead letters to where they came from; returns counts by outcome.

    Only letters with one of `reasons` (empty: all), one for each origin, and only those after the last replay of their
    reason, which `group` remembers, unless `again`. A header that had no value is sent with an empty one.
    Outcomes: `sent`, `twice` (same origin), `incomplete` (parts were too large to be kept, or the message had neither
    key nor value). Raises StreamError; then nothing is remembered.
    """
    counts: Counter[str] = Counter()
    seen: set[tuple[object, int]] = set()
    settings = connection.settings() | {"acks": "all", "enable_idempotence": True, "max_request_size": 2**30}
    with connecting(connection):
        producer = KafkaProducer(**settings, allow_auto_create_topics=False)
    try:
        with _Reader(connection, topics, f"{group}.replay") as reader:
            futures = []
            before = reader.remembered()
            starts = {} if again else {where: _start(memory, reasons) for where, memory in before.items()}
            for letter in reader.dead_letters(starts):
                place = (letter.origin.partition, letter.origin.offset)
                if reasons and letter.origin.reason not in reasons:
                    continue
                if not again and letter.offset < _replayed(before[letter.partition], letter.origin.reason):
                    continue
                if place in seen:
                    counts["twice"] += 1
                    continue
                seen.add(place)
                try:
                    message = original(letter.raw)
                    headers = [(name, value or b"") for name, value in message.headers]
                    topic = letter.origin.partition.topic
                    futures.append(producer.send(topic, message.value, message.key, headers))
                except ValueError:  # of `original`, and of the client for a message with neither key nor value
                    counts["incomplete"] += 1
                    continue
                counts["sent"] += 1
            producer.flush()
            for future in futures:
                future.get(0)
            reader.remember(before, reasons)
    except KafkaError as error:
        raise StreamError(f"dead letters could not all be sent again on {connection}: {error}; try again") from error
    finally:
        producer.close()
    return counts


Memory = Mapping[str, int]
"""Of one partition: for each reason the offset up to which its letters were sent again, under ALL that of every one."""
ALL = "all"


def _replayed(memory: Memory, reason: str) -> int:
    return max(memory.get(reason, 0), memory.get(ALL, 0))


def _start(memory: Memory, reasons: Collection[str]) -> int:
    return min(_replayed(memory, reason) for reason in reasons or (ALL,))


class _Reader:
    """A look at whole topics as they are now."""

    def __init__(self, connection: Connection, topics: Sequence[str], group: str | None) -> None:
        self._connection = connection
        self._topics = topics
        self._group = group
        self._ends: dict[Any, int] = {}

    def __enter__(self) -> _Reader:
        with connecting(self._connection):
            self._consumer = KafkaConsumer(
                **self._connection.settings(),
                group_id=self._group,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                allow_auto_create_topics=False,
            )
        guard(self._consumer)
        try:
            places = []
            for topic in self._topics:
                numbers = self._consumer.partitions_for_topic(topic)
                if not numbers:
                    raise StreamError(
                        f"{self._connection} has no dead-letter topic {topic}; nothing was set aside yet?"
                    )
                places += [TopicPartition(topic, number) for number in sorted(numbers)]
            self._consumer.assign(places)
            self._ends = self._consumer.end_offsets(places)
        except KafkaError as error:
            raise StreamError(f"cannot read {', '.join(self._topics)} on {self._connection}: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close(autocommit=False)

    def remembered(self) -> dict[Any, Memory]:
        """Of every partition; what somebody else committed under the group counts for nothing."""
        found = {place: self._consumer.committed(place, metadata=True) for place in self._ends}
        return {place: _memory(answer.metadata if answer else "") for place, answer in found.items()}

    def remember(self, before: Mapping[Any, Memory], reasons: Collection[str]) -> None:
        commits = {}
        for place, end in self._ends.items():
            now = {**before[place], **dict.fromkeys(reasons, end)} if reasons else {ALL: end}
            commits[place] = OffsetAndMetadata(end, json.dumps(now), -1)
        self._consumer.commit(commits)

    def dead_letters(self, starts: dict[Any, int]) -> Iterator[DeadLetter]:
        for place in self._ends:
            if place in starts:
                self._consumer.seek(place, starts[place])
            else:
                self._consumer.seek_to_beginning(place)
        silent = 0
        while any(self._consumer.position(place) < end for place, end in self._ends.items()):
            polled = self._consumer.poll(timeout_ms=_POLL_MS)
            silent = 0 if polled else silent + 1
            if silent > _SILENT_POLLS:
                raise StreamError(
                    f"{self._connection} gave nothing for {_SILENT_POLLS} s; not all dead letters were read"
                )
            for place, messages in polled.items():
                for message in messages:
                    if type(message) is Unreadable or message.offset >= self._ends[place]:
                        continue
                    raw = Raw(message.key, message.value, message.headers)
                    try:
                        yield DeadLetter(origin(raw), message.timestamp_ms / 1000, raw, place, message.offset)
                    except ValueError:
                        continue  # somebody else's message


def _memory(metadata: str) -> Memory:
    try:
        found = json.loads(metadata)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
