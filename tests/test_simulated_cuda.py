import pytest
from tests.simulated_cuda import simulated_cuda
from tests.tiny import tiny_clip, tiny_timm_clip
from tests.test_method_contract import *

@pytest.fixture(scope="module", autouse=True)
def simulated():
    with simulated_cuda():
        yield

@pytest.fixture(scope="module")
def clip(simulated):
    return tiny_clip(device="cuda")

@pytest.fixture(scope="module")
def timm_clip(simulated):
    return tiny_timm_clip(device="cuda")
