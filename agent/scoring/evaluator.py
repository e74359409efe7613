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
from agent.methods.base import InferenceModule, Method, TaskData, task_generator
from agent.model import ranks
from agent.model.clip import Clip
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
from agent.scoring.scored_images import ImageFolder, ScoredImages, image_refs
from agent.values import OnProgress, Progress, Update
from exporter.decoders import Decoders

PREDICTED = 512
"""Training samples of a task that are predicted before they are learned: the standard error of an accuracy is then at
most sqrt(0.25 / 512), 2.2 points. More only take longer; each is one pass through the towers."""

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
        decoders: Decoders,
        cache_bytes: int,
    ) -> None:
        """test: images of the stream's classes, scored beside the hold-out. probe: classes that are never learned."""
        self._clip = clip
        self._settings = settings
        self._holdout = holdout
        self._test = test
        self._probe = probe
        self._decoders = decoders
        self._images = ScoredImages(clip, settings.batch_size, decoders, cache_bytes)
        self._names: dict[str, Tensor] = {}
        """Class name -> the untouched model's feature of it, float32 [D]."""
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
            names, answer = _answering(self._clip, method, module, task.classes)
            tick = partial(on_progress, Progress("evaluate", task.number))
            accuracy = predicted(self._clip, method, module, task, self._settings.batch_size, tick)
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
        refs = [ref for ref in self._holdout.images() if ref.key not in self._held]
        self._held |= {ref.key for ref in refs}
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
        numbers = [number for name in classes for number in self._by_class[name]]
        # Counted by class: the tasks' columns of the matrix, and the old classes, are sums of these counts.
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
        text = method.encode_names(names)
        now = []
        for _, tokens in self._images.batches(numbers):
            now.append((method.encode_tokens(tokens) @ text.T).argmax(1).cpu())
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


def _answering(
    clip: Clip, method: Method, module: InferenceModule | None, classes: Sequence[str]
) -> tuple[list[str], Callable[[Tensor], Tensor]]:
    """Give all names known with the task's, and a function from tokens to scores float32 [B, names] on the CPU."""
    learned = len(method.classes)
    names = [*method.classes, *(name for name in classes if name not in method.classes)]
    text = method.encode_names(names) if len(names) > learned else None

    @torch.no_grad()
    def answer(tokens: Tensor) -> Tensor:
        # In float32 whatever model.precision says: the module is scored as it is released.
        own = module.from_tokens(tokens.float())[2] if module is not None else None
        if text is None:
            assert own is not None
            return own.cpu()
        scores = torch.softmax(clip.logit_scale * method.encode_tokens(tokens) @ text.T, dim=-1)
        if own is not None:
            # The learned classes and the others are scored in different units. The module's best class is put at
            # the probability that the texts give the best learned name: its order stays, and new names compare.
            best = scores[:, :learned].amax(1, keepdim=True)
            scores = torch.cat([own / own.amax(1, keepdim=True) * best, scores[:, learned:]], dim=1)
        return (scores / scores.sum(1, keepdim=True)).cpu()

    return names, answer


def predicted(
    clip: Clip,
    method: Method,
    module: InferenceModule | None,
    task: TaskData,
    batch_size: int,
    tick: Callable[[], None] = lambda: None,
) -> float:
    """Predict images of a task before it is learned: the share of right answers, see `Evaluator.before`.

    Of an update that several ranks share, each answers for its images; all of them have to call this then.
    """
    names, answer = _answering(clip, method, module, task.classes)
    # Not the configured seed: whatever it is, the same images are asked, so that runs can be compared.
    generator = task_generator(0, task.number, "predict before learning")
    picked = torch.randperm(len(task), generator=generator)[:PREDICTED]
    index_of = torch.tensor([names.index(name) for name in task.classes])

    def best(tokens: Tensor) -> Tensor:
        tick()
        return answer(tokens).argmax(1)

    answers = ranks.encoded(task.tokens, picked, best, batch_size)
    return int((answers == index_of[task.labels[picked]]).sum()) / len(picked)


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
