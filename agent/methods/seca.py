"""SECA (arXiv 2508.01579): semantic-guided distillation from earlier adapters, prototypes refined by text. No replay.

What is trained: a bottleneck beside every MLP of the image tower, carried on from task to task; context vectors before
the class name, new in each task; a relevance net; the prototypes' refinement. Per task: (1) Cross entropy over the
task's own names under its prompt. (2) SG-AKT: a copy of the bottlenecks after each task joins a pool. For every image
the pool's features are weighted by their relevance to its class's text under all prompts; the aggregate learns the task
too, and the student's answers are held to the aggregate's. (3) SE-VPR: a prototype is the untouched model's class mean,
averaged with those of classes whose names are close; refined prototypes classify the task's images, and those of
earlier classes are kept still. A prediction is the mean of the names' answer (over the kept prompts) and the
prototypes' answer, each a softmax per image.

The publication leaves open or differs from this: pool features are taken in CLIP's joint space, not before the last
norm and projection, so that any tower works; names are compared by the untouched model's text features; the
distillation's weight is the number of tasks before, as published, but at most 9, where the published ten tasks end; a
task of a single class trains nothing and adds no prompt. A class that comes back is refined again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from agent import config
from agent.methods.base import (
    InferenceModule,
    LearnerState,
    OnProgress,
    TaskData,
    TextModule,
    Tokens,
    check_learned,
    task_generator,
)
from agent.methods.classifiers import TowerWithHead
from agent.methods.training import (
    ClassMeans,
    GapWatch,
    Training,
    divergence,
    local_loss,
    untouched_features,
    untrained,
)
from agent.model.clip import Clip
from agent.model.lora import ADAPTED, merged
from agent.values import Update

MAX_DISTILLATION = 9
"""The largest weight of the distillation. As published it is the number of tasks learned before, over ten tasks;
without a bound a stream of hundreds of tasks would end by distilling alone."""


class Seca:
    """It is the method of SECA, in the form of the published code or of the paper (method.seca.form)."""

    name = "seca"

    def __init__(self, clip: Clip, settings: config.Method) -> None:
        self._clip = clip
        self._seed = settings.seed
        self._settings = settings.seca
        generator = task_generator(settings.seed, 0, "seca")
        self._image = BesideTower(clip.image, self._settings.adapter_scale)
        self._text = PromptedText(clip, self._settings.context)
        self._adapter = Tensors(self._image.new(self._settings.bottleneck, generator))
        self._relevance = Relevance(clip.embed_dim, generator, self._settings.form).to(clip.device)
        self._refinement = Refinement(clip.embed_dim, generator).to(clip.device)
        self._means = ClassMeans(clip)
        self._prototypes = self._means.rows
        self._prompts: list[Tensor] = []
        self._pool: list[dict[str, Tensor]] = []
        self._learned = 0
        self._names: Tensor | None = None

    @property
    def fusion(self) -> str:
        return "text+prototypes" if self._settings.se_vpr else "text"

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._means.classes)

    @torch.no_grad()
    def encode_names(self, names: Sequence[str]) -> Tensor:
        """Encode names as the mean over the kept prompts, or by the untouched model before there is one."""
        return F.normalize(self._under_prompts(names).mean(1), dim=-1)

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        return self._encode(tokens, self._adapter.named)

    def update(self, task: TaskData, on_progress: OnProgress) -> Update:
        started = time.perf_counter()
        settings, scale, device = self._settings, self._clip.logit_scale, self._clip.device
        labels = task.labels.to(device)
        watch = GapWatch(self, self._clip, task, self._seed)
        self._means.add(task, untouched_features(self._clip, task))
        self._names = None
        here = torch.tensor([self.classes.index(name) for name in task.classes], device=device)
        words = self._clip.encode_names(self.classes)
        if len(task.classes) == 1:
            self._refine(here, words)
            return untrained(task, watch, started, on_progress)

        context = torch.randn(self._text.shape, generator=task_generator(self._seed, task.number, "context"))
        prompt = nn.Parameter(0.02 * context.to(device))  # the deviation that CoOp and the published code begin with
        nets = {**_parameters("relevance.", self._relevance), **_parameters("refinement.", self._refinement)}
        carried = {**_under("adapter.", self._adapter.named), **nets}
        groups = [
            {"params": list(carried.values()), "lr": settings.lr},
            {"params": [prompt], "lr": settings.prompt_lr},
        ]
        optimizer = torch.optim.Adam(groups, weight_decay=settings.weight_decay)
        ids = self._text.tokenize(task.classes)
        with torch.no_grad():
            earlier_texts = torch.stack([self._text.encode(ids, p) for p in (*self._prompts, prompt)], dim=1)[:, :-1]
            pool = self._pool_features(task.tokens)
        self._prompts.append(prompt)
        training = Training(
            task,
            Tensors({**carried, "prompt": prompt}),
            optimizer,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            decay=lambda epoch, done: 0.1 ** sum(epoch >= milestone for milestone in settings.milestones),
            watch=watch,
            seed=self._seed,
            on_progress=on_progress,
        )
        dropout = torch.Generator(device).manual_seed(task_generator(self._seed, task.number, "dropout").initial_seed())
        back = set(here.tolist())
        old = torch.tensor([i for i in range(len(self._prototypes)) if i not in back], device=device)
        use = torch.full((len(self._pool),), 1 / max(1, len(self._pool)), device=device)
        for epoch in range(training.epochs):
            for index in training.batches(epoch):
                y = labels[index.to(device)]
                images = self._encode(task.tokens.batch(index), self._adapter.named, dropout)
                names = self._text.encode(ids, prompt)
                loss = local_loss(images, names, y, scale)
                if pool is not None:
                    names = names.detach()
                    texts = torch.cat([earlier_texts, names[:, None]], dim=1)[y]
                    aggregate, weights = self._relevance(texts, pool[index.to(device)])
                    loss = loss + local_loss(aggregate, names, y, scale)
                    soft = settings.softness * scale
                    taught = soft * aggregate.detach() @ names.T
                    held = divergence(taught, soft * images @ names.T, temperature=1.0)
                    # The published weight, the number of tasks learned before, would outgrow the task in a long stream.
                    loss = loss + min(self._learned, MAX_DISTILLATION) * held
                    # A momentum of 0.5, as in the published code: batch by batch the early ones count for less.
                    use = 0.5 * use + 0.5 * weights.detach().mean(0)
                if settings.se_vpr:
                    refined = self._refinement(words, self._means.rows)
                    loss = loss + local_loss(images, refined[here], y, scale)
                    if len(old):
                        loss = loss + self._moved(self._prototypes[old], refined[old])
                training.descend(loss, len(index))
            if not training.keep():
                break
        self._prompts[-1] = prompt.detach().clone()
        if training.kept:
            self._learned += 1
            self._prompts = self._prompts[-settings.prompts :]
            self._join_pool(use)
        else:
            self._prompts.pop()
        self._refine(here, words)
        return training.update({"pool": len(self._pool), "prompts": len(self._prompts)})

    def _encode(self, tokens: Tensor, adapter: Mapping[str, Tensor], dropout: torch.Generator | None = None) -> Tensor:
        with self._clip.autocast():
            features = self._image(tokens, adapter, self._settings.dropout, dropout)
        return F.normalize(features.float(), dim=-1)

    def _under_prompts(self, names: Sequence[str], batch: int = 256) -> Tensor:
        """Encode names under every kept prompt, or the untouched one before there is any: float32 [n, prompts, D]."""
        if not self._prompts:
            return self._clip.encode_names(names)[:, None]
        ids = self._text.tokenize(names)
        parts = [torch.stack([self._text.encode(part, p) for p in self._prompts], dim=1) for part in ids.split(batch)]
        return torch.cat(parts)

    def _pool_features(self, tokens: Tokens) -> Tensor | None:
        """Encode a task's images by the pool's adapters: float32 [N, pool, D]; None with nothing to distil from."""
        if not self._pool or not self._settings.sg_akt:
            return None
        parts = []
        for index in torch.arange(len(tokens)).split(256):
            batch = tokens.batch(index)
            parts.append(torch.stack([self._encode(batch, adapter) for adapter in self._pool], dim=1))
        return torch.cat(parts)

    def _join_pool(self, use: Tensor) -> None:
        """Put the adapter as it is now into the pool; `use` [pool] says which one leaves a full pool."""
        if self._settings.sg_akt:
            stay = use.argsort(descending=self._settings.form == "code")[: self._settings.pool - 1]
            self._pool = [*(self._pool[i] for i in sorted(stay.tolist())), self._adapter.tensors()]

    def _moved(self, before: Tensor, now: Tensor) -> Tensor:
        """Give the regulariser L_reg: how far prototypes of earlier classes [n, D] moved, a scalar."""
        cosine = (before * now).sum(-1).mean()
        return 1 - cosine if self._settings.form == "code" else 2 - 2 * cosine

    @torch.no_grad()
    def _refine(self, here: Tensor, words: Tensor) -> None:
        """Set the prototypes of the classes at `here` and of new ones; the others stay as they were."""
        refined = self._refinement(words, self._means.rows)
        rows = torch.cat([self._prototypes, refined[len(self._prototypes) :]])
        rows[here] = refined[here]
        self._prototypes = rows

    @torch.no_grad()
    def inference_module(self) -> InferenceModule:
        check_learned(self.classes)
        if self._names is None:
            self._names = self._under_prompts(self.classes)
        prompts = self._names.shape[1]
        # always the same number of slots, so that a release of a later task reuses the traced graph
        names = F.pad(self._names, (0, 0, 0, self._settings.prompts - prompts))
        weights = torch.zeros(self._settings.prompts, device=names.device)
        weights[:prompts] = 1 / prompts
        prototypes = self._prototypes if self._settings.se_vpr else None
        soft = self._settings.softness * self._clip.logit_scale
        tower = self._image.merged(self._adapter.named)
        return PromptsAndPrototypes(tower, self.classes, names, weights, prototypes, soft)

    def text_module(self) -> TextModule:
        soft = self._settings.softness * self._clip.logit_scale
        if not self._prompts:
            return TextModule(self._clip, merged(self._clip.text, {}), scale=soft)
        return self._text.module(self._prompts, soft)

    def state(self) -> LearnerState:
        tensors = _under("adapter.", self._adapter.named)
        for number, adapter in enumerate(self._pool):
            tensors |= _under(f"pool.{number}.", adapter)
        tensors |= {f"prompts.{number}": prompt for number, prompt in enumerate(self._prompts)}
        tensors |= {**_parameters("relevance.", self._relevance), **_parameters("refinement.", self._refinement)}
        tensors |= {"means": self._means.rows, "prototypes": self._prototypes}
        values = {
            "classes": list(self._means.classes),
            "counts": list(self._means.counts),
            "learned": self._learned,
            "pool": len(self._pool),
            "prompts": len(self._prompts),
        }
        return LearnerState({name: tensor.detach().clone() for name, tensor in tensors.items()}, values)

    def load_state(self, state: LearnerState) -> None:
        values = state.values
        tensors = {name: tensor.to(self._clip.device) for name, tensor in state.tensors.items()}
        self._adapter.load_tensors(_below("adapter.", tensors))
        self._pool = [_below(f"pool.{number}.", tensors) for number in range(values["pool"])]
        prompts = [tensors[f"prompts.{number}"].clone() for number in range(values["prompts"])]
        self._prompts = prompts[-self._settings.prompts :]
        self._relevance.load_state_dict(_below("relevance.", tensors))
        self._refinement.load_state_dict(_below("refinement.", tensors))
        self._means.load(values["classes"], values["counts"], tensors["means"])
        self._prototypes = tensors["prototypes"].clone()
        self._learned = values["learned"]
        self._names = None


class Beside(nn.Module):
    """It is a bottleneck parallel to an MLP: mlp(x) + scale * up(dropout(relu(down(x))))."""

    def __init__(self, mlp: nn.Module, width: int, scale: float) -> None:
        super().__init__()
        self.mlp = mlp
        self.down = nn.Parameter(torch.zeros(1, width), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(width, 1), requires_grad=False)
        self.scale = scale
        self.dropout: tuple[float, torch.Generator] | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(F.linear(x, self.down))
        if self.dropout is not None:
            rate, generator = self.dropout
            hidden = hidden * torch.empty_like(hidden).bernoulli_(1 - rate, generator=generator) / (1 - rate)
        return self.mlp(x) + self.scale * F.linear(hidden, self.up)


class BesideTower:
    """It is an image tower with a bottleneck beside every MLP, on a twin that shares the original's frozen weights."""

    def __init__(self, tower: nn.Module, scale: float) -> None:
        self._twin = merged(tower, {})
        self._widths: dict[str, int] = {}
        for name, weight in tower.named_parameters():
            if name.endswith(ADAPTED):
                block = name.rpartition(".attn.")[0]
                beside = Beside(self._twin.get_submodule(f"{block}.mlp"), weight.shape[1], scale).to(weight.device)
                self._twin.get_submodule(block).mlp = beside
                self._widths[f"{block}.mlp"] = weight.shape[1]

    def new(self, bottleneck: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Make bottlenecks that change nothing yet: down is uniform, up is zero."""
        device = next(self._twin.parameters()).device
        tensors = {}
        for mlp, width in self._widths.items():
            tensors[f"{mlp}.down"] = uniform((bottleneck, width), generator).to(device)
            tensors[f"{mlp}.up"] = torch.zeros(width, bottleneck, device=device)
        return tensors

    def __call__(
        self, tokens: Tensor, adapter: Mapping[str, Tensor], rate: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Encode [B, tokens, width] to [B, D], not normalised, with dropout where a generator is given."""
        for name in self._widths:
            beside = self._twin.get_submodule(name)
            assert isinstance(beside, Beside)
            beside.dropout = (rate, generator) if generator is not None and rate else None
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
    """The frozen text tower under learned context: `vectors` [context, width], then the class name and a full stop."""

    def __init__(self, clip: Clip, context: int) -> None:
        self._clip = clip
        clip.vocabulary  # noqa: B018 - raises unless each placeholder below is one token after the start
        words = clip.text.token_embedding
        assert isinstance(words, nn.Embedding)
        self.shape = (context, words.embedding_dim)
        self.prompt = "x " * context + "{}."
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

    def __init__(self, width: int, generator: torch.Generator, form: str) -> None:
        super().__init__()
        self.norm_text, self.norm_image = nn.LayerNorm(width), nn.LayerNorm(width)
        self.text = nn.Parameter(uniform((width, width), generator))
        self.image = nn.Parameter(uniform((width, width), generator))
        self._form = form

    def forward(self, texts: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
        """Aggregate pool features [B, P, D] by texts [B, prompts, D].

        Gives the aggregate [B, D], L2-normalised, and the weights [B, P] whose rows sum to 1.
        """
        asked = self.norm_text(texts) @ self.text
        offered = self.norm_image(pool) @ self.image
        relevance = asked @ offered.mT / texts.shape[-1] ** 0.5
        if self._form == "code":
            weights = relevance.softmax(-1).mean(1)
        else:
            weights = relevance.mean(1).softmax(-1)
        return F.normalize((weights[:, :, None] * pool).sum(1), dim=-1), weights


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
        at = self.norm_text(words) @ self.text
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


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _parameters(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return _under(prefix, dict(module.named_parameters()))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor.clone() for name, tensor in tensors.items() if name.startswith(prefix)}
