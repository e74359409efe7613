"""Sequential fine-tuning: cross entropy over each task's own names, and nothing that preserves: the baseline."""

from __future__ import annotations

import torch

from agent import config
from agent.methods.base import InferenceModule, LearnerState, OnProgress, TaskData
from agent.methods.classifiers import TextClassifier
from agent.methods.student import Student, StudentMethod
from agent.methods.training import GapWatch, Training, admit, cosine, local_loss
from agent.model.clip import Clip
from agent.values import Update


class Finetune(StudentMethod):
    name = "finetune"
    fusion = "text"

    def __init__(self, clip: Clip, settings: config.Method) -> None:
        self._clip = clip
        self._seed = settings.seed
        self._settings = settings.finetune
        self._student = Student(clip, settings.lora, settings.seed, self._settings.trainable)
        self._classes: list[str] = []

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._classes)

    def update(self, task: TaskData, on_progress: OnProgress) -> Update:
        settings, scale = self._settings, self._clip.logit_scale
        labels = task.labels.to(self._clip.device)
        ids = self._clip.tokenize(task.classes)
        training = Training(
            task,
            self._student,
            torch.optim.Adam(list(self._student.parameters()), lr=settings.lr),
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            decay=cosine,
            watch=GapWatch(self, self._clip, task, self._seed),
            seed=self._seed,
            on_progress=on_progress,
        )
        for epoch in range(training.epochs):
            for index in training.batches(epoch):
                images = self._student.encode_tokens(task.tokens.batch(index))
                names = self._student.encode_ids(ids)
                loss = local_loss(images, names, labels[index.to(labels.device)], scale, settings.label_smoothing)
                training.descend(loss, len(index))
            if not training.keep():
                break
        admit(self._classes, task)
        return training.update()

    def inference_module(self) -> InferenceModule:
        if not self._classes:
            raise LookupError("no class has been learned yet; there is nothing to infer with")
        names = self.encode_names(self._classes)
        return TextClassifier(self._student.merged_image_tower(), self.classes, names, self._clip.logit_scale)

    def state(self) -> LearnerState:
        return LearnerState(self._student.tensors(), {"classes": list(self._classes)})

    def load_state(self, state: LearnerState) -> None:
        self._student.load_tensors(state.tensors)
        self._classes = list(state.facts["classes"])
