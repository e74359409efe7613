"""What tests/devices.py asks of every method, on a real GPU; and releases, which onnxruntime answers there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agent.model.clip import Clip
from exporter.onnx import OnnxExporter
from exporter.runtime import Session
from tests.devices import *  # noqa: F403
from tests.devices import built
from tests.test_method_contract import (
    Alike,
    test_its_release_answers_as_it_does_and_a_later_one_reuses_the_graph,  # noqa: F401
)
from tests.tiny import silent, tiny_clip, tiny_task, tiny_timm_clip

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def clip(cuda: None) -> Clip:
    return tiny_clip(device="cuda")


@pytest.fixture(scope="module")
def timm_clip(cuda: None) -> Clip:
    return tiny_timm_clip(device="cuda")


@pytest.fixture(scope="module")
def mixed_clip(cuda: None) -> Clip:
    return tiny_clip(device="cuda", precision="auto")


@pytest.fixture
def alike() -> Alike:
    """A GPU sums in no fixed order, and Adam turns a gradient that is near zero into a step of either sign."""
    return lambda a, b: torch.allclose(a, b, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("towers", ["open_clip", "timm"])
def test_onnxruntime_answers_a_release_on_the_gpu_as_on_the_cpu(clip, timm_clip, tmp_path, towers):
    chosen, size = (clip, 32) if towers == "open_clip" else (timm_clip, 160)
    method = built(chosen, "mgclip")
    method.update(tiny_task(chosen, 1, ["red", "green"], size=size), silent)
    images = np.random.default_rng(0).normal(size=(4, 3, size, size)).astype(np.float32)
    exporter = OnnxExporter(max_batch=4, precisions=("fp16",))
    release = exporter.release(method.inference_module(), chosen.preprocess, {}, tmp_path / "release", images)
    assert release.parity.provider == "CUDAExecutionProvider"
    assert release.variants["fp16"].refused is None
    on_gpu, on_cpu = Session(release.model, device="cuda"), Session(release.model, device="cpu")
    assert (on_gpu.provider, on_cpu.provider) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    for a, b in zip(on_gpu.run(images), on_cpu.run(images), strict=True):
        assert np.allclose(a, b, atol=1e-3)
