"""Scores a method before and after every update, on hold-out and test images, against the untouched model."""

from __future__ import annotations

import base64
import io
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress, zip_longest

import torch
from PIL import Image
from torch import Tensor

from agent.config import Evaluation
from agent.methods.base import InferenceModule, Method, TaskData
from agent.model.clip import Clip
from agent.scoring.answering import answering, predicted
from agent.scoring.formulas import average_incremental_accuracy, extended, last_accuracy, mean_change, retention
from agent.scoring.holdout import HoldOut
from agent.scoring.report import (
    HISTORY,
    Answer,
    Drift,
    Earlier,
    Example,
    Gap,
    GapChange,
    OldClasses,
    Probe,
    Report,
    TaskReport,
)
from agent.scoring.scored_images import Ask, ImageFolder, ScoredImages, image_refs
from agent.values import OnProgress, Progress, Update
from exporter.decoders import Decoders
from exporter.tensors import Unchanged

SCORED = 10_000
"""Held-out images at most that are scored after an update, of each class equally many: the standard error of an
accuracy is then at most sqrt(0.25 / 10,000), 0.5 points. As each image is compared with every class, scoring all of
them grows with the square of the classes."""

EXAMPLES = 12
"""Examples in a report: chosen by hand, few enough to look at one by one. Each adds about 2 kB to every report.json."""

CANDIDATES = 64
"""Test images that are answered before the update so that examples can be chosen from them: chosen by hand, a few for
each example, so that images whose answer changed are among them. All of them are less than one default batch."""

EXAMPLE_PIXELS = 96
"""Longest side of an example image in pixels: chosen by hand; the report's page shows 76. A larger one only makes every
report.json larger."""

MATRIX_ROWS = 100
"""Newest rows of the accuracy matrix that a report keeps: chosen by hand, more than a page can show. All rows would
grow with the square of the tasks, to a million numbers in every commit at a thousand tasks. No score depends on it."""

Score = tuple[int, int]
"""Right answers, images."""


@dataclass(frozen=True)
class BeforeUpdate:
    """What the model could do before an update."""

    accuracy: float | None
    """Accuracy on the task's incoming training samples; None when there is none."""
    answers: Mapping[int, Answer]
    """Answers to the candidates for examples, by number of the test image."""
    seconds: float
    """Wall seconds that finding out took."""


