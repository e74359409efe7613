"""The trainer process: everything that needs torch. Builds the parts once, then learns task after task."""

from __future__ import annotations

import json
import logging
import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from agent import methods
from agent.config import Config
from agent.layout import (
    LEARNER_TENSORS,
    LEARNER_VALUES,
    RELEASE_IN_COMMIT,
    REPORT,
    SCRATCH,
    current_commit,
    has_learned,
)
from agent.methods.base import LearnerState, Method, TaskData
from agent.methods.merging import AVERAGED, MergeError, adapted, images, merge, spellings
from agent.model.clip import load_clip
from agent.model.images import LoadedImages, StoredTokens, load_tokens
from agent.scoring.evaluator import Evaluator
from agent.scoring.holdout import EncodedImage, HoldOut
from agent.scoring.report import LearnerIdentity, Merged, ModelIdentity, OldClasses, Origin, ReleaseSummary, Report
from agent.sealing import seal
from agent.sharing.deal import Rows
from agent.sharing.lead import Sharing
from agent.values import Commit, LateRejection, OnProgress, Outcome, Progress, Update
from agent.worker import TaskFault
from exporter.decoders import Decoders
from exporter.image_header import ImageError
from exporter.onnx import Labelled, OnnxExporter
from exporter.release import ReleaseError, digest
from exporter.text_export import TextToRelease
from exporter.trace_cache import user_cache
from streams.archive_folder import ArchiveFolder
from streams.buffer import Task
from streams.record import Reason
from streams.spool import Sample

log = logging.getLogger(__name__)

CHECK_IMAGES = 8
"""Images a release is checked on: chosen by hand. The exporter repeats them up to its largest batch and ships a few of
them; more different ones would make the check slower and hardly find more."""

ACCURACY_IMAGES = 500
"""Held-out images at most that the smaller models of a release are scored on. Preprocessed they are in memory all at
once, 0.3 GB at 224 x 224 pixels; with fewer, an accuracy has a standard error of more than 2.2 points."""

_DATA_FAULTS = (ValueError, ArithmeticError, LookupError, torch.linalg.LinAlgError)
"""What blames the task when it is raised while its samples are decoded, predicted or learned: values out of range, and
matrices that cannot be inverted. A plain RuntimeError does not: torch raises it for memory on a CPU, CUDA, cuDNN and
threads as well, and nothing but its words would tell which."""

_PACKAGES = ("gapstream", "torch", "open_clip_torch", "timm", "numpy", "pillow")
"""Packages whose versions are noted in a report, since they can change a score: models, arithmetic, image decoding."""


_RESTORE = "Nothing was changed: restore the configuration, or set state.path to a new folder to start over"
"""What to do where an agent's state folder was learned under other settings."""

_AS_IT_WAS = "Nothing was made: give the command the configuration that its agent has"
"""What to do where a state folder that is merged was."""


class LearnerError(Exception):
    """A checkpoint cannot be continued; the message says what differs and what to do."""


