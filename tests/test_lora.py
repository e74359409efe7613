"""Adapters: nothing at first, K and V only, the tower itself never changes, merged weights are the same model."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from agent.model.lora import Adapters, merged
from tests.tiny import tiny_clip, tiny_timm_clip


def trained(tower, rank=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    adapters = Adapters(tower, rank, 1.0, generator)
    with torch.no_grad():
        for up in adapters.up:
            up.normal_(generator=generator)
    return adapters


@pytest.fixture(params=[(tiny_clip, 32), (tiny_timm_clip, 160)], ids=["native", "timm"])
def tower_and_tokens(request):
    make, size = request.param
    clip = make()
    return clip.image, clip.prefix(torch.randn(2, 3, size, size))


def test_a_new_adapter_leaves_the_weights_exactly_as_they_are(tower_and_tokens):
    tower, _ = tower_and_tokens
    adapters = Adapters(tower, 4, 1.0, torch.Generator().manual_seed(0))
    assert all(torch.equal(weight, tower.get_parameter(name)) for name, weight in adapters.weights().items())


def test_only_k_and_v_rows_change_by_alpha_over_rank_times_up_times_down(tower_and_tokens):
    tower, _ = tower_and_tokens
    adapters = trained(tower)
    for (name, weight), down, up in zip(adapters.weights().items(), adapters.down, adapters.up, strict=True):
        before = tower.get_parameter(name)
        width = before.shape[1]
        change = (weight - before).detach()
        assert torch.equal(change[:width], torch.zeros(width, width))
        assert torch.allclose(change[width : 2 * width], up[0] @ down[0] / 4, atol=1e-6)
        assert torch.allclose(change[2 * width :], up[1] @ down[1] / 4, atol=1e-6)


def test_training_adapters_never_writes_the_tower(tower_and_tokens):
    tower, tokens = tower_and_tokens
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    adapters = trained(tower)
    optimizer = torch.optim.Adam(adapters.parameters(), lr=0.1)
    functional_call(tower, adapters.weights(), (tokens,)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items())
    assert all(p.grad is not None for p in adapters.parameters())


def test_merged_weights_answer_as_the_adapters_do_and_share_nothing_that_training_writes(tower_and_tokens):
    tower, tokens = tower_and_tokens
    adapters = trained(tower)
    twin = merged(tower, adapters.weights())
    expected = functional_call(tower, adapters.weights(), (tokens,)).detach()
    assert torch.allclose(twin(tokens), expected, atol=1e-5)
    # when training goes on
    with torch.no_grad():
        for up in adapters.up:
            up.zero_()
    # then the merged tower does not notice, and the frozen weights are not copied
    assert torch.allclose(twin(tokens), expected, atol=1e-5)
    frozen = [name for name in dict(tower.named_parameters()) if name not in adapters.weights()]
    assert all(twin.get_parameter(name) is tower.get_parameter(name) for name in frozen)


def test_the_papers_size_of_the_adapters():
    """0.49 million trainable parameters for ViT-B/16: 4 x rank x width per block."""
    clip = tiny_clip()
    adapters = Adapters(clip.image, 8, 1.0, torch.Generator().manual_seed(0))
    assert sum(p.numel() for p in adapters.parameters()) == 2 * 4 * 8 * 64


def test_a_tower_without_fused_projections_is_refused():
    with pytest.raises(ValueError, match="no fused q, k, v projection"):
        Adapters(torch.nn.Linear(2, 2), 4, 1.0, torch.Generator())
