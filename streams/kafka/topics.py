"""Which topics and partitions are read, and where in their logs reading begins and goes on.

A commit's offsets mean something only in the log they were counted in. That log may be gone (its topic deleted and
created again), shorter than it was (retention, a truncation), another from some offset on (a truncation, and records
since) or longer (new partitions): it is found out here.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from datetime import UTC, datetime
from typing import Any, Literal

from streams.background import in_background
from streams.kafka.client import Client, ask_anew
from streams.kafka.connection import NOTHING_LOST, UNKNOWN_TOPIC, Connection, describe_error
from streams.kafka.epochs import Epochs
from streams.record import Offsets, Partition
from streams.source import PositionError, StreamError

log = logging.getLogger(__name__)

_GONE_S = 5
"""Seconds that a topic must be missing before it counts as gone. Chosen by hand: a broker that has just come back knows
of its topics within a second or two; longer only delays the message."""


class Topics:
    """These are the topics of a source, as their cluster describes them.

    Every method that asks the cluster is given the client to ask, because KafkaSource replaces a client that fails.
    """

    def __init__(
        self,
        client: Client,
        connection: Connection,
        names: Sequence[str],
        start: str,
        on_lost: Literal["stop", "skip"],
    ) -> None:
        """`start` and `on_lost`: see KafkaSource. Raises StreamError when a topic is not there or may not be read."""
        self._connection = connection
        self._names = names
        self._start = start
        self._on_lost = on_lost
        self._recreated: frozenset[str] = frozenset()
        self._no_longer_read: dict[str, str] = {}
        self._missing_since = 0.0
        self._vouching: Future[_Answers] | None = None
        self._vouched: Offsets = {}
        self._unvouched = False
        self.skipped: Counter[str] = Counter()
        """Records by topic that were gone before they were read, where `on_lost` is skip."""
        self.retention_s = client.retention_s(names)
        self._ids, self._partitions = self._describe(client.describe(self._names))

    @property
    def fingerprint(self) -> str:
        """The topics with the identity their cluster gave them when they were created, also those read before."""
        return "kafka " + " ".join(
            f"{topic}={identity}" for topic, identity in sorted((self._no_longer_read | self._ids).items())
        )

    def continues(self, fingerprint: str) -> bool:
        """Tell whether a commit under `fingerprint` can be gone on from: topics may have been added or removed.

        A topic that was deleted and created again raises PositionError, or begins anew where `on_lost` is skip.
        """
        kind, *topics = fingerprint.split(" ")  # an archive's fingerprint is one word
        if kind != "kafka":
            return False
        known = dict(topic.rsplit("=", 1) for topic in topics)
        recreated = [topic for topic, identity in self._ids.items() if known.get(topic, identity) != identity]
        if recreated and self._on_lost == "stop":
            raise PositionError(
                f"{', '.join(recreated)} on {self._connection} was deleted and created again since the last commit, so "
                'its offsets mean nothing there; source.kafka.on_lost = "skip" reads it from its beginning'
            )
        self._recreated = frozenset(recreated)
        self._no_longer_read = {topic: identity for topic, identity in known.items() if topic not in self._ids}
        return True

    def first_positions(
        self, client: Client, offsets: Offsets, epochs: Epochs
    ) -> tuple[dict[Partition, int], dict[Partition, int]]:
        """Tell where to read every partition from, after the commit with `offsets`. `epochs` knows what lies before
        them, and begins anew.

        The second value are the offsets of topics that are not read any more, which the next commit must keep. Raises
        PositionError, and StreamError or an error of the client when the cluster does not answer.
        """
        known = {partition: offset for partition, offset in offsets.items() if partition.topic not in self._recreated}
        ours = {partition: offset for partition, offset in known.items() if partition in self._partitions}
        unread = {partition: offset for partition, offset in known.items() if partition.topic in self._no_longer_read}
        for topic in sorted({partition.topic for partition in unread}):
            log.info("topic %s is not read any more; its offsets are kept, should it be read again", topic)
        gone = [partition for partition in known if partition.topic in self._ids and partition not in self._partitions]
        if gone:
            raise PositionError(f"{named(gone)} had been read before and does not exist any more on {self._connection}")
        # A partition that was added to a topic already being read began empty: all of it is new, whatever `start` says.
        begun = {partition.topic for partition in known} | self._recreated
        added = {partition for partition in self._partitions if partition.topic in begun} - ours.keys()
        first = self._partitions - ours.keys() - added
        placed, still = self.within_log(client, ours, epochs.before(ours))
        positions = placed | client.beginnings(added) | self._starts(client, first)
        epochs.begin(positions | unread, still | epochs.before(unread))
        return positions, unread

    def look_again(self, client: Client) -> set[Partition] | None:
        """Find all partitions there are now; None when a topic is not there, for once: a broker that has just come back
        may not know of it yet. Raises PositionError when it stays away, or was deleted and created again."""
        return self._again(client.describe(self._names))

    def vouches(self, read: Callable[[], tuple[Offsets, Mapping[Partition, int]]], timeout_s: float) -> bool:
        """Tell whether the cluster still has the topics and the log that were read, asked anew; False when it gave no
        answer in time. `read` gives the positions now, with their epochs.

        Raises PositionError for a topic that was created again or stays away, and for a log that was truncated.
        """
        # In a thread of its own: the reader's may be waiting for room that only this commit can make. Asked by name, as
        # a fetch of kafka-python 3.0 is: brokers answer that from a topic created again as if it were the one before.
        # An identity never comes back, so what was read before the answer was read of the topics that it names.
        if self._vouching is None:
            self._vouched, epochs = read()
            self._vouching = in_background(lambda: ask_anew(self._connection, self._names, epochs), "kafka-vouch")
        if not wait([self._vouching], timeout_s).done:
            return False
        answer, self._vouching = self._vouching, None
        try:
            topics, epoch_ends = answer.result()
            vouched = self._again(topics) is not None
            if shorter := _truncated(self._vouched, epoch_ends):
                raise self._truncation(shorter)
        except StreamError:
            raise
        except Exception as error:
            if not self._unvouched:
                log.warning("nothing is committed until %s answers again: %s", self._connection, describe_error(error))
            vouched = False
        self._unvouched = not vouched
        return vouched

    def within_log(
        self, client: Client, offsets: Offsets, epochs: Mapping[Partition, int]
    ) -> tuple[dict[Partition, int], dict[Partition, int]]:
        """Give the offsets, those no longer in the log moved to where it begins or ends, or to where it is another than
        the one they were counted in. The second value are the `epochs` that still hold. Raises PositionError."""
        begins, ends = client.beginnings(offsets), client.ends(offsets)
        truncated = _truncated(offsets, client.epoch_ends(epochs))
        # Beyond the end is as bad as before the beginning: what follows there will be other records.
        placed = {
            partition: max(begins[partition], min(offset, ends[partition], truncated.get(partition, offset)))
            for partition, offset in offsets.items()
        }
        lost = [
            f"{named([partition])}: the log has {begins[partition]} to {ends[partition]}, next was {offset}"
            + (", and what came before that was replaced" if partition in truncated else "")
            for partition, offset in offsets.items()
            if placed[partition] != offset or partition in truncated
        ]
        if lost and self._on_lost == "stop":
            raise PositionError(
                f"{self._connection} no longer has what follows the last commit ({'; '.join(lost)}): retention deleted "
                'it or the log was truncated. source.kafka.on_lost = "skip" goes on with what there is'
            )
        for text in lost:
            log.warning("skipping what is lost: %s", text)
        for partition, offset in offsets.items():
            self.skipped[partition.topic] += max(0, placed[partition] - offset)
        still = {
            partition: epoch
            for partition, epoch in epochs.items()
            if placed[partition] == offsets[partition] and partition not in truncated
        }
        return placed, still

    def moved_into_log(
        self, client: Client, positions: Offsets, epochs: Mapping[Partition, int]
    ) -> dict[Partition, int]:
        """Apply `within_log` to positions that are being read. Raises PositionError also for a log that became shorter:
        what was read of its end, and perhaps learned, will come a second time as something else."""
        placed, still = self.within_log(client, positions, epochs)
        replaced = epochs.keys() - still.keys()
        back = [
            partition
            for partition, offset in placed.items()
            if offset < positions[partition] or (offset == positions[partition] and partition in replaced)
        ]
        if back:
            raise self._truncation(back)
        return placed

    def _truncation(self, partitions: Iterable[Partition]) -> PositionError:
        return PositionError(
            f"the log of {named(partitions)} on {self._connection} was truncated below what was read; stopping with "
            f"nothing of it committed. {NOTHING_LOST}"
        )

    def _again(self, topics: Collection[Mapping[str, Any]]) -> set[Partition] | None:
        """Do what `look_again` does, with what the cluster said of the topics."""
        try:
            ids, partitions = self._describe(topics)
        except StreamError as error:
            now = time.monotonic()
            self._missing_since = self._missing_since or now
            if now - self._missing_since >= _GONE_S:
                raise PositionError(f"{error}; it was there before. {NOTHING_LOST}") from None
            return None
        self._missing_since = 0.0
        recreated = [topic for topic, identity in ids.items() if identity != self._ids[topic]]
        if recreated:
            raise PositionError(
                f"{', '.join(recreated)} on {self._connection} was deleted and created again; stopping with nothing of "
                "it committed. A restart "
                + ("reads it from its beginning" if self._on_lost == "skip" else "says what can be done")
            )
        return partitions

    def _starts(self, client: Client, partitions: Collection[Partition]) -> dict[Partition, int]:
        """Tell where partitions begin that no commit knows."""
        if not partitions or self._start == "earliest":
            return client.beginnings(partitions)
        if self._start == "latest":
            return client.ends(partitions)
        if self._start == "group":
            of_group = client.committed(partitions)  # perhaps years old, so it may be gone from the log as well
            return self.within_log(client, of_group, {})[0] | client.beginnings(set(partitions) - of_group.keys())
        # A time without a zone is UTC, not this machine's: another machine must begin at the same place.
        moment = datetime.fromisoformat(self._start)
        return client.at_time(partitions, moment if moment.tzinfo else moment.replace(tzinfo=UTC))

    def _describe(self, topics: Collection[Mapping[str, Any]]) -> tuple[dict[str, str], set[Partition]]:
        """Ask for the identity of every topic, and all their partitions. Raises StreamError for a topic that is not
        there.
        """
        missing = [topic["name"] for topic in topics if topic["error_code"] == UNKNOWN_TOPIC]
        if missing:
            raise StreamError(
                f"{self._connection} has no topic {', '.join(missing)}; create it or set source.kafka.topics"
            )
        refused = [f"{topic['name']} (error {topic['error_code']})" for topic in topics if topic["error_code"]]
        if refused:
            raise StreamError(
                f"{self._connection} does not describe topic {', '.join(refused)}; is reading it allowed?"
            )
        partitions = {
            Partition(topic["name"], part["partition_index"]) for topic in topics for part in topic["partitions"]
        }
        return {topic["name"]: str(topic["topic_id"]) for topic in topics}, partitions


_Answers = tuple[list[dict[str, Any]], dict[Partition, int | None]]
"""What `ask_anew` gives."""


def _truncated(offsets: Offsets, epoch_ends: Mapping[Partition, int | None]) -> dict[Partition, int]:
    """Find the partitions of which records before the offset were lost, and where in the log that was.

    It is the offset itself where the epoch is one that the log never had: then it cannot be told.
    """
    return {
        partition: offsets[partition] if end is None else end
        for partition, end in epoch_ends.items()
        if end is None or end < offsets[partition]
    }


def named(partitions: Iterable[Partition]) -> str:
    """Name partitions as a message does, like `images/0, images/1`."""
    return ", ".join(f"{partition.topic}/{partition.number}" for partition in sorted(partitions))