class Trainer:
    """Learns task after task; between two it keeps the method, the evaluator with its images, and the exporter's trace.

    Runs in one thread of its own process (see agent.worker).
    """

    def __init__(self, config: Config, commit: Path | None) -> None:
        """Continue from the commit in the folder `commit`, or begin anew (None).

        Raises LearnerError when the commit was learned under other settings, ModelError, HoldOutError, StreamError.
        """
        # Sums depend on how many threads share them: the same number gives the same bits again.
        if config.model.threads:
            torch.set_num_threads(config.model.threads)
        self._config = config
        self._clip = load_clip(config.model)
        self._method = methods.build(self._clip, config.method)
        if commit is not None:
            self._load(commit)
        self._answers: Method = self._method
        """What is scored and released; agent/fleet_trainer.py puts another one here."""
        self._module = self._method.inference_module() if self._method.classes else None
        """The model as it is now, None while nothing is learned. It is made once for each update, so that what is
        scored after it, and before the next one, is what was released."""
        self._decoders = Decoders(config.source.max_image_pixels)
        weakref.finalize(self, self._decoders.close)  # where a process has several trainers
        self._sharing = Sharing(config, self._clip)
        weakref.finalize(self, self._sharing.close)
        settings = config.evaluation
        self._holdout = HoldOut.load(commit, settings.holdout_fraction, settings.holdout_per_class)
        self._evaluator = Evaluator(
            self._clip,
            settings,
            self._holdout,
            test=self._archive(settings.test_archive, settings.test_split),
            probe=self._archive(settings.probe_archive, settings.probe_split),
            decoders=self._decoders,
            cache_bytes=config.method.cache_bytes,
            ask=self._sharing.ask,
        )
        release = config.release
        self._exporter = OnnxExporter(
            release.opset,
            release.max_batch,
            release.parity_atol,
            config.model.threads,
            release.precisions,
            user_cache(),
        )

    def learn(self, task: Task, staging: Path, on_progress: OnProgress) -> Outcome:
        """Decode, predict, update, score, release, save: the next commit but its manifest, in `staging`.

        Samples that cannot be decoded are in the outcome, and so is the reason when no release was made. Whatever is
        raised leaves the commit before as it was; the trainer is not used any more after that. Raises TaskFault when
        the samples are the reason.
        """
        parent = parent_of(staging)
        if parent is not None:  # commits that learned nothing may have taken the place of the one read from so far
            self._holdout.moved(parent)
        with self._sharing.together(task, self._method, on_progress):
            # Only up to the update: what fails after it fails for the model, the disk or the release, whatever was
            # learned.
            with _blaming_the_task():
                started = time.perf_counter()
                loaded = self._decode(task, on_progress)
                seconds = {"decode": time.perf_counter() - started}

                # Split after decoding: an image that cannot be decoded must not be held out.
                good = [task.samples[i] for i in loaded.kept]
                choices = self._holdout.split(good)
                kept = [i for i, choice in enumerate(choices) if choice == "train"]
                rows = Rows.of(task.classes, [sample.label for sample in good], kept)
                data = rows.data(task.number, loaded, [s.read for s in task.samples], self._clip, self._decoders)
                self._sharing.go_on(rows, lambda: self._evaluator.admit(self._method, data, on_progress))
                before = self._evaluator.before(self._answers, self._module, data, on_progress)
                update = self._update(data, on_progress)
            if update is not None:
                self._take_up()
            report = self._evaluator.after(
                self._answers, self._module, data, update, before, last_report(parent), on_progress
            )

        held = [sample for sample, choice in zip(good, choices, strict=True) if choice == "hold"]
        outcome = self._complete(report, held, staging, parent, seconds, on_progress)
        return replace(
            outcome,
            next_offsets=task.next_offsets,
            update=update,
            rejected=tuple(_late(task.samples[i], error.reason, error.detail) for i, error in loaded.failed),
            shares=self._sharing.shares,
        )

    def merge(self, commits: Mapping[str, Commit], stage: Callable[[], Path]) -> Outcome:
        """Become the learner that saw what those of `commits` saw, or an average of them; each is named as messages and
        the report call it.

        For a trainer that was built without a commit. Scores on the images that they held back, releases, and saves the
        first commit of a state folder but its manifest, in the folder that `stage` gives: it is called when nothing can
        be refused any more. Raises MergeError, LearnerError, HoldOutError, and OSError where a commit's file is gone.
        """
        learners = self._read_alike({name: commit.path for name, commit in commits.items()})
        state = merge(self._method.name, learners)
        self._continue(state, next(iter(commits)), _AS_IT_WAS)
        self._module = self._method.inference_module()
        settings = self._config.evaluation
        others = [
            HoldOut.load(commit.path, settings.holdout_fraction, settings.holdout_per_class)
            for commit in commits.values()
        ]
        self._holdout.join(others, spellings(learners))
        of = tuple(_origin(name, commit, learners[name]) for name, commit in commits.items())
        nothing = TaskData(1, (), torch.zeros(0, dtype=torch.int64), StoredTokens(torch.empty(0), self._clip.device))
        before = self._evaluator.before(self._method, self._module, nothing, _unheard)
        report = self._evaluator.after(self._method, self._module, nothing, None, before, None, _unheard)
        learned = sum(count or 0 for count in images(state).values())
        entry = replace(report.history[-1], classes=self._method.classes, samples=learned)
        merged = Merged(of=of, adapted=adapted(state), averaged=self._method.name in AVERAGED)
        report = replace(report, samples=learned, history=(entry,), merged=merged)
        outcome = self._complete(report, self._holdout.images(), stage(), None, {}, _unheard)
        for other in others:
            other.close()
        return outcome

    def _complete(
        self,
        report: Report,
        held: Sequence[EncodedImage],
        staging: Path,
        parent: Path | None,
        seconds: Mapping[str, float],
        on_progress: OnProgress,
    ) -> Outcome:
        """Release what is learned and save it, scored by `report`, in `staging`: a commit but its manifest.

        held: images held out that the release may be checked on; seconds: those of phases that the report lacks.
        """
        on_progress(Progress("export", report.task))
        started = time.perf_counter()
        release = self._release(report, held, staging, parent)
        report = report.completed(self.identity, release, {**seconds, "export": time.perf_counter() - started})

        on_progress(Progress("commit", report.task))
        self._save(staging, report)
        self._holdout.write(staging, parent)
        report.write(staging / REPORT)
        files = seal(staging, parent)  # here, not in the agent: hashing and syncing may take seconds
        self._holdout.moved(staging.with_suffix(""))  # where the agent renames it to
        return Outcome(
            task=report.task,
            next_offsets={},
            staging=staging,
            files=files,
            report=report,
            classes=self._method.classes,
            update=None,
            release_refused=release.refused,
        )

    def _decode(self, task: Task, on_progress: OnProgress) -> LoadedImages:
        count = len(task.samples)
        own = self._sharing.own(count)
        on_progress(Progress("decode", task.number, steps=len(own)))
        loaded = load_tokens(
            [task.samples[i].read for i in own],
            self._clip,
            decoders=self._decoders,
            cache_bytes=self._config.method.cache_bytes,
            scratch=self._config.state.path / SCRATCH,
            advance=lambda done: on_progress(Progress("decode", task.number, step=done, steps=len(own))),
        )
        return self._sharing.joined(loaded, count)

    def _take_up(self) -> None:
        """Answer with what is learned now."""
        self._module = self._method.inference_module()

    def _update(self, data: TaskData, on_progress: OnProgress) -> Update | None:
        if not len(data):
            log.warning("task %d has no image to learn: none could be decoded, or all are held out", data.number)
            return None
        return self._method.update(data, on_progress)

    def _release(
        self, report: Report, held: Sequence[EncodedImage], staging: Path, parent: Path | None
    ) -> ReleaseSummary:
        """Make a release in `staging`, unless there is a reason not to; says what was measured, or the reason."""
        refused = "nothing was learned" if self._module is None else self._forgets_too_much(report.old_classes)
        if self._module is not None and refused is None:
            try:
                release = self._exporter.release(
                    self._module,
                    self._clip.preprocess,
                    self._release_facts(report),
                    staging / RELEASE_IN_COMMIT,
                    self._check_images(held),
                    self._accuracy_images(self._module.classes),
                    self._text(),
                    parent and parent / RELEASE_IN_COMMIT,
                )
                return ReleaseSummary(
                    id=release.id, parity=release.parity, seconds=release.seconds, variants=release.variants
                )
            except ReleaseError as error:
                refused = str(error)
        log.warning("no new release after task %d: %s; the one before serves on", report.task, refused)
        return ReleaseSummary(refused=refused)

    def _forgets_too_much(self, old: OldClasses) -> str | None:
        """Apply the gate for old classes: why the release that serves is better kept; None where it is not."""
        limit = self._config.release.max_old_class_drop
        if not limit or old.before is None or old.after is None or old.before - old.after <= limit:
            return None
        return (
            f"accuracy on the classes of the release that serves fell from {old.before:.1%} to {old.after:.1%}, more "
            f"than release.max_old_class_drop = {limit:.1%}"
        )

    def _release_facts(self, report: Report) -> dict[str, Any]:
        """Tell what release.json says about the model, for whoever finds nothing but the release."""
        return {
            "task": report.task,
            "method": self._config.method.name,
            "fusion": self._method.fusion,
            "model": self._clip.identity,
            "accuracy": report.last,
        }

    def _text(self) -> TextToRelease | None:
        """Give the text tower with its tokenizer, to be released beside the image tower; None where that is switched
        off.
        """
        # The exporter asks for the tokenizer: one that cannot be released is a reason to leave the text part out.
        if not self._config.release.text:
            return None
        return TextToRelease(self._method.text_module(), lambda: self._clip.tokenizer)

    def _check_images(self, held: Sequence[EncodedImage]) -> np.ndarray:
        """Choose images the release is checked on and tested with, float32 [n, 3, H, W]: newly held-out ones, or noise.

        A release ships some of them, and no image that was trained on may leave in one.
        """
        if held:
            return self._pixels(held[:CHECK_IMAGES])
        preprocess = self._clip.preprocess
        noise = np.random.default_rng(0).integers(0, 256, (CHECK_IMAGES, preprocess.size, preprocess.size, 3), np.uint8)
        return np.stack([preprocess(Image.fromarray(pixels)) for pixels in noise])

    def _accuracy_images(self, classes: Sequence[str]) -> list[Labelled]:
        """Choose held-out images that smaller models are judged by, spread over all classes; none if none is made."""
        if not self._config.release.precisions:
            return []
        number = {name: i for i, name in enumerate(classes)}
        images = [image for image in self._holdout.images() if image.label in number]
        images = images[:: max(1, math.ceil(len(images) / ACCURACY_IMAGES))]
        size = self._config.release.max_batch
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        return [
            (
                self._pixels(part),
                np.array([number[image.label] for image in part]),
            )
            for part in parts
        ]

    def _pixels(self, images: Sequence[EncodedImage]) -> np.ndarray:
        """Decode images that could be decoded before, float32 [n, 3, H, W]."""
        found = []
        for image in self._decoders.pixels((image.read() for image in images), self._clip.preprocess):
            if isinstance(image, ImageError):
                raise image
            found.append(image)
        return np.stack(found)

    @property
    def identity(self) -> LearnerIdentity:
        """Who learns here; every reported number is stored with it."""
        method = self._config.method
        return LearnerIdentity(
            model=ModelIdentity(**self._clip.identity),
            method=method.name,
            fusion=self._method.fusion,
            seed=method.seed,
            device=str(self._clip.device),
            versions={name: metadata.version(name) for name in _PACKAGES},
        )

    def _save(self, staging: Path, report: Report) -> None:
        state = self._method.state()
        # safetensors takes contiguous tensors only.
        save_file({k: v.detach().cpu().contiguous() for k, v in state.tensors.items()}, staging / LEARNER_TENSORS)
        # Forced to the disk by `seal`, with everything else in `staging`.
        # "facts" in the file is the name that older commits have.
        values = {**self._learned_under(), "facts": dict(state.values)}
        (staging / LEARNER_VALUES).write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")

    def _learned_under(self) -> dict[str, Any]:
        """Give the settings under which the tensors of a checkpoint mean something."""
        method = self._config.method
        return {"method": method.name, "lora": method.lora.model_dump(), "model": self._clip.identity}

    def _load(self, commit: Path) -> None:
        if not has_learned(commit):  # its stream had only rejected records so far
            return
        saved = _values(commit)
        self._check(saved, str(commit))
        self._continue(LearnerState(load_file(commit / LEARNER_TENSORS), saved["facts"]), str(commit))

    def _read_alike(self, commits: Mapping[str, Path]) -> dict[str, LearnerState]:
        """Read learners, all of the configured method on the configured model. Raises MergeError, LearnerError."""
        saved = {name: _values(commit) for name, commit in commits.items()}
        (whose, first), *others = saved.items()
        for other, values in others:
            if _compatibility(values) != _compatibility(first):
                raise MergeError(
                    f"{whose} and {other} cannot be merged: the one was learned by {_in_words(first)}, the other by "
                    f"{_in_words(values)}. Only learners under the same settings can"
                )
        self._check(first, whose, _AS_IT_WAS)
        return {
            name: LearnerState(load_file(commit / LEARNER_TENSORS), saved[name]["facts"])
            for name, commit in commits.items()
        }

    def _check(self, saved: Mapping[str, Any], whose: str, cure: str = _RESTORE) -> None:
        """Raise LearnerError, which names the cure, unless a checkpoint's settings are the configured ones."""
        wanted = self._learned_under()
        if _compatibility(saved) != _compatibility(wanted):
            raise LearnerError(
                f"{whose} was learned by {_in_words(saved)}, but the configuration says {_in_words(wanted)}. {cure}"
            )

    def _continue(self, state: LearnerState, whose: str, cure: str = _RESTORE) -> None:
        """Go on from a checkpoint. Raises LearnerError, which names the cure."""
        try:
            self._method.load_state(state)
        except (KeyError, RuntimeError) as error:  # what torch says of other names and other shapes
            raise LearnerError(
                f"{whose} was learned with other settings below method.{self._method.name} than the configuration "
                f"has ({str(error).splitlines()[0]}). {cure}"
            ) from error
        except ValueError as error:  # what a method says of a state that another version wrote
            raise LearnerError(
                f"{whose} cannot be continued: {error}. Nothing was changed: use the version that wrote it, or set "
                "state.path to a new folder to start over"
            ) from error

    def _archive(self, path: Any, split: str) -> ArchiveFolder | None:
        if path is None:
            return None
        limits = self._config.source
        return ArchiveFolder(path, split, ("test", "val"), limits.max_image_bytes, limits.max_label_chars)