class Evaluator:
    """Scores a method before and after every task on hold-out and test images, against the untouched model.

    Test images are decoded once and go through the towers again only when these have changed, as far as `cache_bytes`
    reaches for what is kept (see ScoredImages); the untouched model's embeddings are kept for all, so that zero-shot
    costs no second pass. Images that cannot be decoded are left out with a warning. Used from one thread.
    """

    def __init__(
        self,
        clip: Clip,
        settings: Evaluation,
        holdout: HoldOut,
        *,
        test: ImageFolder | None = None,
        probe: ImageFolder | None = None,
        decoders: Decoders,
        cache_bytes: int,
        ask: Ask | None = None,
    ) -> None:
        """test: images of the stream's classes, scored beside the hold-out. probe: classes that are never learned.
        ask: see ScoredImages."""
        self._clip = clip
        self._settings = settings
        self._holdout = holdout
        self._test = test
        self._probe = probe
        self._decoders = decoders
        self._images = ScoredImages(clip, settings.batch_size, decoders, cache_bytes, ask)
        self._names: dict[str, Tensor] = {}
        """Class name -> the untouched model's feature of it, float32 [D]."""
        self._names_now: dict[str, Tensor] = {}
        """Class name -> the method's feature of it, as long as its text tower does not change."""
        self._same_text = Unchanged()
        self._opened: set[str] = set()
        """Class names whose test images have been taken in."""
        self._held: set[str] = set()
        """Keys of the held-out images that have been taken in."""
        self._by_class: dict[str, list[int]] = {}
        """Class name -> numbers of all its images in `_images`."""
        self._unlearned: dict[str, list[int]] = {}
        """Class of the probe, or not learned yet -> numbers of its images; they are in no other list."""

    def before(
        self, method: Method, module: InferenceModule | None, task: TaskData, on_progress: OnProgress
    ) -> BeforeUpdate:
        """Predict before learning: call it with the hold-out already split and before the update.

        module: what `method.inference_module()` gives; None while no class is learned.

        At most 512 of the task's training samples (drawn by the task's number) are answered among all classes seen so
        far and the task's new names. Whether a new name or a seen class is meant is decided by similarity to the names,
        as in zero-shot classification with the current towers; which seen class is decided by the method. The scores
        are the text probabilities with the method's own, scaled to the same maximum, in place of the seen classes'.
        """
        started = time.perf_counter()
        self.admit(method, task, on_progress)
        answers: dict[int, Answer] = {}
        accuracy = None
        if len(task):
            texts = partial(self._current, method)
            names, answer = answering(self._clip, method, module, task.classes, texts)
            tick = partial(on_progress, Progress("evaluate", task.number))
            accuracy = predicted(self._clip, method, module, task, self._settings.batch_size, texts, tick)
            for numbers, tokens in self._images.batches(self._candidates(method.classes, task.classes)):
                answers |= zip(numbers, _best(answer(tokens), names), strict=True)
        return BeforeUpdate(accuracy, answers, time.perf_counter() - started)

    def after(
        self,
        method: Method,
        module: InferenceModule | None,
        task: TaskData,
        update: Update | None,
        before: BeforeUpdate,
        parent: Report | None,
        on_progress: OnProgress,
    ) -> Report:
        """Score the updated method; gives the report that continues the parent commit's (None: the first).

        module: what `method.inference_module()` gives now, the same that is released; None while no class is learned.
        update: None when the task had nothing to learn. Who learned, what was released, and the seconds of later phases
        are the caller's to add (`Report.completed`).
        """
        started = time.perf_counter()
        # A class belongs to the task that brought it first, also when a later one brings it again.
        past = (parent or Report(task=0)).shortened(HISTORY - 1)
        earlier = past.earlier or Earlier()
        owner = {name: i for i, entry in enumerate(past.history) for name in entry.new_classes}
        new = tuple(name for name in method.classes if name not in owner)
        owner |= dict.fromkeys(new, len(past.history))

        scores, untouched, answers = self._score(method, module, before.answers, task.number, on_progress)
        probe = self._score_probe(method, task.number, on_progress)
        seconds = dict(update.seconds) if update else {}
        seconds["evaluate"] = before.seconds + time.perf_counter() - started

        tasks = range(len(past.history) + 1)
        row = tuple(_accuracy(scores[name] for name in scores if owner[name] == i) for i in tasks)
        best = [max((v for v in pair if v is not None), default=None) for pair in zip_longest(past.best, row)]
        accuracies = [*(entry.accuracy for entry in past.history), _accuracy(scores.values())]
        entry = TaskReport(
            task=task.number,
            samples=len(task),
            test_images=sum(images for _, images in scores.values()),
            accuracy=accuracies[-1],
            zero_shot=_accuracy(untouched.values()),
            predict_before_learn=before.accuracy,
            forgetting=mean_change(row, past.best),
            retention=retention([(probe.now, probe.untouched)]) if probe else None,
            gap=_gap(update),
            seconds=seconds,
            classes=task.classes,
            new_classes=new,
            loss=update.loss if update else None,
            epochs=update.epochs if update else 0,
            rolled_back=update.rolled_back if update else False,
            details=update.details if update else {},
            adaptation=update.adaptation if update else None,
        )
        history = (*past.history, entry)
        on_progress(Progress("evaluate", task.number, accuracy=accuracies[-1]))
        return Report(
            **entry.shared(),
            classes=method.classes,
            held_out=len(self._holdout),
            old_classes=_old_classes(past, scores, owner),
            matrix=extended(past.matrix, row, MATRIX_ROWS),
            avg=average_incremental_accuracy(accuracies, earlier.scored, earlier.accuracy),
            last=last_accuracy(accuracies),
            first=(*past.first, row[-1]),
            best=tuple(best),
            backward_transfer=mean_change(past.first, row),
            probe=probe,
            history=history,
            earlier=past.earlier,
            examples=self._examples(before.answers, answers, method.classes, owner, history),
            merged=past.merged,
        )

    def admit(self, method: Method, task: TaskData, on_progress: OnProgress) -> None:
        """Take in the images that the task brings to be scored: `before` does so where it has not been done."""
        self._admit((*method.classes, *task.classes), lambda: on_progress(Progress("evaluate", task.number)))

    def _admit(self, classes: Sequence[str], tick: Callable[[], None]) -> None:
        """Take in the test images of `classes` and the hold-out as it is now."""
        refs, quota, admitted = [], _quota(len(set(classes))), Counter[str]()
        for ref in self._holdout.images():
            admitted[ref.label] += 1
            if admitted[ref.label] <= quota and ref.key not in self._held:
                refs.append(ref)
                self._held.add(ref.key)
        for name in classes:
            if self._test is not None and name not in self._opened:
                self._opened.add(name)
                wanted = image_refs(self._test, name, self._settings.test_per_class)
                # Images that stood in for a probe are test images from now on, and need not be decoded again. Beside a
                # probe archive there are none: its images are of another folder, and stay what they are.
                known = {self._images.refs[n].key: n for n in ([] if self._probe else self._unlearned.pop(name, []))}
                self._by_class[name] = [known[ref.key] for ref in wanted if ref.key in known]
                refs += [ref for ref in wanted if ref.key not in known]
        for number in self._images.add(refs, tick):
            self._by_class.setdefault(self._images.refs[number].label, []).append(number)

    @torch.no_grad()
    def _score(
        self,
        method: Method,
        module: InferenceModule | None,
        wanted: Collection[int],
        task: int,
        on_progress: OnProgress,
    ) -> tuple[dict[str, Score], dict[str, Score], dict[int, Answer]]:
        """Score the model and the untouched one by class, and give the model's answers to the images `wanted`."""
        names = method.classes
        classes = [name for name in names if name in self._by_class]
        if module is None or not classes:
            return {}, {}, {}
        text = self._untouched(names)
        index_of = {name: i for i, name in enumerate(names)}
        numbers = [number for name in classes for number in self._scored(name, len(names))]
        # Counted by class: the tasks' columns of the matrix, and the old classes, are sums of these counts.
        right, right_untouched, answers = Counter[str](), Counter[str](), dict[int, Answer]()
        done = 0
        for part, encoded in self._images.encoded(numbers, module):
            probabilities = module.answer(encoded)[2].cpu()
            labels = [self._images.refs[number].label for number in part]
            truth = torch.tensor([index_of[label] for label in labels])
            untouched = (self._images.embeddings[part] @ text.T).argmax(1)
            right.update(compress(labels, (probabilities.argmax(1) == truth).tolist()))
            right_untouched.update(compress(labels, (untouched == truth).tolist()))
            shown = [i for i, number in enumerate(part) if number in wanted]
            answers |= zip((part[i] for i in shown), _best(probabilities[shown], names), strict=True)
            done += len(part)
            on_progress(Progress("evaluate", task, step=done, steps=len(numbers)))
        images = {name: len(self._scored(name, len(names))) for name in classes}
        return (
            {name: (right[name], images[name]) for name in classes},
            {name: (right_untouched[name], images[name]) for name in classes},
            answers,
        )

    @torch.no_grad()
    def _score_probe(self, method: Method, task: int, on_progress: OnProgress) -> Probe | None:
        """Classify images of classes that are not learned, with the current towers and with the untouched ones.

        These are the probe's classes; without one those of the test archive that are not learned yet. None when there
        are not at least two.
        """
        folder = self._probe or self._test
        # A stream keeps the spelling that it saw first, which the archive's need not be.
        learned = set() if self._probe else {name.casefold() for name in method.classes}
        names = [name for name in folder.classes if name.casefold() not in learned] if folder else []
        if folder is None or len(names) < 2:  # among one name every answer is right
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
        text = self._current(method, names)
        now = []
        for embeddings in self._images.embedded(numbers, method):
            now.append((embeddings @ text.T).argmax(1).cpu())
            on_progress(Progress("evaluate", task))
        return Probe(
            of="probe" if self._probe else "not learned yet",
            images=len(numbers),
            classes=len(names),
            untouched=(untouched == truth).float().mean().item(),
            now=(torch.cat(now) == truth).float().mean().item(),
        )

    def _untouched(self, names: Sequence[str]) -> Tensor:
        """Give the untouched model's features of class names, float32 [n, D] on the CPU, computed once each."""
        missing = [name for name in names if name not in self._names]
        for at in range(0, len(missing), self._settings.batch_size):
            part = missing[at : at + self._settings.batch_size]
            self._names |= zip(part, self._clip.encode_names(part).cpu(), strict=True)
        return torch.stack([self._names[name] for name in names])

    def _current(self, method: Method, names: Sequence[str]) -> Tensor:
        """Give the method's features of class names, float32 [n, D], computed once each while its text tower stays."""
        text = method.text_module()
        tensors = [*text.named_parameters(remove_duplicate=False), *text.named_buffers(remove_duplicate=False)]
        if not self._same_text(dict(tensors)):
            self._names_now.clear()
        missing = [name for name in names if name not in self._names_now]
        for at in range(0, len(missing), self._settings.batch_size):
            part = missing[at : at + self._settings.batch_size]
            self._names_now |= zip(part, method.encode_names(part), strict=True)
        return torch.stack([self._names_now[name] for name in names])

    def _scored(self, name: str, classes: int) -> list[int]:
        """Give the numbers of a class's images that are scored among so many classes: all test images, and of those
        held out the share of one class in SCORED."""
        numbers, quota = self._by_class[name], _quota(classes)
        held = [number for number in numbers if self._images.refs[number].key in self._held]
        left_out = set(held[quota:])
        return [number for number in numbers if number not in left_out]

    def _candidates(self, learned: Sequence[str], classes: Sequence[str]) -> list[int]:
        """Choose the candidates for examples: the task's classes and the others in turn, an image of each, then a
        second one."""
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
        history: Sequence[TaskReport],
    ) -> tuple[Example, ...]:
        """Choose at most EXAMPLES images, as many of each class as possible, first those whose answer changed."""
        by_class: dict[str, list[int]] = {}
        for number in sorted((n for n in before if n in after), key=lambda n: before[n][0][0] == after[n][0][0]):
            by_class.setdefault(self._images.refs[number].label, []).append(number)
        in_turn = [number for images in zip_longest(*by_class.values()) for number in images if number is not None]
        examples = []
        for number in in_turn[:EXAMPLES]:
            ref = self._images.refs[number]
            cosines = self._images.embeddings[[number]] @ self._untouched(names).T
            [untouched] = _best(torch.softmax(self._clip.logit_scale * cosines, dim=-1), names)
            examples.append(
                Example(
                    image=_data_url(self._decoders.picture(ref.read(), EXAMPLE_PIXELS)),
                    label=ref.label,
                    task=history[owner[ref.label]].task,
                    before=before[number],
                    after=after[number],
                    untouched=untouched,
                )
            )
        return tuple(examples)


