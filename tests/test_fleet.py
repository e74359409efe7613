"""A member of a fleet on a topic that does as a test says: what goes out, what is kept, and when a release is due."""

from __future__ import annotations

import hashlib
import itertools
import random
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from safetensors.numpy import save_file

from agent.commits import CommitStore, Provenance
from agent.config import Config, ConfigError, load
from agent.fleet import FleetSite
from agent.fleet_states import facts
from agent.layout import FLEET, SHARED
from agent.scoring.report import Fleet, Report, Site
from agent.sealing import seal
from agent.values import Commit, Outcome
from exporter.metrics import Metrics
from streams.blobs import Blob, Chunk, cut, ended, kept
from streams.record import Partition
from streams.source import StreamError
from tests.fakes import InlineWorker, ListSource, learned, pipeline, records
from tests.kafka.agents import wait_until

HERE = Partition("fleet", 0)
IDENTITY = {"name": "tiny", "sha256": "0" * 64, "prompt": "a {}."}


@dataclass
class Sent:
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]


class Log:
    """A topic of one partition: what all have written, of which compaction keeps the newest of each key."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, Sent]] = []
        self.end = 0

    def append(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            self.messages.append((self.end, Sent(chunk.key, chunk.value, chunk.headers)))
            self.end += 1

    def compact(self) -> None:
        newest = {sent.key: offset for offset, sent in self.messages}
        self.messages = [(offset, sent) for offset, sent in self.messages if newest[sent.key] == offset]


class LogTopic:
    """A member's connection to it; `faults` are raised by the next sends, one each (None: none)."""

    chunk_bytes = 1000

    def __init__(self, log: Log, positions: dict[Partition, int], faults: list[Exception | None]) -> None:
        self.log, self.at, self.anew, self.faults = log, positions.get(HERE, 0), HERE not in positions, faults
        self.goal, self.closed = log.end, False

    def read(self, timeout_s: float) -> list[Sent]:
        found = [sent for offset, sent in self.log.messages if offset >= self.at]
        self.at = self.log.end
        if not found:
            time.sleep(0.002)
        return found

    @property
    def positions(self) -> dict[Partition, int]:
        return {HERE: self.at}

    @property
    def caught_up(self) -> bool:
        return self.at >= self.goal

    def send(self, site: str, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            if self.faults and (fault := self.faults.pop(0)):
                raise fault
            self.log.append([chunk])

    def close(self) -> None:
        self.closed = True


def shared(path: Path, classes: list[str], value: float = 1.0, width: int = 300) -> None:
    tensors = {
        "counts": np.full(len(classes), 9, np.float32),
        "means": np.full((len(classes), width), value, np.float32),
    }
    save_file(tensors, path, facts("ncm", IDENTITY, 1, ["root"], {}, classes))


class SiteFolder:
    """A state folder whose commits publish what a test says, and a member on it."""

    def __init__(self, folder: Path, site: str, log: Log, **keys: object) -> None:
        chosen = {"fleet.topic": "fleet", "fleet.site": site, "fleet.pause_s": "10", "state.path": folder, **keys}
        self.config = load(None, {}, {key: str(value) for key, value in chosen.items()})
        self.store = CommitStore(folder, 3)
        self.store.lock()
        self.log, self.faults, self.now = log, [], 0.0
        self.commits = 0
        self.restart()

    def restart(self) -> None:
        self.registry = CollectorRegistry()
        self.topics: list[LogTopic] = []
        self.member = FleetSite(self.config, Metrics(self.registry), self.connect, monotonic=lambda: self.now)

    def connect(self, positions: dict[Partition, int]) -> LogTopic:
        self.topics.append(LogTopic(self.log, positions, self.faults))
        return self.topics[-1]

    def commit(self, *classes: str, value: float = 1.0, fleet: Fleet | None = None) -> Commit:
        staging = self.store.stage()
        if classes:
            shared(staging / SHARED, list(classes), value)
        self.commits += 1
        report = Report(task=self.commits, fleet=fleet)
        report.write(staging / "report.json")
        outcome = Outcome(self.commits, {}, staging, seal(staging), report, classes, None, None)
        return self.store.commit(outcome, Provenance("f", (), {}, {}))

    def step(self, times: int = 2) -> None:
        topic = self.topics[-1] if self.topics else self.connect({})
        for _ in range(times):
            self.member.step(topic)

    def known(self) -> dict[str, str]:
        folder = self.config.state.path / FLEET
        return {site: hashlib.sha256(path.read_bytes()).hexdigest() for site, (_, path) in kept(folder).items()}

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"gapstream_fleet_{name}", labels)


