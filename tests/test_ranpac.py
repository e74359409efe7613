"""RanPAC: exact sums, the ridge chosen as published, and weights that are those of one regression over all images."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from agent.config import Method
from agent.methods.base import TaskData, task_generator
from agent.methods.ranpac import HELD, RIDGES, RanPac
from agent.model.clip import Clip
from tests.tiny import PlainTokens, silent, tiny_clip, tiny_task

CLASSES = ["red", "green", "blue", "black"]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return tiny_clip()


def learner(clip: Clip, features: int = 48) -> RanPac:
    return RanPac(clip, Method.model_validate({"name": "ranpac", "ranpac": {"features": features}}))


def part(task: TaskData, number: int, rows: torch.Tensor) -> TaskData:
    present = task.labels[rows].unique()
    labels = torch.searchsorted(present, task.labels[rows])
    names = tuple(task.classes[i] for i in present.tolist())
    return TaskData(number, names, labels, PlainTokens(task.tokens.batch(rows)))


def random_features(clip: Clip, method: RanPac, task: TaskData) -> torch.Tensor:
    embeddings = clip.encode_tokens(task.tokens.batch(torch.arange(len(task))))
    return F.relu(embeddings @ method.state().tensors["projection"]).double()


def test_it_predicts_by_the_regression_over_all_images_of_all_tasks_at_once(clip):
    whole, method = tiny_task(clip, 1, CLASSES), learner(clip)
    # given a stream in which classes come in several tasks
    for number, rows in enumerate(torch.arange(len(whole)).roll(7).split(20), 1):
        method.update(part(whole, number, rows), silent)
    ridge = method.state().tensors["ridge"].item()
    # then its weights are the closed form
    features = random_features(clip, method, whole)
    order = torch.tensor([whole.classes.index(name) for name in method.classes])
    truth = F.one_hot(whole.labels, len(CLASSES)).double()[:, order]
    weights = torch.linalg.solve(features.T @ features + ridge * torch.eye(48), features.T @ truth)
    module = method.inference_module()
    probabilities = module.from_tokens(whole.tokens.batch(torch.arange(len(whole))))[2]
    expected = (clip.logit_scale * features @ weights).softmax(-1)
    assert torch.allclose(probabilities.double(), expected, atol=1e-3)


@pytest.mark.parametrize("features", [16, 200])
def test_the_ridge_errs_least_on_a_fifth_of_the_task_by_weights_of_the_other_four(clip, features):
    task, method = tiny_task(clip, 1, CLASSES), learner(clip, features)
    chosen = method.update(task, silent).details["ridge"]
    # when every ridge is tried by the normal equations, as in the published code
    order = torch.randperm(len(task), generator=task_generator(0, 1, "held for the ridge"))
    held, learned = order.split([int(HELD * len(task)), len(task) - int(HELD * len(task))])
    known, truth = random_features(clip, method, task), F.one_hot(task.labels, len(CLASSES)).double()
    gram, sums = known[learned].T @ known[learned], known[learned].T @ truth[learned]
    errors = {
        ridge: (known[held] @ torch.linalg.solve(gram + ridge * torch.eye(features), sums) - truth[held])
        .square()
        .mean()
        for ridge in RIDGES
        if ridge > 1e-4  # below, the normal equations are rounding
    }
    assert chosen == min(errors, key=lambda ridge: errors[ridge])


def test_a_task_of_too_few_images_keeps_the_ridge(clip):
    method = learner(clip)
    assert method.update(tiny_task(clip, 1, ["red"], per_class=4), silent).details["ridge"] == 1
    chosen = method.update(tiny_task(clip, 2, CLASSES), silent).details["ridge"]
    assert method.update(tiny_task(clip, 3, ["pink"], per_class=4), silent).details["ridge"] == chosen


def test_a_ridge_below_rounding_is_raised_until_the_weights_can_be_solved(clip):
    method = learner(clip, features=400)
    method.update(tiny_task(clip, 1, CLASSES), silent)
    method._ridge = RIDGES[0]
    assert method._weights().isfinite().all()
    # and where none helps that is said
    method._gram[0, 0] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError, match="no Cholesky factor"):
        method._weights()
