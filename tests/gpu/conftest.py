"""What these tests need: a CUDA device. Without one they are skipped, and fail where they were asked for."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def cuda(request: pytest.FixtureRequest) -> None:
    if torch.cuda.is_available():
        return
    if "gpu" in request.config.getoption("markexpr"):
        pytest.fail("torch sees no CUDA device, and `-m gpu` asks for one", pytrace=False)
    pytest.skip("needs a CUDA device; where there is one, run: make test-gpu")