@pytest.fixture
def sites(tmp_path: Path) -> tuple[SiteFolder, SiteFolder, SiteFolder]:
    log = Log()
    return tuple(SiteFolder(tmp_path / name, name, log) for name in "abc")


def digest(commit: Commit) -> str:
    return hashlib.sha256((commit.path / SHARED).read_bytes()).hexdigest()


def test_every_commit_is_published_once_and_reaches_all_others(sites):
    commits = {site: folder.commit(site, "cat") for site, folder in zip("abc", sites, strict=True)}
    for folder in sites * 2:
        folder.step()
    for site, folder in zip("abc", sites, strict=True):
        assert folder.known() == {other: digest(commit) for other, commit in commits.items() if other != site}
        size = (commits[site].path / SHARED).stat().st_size
        assert folder.metric("published_bytes_total") == size
        assert {other for other in "abc" if folder.metric("state_timestamp_seconds", site=other)} == set("abc")
    written = len(sites[0].log.messages)
    # a commit that shares the same again, as a renewal does, is not published again
    sites[0].commit("a", "cat")
    for folder in sites:
        folder.step()
    assert len(sites[0].log.messages) == written
    newest = sites[0].commit("a", "cat", value=2)
    for folder in sites:
        folder.step()
    assert [folder.known()["a"] for folder in sites[1:]] == [digest(newest)] * 2


def test_a_commit_that_may_share_nothing_publishes_nothing(sites):
    sites[0].commit()
    sites[0].step()
    assert sites[0].log.messages == []


def test_after_a_restart_it_is_published_again_with_a_newer_number_and_changes_nothing(sites):
    a, b, _ = sites
    a.commit("cat")
    a.step()
    b.step()
    before = b.known()
    a.restart()
    a.step(3)
    b.step()
    sequences = [blob.sequence for blob, _ in kept(b.config.state.path / FLEET).values()]
    # by other keys, so that the state before is there until this one is
    assert len(a.log.messages) == len({sent.key for _, sent in a.log.messages}) == 4
    assert b.known() == before and len(sequences) == 1


def test_chunks_that_a_shorter_state_has_no_more_are_ended(sites):
    a, b, _ = sites
    a.commit("cat", "dog", "ship")
    a.step()
    long = {sent.key for _, sent in a.log.messages}
    for value in range(2):  # the second one takes the keys of the long one
        a.commit("cat", value=value)
        a.step()
    a.log.compact()
    assert not {sent.key for _, sent in a.log.messages if sent.value is None} - long
    assert {sent.key for _, sent in a.log.messages if sent.value is not None} & long < long
    b.step()
    assert b.known()["a"]


def test_a_site_that_begins_to_read_after_compaction_finds_the_newest_of_all(sites):
    a, b, c = sites
    for value in range(5):
        a.commit("cat", value=value)
        newest = b.commit("dog", value=value)
        a.step()
        b.step()
        if value % 2:
            a.log.compact()
    a.log.compact()
    c.step()
    assert c.known()["b"] == digest(newest) and set(c.known()) == {"a", "b"}


@pytest.mark.parametrize("sent", range(3))
def test_a_publisher_that_dies_in_between_leaves_all_what_they_had_and_publishes_at_its_next_start(sites, sent):
    # given a site that has published, and then dies at a chunk of its next state, and once more after a restart
    a, b, c = sites
    a.commit("cat")
    a.step()
    old = a.commit("cat", value=2)
    a.step()
    b.step()
    new = a.commit("cat", "dog")
    for _ in range(2):
        a.faults[:] = [None] * sent + [ConnectionError("gone")]
        with pytest.raises(ConnectionError):
            a.step()
        a.restart()
    # then those that had its state keep it, and who comes now finds it too, also after compaction
    a.log.compact()
    b.step()
    c.step()
    assert b.known() == c.known() == {"a": digest(old)}
    # and the next start publishes
    a.faults.clear()
    a.step(3)
    a.log.compact()
    b.step()
    c.step()
    assert b.known() == c.known() == {"a": digest(new)}
    c.restart()
    c.step()
    assert c.known() == {"a": digest(new)}


def test_a_site_whose_first_state_was_never_finished_is_told_once_and_counts_when_it_is(sites, caplog):
    a, b, _ = sites
    new = a.commit("cat", "dog")
    a.faults[:] = [None, ConnectionError("gone")]
    with pytest.raises(ConnectionError):
        a.step()
    b.step(5)
    assert b.known() == {} and caplog.text.count("of a the topic has no complete state yet") == 1
    a.step()
    b.step()
    assert b.known() == {"a": digest(new)}


