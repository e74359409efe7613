"""BOFA (Li et al., AAAI 2026, arXiv 2511.11421): only the image tower's last projection learns, where it forgets least.

What comes before that projection stays as it is, so its features, their means per class and their scatter are exact
for all tasks. Per task: (1) The whole projection is trained, by cross entropy over prototypes of all classes so far,
each between a class's name and its mean image. (2) From the second task on, the change is confined to the directions in
which the earlier tasks' features have the smallest scatter, and is trained there for some further epochs. (3) The
prototypes follow from the new projection. No replay.

Not as published: an image is compared with the prototypes of all classes, without the classifiers, one of each task,
that narrow them down first; there is no weight decay. A tower without such a projection gets one behind its features
that begins as the identity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from agent import config
from agent.methods.base import InferenceModule, LearnerState, OnProgress, TaskData, TextModule, check_learned
from agent.methods.classifiers import TextHead
from agent.methods.training import ClassMeans, GapWatch, Training, cosine
from agent.model import ranks
from agent.model.clip import Clip
from agent.model.lora import merged
from agent.values import Update

PROJECTION = "visual.proj"
"""How open_clip's own image tower names its last projection, [width, D]."""
SHARES = 21
"""The share of the images in a prototype is one of this number from 0 to 1, as in the published code."""
INERTIA = 0.95
"""A step keeps this much of the images' part of the prototypes, the rest follows the projection; as published."""


class Bofa:
    """Trains the image tower's last projection, and predicts by prototypes between names and class means."""

    name = "bofa"
    fusion = "prototype"

    def __init__(self, clip: Clip, settings: config.Method) -> None:
        self._clip = clip
        self._seed = settings.seed
        self._settings = settings.bofa
        found = dict(clip.image.named_parameters()).get(PROJECTION)
        self._untouched = torch.eye(clip.embed_dim, device=clip.device) if found is None else found.float()
        width = len(self._untouched)
        self._bare = {} if found is None else {PROJECTION: torch.eye(width, device=clip.device)}
        """What stands in for the tower's own weights, so that it gives the features before its projection."""
        self._projection = Projection(clip, self._untouched)
        self._means = ClassMeans(clip, width)
        self._scatter = torch.zeros(width, width, device=clip.device)
        """Sum over all images of the outer product of their features with themselves, float32 [width, width]."""
        self._share: float | None = None
        """The share of the images in a prototype; None until a task has two classes to choose it by."""

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._means.classes)

    def update(self, task: TaskData, on_progress: OnProgress) -> Update:
        rows = ranks.encoded(task.tokens, torch.arange(len(task)), self._features, 256)
        # The trained part begins at these features, as that of other methods does at tokens.
        task = replace(task, tokens=Features(rows))
        self._means.add(task, rows)
        if self._share is None and len(task.classes) > 1:
            self._share = self._best_share(task, rows)
        training = self._train(task, on_progress)
        self._projection.fuse()
        self._scatter.addmm_(rows.T, rows)
        return training.update({"share": self._share})

    def _train(self, task: TaskData, on_progress: OnProgress) -> Training:
        """Train the projection: whole, and then, where there is something to forget, in safe directions alone."""
        settings, projection, scale = self._settings, self._projection, self._clip.logit_scale
        safe, whole = self._safe_directions(), settings.epochs
        optimizer = torch.optim.SGD([projection.change], lr=settings.lr, momentum=0.9)
        training = Training(
            task,
            projection,
            optimizer,
            epochs=whole if safe is None else whole + settings.safe_epochs,
            batch_size=settings.batch_size,
            decay=lambda epoch, done: cosine(epoch, epoch / whole) if epoch < whole else settings.safe_lr / settings.lr,
            watch=GapWatch(projection, Projection(self._clip, self._untouched), task, self._seed),
            seed=self._seed,
            on_progress=on_progress,
        )
        where = torch.tensor([self._means.classes.index(name) for name in task.classes])
        labels = where[task.labels].to(self._clip.device)
        names, visual = self._clip.encode_names(self.classes), self._visual()
        for epoch in range(training.epochs):
            if epoch == whole:
                projection.directions = safe
                optimizer.state.clear()
            for index in training.batches(epoch):
                visual = INERTIA * visual + (1 - INERTIA) * self._visual()
                images = projection(task.tokens.batch(index))
                loss = F.cross_entropy(scale * images @ self._mixed(names, visual).T, labels[index.to(labels.device)])
                training.descend(loss)
            if not training.keep():
                break
        projection.directions = safe
        return training

    def _safe_directions(self) -> Tensor | None:
        """Find the directions in which earlier tasks' features have the least scatter: [width, rank], orthonormal.

        None where nothing was learned yet."""
        if not self._scatter.any():
            return None
        return torch.linalg.eigh(self._scatter.double()).eigenvectors[:, : self._settings.rank].float()

    @torch.no_grad()
    def _visual(self) -> Tensor:
        """Project the class means as the projection is now: float32 [C, D], L2-normalised."""
        return self._projection(self._means.rows)

    def _mixed(self, names: Tensor, visual: Tensor, share: float | None = None) -> Tensor:
        """Mix prototypes [C, D] of names and of images, by the share chosen for the latter or half and half."""
        share = share if share is not None else 0.5 if self._share is None else self._share
        return (1 - share) * names + share * visual

    @torch.no_grad()
    def _best_share(self, task: TaskData, rows: Tensor) -> float:
        """Find the share of the images that is right most often on a task; of equals the smallest, as published."""
        where = [self._means.classes.index(name) for name in task.classes]
        names, visual = self._clip.encode_names(task.classes), self._visual()[where]
        images, truth = self._projection(rows), task.labels.to(rows.device)
        shares = torch.linspace(0, 1, SHARES).tolist()
        right = [(images @ self._mixed(names, visual, share).T).argmax(1).eq(truth).sum().item() for share in shares]
        return shares[right.index(max(right))]

    @torch.no_grad()
    def _features(self, tokens: Tensor) -> Tensor:
        """Compute the features before the projection: tokens [B, tokens, width] -> float32 [B, width]."""
        with self._clip.autocast():
            return functional_call(self._clip.image, self._bare, (tokens.to(self._clip.device),)).float()

    def encode_names(self, names: Sequence[str]) -> Tensor:
        return self._clip.encode_names(names)

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        return self._projection(self._features(tokens))

    def text_module(self) -> TextModule:
        return TextModule(self._clip, merged(self._clip.text, {}))

    def inference_module(self) -> InferenceModule:
        check_learned(self.classes)
        tower = Projected(merged(self._clip.image, self._bare), self._projection.weight)
        prototypes = self._mixed(self.encode_names(self.classes), self._visual())
        return TextHead(tower, self.classes, prototypes, self._clip.logit_scale)

    def state(self) -> LearnerState:
        tensors = {
            "projection": self._projection.weight.clone(),
            "means": self._means.rows.clone(),
            "scatter": self._scatter.clone(),
            "share": torch.tensor([] if self._share is None else [self._share], dtype=torch.float64),
        }
        return LearnerState(tensors, {"classes": list(self.classes), "counts": list(self._means.counts)})

    def load_state(self, state: LearnerState) -> None:
        self._projection.weight = state.tensors["projection"].to(self._clip.device).clone()
        self._means.load(state.values["classes"], state.values["counts"], state.tensors["means"])
        self._scatter = state.tensors["scatter"].to(self._clip.device).clone()
        self._share = next(iter(state.tensors["share"].tolist()), None)


