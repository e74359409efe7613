"""Records from Kafka topics, and dead letters to them.

`KafkaSource` reads in a thread of its own, so that nothing the client does (a broker that is away, a slow metadata
request, a spin) can hold up the agent's loop. All partitions of the topics are assigned by hand; positions come from
the agent's commit, and the group's offsets are only written, for lag tools.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Literal

from kafka import KafkaConsumer, KafkaProducer, OffsetAndMetadata, TopicPartition
from kafka.admin import KafkaAdminClient
from kafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    LogTruncationError,
    MessageSizeTooLargeError,
    OffsetOutOfRangeError,
    RetriableError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
)

from streams.batches import Unreadable, guard, rejections
from streams.claims import Fetcher
from streams.connection import Connection, abandon, connecting, longest_message, short
from streams.formats import Claim, Codec, dead_letter
from streams.merge import Merge
from streams.record import Item, Offsets, Partition, Raw, Record, Rejected
from streams.source import DeadLetterDelayed, DeadLetterError, PositionError, StreamError
from streams.threads import started

log = logging.getLogger(__name__)

_REQUEST_MS = 5_000
_POLL_RECORDS = 1000
_FETCHES = 8
_VERIFY_S = 0.25
_STUCK_S = 60
_FAILURES = 5
_BACKOFF_S = 0.5
_CLOSE_S = 2.5
_RETRY_S = 5
_PUT_S = 0.05
_PATIENCE_S = 2
_OVERHEAD = 500
_HEADER_OVERHEAD = 150
_SAFE = "Nothing is lost: a restart continues at the last commit"
_UNKNOWN_TOPIC = UnknownTopicOrPartitionError.errno


class Breaker:
    """Opens when nearly everything is rejected, lest a wrong setting empty a topic into its dead letters."""

    def __init__(self, share: float = 0.9, window: int = 1000, pause_s: float = 60) -> None:
        """Opens for `pause_s` when of the last `window` records more than `share` were rejected; 1.0: never."""
        self.share = share
        self.pause_s = pause_s
        self.window = window
        self._seen: deque[tuple[int, int]] = deque()
        self._records = self._rejected = 0

    def saw(self, records: int, rejected: int) -> bool:
        """True when it opens; what was seen until then is forgotten."""
        self._seen.append((records, rejected))
        self._records += records
        self._rejected += rejected
        while self._records - self._seen[0][0] >= self.window:
            old_records, old_rejected = self._seen.popleft()
            self._records -= old_records
            self._rejected -= old_rejected
        if self._records < self.window or self._rejected <= self.share * self._records:
            return False
        self._seen.clear()
        self._records = self._rejected = 0
        return True


class KafkaSource:
    """The records of one or more topics, all partitions in one order (see streams.merge). Used from one thread.

    Connects when made, reads from `seek` on. A failing client is replaced by a new one at the same positions; what no
    new client can cure is raised by `poll` as StreamError.
    """

    exhausted = False

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
        fetcher: Fetcher | None = None,
        breaker: Breaker | None = None,
    ) -> None:
        """`start`: where partitions begin that no commit knows: earliest, latest, group (the group's offsets, else
        earliest) or an ISO 8601 time. `on_lost`: what happens when the log no longer has what follows the commit.
        `merge_wait_s`: see streams.merge. `fetch_bytes`: fetched and not yet taken by `poll`, about.

        Raises StreamError when the cluster or a topic cannot be had.
        """
        self._connection = connection
        self._topics = tuple(topics)
        self._codec = codec
        self._group = group
        self._start = start
        self._on_lost = on_lost
        self._discover_s = discover_s
        self._fetch_bytes = fetch_bytes
        self._stall_s = stall_s
        self._fetcher = fetcher
        self._breaker = breaker or Breaker()
        self._late_breaker = Breaker(self._breaker.share, self._breaker.window, self._breaker.pause_s)
        self._opened_late = False
        self._merge: Merge[tuple[Item | Claim, int]] = Merge(merge_wait_s)
        self._positions: dict[Partition, int] = {}
        self._ends: dict[Partition, int] = {}
        self._merging: Counter[Partition] = Counter()
        self._twice: set[tuple[Partition, int]] = set()
        self._missing = 0
        self._held_since = 0.0
        self._next_discovery = self._next_verification = 0.0
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._ready: deque[tuple[list[Item], int]] = deque()
        self._ready_bytes = 0
        self._changed = threading.Condition()
        self._throttled = False
        self._committed: Offsets | None = None
        self._failure: StreamError | None = None
        self._beat = time.monotonic()
        self._holding = ""
        self._again: frozenset[str] = frozenset()
        self._unread: dict[str, str] = {}
        self.positions: Offsets = {}
        """Where `seek` began, for every partition there was; and where topics stopped that are not read any more."""
        self._skipped: Counter[str] = Counter()
        try:
            with connecting(connection):
                self._client = _Client(connection, group, fetch_bytes)
            self._ids, self._partitions = self._describe()
        except StreamError:
            raise
        except Exception as error:
            raise StreamError(f"cannot read {', '.join(topics)} from {connection}: {short(error)}") from error

    @property
    def fingerprint(self) -> str:
        """The topics with the identity their cluster gave them when they were created, also those read before."""
        return "kafka " + " ".join(
            f"{topic}={identity}" for topic, identity in sorted((self._unread | self._ids).items())
        )

    def continues(self, fingerprint: str) -> bool:
        """Whether a commit under `fingerprint` can be gone on from: topics may have been added or removed.

        A topic that was deleted and created again raises PositionError, or begins anew where `on_lost` is skip.
        """
        kind, *topics = fingerprint.split(" ")
        if kind != "kafka":
            return False
        known = dict(topic.rsplit("=", 1) for topic in topics)
        again = [topic for topic, identity in self._ids.items() if known.get(topic, identity) != identity]
        if again and self._on_lost == "stop":
            raise PositionError(
                f"{', '.join(again)} on {self._connection} was deleted and created again since the last commit, so its "
                'offsets mean nothing there; source.kafka.on_lost = "skip" reads it from its beginning'
            )
        self._again = frozenset(again)
        self._unread = {topic: identity for topic, identity in known.items() if topic not in self._ids}
        return True

    def seek(self, offsets: Offsets) -> None:
        """Begin to read. Raises PositionError, StreamError."""
        known = {where: offset for where, offset in offsets.items() if where.topic not in self._again}
        ours = {where: offset for where, offset in known.items() if where in self._partitions}
        unread = {where: offset for where, offset in known.items() if where.topic in self._unread}
        for topic in sorted({where.topic for where in unread}):
            log.info("topic %s is not read any more; its offsets are kept, should it be read again", topic)
        gone = [where for where in known if where.topic in self._ids and where not in self._partitions]
        if gone:
            raise PositionError(
                f"{_listed(gone)} had been read before and does not exist any more on {self._connection}"
            )
        try:
            begun = {where.topic for where in known} | self._again
            later = {where for where in self._partitions if where.topic in begun} - ours.keys()
            first = set(self._partitions) - ours.keys() - later
            self._positions = self._within_log(ours) | self._client.beginnings(later) | self._first_positions(first)
            self._merge.track(self._positions)
            self._client.assign(self._positions)
        except StreamError:
            raise
        except Exception as error:
            raise StreamError(f"no positions on {self._connection}: {short(error)}") from error
        at = ", ".join(f"{where.topic}/{where.number}:{offset}" for where, offset in sorted(self._positions.items()))
        log.info("reading %s from %s", at, self._connection)
        self.positions = unread | self._positions
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._read, name="kafka-source", daemon=True)
        self._thread.start()

    def poll(self, timeout_s: float) -> Sequence[Item]:
        """Items in order, at most some thousand. Raises StreamError when the stream cannot go on."""
        if self._throttled:
            self._stopping.wait(timeout_s)
        with self._changed:
            if not self._ready and not self._failure and not self._throttled:
                self._changed.wait(timeout_s)
            if self._ready and not self._throttled:
                items, size = self._ready.popleft()
                self._ready_bytes -= size
                self._changed.notify_all()
                return items
        if self._failure:
            raise self._failure
        silent = time.monotonic() - self._beat
        if self._thread and silent > self._stall_s:
            raise StreamError(
                f"the Kafka client has not come back for {silent:.0f} s, at most {self._stall_s:.0f} were expected; "
                f"stopping. {_SAFE}"
            )
        return ()

    def throttle(self, full: bool) -> None:
        """While `full` nothing is handed out, and nothing fetched beyond `fetch_bytes`."""
        self._throttled = full

    def acknowledge(self, offsets: Offsets) -> None:
        """Copy a commit's offsets to the group, soon."""
        with self._changed:
            self._committed = dict(offsets)

    def judged(self, samples: int, rejected: int) -> None:
        if self._late_breaker.saw(samples, rejected):
            self._opened_late = True

    def lag(self) -> dict[tuple[str, int], int]:
        ends, positions = self._ends.copy(), self._positions.copy()
        return {
            (where.topic, where.number): max(0, end - positions[where]) + self._merge.waiting(where)
            for where, end in ends.items()
            if where in positions
        }

    @property
    def skipped(self) -> Mapping[str, int]:
        """Records by topic that were gone before they were read, where `on_lost` is skip."""
        return self._skipped.copy()

    @property
    def holding(self) -> str:
        """Why nothing is read at present; empty when reading."""
        return self._holding

    def close(self) -> None:
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is None:
            self._client.close()
            return
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.warning("the Kafka client did not stop within %.1f s and is left behind; nothing is lost", _CLOSE_S)

    # From here on: the reader's thread.

    def _read(self) -> None:
        try:
            self._read_on()
        finally:
            self._client.close()

    def _read_on(self) -> None:
        failures, last = 0, time.monotonic()
        broken = False
        while not self._stopping.is_set():
            try:
                if broken:
                    self._client = _Client(self._connection, self._group, self._fetch_bytes)
                    self._client.assign(self._positions)
                    broken = False
                self._step()
                continue
            except StreamError as error:
                self._fail(error)
                return
            except Exception as error:
                failures = 1 if time.monotonic() - last > 300 else failures + 1
                last = time.monotonic()
                if failures >= _FAILURES and not isinstance(error, RetriableError):
                    self._fail(
                        StreamError(
                            f"the Kafka client failed {failures} times, last with {short(error)}; stopping. {_SAFE}"
                        )
                    )
                    return
                wait = _BACKOFF_S * 2 ** min(failures, 6)
                log.warning("the Kafka client failed (%s); a new one is made in %.0f s", short(error), wait)
            if not broken:
                self._client.close()
                broken = True
            self._stopping.wait(wait)
            self._beat = time.monotonic()
        if broken:
            return
        try:
            self._copy_commit(wait=True)
        except Exception as error:
            log.warning("the last commit's offsets were not copied to group %s: %s", self._group, short(error))

    def _fail(self, error: StreamError) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def _step(self) -> None:
        now = self._beat = time.monotonic()
        self._copy_commit()
        if self._opened_late:
            self._opened_late = False
            self._hold()
        if now >= self._next_discovery:
            self._discover()
            self._next_discovery = time.monotonic() + self._discover_s
        with self._changed:
            if self._ready_bytes >= self._fetch_bytes:
                self._changed.wait(0.25)
                return
        self._pause_the_full()
        try:
            fetched = self._client.poll(0.05 if self._merge.blocking else 0.5)
        except (OffsetOutOfRangeError, LogTruncationError):
            if not self._moved_into_log():
                raise
            return
        with _no_record_lost():
            for where, messages in fetched.items():
                self._take(where, messages)
        self._verify()
        with _no_record_lost():
            self._hand_over(self._merge.take(self._stuck()))

    def _take(self, where: Partition, messages: Sequence[Any]) -> None:
        decode = self._codec.decode
        entries: list[tuple[int, tuple[Item | Claim, int]]] = []
        total = 0
        for message in messages:
            if type(message) is Unreadable:
                if (where, message.offset) not in self._twice:  # once it may have been the network
                    self._twice.add((where, message.offset))
                    log.warning("%s at %d: %s; it is fetched again", _listed([where]), message.offset, message.error)
                    self._client.seek(where, message.offset)
                    self._positions[where] = message.offset
                    break
                self._twice.discard((where, message.offset))
                lost = rejections(where, message)
                entries += [(0, (rejected, _OVERHEAD)) for rejected in lost]
                total += _OVERHEAD * len(lost)
                self._positions[where] = message.next_offset
                continue
            offset, timestamp_ms, key, value, headers = message
            raw = Raw(key, value, headers)
            size = _memory(raw)
            total += size
            item = decode(where, offset, raw, timestamp_ms / 1000 if timestamp_ms >= 0 else None)
            entries.append((timestamp_ms, (item, size)))
            self._positions[where] = offset + 1
        self._merging[where] += total
        self._merge.add(where, entries)
        end = self._client.end(where)
        if end is not None:
            self._ends[where] = end

    def _verify(self) -> None:
        """While partitions wait for others, ask for the ends: what is read up to its end was quiet until now."""
        if not self._merge.blocking or time.monotonic() < self._next_verification:
            return
        before_ms = time.time() * 1000
        with contextlib.suppress(KafkaTimeoutError):  # of a partition without a leader; see `_stuck`
            for where, end in self._client.ends(self._positions).items():
                self._ends[where] = end
                if end <= self._client.position(where):
                    self._merge.quiet(where, before_ms)
        self._next_verification = time.monotonic() + _VERIFY_S

    def _stuck(self) -> bool:
        """True when records have waited too long for other partitions: they go on, in an order that may not repeat."""
        if not self._merge.blocking:
            self._held_since = 0.0
            return False
        now = time.monotonic()
        if not self._held_since:
            self._held_since = now
        if now - self._held_since < _STUCK_S:
            return False
        log.warning(
            "records waited %d s for those of %s, which cannot be read or have other dates; they go on before them",
            _STUCK_S,
            _listed(self._merge.blocking),
        )
        self._held_since = 0.0
        return True

    def _hand_over(self, entries: Sequence[tuple[Item | Claim, int]]) -> None:
        if not entries:
            return
        self._held_since = 0.0
        if len(self._positions) > 1:
            for item, size in entries:
                self._merging[item.partition] -= size
        else:
            self._merging.clear()
        if any(type(item) is Claim for item, _ in entries):
            self._redeem(entries)
        else:
            self._put([item for item, _ in entries if not isinstance(item, Claim)], sum(size for _, size in entries))

    def _redeem(self, entries: Iterable[tuple[Item | Claim, int]]) -> None:
        """Hand entries over one by one, with the images of claims fetched a few at a time ahead of it."""
        coming = iter(entries)
        ahead: deque[tuple[Item | Future[Record | Rejected], int]] = deque()
        while not self._stopping.is_set():
            for item, size in islice(coming, _FETCHES - len(ahead)):
                ahead.append((self._fetching(item) if isinstance(item, Claim) else item, size))
            if not ahead:
                return
            waiting, size = ahead.popleft()
            item = waiting.result() if isinstance(waiting, Future) else waiting
            self._beat = time.monotonic()
            self._put(
                [item], size + (len(item.image) if isinstance(waiting, Future) and isinstance(item, Record) else 0)
            )

    def _fetching(self, claim: Claim) -> Future[Record | Rejected]:
        return started(lambda: self._codec.fetched(claim, self._fetcher), "image-fetch")

    def _put(self, items: list[Item], size: int) -> None:
        with self._changed:
            while self._ready_bytes >= self._fetch_bytes and not self._stopping.is_set():
                self._beat = time.monotonic()
                self._changed.wait(0.25)
            self._ready.append((items, size))
            self._ready_bytes += size
            self._changed.notify_all()
        if self._breaker.saw(len(items), sum(type(item) is Rejected for item in items)):
            self._hold()

    def _hold(self) -> None:
        """The breaker opened: read nothing for a while."""
        self._holding = (
            f"more than {self._breaker.share:.0%} of the last records were rejected; nothing is read for "
            f"{self._breaker.pause_s:.0f} s. See the reasons in the dead letters, and the [source] limits"
        )
        log.error("%s", self._holding)
        until = time.monotonic() + self._breaker.pause_s
        while (left := until - time.monotonic()) > 0 and not self._stopping.wait(min(left, 1)):
            self._beat = time.monotonic()
        self._holding = ""

    def _pause_the_full(self) -> None:
        """A partition far ahead in time waits for the others outside our memory."""
        if len(self._positions) > 1:
            share = self._fetch_bytes / len(self._positions)
            self._client.pause({where for where, size in self._merging.items() if size >= share})

    def _copy_commit(self, wait: bool = False) -> None:
        with self._changed:
            offsets, self._committed = self._committed, None
        if offsets and self._group:
            self._client.commit({where: offset for where, offset in offsets.items() if where in self._positions}, wait)

    def _describe(self) -> tuple[dict[str, str], set[Partition]]:
        """Identity of every topic, and all their partitions. Raises StreamError for a topic that is not there."""
        topics = self._client.describe(self._topics)
        missing = [topic["name"] for topic in topics if topic["error_code"] == _UNKNOWN_TOPIC]
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

    def _discover(self) -> None:
        """Look for new partitions and at the topics' identity; learn the ends."""
        try:
            ids, partitions = self._describe()
        except StreamError as error:
            self._missing += 1
            if self._missing > 1:
                raise PositionError(f"{error}; it was there before. Nothing is lost of what was committed") from None
            return
        self._missing = 0
        again = [topic for topic, identity in ids.items() if identity != self._ids[topic]]
        if again:
            raise PositionError(
                f"{', '.join(again)} on {self._connection} was deleted and created again; stopping. A restart "
                + ("reads it from its beginning" if self._on_lost == "skip" else "says what can be done")
            )
        new = partitions - self._positions.keys()
        if new:
            log.info("new partitions: %s", _listed(new))
            begins = self._client.beginnings(new)
            self._merge.track(new)
            self._positions.update(begins)
            self._client.assign(self._positions)
        with contextlib.suppress(KafkaTimeoutError):
            self._ends.update(self._client.ends(self._positions))

    def _first_positions(self, partitions: set[Partition]) -> dict[Partition, int]:
        if not partitions or self._start == "earliest":
            return self._client.beginnings(partitions)
        if self._start == "latest":
            return self._client.ends(partitions)
        if self._start == "group":
            ours = self._client.committed(partitions)
            return self._within_log(ours) | self._client.beginnings(partitions - ours.keys())
        moment = datetime.fromisoformat(self._start)
        return self._client.at_time(partitions, moment if moment.tzinfo else moment.replace(tzinfo=UTC))

    def _within_log(self, offsets: Offsets) -> dict[Partition, int]:
        """The offsets, those no longer in the log moved to where it begins or ends. Raises PositionError."""
        begins, ends = self._client.beginnings(offsets), self._client.ends(offsets)
        placed = {where: min(max(offset, begins[where]), ends[where]) for where, offset in offsets.items()}
        lost = [
            f"{where.topic}/{where.number}: the log has {begins[where]} to {ends[where]}, next was {offset}"
            for where, offset in offsets.items()
            if placed[where] != offset
        ]
        if lost and self._on_lost == "stop":
            raise PositionError(
                f"{self._connection} no longer has what follows the last commit ({'; '.join(lost)}): retention deleted "
                'it or the log was truncated. source.kafka.on_lost = "skip" goes on with what there is'
            )
        for text in lost:
            log.warning("skipping what is lost: %s", text)
        for where, offset in offsets.items():
            self._skipped[where.topic] += max(0, placed[where] - offset)
        return placed

    def _moved_into_log(self) -> bool:
        """Go on where the log begins, after the broker did not have our position; False when it has it after all."""
        self._discover()  # a topic that was created again is a clearer reason
        placed = self._within_log(self._positions)
        back = [where for where, offset in placed.items() if offset < self._positions[where]]
        if back:
            raise PositionError(f"the log of {_listed(back)} was truncated below what was read; stopping. {_SAFE}")
        moved = placed != self._positions
        self._positions.update(placed)
        self._client.assign(self._positions)
        return moved


