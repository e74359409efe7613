"""BOFA: what is exact for all tasks, and that later tasks move only what earlier ones hardly use."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from agent.config import Method
from agent.methods.bofa import Bofa, Projection
from agent.model.clip import Clip
from tests.tiny import silent, tiny_clip, tiny_task, tiny_timm_clip

QUICK = {"epochs": 3, "batch_size": 8, "rank": 8}


@pytest.fixture(scope="module")
def clip() -> Clip:
    return tiny_clip()


def learner(clip: Clip, **settings) -> Bofa:
    return Bofa(clip, Method.model_validate({"name": "bofa", "bofa": {**QUICK, **settings}}))


def features(method: Bofa, task) -> torch.Tensor:
    return method._features(task.tokens.batch(torch.arange(len(task))))


def test_features_before_the_projection_times_the_projection_are_the_towers(clip):
    task, method = tiny_task(clip, 1, ["red", "green"]), learner(clip)
    tokens = task.tokens.batch(torch.arange(len(task)))
    assert features(method, task).shape == (24, 64) and method.state().tensors["projection"].shape == (64, 24)
    assert torch.allclose(method.encode_tokens(tokens), clip.encode_tokens(tokens), atol=1e-5)


def test_a_tower_without_a_projection_gets_the_identity():
    clip = tiny_timm_clip()
    assert torch.equal(learner(clip).state().tensors["projection"], torch.eye(64))


def test_means_and_scatter_are_those_of_all_images_whatever_was_trained_in_between(clip):
    tasks = [tiny_task(clip, 1, ["red", "green"]), tiny_task(clip, 2, ["blue", "red"], seed=1)]
    method = learner(clip)
    for task in tasks:
        method.update(task, silent)
    first, second = (features(method, task) for task in tasks)
    state = method.state().tensors
    both = torch.cat([first, second])
    assert torch.allclose(state["scatter"], both.T @ both, rtol=1e-4, atol=1e-2)
    red = torch.cat([first[tasks[0].labels == 0], second[tasks[1].labels == 1]]).mean(0)
    assert torch.allclose(state["means"][0], red, atol=1e-5)


def test_the_first_task_moves_the_whole_projection_and_a_later_one_only_where_the_old_scatter_is_least(clip):
    first, second = tiny_task(clip, 1, ["red", "green"]), tiny_task(clip, 2, ["blue", "black"])
    method = learner(clip)
    untouched = method.state().tensors["projection"]
    method.update(first, silent)
    before = method.state().tensors
    method.update(second, silent)
    change = method.state().tensors["projection"] - before["projection"]
    safe = torch.linalg.eigh(before["scatter"].double()).eigenvectors[:, :8].float()
    assert torch.linalg.matrix_rank(before["projection"] - untouched) > 8
    assert change.norm() > 1e-4 and torch.allclose(safe @ (safe.T @ change), change, atol=1e-5)
    # so that images of the first task stay where they were, by far more than those of the second
    moved = [(features(method, task) @ change).norm() for task in (first, second)]
    assert moved[0] < 0.1 * moved[1]


def test_a_step_of_a_confined_change_is_the_step_of_the_published_low_rank_factor(clip):
    torch.manual_seed(0)
    weight, known = torch.randn(64, 24), torch.randn(5, 64)
    safe = torch.linalg.qr(torch.randn(64, 8)).Q
    projection = Projection(clip, weight)
    start = torch.randn(64, 24)
    projection.change.data.copy_(start)
    projection.directions = safe
    factor = (safe.T @ start).requires_grad_()
    target = torch.randn(24)
    for value, trained in (
        (projection(known), projection.change),
        (F.normalize(known @ (weight + safe @ factor), dim=-1), factor),
    ):
        optimizer = torch.optim.SGD([trained], lr=0.1)
        (value @ target).sum().backward()
        optimizer.step()
    projection.fuse()
    assert torch.allclose(projection.weight, weight + safe @ factor, atol=1e-5)


def test_prototypes_lie_between_names_and_means_as_the_projection_is_now(clip):
    method = learner(clip)
    share = method.update(tiny_task(clip, 1, ["red", "green"]), silent).details["share"]
    assert method.update(tiny_task(clip, 2, ["blue", "black"]), silent).details["share"] == share, "chosen once"
    state = method.state().tensors
    visual = F.normalize(state["means"] @ state["projection"], dim=-1)
    expected = (1 - share) * clip.encode_names(method.classes) + share * visual
    assert torch.allclose(method.inference_module().names, expected, atol=1e-5)


def test_the_share_waits_for_a_task_with_something_to_tell_apart(clip):
    method = learner(clip)
    assert method.update(tiny_task(clip, 1, ["red"]), silent).details["share"] is None
    assert method.update(tiny_task(clip, 2, ["blue", "black"]), silent).details["share"] is not None
