"""SECA: its equations at the points where they are known, and what its pool, prompts and prototypes do over tasks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from agent.config import Method
from agent.methods.base import LearnerState, task_generator
from agent.methods.seca import Seca
from agent.methods.seca_modules import (
    BesideTower,
    PromptedText,
    PromptsAndPrototypes,
    PublishedPrediction,
    Refinement,
    Relevance,
)
from agent.methods.training import divergence
from agent.model.clip import Clip, ModelError
from exporter.onnx import OnnxExporter
from exporter.preprocess import Preprocess
from exporter.trace_cache import user_cache
from tests.tiny import silent, tiny_clip, tiny_model, tiny_task, tiny_timm_clip

QUICK = {"lr": 5e-3, "prompt_lr": 5e-3, "batch_size": 8, "epochs": 2}


@pytest.fixture(scope="module")
def clip() -> Clip:
    return tiny_clip()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def learner(clip: Clip, **settings) -> Seca:
    return Seca(clip, Method.model_validate({"seca": {**QUICK, **settings}}))


def learned(clip: Clip, tasks: int = 3, **settings) -> Seca:
    method = learner(clip, **settings)
    for number in range(1, tasks + 1):
        method.update(tiny_task(clip, number, [f"thing {2 * number}", f"thing {2 * number + 1}"]), silent)
    return method


def random_like(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.randn(tensor.shape, generator=generator()) for name, tensor in tensors.items()}


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=generator()), dim=-1)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_relevance_weights_sum_to_one_and_follow_the_equation(form):
    relevance = Relevance(4, 6, generator(), form)
    texts, pool = unit(4, 2, 4), unit(4, 3, 6).flip(0)
    aggregate, weights = relevance(texts, pool)
    assert weights.shape == (4, 3) and torch.allclose(weights.sum(-1), torch.ones(4))
    # alpha of image x, prompt i and member p, written out
    asked, values = F.layer_norm(texts, (4,)) @ relevance.text.T, F.layer_norm(pool, (6,))
    offered = values @ relevance.image.T
    alpha = torch.stack([(asked[:, i, None] * offered).sum(-1) for i in range(2)], dim=1) / 6**0.5
    expected = alpha.softmax(-1).mean(1) if form == "code" else alpha.mean(1).softmax(-1)
    assert torch.allclose(weights, expected, atol=1e-6)
    # the aggregate is of the normed features, and normed again
    assert torch.allclose(aggregate, F.layer_norm((expected[:, :, None] * values).sum(1), (6,)), atol=1e-6)


@torch.no_grad()
def test_the_aggregate_of_a_pool_of_one_is_its_members_own_answer(clip):
    """The tower's last norm takes away what the two of the relevance net did, while these are untrained."""
    tokens = clip.prefix(torch.randn(5, 3, 32, 32, generator=generator()))
    pool = F.normalize(clip.image.pooled(tokens), dim=-1)[:, None]
    relevance = Relevance(clip.embed_dim, clip.image.width, generator(), "code")
    aggregate, weights = relevance(unit(5, 3, clip.embed_dim), pool)
    assert torch.equal(weights, torch.ones(5, 1))
    answer = F.normalize(clip.image.project(aggregate), dim=-1)
    assert torch.allclose(answer, clip.encode_tokens(tokens), atol=1e-3)


def test_prototypes_are_their_own_class_when_names_are_far_and_the_common_mean_when_all_are_near():
    refinement = Refinement(6, generator())
    words, means = unit(4, 6), unit(4, 6).roll(1, 0)
    own = F.layer_norm(means, (6,))
    # gamma -> 0: identity affinity
    refinement.gamma = 1e-6
    assert torch.allclose(refinement.affinity(words), torch.eye(4), atol=1e-6)
    assert torch.allclose(refinement(words, means), F.normalize(F.layer_norm(own, (6,)), dim=-1), atol=1e-5)
    # gamma -> infinity: the mean prototype for every class
    refinement.gamma = 1e9
    assert torch.allclose(refinement.affinity(words), torch.full((4, 4), 0.25), atol=1e-6)
    common = F.normalize(F.layer_norm(own.mean(0), (6,)), dim=-1)
    assert torch.allclose(refinement(words, means), common.expand(4, -1), atol=1e-5)


