"""deploy/README.md, done as it is written: what was backed up can be destroyed, restored and gone on from."""

import re
import subprocess
from pathlib import Path

import pytest

from agent.commits import CommitStore
from agent.releases import pin, pinned
from exporter import release as releases
from tests.fakes import ListSource, learned, pipeline, records
from tests.test_readme import OPERATIONS

STREAM = records(*"abcdefghijklmnopqrst")


def commands(chapter: str) -> str:
    """The shell commands of the chapter with this heading."""
    shown = re.search(
        rf"^## {re.escape(chapter)}\n(?:(?!^## ).)*?```sh\n(.*?)```", OPERATIONS, re.DOTALL | re.MULTILINE
    )
    assert shown is not None
    return shown[1]


def sh(folder: Path, lines: str) -> None:
    subprocess.run(["sh", "-eu"], input=lines, text=True, cwd=folder, check=True, timeout=60)


def learn(state: Path, tasks: int):
    """The last commit of an agent that learns three records a task, up to task `tasks`, going on from where it was."""
    agent = pipeline(state, ListSource(STREAM[: 3 * tasks]), keep=3)
    commit = agent.run()
    agent.commits.close()
    return commit


def test_a_destroyed_state_is_restored_and_gone_on_from(tmp_path):
    # given a backup after two tasks, and two more tasks
    state = tmp_path / "state"
    learn(state, 2)
    sh(tmp_path, commands("Back up"))
    learn(state, 4)

    # when the folder is destroyed
    for file in (state / "commits").rglob("learner.safetensors"):
        file.write_bytes(b"rotten")
    sh(tmp_path, commands("Restore"))

    # then the backup is whole in spite of the hard links, and learning goes on as if nothing had been
    store = CommitStore(state, 3)
    assert learned(store.verified()) == list(range(6))
    undisturbed = learn(tmp_path / "other", 5)
    restored = learn(state, 5)
    assert (restored.path / "learner.safetensors").read_bytes() == (
        undisturbed.path / "learner.safetensors"
    ).read_bytes()
    assert restored.offsets == undisturbed.offsets
    assert releases.current(state) == restored.release


def test_a_backup_keeps_where_readers_are_held(tmp_path):
    state = tmp_path / "state"
    learn(state, 2)
    held = pin(state, 1)
    learn(state, 5)
    sh(tmp_path, commands("Back up"))
    sh(tmp_path, commands("Restore"))
    assert pinned(state) == 1
    assert releases.read(releases.current(state)).id == held.id


def test_a_backup_taken_in_the_middle_of_an_update_leaves_its_half_behind(tmp_path):
    state = tmp_path / "state"
    learn(state, 2)
    half = state / "commits" / "000003.staging"
    half.mkdir()
    (half / "learner.safetensors").write_text("half")
    (state / "spool").mkdir(exist_ok=True)
    (state / "spool" / "left.segment").write_bytes(bytes(1000))

    sh(tmp_path, commands("Back up"))
    sh(tmp_path, commands("Restore"))

    assert not (state / "spool").exists()
    assert learned(learn(state, 3)) == list(range(9))


def test_the_learner_goes_back_to_an_older_commit_and_learns_again(tmp_path):
    state = tmp_path / "state"
    learn(state, 4)
    sh(tmp_path, commands("Roll back the learner").replace("000041", "000003"))

    again = learn(state, 5)

    assert (again.number, learned(again)) == (5, list(range(15)))
    assert releases.current(state) == again.release


@pytest.mark.parametrize("chapter", ["Upgrade", "Back up", "Restore", "Roll back the learner"])
def test_every_procedure_is_valid_shell(chapter):
    subprocess.run(["sh", "-n"], input=commands(chapter), text=True, check=True, timeout=10)
