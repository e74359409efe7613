"""Low-rank K/V adapters (MG-CLIP section 1.1) that live beside a frozen tower, and their merge for export.

An adapted tower is `functional_call(tower, adapters.weights(), inputs)`: the tower's own parameters never change, so
the untouched model costs nothing to keep and no teacher can alias a student.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

ADAPTED = ("attn.in_proj_weight", "attn.qkv.weight")
"""How the fused q, k, v projections are named in `nn.MultiheadAttention` and in timm's attention, rows in that
order."""


class Adapters(nn.Module):
    """LoRA on the K and V rows of every attention block of one tower: W + (alpha / rank) * B A.

    A is Xavier-uniform, B zero: before training the tower is exactly itself. Trainable: 4 * rank * width per block.
    """

    def __init__(self, tower: nn.Module, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self._frozen = {name: p for name, p in tower.named_parameters() if name.endswith(ADAPTED)}
        if not self._frozen:
            raise ValueError(f"{type(tower).__name__} has no fused q, k, v projection to adapt")
        self.scale = alpha / rank
        self.down = nn.ParameterList()
        self.up = nn.ParameterList()
        for weight in self._frozen.values():
            width = weight.shape[1]
            down = torch.empty(2, rank, width)
            for matrix in down:
                nn.init.xavier_uniform_(matrix, generator=generator)
            self.down.append(nn.Parameter(down.to(weight.device)))
            self.up.append(nn.Parameter(torch.zeros(2, width, rank, device=weight.device)))

    def weights(self) -> dict[str, Tensor]:
        """Give adapted projections by parameter name, float32 [3 * width, width], differentiable in the adapters."""
        adapted = {}
        for (name, weight), down, up in zip(self._frozen.items(), self.down, self.up, strict=True):
            width = weight.shape[1]
            change = self.scale * torch.bmm(up, down).reshape(2 * width, width)
            adapted[name] = torch.cat([weight[:width], weight[width:] + change])
        return adapted


@torch.no_grad()
def merged(tower: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Copy `tower` with `weights` in place; everything else is shared, as it is frozen and never written."""
    memo = {id(p): p for p in [*tower.parameters(), *tower.buffers()]}
    twin = copy.deepcopy(tower, memo)
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(owner), leaf, nn.Parameter(weight.detach().clone(), requires_grad=False))
    return twin
