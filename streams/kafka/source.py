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
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Literal

from kafka.errors import (
    KafkaTimeoutError,
    LogTruncationError,
    OffsetOutOfRangeError,
    RetriableError,
)

from streams.background import in_background
from streams.claims import ImageStore
from streams.formats import Claim, Codec
from streams.kafka.breaker import Breaker
from streams.kafka.client import Client
from streams.kafka.connection import SAFE, UNKNOWN_TOPIC, Connection, connecting, describe_error
from streams.kafka.record_batches import Unreadable, rejections
from streams.merge import Merge
from streams.record import MESSAGE_OVERHEAD, Item, Offsets, Partition, Raw, Record, Rejected
from streams.source import PositionError, StreamError

log = logging.getLogger(__name__)

_FETCHES = 8
_VERIFY_S = 0.25
_STUCK_S = 60
_FAILURES = 5
_BACKOFF_S = 0.5
_CLOSE_S = 2.5


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
        images: ImageStore | None = None,
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
        self._fetch_image = images.fetch if images else None
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
                self._client = Client(connection, group, fetch_bytes)
            self._ids, self._partitions = self._describe()
        except StreamError:
            raise
        except Exception as error:
            raise StreamError(f"cannot read {', '.join(topics)} from {connection}: {describe_error(error)}") from error

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
            raise StreamError(f"no positions on {self._connection}: {describe_error(error)}") from error
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
                f"stopping. {SAFE}"
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
                    self._client = Client(self._connection, self._group, self._fetch_bytes)
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
                    why = f"the Kafka client failed {failures} times, last with {describe_error(error)}"
                    self._fail(StreamError(f"{why}; stopping. {SAFE}"))
                    return
                wait = _BACKOFF_S * 2 ** min(failures, 6)
                log.warning("the Kafka client failed (%s); a new one is made in %.0f s", describe_error(error), wait)
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
            log.warning("the last commit's offsets were not copied to group %s: %s", self._group, describe_error(error))

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
                entries += [(0, (rejected, MESSAGE_OVERHEAD)) for rejected in lost]
                total += MESSAGE_OVERHEAD * len(lost)
                self._positions[where] = message.next_offset
                continue
            offset, timestamp_ms, key, value, headers = message
            raw = Raw(key, value, headers)
            size = raw.memory_bytes
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
        return in_background(lambda: self._codec.fetched(claim, self._fetch_image), "image-fetch")

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
            raise PositionError(f"the log of {_listed(back)} was truncated below what was read; stopping. {SAFE}")
        moved = placed != self._positions
        self._positions.update(placed)
        self._client.assign(self._positions)
        return moved


@contextlib.contextmanager
def _no_record_lost() -> Iterator[None]:
    """Between the client's hands and ours a new client cannot help: what fails there ends the stream."""
    try:
        yield
    except StreamError:
        raise
    except Exception as error:
        log.exception("records could not be handed over")
        raise StreamError(f"records could not be handed over ({describe_error(error)}); stopping. {SAFE}") from error


def _listed(partitions: Iterable[Partition]) -> str:
    return ", ".join(f"{where.topic}/{where.number}" for where in sorted(partitions))