@contextmanager
def _blaming_the_task() -> Iterator[None]:
    """Turn _DATA_FAULTS into TaskFault."""
    try:
        yield
    except _DATA_FAULTS as error:
        raise TaskFault from error


def _values(commit: Path) -> dict[str, Any]:
    """Read under which settings a checkpoint was learned, with what its method keeps that is no tensor."""
    return json.loads((commit / LEARNER_VALUES).read_text(encoding="utf-8"))


def _origin(name: str, commit: Commit, learner: LearnerState) -> Origin:
    """Say in a report what a merged learner was made of."""
    assert commit.report is not None, "what is learned is scored in the same commit"
    return Origin(
        state=name,
        commit=commit.number,
        sha256=digest(commit.path / LEARNER_TENSORS)[1],
        began=commit.report.began,
        adapted=adapted(learner),
        images=images(learner),
        merged=commit.report.merged,
    )


def _unheard(progress: Progress) -> None:
    """Nobody waits for the progress of a merge."""


def parent_of(staging: Path) -> Path | None:
    """Give the current commit's folder: what was learned last, perhaps carried on by a commit that learned nothing.

    Looked up for every task, not remembered: the commit that this trainer began with may have been deleted since.
    """
    return current_commit(staging.parent.parent)


def last_report(parent: Path | None) -> Report | None:
    return Report.read(parent / REPORT) if parent is not None and (parent / REPORT).exists() else None


def _late(sample: Sample, reason: str, detail: str) -> LateRejection:
    return LateRejection(sample.partition, sample.offset, Reason(reason), detail)


def _compatibility(learned: Mapping[str, Any]) -> tuple[Any, ...]:
    """Tell what must be equal for a checkpoint to be continued. Weights are told by their digest: the same ones may
    have another tag or path."""
    return learned["method"], learned["lora"], learned["model"]["sha256"], learned["model"]["prompt"]


def _in_words(learned: Mapping[str, Any]) -> str:
    """Say the same for people."""
    model, lora = learned["model"], learned["lora"]
    return (
        f"{learned['method']} (adapters of rank {lora['rank']}, alpha {lora['alpha']:g}) on {model['name']} "
        f"({model['pretrained']}, sha256 {model['sha256'][:12]}, prompt {model['prompt']!r})"
    )
