"""What every method promises; a method gets these tests by being listed in METHODS."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agent import config, methods
from agent.methods.base import LearnerState, Method, TaskData
from agent.model.clip import Clip, load_clip
from agent.model.images import load_tokens
from agent.values import Progress, Update
from exporter.decoders import Decoders
from exporter.onnx import OnnxExporter
from exporter.preprocess import Preprocess
from exporter.tensors import Unchanged
from exporter.text import name_encoder
from exporter.text_export import TextToRelease
from exporter.trace_cache import user_cache
from streams.archive_folder import ArchiveFolder
from tests.tiny import silent, tiny_clip, tiny_task, tiny_timm_clip

UNTRAINED = ("ncm", "ranpac", "zeroshot")
"""Methods that change no weight of either tower."""
QUICK = {
    **{"lr": 5e-3, "prompt_lr": 5e-3, "batch_size": 8, "visual_batch_size": 8, "drift_budget": 1e9},
    **{"features": 64, "prior_images": 10},
}
"""Where a method has such a knob: enough steps for a few small images, and nothing that ends them."""


@pytest.fixture(scope="module")
def clip() -> Clip:
    return tiny_clip()


@pytest.fixture(autouse=True)
def small_tasks_adapt(monkeypatch: pytest.MonkeyPatch) -> None:
    """gapstream trains adapters on fewer images than it would, and keeps them whatever so few say."""
    monkeypatch.setattr("agent.methods.gapstream.LEAST_HELD", 2)
    monkeypatch.setattr("agent.methods.gapstream.stay", lambda gain, error: True)


@pytest.fixture(scope="module")
def timm_clip() -> Clip:
    return tiny_timm_clip()


@pytest.fixture(params=sorted(methods.METHODS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def built(clip: Clip, name: str, seed: int = 0, **settings: Any) -> Method:
    chosen: dict[str, Any] = {"name": name, "seed": seed}
    if name in config.Method.model_fields:
        known = type(config.Method.model_fields[name].default).model_fields
        chosen[name] = {key: value for key, value in {**QUICK, **settings}.items() if key in known}
    return methods.build(clip, config.Method.model_validate(chosen))


def saved_and_loaded(state: LearnerState, folder: Any) -> LearnerState:
    save_file(dict(state.tensors), folder / "state.safetensors")
    return LearnerState(load_file(folder / "state.safetensors"), json.loads(json.dumps(dict(state.values))))


Alike = Callable[[Tensor, Tensor], bool]
"""Whether two tensors on the CPU are the same result."""


@pytest.fixture
def alike() -> Alike:
    """On a CPU the same bits; a GPU sums in no fixed order."""
    return torch.equal


def assert_same_state(a: LearnerState, b: LearnerState, alike: Alike = torch.equal) -> None:
    assert a.values == b.values
    assert a.tensors.keys() == b.tensors.keys()
    for key, tensor in a.tensors.items():
        assert alike(tensor.cpu(), b.tensors[key].cpu()), key


@torch.no_grad()
def answers(method: Method, task: TaskData) -> tuple[Tensor, Tensor, Tensor]:
    """Embedding, logits and probabilities on the CPU, in float32 whatever the tokens are in, as the evaluator asks."""
    embedding, logits, probabilities = method.inference_module().from_tokens(
        task.tokens.batch(torch.arange(len(task))).float()
    )
    return embedding.cpu(), logits.cpu(), probabilities.cpu()


def accuracy(method: Method, task: TaskData) -> float:
    index = torch.tensor([method.classes.index(name) for name in task.classes])
    return (answers(method, task)[2].argmax(1) == index[task.labels]).float().mean().item()


def test_it_learns_two_tasks_and_answers_for_all_their_classes(clip, name):
    method = built(clip, name)
    with pytest.raises(LookupError):
        method.inference_module()
    tasks = [tiny_task(clip, 1, ["red", "green", "blue"]), tiny_task(clip, 2, ["black", "white"])]
    for task in tasks:
        method.update(task, silent)
    assert method.classes == ("red", "green", "blue", "black", "white")
    module = method.inference_module()
    assert module.classes == method.classes and not module.training and method.fusion
    embedding, logits, probabilities = answers(method, tasks[0])
    assert embedding.shape == (36, clip.embed_dim) and logits.shape == probabilities.shape == (36, 5)
    assert embedding.dtype == logits.dtype == probabilities.dtype == torch.float32
    assert torch.allclose(embedding.norm(dim=-1), torch.ones(36), atol=1e-5)
    assert torch.allclose(probabilities.sum(-1), torch.ones(36), atol=1e-5)
    for name_ in module.class_tensors:
        assert len(getattr(module, name_)) == 5


def test_learning_helps_on_the_task_just_learned(clip, name):
    task = tiny_task(clip, 1, ["red", "green", "blue"])
    untouched = methods.build(clip, config.Method(name="zeroshot"))
    untouched.update(task, silent)
    method = built(clip, name, epochs=8)
    method.update(task, silent)
    if name == "zeroshot":
        assert accuracy(method, task) == accuracy(untouched, task)
    else:
        assert accuracy(method, task) > max(0.8, accuracy(untouched, task))


def test_an_update_says_what_it_did_and_how_far_the_gap_moved(clip, name):
    heard: list[Progress] = []
    task = tiny_task(clip, 3, ["red", "green"])
    update = built(clip, name).update(task, heard.append)
    assert isinstance(update, Update)
    assert update.samples == len(task) and update.epochs <= update.epochs_run and "train" in update.seconds
    assert asdict(update.gap_before) == pytest.approx(asdict(update.gap_untouched), abs=1e-6)
    assert update.drift_before == pytest.approx(0, abs=1e-5)
    assert (update.drift_after == 0) == (name in UNTRAINED)
    assert (update.loss is None) == (name in UNTRAINED)
    json.dumps(update.details, allow_nan=False)
    assert heard and {progress.task for progress in heard} == {3}
    assert all(progress.step <= progress.steps for progress in heard)


def test_it_touches_neither_the_task_nor_the_model_it_starts_from(clip, name):
    task = tiny_task(clip, 1, ["red", "green"])
    labels, tokens = task.labels.clone(), task.tokens.tensor.clone()
    towers = copy.deepcopy([clip.image.state_dict(), clip.text.state_dict()])
    random = torch.random.get_rng_state()
    built(clip, name).update(task, silent)
    assert torch.equal(task.labels, labels) and torch.equal(task.tokens.tensor, tokens)
    for before, now in zip(towers, [clip.image.state_dict(), clip.text.state_dict()], strict=True):
        assert before.keys() == now.keys()
        assert all(torch.equal(before[key], now[key]) for key in before)
    assert torch.equal(torch.random.get_rng_state(), random)


def test_the_same_seed_gives_the_same_model_and_another_seed_another(clip, name):
    tasks = [tiny_task(clip, 1, ["red", "green"]), tiny_task(clip, 2, ["blue", "black"])]
    states = []
    for seed in (7, 7, 8):
        torch.rand(3)  # whatever else draws random numbers does not matter
        method = built(clip, name, seed)
        for task in tasks:
            method.update(task, silent)
        states.append(method.state())
    assert_same_state(states[0], states[1])
    if name not in UNTRAINED:
        assert any(not torch.equal(t, states[2].tensors[k]) for k, t in states[0].tensors.items())


def test_resuming_from_its_state_ends_with_the_same_model_as_no_interruption(clip, name, tmp_path, alike):
    tasks = [
        tiny_task(clip, 1, ["red", "green"]),
        tiny_task(clip, 2, ["blue", "black"]),
        tiny_task(clip, 3, ["white", "red", "pink"], seed=1),
    ]
    # given one that learns all tasks, and one that is built anew from its state after each
    whole, broken = built(clip, name), built(clip, name)
    for task in tasks:
        whole.update(task, silent)
        state = saved_and_loaded(broken.state(), tmp_path)
        broken = built(clip, name)
        broken.load_state(state)
        assert_same_state(broken.state(), state)
        broken.update(task, silent)
    # then both are the same in what they keep and what they answer
    assert_same_state(whole.state(), broken.state(), alike)
    for a, b in zip(answers(whole, tasks[0]), answers(broken, tasks[0]), strict=True):
        assert alike(a, b)


def test_a_state_is_a_copy(clip, name):
    method = built(clip, name)
    method.update(tiny_task(clip, 1, ["red", "green"]), silent)
    state = method.state()
    kept = copy.deepcopy(state)
    method.update(tiny_task(clip, 2, ["red", "blue"], seed=1), silent)
    assert_same_state(state, kept)


def test_a_module_handed_out_does_not_change_when_learning_goes_on(clip, name):
    first = tiny_task(clip, 1, ["red", "green"])
    method = built(clip, name)
    method.update(first, silent)
    module, tokens = method.inference_module(), first.tokens.batch(torch.arange(4))
    text = method.text_module()
    ids = text.tokenize(["red", "green"])
    before = [output.clone() for output in (*module.from_tokens(tokens), text(ids))]
    method.update(tiny_task(clip, 2, ["blue", "red"], seed=1), silent)
    for a, b in zip(before, (*module.from_tokens(tokens), text(ids)), strict=True):
        assert torch.equal(a, b)


def test_the_answer_for_one_image_does_not_depend_on_the_others_in_its_batch(clip, name):
    task = tiny_task(clip, 1, ["red", "green", "blue"])
    method = built(clip, name)
    method.update(task, silent)
    module = method.inference_module()
    with torch.no_grad():
        alone = module.from_tokens(task.tokens.batch(torch.tensor([5])))
        extreme = torch.cat([task.tokens.batch(torch.tensor([5])), 50 * task.tokens.batch(torch.arange(8))])
        among = module.from_tokens(extreme)
    for a, b in zip(alone, among, strict=True):
        assert torch.allclose(a[0], b[0], atol=1e-5)


def test_the_module_answers_the_same_for_images_and_for_their_tokens(clip, name):
    method = built(clip, name)
    method.update(tiny_task(clip, 1, ["red", "green"]), silent)
    module, images = method.inference_module(), torch.randn(3, 3, 32, 32).to(clip.device)
    with torch.no_grad():
        for a, b in zip(module(images), module.from_tokens(clip.prefix(images)), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_parts_of_an_image_whose_tensors_have_not_changed_need_not_be_encoded_again(clip, name):
    # given the parts that a module made of images
    first = tiny_task(clip, 1, ["red", "green"])
    method, tokens = built(clip, name), first.tokens.batch(torch.arange(6))
    method.update(first, silent)
    module = method.inference_module()
    made = {part: module.encode(tokens, [part])[part] for part in module.parts}
    same = {part: Unchanged() for part in module.parts}
    assert not any(same[part](module.encoder(part)) for part in module.parts)
    assert all(torch.equal(a, b) for a, b in zip(module.answer(made), module.from_tokens(tokens), strict=True))

    # when a class comes
    method.update(tiny_task(clip, 2, ["blue"]), silent)
    module = method.inference_module()
    kept = [part for part in module.parts if same[part](module.encoder(part))]

    # then with those that are said to be the same the answers are, and with untouched towers they all are
    now = {**module.encode(tokens, module.parts), **{part: made[part] for part in kept}}
    assert all(torch.equal(a, b) for a, b in zip(module.answer(now), module.from_tokens(tokens), strict=True))
    assert len(kept) == len(module.parts) or name not in UNTRAINED


def test_what_it_encodes_with_is_normalised_and_for_any_name(clip, name):
    task = tiny_task(clip, 1, ["red", "green"])
    method = built(clip, name)
    for _ in range(2):  # before anything is learned, and after
        names = method.encode_names(["red", "never seen", "a name of many words that goes on and on and on and on"])
        images = method.encode_tokens(task.tokens.batch(torch.arange(5)))
        for features, count in ((names, 3), (images, 5)):
            assert features.shape == (count, clip.embed_dim) and not features.requires_grad
            assert torch.allclose(features.norm(dim=-1).cpu(), torch.ones(count), atol=1e-5)
        method.update(task, silent)


@pytest.mark.parametrize("per_class", [1, 6])
def test_a_task_of_one_class_or_of_one_sample_is_learned_like_any_other(clip, name, per_class):
    method = built(clip, name)
    update = method.update(tiny_task(clip, 1, ["red"], per_class), silent)
    assert method.classes == ("red",) and update.drift_after is None
    assert answers(method, tiny_task(clip, 1, ["red"]))[2].unique().tolist() == [1.0]
    later = tiny_task(clip, 2, ["green", "blue"], per_class)
    method.update(later, silent)
    method.update(tiny_task(clip, 3, ["black"], per_class), silent)
    assert method.classes == ("red", "green", "blue", "black")
    assert all(output.isfinite().all() for output in answers(method, later))


def test_a_class_that_comes_back_is_learned_again_under_its_one_name(clip, name):
    method = built(clip, name)
    method.update(tiny_task(clip, 1, ["red", "green"]), silent)
    before = answers(method, tiny_task(clip, 1, ["red"]))[2]
    back = tiny_task(clip, 2, ["blue", "red"], seed=3)
    method.update(back, silent)
    assert method.classes == ("red", "green", "blue")
    after = answers(method, tiny_task(clip, 1, ["red"]))[2]
    assert after.shape == (12, 3) and after.isfinite().all()
    if name != "zeroshot":
        assert not torch.allclose(after[:, :2], before)
        assert accuracy(method, back) > 0.5


def test_two_hundred_classes_in_one_task(clip, name):
    method = built(clip, name, batch_size=128, visual_batch_size=128)
    task = tiny_task(clip, 1, [f"thing {k}" for k in range(200)], per_class=1)
    method.update(task, silent)
    method.update(tiny_task(clip, 2, ["red", "green"]), silent)
    assert len(method.classes) == 202
    assert answers(method, task)[2].isfinite().all()


def test_what_it_keeps_depends_on_classes_and_tasks_not_on_samples(clip, name):
    def kept(per_class: int, tasks: int) -> int:
        method = built(clip, name, batch_size=64, prompts=2, pool=2, epochs=1)
        for number in range(1, tasks + 1):
            method.update(tiny_task(clip, number, ["red", "green"], per_class, seed=number), silent)
        state = method.state()
        facts = {key: value for key, value in state.values.items() if key != "counts"}
        return sum(tensor.numel() for tensor in state.tensors.values()) + len(json.dumps(facts))

    assert kept(2, 3) == kept(40, 3)
    # and once its pools are full, more tasks of the same classes add nothing
    assert abs(kept(2, 6) - kept(2, 3)) <= 2  # a counter may grow by a digit


def test_training_that_leaves_finite_numbers_restores_the_last_state_that_had_them(clip, name, monkeypatch):
    if name in UNTRAINED:
        return
    monkeypatch.setattr("agent.methods.gapstream.LEARNING_RATE", 1e20)
    method = built(clip, name, lr=1e20, prompt_lr=1e20)
    before = method.state()
    task = tiny_task(clip, 1, ["red", "green", "blue"])
    update = method.update(task, silent)
    assert update.rolled_back and update.epochs == 0
    after = method.state()
    counted = {"scatter", "fusion"}  # of the images, whatever becomes of the training
    for key in before.tensors.keys() & after.tensors.keys() - counted:
        if before.tensors[key].shape == after.tensors[key].shape:
            assert torch.equal(before.tensors[key], after.tensors[key]), key
    assert all(output.isfinite().all() for output in answers(method, task))


def test_it_learns_on_towers_of_timm_too(timm_clip, name):
    method = built(timm_clip, name)
    task = tiny_task(timm_clip, 1, ["red", "green"], per_class=3, size=160)
    method.update(task, silent)
    assert answers(method, task)[2].isfinite().all()


def test_its_release_answers_as_it_does_and_a_later_one_reuses_the_graph(clip, name, tmp_path):
    exporter = OnnxExporter(max_batch=4, traces=user_cache())
    preprocess = Preprocess(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    images = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    method = built(clip, name)
    for number, classes in enumerate((["red", "green"], ["blue", "red", "black"]), 1):
        method.update(tiny_task(clip, number, classes), silent)
        folder = tmp_path / str(number)
        text = TextToRelease(method.text_module(), lambda: clip.tokenizer)
        release = exporter.release(method.inference_module(), preprocess, {"method": name}, folder, images, text=text)
        assert release.classes == method.classes and release.parity.top1 == 1
        names = ["red", "never seen", "a name of many words that goes on and on and on and on"]
        encode = name_encoder(folder, release.text.prompt, release.text.clean, "cpu", 1)
        assert np.allclose(encode(names), method.encode_names(names).cpu().numpy(), atol=1e-5)
    assert release.seconds["trace"] < 0.1 and release.text.refused is None


def test_an_unknown_method_is_refused_with_the_known_ones(clip):
    with pytest.raises(KeyError, match=r"method.name is 'mgklip'; known methods: .*mgclip"):
        methods.build(clip, config.Method(name="mgklip"))


@pytest.fixture(scope="module")
def tinyclip() -> Clip:
    return load_clip(config.Model())


def photographs(clip: Clip, scratch: Path, number: int, classes: list[str], start: int, count: int) -> TaskData:
    archive = ArchiveFolder("bundled", "train")
    images = [image.read for name in classes for image in archive.images(name)[start : start + count]]
    with closing(Decoders(10**6)) as decoders:
        loaded = load_tokens(images, clip, decoders=decoders, cache_bytes=2**30, scratch=scratch)
    labels = torch.arange(len(classes)).repeat_interleave(count)
    return TaskData(number, tuple(classes), labels, loaded.tokens)


@pytest.mark.slow
def test_on_the_bundled_model_it_learns_photographs_at_least_as_well_as_without(tinyclip, name, tmp_path):
    first, second = ["airplane", "cat", "dog"], ["frog", "ship", "truck"]
    untouched, method = (methods.build(tinyclip, config.Method(name=chosen)) for chosen in ("zeroshot", name))
    for number, classes in enumerate((first, second), 1):
        task = photographs(tinyclip, tmp_path, number, classes, 0, 60)
        untouched.update(task, silent)
        method.update(task, silent)
    test = photographs(tinyclip, tmp_path, 3, first + second, 60, 30)
    assert accuracy(method, test) >= accuracy(untouched, test)