def test_what_a_site_sent_itself_before_the_cluster_went_away_is_not_taken_for_another_agents(sites, caplog):
    a, b, _ = sites
    a.commit("cat")
    a.step()
    new = a.commit("cat", value=2)
    a.faults[:] = [None, ConnectionError("gone")]
    with pytest.raises(ConnectionError):
        a.step()
    a.step(3)
    b.step()
    assert b.known() == {"a": digest(new)}
    assert "another agent publishes" not in caplog.text and not a.metric("refused_total")


def test_what_does_not_verify_is_counted_and_the_rest_goes_on(sites):
    a, b, _ = sites
    a.commit("cat")
    a.step()
    good = [sent for _, sent in a.log.messages]
    bad = b"no state of a learner"
    facts_of = Blob("evil", 5, 1, hashlib.sha256(bad).hexdigest(), len(bad), 1000)
    a.log.append(cut(facts_of, bad))
    a.log.append([Chunk(b"\xff", b"x", ()), Chunk(b"a/0", b"x", good[0].headers)])
    b.step()
    assert b.known().keys() == {"a"} and b.metric("refused_total") == 2


def test_a_second_agent_of_the_same_name_is_noticed_and_neither_publishes_for_ever(sites, tmp_path, caplog):
    a = sites[0]
    twin = SiteFolder(tmp_path / "twin", "a", a.log)
    a.commit("cat")
    twin.commit("dog")
    for _ in range(10):
        a.step()
        twin.step()
    assert "another agent publishes as a too" in caplog.text and a.metric("refused_total") == 1
    assert len(a.log.messages) < 20


def test_a_site_forgotten_by_a_tombstone_is_dropped_and_comes_again_with_its_next_commit(sites):
    a, b, _ = sites
    a.commit("cat")
    a.step()
    b.step()
    a.log.append([ended("a", 0, int(time.time() * 1000))])
    b.step()
    assert b.known() == {} and b.metric("state_timestamp_seconds", site="a") is None
    time.sleep(0.002)
    a.commit("cat", "dog")
    a.step()
    b.step()
    assert b.known().keys() == {"a"}


def fleet_of(folder: SiteFolder) -> Fleet:
    return Fleet(
        site="a", sites=tuple(Site(site=s, sequence=1, version=1, sha256=d) for s, d in folder.known().items())
    )


def test_a_release_is_due_after_the_pause_and_once_for_each(sites):
    a, b, c = sites
    commit = a.commit("cat")
    a.step()
    assert not a.member.due(commit)
    b.commit("dog")
    b.step()
    a.step()
    due = []
    for a.now in (0, 5, 9.9, 10, 10.1, 19, 20.1):
        due.append(a.member.due(commit))
    assert due == [False, False, False, True, False, False, True]
    # once a commit has it, none is due, also after a restart, until something else comes
    commit = a.commit("cat", fleet=fleet_of(a))
    assert not a.member.due(commit)
    a.now = 100
    a.restart()
    assert not a.member.due(commit)
    c.commit("ship")
    c.step()
    a.step()
    assert not a.member.due(commit)
    a.now = 111
    assert a.member.due(commit)


def test_without_any_commit_what_others_learned_is_due_too(sites):
    a, b, _ = sites
    b.commit("dog")
    b.step()
    a.step()
    assert not a.member.due(None)
    a.now = 11
    assert a.member.due(None)


def test_a_thread_does_it_and_a_cluster_that_fails_is_counted_and_asked_again(sites, monkeypatch):
    monkeypatch.setattr("agent.fleet._WAIT_S", (0.01, 0.02))
    a, b, _ = sites
    a.commit("cat")
    attempts = itertools.count()
    connect = a.connect

    def failing(positions: dict[Partition, int]) -> LogTopic:
        if next(attempts) < 3:
            raise StreamError("nobody answers")
        return connect(positions)

    a.member = FleetSite(a.config, Metrics(CollectorRegistry()), failing)
    a.faults[:] = [None, ConnectionError("gone")]
    a.member.start()
    b.member.start()
    wait_until(lambda: b.known().keys() == {"a"}, 10)
    a.commit("cat", "dog")
    a.member.close()  # publishes the last commit before it ends
    wait_until(lambda: b.known() == {"a": digest(a.store.current())}, 10)
    b.member.close()
    assert next(attempts) > 4 and all(topic.closed for topic in a.topics)


