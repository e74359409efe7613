"""The simulated CUDA device refuses what CUDA refuses, and whatever learns runs on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from agent.methods.publishing import SiteLearner, incoming
from agent.model.clip import Clip
from tests.devices import *  # noqa: F403
from tests.simulated_cuda import CUDA, simulated_cuda
from tests.test_merging import built
from tests.tiny import silent, tiny_clip, tiny_task, tiny_timm_clip


@pytest.fixture(scope="module", autouse=True)
def simulated() -> Iterator[None]:
    with simulated_cuda():
        yield


@pytest.fixture(scope="module")
def clip(simulated: None) -> Clip:
    return tiny_clip(device="cuda")


@pytest.fixture(scope="module")
def timm_clip(simulated: None) -> Clip:
    return tiny_timm_clip(device="cuda")


@pytest.fixture(scope="module")
def mixed_clip(simulated: None) -> Clip:
    return tiny_clip(device="cuda", precision="auto")


@pytest.fixture(scope="module")
def provider() -> str:
    return "CPUExecutionProvider"


def there(*shape: int) -> Tensor:
    return torch.ones(shape, device="cuda")


def here(*shape: int) -> Tensor:
    return torch.ones(shape)


def index(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def assigned(target: Tensor, at: object, value: Tensor) -> Tensor:
    target[at] = value
    return target


def with_gradient(gradient: Tensor) -> None:
    there(3).requires_grad_().grad = gradient


REFUSED: dict[str, list[Callable[[], object]]] = {
    "same device": [
        lambda: there(3) + here(3),
        lambda: here(3) * there(),
        lambda: here(3).add_(there(3)),
        lambda: here(2, 3) @ there(3),
        lambda: torch.cat([there(3), here(3)]),
        lambda: torch.stack([there(), here()]),
        lambda: torch.where(there(3) > 0, there(3), here(3)),
        lambda: torch.equal(there(3), here(3)),
        lambda: there(3).masked_fill_(here(3) > 0, 0.0),
        lambda: there(3).index_add_(0, index(0, 1), there(2)),
        lambda: there(3, 2).gather(0, index(0, 1)[None]),
        lambda: F.embedding(index(0, 1), there(3, 2)),
        lambda: F.cross_entropy(there(2, 3), index(0, 1)),
        lambda: F.linear(there(2, 3), here(4, 3)),
        lambda: nn.Linear(3, 4)(there(2, 3)),
        lambda: nn.Linear(3, 4).to("cuda")(here(2, 3)),
        lambda: functional_call(nn.Linear(3, 4).to("cuda"), {"bias": here(4)}, (there(2, 3),)),
        lambda: assigned(there(3), index(0, 1), here(2)),
        lambda: with_gradient(here(3)),
    ],
    "indices should be": [
        lambda: here(3)[index(0, 1).to("cuda")],
        lambda: assigned(here(3), index(0, 1).to("cuda"), here(2)),
    ],
    "can't convert cuda:0 device type tensor to numpy": [
        lambda: there(3).numpy(),
        lambda: np.asarray(there(3)),
    ],
    "cannot pin": [
        lambda: there(3).pin_memory(),
    ],
    "non_blocking": [
        lambda: there(3).to("cpu", non_blocking=True),
    ],
    "invalid device ordinal": [
        lambda: there(3).to("cuda:1"),
        lambda: torch.ones(3, device="cuda:1"),
    ],
    "generator": [
        lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda: there(3).bernoulli_(0.5, generator=torch.Generator()),
        lambda: torch.randperm(3, generator=torch.Generator("cuda")),
    ],
    "integers": [
        lambda: index(1, 2).to("cuda") @ index(1, 2).to("cuda"),
    ],
}
"""What CUDA says, and what it says it of."""


@pytest.mark.parametrize(("why", "mistake"), [(why, mistake) for why in REFUSED for mistake in REFUSED[why]])
def test_what_cuda_refuses_is_refused(why: str, mistake: Callable[[], object]):
    with pytest.raises((RuntimeError, TypeError), match=why):
        mistake()


@pytest.mark.parametrize(
    "result",
    [
        lambda: there(3) + 1,
        lambda: there(3) + here(),
        lambda: there() + here(),
        lambda: there(3)[index(0, 2)],
        lambda: there(3)[here(3) > 0],
        lambda: assigned(there(3), slice(0, 2), here(2)),
        lambda: assigned(there(3), index(0, 1), here()),
        lambda: there(3).copy_(here(3)),
        lambda: here(3).to(CUDA),
        lambda: here(3).to(there(1)),
        lambda: torch.tensor(2.0, device="cuda"),
        lambda: torch.zeros_like(there(3)),
        lambda: there(3).new_zeros(2),
        lambda: there(2, 3).T,
        lambda: there(2, 3).topk(2).indices,
        lambda: there(4).split(2)[1],
        lambda: next(iter(there(2, 3))),
        lambda: there(3).add_(1),
        lambda: there(3).bernoulli_(0.5, generator=torch.Generator("cuda")),
        lambda: nn.Parameter(there(3)),
        lambda: copy.deepcopy(nn.Linear(3, 4).to("cuda")).weight,
        lambda: nn.Linear(3, 4).to("cuda")(there(2, 3)),
    ],
)
def test_what_is_made_on_the_device_stays_there(result: Callable[[], Tensor]):
    made = result()
    assert made.device == CUDA and made.is_cuda and not made.is_cpu


@pytest.mark.parametrize(
    "result",
    [
        lambda: there(3).cpu(),
        lambda: there(3).to("cpu", torch.float64),
        lambda: here(3).copy_(there(3)),
        lambda: assigned(here(3), slice(0, 2), there(2)),
        lambda: torch.zeros_like(there(3), device="cpu"),
        lambda: torch.tensor([there(), there()]),
        lambda: torch.ones(3),
        lambda: copy.deepcopy(nn.Linear(3, 4).to("cuda")).cpu().weight,
    ],
)
def test_what_comes_back_is_a_plain_tensor(result: Callable[[], Tensor]):
    made = result()
    assert made.device == torch.device("cpu") and type(made) in (Tensor, nn.Parameter)
    assert made.detach().numpy().shape == made.shape


def test_what_moves_is_a_copy_and_what_is_there_already_is_not():
    a = here(3)
    b = a.to("cuda")
    c = b.cpu()
    b.zero_()
    assert a.tolist() == c.tolist() == [1, 1, 1] and b.tolist() == [0, 0, 0]
    assert b.to("cuda") is b and a.cpu() is a and b.add_(1) is b
    assert b.sum().item() == 3 and bool((b == 1).all())


def test_training_gives_the_numbers_of_the_cpu_with_gradients_on_the_device():
    def trained(device: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))
        given, truth = torch.randn(16, 4), torch.randint(3, (16,))
        model, given, truth = model.to(device), given.to(device), truth.to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(given), truth).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        weight = model[0].weight
        assert weight.is_leaf and weight.grad is not None and weight.grad.device == weight.device
        return [parameter.detach().cpu() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained("cpu"), trained("cuda"), strict=True))


def test_a_module_on_the_device_loads_what_was_saved_on_the_cpu():
    saved = nn.Linear(3, 4)
    loaded = nn.Linear(3, 4).to("cuda")
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded.weight.cpu(), saved.weight) and loaded.weight.is_cuda


def test_mixed_precision_on_the_device_computes_in_bfloat16_and_only_there():
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert (there(2, 3) @ there(3, 2)).dtype == torch.bfloat16
    assert (there(2, 3) @ there(3, 2)).dtype == torch.float32


def test_a_site_of_a_fleet_on_a_gpu_adds_what_others_published_from_theirs(clip):
    sites = [SiteLearner(built(clip, "gapstream"), least=1) for _ in range(2)]
    for number, (site, names) in enumerate(zip(sites, (["red", "green"], ["blue", "black"]), strict=True)):
        task = tiny_task(clip, 1, names, seed=number)
        site.method.update(task, silent)
        site.learned(task)
    tensors, classes = sites[1].sends()
    assert all(tensor.device.type == "cpu" for tensor in tensors.values())
    other = incoming(sites[0].own(), tensors, classes, sites[1].own().values.get("depth", 0), True)
    answers = sites[0].answers(lambda: built(clip, "gapstream"), {"other": other})
    assert sorted(answers.classes) == ["black", "blue", "green", "red"] and sites[0].fusion is not None
    assert answers.inference_module().rows.device.type == "cuda"
