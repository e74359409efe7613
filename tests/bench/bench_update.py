"""Seconds and memory of an update as learned classes grow, and against a plain loop that re-encodes everything.

    .venv/bin/python -m tests.bench.bench_update --data tiny-imagenet-stream.zip --class-order tiny-imagenet.json

Part one learns ten tasks of ten classes through the trainer, as the agent does, with `gapstream`, with its towers left
alone and with `mgclip`, and prints the seconds of every phase and the process's peak memory so far. Part two learns the
first tasks again in one run with MG-CLIP as it is here and with a plain loop over the same adapters, the way the
papers' code does it: every step decodes its images, runs both whole towers, encodes the names of all classes seen at
the full context length; every pass of the visual stage encodes the images again. Its seconds are the processor's.
Ratios are what counts: absolute seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from agent.commits import CommitStore, Provenance
from agent.config import Config
from agent.methods.base import TaskData, task_generator
from agent.methods.classifiers import CalibratedFusion
from agent.methods.mgclip import MgClip
from agent.methods.student import Student
from agent.model.clip import Clip, load_clip
from agent.model.images import load_tokens
from agent.trainer import Trainer
from exporter.decoders import Decoders
from exporter.preprocess import decode
from streams.archive_folder import ArchiveFolder
from streams.buffer import Task
from streams.record import Partition, Record
from streams.spool import Spool
from tests.bench.results import show

MAX_PIXELS = 50_000_000
PARTITION = Partition("bench", 0)
Images = list[tuple[str, bytes]]
METHODS: dict[str, dict[str, Any]] = {
    "gapstream": {"name": "gapstream"},
    "gapstream:drift_budget=0": {"name": "gapstream", "gapstream": {"drift_budget": 0}},
    "mgclip": {"name": "mgclip"},
}


def main() -> int:
    arguments = _arguments()
    order = json.loads(arguments.class_order.read_text())
    order = order["stream_order"] if isinstance(order, dict) else order
    archive = ArchiveFolder(arguments.data, "", ("train",))
    count = max(arguments.tasks, arguments.plain_tasks)
    groups = [order[i : i + 10] for i in range(0, 10 * count, 10)]
    tasks = [[(n, e.read()) for n in group for e in archive.images(n, arguments.per_class)] for group in groups]
    good = grown(tasks[: arguments.tasks]) if arguments.tasks > 1 else True
    if arguments.plain_tasks:
        test = ArchiveFolder(arguments.data, "", ("val", "test"))
        held = [[(n, e.read()) for n in group for e in test.images(n, 20)] for group in groups[: arguments.plain_tasks]]
        good &= against_plain(tasks[: arguments.plain_tasks], held)
    return int(not good)


def grown(tasks: Sequence[Images]) -> bool:
    updates = {title: grow(tasks, title, settings) for title, settings in METHODS.items()}
    adapting, alone, mgclip = (seconds[1:] for seconds in updates.values())
    good = show("update: gapstream with its towers left alone / mgclip", _pairs(alone, mgclip), most=1)
    good &= show("update: gapstream / with its towers left alone", _pairs(adapting, alone), most=2)
    for title, seconds in updates.items():
        good &= show(f"update: last task / second task, {title}", [seconds[-1] / seconds[1]], most=1.15)
    return good


def _pairs(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(one, other, strict=True)]


def grow(tasks: Sequence[Images], title: str, method: dict[str, Any]) -> list[float]:
    """Seconds of every update."""
    print(f"\nLearning {len(tasks)} tasks of {len(tasks[0])} images through the trainer with {title}")
    print("task  classes   decode    train  compens. = update   export  evaluate   total s  peak MB")
    updates, totals = [], []
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        config = Config.model_validate({"state": {"path": state}, "method": method})
        store, spool = CommitStore(state, 2), Spool(state / "spool", 2**31)
        store.lock()
        learner = Trainer(config, None)
        for number, images in enumerate(tasks, 1):
            samples = tuple(spool.append(Record(PARTITION, i, name, data)) for i, (name, data) in enumerate(images))
            spool.end_segment()
            names = tuple(dict.fromkeys(name for name, _ in images))
            task = Task(number, names, samples, {PARTITION: number}, "end", 0, len(samples), {})
            started = time.perf_counter()
            outcome = learner.learn(task, store.stage(), lambda progress: None)
            totals.append(time.perf_counter() - started)
            store.commit(outcome, Provenance("bench", names, {}, {}))
            spool.release(samples)
            s = outcome.report.seconds
            compensate = s.get("compensate", 0.0)
            updates.append(s["decode"] + s["train"] + compensate)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            print(
                f"{number:4}  {len(outcome.classes):7}  {s['decode']:7.2f}  {s['train']:7.2f}  {compensate:8.2f}"
                f"  {updates[-1]:7.2f}  {s['export']:7.2f}  {s['evaluate']:8.2f}  {totals[-1]:8.2f}  {memory:9.0f}",
                flush=True,
            )
        store.close()
    print(f"update, last task / second task: {updates[-1] / updates[1]:.2f} (wanted: at most 1.15)")
    print(f"with evaluation and export:      {totals[-1] / totals[1]:.2f} (scoring grows with the images held out)")
    return updates


def against_plain(tasks: Sequence[Images], held: Sequence[Images]) -> bool:
    print(f"\nThe first {len(tasks)} tasks with mgclip and with the plain loop, seconds of the processor")
    clip = load_clip(Config().model)
    settings = Config().method
    ours, plain = MgClip(clip, settings), Plain(clip, Config())
    seconds = {"mgclip": 0.0, "plain loop": 0.0}
    for number, images in enumerate(tasks, 1):
        started = _processor_s()
        task = _task(clip, number, images)
        decoded = _processor_s() - started
        ours.update(task, lambda progress: None)
        seconds["mgclip"] += (took := _processor_s() - started)
        print(f"task {number}: decoding and the frozen part are {decoded / took:.0%} of mgclip's update")
        started = _processor_s()
        plain.update(number, images)
        seconds["plain loop"] += _processor_s() - started
    test = [pair for images in held for pair in images]
    accuracies = []
    for name, module in (("mgclip", ours.inference_module()), ("plain loop", plain.module())):
        labels = torch.tensor([module.classes.index(label) for label, _ in test])
        predicted = torch.cat([module(_pixels(clip, part))[2].argmax(1) for part in _parts(test, 128)])
        accuracies.append((predicted == labels).float().mean().item())
        print(f"{name:10}  {seconds[name]:8.1f} s   accuracy {accuracies[-1]:.2%} on {len(test)} test images")
    ratio = seconds["plain loop"] / seconds["mgclip"]
    fast = show(f"update of {len(tasks[0])} images: the published loop / mgclip, at equal accuracy", [ratio], least=3)
    return fast and abs(accuracies[0] - accuracies[1]) <= 0.01


def _processor_s() -> float:
    """Seconds of the processor of this process and of its decoders that have ended."""
    return sum(os.times()[:4])


class Plain:
    """MG-CLIP as a direct loop: nothing is kept between steps."""

    def __init__(self, clip: Clip, config: Config) -> None:
        self.clip = clip
        self.settings = config.method.mgclip
        self.student = Student(clip, config.method.lora, config.method.seed)
        self.classes: list[str] = []
        self.rows = torch.zeros(0, clip.embed_dim)

    def update(self, number: int, images: Images) -> None:
        settings, seed = self.settings, 0
        offset = len(self.classes)
        self.classes += dict.fromkeys(name for name, _ in images)
        labels = torch.tensor([self.classes.index(name) - offset for name, _ in images])
        ids = self.clip.tokenize(self.classes)
        self.student.clip.text.causal = False  # the full context, as the papers' code has it
        order = task_generator(seed, number, "order")
        optimizer = torch.optim.Adam(list(self.student.parameters()), lr=settings.lr)
        for index in torch.randperm(len(images), generator=order).split(settings.batch_size):
            features = self.student.encode_tokens(self._prefix(images, index))
            logits = self.clip.logit_scale * features @ self.student.encode_ids(ids).T
            loss = F.cross_entropy(logits[:, offset:], labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.student.clip.text.causal = True

        with torch.no_grad():
            every = torch.arange(len(images)).split(settings.visual_batch_size)
            features = torch.cat([self.student.encode_tokens(self._prefix(images, index)) for index in every])
        means = torch.stack([features[labels == k].mean(0) for k in range(len(self.classes) - offset)])
        rows = means.requires_grad_()
        optimizer = torch.optim.Adam([rows], lr=settings.visual_lr)
        order = task_generator(seed, number, "visual order")
        steps, step = settings.visual_epochs * len(every), 0
        for _ in range(settings.visual_epochs):
            for index in torch.randperm(len(images), generator=order).split(settings.visual_batch_size):
                lr = settings.visual_lr * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
                optimizer.param_groups[0]["lr"] = lr
                with torch.no_grad():
                    features = self.student.encode_tokens(self._prefix(images, index))
                loss = F.cross_entropy(features @ F.normalize(rows, dim=-1).T, labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
        self.rows = torch.cat([self.rows, rows.detach()])

    def _prefix(self, images: Images, index: Tensor) -> Tensor:
        return self.clip.prefix(_pixels(self.clip, [images[i] for i in index.tolist()]))

    def module(self) -> CalibratedFusion:
        names = self.student.encode_names(self.classes)
        tower = self.student.merged_image_tower()
        return CalibratedFusion(tower, tuple(self.classes), names, self.rows, self.clip.logit_scale)


def _task(clip: Clip, number: int, images: Images) -> TaskData:
    names = tuple(dict.fromkeys(name for name, _ in images))
    readers = [lambda data=data: data for _, data in images]
    with closing(Decoders(MAX_PIXELS)) as decoders:
        loaded = load_tokens(readers, clip, decoders=decoders, cache_bytes=2**30, scratch=Path(tempfile.gettempdir()))
    labels = torch.tensor([names.index(name) for name, _ in images])
    return TaskData(number, names, labels, loaded.tokens)


def _pixels(clip: Clip, images: Images) -> Tensor:
    return torch.stack([torch.from_numpy(clip.preprocess(decode(data, MAX_PIXELS))) for _, data in images])


def _parts(images: Images, size: int) -> list[Images]:
    return [images[i : i + size] for i in range(0, len(images), size)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder or zip with train and val splits")
    parser.add_argument("--class-order", type=Path, required=True, help="JSON list, or an object with stream_order")
    parser.add_argument("--per-class", type=int, default=50, help="training images of a class (%(default)s)")
    parser.add_argument("--tasks", type=int, default=10, help="tasks of ten classes, 0 for none (%(default)s)")
    parser.add_argument("--plain-tasks", type=int, default=2, help="tasks of the comparison, 0 for none (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