class _Client:
    """The calls we make to a cluster, in our own words. Every one is bounded in time."""

    def __init__(self, connection: Connection, group: str, fetch_bytes: int) -> None:
        settings = connection.settings()
        self._consumer = KafkaConsumer(
            **settings,
            group_id=group or None,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            allow_auto_create_topics=False,
            fetch_max_bytes=fetch_bytes,
            max_partition_fetch_bytes=min(fetch_bytes, 4 * 2**20),
            request_timeout_ms=30_000,
            metadata_max_age_ms=30_000,
            metrics_enabled=False,
        )
        guard(self._consumer)
        self._group = group
        try:
            self._admin = KafkaAdminClient(**settings, request_timeout_ms=_REQUEST_MS)
        except BaseException:
            self._consumer.close(timeout_ms=0)
            raise

    def close(self) -> None:
        for part in (lambda: self._consumer.close(autocommit=False, timeout_ms=500), self._admin.close):
            try:
                part()
            except Exception as error:
                log.debug("closing the Kafka client: %s", short(error))

    def describe(self, topics: Iterable[str]) -> list[dict[str, Any]]:
        return self._admin.describe_topics(list(topics))

    def assign(self, positions: Offsets) -> None:
        self._consumer.assign([TopicPartition(*where) for where in positions])
        for where, offset in positions.items():
            self.seek(where, offset)

    def seek(self, where: Partition, offset: int) -> None:
        self._consumer.seek(TopicPartition(*where), offset)

    def poll(self, timeout_s: float) -> dict[Partition, list[Any]]:
        polled = self._consumer.poll(timeout_ms=int(timeout_s * 1000), max_records=_POLL_RECORDS)
        return {Partition(*where): messages for where, messages in polled.items()}

    def pause(self, wanted: set[Partition]) -> None:
        """Exactly these are paused from now on."""
        paused = {Partition(*where) for where in self._consumer.paused()}
        self._consumer.pause(*(TopicPartition(*where) for where in wanted - paused))
        self._consumer.resume(*(TopicPartition(*where) for where in paused - wanted))

    def position(self, where: Partition) -> int:
        return self._consumer.position(TopicPartition(*where), timeout_ms=_REQUEST_MS) or 0

    def end(self, where: Partition) -> int | None:
        """As the last fetch had it."""
        return self._consumer.highwater(TopicPartition(*where))

    def ends(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return self._asked(self._consumer.end_offsets, partitions)

    def beginnings(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return self._asked(self._consumer.beginning_offsets, partitions)

    @staticmethod
    def _asked(ask: Callable[..., Mapping[Any, int]], partitions: Iterable[Partition]) -> dict[Partition, int]:
        wanted = [TopicPartition(*where) for where in partitions]
        answer = ask(wanted, timeout_ms=_REQUEST_MS) if wanted else {}
        return {Partition(*where): offset for where, offset in answer.items()}

    def at_time(self, partitions: Iterable[Partition], moment: datetime) -> dict[Partition, int]:
        """First offset from `moment` on; the end where there is none yet."""
        wanted = {TopicPartition(*where): int(moment.timestamp() * 1000) for where in partitions}
        found = self._consumer.offsets_for_times(wanted, timeout_ms=_REQUEST_MS)
        known = {Partition(*where): answer.offset for where, answer in found.items() if answer and answer.offset >= 0}
        return self.ends(Partition(*where) for where in wanted) | known

    def committed(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        answers = {
            where: self._consumer.committed(TopicPartition(*where), timeout_ms=_REQUEST_MS) for where in partitions
        }
        return {where: offset for where, offset in answers.items() if offset is not None}

    def commit(self, offsets: Offsets, wait: bool) -> None:
        wanted = {TopicPartition(*where): OffsetAndMetadata(offset, "", -1) for where, offset in offsets.items()}
        if wait:
            self._consumer.commit(wanted, timeout_ms=1500)
        else:
            self._consumer.commit_async(wanted, callback=self._committed)

    def _committed(self, offsets: Any, answer: Any) -> None:
        if isinstance(answer, Exception):
            log.warning("offsets were not copied to group %s: %s; lag tools are behind", self._group, short(answer))


class KafkaDeadLetters:
    """Sends rejected records to the dead-letter topic of the topic they came from. Used from one thread.

    After a crash, or an outage longer than the client goes on trying, the same coordinates may come twice.
    """

    def __init__(
        self,
        connection: Connection,
        topics: Sequence[str],
        name: str = "{topic}.dlq",
        create: bool = True,
        max_pending_bytes: int = 64 * 2**20,
    ) -> None:
        """`name`: of the dead-letter topic, with {topic} for the source's. `create`: where it does not exist.

        Raises DeadLetterError when a dead-letter topic cannot be had.
        """
        self._connection = connection
        self._names = {topic: name.format(topic=topic) for topic in topics}
        self._max_pending = max_pending_bytes
        self._unsent: deque[tuple[Rejected, int]] = deque()
        self._pending: deque[tuple[Any, Rejected, int]] = deque()
        self._waiting_bytes = 0
        self._failure = ""
        self._retry_at = 0.0
        self._coming: Future[KafkaProducer] | None = None
        try:
            self._limits = self._topics_ready(create)
            self._producer: KafkaProducer | None = self._new_producer()
        except StreamError:
            raise
        except Exception as error:
            names = ", ".join(self._names.values())
            raise DeadLetterError(f"no dead-letter topic {names} on {connection}: {short(error)}") from error

    def put(self, rejected: Rejected) -> None:
        """Send, without waiting for the answer. Raises DeadLetterError when too much waits for one."""
        self._settle()
        if self._waiting_bytes > self._max_pending:
            with contextlib.suppress(DeadLetterDelayed):
                self.flush(_PATIENCE_S)
        if self._waiting_bytes > self._max_pending:
            raise DeadLetterError(
                f"{self._waiting_bytes} bytes of dead letters wait for {self._connection} "
                f"({self._failure or 'no answer'}), at most {self._max_pending} may; stopping. {_SAFE}"
            )
        size = _weight(rejected)
        self._waiting_bytes += size
        self._unsent.append((rejected, size))
        if time.monotonic() >= self._retry_at:
            self._send_all(time.monotonic() + _PUT_S)

    def flush(self, timeout_s: float) -> None:
        """Returns when every letter is acknowledged. Raises DeadLetterDelayed while some are not."""
        deadline = time.monotonic() + timeout_s
        self._settle()
        while self._pending or self._unsent:
            sent = self._send_all(deadline)
            left = max(0.0, deadline - time.monotonic())
            if self._pending:
                with contextlib.suppress(KafkaError):  # `_settle` looks at the outcome
                    self._pending[0][0].get(left)
            elif not sent:
                time.sleep(min(left, 0.1))
            self._settle()
            if time.monotonic() >= deadline:
                break
        if self._pending or self._unsent:
            waiting = len(self._pending) + len(self._unsent)
            failure = self._failure or "no answer"
            raise DeadLetterDelayed(f"{waiting} dead letters wait for {self._connection} ({failure})")
        self._failure = ""

    def close(self) -> None:
        """Without a `flush` before it, letters may be lost."""
        if self._coming is not None:
            self._coming.add_done_callback(_abandon_late)
        if self._producer is not None:
            abandon(self._producer)

    def _send_all(self, deadline: float) -> bool:
        """Send what waits to be sent, until `deadline` has passed or one cannot be sent; False for the latter."""
        while self._unsent:
            producer = self._connected(deadline)
            if producer is None or not self._send(producer, *self._unsent[0]):
                self._retry_at = time.monotonic() + _RETRY_S
                return False
            self._unsent.popleft()
            if time.monotonic() >= deadline:
                break
        return True

    def _send(self, producer: KafkaProducer, rejected: Rejected, size: int) -> bool:
        topic = rejected.partition.topic
        letter = dead_letter(rejected, self._limits[topic])
        try:
            future = producer.send(self._names[topic], letter.value, letter.key, list(letter.headers))
        except KafkaError as error:
            self._failure = short(error)
            return False
        self._pending.append((future, rejected, size))
        return True

    def _settle(self) -> None:
        """Forget the letters that are acknowledged; what failed waits to be sent again, shorter if it was too long."""
        while self._pending and self._pending[0][0].is_done:
            future, rejected, size = self._pending[0]
            if future.exception is not None:
                self._failure = short(future.exception)
                if isinstance(future.exception, MessageSizeTooLargeError):
                    topic = rejected.partition.topic
                    self._limits[topic] = max(8192, self._limits[topic] // 2)
                self._renew()
                return
            self._pending.popleft()
            self._waiting_bytes -= size

    def _renew(self) -> None:
        """A producer that gave a letter up may refuse all that follow: start again with a new one, when one is needed.

        It may take as long as the broker is away to make one.
        """
        failed = []
        for future, rejected, size in self._pending:
            if future.is_done and future.succeeded():
                self._waiting_bytes -= size
            else:
                failed.append((rejected, size))
        self._unsent.extendleft(reversed(failed))
        self._pending.clear()
        if self._producer is not None:
            abandon(self._producer)
        self._producer = None

    def _connected(self, deadline: float) -> KafkaProducer | None:
        """A producer, made in a thread of its own where there is none; None when it is not there by `deadline`."""
        if self._producer is not None:
            return self._producer
        if self._coming is None:
            self._coming = started(self._new_producer, "dead-letters")
        try:
            error = self._coming.exception(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            return None
        if error is None:
            self._producer = self._coming.result()
        else:
            self._failure = short(error)
        self._coming = None
        return self._producer

    def _new_producer(self) -> KafkaProducer:
        return KafkaProducer(
            **self._connection.settings(),
            acks="all",
            enable_idempotence=True,
            max_request_size=2**30,
            max_block_ms=500,
            reconnect_backoff_max_ms=2000,
            linger_ms=5,
            metrics_enabled=False,
        )

    def _topics_ready(self, create: bool) -> dict[str, int]:
        """See to it that the dead-letter topics exist; the longest message each takes, by source topic."""
        admin = KafkaAdminClient(**self._connection.settings(), request_timeout_ms=_REQUEST_MS)
        try:
            names = sorted(set(self._names.values()))
            missing = [topic["name"] for topic in admin.describe_topics(names) if topic["error_code"] == _UNKNOWN_TOPIC]
            if missing and not create:
                raise DeadLetterError(
                    f"{self._connection} has no dead-letter topic {', '.join(missing)}; create it, or set "
                    "source.kafka.dead_letter_create = true"
                )
            for name in missing:
                log.info("creating dead-letter topic %s", name)
                with contextlib.suppress(TopicAlreadyExistsError):
                    admin.create_topics({name: {"num_partitions": 1, "configs": {"cleanup.policy": "delete"}}})
            if missing:
                admin.wait_for_topics(missing)
            return {topic: longest_message(admin, name) for topic, name in self._names.items()}
        finally:
            admin.close()


def _abandon_late(coming: Future[KafkaProducer]) -> None:
    if coming.exception() is None:
        abandon(coming.result())


def _weight(rejected: Rejected) -> int:
    """Memory that a letter takes while it waits, in bytes, about."""
    return 1024 + len(rejected.detail) + (_memory(rejected.raw) if rejected.raw else 0)


@contextlib.contextmanager
def _no_record_lost() -> Iterator[None]:
    """Between the client's hands and ours a new client cannot help: what fails there ends the stream."""
    try:
        yield
    except StreamError:
        raise
    except Exception as error:
        log.exception("records could not be handed over")
        raise StreamError(f"records could not be handed over ({short(error)}); stopping. {_SAFE}") from error


def _memory(raw: Raw) -> int:
    """Bytes a message takes, about: what it carries, and the objects around it."""
    return (
        _OVERHEAD
        + len(raw.key or b"")
        + len(raw.value or b"")
        + sum(len(name) + len(value or b"") + _HEADER_OVERHEAD for name, value in raw.headers)
    )


def _listed(partitions: Iterable[Partition]) -> str:
    return ", ".join(f"{where.topic}/{where.number}" for where in sorted(partitions))
