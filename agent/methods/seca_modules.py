"""The parts of SECA: bottlenecks beside the MLPs, learned prompts, relevance, refinement, and its predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from agent.methods.base import TextModule
from agent.methods.classifiers import TowerWithHead
from agent.model.clip import Clip, ModelError
from agent.model.lora import ADAPTED, merged
from agent.model.ranks import Part

NORMS = ("ln_2", "norm2")
"""How the norm before an MLP is named in open_clip's blocks and in timm's."""


class WithInput(nn.Module):
    """It is a block's norm that gives what it was given as well: (norm(x), x)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(x), x


class Beside(nn.Module):
    """It is a bottleneck parallel to a block's norm and MLP: mlp(norm(x)) + scale * up(dropout(relu(down(x)))).

    x is the residual stream [B, tokens, width]. Where a block scales its MLP's output, it scales the bottleneck's too.
    """

    def __init__(self, mlp: nn.Module, width: int, scale: float) -> None:
        super().__init__()
        self.mlp = mlp
        self.down = nn.Parameter(torch.zeros(1, width), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(width, 1), requires_grad=False)
        self.scale = scale
        self.dropout: tuple[float, torch.Generator, Part] | None = None

    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        normed, x = both
        hidden = F.relu(F.linear(x, self.down))
        if self.dropout is not None:
            rate, generator, part = self.dropout
            kept = hidden.new_empty(part.images, *hidden.shape[1:]).bernoulli_(1 - rate, generator=generator)
            hidden = hidden * part.of(kept) / (1 - rate)
        return self.mlp(normed) + self.scale * F.linear(hidden, self.up)


