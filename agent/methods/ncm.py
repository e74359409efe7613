"""Nearest class mean (SimpleCIL, arXiv 2303.07338): mean features of the untouched model, compared by cosine."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agent import config
from agent.methods.base import Counted, InferenceModule, LearnerState, OnProgress, TaskData, check_learned
from agent.methods.classifiers import TowerWithHead
from agent.methods.training import ClassMeans, GapWatch, UntouchedMethod, untouched_features, untrained
from agent.model.clip import Clip
from agent.model.lora import merged
from agent.values import Update


class NearestMean(TowerWithHead):
    """Predicts softmax(scale * cosine to the class means)."""

    means: Tensor

    def __init__(self, tower: nn.Module, classes: tuple[str, ...], means: Tensor, scale: float) -> None:
        super().__init__(tower, classes)
        self._rows("means", F.normalize(means, dim=-1))
        self.scale = scale

    def score(self, embedding: Tensor) -> Tensor:
        return torch.softmax(self.scale * embedding @ self.means.T, dim=-1)


class Ncm(UntouchedMethod):
    """Learns the mean feature of every class by the untouched model, and nothing else."""

    name = "ncm"
    fusion = "visual"

    def __init__(self, clip: Clip, settings: config.Method) -> None:
        self._clip = clip
        self._seed = settings.seed
        self._means = ClassMeans(clip)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._means.classes)

    def update(self, task: TaskData, on_progress: OnProgress) -> Update:
        started = time.perf_counter()
        watch = GapWatch(self, self._clip, task, self._seed, moved=False)
        self._means.add(task, untouched_features(self._clip, task))
        return untrained(task, watch, started, on_progress)

    def counted(self, task: TaskData, index: Tensor) -> Counted:
        """Compute what some images of a task, int64 [n], are counted by."""
        features = torch.cat([self._clip.encode_tokens(task.tokens.batch(part)) for part in index.split(256)])
        return Counted(features, features[:, :0], task.names(index))

    def inference_module(self) -> InferenceModule:
        check_learned(self.classes)
        means = self._means.rows
        return NearestMean(merged(self._clip.image, {}), self.classes, means, self._clip.logit_scale)

    def state(self) -> LearnerState:
        values = {"classes": list(self._means.classes), "counts": list(self._means.counts)}
        return LearnerState({"means": self._means.rows.clone()}, values)

    def load_state(self, state: LearnerState) -> None:
        self._means.load(state.values["classes"], state.values["counts"], state.tensors["means"])
