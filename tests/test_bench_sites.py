"""A stream dealt over sites: all images come to one site each, and what they answer together is what one would."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from agent import methods
from agent.bench.data import BenchError, Data, Scored
from agent.bench.sites import _accuracy, _dealt, _part, bench_sites, compared
from agent.cli import main
from agent.config import Config
from agent.methods.merging import merge
from agent.model.clip import Clip
from agent.model.images import TokensAt
from tests.tiny import silent, tiny_clip, tiny_task

CLASSES = ("red", "green", "blue", "white", "black")


@pytest.fixture(scope="module")
def clip() -> Clip:
    return tiny_clip()


@pytest.fixture(scope="module")
def data(clip: Clip) -> Data:
    tasks = tuple(
        tiny_task(clip, number, names, per_class=20) for number, names in ((1, CLASSES[:2]), (2, CLASSES[2:]))
    )
    test = tiny_task(clip, 0, CLASSES, per_class=10, seed=0)
    scored = Scored(
        CLASSES, test.labels, TokensAt(test.tokens, torch.arange(len(test))), clip.encode_tokens(test.tokens.tensor)
    )
    return Data(tasks, scored, None, scored.tokens)


def config(**method: object) -> Config:
    return Config.model_validate({"method": {"gapstream": {"features": 60, "drift_budget": 0}} | method})


@pytest.mark.parametrize("deal", ["class", "random"])
def test_every_image_comes_to_one_site(clip, data, deal):
    for task in data.tasks:
        at = _dealt(task, CLASSES, 3, deal, seed=0)
        parts = [_part(task, (at == site).nonzero().squeeze(1)) for site in range(3)]
        assert sum(map(len, parts)) == len(task)
        for site, part in enumerate(parts):
            wanted = [task.classes[label] for label in task.labels[at == site]]
            assert [part.classes[label] for label in part.labels] == wanted
            if deal == "class":
                assert set(part.classes) == {name for name in task.classes if CLASSES.index(name) % 3 == site}


def test_images_that_are_cropped_are_those_of_the_site(data):
    class Numbers:
        def batch(self, index, generator, part=None):
            return index

    task = replace(data.tasks[0], cropped=Numbers())
    index = torch.tensor([3, 5, 8])
    part = _part(task, index)
    assert part.cropped.batch(torch.tensor([2, 0]), torch.Generator()).tolist() == [8, 3]
    assert _part(data.tasks[0], index).cropped is None


@pytest.mark.parametrize("deal", ["class", "random"])
def test_what_sites_answer_together_is_what_one_learner_answers(clip, data, deal):
    scores = compared(config(name="ncm"), data, clip, 3, deal)
    assert len(scores.alone) == 3 and scores.union == (scores.central,) * 3
    if deal == "class":
        assert max(scores.alone) <= 0.4 < min(scores.union)


@pytest.mark.parametrize("deal", ["class", "random"])
def test_sites_of_a_method_that_trains_are_merged_at_the_end_and_answer_alike(clip, data, deal):
    # given sites that learn as the bench has them learn
    chosen = config(name="mgclip")
    learners = [methods.build(clip, chosen.method) for _ in range(2)]
    for task in data.tasks:
        at = _dealt(task, CLASSES, 2, deal, seed=0)
        for site, learner in enumerate(learners):
            if (at == site).any():
                learner.update(_part(task, (at == site).nonzero().squeeze(1)), silent)

    # when
    scores = compared(chosen, data, clip, 2, deal)

    # then the union is what their merge answers
    union = methods.build(clip, chosen.method)
    union.load_state(merge("mgclip", {str(site): learner.state() for site, learner in enumerate(learners)}))
    assert set(union.classes) == set(CLASSES)
    assert scores.union == (_accuracy(union, data.test, 64),) * 2
    assert scores.alone == tuple(_accuracy(learner, data.test, 64) for learner in learners)


def test_a_method_whose_learners_are_not_merged_and_a_single_site_are_refused(tmp_path):
    console = Console(file=io.StringIO())
    for rows, sites, message in ((config(name="seca"), 3, "seca cannot be merged"), (config(), 1, "2 or more")):
        with pytest.raises(BenchError, match=message):
            bench_sites(config(), {"row": rows}, [0], 0, sites, "class", tmp_path, console)


@pytest.mark.slow
def test_the_command_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    spec = "gapstream:features=300:drift_budget=0"
    words = ["--sites", "4", "--methods", f"ncm,{spec}", "--out", str(tmp_path), "--per-class", "20"]
    assert main(["bench", *words, "--set", "model.threads=1"]) == 0
    assert "4 sites, dealt by class" in capsys.readouterr().out
    assert "| `ncm` |" in (tmp_path / "sites-class.md").read_text()
