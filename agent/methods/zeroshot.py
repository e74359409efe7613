"""The untouched model, which only learns the names: what every update is measured against."""

from __future__ import annotations

import time

from agent import config
from agent.methods.base import InferenceModule, LearnerState, OnProgress, TaskData, check_learned
from agent.methods.classifiers import TextHead
from agent.methods.training import GapWatch, UntouchedMethod, admit, untrained
from agent.model.clip import Clip
from agent.model.lora import merged
from agent.values import Update


class ZeroShot(UntouchedMethod):
    """Learns the names of the classes, and nothing else."""

    name = "zeroshot"
    fusion = "text"

    def __init__(self, clip: Clip, settings: config.Method) -> None:
        self._clip = clip
        self._seed = settings.seed
        self._classes: list[str] = []

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._classes)

    def update(self, task: TaskData, on_progress: OnProgress) -> Update:
        started = time.perf_counter()
        watch = GapWatch(self, self._clip, task, self._seed, moved=False)
        admit(self._classes, task)
        return untrained(task, watch, started, on_progress)

    def inference_module(self) -> InferenceModule:
        check_learned(self.classes)
        names = self.encode_names(self._classes)
        return TextHead(merged(self._clip.image, {}), self.classes, names, self._clip.logit_scale)

    def state(self) -> LearnerState:
        return LearnerState({}, {"classes": list(self._classes)})

    def load_state(self, state: LearnerState) -> None:
        self._classes = list(state.values["classes"])