class Features:
    """They are a task's features before the projection, in the place of tokens: float32 [N, width]."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.owners = ranks.dealt(len(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Tensor) -> Tensor:
        return self.rows[index.to(self.rows.device)]


class Projection:
    """It is a projection that learns: features [B, width] -> float32 [B, D], L2-normalised."""

    def __init__(self, clip: Clip, weight: Tensor) -> None:
        self._clip = clip
        self.weight = weight.clone()
        """[width, D], as it was before the task."""
        self.change = nn.Parameter(torch.zeros_like(weight))
        """What the task adds to it. Trained through `directions`, it is what the published B is, for plain gradients:
        directions @ B is this, confined."""
        self.directions: Tensor | None = None
        """The change is confined to these, [width, rank], orthonormal; None confines nothing."""

    def __call__(self, features: Tensor) -> Tensor:
        embedding = features @ self._now()
        norm = torch.linalg.vector_norm(embedding, dim=-1, keepdim=True)
        # Divided by an infinite norm, what overflowed would be 0 and pass for a feature.
        return embedding / norm.clamp_min(1e-12).where(norm.isfinite(), math.nan)

    def _now(self) -> Tensor:
        if self.directions is None:
            return self.weight + self.change
        return self.weight + self.directions @ (self.directions.T @ self.change)

    @torch.no_grad()
    def fuse(self) -> None:
        """Make the change, as far as it is confined, part of the weight."""
        self.weight = self._now()
        self.change.zero_()
        self.directions = None

    def encode_names(self, names: Sequence[str]) -> Tensor:
        return self._clip.encode_names(names)

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        return self(tokens)

    def tensors(self) -> dict[str, Tensor]:
        return {"change": self.change.detach().clone()}

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.change.copy_(tensors["change"])


class Projected(nn.Module):
    """It is an image tower with a projection behind it."""

    def __init__(self, tower: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.tower: Any = tower
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)

    def prefix(self, images: Tensor) -> Tensor:
        """Encode preprocessed images [B, 3, H, W] to tokens [B, tokens, width]."""
        return self.tower.prefix(images)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode tokens [B, tokens, width] to features [B, D], not normalised."""
        return self.tower(tokens).float() @ self.weight
