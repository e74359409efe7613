"""The fusion of discriminant and texts: images left out, images moved to other classes, and the two numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from agent.methods.base import NOTHING, LearnerState
from agent.methods.discriminant import Solved, Statistics
from agent.methods.fusion import Fusion, LeftOut, Scored
from agent.methods.gapstream import START
from agent.methods.merging import merge
from agent.methods.publishing import incoming, outgoing
from agent.model.clip import Clip
from tests.test_gapstream import NAMES, features, learner, reference, stream, task_of, uneven
from tests.tiny import silent, tiny_clip


@pytest.fixture(scope="module")
def clip() -> Clip:
    return tiny_clip()


def test_leaving_one_out_is_what_learning_all_others_would_have_said(clip):
    tokens, labels = uneven(*stream(clip, per_class=8))
    method = learner(clip)
    method.update(task_of(1, tokens, labels), silent)
    solved, known = method._statistics.solve(7), features(method, clip, tokens)
    got = LeftOut(solved, known.float(), labels, method._statistics.counts).scores().double()
    variance = (known - known.mean(0)).square().mean()
    for i in range(len(labels)):
        others = torch.arange(len(labels)) != i
        want = reference(known[others], labels[others], 7, known[i : i + 1], solved, variance)[0]
        want = want * (len(labels) + 7) / (len(labels) - 1 + 7)  # the count of images is the whole's
        assert torch.allclose(got[i] - got[i].mean(), want - want.mean(), rtol=1e-2, atol=1e-2)


def drawn(per_class: int, classes: int = 5, width: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features [N, width] of Gaussian classes with one scatter of unequal directions, and labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(classes, width, generator=torch.Generator().manual_seed(100))
    labels = torch.arange(classes).repeat_interleave(per_class)
    noise = torch.randn(len(labels), width, generator=generator) * torch.linspace(0.2, 2, width)
    return means[labels] + noise, labels


def counted(points: Tensor, labels: Tensor) -> tuple[Statistics, Solved]:
    statistics = Statistics(points.shape[1], 2, torch.device("cpu"))
    statistics.widen(int(labels.max()) + 1)
    statistics.count(points, torch.zeros(len(points), 2), labels)
    return statistics, statistics.solve(7)


def test_a_moved_image_is_scored_as_one_at_its_place_by_a_scatter_without_the_image():
    points, labels = drawn(per_class=6)
    statistics, solved = counted(points, labels)
    left = LeftOut(solved, points, labels, statistics.counts)
    index, to = torch.tensor([0, 0, 7, 29]), torch.tensor([3, 4, 0, 2])
    got = left.moved(index, to).double()
    variance = (points - points.mean(0)).square().mean().double()
    weights = (statistics.counts / (statistics.counts + 8)).double()
    means = torch.stack([points[labels == c].mean(0) for c in range(5)]).double()
    centre = means.mean(0)
    shrunk = centre + weights[:, None] * (means - centre)
    for row, (at, target) in enumerate(zip(index.tolist(), to.tolist(), strict=True)):
        others = torch.arange(len(labels)) != at
        # the scatter of all other images around the means that they have
        rest = torch.stack([points[others & (labels == c)].mean(0) for c in range(5)]).double()
        residual = points[others].double() - rest[labels[others]]
        covariance = residual.T @ residual + 7 * variance * torch.eye(points.shape[1])
        away = points[at].double() - means[labels[at]]
        place = means[target] + float(left.stretch(index, to)[row]) * away
        distance = place - shrunk
        want = -(len(labels) + 7) / 2 * torch.einsum("cm,cm->c", distance @ torch.linalg.inv(covariance), distance)
        assert torch.allclose(got[row] - got[row].mean(), want - want.mean(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("per_class", [2, 3, 20])
def test_a_moved_image_varies_around_its_class_as_a_new_image_would(per_class):
    # given many streams of the same classes, in which the mean of a class is that of its few images
    moved, new = [], []
    for seed in range(400):
        points, labels = drawn(per_class, seed=seed)
        statistics, solved = counted(points, labels)
        left = LeftOut(solved, points, labels, statistics.counts)
        index, to = torch.tensor([0]), torch.tensor([1])
        moved.append(left.stretch(index, to)[:, None] * left.residual[index])
        fresh = drawn(1, seed=seed + 10_000)[0][1]
        new.append(fresh - statistics.means[1])
    assert torch.cat(moved).square().mean() == pytest.approx(float(torch.stack(new).square().mean()), rel=0.1)


def scored(labels: Tensor, visual: float, text: float, noise: int) -> Scored:
    """Scores of four classes in which the right one stands out by so much, among noise of deviation 1."""
    generator = torch.Generator().manual_seed(noise)
    right = F.one_hot(labels, 4)
    both = [strength * right + torch.randn(len(labels), 4, generator=generator) for strength in (visual, text)]
    return Scored(*both, labels)


NONE = Scored(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def test_the_ratio_is_that_of_all_classes_and_the_size_that_of_real_images():
    # given images of one class of four, on which texts are good and the discriminant poor; with all others it is not so
    real = scored(torch.zeros(200, dtype=torch.int64), visual=0.5, text=4, noise=1)
    moved = scored(torch.arange(1, 4).repeat(200), visual=4, text=0.5, noise=2)
    start = Fusion(1.0, 1.0)
    alone, both, others = start.fitted(real, NONE), start.fitted(real, moved), start.fitted(moved, NONE)
    ratios = [fusion.text_weight / fusion.temperature for fusion in (alone, both, others)]
    # when these stand for three quarters of the classes, then their ratio counts the more
    assert ratios[0] > 3 > 1 > ratios[1] > ratios[2]

    # and moved images that are all too easy change nothing of the size
    def times(part: Scored, factor: float) -> Scored:
        return Scored(factor * part.visual, factor * part.text, part.labels)

    easier = start.fitted(real, times(moved, 5))
    assert easier.temperature == pytest.approx(both.temperature, rel=0.25)
    assert easier.text_weight / easier.temperature == pytest.approx(ratios[1], rel=0.25)


def test_a_task_of_few_classes_fits_about_what_a_task_of_all_does(clip, monkeypatch):
    tokens, labels = stream(clip, per_class=60)

    def ratio(*parts: Tensor) -> float:
        method = learner(clip)
        for number, part in enumerate(parts, 1):
            method.update(task_of(number, tokens[part], labels[part]), silent)
        return method.weights.text_weight / method.weights.temperature

    whole, one_by_one = ratio(labels < 4), [labels == c for c in range(4)]
    moved = ratio(*one_by_one)
    monkeypatch.setattr("agent.methods.gapstream.MOVED", 0)
    assert moved == pytest.approx(whole, rel=0.1) and abs(ratio(*one_by_one) / whole - 1) > 0.2


def test_with_many_classes_fewer_images_are_moved(clip, monkeypatch):
    tokens, labels = stream(clip)
    seen: list[int] = []
    moved = LeftOut.moved

    def watched(left: LeftOut, index: Tensor, to: Tensor) -> Tensor:
        seen.append(len(index))
        return moved(left, index, to)

    monkeypatch.setattr(LeftOut, "moved", watched)
    for scores in (10**6, 4 * 30, 4 * 30 - 1, 0):
        monkeypatch.setattr("agent.methods.gapstream.MOVED_SCORES", scores)
        method = learner(clip)
        method.update(task_of(1, tokens[labels < 3], labels[labels < 3]), silent)
        method.update(task_of(2, tokens[labels == 3], labels[labels == 3]), silent)
        assert method.weights != START
    # two tasks each, of which the first has no other classes; twelve images are moved four times
    assert seen == [0, 48, 0, 30, 0, 29, 0, 0]


def forgotten(state: LearnerState) -> LearnerState:
    """The same state as the version made it that did not count embeddings."""
    return LearnerState({key: tensor for key, tensor in state.tensors.items() if key != "embeddings"}, state.values)


def test_classes_of_an_earlier_version_are_learned_on_and_no_image_is_moved_to_or_from_them(clip):
    # given two classes of whose embeddings nothing is known
    tokens, labels = stream(clip)
    old, method = learner(clip), learner(clip)
    old.update(task_of(1, tokens[labels < 2], labels[labels < 2]), silent)
    method.load_state(forgotten(old.state()))
    # when one of them comes back with two new ones
    method.update(task_of(2, tokens[labels > 0], labels[labels > 0]), silent)
    # then those are known, and a state with them goes on
    assert method.state().tensors["embeddings"].isfinite().all(1).tolist() == [False, False, True, True]
    assert method.weights != old.weights and method.weights != START
    again = learner(clip)
    again.load_state(method.state())
    again.update(task_of(3, tokens[labels == 3], labels[labels == 3]), silent)
    assert again.state().tensors["counts"].tolist() == [12, 24, 12, 24]
    # and another site is told, and adds them up, as unknown
    tensors, names = outgoing("gapstream", again.state(), NOTHING, 1)
    assert tensors["embeddings"].any(1).tolist() == [False, False, True, True]
    heard = incoming(again.state(), tensors, names, again.state().values.get("depth", 0), True)
    merged = merge("gapstream", {"a": again.state(), "b": heard})
    assert merged.values["classes"] == sorted(NAMES)
    known = dict(zip(merged.values["classes"], merged.tensors["embeddings"].isfinite().all(1).tolist(), strict=True))
    assert known == dict(zip(NAMES, (False, False, True, True), strict=True))
