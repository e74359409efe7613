"""MG-CLIP (Huang et al., ICCV 2025, arXiv 2507.09118): preserve the modality gap, then compensate it. No replay.

Per task: (1) K/V adapters of both towers learn by cross entropy over the task's own class names only; what keeps the
gap is stopping early, by the paper's rule on the first task or by a drift budget watched in every task (under the
paper's rule the first task keeps what its epochs up to the violation learned on a cosine over `epochs`, where the
authors train it once more from the start). (2) With the
towers frozen, a classifier row per class starts as the mean image feature and is trained over the task's rows only.
(3) Predictions fuse both.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
from torch.nn import functional as F

from agent import config
from agent.methods.base import InferenceModule, LearnerState, OnProgress, TaskData, task_generator
from agent.methods.classifiers import CalibratedFusion, FaithfulFusion
from agent.methods.student import Student, StudentMethod
from agent.methods.training import ClassMeans, GapWatch, cosine, local_loss
from agent.model import gap
from agent.model.clip import Clip
from agent.values import Progress, Update

log = logging.getLogger(__name__)


class MgClip(StudentMethod):
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
        watch = GapWatch(self, self._clip, task, self._seed, self._settings.drift_relative_to)
        training = self._preserve(task, watch, on_progress)
        trained = time.perf_counter()
        self._compensate(task, on_progress)
        return Update(
            **training,
            samples=len(task),
            gap_before=watch.before,
            gap_untouched=watch.untouched,
            drift_before=watch.drift(watch.before),
            budget=self._settings.drift_budget,
            seconds={"train": trained - started, "compensate": time.perf_counter() - trained},
        )

    def _preserve(self, task: TaskData, watch: GapWatch, on_progress: OnProgress) -> dict[str, Any]:
        """Adapter training under the gap rule; the last state inside it is what stays."""
        settings, student = self._settings, self._student
        paper = settings.schedule == "paper"
        epochs = settings.epochs if self._epochs_fixed is None or not paper else self._epochs_fixed
        steps = math.ceil(len(task) / settings.batch_size)
        labels = task.labels.to(self._clip.device)
        ids = self._clip.tokenize(task.classes)
        order = task_generator(self._seed, task.number, "order")
        optimizer = torch.optim.Adam(list(student.parameters()), lr=settings.lr)
        inside, after, kept, run, loss, rolled_back = student.tensors(), watch.before, 0, 0, None, False
        drifts: list[float | None] = []
        # one name has nothing to be told apart from: its loss is zero whatever the adapters do
        for epoch in range(epochs if len(task.classes) > 1 else 0):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * cosine(epoch, epoch / epochs)
            total = torch.zeros((), device=labels.device)
            for step, index in enumerate(torch.randperm(len(task), generator=order).split(settings.batch_size), 1):
                images = student.encode_tokens(task.tokens.batch(index))
                names = student.encode_ids(ids)
                step_loss = local_loss(images, names, labels[index.to(labels.device)], self._clip.logit_scale)
                optimizer.zero_grad(set_to_none=True)
                step_loss.backward()
                optimizer.step()
                total += step_loss.detach() * len(index)
                place = (epoch + 1, epochs, step, steps, epoch * len(task) + step * settings.batch_size)
                drift = drifts[-1] if drifts else watch.drift(watch.before)
                on_progress(Progress("train", task.number, *place, step_loss.item(), drift, settings.drift_budget))
            run += 1
            statistics = watch.measure()
            drift = watch.drift(statistics)
            epoch_loss = (total / len(task)).item()
            finite = all(map(math.isfinite, (epoch_loss, statistics.positive, statistics.centroid)))
            drifts.append(drift if finite else math.inf)
            if paper and self._epochs_fixed is None and finite:
                self._epochs_fixed = gap.paper_epochs(drifts, settings.drift_budget)
                if self._epochs_fixed is not None and epoch > 0:
                    rolled_back = True
                    break
            # where the budget is used up already, an update that drifts no further is inside it
            bound = max(settings.drift_budget, watch.drift(watch.before) or 0)
            crossed = not paper and drift is not None and drift > bound
            if not finite or crossed:
                rolled_back = True
                break
            inside, after, kept, loss = student.tensors(), statistics, run, epoch_loss
            if paper and self._epochs_fixed is not None and run >= self._epochs_fixed:
                break
        if rolled_back:
            log.warning(
                "task %d: epoch %d was rolled back (drift %s, budget %g); %d of %d epochs are kept",
                task.number, run, drifts[-1], settings.drift_budget, kept, run,
            )  # fmt: skip
            student.load_tensors(inside)
        if paper and self._epochs_fixed is None and run == epochs and len(task.classes) > 1:
            self._epochs_fixed = epochs
        return {
            "epochs": kept,
            "epochs_run": run,
            "steps": run * steps,
            "loss": loss,
            "rolled_back": rolled_back,
            "gap_after": after,
            "drift_after": watch.drift(after),
            "details": {
                "fusion": settings.fusion,
                "schedule": settings.schedule,
                "epochs_fixed": self._epochs_fixed,
                "drift_relative_to": settings.drift_relative_to,
                "drifts": [value if value is None or math.isfinite(value) else None for value in drifts],
            },
        }

    def _compensate(self, task: TaskData, on_progress: OnProgress) -> None:
        """A row per class: means of the features, running ones for a class that comes back, then local training."""
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
        if not self.classes:
            raise LookupError("no class has been learned yet; there is nothing to infer with")
        fusion = FaithfulFusion if self._settings.fusion == "faithful" else CalibratedFusion
        tower, names = self._student.merged_image_tower(), self.encode_names(self.classes)
        return fusion(tower, self.classes, names, self._visual.rows, self._clip.logit_scale)

    def state(self) -> LearnerState:
        tensors = {**self._student.tensors(), "rows": self._visual.rows.clone()}
        facts = {"classes": list(self.classes), "counts": list(self._visual.counts), "epochs_fixed": self._epochs_fixed}
        return LearnerState(tensors, facts)

    def load_state(self, state: LearnerState) -> None:
        self._student.load_tensors(state.tensors)
        self._visual.load(state.facts["classes"], state.facts["counts"], state.tensors["rows"])
        self._epochs_fixed = state.facts["epochs_fixed"]
