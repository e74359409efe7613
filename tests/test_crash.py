"""Killed at any moment and started again, the agent ends with the same model as if nothing had happened."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
from PIL import Image

from streams.record import Reason, Rejected
from tests.fakes import LIST, ListSource, MemoryDeadLetters, pipeline, records

_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate")


def stream() -> ListSource:
    """Three tasks; one record is rejected at intake, one in the trainer, one task is halved and a sample set aside."""
    items = [*records("a", "late b"), Rejected(LIST, 2, Reason.TRUNCATED, "cut short"), *records("c", "d", start=3)]
    items += [*records("raise", "e", "f", "g", start=5)]
    return ListSource(items)


def run(state: Path) -> bytes:
    """Runs the agent to the end; returns the learner's state."""
    agent = pipeline(state, stream(), dead_letters=MemoryDeadLetters(), keep=2, quarantine=True)
    commit = agent.run()
    agent.commits.close()
    assert commit.offsets == {LIST: 9}
    return (commit.path / "learner.safetensors").read_bytes()


def in_a_child(function: Callable[[], None]) -> int:
    """Runs `function` in a forked process; returns its wait status."""
    pid = os.fork()
    if not pid:
        try:
            function()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def run_until_change(state: Path, number: int) -> None:
    """Kills this process just before it changes the file system below `state` for the `number`-th time."""
    changes = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal changes
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax")
        if (event in _CHANGES or writes) and str(arguments[0]).startswith(str(state)):
            changes += 1
            if changes == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    run(state)


def test_a_kill_before_any_change_of_the_disk_loses_nothing_and_learns_nothing_twice(tmp_path):
    # given the model of an undisturbed run
    expected = run(tmp_path / "undisturbed")
    assert [offset for *_, offset in json.loads(expected)["learned"]] == [0, 3, 4, 6, 7, 8]

    killed = 0
    while True:
        # when the agent is killed before its first, second, third, ... change, and started again
        state = tmp_path / f"killed-{killed + 1}"
        status = in_a_child(partial(run_until_change, state, killed + 1))
        if not os.WIFSIGNALED(status):
            break
        killed += 1

        # then
        assert run(state) == expected, f"killed before change {killed}"
        assert {path.name for path in (state / "commits").iterdir()} <= {f"{n:06d}" for n in range(1, 6)}
    assert killed > 50


def test_an_agent_killed_again_and_again_gets_to_the_end(tmp_path):
    # given
    expected = run(tmp_path / "undisturbed")
    chance = random.Random(7)
    state = tmp_path / "state"

    # when every run is killed at a random change until one is not
    kills = 0
    while os.WIFSIGNALED(in_a_child(partial(run_until_change, state, chance.randint(1, 60)))):
        kills += 1

    # then
    assert kills > 3
    assert run(state) == expected


def agent_process(state: Path, archive: Path, *settings: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.fake_agent", str(state), str(archive), *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def archive_of(folder: Path, *classes: str, images: int = 20) -> Path:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for image in range(images):
            Image.new("RGB", (8, 8), (image, number, 0)).save(folder / name / f"{image}.png")
    return folder


def wait_for(line: str, agent: subprocess.Popen) -> None:
    for found in agent.stderr:
        if line in found:
            return
    raise AssertionError(f"the agent ended without saying {line!r}")


def model(state: Path) -> bytes:
    return (state / "CURRENT" / "learner.safetensors").read_bytes()


def test_an_agent_killed_at_every_turn_ends_with_the_same_model(tmp_path):
    # given an undisturbed run of the whole agent
    archive = archive_of(tmp_path / "archive", "ant", "bee", "cat", "dog")
    undisturbed = agent_process(tmp_path / "undisturbed", archive)
    out, err = undisturbed.communicate(timeout=60)
    assert (undisturbed.returncode, out) == (0, "no torch\n"), err

    # when another is killed after its first line, the next after its second, ... until one ends by itself
    state = tmp_path / "state"
    for lines in itertools.count(1):
        agent = agent_process(state, archive)
        said = list(itertools.islice(agent.stderr, lines))
        if len(said) < lines:
            break
        children = psutil.Process(agent.pid).children(recursive=True)
        agent.kill()
        agent.communicate()
        assert not psutil.wait_procs(children, timeout=5)[1]
    agent.communicate(timeout=5)

    # then
    assert agent.returncode == 0
    assert model(state) == model(tmp_path / "undisturbed")


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_an_update_ends_the_agent_within_ten_seconds(tmp_path, sign):
    # given an update that spins
    archive = archive_of(tmp_path / "archive", "busy 60", images=1)
    agent = agent_process(tmp_path / "state", archive)
    wait_for("busy now", agent)
    children = psutil.Process(agent.pid).children(recursive=True)

    # when
    agent.send_signal(sign)

    # then it ends cleanly, with nothing committed and nobody left
    agent.communicate(timeout=10)
    assert agent.returncode == 0
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert not (tmp_path / "state" / "CURRENT").is_symlink()


def test_a_second_signal_ends_the_agent_at_once(tmp_path):
    # given an agent that drains: it would learn for a minute before it stops
    archive = archive_of(tmp_path / "archive", "busy 60", images=1)
    agent = agent_process(tmp_path / "state", archive, "task.on_stop=learn")
    wait_for("busy now", agent)
    children = psutil.Process(agent.pid).children(recursive=True)
    agent.send_signal(signal.SIGTERM)
    wait_for("learning what was read first", agent)

    # when
    agent.send_signal(signal.SIGTERM)

    # then
    agent.communicate(timeout=5)
    assert agent.returncode == -signal.SIGTERM
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_a_trainer_that_dies_in_an_update_changes_nothing(tmp_path):
    # given an undisturbed run, and one whose trainer is killed in its first update
    archive = archive_of(tmp_path / "archive", "ant", "bee", "cat", "busy 1", images=1)
    runs = {name: agent_process(tmp_path / name, archive) for name in ("undisturbed", "killed")}
    wait_for("busy now", runs["killed"])
    for child in psutil.Process(runs["killed"].pid).children():
        if "spawn_main" in " ".join(child.cmdline()):
            child.kill()

    # when, then
    for agent in runs.values():
        agent.communicate(timeout=60)
        assert agent.returncode == 0
    assert model(tmp_path / "killed") == model(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_run_killed_in_an_update_and_after_a_commit_ends_with_bitwise_the_same_model(tmp_path):
    # given two tasks of five classes, learned by the real trainer
    def real_agent(state: Path) -> subprocess.Popen:
        settings = {
            "state.path": state,
            "source.archive.per_class": 12,
            "source.archive.classes_per_task": 5,
            "evaluation.holdout_fraction": 0.2,
            "model.threads": 1,
            "http.enabled": "false",
        }
        pairs = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        return subprocess.Popen([sys.executable, "-m", "agent", "run", *pairs], stderr=subprocess.PIPE, text=True)

    undisturbed = real_agent(tmp_path / "undisturbed")
    _, said = undisturbed.communicate()
    assert undisturbed.returncode == 0, said

    # when another is killed in its first update while the trainer writes, and again after its first commit
    state = tmp_path / "state"
    for moment in ("released", "commit 000001"):
        agent = real_agent(state)
        wait_for(moment, agent)
        agent.kill()
        agent.communicate()
    last = real_agent(state)
    _, said = last.communicate()

    # then
    assert last.returncode == 0, said
    assert model(state) == model(tmp_path / "undisturbed")
