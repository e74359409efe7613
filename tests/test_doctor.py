"""The doctor finds what would keep an agent from running, says what to do, and touches nothing."""

import hashlib
import shutil
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from agent.cli import main
from agent.commands import doctor
from agent.commands.doctor import Finding, examine
from agent.commands.report import ReportError, write_report
from agent.commits import CommitStore
from agent.config import Config
from agent.layout import FLEET
from agent.releases import kept_releases
from streams.blobs import Blob, Blobs, cut
from streams.buffer import CutRule, TaskBuffer
from streams.kafka.fleet import Described
from tests.fakes import LIST, ListSource, pipeline, records


def settings(state: Path, **sections: dict) -> Config:
    return Config.model_validate({"state": {"path": state}, "http": {"port": 0}, **sections})


def findings(config: Config, last: str) -> dict[str, Finding]:
    """The findings up to the first about `last`: what comes later loads a model."""
    found = {}
    for finding in examine(config):
        found[finding.about] = finding
        if finding.about == last:
            return found
    raise AssertionError(f"nothing was found about {last}, only about {', '.join(found)}")


@pytest.fixture
def archive(tmp_path) -> Path:
    (tmp_path / "archive" / "ant").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "archive" / "ant" / "1.png")
    return tmp_path / "archive"


@pytest.fixture
def learned(tmp_path) -> Path:
    agent = pipeline(tmp_path / "state", ListSource(records("a", "b", "c")))
    agent.run()
    agent.commits.close()
    return tmp_path / "state"


def test_a_new_agent_has_no_problem_and_nothing_is_made(tmp_path):
    config = settings(tmp_path / "deep" / "state", model={"threads": 1})

    found = list(examine(config))

    assert [finding.about for finding in found] == ["state", "commit", "disk", "http", "source", "learner", "release"]
    assert {finding.level for finding in found} == {"ok"}
    assert "gapstream on tinyclip" in found[5].text
    assert list(tmp_path.iterdir()) == []


def test_a_commit_of_offsets_alone_is_no_problem_and_has_no_report(tmp_path):
    # given an agent on a live stream that was stopped before it had learned anything
    source, stop = ListSource([], live=True), threading.Event()
    agent = pipeline(tmp_path / "state", source, stop=stop)
    source.positions = {LIST: 3}
    stop.set()
    agent.buffer = TaskBuffer(CutRule(samples=3), agent.spool, (), 1, source.positions)
    agent.run()
    agent.commits.close()

    # then nobody takes it for something learned
    found = findings(settings(tmp_path / "state"), "commit")["commit"]
    assert (found.level, found.text) == ("ok", "000001 is intact: nothing learned yet, it holds where reading begins")
    assert kept_releases(tmp_path / "state") == []
    with pytest.raises(ReportError, match="nothing is learned in"):
        write_report(tmp_path / "state", tmp_path / "report.html")


def test_a_problem_is_printed_with_its_cure_and_is_exit_code_1(tmp_path, capsys, monkeypatch):
    told = [Finding("disk", "problem", "3 MiB free", "free some space"), Finding("http", "ok", "127.0.0.1:9187")]
    monkeypatch.setattr(doctor, "examine", lambda config: told)

    assert main(["doctor"]) == 1

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("problem") and "3 MiB free" in lines[0] and "free some space" in lines[1]
    assert lines[-1] == "1 problem(s)"


def test_a_wrong_configuration_is_exit_code_78(capsys):
    assert main(["doctor", "--set", "task.samples=many"]) == 78
    assert "task.samples" in capsys.readouterr().err


def test_a_running_agent_is_named_and_its_commit_looked_at_without_disturbing_it(learned):
    running = CommitStore(learned, 3)
    running.lock()
    before = sorted(learned.rglob("*"))

    found = findings(settings(learned), "disk")

    assert "an agent is running" in found["state"].text
    assert found["commit"].level == "ok" and "000001 is intact" in found["commit"].text
    assert sorted(learned.rglob("*")) == before


def test_a_damaged_commit_is_a_problem_and_stays_where_it_is(learned):
    (learned / "commits" / "000001" / "learner.safetensors").write_text("rotten")

    found = findings(settings(learned), "commit")["commit"]

    assert found.level == "problem" and "learner.safetensors" in found.text
    assert (learned / "commits" / "000001").is_dir()


