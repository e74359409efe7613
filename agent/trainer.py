"""The trainer process: everything that needs torch. Builds the parts once, then learns task after task."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from agent import methods
from agent.commits import seal
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
from agent.methods.base import LearnerState, TaskData
from agent.model.clip import load_clip
from agent.model.images import LoadedImages, TokensAt, load_tokens
from agent.scoring.evaluator import Evaluator, add_phase
from agent.scoring.holdout import HoldOut
from agent.values import LateRejection, Outcome, Progress, Update
from exporter.onnx import Labelled, OnnxExporter
from exporter.preprocess import decode
from exporter.release import ReleaseError
from exporter.text_export import TextTower
from streams.archive_folder import ArchiveFolder
from streams.buffer import Task
from streams.record import Reason
from streams.spool import Sample

log = logging.getLogger(__name__)

CHECK_IMAGES = 8
"""Images a release is checked on; the exporter repeats them up to its largest batch and ships a few of them."""
ACCURACY_IMAGES = 500
"""Held-out images at most that the smaller forms of a release are scored on; they are in memory all at once."""
_PACKAGES = ("gapstream", "torch", "open_clip_torch", "timm", "numpy", "pillow")

OnProgress = Callable[[Progress], None]


class LearnerError(Exception):
    """A checkpoint cannot be continued; the message says what differs and what to do."""


class Trainer:
    """Continues from the commit at `commit` (None: nothing learned yet). Runs in one thread of its own process."""

    def __init__(self, config: Config, commit: Path | None) -> None:
        if config.model.threads:
            torch.set_num_threads(config.model.threads)
        self._config = config
        self._clip = load_clip(config.model)
        self._method = methods.build(self._clip, config.method)
        if commit is not None:
            self._load(commit)
        self._module = self._method.inference_module() if self._method.classes else None
        """Made once per update: what is evaluated before the next one, and after it, is what is released."""
        settings = config.evaluation
        self._holdout = HoldOut.load(commit, settings.holdout_fraction, settings.holdout_per_class)
        self._evaluator = Evaluator(
            self._clip,
            settings,
            self._holdout,
            test=self._archive(settings.test_archive, settings.test_split),
            probe=self._archive(settings.probe_archive, settings.probe_split),
            max_pixels=config.source.max_image_pixels,
            cache_bytes=config.method.cache_bytes,
        )
        release = config.release
        self._exporter = OnnxExporter(
            release.opset, release.max_batch, release.parity_atol, config.model.threads, release.precisions
        )

    def learn(self, task: Task, staging: Path, on_progress: OnProgress) -> Outcome:
        """Decode, predict, update, score, release, save: the next commit but its manifest, in `staging`."""
        parent = _parent(staging)
        started = time.perf_counter()
        loaded = self._decode(task, on_progress)
        decoded = time.perf_counter()
        good = [task.samples[i] for i in loaded.kept]
        choices = self._holdout.split(good)
        data = _task_data(task, good, [i for i, choice in enumerate(choices) if choice == "train"], loaded)
        before = self._evaluator.before(self._method, self._module, data, on_progress)
        update = self._update(data, on_progress)
        if update is not None:
            self._module = self._method.inference_module()
        scores = self._evaluator.after(
            self._method, self._module, data, update, before, _last_report(parent), on_progress
        )
        add_phase(scores, "decode", decoded - started)
        scores |= self.facts()

        exporting = time.perf_counter()
        on_progress(Progress("export", task.number))
        held = [sample for sample, choice in zip(good, choices, strict=True) if choice == "hold"]
        refused = self._release(task, held, scores, staging, parent and parent / RELEASE_IN_COMMIT)
        add_phase(scores, "export", time.perf_counter() - exporting)

        on_progress(Progress("commit", task.number))
        self._save(staging)
        self._holdout.write(staging, parent)
        (staging / REPORT).write_text(json.dumps(scores, indent=1, allow_nan=False), encoding="utf-8")
        files = seal(staging)
        self._holdout.moved(staging.with_suffix(""))  # where the agent renames it to
        return Outcome(
            task=task.number,
            next_offsets=task.next_offsets,
            staging=staging,
            files=files,
            report=scores,
            classes=self._method.classes,
            update=update,
            release_refused=refused,
            rejected=tuple(_late(task.samples[i], error.reason, error.detail) for i, error in loaded.failed),
        )

    def _decode(self, task: Task, on_progress: OnProgress) -> LoadedImages:
        count = len(task.samples)
        on_progress(Progress("decode", task.number, steps=count))
        return load_tokens(
            [sample.read for sample in task.samples],
            self._clip,
            max_pixels=self._config.source.max_image_pixels,
            cache_bytes=self._config.method.cache_bytes,
            scratch=self._config.state.path / SCRATCH,
            advance=lambda done: on_progress(Progress("decode", task.number, step=done, steps=count)),
        )

    def _update(self, data: TaskData, on_progress: OnProgress) -> Update | None:
        if not len(data):
            log.warning("task %d has no image to learn: none could be decoded, or all are held out", data.number)
            return None
        return self._method.update(data, on_progress)

    def _release(
        self, task: Task, held: Sequence[Sample], scores: dict[str, Any], staging: Path, before: Path | None
    ) -> str | None:
        """Publish into `staging`; gives why not, or None. Notes in `scores["release"]` what was measured. `before`:
        where the release before may be."""
        old, limit = scores["old_classes"], self._config.release.max_old_class_drop
        module, refused = self._module, None
        if limit and old["before"] is not None and old["after"] is not None and old["before"] - old["after"] > limit:
            refused = (
                f"accuracy on the classes of the release that serves fell from {old['before']:.1%} to "
                f"{old['after']:.1%}, more than release.max_old_class_drop = {limit:.1%}"
            )
        if module is None:
            refused = "nothing was learned"
        scores["release"] = {"refused": refused}
        if refused is None and module is not None:
            facts = {
                "task": task.number,
                "method": self._config.method.name,
                "fusion": scores["fusion"],
                "model": self._clip.identity,
                "accuracy": scores["last"],
            }
            text = None
            if self._config.release.text:
                text = TextTower(self._method.text_module(), lambda: self._clip.tokenizer)
            try:
                release = self._exporter.release(
                    module,
                    self._clip.preprocess,
                    facts,
                    staging / RELEASE_IN_COMMIT,
                    self._check_images(held),
                    self._accuracy_images(module.classes),
                    text,
                    before,
                )
                scores["release"] |= {
                    "id": release.id,
                    "parity": asdict(release.parity),
                    "seconds": dict(release.seconds),
                    "variants": {name: asdict(variant) for name, variant in release.variants.items()},
                }
            except ReleaseError as error:
                scores["release"]["refused"] = refused = str(error)
        scores["history"][-1]["released"] = refused is None
        if refused is not None:
            log.warning("no new release after task %d: %s; the one before serves on", task.number, refused)
        return refused

    def _check_images(self, held: Sequence[Sample]) -> np.ndarray:
        """Newly held-out images, float32 [n, 3, H, W], or noise: no image that was trained on may go into a release."""
        preprocess, limit = self._clip.preprocess, self._config.source.max_image_pixels
        if held:
            return np.stack([preprocess(decode(sample.read(), limit)) for sample in held[:CHECK_IMAGES]])
        noise = np.random.default_rng(0).integers(0, 256, (CHECK_IMAGES, preprocess.size, preprocess.size, 3), np.uint8)
        return np.stack([preprocess(Image.fromarray(pixels)) for pixels in noise])

    def _accuracy_images(self, classes: Sequence[str]) -> list[Labelled]:
        """Held-out images that the smaller forms are judged by, spread over all classes; none where none is made."""
        if not self._config.release.precisions:
            return []
        number = {name: i for i, name in enumerate(classes)}
        images = [image for image in self._holdout.images() if image.label in number]
        images = images[:: max(1, math.ceil(len(images) / ACCURACY_IMAGES))]
        size, limit = self._config.release.max_batch, self._config.source.max_image_pixels
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        return [
            (
                self._clip.preprocess.batch([decode(image.read(), limit) for image in part]),
                np.array([number[image.label] for image in part]),
            )
            for part in parts
        ]

    def facts(self) -> dict[str, Any]:
        """What every reported number is stored with (backbone, prompt, seed, versions)."""
        method = self._config.method
        return {
            "model": self._clip.identity,
            "method": method.name,
            "fusion": self._method.fusion,
            "seed": method.seed,
            "device": str(self._clip.device),
            "versions": {name: metadata.version(name) for name in _PACKAGES},
        }

    def _save(self, staging: Path) -> None:
        state = self._method.state()
        save_file({k: v.detach().cpu().contiguous() for k, v in state.tensors.items()}, staging / LEARNER_TENSORS)
        facts = {**self._learned_by(), "facts": dict(state.values)}
        (staging / LEARNER_VALUES).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")

    def _learned_by(self) -> dict[str, Any]:
        """What a checkpoint's numbers mean something under."""
        method = self._config.method
        return {"method": method.name, "lora": method.lora.model_dump(), "model": self._clip.identity}

    def _load(self, commit: Path) -> None:
        if not has_learned(commit):  # only rejected records so far
            return
        saved = json.loads((commit / LEARNER_VALUES).read_text(encoding="utf-8"))
        wanted = self._learned_by()
        if _compatibility(saved) != _compatibility(wanted):
            raise LearnerError(
                f"{commit} was learned by {_in_words(saved)}, but the configuration says {_in_words(wanted)}. Nothing "
                "was changed: restore the configuration, or set state.path to a new folder to start over"
            )
        try:
            self._method.load_state(LearnerState(load_file(commit / LEARNER_TENSORS), saved["facts"]))
        except (KeyError, RuntimeError) as error:  # what torch says of other names and other shapes
            raise LearnerError(
                f"{commit} was learned with other settings below method.{self._method.name} than the configuration "
                f"has ({str(error).splitlines()[0]}). Nothing was changed: restore them, or set state.path to a new "
                "folder to start over"
            ) from error

    def _archive(self, path: Any, split: str) -> ArchiveFolder | None:
        if path is None:
            return None
        limits = self._config.source
        return ArchiveFolder(path, split, ("test", "val"), limits.max_image_bytes, limits.max_label_chars)


