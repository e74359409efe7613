"""Scores a method before and after every update, on hold-out and test images, against the untouched model."""

from __future__ import annotations

import base64
import io
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor

from agent.config import Evaluation
from agent.methods.base import InferenceModule, OnProgress, TaskData, task_generator
from agent.model.clip import Clip
from agent.scoring.formulas import average_incremental_accuracy, last_accuracy, mean_change, retention
from agent.scoring.holdout import HoldOut
from agent.scoring.scored_images import ImageFolder, ScoredImages, image_refs
from agent.values import Progress, Update
from exporter.preprocess import decode

log = logging.getLogger(__name__)

PREDICTED = 512
"""Training samples of a task that are predicted before they are learned: a standard error of at most 2.2 points."""
CANDIDATES = 64
EXAMPLES = 12
MATRIX_ROWS = 100
"""Newest rows of the accuracy matrix that a report keeps."""
EXAMPLE_PIXELS = 96
"""Longest side of an example image."""

Score = tuple[int, int]
"""Right answers, images."""


class Learner(Protocol):
    """What is scored: the part of agent.methods.base.Method that evaluation needs."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def encode_names(self, names: Sequence[str]) -> Tensor:
        """Class names, put into the prompt, by the current text tower: float32 [n, D], L2-normalised."""

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens [B, tokens, width] by the current image tower: float32 [B, D], L2-normalised."""


Answer = list[tuple[str, float]]
"""Best three class names with their probabilities, best first."""


@dataclass(frozen=True)
class Before:
    """What the model could do before an update."""

    accuracy: float | None
    """On the task's incoming training samples; None when there is none."""
    answers: Mapping[int, Answer]
    """To candidates for examples, by number of the test image."""
    seconds: float


