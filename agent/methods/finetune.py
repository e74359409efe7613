"""Sequential fine-tuning: cross entropy over each task's own names, and nothing that preserves. It is the baseline."""

from __future__ import annotations

from agent import config
from agent.methods.base import OnProgress, TaskData
from agent.methods.student import FineTuning
from agent.methods.training import local_loss
from agent.model.clip import Clip
from agent.values import Update


class Finetune(FineTuning):
    """Learns one task after the other by the local loss; what forgetting looks like."""

    name = "finetune"

    def __init__(self, clip: Clip, settings: config.Method) -> None:
        super().__init__(clip, settings, settings.finetune)

    def update(self, task: TaskData, on_progress: OnProgress) -> Update:
        scale, smoothing = self._clip.logit_scale, self._section.label_smoothing
        labels = task.labels.to(self._clip.device)
        ids = self._clip.tokenize(task.classes)
        training = self._training(task, on_progress)
        for epoch in range(training.epochs):
            for index in training.batches(epoch):
                images = self._student.encode_tokens(task.tokens.batch(index))
                names = self._student.encode_ids(ids)
                loss = local_loss(images, names, labels[index.to(labels.device)], scale, smoothing)
                training.descend(loss)
            if not training.keep():
                break
        self._count(task)
        return training.update()