def test_affinity_is_the_gaussian_kernel_of_the_equation():
    refinement = Refinement(6, generator())
    words = unit(4, 6)
    at = F.layer_norm(words, (6,)) @ refinement.text.T
    kernel = torch.exp(-torch.cdist(at, at).square() / refinement.gamma)
    assert torch.allclose(refinement.affinity(words), kernel / kernel.sum(-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("make", [tiny_clip, tiny_timm_clip])
def test_new_bottlenecks_change_nothing_and_trained_ones_change_neither_the_original_nor_each_other(make):
    clip = make()
    size = clip.preprocess.size
    tokens = clip.prefix(torch.randn(3, 3, size, size))
    tower = BesideTower(clip.image, 0.1)
    fresh = tower.new(4, generator())
    original = clip.image(tokens)
    assert torch.equal(tower(tokens, fresh), original)
    moved = random_like(fresh)
    assert (tower(tokens, moved) - original).abs().max() > 1e-2
    assert torch.equal(clip.image(tokens), original) and torch.equal(tower(tokens, fresh), original)
    assert torch.allclose(tower.merged(moved)(tokens), tower(tokens, moved), atol=1e-6)


@torch.no_grad()
def test_a_bottleneck_reads_the_residual_stream_before_the_blocks_second_norm(clip):
    tower = BesideTower(clip.image, 0.1)
    adapter = random_like(tower.new(4, generator()))
    path = "visual.transformer.resblocks.1"
    block, adapted = clip.image.get_submodule(path), tower.merged(adapter).get_submodule(path)
    down, up = adapter[f"{path}.mlp.down"], adapter[f"{path}.mlp.up"]
    x = 30 * torch.randn(2, 5, 64, generator=generator()) + 7  # far from what a norm would make of it
    # the block, written out
    normed = block.ln_1(x)
    x_ = x + block.attn(normed, normed, normed, need_weights=False)[0]
    expected = x_ + block.mlp(block.ln_2(x_)) + 0.1 * (x_ @ down.T).clamp_min(0) @ up.T
    torch.testing.assert_close(adapted(x), expected, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_a_bottleneck_reads_the_residual_stream_in_a_tower_of_timm_too():
    clip = tiny_timm_clip()
    tower = BesideTower(clip.image, 0.1)
    adapter = random_like(tower.new(4, generator()))
    path = "visual.trunk.blocks.1"
    block, adapted = clip.image.get_submodule(path), tower.merged(adapter).get_submodule(path)
    down, up = adapter[f"{path}.mlp.down"], adapter[f"{path}.mlp.up"]
    x = 30 * torch.randn(2, 5, 64, generator=generator()) + 7
    x_ = x + block.attn(block.norm1(x))
    expected = x_ + block.mlp(block.norm2(x_)) + 0.1 * (x_ @ down.T).clamp_min(0) @ up.T
    torch.testing.assert_close(adapted(x), expected, rtol=1e-4, atol=1e-3)


def test_a_tower_whose_blocks_have_no_norm_before_the_mlp_is_refused():
    model = tiny_model()
    for block in model.visual.transformer.resblocks:
        block.before_mlp = block.ln_2
        del block.ln_2
    with pytest.raises(ModelError, match=r"ln_2 or norm2.*resblocks\.0 is a ResidualAttentionBlock without"):
        BesideTower(model.visual, 0.1)


def test_dropout_acts_only_where_it_is_asked_for_and_repeats_with_its_generator(clip):
    tower = BesideTower(clip.image, 0.1)
    adapter = random_like(tower.new(4, generator()))
    tokens = clip.prefix(torch.randn(3, 3, 32, 32))
    one, again = (tower(tokens, adapter, 0.5, generator()) for _ in range(2))
    assert torch.equal(one, again) and not torch.equal(one, tower(tokens, adapter))


def test_context_takes_the_place_of_the_words_before_the_name(clip):
    text = PromptedText(clip, 3)
    ids = text.tokenize(["red", "green tea"])
    assert torch.equal(ids[:, 0], clip.tokenize(["red"])[:1, 0].expand(2))
    # given as context the embeddings of real words, it reads as the sentence with those words
    sentence = clip.tokenize(["red", "green tea"], "good dark photo {}")
    words = clip.text.token_embedding(sentence[0, 1:4])
    assert torch.equal(ids[:, 4:], sentence[:, 4:])
    expected = F.normalize(clip.text(sentence), dim=-1)
    assert torch.allclose(text.encode(ids, words), expected, atol=1e-6)


def test_the_first_task_distils_nothing_and_later_ones_by_their_number(clip, monkeypatch):
    calls: list[float] = []

    def watched(teacher, student, temperature):
        calls.append(temperature)
        return divergence(teacher, student, temperature)

    monkeypatch.setattr("agent.methods.seca.divergence", watched)
    method = learner(clip)
    method.update(tiny_task(clip, 1, ["red", "green"]), silent)
    assert not calls and method.state().values["learned"] == 1
    method.update(tiny_task(clip, 2, ["blue", "black"]), silent)
    assert len(calls) == 6, "two epochs of three steps"


def test_the_distillation_is_that_of_the_equations_over_features_before_the_last_norm(clip):
    # given a third task and what training brings to its loss
    method = learned(clip, tasks=2)
    task = tiny_task(clip, 3, ["red", "green"])
    method._means.add(task, clip.encode_tokens(task.tokens.tensor))
    lesson = method._lesson(task, torch.tensor([4, 5]))
    at, names = torch.tensor([1, 14, 20]), unit(2, clip.embed_dim)
    images = unit(3, clip.embed_dim)
    loss, _ = method._distil(lesson, at, images, names)

    # then it is this: V are the pool's class tokens, S the names under earlier prompts and the one that is trained
    y, tokens, visual, net = task.labels[at], task.tokens.batch(at), clip.image.visual, method._relevance
    towers = [method._image.merged(adapter).visual.transformer for adapter in method._pool]
    V = F.normalize(torch.stack([tower(tokens)[:, 0] for tower in towers], dim=1), dim=-1)
    ids = method._text.tokenize(task.classes)
    S = torch.stack([*(method._text.encode(ids, prompt) for prompt in method._prompts), names], dim=1)[y]
    values = net.norm_image(V)
    alpha = (net.norm_text(S) @ net.text.T) @ (values @ net.image.T).mT / 64**0.5
    aggregate = net.norm_out((alpha.softmax(-1).mean(1)[..., None] * values).sum(1))
    aggregate = F.normalize(visual.ln_post(aggregate) @ visual.proj, dim=-1)
    teacher, student = ((20 * rows @ names.T).softmax(-1) for rows in (aggregate, images))
    expected = F.cross_entropy(clip.logit_scale * aggregate @ names.T, y)
    expected = expected + 2 * (teacher * (teacher / student).log()).sum(-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_prototypes_are_refined_by_names_under_the_newest_prompt_or_in_the_paper_by_untouched_ones(clip, form):
    method = learned(clip, tasks=2, form=form)
    tensors, net = method.state().tensors, method._refinement
    ids = method._text.tokenize(method.classes)
    names = method._text.encode(ids, tensors["prompts.1"]) if form == "code" else clip.encode_names(method.classes)
    at = net.norm_text(names) @ net.text.T
    affinity = torch.exp(-torch.cdist(at, at).square() / (2 * clip.embed_dim**0.5))
    rows = net.norm_out(affinity / affinity.sum(-1, keepdim=True) @ net.norm_mean(tensors["means"]))
    assert torch.allclose(tensors["prototypes"][2:], F.normalize(rows, dim=-1)[2:], atol=1e-5)


@pytest.mark.parametrize(("form", "reached"), [("code", True), ("paper", False)])
def test_in_the_codes_form_the_prototypes_loss_reaches_the_prompt(clip, form, reached):
    method = learned(clip, tasks=1, form=form)
    task = tiny_task(clip, 2, ["red", "green"])
    images = clip.encode_tokens(task.tokens.tensor)
    method._means.add(task, images)
    lesson = method._lesson(task, torch.tensor([2, 3]))
    prompt = (0.02 * torch.randn(8, 32, generator=generator())).requires_grad_()
    texts = method._text.encode(lesson.ids, prompt)
    words = texts if lesson.words is None else lesson.words
    method._classify_by_prototypes(lesson, torch.arange(len(task)), images, words).backward()
    assert (prompt.grad is not None and prompt.grad.abs().max() > 0) == reached


def test_pool_and_prompts_stay_within_their_bounds(clip):
    method = learned(clip, tasks=4, pool=2, prompts=3)
    assert method.state().values["pool"] == 2 and method.state().values["prompts"] == 3
    assert method.inference_module().names.shape == (8, 3, clip.embed_dim)


@pytest.mark.parametrize(("form", "stays"), [("code", [2.0, 3.0]), ("paper", [1.0, 3.0])])
def test_a_full_pool_drops_its_least_used_member_or_in_the_papers_words_its_most_used(clip, form, stays):
    method = learner(clip, form=form, pool=2)
    for mark, use in ((1.0, []), (2.0, [1.0]), (3.0, [0.2, 0.8])):
        for tensor in method._adapter.named.values():
            tensor.detach().fill_(mark)
        method._join_pool(torch.tensor(use))
    marks = [next(iter(adapter.values())).flatten()[0].item() for adapter in method._pool]
    assert marks == stays


def test_pool_members_do_not_move_with_the_adapter(clip):
    method = learned(clip, tasks=1)
    member = {name: tensor.clone() for name, tensor in method._pool[0].items()}
    method.update(tiny_task(clip, 2, ["blue", "black"]), silent)
    assert all(torch.equal(tensor, method._pool[0][name]) for name, tensor in member.items())
    assert any(not torch.equal(tensor, method._adapter.named[name]) for name, tensor in member.items())


def test_prototypes_of_earlier_classes_stay_as_they_were_stored(clip):
    method = learned(clip, tasks=1)
    before = method.state().tensors["prototypes"]
    method.update(tiny_task(clip, 2, ["blue", "thing 2"], seed=4), silent)
    after = method.state().tensors["prototypes"]
    assert torch.equal(after[1], before[1]), "thing 3 did not come back"
    assert not torch.equal(after[0], before[0]), "thing 2 did"


def test_class_means_are_those_of_the_untouched_model_whatever_was_learned(clip):
    method = learned(clip, tasks=2)
    task = tiny_task(clip, 2, ["thing 4", "thing 5"])
    features = clip.encode_tokens(task.tokens.batch(torch.arange(len(task))))
    expected = torch.stack([features[task.labels == k].mean(0) for k in range(2)])
    assert torch.allclose(method.state().tensors["means"][2:], expected, atol=1e-6)


def test_a_prediction_is_the_mean_of_the_prompts_and_the_prototypes_answers(clip):
    method = learned(clip, tasks=2)
    task = tiny_task(clip, 1, ["thing 2"])
    with torch.no_grad():
        embedding, _, probabilities = method.inference_module().from_tokens(task.tokens.batch(torch.arange(3)))
        names = method._under_prompts(method.classes)
        soft = 20
        text = torch.stack([(soft * embedding @ names[:, p].T).softmax(-1) for p in range(2)]).mean(0)
        visual = (soft * embedding @ method.state().tensors["prototypes"].T).softmax(-1)
    assert torch.allclose(probabilities, (text + visual) / 2, atol=1e-6)


def published(names: torch.Tensor, prototypes: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The published prediction of a batch: names [C, prompts, D], prototypes [C, D], images [B, D] -> [B, C]."""
    text = 20 * torch.einsum("cpd,bd->bpc", names, images)
    visual = 20 * images @ prototypes.T
    return ((text - text.max()).exp().mean(1) + (visual - visual.max()).exp()) / 2


@torch.no_grad()
def test_the_faithful_prediction_is_the_published_one_where_the_peaks_are_those_of_the_batch():
    names, prototypes, images = unit(5, 3, 6), unit(5, 6).roll(2, 0), unit(40, 6).roll(1, 1)
    peaks = torch.stack([(names @ images.T).max(), (prototypes @ images.T).max()])
    expected = published(names, prototypes, images)
    padded, weights = F.pad(names, (0, 0, 0, 2)), torch.tensor([1 / 3, 1 / 3, 1 / 3, 0, 0])
    classes = tuple("abcde")
    module = PublishedPrediction(torch.nn.Identity(), classes, padded, weights, prototypes, 20.0, peaks)
    assert torch.allclose(module.score(images), expected / expected.sum(-1, keepdim=True), atol=1e-5)
    # a softmax per image and answer decides otherwise
    per_image = PromptsAndPrototypes(torch.nn.Identity(), classes, padded, weights, prototypes, 20.0)
    assert not torch.equal(per_image.score(images).argmax(1), expected.argmax(1))
    # without prototypes the names answer alone
    alone = PublishedPrediction(torch.nn.Identity(), classes, padded, weights, None, 20.0, peaks)
    text = (20 * torch.einsum("cpd,bd->bpc", names, images)).exp().mean(1)
    assert torch.allclose(alone.score(images), text / text.sum(-1, keepdim=True), atol=1e-5)


def test_the_release_of_the_faithful_prediction_answers_as_it_does(clip, tmp_path):
    module = learned(clip, tasks=2, fusion="faithful").inference_module()
    images = torch.randn(4, 3, 32, 32, generator=generator()).numpy()
    preprocess = Preprocess(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    release = OnnxExporter(max_batch=4, traces=user_cache()).release(
        module, preprocess, {"method": "seca"}, tmp_path / "release", images
    )
    assert release.parity.top1 == 1


def test_the_peaks_are_the_highest_cosines_of_a_batch_averaged_over_tasks(clip):
    method = learned(clip, tasks=1, fusion="faithful")
    before = method.state().tensors["peaks"]
    task = tiny_task(clip, 2, ["red", "green", "blue"])
    method.update(task, silent)
    images, tensors = method.encode_tokens(task.tokens.tensor), method.state().tensors
    now = [(method._under_prompts(method.classes) @ images.T).max(), (tensors["prototypes"] @ images.T).max()]
    # three of the five classes are of this task
    assert torch.allclose(tensors["peaks"], 0.4 * before + 0.6 * torch.stack(now), atol=1e-6)
    assert isinstance(method.inference_module(), PublishedPrediction) and method.fusion == "text+prototypes, faithful"


def test_a_state_of_the_version_whose_bottlenecks_read_after_the_norm_is_refused(clip):
    state = learned(clip, tasks=1).state()
    older = LearnerState(state.tensors, {key: value for key, value in state.values.items() if key != "format"})
    fresh = learner(clip)
    before = fresh.state()
    with pytest.raises(ValueError, match=r"format 1, but this version reads 2: .*after its second norm"):
        fresh.load_state(older)
    assert fresh.state().values == before.values
    assert all(torch.equal(tensor, before.tensors[name]) for name, tensor in fresh.state().tensors.items())


def test_each_part_can_be_switched_off(clip):
    whole = learned(clip)
    without_pool, without_prototypes = learned(clip, sg_akt=False), learned(clip, se_vpr=False)
    assert without_pool.state().values["pool"] == 0
    assert (whole.fusion, without_pool.fusion, without_prototypes.fusion) == ("text+prototypes",) * 2 + ("text",)
    assert without_prototypes.inference_module().class_tensors == ("names",)
    adapters = [torch.cat([t.flatten() for t in m._adapter.named.values()]) for m in (whole, without_pool)]
    assert not torch.equal(*adapters)


def test_a_task_of_one_class_adds_its_prototype_but_no_prompt(clip):
    method = learner(clip)
    method.update(tiny_task(clip, 1, ["red"]), silent)
    facts = method.state().values
    assert (facts["prompts"], facts["pool"], facts["learned"]) == (0, 0, 0)
    assert torch.equal(method.encode_names(["red"]), clip.encode_names(["red"]))
    assert method.state().tensors["prototypes"].shape == (1, clip.embed_dim)


def test_prompts_begin_from_the_seed_and_the_tasks_number(clip):
    method = learner(clip, prompt_lr=1e-12)
    method.update(tiny_task(clip, 4, ["red", "green"]), silent)
    begin = 0.02 * torch.randn(8, 32, generator=task_generator(0, 4, "context"))
    assert torch.allclose(method.state().tensors["prompts.0"], begin, atol=1e-6)
