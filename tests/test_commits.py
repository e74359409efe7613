"""The state folder: one rename commits, damage falls back, and nobody else writes."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agent.commits import CommitStore, Provenance, StateError, StateLocked, _digest
from agent.scoring.report import Report
from agent.sealing import seal
from agent.values import Commit, Outcome
from tests.fakes import LIST, write_release


def store_on(state: Path, keep: int = 3) -> CommitStore:
    store = CommitStore(state, keep)
    store.lock()
    store.sweep()
    store.current()
    return store


def reopened(store: CommitStore) -> Commit | None:
    """What another agent would continue from."""
    store.close()
    again = CommitStore(store.path, 3)
    again.lock()
    again.sweep()
    commit = again.current()
    again.close()
    return commit


def staged(store: CommitStore, task: int, release: bool = True) -> Outcome:
    staging = store.stage()
    (staging / "learner.safetensors").write_text(f"learned {task}")
    Report(task=task).write(staging / "report.json")
    (staging / "holdout").mkdir()
    (staging / "holdout" / "trained.zip").write_text(f"filter {task}")
    (staging / "holdout" / f"{task:06d}.zip").write_text("images")
    if release:
        write_release(staging / "release", ["cat"], f"model {task}")
    return Outcome(
        task=task,
        next_offsets={LIST: 10 * task},
        staging=staging,
        files=seal(staging),
        report=Report(task=task),
        classes=("cat",),
        update=None,
        release_refused=None if release else "parity",
    )


def facts(task: int) -> Provenance:
    return Provenance("print", ("cat", f"class {task}"), {"records": 10.0 * task}, {"task": {"samples": 3}})


def committed(store: CommitStore, task: int, release: bool = True) -> Commit:
    return store.commit(staged(store, task, release), facts(task))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_new_folder_has_no_commit(tmp_path):
    assert store_on(tmp_path / "deep" / "state").current() is None


def test_a_commit_comes_back_after_a_restart_exactly_as_it_was_returned(tmp_path):
    # given
    store = store_on(tmp_path)
    committed(store, 1)
    last = committed(store, 2)

    # when
    found = reopened(store)

    # then
    assert found == last
    assert (found.number, found.tasks, found.offsets) == (2, 2, {LIST: 20})
    assert found.classes == ("cat",)
    assert found.seen == ("cat", "class 1", "class 2")
    assert found.report == Report(task=2)
    assert found.release == found.path / "release"
    assert found.totals == {"records": 20}


def test_the_manifest_says_where_a_commit_comes_from(tmp_path):
    store = store_on(tmp_path)
    committed(store, 1)
    manifest = json.loads((committed(store, 2).path / "manifest.json").read_text())
    assert manifest["parent"] == 1
    assert manifest["config"] == {"task": {"samples": 3}}
    assert manifest["versions"]["torch"]
    assert manifest["files"]["learner.safetensors"] == [9, seal(tmp_path / "commits/000002")["learner.safetensors"][1]]


def test_everything_is_forced_to_the_disk_before_current_names_it(tmp_path, monkeypatch):
    # given a record of what reaches the disk
    store = store_on(tmp_path)
    events = []
    fsync, replace = os.fsync, Path.replace

    def recorded_fsync(descriptor):
        fsync(descriptor)
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(store.path).as_posix())

    def recorded_replace(self, target):
        events.append("current is replaced")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)

    # when
    commit = committed(store, 1)

    # then
    before = events[: events.index("current is replaced")]
    after = events[events.index("current is replaced") :]
    inside = [path.relative_to(commit.path).as_posix() for path in commit.path.rglob("*")]
    assert set(before) == {"commits", "commits/000001.staging", *(f"commits/000001.staging/{name}" for name in inside)}
    assert before.index("commits/000001.staging/manifest.json") > before.index("commits/000001.staging/report.json")
    assert before[-1] == "commits"
    assert after[-1] == "."


def test_without_a_new_release_the_one_before_serves_on(tmp_path):
    # given a release, then an update whose release is refused
    store = store_on(tmp_path)
    first = committed(store, 1)
    second = committed(store, 2, release=False)

    # then
    assert (second.release / "model.onnx").read_text() == "model 1"
    assert (second.release / "model.onnx").samefile(first.release / "model.onnx")
    assert reopened(store) == second


def test_a_first_commit_without_a_release_has_none(tmp_path):
    assert committed(store_on(tmp_path), 1, release=False).release is None


def test_carrying_moves_only_the_offsets(tmp_path):
    # given
    store = store_on(tmp_path)
    first = committed(store, 1)

    # when
    carried = store.carry({LIST: 99}, 2, facts(2))

    # then
    without_manifest = {name: data for name, data in contents(first.path).items() if name != "manifest.json"}
    assert contents(carried.path) | without_manifest == contents(carried.path)
    assert (carried.offsets, carried.tasks, carried.classes) == ({LIST: 99}, 2, ("cat",))
    assert reopened(store) == carried


def test_commits_that_only_move_offsets_do_not_push_learned_ones_out(tmp_path):
    store = store_on(tmp_path)
    for task in (1, 2):
        committed(store, task)
    for offset in range(21, 30):
        last = store.carry({LIST: offset}, 2, facts(2))
    assert sorted(path.name for path in (tmp_path / "commits").iterdir()) == ["000001", "000002", last.path.name]
    assert committed(store, 3).number == last.number + 1
    assert reopened(store).tasks == 3


def test_offsets_alone_can_be_carried_before_anything_is_learned(tmp_path):
    store = store_on(tmp_path)
    carried = store.carry({LIST: 5}, 0, facts(0))
    assert (carried.release, carried.report, carried.offsets) == (None, None, {LIST: 5})
    assert reopened(store) == carried


def test_only_the_newest_commits_are_kept(tmp_path):
    store = store_on(tmp_path, keep=2)
    for task in range(1, 5):
        committed(store, task)
    assert sorted(path.name for path in (tmp_path / "commits").iterdir()) == ["000003", "000004"]


@pytest.mark.parametrize("damage", ["flip a bit", "cut short", "delete", "manifest cut short", "manifest edited"])
def test_a_damaged_commit_falls_back_to_the_one_before_with_its_own_offsets(tmp_path, damage):
    # given
    store = store_on(tmp_path)
    first = committed(store, 1)
    second = committed(store, 2)

    # when
    file = second.path / "learner.safetensors"
    manifest = second.path / "manifest.json"
    match damage:
        case "flip a bit":
            file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
        case "cut short":
            file.write_bytes(file.read_bytes()[:-1])
        case "delete":
            file.unlink()
        case "manifest cut short":
            manifest.write_bytes(manifest.read_bytes()[:-20])
        case "manifest edited":
            manifest.write_text(manifest.read_text().replace('"tasks": 2', '"tasks": 3'))

    # then the first is current, the damaged one is kept aside, and the next commit takes its number
    assert reopened(store) == first
    assert (tmp_path / "CURRENT").readlink() == Path("commits/000001")
    assert (tmp_path / "commits" / "000002.damaged").is_dir()
    again = store_on(tmp_path)
    assert committed(again, 2).number == 2


FILES = {
    "learner.safetensors": "needed",
    "report.json": "needed",
    "manifest.json": "needed",
    "holdout/trained.zip": "needed",
    "holdout/000002.zip": "pack",
    "release/model.onnx": "release",
    "release/release.json": "release",
}


def damage(file: Path, how: str) -> None:
    whole = file.read_bytes()
    match how:
        case "flipped":  # in place, so that every commit that has this file by a hard link has the damage
            with file.open("r+b") as opened:
                opened.write(bytes([whole[0] ^ 1]))
        case "cut short":
            os.truncate(file, len(whole) - 1)
        case "missing":
            file.unlink()


@pytest.mark.parametrize("how", ["flipped", "cut short", "missing"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("carried", [False, True])
def test_no_damaged_file_stops_the_agent_and_only_what_learning_needs_costs_a_commit(tmp_path, name, how, carried):
    # given two commits, the second perhaps carried on with nothing learned
    store = store_on(tmp_path)
    committed(store, 1)
    last = committed(store, 2)
    if carried:
        last = store.carry({LIST: 25}, 2, facts(2))
    store.close()

    # when
    damage(last.path / name, how)

    # then the learner goes on
    again = store_on(tmp_path)
    found = again.current()
    needed = FILES[name] == "needed"
    assert found.number == last.number - needed
    assert found.offsets == {LIST: (20 if carried else 10) if needed else (25 if carried else 20)}
    assert (found.release is None) == (FILES[name] == "release")
    assert found.damaged == (() if needed else (name,))
    assert len(list((tmp_path / "commits").glob("*.damaged"))) == needed

    # and what is lost is not taken over
    following = again.carry({LIST: 30}, 3, facts(3))
    assert following.damaged == ()
    assert (following.release is None) == (FILES[name] == "release")
    assert needed or not (following.path / name).exists()
    again.close()
    assert reopened(again) == following


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", ["open", "read"])
@pytest.mark.parametrize("times", [2, 99])
def test_a_disk_that_refuses_to_read_is_asked_again_and_is_no_damage(tmp_path, monkeypatch, name, where, times):
    store = store_on(tmp_path)
    committed(store, 1)
    last = committed(store, 2)
    store.close()
    names = contents(tmp_path).keys()
    monkeypatch.setattr("exporter.files.READ_PAUSE_S", 0)
    real, left = Path.open, [times]

    class Refusing(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            raise OSError(errno.EIO, "Input/output error")

    def refusing(path, *arguments, **options):
        if path == last.path / name and left[0]:
            left[0] -= 1
            if where == "read":
                return Refusing()
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *arguments, **options)

    # when, then
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refusing)
        if times == 2:
            assert reopened(store) == last
        else:
            with pytest.raises(StateError, match=r"cannot read .*: Input/output error, tried 3 times.*nothing was"):
                store.current()
    assert contents(tmp_path).keys() == names


def test_with_no_intact_commit_left_it_stops_rather_than_beginning_anew(tmp_path):
    # given
    store = store_on(tmp_path)
    for task in (1, 2):
        (committed(store, task).path / "report.json").write_text("{}")
    store.close()

    # when, then, and the same at the next attempt
    for _ in range(2):
        with pytest.raises(StateError, match=r"no commit in .* is intact"):
            CommitStore(tmp_path, 3).current()


def test_a_folder_of_a_newer_format_is_not_touched(tmp_path):
    # given
    store = store_on(tmp_path)
    manifest = committed(store, 1).path / "manifest.json"
    body = json.loads(manifest.read_text())
    del body["sha256"]
    body["format"] = 99
    manifest.write_text(json.dumps(body | {"sha256": _digest(body)}))

    # when, then
    with pytest.raises(StateError, match="has format 99, this version of gapstream reads 1"):
        CommitStore(tmp_path, 3).current()
    assert manifest.exists()


def test_a_copy_that_lost_its_symlink_continues_from_the_newest_commit(tmp_path):
    # given
    store = store_on(tmp_path)
    committed(store, 1)
    last = committed(store, 2)
    (tmp_path / "CURRENT").unlink()

    # when, then
    assert reopened(store) == last
    assert (tmp_path / "CURRENT").resolve() == last.path.resolve()


def test_what_a_killed_agent_left_is_swept(tmp_path):
    # given a commit, an unfinished one, and one that never became current
    store = store_on(tmp_path)
    first = committed(store, 1)
    shutil.copytree(first.path, tmp_path / "commits" / "000002")
    (store.stage() / "half").touch()
    (tmp_path / "commits" / "000000.pruned").mkdir()
    (tmp_path / "CURRENT.new").symlink_to("commits/000002")

    # when
    found = reopened(store)

    # then
    assert found == first
    assert sorted(path.name for path in (tmp_path / "commits").iterdir()) == ["000001"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CURRENT", "RELEASE", "commits", "lock"]


def test_a_folder_that_is_not_what_was_sealed_is_not_committed(tmp_path):
    # given an outcome, and a file that came later
    store = store_on(tmp_path)
    first = committed(store, 1)
    outcome = staged(store, 2)
    (outcome.staging / "late").touch()

    # when, then
    with pytest.raises(StateError, match="differing: late"):
        store.commit(outcome, facts(2))
    assert reopened(store) == first


def test_a_link_is_not_sealed(tmp_path):
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(StateError, match="neither a file nor a folder"):
        seal(tmp_path)


def test_a_second_agent_on_the_same_folder_is_refused(tmp_path):
    # given an agent in another process, which says when it has the lock
    code = "import sys; from tests.test_commits import *; s = store_on(Path(sys.argv[1])); print(flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "\n"

    # when, then
    with pytest.raises(StateLocked, match=f"in use by another agent \\(process {other.pid}\\); stop it first"):
        CommitStore(tmp_path, 3).lock()

    # when the other is killed, nothing has to be cleaned up
    other.kill()
    other.wait()
    CommitStore(tmp_path, 3).lock()


def test_a_full_disk_leaves_the_last_commit_current(tmp_path):
    # given a device that is always full, in the place of the manifest
    store = store_on(tmp_path)
    first = committed(store, 1)
    outcome = staged(store, 2)
    (outcome.staging / "manifest.json").symlink_to("/dev/full")

    # when, then
    with pytest.raises(StateError, match=r"No space left on device .*; nothing new is committed; .* free some space"):
        store.commit(outcome, facts(2))
    assert reopened(store) == first


@pytest.mark.parametrize("where", ["/sys/gapstream", "/proc/gapstream"])
def test_a_folder_that_cannot_be_written_is_a_clear_error(where):
    with pytest.raises(StateError, match=f"cannot write the state folder {where}"):
        CommitStore(Path(where), 3).lock()