class BesideTower:
    """It is an image tower with a bottleneck beside every MLP, on a twin that shares the original's frozen weights."""

    def __init__(self, tower: nn.Module, scale: float) -> None:
        """Raises ModelError where a block has no norm before its MLP."""
        self._twin = merged(tower, {})
        self._widths: dict[str, int] = {}
        for name, weight in tower.named_parameters():
            if name.endswith(ADAPTED):
                path, width = name.rpartition(".attn.")[0], weight.shape[1]
                block: Any = self._twin.get_submodule(path)
                norm = next((norm for norm in NORMS if hasattr(block, norm)), None)
                if norm is None:
                    raise ModelError(
                        f"seca needs image blocks with a norm ({' or '.join(NORMS)}) before the MLP, but {path} is a "
                        f"{type(block).__name__} without one. Choose another method.name or model.name"
                    )
                setattr(block, norm, WithInput(getattr(block, norm)))
                block.mlp = Beside(block.mlp, width, scale).to(weight.device)
                self._widths[f"{path}.mlp"] = width

    def new(self, bottleneck: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Make bottlenecks that change nothing yet: down is uniform, up is zero."""
        device = next(self._twin.parameters()).device
        tensors = {}
        for mlp, width in self._widths.items():
            tensors[f"{mlp}.down"] = uniform((bottleneck, width), generator).to(device)
            tensors[f"{mlp}.up"] = torch.zeros(width, bottleneck, device=device)
        return tensors

    def __call__(
        self,
        tokens: Tensor,
        adapter: Mapping[str, Tensor],
        rate: float = 0.0,
        generator: torch.Generator | None = None,
        part: Part | None = None,
    ) -> Tensor:
        """Encode [B, tokens, width] to [B, D], not normalised, with dropout where a generator is given. Where
        the images are `part` of a batch, it is drawn for the whole batch."""
        for name in self._widths:
            beside = self._twin.get_submodule(name)
            assert isinstance(beside, Beside)
            whole = part or Part(len(tokens))
            beside.dropout = (rate, generator, whole) if generator is not None and rate else None
        return functional_call(self._twin, dict(adapter), (tokens,))

    def merged(self, adapter: Mapping[str, Tensor]) -> nn.Module:
        """Build the tower with its bottlenecks in place, sharing nothing that training writes."""
        for name in self._widths:
            beside = self._twin.get_submodule(name)
            assert isinstance(beside, Beside)
            beside.dropout = None
        return merged(self._twin, dict(adapter))


class Context(nn.Module):
    """Token embeddings with learned vectors in the place of the first words."""

    def __init__(self, words: nn.Module, shape: tuple[int, int], device: torch.device) -> None:
        super().__init__()
        self.words = words
        self.vectors = nn.Parameter(torch.zeros(*shape, device=device), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        vectors = self.vectors.to(x.dtype).expand(ids.shape[0], -1, -1)
        return torch.cat([x[:, :1], vectors, x[:, 1 + vectors.shape[1] :]], dim=1)


class PromptedText:
    """The frozen text tower under learned context: `vectors` [context, width], then the class name."""

    def __init__(self, clip: Clip, context: int) -> None:
        self._clip = clip
        clip.vocabulary  # noqa: B018 - raises unless each placeholder below is one token after the start
        words = clip.text.token_embedding
        assert isinstance(words, nn.Embedding)
        self.shape = (context, words.embedding_dim)
        self.prompt = "x " * context + "{}"
        self._twin = merged(clip.text, {})
        self._twin.token_embedding = Context(words, self.shape, clip.device)

    def tokenize(self, names: Sequence[str]) -> Tensor:
        return self._clip.tokenize(names, self.prompt)

    def encode(self, ids: Tensor, vectors: Tensor) -> Tensor:
        """Encode token ids under learned vectors: float32 [n, D], L2-normalised; differentiable in `vectors`."""
        with self._clip.autocast():
            features = functional_call(self._twin, {"token_embedding.vectors": vectors}, (ids,))
        return F.normalize(features.float(), dim=-1)

    def module(self, prompts: Sequence[Tensor], scale: float) -> TextModule:
        """Give the mean over `prompts`, sharing nothing that training writes."""
        return PromptsMean(self._clip, merged(self._twin, {}), self.prompt, prompts, scale)


class PromptsMean(TextModule):
    """It gives a prompted text tower's embeddings, averaged over prompts."""

    vectors: Tensor

    def __init__(self, clip: Clip, tower: nn.Module, prompt: str, prompts: Sequence[Tensor], scale: float) -> None:
        super().__init__(clip, tower, prompt, scale)
        self.register_buffer("vectors", torch.stack(list(prompts)).detach())
        self.varying = ("vectors",)

    def forward(self, ids: Tensor) -> Tensor:
        prompts, names = self.vectors.shape[0], ids.shape[0]
        vectors = self.vectors[:, None].expand(-1, names, -1, -1).flatten(0, 1)
        features = functional_call(self.tower, {"token_embedding.vectors": vectors}, (ids.repeat(prompts, 1),))
        each = F.normalize(features.float(), dim=-1).unflatten(0, (prompts, names))
        return F.normalize(each.mean(0), dim=-1)


class Relevance(nn.Module):
    """It weighs the pool's members for an image by the relevance of their features to its class's texts (SG-AKT)."""

    def __init__(self, embed_dim: int, width: int, generator: torch.Generator, form: str) -> None:
        """Texts have `embed_dim` values, image features `width`."""
        super().__init__()
        self.norm_text, self.norm_image = nn.LayerNorm(embed_dim), nn.LayerNorm(width)
        self.norm_out = nn.LayerNorm(width)
        self.text = nn.Parameter(uniform((width, embed_dim), generator))
        self.image = nn.Parameter(uniform((width, width), generator))
        self._form = form

    def forward(self, texts: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
        """Aggregate pool features [B, P, width] by texts [B, prompts, D].

        Gives the aggregate [B, width], which the tower's own last norm and projection take into the joint space, and
        the weights [B, P] whose rows sum to 1.
        """
        values = self.norm_image(pool)
        asked = F.linear(self.norm_text(texts), self.text)
        offered = F.linear(values, self.image)
        relevance = asked @ offered.mT / values.shape[-1] ** 0.5
        if self._form == "code":
            weights = relevance.softmax(-1).mean(1)
        else:
            weights = relevance.mean(1).softmax(-1)
        return self.norm_out((weights[:, :, None] * values).sum(1)), weights


class Refinement(nn.Module):
    """Prototypes averaged over classes with similar names (SE-VPR)."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm_text, self.norm_mean, self.norm_out = (nn.LayerNorm(width) for _ in range(3))
        self.text = nn.Parameter(uniform((width, width), generator))
        self.gamma = 2 * width**0.5
        """Squared distance at which the affinity falls to 1/e; the paper's gamma is its inverse."""

    def forward(self, words: Tensor, means: Tensor) -> Tensor:
        """Average class means [C, D] by the affinity of their names [C, D]: prototypes [C, D], L2-normalised."""
        return F.normalize(self.norm_out(self.affinity(words) @ self.norm_mean(means)), dim=-1)

    def affinity(self, words: Tensor) -> Tensor:
        """Give the affinity of names [C, D] to each other: [C, C], whose rows sum to 1."""
        at = F.linear(self.norm_text(words), self.text)
        square = at.square().sum(-1)
        distance = square[:, None] + square[None, :] - 2 * at @ at.T
        return torch.softmax(-distance / self.gamma, dim=-1)


class PromptsAndPrototypes(TowerWithHead):
    """Predicts the mean of two answers: softmax over names, averaged over prompts, and softmax over prototypes."""

    names: Tensor
    prototypes: Tensor
    weights: Tensor

    def __init__(
        self,
        tower: nn.Module,
        classes: tuple[str, ...],
        names: Tensor,
        weights: Tensor,
        prototypes: Tensor | None,
        scale: float,
    ) -> None:
        """names [C, prompts, D], weights [prompts] that sum to 1; without prototypes [C, D] the names answer alone."""
        super().__init__(tower, classes)
        self._rows("names", names)
        self.register_buffer("weights", weights)
        self.visual = prototypes is not None
        if prototypes is not None:
            self._rows("prototypes", prototypes)
        self.scale = scale

    def score(self, embedding: Tensor) -> Tensor:
        answers = torch.softmax(self.scale * self.names @ embedding.T, dim=0)
        text = (self.weights[:, None] * answers).sum(1).T
        if not self.visual:
            return text
        return (text + torch.softmax(self.scale * embedding @ self.prototypes.T, dim=-1)) / 2


class PublishedPrediction(PromptsAndPrototypes):
    """Predicts as the published code: the mean of exp(scale * (cosine - peak)), over prompts, then over both answers.

    As published a peak is the highest cosine of the batch, so that an image's answer depends on its neighbours'; here
    it is a constant. Unlike a softmax of each answer this lets the surer one weigh more, image by image.
    """

    peaks: Tensor

    def __init__(
        self,
        tower: nn.Module,
        classes: tuple[str, ...],
        names: Tensor,
        weights: Tensor,
        prototypes: Tensor | None,
        scale: float,
        peaks: Tensor,
    ) -> None:
        """peaks [2] are the highest cosines to be expected, of names and of prototypes; the others as above."""
        super().__init__(tower, classes, names, weights, prototypes, scale)
        self.register_buffer("peaks", peaks.clone())

    def score(self, embedding: Tensor) -> Tensor:
        text = self.scale * (self.names @ embedding.T - self.peaks[0])
        logits = (text + self.weights.log()[:, None]).logsumexp(1).T
        if self.visual:
            logits = torch.logaddexp(logits, self.scale * (embedding @ self.prototypes.T - self.peaks[1]))
        return torch.softmax(logits, dim=-1)


class Tensors:
    """It holds named trainable tensors; unlike those of nn.ParameterDict their names may have dots in them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.named = {name: tensor.requires_grad_() for name, tensor in tensors.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Copy every tensor, by name."""
        return {name: tensor.detach().clone() for name, tensor in self.named.items()}

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` copied."""
        for name, tensor in self.named.items():
            tensor.copy_(tensors[name])


def uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw a matrix uniformly within 1 / sqrt(columns), as linear layers begin."""
    return (2 * torch.rand(*shape, generator=generator) - 1) / shape[1] ** 0.5
