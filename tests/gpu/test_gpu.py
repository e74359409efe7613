"""What tests/devices.py asks of every method, on a real GPU; and the releases of all methods."""

from __future__ import annotations

import pytest
import torch

from agent.model.clip import Clip
from tests.devices import *  # noqa: F403
from tests.test_method_contract import (
    Alike,
    test_its_release_answers_as_it_does_and_a_later_one_reuses_the_graph,  # noqa: F401
)
from tests.tiny import tiny_clip, tiny_timm_clip

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def clip(cuda: None) -> Clip:
    return tiny_clip(device="cuda")


@pytest.fixture(scope="module")
def timm_clip(cuda: None) -> Clip:
    return tiny_timm_clip(device="cuda")


@pytest.fixture(scope="module")
def mixed_clip(cuda: None) -> Clip:
    return tiny_clip(device="cuda", precision="bf16")


@pytest.fixture(scope="module")
def provider() -> str:
    return "CUDAExecutionProvider"


@pytest.fixture
def alike() -> Alike:
    """A GPU sums in no fixed order, and Adam turns a gradient that is near zero into a step of either sign."""
    return lambda a, b: torch.allclose(a, b, rtol=0.05, atol=0.05)
