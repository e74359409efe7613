"""RanPAC (McDonnell et al., NeurIPS 2023, arXiv 2307.02251): ridge regression on random features. No replay.

Per task: (1) The untouched model's embeddings become random features, ReLU of one fixed random projection. (2) Their
Gram matrix and their sums per class are added to those of earlier tasks, which is exact. (3) The ridge is the power of
ten that errs least on a fifth of the task's images, by weights of the other four fifths. (4) The weights of all classes
so far follow in closed form.

Not as published: there is no training of adapters on the first task (its "phase 1"), and embeddings are L2-normalised,
as a CLIP compares them.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agent import config
from agent.methods.base import InferenceModule, LearnerState, OnProgress, TaskData, check_learned, task_generator
from agent.methods.classifiers import TowerWithHead
from agent.methods.training import GapWatch, UntouchedMethod, admit, packed, unpack, untouched_features, untrained
from agent.model import ranks
from agent.model.clip import Clip
from agent.model.lora import merged
from agent.values import Progress, Update

RIDGES = tuple(10.0**power for power in range(-8, 9))
"""The ridge is one of these, as in the published code."""
HELD = 0.2
"""This share of a task's images says which ridge is best, as in the published code."""
RIDGE_IMAGES = 5000
"""At most this many images of a task choose the ridge, so that larger tasks cost no more: 0.5 GB of memory."""
BATCH = 1024
"""Images whose random features are in memory at once, chosen by hand: each batch updates the whole Gram matrix, which
costs less for many images together."""


class RanPac(UntouchedMethod):
    """Learns ridge regression from random features of the untouched model's embeddings to the classes."""

    name = "ranpac"
    fusion = "ridge"

    def __init__(self, clip: Clip, settings: config.Method) -> None:
        self._clip = clip
        self._seed = settings.seed
        features, generator = settings.ranpac.features, task_generator(settings.seed, 0, "random projection")
        self._projection = torch.randn(clip.embed_dim, features, generator=generator).to(clip.device)
        self._gram = torch.zeros(features, features, device=clip.device)
        """Sum over all images of the outer product of their features with themselves, float32 [M, M]; only its lower
        triangle is read, and saved."""
        self._sums = torch.zeros(0, features, device=clip.device)
        """Sum of the features of every class's images, float32 [C, M]."""
        self._ridge = RIDGES[len(RIDGES) // 2]
        """The last task's; 1, the middle, until a task has enough images to choose one."""
        self._classes: list[str] = []

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._classes)

    @torch.no_grad()
    def update(self, task: TaskData, on_progress: OnProgress) -> Update:
        started = time.perf_counter()
        watch = GapWatch(self, self._clip, task, self._seed, moved=False)
        embeddings = untouched_features(self._clip, task)
        admit(self._classes, task)
        self._sums = F.pad(self._sums, (0, 0, 0, len(self._classes) - len(self._sums)))
        where = torch.tensor([self._classes.index(name) for name in task.classes])
        if ranks.rank():  # what was counted before is in the sum over the ranks once
            self._gram.zero_()
            self._sums.zero_()
        for index in ranks.mine(task.tokens, torch.arange(len(task))).split(BATCH):
            features = F.relu(embeddings[index.to(embeddings.device)] @ self._projection)
            self._gram.addmm_(features.T, features)
            self._sums.index_add_(0, where[task.labels[index]].to(features.device), features)
            on_progress(Progress("train", task.number, samples=int(index[-1]) + 1 if len(index) else 0))
        ranks.summed(self._gram)
        ranks.summed(self._sums)
        self._ridge = self._best_ridge(task, embeddings)
        return replace(untrained(task, watch, started, on_progress), details={"ridge": self._ridge})

    def _best_ridge(self, task: TaskData, embeddings: Tensor) -> float:
        """Give the ridge with the least squared error on held images of the task; the last task's where it has too few.

        Weights for all ridges follow from one eigendecomposition, of the images' inner products: the same weights as
        those of the features' Gram matrix, and much less work where a task has fewer images than features.
        """
        generator = task_generator(self._seed, task.number, "held for the ridge")
        chosen = torch.randperm(len(task), generator=generator)[:RIDGE_IMAGES]
        held = int(HELD * len(chosen))
        if not held:
            return self._ridge
        chosen = chosen.to(embeddings.device)
        features = F.relu(embeddings[chosen] @ self._projection)
        truth = F.one_hot(task.labels.to(embeddings.device)[chosen], len(task.classes)).double()
        inner = (features @ features[held:].T).double()
        values, vectors = torch.linalg.eigh(inner[held:])
        learned, unseen = vectors.T @ truth[held:], inner[:held] @ vectors
        divisors = (values.clamp_min(0)[:, None] + ridge for ridge in RIDGES)
        errors = [(unseen @ (learned / divisor) - truth[:held]).square().mean().item() for divisor in divisors]
        return RIDGES[errors.index(min(errors))]

    def _weights(self) -> Tensor:
        """Solve (Gram + ridge) weights = sums: [C, M], by Cholesky.

        A ridge so small that rounding leaves no positive matrix is raised, a power of ten at a time.
        """
        for ridge in RIDGES[RIDGES.index(self._ridge) :]:
            shrunk = self._gram.clone()
            shrunk.diagonal().add_(ridge)
            factor, failed = torch.linalg.cholesky_ex(shrunk)
            if not failed:
                return torch.cholesky_solve(self._sums.T, factor).T
        raise torch.linalg.LinAlgError(f"the features' Gram matrix plus a ridge of {ridge:g} has no Cholesky factor")

    @torch.no_grad()
    def inference_module(self) -> InferenceModule:
        check_learned(self.classes)
        tower, scale = merged(self._clip.image, {}), self._clip.logit_scale
        return Ridge(tower, self.classes, scale * self._weights(), self._projection)

    def state(self) -> LearnerState:
        tensors = {
            "projection": self._projection.clone(),
            "gram": packed(self._gram),
            "sums": self._sums.clone(),
            "ridge": torch.tensor(self._ridge, dtype=torch.float64),
        }
        return LearnerState(tensors, {"classes": list(self._classes)})

    def load_state(self, state: LearnerState) -> None:
        tensors = {name: tensor.to(self._clip.device) for name, tensor in state.tensors.items()}
        self._projection = tensors["projection"].clone()
        self._sums = tensors["sums"].clone()
        unpack(tensors["gram"], self._gram)
        self._ridge = state.tensors["ridge"].item()
        self._classes = list(state.values["classes"])


class Ridge(TowerWithHead):
    """Predicts softmax(random features @ rows).

    It ranks as the published regression does; probabilities are not published, these are at CLIP's temperature.
    """

    rows: Tensor
    projection: Tensor

    def __init__(self, tower: nn.Module, classes: tuple[str, ...], rows: Tensor, projection: Tensor) -> None:
        """Take rows [C, M], scaled, and the random projection [D, M]."""
        super().__init__(tower, classes)
        self._rows("rows", rows)
        self.register_buffer("projection", projection.clone())

    def score(self, embedding: Tensor) -> Tensor:
        return torch.softmax(F.relu(embedding @ self.projection) @ self.rows.T, dim=-1)
