"""What is tested of every method on a device: on the simulated one always, and on a real one by `make test-gpu`.

A module of tests that imports all of this says by its fixtures `clip`, `timm_clip` and `mixed_clip` on which device
its CLIPs are, by `provider` who answers for onnxruntime there, and by `alike` which results are the same.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from agent.layout import LEARNER_TENSORS
from agent.methods.base import TaskData
from agent.model.clip import Clip
from agent.model.images import CroppedImages, load_tokens
from agent.trainer import Trainer
from exporter.decoders import Decoders
from exporter.onnx import OnnxExporter
from exporter.preprocess import Preprocess
from exporter.runtime import Session
from tests.test_method_contract import (
    alike,
    answers,
    assert_same_state,
    built,
    name,
    small_tasks_adapt,
    test_a_class_that_comes_back_is_learned_again_under_its_one_name,
    test_a_module_handed_out_does_not_change_when_learning_goes_on,
    test_a_state_is_a_copy,
    test_a_task_of_one_class_or_of_one_sample_is_learned_like_any_other,
    test_an_update_says_what_it_did_and_how_far_the_gap_moved,
    test_it_learns_on_towers_of_timm_too,
    test_it_learns_two_tasks_and_answers_for_all_their_classes,
    test_it_touches_neither_the_task_nor_the_model_it_starts_from,
    test_learning_helps_on_the_task_just_learned,
    test_resuming_from_its_state_ends_with_the_same_model_as_no_interruption,
    test_the_module_answers_the_same_for_images_and_for_their_tokens,
    test_training_that_leaves_finite_numbers_restores_the_last_state_that_had_them,
    test_what_it_encodes_with_is_normalised_and_for_any_name,
)
from tests.test_trainer import Bench, images_of, unreleased
from tests.tiny import silent, tiny_task

__all__ = [
    "alike",
    "name",
    "small_tasks_adapt",
    "test_a_class_that_comes_back_is_learned_again_under_its_one_name",
    "test_a_module_handed_out_does_not_change_when_learning_goes_on",
    "test_a_state_is_a_copy",
    "test_a_task_of_one_class_or_of_one_sample_is_learned_like_any_other",
    "test_an_update_says_what_it_did_and_how_far_the_gap_moved",
    "test_in_mixed_precision_it_learns_and_keeps_and_answers_in_float32",
    "test_it_learns_on_towers_of_timm_too",
    "test_it_learns_two_tasks_and_answers_for_all_their_classes",
    "test_it_touches_neither_the_task_nor_the_model_it_starts_from",
    "test_learning_helps_on_the_task_just_learned",
    "test_onnxruntime_answers_a_release_as_the_method_does",
    "test_other_forms_of_a_method_learn_too",
    "test_resuming_from_its_state_ends_with_the_same_model_as_no_interruption",
    "test_the_module_answers_the_same_for_images_and_for_their_tokens",
    "test_the_trainer_learns_scores_saves_and_goes_on_in_another_process",
    "test_training_that_leaves_finite_numbers_restores_the_last_state_that_had_them",
    "test_what_it_encodes_with_is_normalised_and_for_any_name",
]

FORMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("finetune", {"trainable": "all"}),
    ("mgclip", {"preset": "paper", "epochs": 2}),
    ("seca", {"form": "paper", "fusion": "faithful"}),
    ("vrlwf", {"preset": "zscl"}),
    ("vrlwf", {"preset": "paper", "epochs": 2}),
)
"""Methods with settings under which other lines of them run."""


@pytest.mark.parametrize(("method", "settings"), FORMS, ids=lambda part: part if isinstance(part, str) else "")
def test_other_forms_of_a_method_learn_too(clip, tmp_path, method, settings):
    learner = built(clip, method, **settings)
    with closing(Decoders(10**6)) as decoders:
        for number, classes in enumerate((("cat", "ship"), ("dog", "cat")), 1):
            task = photographs(clip, tmp_path, number, classes, decoders)
            learner.update(task, silent)
    assert learner.classes == ("cat", "ship", "dog")
    assert all(output.isfinite().all() for output in answers(learner, task))


def photographs(clip: Clip, scratch: Path, number: int, classes: tuple[str, ...], decoders: Decoders) -> TaskData:
    """A task of bundled images with crops, its tokens in a file as where memory does not hold them."""
    images = images_of(*classes, count=4, start=4 * number)
    read = [lambda data=data: data for _, data in images]
    loaded = load_tokens(read, clip, decoders=decoders, cache_bytes=0, scratch=scratch)
    labels = torch.tensor([classes.index(label) for label, _ in images])
    return TaskData(number, classes, labels, loaded.tokens, CroppedImages(read, clip, decoders))


def test_in_mixed_precision_it_learns_and_keeps_and_answers_in_float32(mixed_clip, name):
    tasks = [tiny_task(mixed_clip, 1, ["red", "green"]), tiny_task(mixed_clip, 2, ["blue", "red"])]
    assert tasks[0].tokens.batch(torch.arange(2)).dtype == torch.bfloat16
    method = built(mixed_clip, name)
    for task in tasks:
        method.update(task, silent)
        kept: list[Tensor] = list(method.state().tensors.values())
        assert not any(tensor.dtype == torch.bfloat16 for tensor in kept)
        given = answers(method, task)
        assert all(output.dtype == torch.float32 and output.isfinite().all() for output in given)
    again = built(mixed_clip, name)
    again.load_state(method.state())
    assert_same_state(again.state(), method.state())


@pytest.mark.parametrize("towers", ["open_clip", "timm"])
def test_onnxruntime_answers_a_release_as_the_method_does(clip, timm_clip, provider, tmp_path, towers):
    chosen, size = (clip, 32) if towers == "open_clip" else (timm_clip, 160)
    method = built(chosen, "gapstream")
    method.update(tiny_task(chosen, 1, ["red", "green"], size=size), silent)
    module = method.inference_module()
    images = np.random.default_rng(0).normal(size=(4, 3, size, size)).astype(np.float32)
    preprocess = Preprocess(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    exporter = OnnxExporter(max_batch=4, precisions=("fp16",))
    release = exporter.release(module, preprocess, {}, tmp_path / "release", images)
    assert release.parity.provider == provider and release.variants["fp16"].refused is None
    with torch.no_grad():
        expected = [output.cpu().numpy() for output in module(torch.from_numpy(images).to(chosen.device))]
    sessions = [Session(release.model, device=device) for device in ("cuda", "cpu")]
    assert [session.provider for session in sessions] == [provider, "CPUExecutionProvider"]
    for session in sessions:
        for given, wanted in zip(session.run(images), expected, strict=True):
            assert np.allclose(given, wanted, atol=1e-3)


def test_the_trainer_learns_scores_saves_and_goes_on_in_another_process(clip, tmp_path):
    bench = Bench(tmp_path, model={"device": str(clip.device)}, method={"name": "mgclip"})
    _, commit = bench.learn(unreleased(Trainer(bench.config, None)), bench.task(images_of("cat", "ship")))
    outcome, commit = bench.learn(unreleased(Trainer(bench.config, commit.path)), bench.task(images_of("dog", "frog")))
    report = outcome.report
    assert outcome.classes == ("cat", "ship", "dog", "frog")
    assert report.learner.device == str(clip.device) and report.last > report.zero_shot
    assert all(tensor.isfinite().all() for tensor in load_file(commit.path / LEARNER_TENSORS).values())
