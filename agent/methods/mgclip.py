"""MG-CLIP (Huang et al., ICCV 2025, arXiv 2507.09118): preserve the modality gap, then compensate it. No replay.

Per task: (1) K/V adapters of both towers learn by cross entropy over the task's own class names only; what keeps the
gap is stopping early: by a drift budget watched in every task, or by the paper's rule, under which a dry run on the
first task says how many epochs it and every later task get. (2) With the towers frozen, a classifier row per class
starts as the mean image feature and is trained over the task's rows only. (3) Predictions fuse both.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.nn import functional as F

from agent import config
from agent.methods.base import InferenceModule, LearnerState, OnProgress, TaskData, check_learned, task_generator
from agent.methods.classifiers import CalibratedFusion, FaithfulFusion
from agent.methods.student import Student, StudentMethod
from agent.methods.training import ClassMeans, GapWatch, Training, cosine, local_loss
from agent.model.clip import Clip
from agent.model.gap import paper_epochs, within_budget
from agent.values import Progress, Update

log = logging.getLogger(__name__)


class MgClip(StudentMethod):
    """It is the method of MG-CLIP, in its published form or with the gap budget watched in every task."""

    name = "mgclip"

    def __init__(self, clip: Clip, settings: config.Method) -> None:
        self._clip = clip
        self._seed = settings.seed
        self._settings = settings.mgclip
        self._student = Student(clip, settings.lora, settings.seed)
        self._visual = ClassMeans(clip)
        """The classifier's rows: they begin as class means and are then trained."""
        self._epochs_fixed: int | None = None

    @property
    def fusion(self) -> str:
        return self._settings.fusion

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._visual.classes)

    def update(self, task: TaskData, on_progress: OnProgress) -> Update:
        started = time.perf_counter()
        training = self._preserve(task, on_progress)
        trained = time.perf_counter()
        self._compensate(task, on_progress)
        settings = self._settings
        details = {
            "fusion": settings.fusion,
            "schedule": settings.schedule,
            "epochs_fixed": self._epochs_fixed,
            "drift_relative_to": settings.drift_relative_to,
            "drifts": [value if value is None or math.isfinite(value) else None for value in training.drifts],
        }
        seconds = {"train": trained - started, "compensate": time.perf_counter() - trained}
        return replace(training.update(details), seconds=seconds)

    def _preserve(self, task: TaskData, on_progress: OnProgress) -> Training:
        """Train the adapters under the gap rule; the last state inside it is what stays."""
        settings = self._settings
        if settings.schedule == "paper" and self._epochs_fixed is None and len(task.classes) > 1:
            self._epochs_fixed = self._dry_run(task, on_progress)
        watch = GapWatch(self, self._clip, task, self._seed, settings.drift_relative_to)
        if settings.schedule == "paper":
            return self._train(task, on_progress, watch, self._epochs_fixed or 0, lambda drifts: True)
        before = watch.drift(watch.before)
        return self._train(
            task,
            on_progress,
            watch,
            settings.epochs,
            lambda drifts: within_budget(drifts[-1], before, settings.drift_budget),
        )

    def _dry_run(self, task: TaskData, on_progress: OnProgress) -> int:
        """Find the number of epochs of every task: those that the first one is trained for before the gap, measured on
        all its images, drifts too far; at least 1, and `epochs` where it never does. The adapters are as before then.
        """
        settings, before = self._settings, self._student.tensors()
        watch = GapWatch(self, self._clip, task, self._seed, settings.drift_relative_to, samples=len(task))
        training = self._train(
            task,
            on_progress,
            watch,
            settings.epochs,
            lambda drifts: paper_epochs(drifts, settings.drift_budget) is None,
        )
        self._student.load_tensors(before)
        epochs = paper_epochs(training.drifts, settings.drift_budget) or settings.epochs
        log.info("task %d: a dry run drifted by %s; every task gets %d epochs", task.number, training.drifts, epochs)
        return epochs

    def _train(
        self,
        task: TaskData,
        on_progress: OnProgress,
        watch: GapWatch,
        epochs: int,
        inside: Callable[[Sequence[float | None]], bool],
    ) -> Training:
        """Train the adapters for `epochs`, or until the first one after which the drifts are not `inside`."""
        settings, student, scale = self._settings, self._student, self._clip.logit_scale
        labels = task.labels.to(self._clip.device)
        ids = self._clip.tokenize(task.classes)
        training = Training(
            task,
            student,
            torch.optim.Adam(list(student.parameters()), lr=settings.lr),
            epochs=epochs,
            batch_size=settings.batch_size,
            decay=lambda epoch, done: cosine(epoch, epoch / epochs),
            watch=watch,
            seed=self._seed,
            on_progress=on_progress,
            budget=settings.drift_budget,
        )
        for epoch in range(training.epochs):
            for index in training.batches(epoch):
                images = student.encode_tokens(task.tokens.batch(index))
                names = student.encode_ids(ids)
                training.descend(local_loss(images, names, labels[index.to(labels.device)], scale))
            if not training.keep(inside):
                break
        return training

    def _compensate(self, task: TaskData, on_progress: OnProgress) -> None:
        """Train a row per class over the task's rows alone, from means of the features (equation 6).

        A class that comes back moves as a running mean first.
        """
        settings, labels = self._settings, task.labels.to(self._clip.device)
        features = self._student.features(task.tokens, tick=lambda: on_progress(Progress("compensate", task.number)))
        self._visual.add(task, features)
        if len(task.classes) == 1:
            return
        where = torch.tensor([self._visual.classes.index(name) for name in task.classes], device=labels.device)
        rows = self._visual.rows[where].clone().requires_grad_()
        optimizer = torch.optim.Adam([rows], lr=settings.visual_lr)
        order = task_generator(self._seed, task.number, "visual order")
        steps = settings.visual_epochs * math.ceil(len(task) / settings.visual_batch_size)
        step = 0
        for epoch in range(settings.visual_epochs):
            for index in torch.randperm(len(task), generator=order).split(settings.visual_batch_size):
                optimizer.param_groups[0]["lr"] = settings.visual_lr * cosine(epoch, step / steps)
                index = index.to(labels.device)
                loss = local_loss(features[index], F.normalize(rows, dim=-1), labels[index], 1.0)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                step += 1
            on_progress(
                Progress("compensate", task.number, epoch + 1, settings.visual_epochs, step, steps, loss=loss.item())
            )
        self._visual.rows[where] = rows.detach()

    def inference_module(self) -> InferenceModule:
        check_learned(self.classes)
        fusion = FaithfulFusion if self._settings.fusion == "faithful" else CalibratedFusion
        tower, names = self._student.merged_image_tower(), self.encode_names(self.classes)
        return fusion(tower, self.classes, names, self._visual.rows, self._clip.logit_scale)

    def state(self) -> LearnerState:
        tensors = {**self._student.tensors(), "rows": self._visual.rows.clone()}
        counts = list(self._visual.counts)
        values = {"classes": list(self.classes), "counts": counts, "epochs_fixed": self._epochs_fixed}
        return LearnerState(tensors, {**values, "fusion": self._settings.fusion})  # for who merges it

    def load_state(self, state: LearnerState) -> None:
        self._student.load_tensors(state.tensors)
        self._visual.load(state.values["classes"], state.values["counts"], state.tensors["rows"])
        self._epochs_fixed = state.values["epochs_fixed"]
