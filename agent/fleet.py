"""The agent's part in a fleet: publishes what its site may give away, keeps what the others publish.

All of it happens in one thread, for which nothing waits: a cluster that is away or refuses is logged, counted and asked
again, and the site works on with what it has. What is published is the file that the trainer left in the current
commit (agent/fleet_states.py); what comes is kept in the state folder (streams/blobs.py), where the trainer finds it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from agent.config import Config
from agent.fleet_states import SharedRefused, check
from agent.layout import FLEET, SHARED, commit_number, current_commit
from agent.values import Commit
from streams.blobs import GENERATION, Blob, BlobRefused, Blobs, Chunk, cut, ended
from streams.record import Offsets, Partition

log = logging.getLogger(__name__)

_POLL_S = 0.5
"""Seconds of one look at the topic; a new commit is published that much later at most."""

_WAIT_S = (1.0, 60.0)
"""Seconds between attempts, the first and the longest: they double. Chosen by hand: nobody waits, and a cluster in
trouble is asked less and less."""

_CLOSE_S = 3
"""Seconds at the end for the last commit to be published: chosen by hand, so that SIGTERM ends the agent within ten.
What is cut off is published at the next start."""


class Message(Protocol):
    """A message of the topic."""

    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> tuple[tuple[str, bytes | None], ...]: ...


class Topic(Protocol):
    """What is needed of streams.kafka.fleet.FleetTopic, whose sentences say what each does."""

    chunk_bytes: int
    anew: bool

    def read(self, timeout_s: float) -> Iterable[Message]: ...
    @property
    def positions(self) -> dict[Partition, int]: ...
    @property
    def caught_up(self) -> bool: ...
    def send(self, site: str, chunks: Iterable[Chunk]) -> None: ...
    def close(self) -> None: ...


class Metrics(Protocol):
    """It is told of the fleet; each method's sentence is in exporter.metrics.Metrics."""

    def fleet_states(self, published: Mapping[str, float]) -> None: ...
    def fleet_published(self, bytes: int) -> None: ...
    def fleet_failed(self) -> None: ...
    def fleet_refused(self) -> None: ...


