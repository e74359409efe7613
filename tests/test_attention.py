"""Attention in the form that is traced answers as torch's own does."""

from __future__ import annotations

import copy

import onnx
import pytest
import torch
from torch import nn

from exporter import attention
from exporter.onnx import OnnxExporter
from tests.test_onnx import FACTS, PREPROCESS, Toy, images, native_tower  # noqa: F401


@pytest.fixture
def one() -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(16, 4, batch_first=True).eval()


def both(one: nn.MultiheadAttention, *tokens: torch.Tensor, **asked: object) -> list[torch.Tensor | None]:
    other = copy.deepcopy(one)
    attention.plain(other)
    with torch.no_grad():
        return [*one(*tokens, **asked), *other(*tokens, **asked)]


@pytest.mark.parametrize("mask", [None, torch.full((5, 5), float("-inf")).triu(1)], ids=["all", "causal"])
def test_self_attention_is_the_same(one, mask):
    tokens = torch.randn(3, 5, 16)

    want, no_weights, got, none = both(one, tokens, tokens, tokens, need_weights=False, attn_mask=mask)

    assert no_weights is None and none is None
    torch.testing.assert_close(got, want)


def test_other_queries_weights_and_padding_are_answered_as_before(one):
    tokens, padding = torch.randn(3, 5, 16), torch.tensor([[False] * 4 + [True]] * 3)

    for given, asked in [
        ((tokens[:, :1], tokens, tokens), {"need_weights": False}),
        ((tokens, tokens, tokens), {}),
        ((tokens, tokens, tokens), {"need_weights": False, "key_padding_mask": padding}),
    ]:
        want, weights, got, others = both(one, *given, **asked)
        assert torch.equal(got, want)
        assert weights is None if others is None else torch.equal(weights, others)


def test_a_released_block_has_one_product_for_queries_keys_and_values_and_moves_no_tokens(tmp_path, images):  # noqa: F811
    release = OnnxExporter(max_batch=4).release(Toy(3, native_tower()), PREPROCESS, FACTS, tmp_path / "r", images)

    model = onnx.load(release.model)
    moved = [list(node.attribute[0].ints) for node in model.graph.node if node.op_type == "Transpose"]
    # Weights, patches, heads apart (and the keys turned round), heads together: nothing puts tokens before images.
    assert [perm for perm in moved if len(perm) == 3 and perm[0] != 0] == []
    assert [len(perm) for perm in moved].count(5) == 2
    [token] = [node for node in model.graph.node if node.op_type == "Gather" and node.output[0].startswith("select")][
        :1
    ]
    after = [node.op_type for node in list(model.graph.node)[list(model.graph.node).index(token) :]]
    assert after.count("Gelu") == 1
