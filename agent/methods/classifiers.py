"""Inference modules: how features become predictions, by rows for class names, visual rows, and their fusion."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agent.methods.base import InferenceModule


def tensors_of(*modules: nn.Module) -> dict[str, Tensor]:
    """Collect every parameter and buffer of some modules, named by the module's place and its own name."""
    return {
        f"{place}.{name}": tensor
        for place, module in enumerate(modules)
        for tensors in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        for name, tensor in tensors
    }


class TowerWithHead(InferenceModule):
    """It is an image tower with a head of rows per class. Subclasses say how an embedding becomes probabilities."""

    parts: tuple[str, ...] = ("embedding",)

    def __init__(self, tower: nn.Module, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.tower: Any = tower
        self.classes = classes
        self.class_tensors = ()
        self.eval().requires_grad_(False)

    def _rows(self, name: str, rows: Tensor) -> None:
        self.register_buffer(name, rows.detach().clone())
        self.class_tensors = (*self.class_tensors, name)

    def score(self, embedding: Tensor) -> Tensor:
        """Turn L2-normalised embeddings float32 [B, D] into probabilities [B, C] whose rows sum to 1."""
        raise NotImplementedError

    def encoder(self, part: str) -> Mapping[str, Tensor]:
        return tensors_of(self.tower)

    def encode(self, tokens: Tensor, parts: Collection[str]) -> dict[str, Tensor]:
        return {"embedding": F.normalize(self.tower(tokens).float(), dim=-1)}

    def answer(self, encoded: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        embedding = encoded["embedding"]
        probabilities = self.score(embedding)
        # A probability that underflows to 0 would have a logit of minus infinity, which parity cannot compare.
        return embedding, probabilities.clamp_min(1e-12).log(), probabilities

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.from_tokens(self.tower.prefix(images))


class TextHead(TowerWithHead):
    """It is CLIP's own prediction: softmax(scale * cosine to the class names)."""

    names: Tensor

    def __init__(self, tower: nn.Module, classes: tuple[str, ...], names: Tensor, scale: float) -> None:
        super().__init__(tower, classes)
        self._rows("names", names)
        self.scale = scale

    def score(self, embedding: Tensor) -> Tensor:
        return torch.softmax(self.scale * embedding @ self.names.T, dim=-1)


class Fusion(TowerWithHead):
    """Class names [C, D], L2-normalised, and visual rows [C, D], which a subclass's `score` joins."""

    names: Tensor
    rows: Tensor

    def __init__(self, tower: nn.Module, classes: tuple[str, ...], names: Tensor, rows: Tensor, scale: float) -> None:
        super().__init__(tower, classes)
        self._rows("names", names)
        self._rows("rows", F.normalize(rows, dim=-1))
        self.scale = scale


class FaithfulFusion(Fusion):
    """It is MG-CLIP's published prediction: (softmax(softmax(scale * text)) + 4 softmax(visual cosine)) / 5.

    The published code softmaxes the text branch twice (its model already returns probabilities); kept to agree with it.
    """

    def score(self, embedding: Tensor) -> Tensor:
        text = torch.softmax(torch.softmax(self.scale * embedding @ self.names.T, dim=-1), dim=-1)
        visual = torch.softmax(embedding @ self.rows.T, dim=-1)
        return (text + 4 * visual) / 5


class CalibratedFusion(Fusion):
    """It is (softmax(scale * text) + 2 softmax(scale * visual)) / 3: each branch softmaxed once at CLIP's temperature.

    The published fusion's probabilities are nearly flat (they rank like text probability plus 4 x visual cosine); here
    they are usable as scores. The weight was chosen on training images that were not trained on.
    """

    def score(self, embedding: Tensor) -> Tensor:
        text = torch.softmax(self.scale * embedding @ self.names.T, dim=-1)
        visual = torch.softmax(self.scale * embedding @ self.rows.T, dim=-1)
        return (text + 2 * visual) / 3