class FleetSite:
    """It is one site of a fleet. `start` begins the thread; `due` is for the pipeline."""

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        connect: Callable[[Offsets], Topic],
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """connect: opens the topic, to be read from the given offsets on. Raises OSError."""
        self._site = config.fleet.site
        self._pause_s = config.fleet.pause_s
        self._state = config.state.path
        self._metrics = metrics
        self._connect = connect
        self._clock = clock
        self._monotonic = monotonic
        self._blobs = Blobs(self._state / FLEET, self._site, config.fleet.max_bytes, _check)
        self._news_since: float | None = None
        self._positions: dict[Partition, int] = {}
        self._whole = False
        """Whether the topic was read from its beginning to its end."""
        self._looked_at: Path | None = None
        """The commit whose file is published, or has none."""
        self._published: Blob | None = None
        self._sent = 0
        """The newest sequence of this agent's own, also where sending it failed half-way."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)

    def start(self) -> None:
        """Begin to read and to publish."""
        self._tell()
        self._thread.start()

    def close(self) -> None:
        """End the thread, once the current commit is published or after a few seconds."""
        self._stop.set()
        self._thread.join(_CLOSE_S)

    def due(self, commit: Commit | None) -> bool:
        """Tell whether a release is due for what other sites have learned: whether, for the configured pause, there is
        something that the report of `commit` does not know. True once for each pause."""
        told = commit.report.fleet if commit and commit.report else None
        known = {site: blob.sha256 for site, blob in self._blobs.known().items()}
        if known == {one.site: one.sha256 for one in (told.sites if told else ())}:
            self._news_since = None
            return False
        now = self._monotonic()
        if self._news_since is None:
            self._news_since = now
        if now - self._news_since < self._pause_s:
            return False
        self._news_since = now  # should it fail, it is tried again after another pause
        return True

    def _run(self) -> None:
        wait_s = _WAIT_S[0]
        while True:
            try:
                with contextlib.closing(self._connect(self._positions)) as topic:
                    if topic.anew:
                        self._blobs.begin_anew()
                        self._whole = False
                    while self.step(topic):
                        wait_s = _WAIT_S[0]
                return
            except Exception as error:  # of the client library, the network, or the disk: none of them ends an agent
                log.error("the fleet's topic cannot be used (%s: %s); trying again", type(error).__name__, error)
                self._metrics.fleet_failed()
            if self._stop.wait(wait_s):
                return
            wait_s = min(2 * wait_s, _WAIT_S[1])

    def step(self, topic: Topic) -> bool:
        """Take what has come, and publish what is new; False when this is the end."""
        for message in topic.read(_POLL_S):
            try:
                if self._blobs.take(message.key, message.value, message.headers):
                    log.info("fleet: %s", ", ".join(_words(one) for one in self._blobs.known().values()) or "no site")
            except BlobRefused as error:
                log.error("fleet: refused: %s", error)
                self._metrics.fleet_refused()
        self._positions = topic.positions  # only now: what could not be written to the disk comes again
        if not self._whole and topic.caught_up:
            self._whole = True
            for site in self._blobs.settle():
                log.warning("fleet: %s is forgotten: the topic has nothing of it any more", site)
            for site in sorted(self._blobs.torn()):
                log.warning("fleet: of %s the topic has no complete state yet; it counts once the rest comes", site)
        if self._whole:
            self._publish(topic)
        self._tell()
        return not self._stop.is_set()

    def _publish(self, topic: Topic) -> None:
        """Publish the file of the current commit, unless it is what was published last."""
        if self._published is not None and self._blobs.own_sequence > self._sent:
            log.error("fleet: another agent publishes as %s too; give each a fleet.site of its own", self._site)
            self._metrics.fleet_refused()
            # Told once; published again with the next commit alone, or the two would go on without end.
            self._sent = self._blobs.own_sequence
        commit = current_commit(self._state)
        if commit is None or commit == self._looked_at:
            return
        try:
            with (commit / SHARED).open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                if self._published is None or self._published.sha256 != sha256:
                    # Not read into memory: the process stays as small as it is.
                    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                        self._send(topic, commit, sha256, data)
        except FileNotFoundError:  # nothing may leave yet, or a newer commit has taken this one's place
            pass
        self._looked_at = commit

    def _send(self, topic: Topic, commit: Path, sha256: str, data: mmap.mmap) -> None:
        sequence = max(int(self._clock() * 1000), self._blobs.own_sequence + 1, self._sent + 1)
        version = commit_number(commit.name) or 1
        # Not the keys of the state that is there, so that a publisher that dies here leaves it whole. What was sent
        # last is known here before it has come back; what failed half-way is not in `_published`.
        before = self._published
        generation = self._blobs.next_generation() if before is None else 1 - before.generation
        blob = Blob(self._site, sequence, version, sha256, len(data), topic.chunk_bytes, generation)
        self._sent = sequence
        topic.send(self._site, cut(blob, data))
        more = [index for index in self._blobs.own_chunks(generation) if index >= blob.chunks]
        topic.send(self._site, [ended(self._site, generation * GENERATION + index, sequence) for index in more])
        self._published = blob
        self._metrics.fleet_published(blob.bytes)
        log.info("fleet: published %s", _words(blob))

    def _tell(self) -> None:
        known = [*self._blobs.known().values(), *([self._published] if self._published else [])]
        self._metrics.fleet_states({blob.site: blob.sequence / 1000 for blob in known})


def _check(site: str, path: Path) -> None:
    try:
        check(path)
    except SharedRefused as error:
        raise BlobRefused(f"what {site} published is not used: {error}") from error


def _words(blob: Blob) -> str:
    return f"{blob.site} at commit {blob.version} ({blob.bytes / 1e6:.1f} MB)"
