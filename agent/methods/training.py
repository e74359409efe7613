"""What the methods' loops have in common: the watch on the gap, batches and progress, losses, class means."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from agent.methods.base import Encoder, OnProgress, TaskData, TextModule, task_generator
from agent.model import gap, ranks
from agent.model.clip import Clip
from agent.model.lora import merged
from agent.values import GapStatistics, Progress, Update

log = logging.getLogger(__name__)

GAP_SAMPLES = 256
"""At most this many images of a task are what its gap is measured on, the same before and after, so that their spread
cancels in the drift. Measuring more of them after every epoch costs a further pass over the task."""


class GapWatch:
    """Measures the modality gap of `method` on the same images and names of a task, before and during an update."""

    def __init__(
        self,
        method: Encoder,
        untouched: Encoder,
        task: TaskData,
        seed: int,
        relative_to: str = "separation",
        samples: int = GAP_SAMPLES,
        moved: bool = True,
    ) -> None:
        """Measure the untouched model and the method as it is now, on at most `samples` images; `relative_to` is the
        divisor of the drift. A method that has not `moved` still encodes as the untouched model does, and is not
        measured again."""
        self._relative_to = relative_to
        generator = task_generator(seed, task.number, "gap")
        self._sample = torch.randperm(len(task), generator=generator)[:samples].sort().values
        self._task = task
        self._method = method
        self.untouched = self._statistics(untouched)
        self.before = self.measure() if moved else self.untouched

    def measure(self) -> GapStatistics:
        """Measure the gap of the method as it is now."""
        return self._statistics(self._method)

    def drift(self, now: GapStatistics) -> float | None:
        """Give the change of the negative mean from the untouched model to `now`, see `agent.model.gap.drift`."""
        return gap.drift(now, self.untouched, self._relative_to)

    def _statistics(self, model: Encoder) -> GapStatistics:
        images = ranks.encoded(self._task.tokens, self._sample, model.encode_tokens, 128)
        labels = self._task.labels[self._sample].to(images.device)
        measured = gap.statistics(images, model.encode_names(self._task.classes), labels)
        # Epochs are kept or rolled back by these: no rank may see others, were it only in their last bits.
        positive, centroid, *negative = ranks.agreed(
            [measured.positive, measured.centroid, *([] if measured.negative is None else [measured.negative])]
        )
        return GapStatistics(positive, negative[0] if negative else None, centroid)


class Trained(Protocol):
    """It has the tensors that an optimizer changes: a roll-back must restore them."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Copy every tensor, by name."""

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` copied."""


class Training:
    """Keeps the books of one update: batches, learning rates, progress, roll-back. The loop and its loss are the
    method's.

    A task of a single class has `epochs` 0: one name has nothing to be told apart from, its loss is zero whatever is
    trained, and Adam would turn rounding errors into steps.
    """

    def __init__(
        self,
        task: TaskData,
        trained: Trained,
        optimizer: torch.optim.Optimizer,
        *,
        epochs: int,
        batch_size: int,
        decay: Callable[[int, float], float],
        watch: GapWatch,
        seed: int,
        on_progress: OnProgress,
        budget: float | None = None,
        drop_last: bool = False,
        max_norm: float = math.inf,
    ) -> None:
        """Prepare the update of `task`, which changes `trained` through `optimizer`.

        `decay(epoch, done)` gives the factor of the learning rates: epoch counts from 0, done (0 to 1) is the share of
        all steps that are over. `budget` is the drift at which `keep` will be told to roll back, for whoever watches.
        `drop_last` leaves out an epoch's last batch where it is not full, but never its only one. Gradients longer than
        `max_norm` are shortened to it.
        """
        self.epochs = epochs if len(task.classes) > 1 else 0
        self.kept = 0
        """Epochs whose effect is in the model."""
        self.part = ranks.Part(0)
        """Which images of the current batch are this rank's."""
        self.drifts: list[float | None] = []
        """The drift after every epoch that was run; infinite where the model was no longer finite."""
        self._task = task
        self._trained = trained
        self._optimizer = optimizer
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._batch_size = batch_size
        self._steps = max(1, len(task) // batch_size) if drop_last else math.ceil(len(task) / batch_size)
        self._max_norm = max_norm
        self._decay = decay
        self._watch = watch
        self._on_progress = on_progress
        self._budget = budget
        self._order = task_generator(seed, task.number, "order")
        self._started = time.perf_counter()
        self._state = trained.tensors()
        self._after = watch.before
        self._loss: float | None = None
        self._run = self._step = self._seen = 0
        self._total = torch.zeros(())

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """Yield the task's images in an order drawn anew, int64 [B] on the CPU, with the learning rates set for each
        step. Of several ranks each is given those that it owns, see `part`."""
        self._total = torch.zeros(())
        self._run = epoch + 1
        order = torch.randperm(len(self._task), generator=self._order)
        for step, index in enumerate(order.split(self._batch_size)[: self._steps]):
            self._step = step + 1
            done = (epoch * self._steps + step) / (self.epochs * self._steps)
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * self._decay(epoch, done)
            self.part = ranks.part(self._task.tokens, index)
            yield self.part.of(index)

    def descend(self, loss: Tensor) -> None:
        """Take one step down `loss`, which is the mean over the batch that was yielded last."""
        self._optimizer.zero_grad(set_to_none=True)
        parameters = [weight for group in self._optimizer.param_groups for weight in group["params"]]
        loss = ranks.backward(loss, parameters, self.part)
        if self._max_norm < math.inf:
            torch.nn.utils.clip_grad_norm_(parameters, self._max_norm)
        self._optimizer.step()
        self._total = self._total.to(loss.device) + loss * self.part.images
        self._seen += self.part.images
        self._say(loss.item(), self._watch.drift(self._after))

    def _say(self, loss: float, drift: float | None) -> None:
        place = (self._run, self.epochs, self._step, self._steps, self._seen)
        self._on_progress(Progress("train", self._task.number, *place, loss, drift, self._budget))

    def keep(self, inside: Callable[[Sequence[float | None]], bool] = lambda drifts: True) -> bool:
        """End an epoch: tell the drift it came to, and keep its effect, or take it back, say so in the log, and return
        False; then stop.

        An epoch is taken back when its loss or the features it left are not finite, and when `inside`, which is given
        the drifts after all epochs so far, says that the last one is outside of the gap rule.
        """
        statistics = self._watch.measure()
        drift = self._watch.drift(statistics)
        loss = (self._total / min(len(self._task), self._steps * self._batch_size)).item()
        finite = all(map(math.isfinite, (loss, statistics.positive, statistics.centroid)))
        self.drifts.append(drift if finite else math.inf)
        self._say(loss, drift if finite else None)
        if not finite or not inside(self.drifts):
            self._trained.load_tensors(self._state)
            log.warning(
                "task %d: epoch %d was rolled back (loss %g, drift %s, budget %s); %d of %d epochs are kept",
                self._task.number, self._run, loss, drift and f"{drift:.3g}", self._budget, self.kept, self._run,
            )  # fmt: skip
            return False
        self._state, self._after, self._loss = self._trained.tensors(), statistics, loss
        self.kept += 1
        return True

    def update(self, details: Mapping[str, Any] | None = None) -> Update:
        """Describe what was done, with the gap as it is after the last epoch kept."""
        return Update(
            epochs=self.kept,
            epochs_run=self._run,
            steps=self._run * self._steps,
            samples=len(self._task),
            loss=self._loss,
            rolled_back=self.kept < self._run,
            gap_before=self._watch.before,
            gap_after=self._after,
            gap_untouched=self._watch.untouched,
            drift_before=self._watch.drift(self._watch.before),
            drift_after=self._watch.drift(self._after),
            budget=self._budget,
            seconds={"train": time.perf_counter() - self._started},
            details=dict(details or {}),
        )


class UntouchedMethod:
    """The base of methods that change neither tower: it encodes by the untouched towers, and releases the text
    tower."""

    _clip: Clip

    def encode_names(self, names: Sequence[str]) -> Tensor:
        return self._clip.encode_names(names)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        return self._clip.encode_tokens(tokens)

    def text_module(self) -> TextModule:
        return TextModule(self._clip, merged(self._clip.text, {}))


def untrained(task: TaskData, watch: GapWatch, started: float, on_progress: OnProgress) -> Update:
    """Describe an update that left the towers as they were; `started` is a time of `time.perf_counter`."""
    on_progress(Progress("train", task.number, samples=len(task), drift=watch.drift(watch.before)))
    return Update(
        epochs=0,
        epochs_run=0,
        steps=0,
        samples=len(task),
        loss=None,
        rolled_back=False,
        gap_before=watch.before,
        gap_after=watch.before,
        gap_untouched=watch.untouched,
        drift_before=watch.drift(watch.before),
        drift_after=watch.drift(watch.before),
        budget=None,
        seconds={"train": time.perf_counter() - started},
    )


def cosine(epoch: int, done: float) -> float:
    """Give the factor of a learning rate: from 1 down to 0.01 along a cosine, as `done` goes from 0 to 1."""
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2


def local_loss(images: Tensor, names: Tensor, labels: Tensor, scale: float, smoothing: float = 0.0) -> Tensor:
    """Compute the cross entropy over the task's own rows alone (MG-CLIP equation 4): no row of an earlier class is
    touched.

    images [B, D] and names [K, D] are L2-normalised, labels int64 [B] in 0..K-1; gives a scalar.
    """
    return F.cross_entropy(scale * images @ names.T, labels, label_smoothing=smoothing)


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Compute T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over rows: logits [B, n] -> scalar.

    Its gradient in the student is that of T^2 cross entropy too: they differ by the teacher's entropy.
    """
    target = torch.log_softmax(teacher / temperature, dim=-1)
    given = torch.log_softmax(student / temperature, dim=-1)
    return F.kl_div(given, target, reduction="batchmean", log_target=True) * temperature**2


def untouched_features(clip: Clip, task: TaskData, batch: int = 256) -> Tensor:
    """Encode a task's images by the untouched model: float32 [N, D], L2-normalised, in order."""
    return ranks.encoded(task.tokens, torch.arange(len(task)), clip.encode_tokens, batch)


def admit(classes: list[str], task: TaskData) -> None:
    """Append the task's new names to the learned ones."""
    classes += [name for name in task.classes if name not in classes]


def packed(symmetric: Tensor) -> Tensor:
    """Give the lower triangle of a matrix [M, M], row after row: [M (M + 1) / 2], half of what a commit would have."""
    return torch.cat([row[: at + 1] for at, row in enumerate(symmetric)])


def unpack(triangle: Tensor, symmetric: Tensor) -> None:
    """Put what `packed` gave into the lower triangle of `symmetric` [M, M]. Raises RuntimeError for another M."""
    width = len(symmetric)
    if len(triangle) != width * (width + 1) // 2:  # torch would name every row
        raise RuntimeError(f"a triangle of {len(triangle)} numbers is not that of {width} features")
    for at, row in enumerate(triangle.split(list(range(1, width + 1)))):
        symmetric[at, : at + 1] = row


class ClassMeans:
    """It keeps the mean feature of every class, over all its images so far."""

    def __init__(self, clip: Clip, width: int | None = None) -> None:
        """Features have `width` numbers; by default as many as the model's embeddings."""
        self.classes: list[str] = []
        self.counts: list[int] = []
        self.rows = torch.zeros(0, width or clip.embed_dim, device=clip.device)
        """float32 [C, width], not normalised."""

    def add(self, task: TaskData, features: Tensor) -> None:
        """Count the task's images in: float32 [N, width]. A class that was there before moves as a running mean."""
        sums = features.new_zeros(len(task.classes), features.shape[1])
        sums.index_add_(0, task.labels.to(features.device), features)
        before = len(self.classes)
        admit(self.classes, task)
        new = len(self.classes) - before
        self.counts += [0] * new
        rows = torch.cat([self.rows, self.rows.new_zeros(new, self.rows.shape[1])])
        for label, name in enumerate(task.classes):
            at, count = self.classes.index(name), int((task.labels == label).sum())
            rows[at] = (rows[at] * self.counts[at] + sums[label]) / (self.counts[at] + count)
            self.counts[at] += count
        self.rows = rows

    def load(self, classes: Sequence[str], counts: Sequence[int], rows: Tensor) -> None:
        """Continue from saved names, images per class and means [C, D]."""
        self.classes, self.counts, self.rows = list(classes), list(counts), rows.to(self.rows.device).clone()
