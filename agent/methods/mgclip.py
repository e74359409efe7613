"""MG-CLIP (Huang et al., ICCV 2025, arXiv 2507.09118): preserve the modality gap, then compensate it. No replay.

Per task: (1) K/V adapters of both towers learn by cross entropy over the task's own class names only; what keeps the
gap is stopping early, by the paper's rule on the first task or by a drift budget watched in every task. (2) With the
towers frozen, a classifier row per class starts as the mean image feature and is trained over the task's rows only.
(3) Predictions fuse both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from agent import config, gap
from agent.clip import Clip
from agent.methods.base import InferenceModule, LearnerState, Report, TaskData, task_generator
from agent.methods.heads import CalibratedFusion, FaithfulFusion
from agent.methods.student import Student
from agent.values import GapStatistics, Progress, Update

GAP_SAMPLES = 256
"""Images the gap is measured on in each task; the same before and after, so that their spread cancels in the drift."""


class MgClip:
    name = "mgclip"

    def __init__(self, clip: Clip, settings: config.Method) -> None:
        self._clip = clip
        self._seed = settings.seed
        self._settings = settings.mgclip
        self._student = Student(clip, settings.lora, settings.seed)
        self._classes: list[str] = []
        self._counts: list[int] = []
        self._rows = torch.zeros(0, clip.embed_dim, device=clip.device)
        self._epochs_fixed: int | None = None

    @property
    def fusion(self) -> str:
        return self._settings.fusion

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._classes)

    def encode_names(self, names: Sequence[str]) -> Tensor:
        return self._student.encode_names(names)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self._student.encode_tokens(tokens)

    def update(self, task: TaskData, report: Report) -> Update:
        started = time.perf_counter()
        labels = task.labels.to(self._clip.device)
        generator = task_generator(self._seed, task.number, "gap")
        sample = torch.randperm(len(task), generator=generator)[:GAP_SAMPLES].sort().values
        tokens = task.tokens.batch(sample)
        untouched = gap.statistics(
            self._clip.encode_tokens(tokens), self._clip.encode_names(task.classes), labels[sample]
        )

        def measure() -> GapStatistics:
            return gap.statistics(self.encode_tokens(tokens), self.encode_names(task.classes), labels[sample])

        before = measure()
        training = self._preserve(task, labels, before, untouched, measure, report)
        trained = time.perf_counter()
        self._compensate(task, labels, report)
        return Update(
            **training,
            samples=len(task),
            gap_before=before,
            gap_untouched=untouched,
            drift_before=self._drift(before, untouched),
            budget=self._settings.drift_budget,
            seconds={"train": trained - started, "compensate": time.perf_counter() - trained},
        )

    def _drift(self, now: GapStatistics, untouched: GapStatistics) -> float | None:
        return gap.drift(now, untouched, self._settings.drift_relative_to)

    def _preserve(self, task, labels, before, untouched, measure, report) -> dict:
        """Adapter training under the gap rule; the last state inside it is what stays."""
        settings = self._settings
        paper = settings.schedule == "paper"
        epochs = settings.epochs if self._epochs_fixed is None or not paper else self._epochs_fixed
        steps = math.ceil(len(task) / settings.batch_size)
        ids = self._clip.tokenize(task.classes)
        order = task_generator(self._seed, task.number, "order")
        optimizer = torch.optim.Adam(list(self._student.parameters()), lr=settings.lr)
        inside, after, kept, run, loss, rolled_back = self._student.tensors(), before, 0, 0, None, False
        drifts: list[float | None] = []
        # one name has nothing to be told apart from: its loss is zero whatever the adapters do
        for epoch in range(epochs if len(task.classes) > 1 else 0):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * epoch / epochs)) / 2)
            total = torch.zeros((), device=labels.device)
            for step, index in enumerate(torch.randperm(len(task), generator=order).split(settings.batch_size), 1):
                images = self._student.encode_tokens(task.tokens.batch(index))
                logits = self._clip.logit_scale * images @ self._student.encode_ids(ids).T
                step_loss = F.cross_entropy(logits, labels[index.to(labels.device)])
                optimizer.zero_grad(set_to_none=True)
                step_loss.backward()
                optimizer.step()
                total += step_loss.detach() * len(index)
                if step % 4 == 0 or step == steps:
                    seen = epoch * len(task) + min(step * settings.batch_size, len(task))
                    last = drifts[-1] if drifts else self._drift(before, untouched)
                    report(
                        Progress(
                            "train",
                            task.number,
                            epoch + 1,
                            epochs,
                            step,
                            steps,
                            seen,
                            step_loss.item(),
                            last,
                            settings.drift_budget,
                        )
                    )
            run += 1
            statistics = measure()
            drift = self._drift(statistics, untouched)
            epoch_loss = (total / len(task)).item()
            finite = math.isfinite(epoch_loss) and all(map(math.isfinite, (statistics.positive, statistics.centroid)))
            drifts.append(drift if finite else math.inf)
            if paper and self._epochs_fixed is None and finite:
                self._epochs_fixed = gap.paper_epochs(drifts, settings.drift_budget)
                if self._epochs_fixed is not None and epoch > 0:
                    rolled_back = True
                    break
            crossed = not paper and drift is not None and drift > settings.drift_budget
            if not finite or crossed:
                rolled_back = True
                break
            inside, after, kept, loss = self._student.tensors(), statistics, run, epoch_loss
            if paper and self._epochs_fixed is not None and run >= self._epochs_fixed:
                break
        if rolled_back:
            self._student.load_tensors(inside)
        if paper and self._epochs_fixed is None and run == epochs and len(task.classes) > 1:
            self._epochs_fixed = epochs
        return {
            "epochs": kept,
            "epochs_run": run,
            "steps": run * steps,
            "loss": loss,
            "rolled_back": rolled_back,
            "gap_after": after,
            "drift_after": self._drift(after, untouched),
            "details": {
                "fusion": settings.fusion,
                "schedule": settings.schedule,
                "epochs_fixed": self._epochs_fixed,
                "drift_relative_to": settings.drift_relative_to,
                "drifts": [value if value is None or math.isfinite(value) else None for value in drifts],
            },
        }

    def _compensate(self, task: TaskData, labels: Tensor, report: Report) -> None:
        """Rows per class: means of the features, running ones for a class that comes back, then local training."""
        settings = self._settings
        features = self._student.features(task.tokens)
        counts = torch.bincount(labels, minlength=len(task.classes))
        sums = torch.zeros(len(task.classes), features.shape[1], device=features.device).index_add_(0, labels, features)
        for k, name in enumerate(task.classes):
            new = int(counts[k])
            if name in self._classes:
                at = self._classes.index(name)
                self._rows[at] = (self._rows[at] * self._counts[at] + sums[k]) / (self._counts[at] + new)
                self._counts[at] += new
            else:
                self._classes.append(name)
                self._counts.append(new)
                self._rows = torch.cat([self._rows, sums[k : k + 1] / new])
        if len(task.classes) == 1:
            return
        where = torch.tensor([self._classes.index(name) for name in task.classes], device=labels.device)
        rows = self._rows[where].clone().requires_grad_()
        optimizer = torch.optim.Adam([rows], lr=settings.visual_lr)
        order = task_generator(self._seed, task.number, "visual order")
        steps = settings.visual_epochs * math.ceil(len(task) / settings.visual_batch_size)
        step = 0
        for epoch in range(settings.visual_epochs):
            for index in torch.randperm(len(task), generator=order).split(settings.visual_batch_size):
                lr = settings.visual_lr * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
                optimizer.param_groups[0]["lr"] = lr
                index = index.to(labels.device)
                loss = F.cross_entropy(features[index] @ F.normalize(rows, dim=-1).T, labels[index])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                step += 1
            report(
                Progress("compensate", task.number, epoch + 1, settings.visual_epochs, step, steps, loss=loss.item())
            )
        self._rows[where] = rows.detach()

    def inference_module(self) -> InferenceModule:
        if not self._classes:
            raise LookupError("no class has been learned yet; there is nothing to infer with")
        fusion = FaithfulFusion if self._settings.fusion == "faithful" else CalibratedFusion
        names = self.encode_names(self._classes)
        return fusion(self._student.merged_image_tower(), self.classes, names, self._rows, self._clip.logit_scale)

    def state(self) -> LearnerState:
        tensors = {**self._student.tensors(), "rows": self._rows.clone()}
        facts = {"classes": list(self._classes), "counts": list(self._counts), "epochs_fixed": self._epochs_fixed}
        return LearnerState(tensors, facts)

    def load_state(self, state: LearnerState) -> None:
        tensors, facts = dict(state.tensors), state.facts
        self._student.load_tensors(tensors)
        self._rows = tensors["rows"].to(self._clip.device).clone()
        self._classes, self._counts = list(facts["classes"]), list(facts["counts"])
        self._epochs_fixed = facts["epochs_fixed"]
