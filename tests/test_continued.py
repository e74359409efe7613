"""A state folder made before the modules moved into rooms is continued as if nothing had happened.

`fixtures/state-before-the-move.zip` was made by gapstream 0.1.0 at commit eba101b: two tasks of the bundled stream (6
images a class, 64 random features, no release), and under `continued/` what that version made of the third task.
"""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agent.commits import CommitStore, Provenance
from agent.config import Config, load
from agent.layout import LEARNER_TENSORS, LEARNER_VALUES, POINTER, REPORT, SPOOL
from agent.parts import open_stream
from agent.trainer import Trainer
from exporter.release import ReleaseError
from streams.buffer import CutRule, Task, TaskBuffer
from streams.spool import Spool

MADE = Path(__file__).parent / "fixtures/state-before-the-move.zip"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    with zipfile.ZipFile(MADE) as made:
        made.extractall(tmp_path)
    (tmp_path / POINTER).symlink_to("commits/000002")
    return tmp_path


def settings(state: Path) -> Config:
    keys = {
        "state.path": state,
        "model.threads": 1,
        "method.gapstream.features": 64,
        "method.gapstream.drift_budget": 0,  # that version left the towers alone
        "source.archive.per_class": 6,
        "evaluation.holdout_fraction": 0.3,
    }
    return load(None, {}, {key: str(value) for key, value in keys.items()})


def next_task(config: Config, store: CommitStore) -> tuple[Task, str]:
    """The task that follows the current commit, and the fingerprint of its stream."""
    commit = store.current()
    assert commit is not None
    source, _ = open_stream(config)
    assert source.continues(commit.fingerprint)
    source.seek(commit.offsets)
    spool = Spool(config.state.path / SPOOL, 2**30)
    buffer = TaskBuffer(CutRule(), spool, commit.seen, commit.tasks + 1, source.positions)
    while (task := buffer.cut(0)) is None:
        for item in source.poll(0):
            buffer.add(item)
    return task, source.fingerprint


def test_the_next_task_gives_what_the_version_before_counted_and_about_its_scores(state, monkeypatch):
    # given the commit of two tasks, verified, and the task that follows it
    config = settings(state)
    store = CommitStore(state, 2)
    store.lock()
    task, fingerprint = next_task(config, store)
    trainer = Trainer(config, store.current().path)

    def refuse(*_: object) -> None:
        raise ReleaseError("no release is wanted here: tracing a model takes ten seconds")

    monkeypatch.setattr(trainer._exporter, "release", refuse)

    # when it is learned and committed
    outcome = trainer.learn(task, store.stage(), lambda progress: None)
    commit = store.commit(outcome, Provenance(fingerprint, task.classes, {}, {}))

    # then it is what the version before made of it
    assert commit.number == 3 and len(commit.classes) == 6
    before, now = state / "continued", commit.path
    assert json.loads((now / LEARNER_VALUES).read_text()) == json.loads((before / LEARNER_VALUES).read_text())
    expected, tensors = load_file(before / LEARNER_TENSORS), load_file(now / LEARNER_TENSORS)
    assert expected.keys() == tensors.keys() - {"embeddings"}
    # That version did not count these: they are known of the classes alone that it did not have.
    known = tensors["embeddings"].isfinite().all(1)
    assert known.tolist() == [name in task.classes for name in commit.classes]
    # But for the fusion: since then class means are shrunk where they predict, and it is fitted for all classes.
    for name in expected.keys() - {"fusion"}:
        tensor = expected[name]  # on another processor the last digits differ
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    was, scores = (json.loads((folder / REPORT).read_text()) for folder in (before, now))
    assert scores.keys() == was.keys()
    assert len(scores["matrix"]) == len(was["matrix"]) == 3
    assert scores["history"][:2] == was["history"][:2]
    assert scores["history"][2].keys() == was["history"][2].keys()
    assert scores["last"] == pytest.approx(was["last"], abs=0.1)