class Evaluator:
    """Scores a method before and after every task on hold-out and test images, against the untouched model.

    Test images are decoded once and their tokens kept as far as `cache_bytes` reaches (the others are decoded again
    each time); the untouched model's embeddings are kept for all, so that zero-shot costs no second pass. Images that
    cannot be decoded are left out with a warning. Used from one thread.
    """

    def __init__(
        self,
        clip: Clip,
        settings: Evaluation,
        holdout: HoldOut,
        *,
        test: ImageFolder | None = None,
        probe: ImageFolder | None = None,
        max_pixels: int,
        cache_bytes: int,
    ) -> None:
        """test: images of the stream's classes, scored beside the hold-out. probe: classes that are never learned."""
        self._clip = clip
        self._settings = settings
        self._holdout = holdout
        self._test = test
        self._probe = probe
        self._max_pixels = max_pixels
        self._images = ScoredImages(clip, settings.batch_size, max_pixels, cache_bytes)
        self._names: dict[str, Tensor] = {}
        self._opened: set[str] = set()
        self._by_class: dict[str, list[int]] = {}
        self._held: set[str] = set()
        self._unlearned: dict[str, list[int]] = {}

    def before(
        self, method: Learner, module: InferenceModule | None, task: TaskData, on_progress: OnProgress
    ) -> Before:
        """Predict before learning: call it with the hold-out already split and before the update.

        module: what `method.inference_module()` gives; None while no class is learned.

        At most 512 of the task's training samples (drawn by the task's number) are answered among all classes seen so
        far and the task's new names. Whether a new name or a seen class is meant is decided by similarity to the names,
        as in zero-shot classification with the current towers; which seen class is decided by the method. The scores
        are the text probabilities with the method's own, scaled to the same maximum, in place of the seen classes'.
        """
        started = time.perf_counter()
        self._admit((*method.classes, *task.classes), lambda: on_progress(Progress("evaluate", task.number)))
        answers: dict[int, Answer] = {}
        accuracy = None
        if len(task):
            names, answer = self._answering(method, module, task.classes)
            generator = task_generator(0, task.number, "predict before learning")
            picked = torch.randperm(len(task), generator=generator)[:PREDICTED]
            index_of = torch.tensor([names.index(name) for name in task.classes])
            right = 0
            for part in picked.split(self._settings.batch_size):
                predicted = answer(task.tokens.batch(part)).argmax(1)
                right += int((predicted == index_of[task.labels[part]]).sum())
                on_progress(Progress("evaluate", task.number))
            accuracy = right / len(picked)
            for numbers, tokens in self._images.batches(self._candidates(method.classes, task.classes)):
                answers |= zip(numbers, _best(answer(tokens), names), strict=True)
        return Before(accuracy, answers, time.perf_counter() - started)

    def after(
        self,
        method: Learner,
        module: InferenceModule | None,
        task: TaskData,
        update: Update | None,
        before: Before,
        parent: Mapping[str, Any] | None,
        on_progress: OnProgress,
    ) -> dict[str, Any]:
        """Score the updated method; gives the content of report.json, continuing the parent commit's (None: the first).

        module: what `method.inference_module()` gives now, the same that is released; None while no class is learned.
        update: None when the task had nothing to learn. All accuracies are fractions from 0 to 1; what is undefined is
        None. Keys, of this task unless said otherwise:

        - `task`, `classes` (all learned, in order), `samples` (trained on), `test_images` (scored), `held_out` (in all)
        - `accuracy` (all classes seen), `zero_shot` (the untouched model on the same images and names),
          `predict_before_learn`, `old_classes` {before, after} (classes of the newest release, before this task:
          its accuracy then and now)
        - `matrix` [T][T] (rows before the newest 100 are empty), `avg`, `last`, `forgetting`, `backward_transfer`: over
          all tasks, see the formulas above; `first`, `best` [T]: a[i][i] and the largest a[t][i] so far
        - `retention` and `probe` {of, images, classes, untouched, now}: on the probe, else on the test archive's
          classes that are not learned yet (`of` says which); None without either
        - `gap` {positive, negative, centroid: {before, after, untouched}, drift: {before, after, budget}}
        - `seconds` by phase: the update's and `evaluate`
        - `history`: one entry for each task so far, with the scalars above, `new_classes`, `loss`, `epochs`,
          `rolled_back` and the method's `details`
        - `examples`: at most 12 {image, label, task, before, after, untouched}; image is a data URL, the last three are
          the best three [name, probability]

        Facts not known here (model, method, versions, release) and later phases (`add_phase`) are the caller's to add.
        """
        started = time.perf_counter()
        history = [dict(entry) for entry in (parent or {}).get("history", ())]
        owner = {name: i for i, entry in enumerate(history) for name in entry["new_classes"]}
        new = [name for name in method.classes if name not in owner]
        owner |= dict.fromkeys(new, len(history))
        scores, untouched, answers = self._score(method, module, before.answers, task.number, on_progress)

        tasks = range(len(history) + 1)
        row = [_accuracy([scores[name] for name in scores if owner[name] == i]) for i in tasks]
        kept = [[*old, *[None] * (len(tasks) - len(old))] if old else [] for old in (parent or {}).get("matrix", ())]
        # The full matrix grows with the square of the tasks: of old rows only what the metrics need stays, per column.
        matrix = [[] for _ in kept[: -MATRIX_ROWS + 1]] + kept[-MATRIX_ROWS + 1 :] + [row]
        first, best = (list((parent or {}).get(key, ())) for key in ("first", "best"))
        drop, change = mean_change(row, best), mean_change(first, row)
        first.append(row[-1])
        best = [max((v for v in pair if v is not None), default=None) for pair in zip_longest(best, row)]
        accuracy = _accuracy(scores.values())
        zero_shot = _accuracy(untouched.values())
        accuracies = [entry["accuracy"] for entry in history] + [accuracy]
        serving = max((i for i, entry in enumerate(history) if entry.get("released", True)), default=None)
        probe = self._score_probe(method, task.number, on_progress)
        seconds = dict(update.seconds) if update else {}
        seconds["evaluate"] = before.seconds + time.perf_counter() - started
        scalars = {
            "task": task.number,
            "samples": len(task),
            "test_images": sum(images for _, images in scores.values()),
            "accuracy": accuracy,
            "zero_shot": zero_shot,
            "predict_before_learn": before.accuracy,
            "forgetting": drop,
            "retention": retention([(probe["now"], probe["untouched"])]) if probe else None,
            "gap": _gap(update),
            "seconds": seconds,
        }
        entry = {
            **scalars,
            "classes": list(task.classes),
            "new_classes": new,
            "loss": update.loss if update else None,
            "epochs": update.epochs if update else 0,
            "rolled_back": update.rolled_back if update else False,
            "details": dict(update.details) if update else {},
        }
        result = {
            **scalars,
            "classes": list(method.classes),
            "held_out": len(self._holdout),
            "old_classes": {
                "before": accuracies[serving] if serving is not None else None,
                "after": _accuracy([scores[name] for name in scores if serving is not None and owner[name] <= serving]),
            },
            "matrix": matrix,
            "avg": average_incremental_accuracy(accuracies),
            "last": last_accuracy(accuracies),
            "first": first,
            "best": best,
            "backward_transfer": change,
            "probe": probe,
            "history": [*history, entry],
            "examples": self._examples(before.answers, answers, method.classes, owner, history, task.number),
        }
        on_progress(Progress("evaluate", task.number, accuracy=accuracy))
        return _finite(result)

    def _admit(self, classes: Sequence[str], tick: Callable[[], None]) -> None:
        """Take in the test images of `classes` and the hold-out as it is now."""
        refs = [ref for ref in self._holdout.images() if ref.key not in self._held]
        self._held |= {ref.key for ref in refs}
        for name in classes:
            if self._test is not None and name not in self._opened:
                self._opened.add(name)
                wanted = image_refs(self._test, name, self._settings.test_per_class)
                known = {self._images.refs[n].key: n for n in ([] if self._probe else self._unlearned.pop(name, []))}
                self._by_class[name] = [known[ref.key] for ref in wanted if ref.key in known]
                refs += [ref for ref in wanted if ref.key not in known]
        for number in self._images.add(refs, tick):
            self._by_class.setdefault(self._images.refs[number].label, []).append(number)

    def _answering(
        self, method: Learner, module: InferenceModule | None, classes: Sequence[str]
    ) -> tuple[list[str], Callable[[Tensor], Tensor]]:
        """All names known with the task's, and a function from tokens to scores float32 [B, names] on the CPU."""
        learned = len(method.classes)
        names = [*method.classes, *(name for name in classes if name not in method.classes)]
        text = method.encode_names(names) if len(names) > learned else None

        @torch.no_grad()
        def answer(tokens: Tensor) -> Tensor:
            own = module.from_tokens(tokens.float())[2] if module is not None else None
            if text is None:
                assert own is not None
                return own.cpu()
            scores = torch.softmax(self._clip.logit_scale * method.encode_tokens(tokens) @ text.T, dim=-1)
            if own is not None:
                best = scores[:, :learned].amax(1, keepdim=True)
                scores = torch.cat([own / own.amax(1, keepdim=True) * best, scores[:, learned:]], dim=1)
            return (scores / scores.sum(1, keepdim=True)).cpu()

        return names, answer

    @torch.no_grad()
    def _score(
        self,
        method: Learner,
        module: InferenceModule | None,
        wanted: Collection[int],
        task: int,
        on_progress: OnProgress,
    ) -> tuple[dict[str, Score], dict[str, Score], dict[int, Answer]]:
        """Scores per class of the model and of the untouched one, and the model's answers to the images `wanted`."""
        names = method.classes
        classes = [name for name in names if name in self._by_class]
        if module is None or not classes:
            return {}, {}, {}
        text = self._untouched(names)
        index_of = {name: i for i, name in enumerate(names)}
        numbers = [number for name in classes for number in self._by_class[name]]
        right, right_untouched, answers = Counter[str](), Counter[str](), dict[int, Answer]()
        done = 0
        for part, tokens in self._images.batches(numbers):
            probabilities = module.from_tokens(tokens.float())[2].cpu()
            labels = [self._images.refs[number].label for number in part]
            truth = torch.tensor([index_of[label] for label in labels])
            untouched = (self._images.embeddings[part] @ text.T).argmax(1)
            right.update(compress(labels, (probabilities.argmax(1) == truth).tolist()))
            right_untouched.update(compress(labels, (untouched == truth).tolist()))
            shown = [i for i, number in enumerate(part) if number in wanted]
            answers |= zip((part[i] for i in shown), _best(probabilities[shown], names), strict=True)
            done += len(part)
            on_progress(Progress("evaluate", task, step=done, steps=len(numbers)))
        images = {name: len(self._by_class[name]) for name in classes}
        return (
            {name: (right[name], images[name]) for name in classes},
            {name: (right_untouched[name], images[name]) for name in classes},
            answers,
        )

    @torch.no_grad()
    def _score_probe(self, method: Learner, task: int, on_progress: OnProgress) -> dict[str, Any] | None:
        """Zero-shot accuracy on classes not learned, with the current towers and with the untouched ones.

        On the probe; without one on the test archive's classes that are not learned yet. None when there are not at
        least two.
        """
        folder = self._probe or self._test
        learned = set() if self._probe else {name.casefold() for name in method.classes}
        names = [name for name in folder.classes if name.casefold() not in learned] if folder else []
        if folder is None or len(names) < 2:
            return None
        numbers = []
        for name in names:
            if name not in self._unlearned:
                refs = image_refs(folder, name, self._settings.probe_per_class)
                self._unlearned[name] = self._images.add(refs, lambda: on_progress(Progress("evaluate", task)))
            numbers += self._unlearned[name]
        if not numbers:
            return None
        index_of = {name: i for i, name in enumerate(names)}
        truth = torch.tensor([index_of[self._images.refs[number].label] for number in numbers])
        untouched = (self._images.embeddings[numbers] @ self._untouched(names).T).argmax(1)
        text = method.encode_names(names)
        now = []
        for _, tokens in self._images.batches(numbers):
            now.append((method.encode_tokens(tokens) @ text.T).argmax(1).cpu())
            on_progress(Progress("evaluate", task))
        return {
            "of": "probe" if self._probe else "not learned yet",
            "images": len(numbers),
            "classes": len(names),
            "untouched": (untouched == truth).float().mean().item(),
            "now": (torch.cat(now) == truth).float().mean().item(),
        }

    def _untouched(self, names: Sequence[str]) -> Tensor:
        """The untouched model's features of class names, float32 [n, D] on the CPU, computed once each."""
        missing = [name for name in names if name not in self._names]
        for at in range(0, len(missing), self._settings.batch_size):
            part = missing[at : at + self._settings.batch_size]
            self._names |= zip(part, self._clip.encode_names(part).cpu(), strict=True)
        return torch.stack([self._names[name] for name in names])

    def _candidates(self, learned: Sequence[str], classes: Sequence[str]) -> list[int]:
        """Images to choose examples from: the task's classes and the others in turn, one of each, then a second."""
        others = [name for name in learned if name not in classes]
        turns = [name for pair in zip_longest(classes, others) for name in pair if name in self._by_class]
        rounds = zip_longest(*(self._by_class[name][:CANDIDATES] for name in turns))
        return [number for images in rounds for number in images if number is not None][:CANDIDATES]

    def _examples(
        self,
        before: Mapping[int, Answer],
        after: Mapping[int, Answer],
        names: Sequence[str],
        owner: Mapping[str, int],
        history: Sequence[Mapping[str, Any]],
        task: int,
    ) -> list[dict[str, Any]]:
        """At most EXAMPLES images, as many of each class as possible, first those whose answer changed."""
        by_class: dict[str, list[int]] = {}
        for number in sorted((n for n in before if n in after), key=lambda n: before[n][0][0] == after[n][0][0]):
            by_class.setdefault(self._images.refs[number].label, []).append(number)
        in_turn = [number for images in zip_longest(*by_class.values()) for number in images if number is not None]
        examples = []
        for number in in_turn[:EXAMPLES]:
            ref = self._images.refs[number]
            cosines = self._images.embeddings[[number]] @ self._untouched(names).T
            [untouched] = _best(torch.softmax(self._clip.logit_scale * cosines, dim=-1), names)
            introduced = owner[ref.label]
            examples.append(
                {
                    "image": _data_url(ref.read(), self._max_pixels),
                    "label": ref.label,
                    "task": history[introduced]["task"] if introduced < len(history) else task,
                    "before": before[number],
                    "after": after[number],
                    "untouched": untouched,
                }
            )
        return examples