def test_a_state_folder_that_cannot_be_made_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("")
    found = findings(settings(tmp_path / "file" / "state"), "state")["state"]
    assert found.level == "problem" and "state.path" in found.cure


@pytest.mark.parametrize(("free", "level"), [(2**20, "problem"), (2**30, "warning"), (2**40, "ok")])
def test_free_space_is_held_against_what_may_be_needed(free, level, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**41, 2**41 - free, free))
    assert findings(settings(tmp_path), "disk")["disk"].level == level


def test_a_taken_port_is_a_problem(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = findings(settings(tmp_path, http={"port": taken.getsockname()[1]}), "http")["http"]
    assert found.level == "problem" and "http.port" in found.cure


def test_the_stream_of_another_commit_is_a_problem(learned, archive):
    found = findings(settings(learned, source={"archive": {"path": archive}}), "source")["source"]
    assert found.level == "problem" and "not the stream" in found.text


def test_an_archive_that_is_not_there_is_a_problem(tmp_path):
    found = findings(settings(tmp_path, source={"archive": {"path": tmp_path / "none.zip"}}), "source")["source"]
    assert found.level == "problem" and "none.zip" in found.text


def test_the_topic_of_a_fleet_is_looked_at_and_the_sites_that_are_known_are_told(tmp_path, monkeypatch):
    # given a site that has the state of another one, of an hour ago
    state = tmp_path / "state"
    store = Blobs(state / FLEET, "a", 1000, lambda site, path: None)
    published = Blob("b", int(time.time() * 1000) - 3_600_000, 7, hashlib.sha256(b"state").hexdigest(), 5, 5)
    for chunk in cut(published, b"state"):
        store.take(chunk.key, chunk.value, chunk.headers)
    config = settings(state, fleet={"topic": "meeting", "site": "a"})

    def found(described: Described | None) -> list[tuple[str, str]]:
        monkeypatch.setattr("streams.kafka.fleet.describe", lambda where, topic: described)
        return [(finding.level, finding.text) for finding in doctor._fleet(config)]

    # then what is wrong with the topic is told, and who is in it
    good = Described(partitions=1, policy="compact", chunk_bytes=1_000_000, messages=12)
    [(level, text)] = found(good)
    assert level == "ok" and "12 message(s)" in text and "other sites: b (commit 7, 60 min old)" in text
    for described, level, text in (
        (None, "warning", "there is no topic meeting. The agent will try to create it"),
        (replace(good, policy="compact,delete"), "warning", "cleanup.policy=compact,delete"),
        (replace(good, partitions=3), "warning", "3 partitions"),
        (replace(good, chunk_bytes=-24), "problem", "max.message.bytes of meeting is too small"),
    ):
        first = found(described)[0]
        assert first[0] == level and text in first[1]
    # a policy that may not be asked for is no finding, nor is a site without a fleet
    assert [level for level, _ in found(replace(good, policy=""))] == ["ok"]
    assert list(doctor._fleet(settings(state))) == []


def test_a_fleet_whose_cluster_is_away_is_a_problem(tmp_path):
    source = {"archive": {}, "kafka": {"bootstrap_servers": ("127.0.0.1:1",)}}
    config = settings(tmp_path / "state", fleet={"topic": "meeting", "site": "a"}, source=source)
    found = findings(config, "fleet")["fleet"]
    assert found.level == "problem" and "127.0.0.1:1" in found.text and "[fleet]" in found.cure


def test_whatever_a_look_raises_is_a_finding():
    def broken():
        raise RuntimeError("CUDA error: out of memory")
        yield

    (found,) = doctor._looked_at("learner", "free some of it", broken)

    assert found == Finding("learner", "problem", "RuntimeError: CUDA error: out of memory", "free some of it")


def test_ranks_that_cannot_be_had_are_a_problem_and_others_are_told(tmp_path, monkeypatch):
    def about_ranks(**training: object) -> Finding:
        return findings(settings(tmp_path / "state", training=training), "ranks")["ranks"]

    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert about_ranks(processes=2).text.startswith("2 on this machine (cpu, cpu; ")
    (tmp_path / "secret").write_text("as long as it has to be")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert about_ranks(listen=address, secret_file=tmp_path / "secret").level == "problem"
    found = about_ranks(listen=address, secret_file=tmp_path / "secret")
    assert found.level == "ok" and found.text.endswith(f"; others may join at {address}")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert "this machine has 1 CUDA device(s)" in about_ranks(processes=2).text
