"""Self-attention in the form that graphs are traced from: one product for queries, keys and values, images first.

`nn.MultiheadAttention` puts the tokens before the images inside, so that its graph moves every activation there and
back, and between attention and what follows stands a transposition over which nothing can be simplified.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def plain(module: nn.Module) -> None:
    """Let every self-attention in `module` be traced in that form; its tensors and their names stay as they are."""
    for part in module.modules():
        if isinstance(part, nn.MultiheadAttention) and _is_self_attention(part):
            part.forward = MethodType(_forward, part)  # type: ignore[method-assign]


def _is_self_attention(part: nn.MultiheadAttention) -> bool:
    """Whether its queries, keys and values may come from one product of the same tokens [batch, tokens, width]."""
    usual = part.batch_first and part.in_proj_weight is not None
    return usual and part.bias_k is None and part.bias_v is None and not part.add_zero_attn


def _forward(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """Answer as nn.MultiheadAttention does in eval mode, which still answers whatever is asked otherwise."""
    asked_otherwise = need_weights or key_padding_mask is not None or any(more.values())
    if query is not key or key is not value or query.dim() != 3 or asked_otherwise:
        return nn.MultiheadAttention.forward(
            self, query, key, value, key_padding_mask, need_weights, attn_mask=attn_mask, **more
        )
    batch, length, width = query.shape
    joined = F.linear(query, self.in_proj_weight, self.in_proj_bias)
    heads = joined.reshape(batch, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
    queries, keys, values = heads.unbind(0)
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=attn_mask)
    return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width)), None
