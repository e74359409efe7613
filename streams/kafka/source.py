"""Records from Kafka topics.

`KafkaSource` reads in a thread of its own, so that nothing the client does (a broker that is away, a slow metadata
request, a spin) can hold up the agent's loop. All partitions of the topics are assigned by hand; positions come from
the agent's commit, and the group's offsets are only written, for lag tools.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from kafka.errors import KafkaTimeoutError, LogTruncationError, OffsetOutOfRangeError, RetriableError

from streams.claims import ImageStore
from streams.formats import Claim, Codec
from streams.kafka.breaker import Breaker
from streams.kafka.claimed_images import ClaimedImages
from streams.kafka.client import Client
from streams.kafka.connection import NOTHING_LOST, Connection, connecting, describe_error
from streams.kafka.epochs import Epochs
from streams.kafka.gaps import Gaps
from streams.kafka.handover import Handover, no_record_lost
from streams.kafka.record_batches import Message, Unreadable, rejections
from streams.kafka.topics import Topics, named
from streams.merge import Merge
from streams.record import MESSAGE_OVERHEAD, Item, Offsets, Partition, Rejected
from streams.source import StreamError

log = logging.getLogger(__name__)

_POLL_S, _BLOCKED_POLL_S = 0.5, 0.05
"""Seconds that one poll waits for messages; shorter while some are held back, as those they wait for may be there any
moment. A stop and a commit are seen later by this much."""

_ENDS_S = 0.25
"""Seconds between looks at the ends of partitions while records wait for them. Records of a stream with a silent
partition come later by up to this much, and each look costs a request to every broker."""

_FAILURES, _FAILURES_WITHIN_S = 5, 300
"""Failures of the client that end the stream, when none comes later than 300 seconds after the one before. Chosen by
hand. An outage of the cluster does not end it: it is waited for without end."""

_BACKOFF_S = 0.5
"""Half the seconds before the first new client; they double with each failure, up to 32. Chosen by hand: a cluster that
comes back is read again within half a minute."""

_CLOSE_S = 2.5
"""Seconds that `close` waits for the reader's thread: its poll (0.5), the copy of the last commit (1.5), closing the
client (0.5). A thread that takes longer ends with the process."""


class KafkaSource:
    """It gives the records of one or more topics, all partitions in one order (see streams.merge). Used from one
    thread.

    It connects when it is made and reads from `seek` on. A failing client is replaced by a new one at the same
    positions; what no new client can cure is raised by `poll` as StreamError.
    """

    exhausted = False
    live = True

    def __init__(
        self,
        connection: Connection,
        topics: Sequence[str],
        codec: Codec,
        *,
        group: str = "gapstream",
        start: str = "earliest",
        on_lost: Literal["stop", "skip"] = "stop",
        merge_wait_s: float = 2.0,
        discover_s: float = 10.0,
        fetch_bytes: int = 16 * 2**20,
        stall_s: float = 120.0,
        images: ImageStore | None = None,
        breaker: Breaker | None = None,
    ) -> None:
        """`start`: where partitions begin that no commit knows: earliest, latest, group (the group's offsets, else
        earliest) or an ISO 8601 time. `on_lost`: what happens when the log no longer has what follows the commit.
        `merge_wait_s`: see streams.merge. `discover_s`: seconds between looks for new partitions. `fetch_bytes`: what
        is fetched and not yet taken by `poll`, about. `stall_s`: seconds without a sign of the reader's thread after
        which `poll` raises. `images`: brings images that messages only point at; without it there may be none.

        Raises StreamError when the cluster or a topic cannot be had.
        """
        self._connection = connection
        self._codec = codec
        self._group = group
        self._discover_s = discover_s
        self._fetch_bytes = fetch_bytes
        self._stall_s = stall_s
        self._handover = Handover(fetch_bytes)
        self._stopping = self._handover.stopping
        self._thread: threading.Thread | None = None
        fetch = images.fetch if images else None
        self._claimed_images = ClaimedImages(
            lambda claim: codec.fetch(claim, fetch), self._stopping, self._handover.alive, self._hold_back
        )
        self._breaker = breaker or Breaker()
        # What decoding finds is counted apart: the same records would count twice, and as good the first time.
        self._late_breaker = Breaker(self._breaker.share, self._breaker.window, self._breaker.pause_s)
        self._late_breaker_opened = False
        self._merge: Merge[tuple[Item | Claim, int]] = Merge(merge_wait_s)
        self._positions: dict[Partition, int] = {}
        self._ends: dict[Partition, int] = {}
        self._gaps = Gaps()
        self._epochs = Epochs()
        self._merging_bytes: Counter[Partition] = Counter()
        self._fetched_again: set[tuple[Partition, int]] = set()
        self._last_merge = time.monotonic()
        self._next_discovery = self._next_ends = 0.0
        self._holding = ""
        self.positions: Offsets = {}
        """Where `seek` began, for every partition there was; and where topics stopped that are not read any more."""
        try:
            with connecting(connection):
                self._client = Client(connection, group, fetch_bytes)
            self._topics = Topics(self._client, connection, topics, start, on_lost)
        except StreamError:
            raise
        except Exception as error:
            raise StreamError(f"cannot read {', '.join(topics)} from {connection}: {describe_error(error)}") from error

    @property
    def fingerprint(self) -> str:
        """The topics with the identity their cluster gave them when they were created, also those read before."""
        return self._topics.fingerprint

    def continues(self, fingerprint: str) -> bool:
        """Tell whether a commit under `fingerprint` can be gone on from: topics may have been added or removed.

        A topic that was deleted and created again raises PositionError, or begins anew where `on_lost` is skip.
        """
        return self._topics.continues(fingerprint)

    def seek(self, offsets: Offsets, epochs: Mapping[Partition, int] | None = None) -> None:
        """Begin to read. Raises PositionError, StreamError."""
        try:
            self._epochs.begin(offsets, epochs or {})
            self._positions, unread = self._topics.first_positions(self._client, offsets, self._epochs)
            self._merge.track(self._positions)
            self._gaps.begin(self._positions)
            self._client.assign(self._positions, self._epochs.before(self._positions))
        except StreamError:
            raise
        except Exception as error:
            raise StreamError(f"no positions on {self._connection}: {describe_error(error)}") from error
        at = ", ".join(f"{named([partition])}:{offset}" for partition, offset in sorted(self._positions.items()))
        log.info("reading %s from %s", at, self._connection)
        self.positions = unread | self._positions
        self._handover.alive()
        self._thread = threading.Thread(target=self._run, name="kafka-source", daemon=True)
        self._thread.start()

    def poll(self, timeout_s: float) -> Sequence[Item]:
        """Give the next items in order, at most some thousand. Raises StreamError when the stream cannot go on."""
        if items := self._handover.take(timeout_s):
            return items
        silent = self._handover.silent_s
        if self._thread and silent > self._stall_s:
            # A poll of kafka-python may spin for ever, with no way to stop it: only a new process helps.
            raise StreamError(
                f"the Kafka client has not come back for {silent:.0f} s, at most {self._stall_s:.0f} were expected; "
                f"stopping. {NOTHING_LOST}"
            )
        return ()

    def throttle(self, full: bool) -> None:
        """Hand out nothing while `full`, and fetch nothing beyond `fetch_bytes`."""
        self._handover.throttle(full)

    def vouches(self, timeout_s: float) -> bool:
        """Tell whether the cluster still has what was read, see Topics.vouches. Raises PositionError."""
        return self._topics.vouches(self._reached, timeout_s)

    def past_marks(self, offsets: Offsets) -> Offsets:
        """Give the offsets, moved behind marks of transactions and other offsets that hold no record."""
        return self._gaps.past(offsets)

    def epochs(self, offsets: Offsets) -> Mapping[Partition, int]:
        """Give the leader epoch of what lies before each of the offsets, where it is known."""
        return self._epochs.before(offsets)

    def acknowledge(self, offsets: Offsets) -> None:
        """Copy a commit's offsets to the group, soon; only the newest ones count."""
        self._handover.acknowledge(offsets)

    def judged(self, samples: int, rejected: int) -> None:
        """Count what decoding `samples` of the records for learning found: `rejected` of them cannot be used."""
        if self._late_breaker.saw(samples, rejected):
            self._late_breaker_opened = True  # the reader's thread does the waiting

    def lag(self) -> dict[tuple[str, int], int]:
        """Give the number of records not handed over yet, per (topic, partition) whose end is known."""
        # Copies, as the reader's thread changes both: a copy is one step under the interpreter's lock, a loop is not.
        ends, positions = self._ends.copy(), self._positions.copy()
        return {
            (partition.topic, partition.number): max(0, end - positions[partition]) + self._merge.waiting(partition)
            for partition, end in ends.items()
            if partition in positions
        }

    @property
    def retention_s(self) -> float:
        """The shortest time in seconds for which a topic keeps records, as it was set when the source was opened."""
        return self._topics.retention_s

    @property
    def skipped(self) -> Mapping[str, int]:
        """Records by topic that were gone before they were read, where `on_lost` is skip."""
        return self._topics.skipped.copy()

    @property
    def clamped(self) -> Mapping[str, int]:
        """Records by topic whose time was so far ahead of their arrival that it was not believed."""
        return self._merge.clamped.copy()

    @property
    def holding(self) -> str:
        """Why nothing is read at present; empty when reading."""
        return self._holding

    def close(self) -> None:
        """Stop reading and copy the last commit to the group; a client that does not come back is left behind."""
        self._handover.stop()
        if self._thread is None:
            self._client.close()
            return
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.warning("the Kafka client did not stop within %.1f s and is left behind; nothing is lost", _CLOSE_S)

    # From here on: the reader's thread.

    def _run(self) -> None:
        try:
            self._read_until_stopped()
        finally:
            self._client.close()

    def _read_until_stopped(self) -> None:
        failures, last = 0, time.monotonic()
        broken = False
        while not self._stopping.is_set():
            try:
                if broken:
                    self._client = Client(self._connection, self._group, self._fetch_bytes)
                    self._client.assign(*self._reached())
                    broken = False
                self._read_once()
                continue
            except StreamError as error:
                self._handover.fail(error)
                return
            except Exception as error:
                failures = 1 if time.monotonic() - last > _FAILURES_WITHIN_S else failures + 1
                last = time.monotonic()
                if failures >= _FAILURES and not isinstance(error, RetriableError):
                    why = f"the Kafka client failed {failures} times, last with {describe_error(error)}"
                    self._handover.fail(StreamError(f"{why}; stopping. {NOTHING_LOST}"))
                    return
                wait = _BACKOFF_S * 2 ** min(failures, 6)
                log.warning("the Kafka client failed (%s); a new one is made in %.0f s", describe_error(error), wait)
            # Never the same client again: after an exception out of its poll kafka-python 3.0 may spin in the next.
            if not broken:
                self._client.close()
                broken = True
            self._stopping.wait(wait)
            self._handover.alive()
        if broken:
            return
        try:
            self._copy_commit(wait=True)
        except Exception as error:
            log.warning("the last commit's offsets were not copied to group %s: %s", self._group, describe_error(error))

    def _read_once(self) -> None:
        self._handover.alive()
        self._copy_commit()
        if self._late_breaker_opened:
            self._late_breaker_opened = False
            self._hold()
        if time.monotonic() >= self._next_discovery:
            self._discover()
            self._next_discovery = time.monotonic() + self._discover_s
        if not self._handover.wait_for_room():
            return
        self._pause_the_full()
        try:
            fetched = self._client.poll(_BLOCKED_POLL_S if self._merge.blocking else _POLL_S)
        except (OffsetOutOfRangeError, LogTruncationError):
            if not self._moved_into_log():
                raise
            return
        with no_record_lost():
            for partition, messages in fetched.items():
                self._add(partition, messages)
            self._pass_marks()
        self._ask_for_ends()
        with no_record_lost():
            self._hand_over(self._merge.take(self._elapsed_s()))

    def _add(self, partition: Partition, messages: Sequence[Message | Unreadable]) -> None:
        """Decode messages and give them to the merge."""
        decode = self._codec.decode
        entries: list[tuple[int, tuple[Item | Claim, int]]] = []
        total = 0
        # Messages of one epoch without a gap between them are a run, noted as a whole.
        first, following, epoch = -1, -1, -1
        for message in messages:
            if isinstance(message, Unreadable):
                self._passed(partition, first, following, epoch)
                first = following = message.next_offset
                place = (partition, message.offset)
                if place not in self._fetched_again:  # once it may have been the network
                    self._fetched_again.add(place)
                    log.warning("%s at %d: %s; it is fetched again", named([partition]), message.offset, message.error)
                    self._client.seek(partition, message.offset)
                    self._positions[partition] = message.offset
                    break
                self._fetched_again.discard(place)
                lost = rejections(partition, message)
                # Without a time of its own a record goes before all others: nothing waits for it.
                entries += [(0, (rejected, MESSAGE_OVERHEAD)) for rejected in lost]
                total += MESSAGE_OVERHEAD * len(lost)
                self._passed(partition, message.offset, message.next_offset, -1)
                continue
            offset, timestamp_ms, raw = message.offset, message.timestamp_ms, message.raw
            if offset != following or message.epoch != epoch:
                self._passed(partition, first, following, epoch)
                first, epoch = offset, message.epoch
            following = offset + 1
            size = raw.memory_bytes
            total += size
            item = decode(partition, offset, raw, timestamp_ms / 1000 if timestamp_ms >= 0 else None)
            entries.append((timestamp_ms, (item, size)))
        self._passed(partition, first, following, epoch)
        self._merging_bytes[partition] += total
        self._merge.add(partition, entries, time.time() * 1000)
        end = self._client.end(partition)
        if end is not None:
            self._ends[partition] = end

    def _passed(self, partition: Partition, first: int, following: int, epoch: int) -> None:
        """Note that all from `first` up to `following` was read, all of one epoch; an empty run says nothing."""
        if first < following:
            # Epochs before gaps: a commit behind a gap asks for the epoch there.
            self._epochs.read(partition, following, epoch)
            self._gaps.read(partition, first, following)
            self._positions[partition] = following

    def _pass_marks(self) -> None:
        """Move behind what holds no record, where the client has: no message will ever say so."""
        for partition, (position, epoch) in self._client.reached().items():
            if position > self._positions.get(partition, position):
                self._epochs.read(partition, position, epoch)
                self._gaps.nothing_before(partition, position)
                self._positions[partition] = position

    def _reached(self) -> tuple[Offsets, Mapping[Partition, int]]:
        """Give the positions, and the epochs before them. From any thread: epochs are noted before positions move."""
        positions = self._positions.copy()
        return positions, self._epochs.before(positions)

    def _ask_for_ends(self) -> None:
        """Ask for the ends while partitions wait for others: what is read up to its end was quiet until now."""
        if not self._merge.blocking or time.monotonic() < self._next_ends:
            return
        before_ms = time.time() * 1000
        # A partition without a leader has no end to tell; the merge goes on without it after a while.
        with contextlib.suppress(KafkaTimeoutError):
            for partition, end in self._client.ends(self._positions).items():
                self._ends[partition] = end
                # Not `_positions`, which does not move for marks of transactions and what compaction removed.
                if end <= self._client.position(partition):
                    self._merge.quiet(partition, before_ms)
        self._next_ends = time.monotonic() + _ENDS_S

    def _elapsed_s(self) -> float:
        """Seconds since the last call; no more than one, as while nothing was read nothing could be learned either."""
        before, self._last_merge = self._last_merge, time.monotonic()
        return min(1.0, self._last_merge - before)

    def _hand_over(self, entries: Sequence[tuple[Item | Claim, int]]) -> None:
        if not entries:
            return
        if len(self._positions) > 1:
            for item, size in entries:
                self._merging_bytes[item.partition] -= size
        else:
            self._merging_bytes.clear()
        items, sizes = zip(*entries, strict=True)
        if Claim in map(type, items):
            for item, size in self._claimed_images.resolved(entries):
                self._put([item], size)
        else:
            self._put(list(items), sum(sizes))

    def _put(self, items: list[Item], size: int) -> None:
        """Give items to `poll`, once there is room for them."""
        self._handover.put(items, size)
        if self._breaker.saw(len(items), [*map(type, items)].count(Rejected)):
            self._hold()

    def _hold_back(self, why: str) -> None:
        """Say why nothing is read at present; an empty text where it is."""
        self._holding = why

    def _hold(self) -> None:
        """Read nothing for a while: the breaker opened."""
        self._holding = (
            f"more than {self._breaker.share:.0%} of the last records were rejected; nothing is read for "
            f"{self._breaker.pause_s:.0f} s. See the reasons in the dead letters, and the [source] limits"
        )
        log.error("%s", self._holding)
        until = time.monotonic() + self._breaker.pause_s
        while (left := until - time.monotonic()) > 0 and not self._stopping.wait(min(left, 1)):
            self._handover.alive()
        self._holding = ""

    def _pause_the_full(self) -> None:
        """Let a partition far ahead in time wait for the others outside our memory."""
        if len(self._positions) > 1:
            share = self._fetch_bytes / len(self._positions)
            self._client.pause({partition for partition, size in self._merging_bytes.items() if size >= share})

    def _copy_commit(self, wait: bool = False) -> None:
        offsets = self._handover.acknowledged()
        self._gaps.forget(offsets or {})
        self._epochs.forget(offsets or {})
        if offsets and self._group:
            # Not those of topics that are kept for later: the group would seem to read them.
            ours = {partition: offset for partition, offset in offsets.items() if partition in self._positions}
            self._client.commit(ours, wait)

    def _discover(self) -> None:
        """Look for new partitions and at the topics' identity; learn the ends."""
        partitions = self._topics.look_again(self._client)
        if partitions is None:
            return
        new = partitions - self._positions.keys()
        if new:
            log.info("new partitions: %s", named(new))
            begins = self._client.beginnings(new)
            self._merge.track(new)
            self._gaps.begin(begins)
            self._epochs.begin(begins, {})
            self._positions.update(begins)
            self._client.assign(*self._reached())
        with contextlib.suppress(KafkaTimeoutError):
            self._ends.update(self._client.ends(self._positions))

    def _moved_into_log(self) -> bool:
        """Go on where the log begins, after the broker did not have our position; False when it has it after all."""
        self._discover()  # a topic that was created again is a clearer reason
        placed = self._topics.moved_into_log(self._client, *self._reached())
        moved = {partition: at for partition, at in placed.items() if at != self._positions[partition]}
        self._epochs.begin(moved, {})
        self._positions.update(placed)
        self._client.assign(*self._reached())
        return bool(moved)
