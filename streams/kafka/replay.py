"""Dead letters read back: listed, and sent again to the topics they came from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kafka import KafkaConsumer, KafkaProducer, OffsetAndMetadata, TopicPartition
from kafka.errors import KafkaError

from streams.dead_letter_format import Origin, origin, original
from streams.kafka.connection import Connection, connecting
from streams.kafka.record_batches import Unreadable, guard
from streams.record import Partition, Raw
from streams.source import StreamError

_POLL_MS = 1000
"""Time that one poll waits for letters; with _SILENT_POLLS it says how long a silent cluster is waited for."""

_SILENT_POLLS = 30
"""Polls without a letter after which reading is given up: after 30 s. Chosen by hand; a leader's election takes less,
and somebody waits at the terminal."""

_EVERY_REASON = "all"
"""In the place of a reason: what a replay of all reasons passed. No reason has this name."""

Passed = Mapping[str, int]
"""For each reason the offset up to which a partition's letters were sent again; under _EVERY_REASON that of all of it.
The replay group commits it as JSON, in the text that Kafka keeps with an offset."""


@dataclass(frozen=True)
class DeadLetter:
    """This is one dead letter. After a crash several may have the same origin."""

    origin: Origin
    timestamp_s: float
    """When it was set aside, seconds since the epoch."""
    raw: Raw
    partition: Partition
    """The partition of the dead-letter topic in which it lies itself, at `offset`."""
    offset: int


def dead_letters(connection: Connection, topics: Sequence[str]) -> Iterator[DeadLetter]:
    """Give every dead letter in the dead-letter `topics` up to now. Raises StreamError."""
    with _TopicsReader(connection, topics, None) as reader:
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
    seen: set[tuple[Partition, int]] = set()
    with connecting(connection):
        producer = KafkaProducer(**connection.producer_settings(), allow_auto_create_topics=False)
    try:
        # A group of its own: the agent copies its commits to `group`, and lag tools read them there.
        with _TopicsReader(connection, topics, f"{group}.replay") as reader:
            futures = []
            passed = reader.passed()
            starts = {} if again else {partition: _start(before, reasons) for partition, before in passed.items()}
            for letter in reader.dead_letters(starts):
                place = (letter.origin.partition, letter.origin.offset)
                if reasons and letter.origin.reason not in reasons:
                    continue
                if not again and letter.offset < _passed_for(passed[letter.partition], letter.origin.reason):
                    continue
                if place in seen:
                    counts["twice"] += 1
                    continue
                seen.add(place)
                try:
                    message = original(letter.raw)
                    headers = [(name, value or b"") for name, value in message.headers]  # the client takes no null
                    topic = letter.origin.partition.topic
                    futures.append(producer.send(topic, message.value, message.key, headers))
                except ValueError:  # of `original`, and of the client for a message with neither key nor value
                    counts["incomplete"] += 1
                    continue
                counts["sent"] += 1
            # `flush` returns when every send has an outcome; whether it was delivered only its future says.
            producer.flush()
            for future in futures:
                future.get(0)
            reader.remember(passed, reasons)
    except KafkaError as error:
        raise StreamError(f"dead letters could not all be sent again on {connection}: {error}; try again") from error
    finally:
        producer.close()
    return counts


def _passed_for(passed: Passed, reason: str) -> int:
    return max(passed.get(reason, 0), passed.get(_EVERY_REASON, 0))


def _start(passed: Passed, reasons: Collection[str]) -> int:
    """Give the first offset that may hold a letter to be sent."""
    return min(_passed_for(passed, reason) for reason in reasons or (_EVERY_REASON,))


class _TopicsReader:
    """Reads whole topics as they are now: up to the ends they have when it is entered."""

    def __init__(self, connection: Connection, topics: Sequence[str], group: str | None) -> None:
        self._connection = connection
        self._topics = topics
        self._group = group
        self._ends: dict[TopicPartition, int] = {}

    def __enter__(self) -> _TopicsReader:
        with connecting(self._connection):
            self._consumer = KafkaConsumer(
                **self._connection.settings(),
                group_id=self._group,
                enable_auto_commit=False,
                auto_offset_reset="earliest",  # retention may delete letters while they are read
                allow_auto_create_topics=False,
            )
        guard(self._consumer)
        try:
            partitions = []
            for topic in self._topics:
                numbers = self._consumer.partitions_for_topic(topic)
                if not numbers:
                    raise StreamError(
                        f"{self._connection} has no dead-letter topic {topic}; nothing was set aside yet?"
                    )
                partitions += [TopicPartition(topic, number) for number in sorted(numbers)]
            self._consumer.assign(partitions)
            self._ends = self._consumer.end_offsets(partitions)
        except KafkaError as error:
            raise StreamError(f"cannot read {', '.join(self._topics)} on {self._connection}: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close(autocommit=False)

    def passed(self) -> dict[Partition, Passed]:
        """Tell what earlier replays passed in every partition; an offset that somebody else committed says nothing."""
        found = {partition: self._consumer.committed(partition, metadata=True) for partition in self._ends}
        return {
            Partition(*partition): _parsed(answer.metadata if answer else "") for partition, answer in found.items()
        }

    def remember(self, before: Mapping[Partition, Passed], reasons: Collection[str]) -> None:
        """Commit that the letters of `reasons` (empty: all) are passed up to the ends."""
        commits = {}
        for partition, end in self._ends.items():
            passed = before[Partition(*partition)]
            now = {**passed, **dict.fromkeys(reasons, end)} if reasons else {_EVERY_REASON: end}
            commits[partition] = OffsetAndMetadata(end, json.dumps(now), -1)
        self._consumer.commit(commits)

    def dead_letters(self, starts: Mapping[Partition, int]) -> Iterator[DeadLetter]:
        """Give the letters from `starts` on, in partitions without one from the beginning. Raises StreamError."""
        for partition in self._ends:
            if (start := starts.get(Partition(*partition))) is not None:
                self._consumer.seek(partition, start)
            else:
                self._consumer.seek_to_beginning(partition)
        silent = 0
        # By position: the last offsets may be marks of transactions, which never come as messages.
        while any(self._consumer.position(partition) < end for partition, end in self._ends.items()):
            polled = self._consumer.poll(timeout_ms=_POLL_MS)
            silent = 0 if polled else silent + 1
            if silent > _SILENT_POLLS:
                raise StreamError(
                    f"{self._connection} gave nothing for {_SILENT_POLLS} s; not all dead letters were read"
                )
            for partition, messages in polled.items():
                for message in messages:
                    if isinstance(message, Unreadable) or message.offset >= self._ends[partition]:
                        continue
                    raw = message.raw
                    try:
                        came_from = origin(raw)
                    except ValueError:
                        continue  # somebody else's message
                    yield DeadLetter(came_from, message.timestamp_ms / 1000, raw, Partition(*partition), message.offset)


def _parsed(metadata: str) -> Passed:
    try:
        found = json.loads(metadata)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
