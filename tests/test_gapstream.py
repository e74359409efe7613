"""gapstream's own method against direct computation: statistics, discriminant, leaving one out, adapters, its state."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from agent.config import Method, Model
from agent.methods.base import LearnerState, TaskData, task_generator
from agent.methods.discriminant import MEAN_PRIOR_IMAGES, RandomFeatures, Solved
from agent.methods.fusion import LeftOut
from agent.methods.gapstream import LEAST_HELD, Gapstream, stay
from agent.methods.training import GapWatch, local_loss
from agent.model.clip import Clip, load_clip
from agent.values import Progress
from tests.tiny import PlainTokens, silent, tiny_clip, tiny_task, tiny_timm_clip

NAMES = ("red", "green", "blue", "black")


@pytest.fixture(scope="module")
def clip() -> Clip:
    return tiny_clip()


def learner(clip: Clip, **settings) -> Gapstream:
    """A learner that leaves the towers alone, where no budget is given."""
    section = {"features": 40, "prior_images": 7, "drift_budget": 0, **settings}
    return Gapstream(clip, Method.model_validate({"gapstream": section}))


def stream(clip: Clip, per_class: int = 12) -> tuple[Tensor, Tensor]:
    """Tokens [N, tokens, width] and labels [N] of all of NAMES, mixed."""
    task = tiny_task(clip, 1, list(NAMES), per_class)
    order = torch.randperm(len(task), generator=torch.Generator().manual_seed(3))
    return task.tokens.tensor[order], task.labels[order]


def uneven(tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of the second class a half, of the third three images, of the others all."""
    place = F.one_hot(labels).cumsum(0)[torch.arange(len(labels)), labels]
    kept = place <= torch.tensor([len(labels), len(labels) // 8, 3, len(labels)])[labels]
    return tokens[kept], labels[kept]


def task_of(number: int, tokens: Tensor, labels: Tensor) -> TaskData:
    present = labels.unique()
    renamed = torch.searchsorted(present, labels)
    return TaskData(number, tuple(NAMES[i] for i in present.tolist()), renamed, PlainTokens(tokens))


def features(method: Gapstream, clip: Clip, tokens: Tensor) -> Tensor:
    middle, embedding = clip.image.at_depth(tokens, method._depth)
    return method._random(middle, F.normalize(embedding, dim=-1)).double()


def reference(
    features: Tensor,
    labels: Tensor,
    prior: float,
    asked: Tensor,
    solved: Solved,
    variance: Tensor | None = None,
) -> Tensor:
    """-1/2 squared Mahalanobis distance to every shrunk class mean, without what noise adds to the mean's length,
    computed from all images at once, with the noise and centre of `solved`: [n, C]."""
    means = torch.stack([features[labels == c].mean(0) for c in range(len(NAMES))])
    residual = features - means[labels]
    variance = (features - features.mean(0)).square().mean() if variance is None else variance
    covariance = (residual.T @ residual + prior * variance * torch.eye(features.shape[1])) / (len(features) + prior)
    counts = torch.bincount(labels, minlength=len(NAMES))
    weights = counts / (counts + MEAN_PRIOR_IMAGES)
    away = asked[:, None] - solved.centre.double() - weights[:, None] * (means - solved.centre.double())
    distance = torch.einsum("ncm,ncm->nc", away @ torch.linalg.inv(covariance), away)
    return -(distance - weights.square() / counts * solved.noise.double() * (len(features) + prior)) / 2


def test_the_prediction_is_the_discriminant_of_all_images_beside_the_texts(clip):
    tokens, labels = uneven(*stream(clip))
    method = learner(clip)
    method.update(task_of(1, tokens, labels), silent)
    known, embedding = features(method, clip, tokens), clip.encode_tokens(tokens).double()
    text = clip.logit_scale * embedding @ clip.encode_names(NAMES).double().T
    fusion = method._fusion
    fused = fusion.temperature * reference(known, labels, 7, known, method._solve()) + fusion.text_weight * text
    got = method.inference_module().from_tokens(tokens)[2]
    assert torch.allclose(got.double(), fused.softmax(-1), atol=1e-3)


def test_what_is_learned_does_not_depend_on_how_the_stream_is_cut(clip):
    tokens, labels = stream(clip)
    whole, cut = learner(clip), learner(clip)
    # the first task has every class, in the order of the whole
    whole.update(task_of(1, tokens, labels), silent)
    for number, (start, end) in enumerate(((0, 20), (20, 21), (21, 48)), 1):
        cut.update(task_of(number, tokens[start:end], labels[start:end]), silent)
    assert cut.classes == whole.classes
    for name in ("counts", "means", "embeddings", "scatter"):
        assert torch.allclose(cut.state().tensors[name], whole.state().tensors[name], rtol=1e-3, atol=1e-4), name


def test_what_images_cannot_tell_apart_is_left_to_the_texts(clip):
    def temperature(tokens: Tensor, labels: Tensor) -> float:
        method = learner(clip)
        method.update(task_of(1, tokens, labels), silent)
        return method._fusion.temperature

    tokens, labels = stream(clip, per_class=30)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert temperature(tokens, labels) > 20 * temperature(tokens, shuffled)


def test_one_image_of_a_class_is_learned_where_nothing_can_be_left_out(clip):
    tokens, labels = stream(clip, per_class=1)
    method = learner(clip, drift_budget=1e9)
    before = method._fusion
    update = method.update(task_of(1, tokens, labels), silent)
    assert method._fusion == before and update.adaptation is None
    assert method.inference_module().from_tokens(tokens)[2].isfinite().all()


PER_CLASS = ("counts", "means", "embeddings", "names")


def test_the_state_of_a_thousand_classes_stays_below_100_mb(clip):
    method = Gapstream(clip, Method())
    method.update(tiny_task(clip, 1, ["red", "green"], per_class=2), silent)
    state = method.state().tensors
    per_class = sum(tensor[0].nbytes for name, tensor in state.items() if name in PER_CLASS)
    assert sum(tensor.nbytes for tensor in state.values()) + 998 * per_class < 100e6


def test_random_features_are_those_of_every_token_alone_and_of_the_embedding(clip):
    random = RandomFeatures(clip, 10, torch.Generator().manual_seed(0))
    tokens, embedding = torch.randn(2, 5, 64), F.normalize(torch.randn(2, clip.embed_dim), dim=-1)
    got = random(tokens, embedding)
    first = [F.relu(F.normalize(token, dim=-1) @ random.tokens) for token in tokens[0]]
    assert torch.allclose(got[0, :6], torch.stack(first).mean(0), atol=1e-6)
    assert torch.allclose(got[:, 6:], F.relu(embedding @ random.embedding), atol=1e-6)


WIDE = 1e9
"""A budget that nothing crosses."""


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tasks adapt, in few steps far enough to see, and keep it whatever so few images say."""
    monkeypatch.setattr("agent.methods.gapstream.LEAST_HELD", 4)
    monkeypatch.setattr("agent.methods.gapstream.LEARNING_RATE", 5e-3)
    monkeypatch.setattr("agent.methods.gapstream.stay", lambda gain, error: True)


@pytest.fixture
def judged(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `eager`, but images held back decide; and as the discriminant says nothing, they see what the texts say."""
    monkeypatch.setattr("agent.methods.gapstream.stay", stay)
    monkeypatch.setattr(LeftOut, "scores", lambda left: torch.zeros(len(left.labels), len(left.counts)))


def held_back(method: Gapstream, task: TaskData) -> Tensor:
    sample = torch.randperm(len(task), generator=task_generator(method._seed, task.number, "calibration"))
    return sample[: len(task) // 4]


def test_adapters_learn_the_names_and_stay_where_images_held_back_win_by_them(clip, judged):
    tokens, labels = stream(clip, per_class=100)
    task, method = task_of(1, tokens, labels), learner(clip, drift_budget=WIDE)
    update = method.update(task, silent)
    adaptation = update.adaptation
    assert adaptation.kept and adaptation.images == len(task) // 4 and adaptation.gain > adaptation.error
    assert update.epochs == adaptation.epochs == 1 and 0 < update.drift_after == adaptation.drift
    losses = [
        local_loss(model.encode_tokens(tokens), model.encode_names(task.classes), task.labels, clip.logit_scale)
        for model in (method, clip)
    ]
    assert losses[0] < losses[1] - 0.1
    # what is released answers by the adapted towers too
    module = method.inference_module()
    assert torch.allclose(module.from_tokens(tokens)[0], method.encode_tokens(tokens), atol=1e-6)


def test_what_was_counted_is_the_same_to_the_last_bit_however_the_towers_adapt(clip, eager):
    still, moving = learner(clip), learner(clip, drift_budget=WIDE)
    tokens, labels = stream(clip, per_class=30)
    for number, part in enumerate((labels < 2, labels >= 2, labels < 4), 1):
        still.update(task_of(number, tokens[part], labels[part]), silent)
        moving.update(task_of(number, tokens[part], labels[part]), silent)
    assert moving._adapted and not still._adapted
    for name in ("counts", "means", "embeddings", "scatter"):
        assert torch.equal(still.state().tensors[name], moving.state().tensors[name]), name


def test_with_a_budget_of_0_no_tower_moves_and_no_adapters_are_kept(clip, eager):
    tokens, labels = stream(clip)
    method = learner(clip, drift_budget=0)
    update = method.update(task_of(1, tokens, labels), silent)
    assert update.adaptation is None and update.drift_after == 0 and update.budget is None and update.epochs_run == 0
    assert set(method.state().tensors) == {
        *("random.tokens", "random.embedding", "counts", "means", "embeddings", "scatter", "names", "fusion")
    }
    assert method.inference_module().adapted is None


def test_what_crosses_the_budget_is_rolled_back(clip, eager):
    tokens, labels = stream(clip)
    method = learner(clip, drift_budget=1e-6)
    before = method._student.tensors()
    heard: list[Progress] = []
    update = method.update(task_of(1, tokens, labels), heard.append)
    assert max(progress.drift for progress in heard if progress.budget) == update.adaptation.drift
    assert update.rolled_back and update.epochs == 0 and update.epochs_run == 1
    assert not update.adaptation.kept and update.adaptation.drift > 1e-6 and update.drift_after == 0
    assert "undone" in update.adaptation.words()
    assert all(torch.equal(tensor, before[name]) for name, tensor in method._student.tensors().items())
    assert torch.equal(method.encode_names(NAMES), clip.encode_names(NAMES))


def test_adapters_by_which_the_images_held_back_lose_are_refused(clip, judged, monkeypatch):
    # given a first task that adapts, and a second whose names the adapters learn the wrong way round
    monkeypatch.setattr("agent.methods.gapstream.LEARNING_RATE", 5e-2)
    tokens, labels = stream(clip, per_class=40)
    method = learner(clip, drift_budget=WIDE)
    method.update(task_of(1, tokens, labels), silent)
    task = task_of(2, tokens, labels)
    wrong = (task.labels + 1) % len(NAMES)
    wrong[held_back(method, task)] = task.labels[held_back(method, task)]
    before, names = method._student.tensors(), method.encode_names(NAMES)
    # when it is learned
    update = method.update(replace(task, labels=wrong), silent)
    # then the towers are as they were
    assert not update.adaptation.kept and update.adaptation.gain < -update.adaptation.error
    assert update.epochs == 0 and update.epochs_run == 1 and not update.rolled_back
    assert update.drift_after == update.drift_before
    assert all(torch.equal(tensor, before[name]) for name, tensor in method._student.tensors().items())
    assert torch.equal(method.encode_names(NAMES), names)
    assert "refused" in update.adaptation.words()


@pytest.mark.parametrize("budget", [0.05, 0])
def test_adapters_whose_drift_a_later_task_finds_beyond_the_budget_are_weakened_until_it_is_inside(clip, eager, budget):
    # given adapters made under a wide budget
    tokens, labels = stream(clip)
    wide = learner(clip, drift_budget=WIDE)
    wide.update(task_of(1, tokens, labels), silent)
    # when another task comes under a narrow one
    method = learner(clip, drift_budget=budget)
    method.load_state(wide.state())
    task = task_of(2, tokens, labels)
    assert GapWatch(method, clip, task, 0).drift(GapWatch(method, clip, task, 0).before) > budget
    update = method.update(task, silent)
    # then its gap is inside again, and the update tells what was found; without a budget the towers are the untouched
    # ones at once
    assert update.drift_after <= budget < update.drift_before
    if not budget:
        assert method.inference_module().adapted is None
        assert torch.equal(method.encode_names(NAMES), clip.encode_names(NAMES))


def test_images_that_cannot_be_left_out_of_their_class_judge_nothing(clip, eager):
    # given twenty images of one class and one image of each of three others
    tokens, labels = stream(clip, per_class=20)
    chosen = torch.cat([(labels == 0).nonzero(), *((labels == c).nonzero()[:1] for c in (1, 2, 3))])[:, 0]
    # when they are learned, whichever of them come first in the order in which images are held back
    for number in range(1, 6):
        update = learner(clip, drift_budget=WIDE).update(task_of(number, tokens[chosen], labels[chosen]), silent)
        # then a quarter of the twenty judges
        assert update.adaptation.images == 5


def test_a_task_with_too_few_images_to_judge_by_adapts_nothing(clip):
    enough = 4 * LEAST_HELD
    for images, adapts in ((enough, True), (enough - 1, False)):
        tokens, labels = stream(clip, per_class=enough)
        update = learner(clip, drift_budget=WIDE).update(task_of(1, tokens[:images], labels[:images]), silent)
        assert (update.adaptation is not None) == adapts


def test_a_task_of_one_name_adapts_nothing_as_there_is_nothing_to_tell_apart(clip, eager):
    tokens, labels = stream(clip, per_class=30)
    method = learner(clip, drift_budget=WIDE)
    for number in (1, 2):
        update = method.update(task_of(number, tokens[labels == 0], labels[labels == 0]), silent)
        assert update.adaptation is None and update.epochs_run == 0 and update.gap_after == update.gap_untouched


def test_earlier_features_are_taken_after_a_third_of_a_plain_towers_blocks_and_before_them_behind_a_trunk():
    assert tiny_clip().image.depth == 1 and tiny_timm_clip().image.depth == 2
    assert load_clip(Model()).image.depth == 0


def test_a_state_whose_features_are_of_another_depth_is_continued_with_them(clip):
    tokens, labels = stream(clip)
    old = learner(clip)
    old._depth = 0
    old.update(task_of(1, tokens, labels), silent)
    assert "depth" not in old.state().values
    method = learner(clip)
    method.load_state(old.state())
    for learned in (old, method):
        learned.update(task_of(2, tokens, labels), silent)
    assert method._depth == 0
    assert torch.equal(method.state().tensors["scatter"], old.state().tensors["scatter"])


def test_a_state_that_takes_other_shares_of_its_features_of_tokens_and_embedding_is_continued_with_them(
    clip, monkeypatch
):
    tokens, labels = stream(clip)
    with monkeypatch.context() as earlier:
        earlier.setattr("agent.methods.discriminant.TOKENS_SHARE", 0.75)
        old = learner(clip)
    old.update(task_of(1, tokens, labels), silent)
    method = learner(clip)
    assert (
        method.state().tensors["random.tokens"].shape[1] == 24 and old.state().tensors["random.tokens"].shape[1] == 30
    )
    method.load_state(old.state())
    for learned in (old, method):
        learned.update(task_of(2, tokens, labels), silent)
    assert_same(method.state(), old.state())
    answers = [learned.inference_module().from_tokens(tokens)[2] for learned in (old, method)]
    assert torch.equal(*answers)


def assert_same(a: LearnerState, b: LearnerState) -> None:
    assert a.values == b.values and a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert torch.equal(tensor, b.tensors[name]), name


def test_a_learner_whose_adapters_were_taken_away_goes_on_from_its_state_bit_for_bit(clip, eager):
    # given adapters that a later task takes away, as nothing of them is inside its budget
    tokens, labels = stream(clip)
    wide, whole, broken = learner(clip, drift_budget=WIDE), *(learner(clip, drift_budget=1e-9) for _ in range(2))
    wide.update(task_of(1, tokens, labels), silent)
    whole.load_state(wide.state())
    whole.update(task_of(2, tokens[:3], labels[:3]), silent)
    assert not whole._adapted
    # when another learner goes on from there under the budget they were made under
    broken.load_state(whole.state())
    assert_same(broken.state(), whole.state())
    for method in (whole, broken):
        method._budget = WIDE
        assert method.update(task_of(3, tokens, labels), silent).epochs_run == 1
    # then both have trained the same adapters
    assert_same(broken.state(), whole.state())


def test_a_learner_that_has_adapted_goes_on_from_its_state_bit_for_bit(clip, eager):
    # given one that goes on, and one that begins anew before each task
    tokens, labels = stream(clip, per_class=30)
    whole, broken = learner(clip, drift_budget=WIDE), learner(clip, drift_budget=WIDE)
    for number, part in enumerate((labels == 0, labels < 2, labels == 2, labels > 1, labels < 4), 1):
        task = task_of(number, tokens[part], labels[part])
        again = learner(clip, drift_budget=WIDE)
        if number > 1:
            again.load_state(broken.state())
        broken = again
        for method in (whole, broken):
            method.update(task, silent)
        assert_same(broken.state(), whole.state())
    assert whole._adapted
    kept = broken.state().tensors["untouched_names"]
    assert torch.equal(kept, whole._clip_names()) and not torch.equal(kept, whole._class_names())


def test_a_state_without_adapters_takes_away_those_of_the_learner_that_loads_it(clip, eager):
    tokens, labels = stream(clip)
    still, moved, fresh = learner(clip), *(learner(clip, drift_budget=WIDE) for _ in range(2))
    still.update(task_of(1, tokens, labels), silent)
    moved.update(task_of(1, tokens, labels), silent)
    assert moved._adapted
    for method in (moved, fresh):
        method.load_state(still.state())
        method.update(task_of(2, tokens, labels), silent)
    assert_same(moved.state(), fresh.state())


def test_without_a_budget_a_task_of_one_name_takes_the_adapters_away_too(clip, eager):
    # given adapters, and a task whose gap has no drift, as there is no other name
    tokens, labels = stream(clip)
    wide, method = learner(clip, drift_budget=WIDE), learner(clip)
    wide.update(task_of(1, tokens, labels), silent)
    method.load_state(wide.state())
    update = method.update(task_of(2, tokens[labels == 0], labels[labels == 0]), silent)
    assert update.drift_after is None and update.gap_before != update.gap_after == update.gap_untouched
    assert torch.equal(method.encode_names(NAMES), clip.encode_names(NAMES))


def test_the_phases_of_an_update_are_told_in_their_order(clip, eager):
    tokens, labels = stream(clip)
    for budget in (0, WIDE):
        heard: list[Progress] = []
        learner(clip, drift_budget=budget).update(task_of(1, tokens, labels), heard.append)
        assert [phase for phase, _ in groupby(progress.phase for progress in heard)] == ["train", "compensate"]
