"""Readers can be sent to an older release and back, whatever becomes of its commit, and Triton follows them."""

import os
from pathlib import Path

import pytest

from agent.cli import main
from agent.config import Config, Release
from agent.releases import Publisher, kept_releases, pin, pinned, publish, unpin
from agent.values import Commit
from exporter import release as releases
from exporter.release import ReleaseError
from exporter.triton import versions
from tests.fakes import LIST, ListSource, pipeline, records


def learn(state: Path, tasks: int, **parts: object) -> Commit:
    """An agent that has learned `tasks` tasks of three records, going on from where it was."""
    agent = pipeline(state, ListSource(records(*"abcdefghijklmnopqrst"[: 3 * tasks])), keep=2)
    for name, part in parts.items():
        setattr(agent, name, part)
    commit = agent.run()
    agent.commits.close()
    assert commit is not None and commit.offsets == {LIST: 3 * tasks}
    return commit


def served(state: Path) -> str:
    """What a reader gets."""
    return (releases.current(state) / releases.MODEL).read_text()


@pytest.fixture
def state(tmp_path) -> Path:
    learn(tmp_path / "state", 2)
    return tmp_path / "state"


@pytest.fixture
def settings(tmp_path) -> Release:
    place = {"repository": tmp_path / "models", "name": "clip", "versions": 2}
    return Config.model_validate({"release": {"layout": "triton", "triton": place}}).release


def config_of(settings: Release) -> str:
    return (settings.triton.repository / "clip" / "config.pbtxt").read_text()


def test_readers_follow_the_newest_release_until_they_are_held(state):
    first = served(state)
    learn(state, 3)
    assert served(state) != first and pinned(state) is None
    assert (state / "RELEASE").resolve() == state / "commits" / "000003" / "release"


def test_a_rollback_outlives_its_commit_and_the_learner_goes_on(state):
    # given
    newest = served(state)
    release = pin(state, 1)
    older = served(state)
    assert older != newest and pinned(state) == 1

    # when commits 1 and 2 are pruned
    learn(state, 5)

    # then
    assert not (state / "commits" / "000001").exists()
    assert served(state) == older
    assert [entry.number for entry in kept_releases(state)] == [1, 4, 5]
    releases.read(releases.current(state)).verify()
    assert releases.read(releases.current(state)).id == release.id


def test_following_again_is_the_newest_of_now_and_leaves_nothing_behind(state):
    pin(state, 1)
    learn(state, 4)

    release = unpin(state)

    assert release.path == state / "commits" / "000004" / "release" == releases.current(state)
    assert not (state / "pinned").exists() and pinned(state) is None


def test_a_rollback_is_on_the_disk_before_readers_are_sent_there(state, monkeypatch):
    # given a record of what reaches the disk
    events = []
    fsync, replace = os.fsync, Path.replace

    def recorded_fsync(descriptor):
        fsync(descriptor)
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(state).as_posix())

    def recorded_replace(self, target):
        events.append("readers are sent")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)

    # when
    pin(state, 1)

    # then every file, then the folder, its name, and that of its parent
    before = events[: events.index("readers are sent")]
    names = [path.name for path in (state / "pinned/000001").iterdir()]
    assert {*before[:-3]} == {f"pinned/000001.staging/{name}" for name in names}
    assert before[-3:] == ["pinned/000001.staging", "pinned", "."]
    assert events[-1] == "."


def test_another_rollback_replaces_the_first(state):
    pin(state, 1)
    first = served(state)
    pin(state, 2)
    assert served(state) != first
    assert [path.name for path in (state / "pinned").iterdir()] == ["000002"]


def test_what_is_not_there_or_damaged_is_refused_and_readers_stay(state):
    before = served(state)
    with pytest.raises(ReleaseError, match=r"no release in .*000007"):
        pin(state, 7)
    (state / "commits" / "000001" / "release" / releases.MODEL).write_text("rotten")
    with pytest.raises(ReleaseError, match="damaged"):
        pin(state, 1)
    assert served(state) == before and pinned(state) is None
    assert list((state / "pinned").iterdir()) == []


def test_a_copy_without_the_pointer_is_read_from_its_current_commit(state):
    before = served(state)
    (state / "RELEASE").unlink()
    assert served(state) == before


def test_the_commands_list_hold_and_let_go(state, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    where = ["--set", f"state.path={state}"]

    assert main(["releases", *where]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "readers" in line]
    assert len(lines) == 1 and " 2 " in lines[0] and "readers are here" in lines[0]

    assert main(["rollback", "1", *where]) == 0
    assert "the learner goes on" in capsys.readouterr().out
    assert main(["releases", *where]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "readers" in line]
    assert len(lines) == 1 and " 1 " in lines[0] and "held here" in lines[0]

    assert main(["rollback", "--newest", *where]) == 0
    assert "of commit 2" in capsys.readouterr().out
    assert main(["rollback", "9", *where]) == 1
    assert "no release in" in capsys.readouterr().err


def test_every_commit_becomes_a_version_of_the_triton_repository(tmp_path, settings):
    publisher = Publisher(settings, tmp_path / "state")

    learn(tmp_path / "state", 3, published=publisher)
    publisher.close()

    assert versions(settings.triton.repository, "clip") == [2, 3]
    model = settings.triton.repository / "clip" / "3" / "model.onnx"
    assert model.read_text() == served(tmp_path / "state")
    assert "latest" in config_of(settings)


def test_a_release_carried_on_by_a_commit_is_no_new_version(state, settings):
    folder = state / "commits" / "000002" / "release"
    publish(settings, state, 2, folder)
    publish(settings, state, 3, folder)
    assert versions(settings.triton.repository, "clip") == [2]


def test_triton_is_held_with_the_readers_and_keeps_their_version(state, settings):
    # given a repository that has never seen the release readers are held at
    pin(state, 1)
    publisher = Publisher(settings, state)

    # when
    learn(state, 5, published=publisher)
    publisher.close()

    # then
    assert versions(settings.triton.repository, "clip") == [1, 4, 5]
    assert "specific: { versions: [1] }" in config_of(settings)

    # and when they follow again
    publish(settings, state, 5, unpin(state).path)
    assert "latest" in config_of(settings)
    assert versions(settings.triton.repository, "clip") == [4, 5]


def test_a_repository_of_another_learner_is_left_alone(state, tmp_path, settings):
    publish(settings, state, 2, state / "commits" / "000002" / "release")
    learn(tmp_path / "other", 1)

    with pytest.raises(ReleaseError, match="version 2 with another model"):
        publish(settings, tmp_path / "other", 1, tmp_path / "other" / "commits" / "000001" / "release")

    assert versions(settings.triton.repository, "clip") == [2]


def test_a_repository_that_cannot_be_written_is_logged_and_the_agent_goes_on(tmp_path, settings, caplog):
    settings.triton.repository.write_text("a file")
    publisher = Publisher(settings, tmp_path / "state")

    learn(tmp_path / "state", 2, published=publisher)
    publisher.close()

    assert "the release of commit 000002 is not in the Triton repository" in caplog.text