def add_phase(report: dict[str, Any], phase: str, seconds: float) -> None:
    """Note in a report of `Evaluator.after` how long a later phase took."""
    report["seconds"][phase] = report["history"][-1]["seconds"][phase] = seconds


def _accuracy(scores: Collection[Score]) -> float | None:
    images = sum(count for _, count in scores)
    return sum(right for right, _ in scores) / images if images else None


def _best(probabilities: Tensor, names: Sequence[str]) -> list[Answer]:
    top = probabilities.topk(min(3, len(names)), dim=1)
    return [
        [(names[i], score) for i, score in zip(row, scores, strict=True)]
        for row, scores in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _gap(update: Update | None) -> dict[str, dict[str, float | None]]:
    def values(name: str) -> dict[str, float | None]:
        return {
            "before": getattr(update.gap_before, name) if update else None,
            "after": getattr(update.gap_after, name) if update else None,
            "untouched": getattr(update.gap_untouched, name) if update else None,
        }

    return {
        **{name: values(name) for name in ("positive", "negative", "centroid")},
        "drift": {
            "before": update.drift_before if update else None,
            "after": update.drift_after if update else None,
            "budget": update.budget if update else None,
        },
    }


def _data_url(data: bytes, max_pixels: int) -> str:
    image = decode(data, max_pixels)
    image.thumbnail((EXAMPLE_PIXELS, EXAMPLE_PIXELS))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _finite(value: Any) -> Any:
    """The same JSON-able value with None for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