def _quota(classes: int) -> int:
    """Give the number of held-out images that are scored of each of so many classes."""
    return max(1, SCORED // max(1, classes))


def _accuracy(scores: Iterable[Score]) -> float | None:
    scores = list(scores)
    images = sum(count for _, count in scores)
    return sum(right for right, _ in scores) / images if images else None


def _best(probabilities: Tensor, names: Sequence[str]) -> list[Answer]:
    top = probabilities.topk(min(3, len(names)), dim=1)
    return [
        tuple((names[i], score) for i, score in zip(row, scores, strict=True))
        for row, scores in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _old_classes(past: Report, scores: Mapping[str, Score], owner: Mapping[str, int]) -> OldClasses:
    """Compare with the newest release. `owner`: class name -> index of the task that brought it."""
    # Reports of the first versions do not say whether there was a release; in theirs every task made one.
    released = [i for i, entry in enumerate(past.history) if entry.released is not False]
    if not released:
        return OldClasses()
    after = _accuracy(scores[name] for name in scores if owner[name] <= released[-1])
    return OldClasses(before=past.history[released[-1]].accuracy, after=after)


def _gap(update: Update | None) -> Gap:
    if update is None:
        return Gap()
    before, after, untouched = update.gap_before, update.gap_after, update.gap_untouched
    return Gap(
        positive=GapChange(before=before.positive, after=after.positive, untouched=untouched.positive),
        negative=GapChange(before=before.negative, after=after.negative, untouched=untouched.negative),
        centroid=GapChange(before=before.centroid, after=after.centroid, untouched=untouched.centroid),
        drift=Drift(before=update.drift_before, after=update.drift_after, budget=update.budget),
    )


def _data_url(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=92, subsampling=0)  # halved colour would blur an image of 32 pixels
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
