"""What is gained and lost by decoding large JPEGs at a scale near the model's input (Preprocess.jpeg_oversampling).

    .venv/bin/python -m tests.bench.bench_large_jpegs
    .venv/bin/python -m tests.bench.bench_large_jpegs --data trashnet.zip

The first decodes and preprocesses drawn photographs of three sizes for the bundled model, at full size and scaled, in
turn, and prints the ratio of the processor's seconds. The second needs a folder or zip of train/class name/image and
test/... or val/..., and learns and tests both ways: every image is enlarged (--pixels), given the grain of a sensor
(--grain), encoded as a JPEG of quality 90, and decoded both ways. What is learned at full size is also tested scaled,
as a release of an older version would be by other readers. Exits with 1 when a method loses more than 0.2 points.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops
from torch import Tensor

from agent import methods
from agent.config import Config
from agent.methods.base import TaskData
from agent.model.clip import Clip, load_clip
from agent.model.images import CHUNK, StoredTokens
from exporter.preprocess import Preprocess, decode, planes
from streams.archive_folder import ArchiveFolder
from tests.bad_images import encoded
from tests.bench.results import show

MAX_PIXELS = 50_000_000
SIZES = {"12 MP": (4000, 3000), "2 MP": (1632, 1224), "500 x 400": (500, 400)}
CLASSES_PER_TASK = 2
MOST_LOST = 0.002


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="pairs of the timing (%(default)s)")
    parser.add_argument("--data", type=Path, help="learn and test on this folder or zip instead")
    parser.add_argument("--per-class", type=int, default=300, help="training images of a class (%(default)s)")
    parser.add_argument("--pixels", type=float, default=12e6, help="pixels they are enlarged to (%(default).0f)")
    parser.add_argument("--grain", type=float, default=4.0, help="noise of a pixel, of 255 (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clip = load_clip(Config().model)
    if arguments.data is None:
        compare_speed(clip.preprocess, arguments.rounds)
        return 0
    train, test = (
        load(arguments.data, splits, most, clip, arguments.pixels, arguments.grain)
        for splits, most in ((("train",), arguments.per_class), (("test", "val"), 0))
    )
    return 0 if compare_answers(clip, train, test, arguments.seeds) else 1


def compare_speed(scaled: Preprocess, rounds: int) -> None:
    whole = replace(scaled, jpeg_oversampling=0)
    rng = np.random.default_rng(0)
    drawn = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    for name, size in SIZES.items():
        data = encoded(grained(drawn.resize(size, Image.Resampling.BICUBIC), rng, 4.0), "JPEG", quality=90)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for number in range(rounds + 1):
            for way in (number % 2 == 0, number % 2 == 1):
                began = time.process_time()
                for _ in range(10 if size[0] < 1000 else 1):
                    pixels_of(data, scaled if way else whole)
                if number:  # the first pair warms up
                    seconds[way].append(time.process_time() - began)
        ratios = sorted(a / b for a, b in zip(seconds[False], seconds[True], strict=True))
        print(
            f"{name}: full size / scaled {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, "
            f"{rounds} pairs), scaled {1e3 * statistics.median(seconds[True]) / (10 if size[0] < 1000 else 1):.1f} ms"
        )
        show(f"JPEG of {name}: decoded whole / scaled", ratios)


def pixels_of(data: bytes, preprocess: Preprocess) -> NDArray[np.float32]:
    return preprocess.scale(planes(data, MAX_PIXELS, preprocess))


@lru_cache(maxsize=1)
def noise_of(grain: float) -> Image.Image:
    """A large picture of noise around 128."""
    rng = np.random.default_rng(0)
    return Image.fromarray((128 + rng.normal(0, grain, (5000, 5000, 3))).round().clip(0, 255).astype(np.uint8))


def grained(image: Image.Image, rng: np.random.Generator, grain: float) -> Image.Image:
    """Add noise to every pixel, from a place of the same noise that is drawn anew."""
    noise = noise_of(grain)
    left, top = (int(rng.integers(0, a - b + 1)) for a, b in zip(noise.size, image.size, strict=True))
    return ImageChops.add(image, noise.crop((left, top, left + image.width, top + image.height)), 1.0, -128)


@dataclass(frozen=True)
class Pixels:
    """They are the images of one split, decoded both ways."""

    labels: list[str]
    tokens: dict[bool, Tensor]
    """Whether scaled -> tokens [N, tokens, width]."""


def load(path: Path, splits: tuple[str, ...], per_class: int, clip: Clip, pixels: float, grain: float) -> Pixels:
    archive = ArchiveFolder(path, "", splits)
    rng = np.random.default_rng(0)
    ways = {True: clip.preprocess, False: replace(clip.preprocess, jpeg_oversampling=0)}
    labels: list[str] = []
    tokens: dict[bool, list[Tensor]] = {True: [], False: []}
    differences = []
    waiting: dict[bool, list[Tensor]] = {True: [], False: []}
    for label, data in images(archive, per_class):
        labels.append(label)
        large = enlarged(data, rng, pixels, grain)
        made = {way: pixels_of(large, preprocess) for way, preprocess in ways.items()}
        std = np.array(clip.preprocess.std, np.float32)[:, None, None]
        differences.append(float((np.abs(made[True] - made[False]) * std).mean()))
        for way, image in made.items():
            waiting[way].append(torch.from_numpy(image))
            if len(waiting[way]) == CHUNK:
                tokens[way].append(clip.prefix(torch.stack(waiting[way])))
                waiting[way].clear()
    for way, rest in waiting.items():
        if rest:
            tokens[way].append(clip.prefix(torch.stack(rest)))
    print(
        f"{splits[0]}: {len(labels)} images; a pixel differs by {255 * statistics.mean(differences):.2f} of 255 in the "
        f"mean, {255 * max(differences):.2f} in the worst image",
        flush=True,
    )
    return Pixels(labels, {way: torch.cat(parts) for way, parts in tokens.items()})


def images(archive: ArchiveFolder, per_class: int) -> Iterator[tuple[str, bytes]]:
    for label in sorted(archive.classes):
        for entry in archive.images(label, per_class):
            yield label, entry.read()


def enlarged(data: bytes, rng: np.random.Generator, pixels: float, grain: float) -> bytes:
    image = decode(data, MAX_PIXELS)
    factor = (pixels / (image.width * image.height)) ** 0.5
    size = round(image.width * factor), round(image.height * factor)
    out = io.BytesIO()
    grained(image.resize(size, Image.Resampling.BICUBIC), rng, grain).save(out, "JPEG", quality=90)
    return out.getvalue()


@torch.no_grad()
def compare_answers(clip: Clip, train: Pixels, test: Pixels, seeds: int) -> bool:
    good = True
    for name in ("zeroshot", "ncm", "gapstream"):
        right: dict[tuple[bool, bool], list[float]] = {}
        strayed, worst, same = [], 0.0, []
        for seed in range(seeds if name == "gapstream" else 1):
            answers: dict[tuple[bool, bool], Tensor] = {}
            for learned in (False, True):
                module = learn(clip, name, seed, train, learned)
                truth = torch.tensor([module.classes.index(label) for label in test.labels])
                for tested in (False, True):
                    found = answers[learned, tested] = module.from_tokens(test.tokens[tested])[2]
                    right.setdefault((learned, tested), []).append((found.argmax(1) == truth).double().mean().item())
            difference = (answers[False, False] - answers[False, True]).abs()
            strayed.append(difference.mean().item())
            worst = max(worst, difference.max().item())
            same.append((answers[False, False].argmax(1) == answers[False, True].argmax(1)).double().mean().item())
        full, scaled, mixed = (statistics.mean(right[ways]) for ways in ((False, False), (True, True), (False, True)))
        print(
            f"{name}: accuracy {full:.2%} at full size, {scaled:.2%} scaled, {mixed:.2%} learned at full size and "
            f"tested scaled; of the latter a probability differs by {statistics.mean(strayed):.4f} in the mean, "
            f"{worst:.3f} at most, and the first class of {1 - statistics.mean(same):.2%} of the images"
        )
        good = good and scaled >= full - MOST_LOST
    return good


def learn(clip: Clip, name: str, seed: int, images: Pixels, scaled: bool) -> methods.base.InferenceModule:
    settings = Config.model_validate({"method": {"name": name, "seed": seed}}).method
    method = methods.build(clip, settings)
    names = sorted(set(images.labels))
    for number, at in enumerate(range(0, len(names), CLASSES_PER_TASK), 1):
        classes = tuple(names[at : at + CLASSES_PER_TASK])
        rows = torch.tensor([i for i, label in enumerate(images.labels) if label in classes])
        labels = torch.tensor([classes.index(images.labels[i]) for i in rows.tolist()])
        with torch.enable_grad():
            method.update(
                TaskData(number, classes, labels, StoredTokens(images.tokens[scaled][rows], clip.device)),
                lambda progress: None,
            )
    return method.inference_module()


if __name__ == "__main__":
    sys.exit(main())