def _parent(staging: Path) -> Path | None:
    """The current commit's folder: what was learned last, perhaps carried on by a commit that learned nothing."""
    return current_commit(staging.parent.parent)


def _last_report(parent: Path | None) -> dict[str, Any] | None:
    if parent is None or not (parent / REPORT).exists():
        return None
    return json.loads((parent / REPORT).read_text(encoding="utf-8"))


def _task_data(task: Task, good: Sequence[Sample], rows: Sequence[int], loaded: LoadedImages) -> TaskData:
    """The samples to train on, and the class names among them in order of first appearance."""
    present = {good[i].label for i in rows}
    classes = tuple(name for name in task.classes if name in present)
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number[good[i].label] for i in rows], dtype=torch.int64)
    return TaskData(task.number, classes, labels, TokensAt(loaded.tokens, torch.tensor(rows, dtype=torch.int64)))


def _late(sample: Sample, reason: str, detail: str) -> LateRejection:
    return LateRejection(sample.partition, sample.offset, Reason(reason), detail)


def _compatibility(learned: Mapping[str, Any]) -> tuple[Any, ...]:
    return learned["method"], learned["lora"], learned["model"]["sha256"], learned["model"]["prompt"]


def _in_words(learned: Mapping[str, Any]) -> str:
    model, lora = learned["model"], learned["lora"]
    return (
        f"{learned['method']} (adapters of rank {lora['rank']}, alpha {lora['alpha']:g}) on {model['name']} "
        f"({model['pretrained']}, sha256 {model['sha256'][:12]}, prompt {model['prompt']!r})"
    )