def test_in_every_order_of_publishing_and_killing_all_end_with_the_newest_of_each(tmp_path):
    rng = random.Random(11)
    log = Log()
    sites = {name: SiteFolder(tmp_path / name, name, log) for name in "abc"}
    for turn in range(60):
        name = rng.choice("abc")
        match rng.randrange(5):
            case 0 | 1:
                sites[name].commit(name, *("more" for _ in range(rng.randrange(2))), value=turn)
            case 2:
                sites[name].step()
            case 3:
                log.compact()
            case 4:
                sites[name].faults[:] = [None] * rng.randrange(3) + [ConnectionError("killed")]
                try:
                    sites[name].step()
                except ConnectionError:
                    sites[name].faults.clear()
                    sites[name].registry = CollectorRegistry()
                    sites[name].restart()
                sites[name].faults.clear()
    for name in "abc":
        sites[name].commit(name, value=100)
    for folder in [*sites.values()] * 3:
        folder.step()
    for name, folder in sites.items():
        newest = {other: digest(one.store.current()) for other, one in sites.items() if other != name}
        assert folder.known() == newest


def test_the_configuration_of_a_fleet_is_checked():
    for keys, message in (
        ({"fleet.topic": "f"}, "site is empty"),
        ({"fleet.topic": "f", "fleet.site": "a/b"}, "fleet.site"),
        ({"fleet.topic": "f", "fleet.site": "a", "method.name": "mgclip"}, "expected gapstream or ncm"),
        ({"fleet.topic": "f", "fleet.site": "a", "source.kafka.topics": "f"}, "one of source.kafka.topics"),
        ({"fleet.topic": "f", "fleet.site": "a", "training.processes": "2"}, "expected one of the two"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(None, {}, keys)


def test_a_renewal_is_committed_with_the_same_learner_and_place_and_then_the_stream_goes_on(tmp_path):
    # given an agent of which a renewal is asked after its first task, while its live stream is silent
    asked, stop = [], threading.Event()

    def due(commit: Commit | None) -> bool:
        if commit is not None and len(asked) < 2:
            asked.append(commit)
            return True
        if commit is not None:
            stop.set()
        return False

    source = ListSource(records("x", "y", "z"), live=True)
    agent = pipeline(tmp_path, source, InlineWorker(Config()), stop=stop)
    agent.renewal_due = due
    agent.run()
    agent.commits.close()
    # then two renewals followed, of which the newer one is kept, and learned nothing
    first, second = asked
    assert (first.number, second.number, agent.commit.number) == (1, 2, 3)
    assert agent.commit.tasks == 1 and agent.commit.offsets == first.offsets and learned(agent.commit) == [0, 1, 2]
    assert first.path.exists() and not second.path.exists()
    # and the next start learns what is new alone
    again = pipeline(tmp_path, ListSource(records("x", "y", "z", "u", "v", "w")))
    again.run()
    assert learned(again.commit) == [0, 1, 2, 3, 4, 5] and again.commit.tasks == 2
    again.commits.close()


def test_a_renewal_that_fails_stops_no_agent(tmp_path, caplog):
    class FailingWorker(InlineWorker):
        def poll(self):
            if self._task is not None and not self._task[0].samples:
                self._class = "tests.test_fleet:NeverRenews"
                self._learner = NeverRenews()
            else:
                self._class = "tests.fakes:FakeLearner"
            return super().poll()

    stop, asked = threading.Event(), []

    def due(commit: Commit | None) -> bool:
        if asked and commit is not None:
            stop.set()
        asked.append(commit)
        return len(asked) == 1

    agent = pipeline(tmp_path, ListSource(records("x", "y", "z"), live=True), FailingWorker(Config()), stop=stop)
    agent.renewal_due = due
    commit = agent.run()
    agent.commits.close()
    assert learned(commit) == [0, 1, 2] and "nothing is released anew after 2 failures" in caplog.text


class NeverRenews:
    def __init__(self, *_: object) -> None: ...

    def learn(self, *_: object) -> None:
        raise RuntimeError("out of memory")


def test_sites_are_shown_as_added_or_refused(tmp_path):
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    site = Site(site="b", sequence=1, version=1, sha256="")
    report = Report(task=1, fleet=Fleet(site="a", sites=(site, replace(site, site="c", refused="another CLIP"))))
    commit = SimpleNamespace(
        number=1, classes=(), damaged=(), offsets={}, tasks=1, totals={}, report=report, release=None, path=tmp_path
    )
    metrics.restored(commit)
    shown = [registry.get_sample_value("gapstream_fleet_sites", {"status": one}) for one in ("added", "refused")]
    assert shown == [1, 1]
