"""gapstream's own method against direct computation: statistics, discriminant, leaving one out, what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from agent.config import Method
from agent.methods.base import TaskData
from agent.methods.gapstream import Gapstream, RandomFeatures, leave_one_out
from agent.model.clip import Clip
from tests.tiny import PlainTokens, silent, tiny_clip, tiny_task

NAMES = ("red", "green", "blue", "black")


@pytest.fixture(scope="module")
def clip() -> Clip:
    return tiny_clip()


def learner(clip: Clip, **settings) -> Gapstream:
    return Gapstream(clip, Method.model_validate({"gapstream": {"features": 40, "prior_images": 7, **settings}}))


def stream(clip: Clip, per_class: int = 12) -> tuple[Tensor, Tensor]:
    """Tokens [N, tokens, width] and labels [N] of all of NAMES, mixed."""
    task = tiny_task(clip, 1, list(NAMES), per_class)
    order = torch.randperm(len(task), generator=torch.Generator().manual_seed(3))
    return task.tokens.tensor[order], task.labels[order]


def task_of(number: int, tokens: Tensor, labels: Tensor) -> TaskData:
    present = labels.unique()
    renamed = torch.searchsorted(present, labels)
    return TaskData(number, tuple(NAMES[i] for i in present.tolist()), renamed, PlainTokens(tokens))


def features(method: Gapstream, clip: Clip, tokens: Tensor) -> Tensor:
    return method._random(tokens, clip.encode_tokens(tokens)).double()


def reference(features: Tensor, labels: Tensor, prior: float, asked: Tensor, variance: Tensor | None = None) -> Tensor:
    """-1/2 squared Mahalanobis distance to every class mean, computed from all images at once: [n, C]."""
    means = torch.stack([features[labels == c].mean(0) for c in range(len(NAMES))])
    residual = features - means[labels]
    variance = (features - features.mean(0)).square().mean() if variance is None else variance
    covariance = (residual.T @ residual + prior * variance * torch.eye(features.shape[1])) / (len(features) + prior)
    away = asked[:, None] - means
    return -torch.einsum("ncm,ncm->nc", away @ torch.linalg.inv(covariance), away) / 2


def test_the_prediction_is_the_discriminant_of_all_images_beside_the_texts(clip):
    tokens, labels = stream(clip)
    method = learner(clip)
    method.update(task_of(1, tokens, labels), silent)
    known, embedding = features(method, clip, tokens), clip.encode_tokens(tokens).double()
    text = clip.logit_scale * embedding @ clip.encode_names(NAMES).double().T
    fused = method._temperature * reference(known, labels, 7, known) + method._text_weight * text
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
    for name in ("counts", "means", "scatter"):
        assert torch.allclose(cut.state().tensors[name], whole.state().tensors[name], rtol=1e-3, atol=1e-4), name


def test_leaving_one_out_is_what_learning_all_others_would_have_said(clip):
    tokens, labels = stream(clip, per_class=5)
    method = learner(clip)
    method.update(task_of(1, tokens, labels), silent)
    solved, known = method._solve(), features(method, clip, tokens)
    got = leave_one_out(solved, known.float(), labels, method._counts).double()
    variance = (known - known.mean(0)).square().mean()
    for i in range(len(labels)):
        others = torch.arange(len(labels)) != i
        want = reference(known[others], labels[others], 7, known[i : i + 1], variance)[0]
        want = want * (len(labels) + 7) / (len(labels) - 1 + 7)  # the count of images is the whole's
        assert torch.allclose(got[i] - got[i].mean(), want - want.mean(), rtol=1e-2, atol=1e-2)


def test_what_images_cannot_tell_apart_is_left_to_the_texts(clip):
    def temperature(tokens: Tensor, labels: Tensor) -> float:
        method = learner(clip)
        method.update(task_of(1, tokens, labels), silent)
        return method._temperature

    tokens, labels = stream(clip, per_class=30)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert temperature(tokens, labels) > 20 * temperature(tokens, shuffled)


def test_one_image_of_a_class_is_learned_where_nothing_can_be_left_out(clip):
    tokens, labels = stream(clip, per_class=1)
    method = learner(clip)
    before = method._temperature, method._text_weight
    method.update(task_of(1, tokens, labels), silent)
    assert (method._temperature, method._text_weight) == before
    assert method.inference_module().from_tokens(tokens)[2].isfinite().all()


def test_the_state_of_a_thousand_classes_stays_below_100_mb(clip):
    method = Gapstream(clip, Method())
    method.update(tiny_task(clip, 1, ["red", "green"], per_class=2), silent)
    state = method.state().tensors
    per_class = sum(tensor[0].nbytes for name, tensor in state.items() if name in ("counts", "means", "names"))
    assert sum(tensor.nbytes for tensor in state.values()) + 998 * per_class < 100e6


def test_random_features_are_those_of_every_token_alone_and_of_the_embedding(clip):
    random = RandomFeatures(clip, 10, torch.Generator().manual_seed(0))
    tokens, embedding = torch.randn(2, 5, 64), F.normalize(torch.randn(2, clip.embed_dim), dim=-1)
    got = random(tokens, embedding)
    first = [F.relu(F.normalize(token, dim=-1) @ random.tokens) for token in tokens[0]]
    assert torch.allclose(got[0, :6], torch.stack(first).mean(0), atol=1e-6)
    assert torch.allclose(got[:, 6:], F.relu(embedding @ random.embedding), atol=1e-6)
