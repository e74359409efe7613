"""Streams that are hard for a learner of statistics: few images a class, unequal classes, one class at a time, domains.

    .venv/bin/python -m tests.bench.bench_hard_streams --tiny tiny-imagenet-stream.zip --cifar10 cifar10-12k.zip \\
        --trashnet trashnet.zip

Each row is a stream, each column a method; the numbers are Last, the accuracy over all classes after the last task, in
percent, on at most 50 test images a class. All images are drawn from the archives with seed 1. Exits with 1 where
`gapstream` is more than 0.3 points below any other method.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agent import config, methods
from agent.methods.base import TaskData, Tokens
from agent.model.clip import Clip, load_clip
from agent.model.images import load_tokens
from exporter.decoders import Decoders
from streams.archive_folder import ArchiveFolder

ROWS: dict[str, dict[str, Any]] = {
    "zeroshot": {"name": "zeroshot"},
    "ncm": {"name": "ncm"},
    "ranpac": {"name": "ranpac", "ranpac": {"features": 5000}},
    "gapstream, budget 0": {"name": "gapstream", "gapstream": {"drift_budget": 0}},
    "gapstream": {"name": "gapstream"},
}
MAX_PIXELS = 50_000_000
TEST_IMAGES = 50
MOST = 300
"""Images of a class that are decoded at most: 116 classes of them are some 30,000."""


@dataclass(frozen=True)
class Images:
    """The training and test images of some classes, class after class."""

    names: list[str]
    train: Tokens
    labels: Tensor
    test: Tokens
    truth: Tensor

    def of(self, label: int) -> Tensor:
        """Places of the training images of a class."""
        return (self.labels == label).nonzero().squeeze(1)


class Some:
    """Some images of several Tokens, which stand one after the other."""

    def __init__(self, parts: Sequence[Tokens], which: Tensor | None = None) -> None:
        self._parts, self._which = parts, which

    def __len__(self) -> int:
        return sum(map(len, self._parts)) if self._which is None else len(self._which)

    def batch(self, index: Tensor) -> Tensor:
        """As Tokens.batch."""
        at = index if self._which is None else self._which[index]
        out: list[Tensor | None] = [None] * len(at)
        start = 0
        for part in self._parts:
            here = ((at >= start) & (at < start + len(part))).nonzero().squeeze(1)
            if len(here):
                for place, tokens in zip(here.tolist(), part.batch(at[here] - start), strict=True):
                    out[place] = tokens
            start += len(part)
        return torch.stack([one for one in out if one is not None])


def load(path: Path, most: int, clip: Clip, decoders: Decoders, scratch: Path) -> Images:
    """Decode at most `most` training images a class, and the test images."""
    train, test = ArchiveFolder(path, "train"), ArchiveFolder(path, fallback=("test", "val"))
    names = list(train.classes)
    made = []
    for archive, limit in ((train, most), (test, TEST_IMAGES)):
        found = [(label, image) for label, name in enumerate(names) for image in archive.images(name, limit)]
        reads = [image.read for _, image in found]
        tokens = load_tokens(reads, clip, decoders=decoders, cache_bytes=2**31, scratch=scratch).tokens
        made.append((tokens, torch.tensor([label for label, _ in found])))
    return Images(names, *made[0], *made[1])


def together(parts: Sequence[Images]) -> Images:
    """Several archives as one; a name that came before is another class here."""
    names: list[str] = []
    labels, truth = [], []
    for part in parts:
        labels.append(part.labels + len(names))
        truth.append(part.truth + len(names))
        names += [f"{name} object" if name in names else name for name in part.names]
    train, test = Some([part.train for part in parts]), Some([part.test for part in parts])
    return Images(names, train, torch.cat(labels), test, torch.cat(truth))


def tasks_of(
    images: Images, sizes: Sequence[int], per_task: int, order: Sequence[int] | None = None, start: int = 0
) -> list[Tensor]:
    """Cut a stream: `sizes` images of each class after the first `start`, all in an order drawn with the class as seed;
    `per_task` classes a task, in an order drawn with seed 1 where none is given."""
    drawn = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(1)).tolist() if order is None else order
    chosen = []
    for label in drawn:
        shuffled = torch.randperm(len(images.of(label)), generator=torch.Generator().manual_seed(label))
        chosen.append(images.of(label)[shuffled[start : start + sizes[label]]])
    return [torch.cat(chosen[at : at + per_task]) for at in range(0, len(chosen), per_task)]


def last(images: Images, tasks: Sequence[Tensor], settings: dict[str, Any], clip: Clip) -> float:
    """Learn the tasks and give the accuracy over all classes, in percent."""
    method = methods.build(clip, config.Method.model_validate(settings))
    for number, index in enumerate(tasks, 1):
        present = images.labels[index].unique().tolist()
        labels = torch.tensor([present.index(label) for label in images.labels[index].tolist()])
        names = tuple(images.names[label] for label in present)
        method.update(TaskData(number, names, labels, Some([images.train], index)), lambda progress: None)
    module = method.inference_module()
    place = torch.tensor([method.classes.index(name) for name in images.names])
    right = 0
    with torch.no_grad():
        for part in torch.arange(len(images.truth)).split(256):
            answers = module.from_tokens(images.test.batch(part).float())[2].argmax(1).cpu()
            right += int((answers == place[images.truth[part]]).sum())
    return 100 * right / len(images.truth)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("tiny", "cifar10", "trashnet"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    asked = parser.parse_args()
    clip = load_clip(config.Model())
    with tempfile.TemporaryDirectory() as scratch, closing(Decoders(MAX_PIXELS)) as decoders:
        tiny, cifar, trash = (
            load(path, most, clip, decoders, Path(scratch))
            for path, most in ((asked.tiny, 100), (asked.cifar10, MOST), (asked.trashnet, MOST))
        )
        # from 1 to 100, as many of each magnitude
        uneven = (10 ** (2 * torch.rand(100, generator=torch.Generator().manual_seed(1)))).int().tolist()
        mixed = together([cifar, trash, tiny])
        back = [part for third in range(3) for part in tasks_of(cifar, [100] * 10, 2, _turned(third), 100 * third)]
        streams = {
            "1 image a class": (tiny, tasks_of(tiny, [1] * 100, 10)),
            "5 images a class": (tiny, tasks_of(tiny, [5] * 100, 10)),
            "20 images a class": (tiny, tasks_of(tiny, [20] * 100, 10)),
            "1 to 100 images a class": (tiny, tasks_of(tiny, uneven, 10)),
            "from 300 to 1, each half as many": (cifar, tasks_of(cifar, [max(1, 300 >> k) for k in range(10)], 2)),
            "one of 300, nine of 5": (cifar, tasks_of(cifar, [300] + [5] * 9, 2)),
            "one class at a time": (cifar, tasks_of(cifar, [300] * 10, 1)),
            "classes that come back": (cifar, back),
            "three domains, one after the other": (mixed, tasks_of(mixed, [300] * 16 + [20] * 100, 10, range(116))),
            "three domains, mixed": (mixed, tasks_of(mixed, [100] * 116, 10)),
        }
        good = True
        print("| stream | " + " | ".join(ROWS) + " |\n|---|" + "--:|" * len(ROWS))
        for title, (images, tasks) in streams.items():
            scores = {row: last(images, tasks, settings, clip) for row, settings in ROWS.items()}
            print(f"| {title} | " + " | ".join(f"{score:.1f}" for score in scores.values()) + " |", flush=True)
            good &= scores["gapstream"] >= max(scores.values()) - 0.3
    return 0 if good else 1


def _turned(third: int) -> list[int]:
    """The ten classes in an order that is another for each third, so that a class meets others when it comes back."""
    step = (1, 3, 7)[third]  # all prime to ten
    return [step * place % 10 for place in range(10)]


if __name__ == "__main__":
    sys.exit(main())
