"""What an update costs on a GPU: seconds of every phase, images a second, memory, and the share of the card's peak.

    .venv/bin/python -m tests.bench.bench_gpu
    .venv/bin/python -m tests.bench.bench_gpu --images 32 --model tinyclip        tries it out, also without a GPU

For ViT-B/16 and ViT-L/14 with random weights a task of 5,000 JPEGs of 500 x 400 is decoded, learned by mgclip and by
gapstream, and released, by the agent's own parts at their defaults. The peak is what products of large bfloat16
matrices reach just before. No card has run this yet.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from agent import methods
from agent.bench.costs import device_name, peak_memory, wait_for
from agent.config import Config, Model
from agent.methods.base import Method, TaskData
from agent.methods.student import Student
from agent.methods.training import local_loss
from agent.model.clip import Clip, load_clip
from agent.model.images import load_tokens
from agent.values import Progress
from exporter.decoders import Decoders
from exporter.onnx import OnnxExporter
from exporter.text_export import TextToRelease
from tests.tiny import silent

MAX_PIXELS = 50_000_000
DIFFERENT = 256
"""Pictures that are different; the others repeat them, since to make one takes longer than to decode it."""
CLASSES = 50
UPLOAD = 64
"""Images that go through the frozen part at once, as agent.model.images sends them to a GPU."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a model, or several (ViT-B-16 and ViT-L-14)")
    parser.add_argument("--images", type=int, default=5000, help="images of the task (%(default)s)")
    chosen = parser.parse_args(arguments)
    began = time.perf_counter()
    for name in chosen.model or ["ViT-B-16", "ViT-L-14"]:
        clip = load_clip(Model(name=name, pretrained="" if name == "tinyclip" else "random"))
        print(f"\n{name} on {device_name(clip.device)}, torch {torch.__version__}, loaded after {_since(began):.0f} s")
        # random weights drift at once, and what is rolled back would be a line between the numbers
        measure(clip, Config.model_validate({"method": {"mgclip": {"drift_budget": 1e9}}}), chosen.images)
    print(f"\nall of it: {_since(began):.0f} s")
    return 0


def measure(clip: Clip, config: Config, images: int) -> None:
    """Print a line for each phase of learning a task of `images` images."""
    different = [jpeg(seed) for seed in range(min(images, DIFFERENT))]
    encoded = [different[at % len(different)] for at in range(images)]
    peak = matmul_flops(clip.device)
    print(f"products of bfloat16 matrices: {peak / 1e12:.3g} TFLOP/s")
    print(f"{'phase':34}{'seconds':>10}{'images/s':>10}{'peak MB':>10}")
    with tempfile.TemporaryDirectory() as scratch, closing(Decoders(MAX_PIXELS)) as decoders:
        with phase(clip, "decoding alone", images):
            for _ in decoders.pixels(encoded, clip.preprocess):
                pass
        chunk = torch.randn(UPLOAD, 3, clip.preprocess.size, clip.preprocess.size)
        with phase(clip, "frozen part alone", images):
            for start in range(0, images, UPLOAD):
                clip.prefix(chunk[: images - start])
        with phase(clip, "decoding and frozen part", images):
            loaded = load_tokens(
                [lambda data=data: data for data in encoded],  # type: ignore[misc]
                clip,
                decoders=decoders,
                cache_bytes=config.method.cache_bytes,
                scratch=Path(scratch),
            )
        names = tuple(f"thing {number}" for number in range(min(CLASSES, images)))
        task = TaskData(1, names, torch.arange(images) % len(names), loaded.tokens)
        mgclip, gapstream = (_built(clip, config, name) for name in ("mgclip", "gapstream"))
        stamps: list[float] = []
        with phase(clip, "adapters and rows (mgclip)", images):
            mgclip.update(task, lambda progress: _stamp(progress, stamps))
        with phase(clip, "statistics (gapstream)", images):
            gapstream.update(task, silent)
        with phase(clip, "export, the first of a process", images):
            seconds = export(clip, config, gapstream, Path(scratch) / "release")
    of_one = loaded.tokens.batch(torch.arange(1)).nbytes
    where = "memory" if of_one * images <= config.method.cache_bytes else "a file"
    print(f"tokens: {of_one / 1e3:.0f} kB an image, all {of_one * images / 1e9:.2g} GB in {where}")
    print("export: " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    print_step(clip, config, task, stamps, peak)


def print_step(clip: Clip, config: Config, task: TaskData, stamps: Sequence[float], peak: float) -> None:
    """Print what a step of the adapters takes, and how near that is to the peak."""
    size = config.method.mgclip.batch_size
    steps = [after - before for before, after in pairwise(stamps[: len(task) // size])]
    if not steps:
        print(f"adapters: a step of {size} images can be timed from {2 * size} images on")
        return
    step, flops = statistics.median(steps), step_flops(clip, config, task, size)
    print(
        f"adapters: {1e3 * step:.1f} ms a step of {size} images, {size / step:.0f} images/s, "
        f"{flops / 1e12:.3g} TFLOP, {flops / step / peak:.1%} of the peak"
    )


def jpeg(seed: int) -> bytes:
    """Draw a JPEG of 500 x 400 with the detail of a photograph: coarse blots under noise."""
    random = np.random.default_rng(seed)
    blots = Image.fromarray(random.integers(0, 256, (8, 10, 3), np.uint8)).resize((500, 400), Image.Resampling.BICUBIC)
    noise = random.integers(-12, 13, (400, 500, 3), np.int16)
    out = io.BytesIO()
    Image.fromarray(np.clip(blots + noise, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


@contextmanager
def phase(clip: Clip, name: str, images: int) -> Iterator[None]:
    """Print the seconds of the block, images a second, and the memory it had beyond what was in use before."""
    with peak_memory(clip.device) as measured:
        began = time.perf_counter()
        yield
        wait_for(clip.device)
        seconds = _since(began)
        print(f"{name:34}{seconds:10.2f}{images / seconds:10.0f}{measured() / 1e6:10.0f}", flush=True)


def matmul_flops(device: torch.device) -> float:
    """Give the floating point operations a second of products of two bfloat16 matrices: the best of five rounds."""
    size, products = (8192, 20) if device.type == "cuda" else (512, 2)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(5):
        wait_for(device)
        began = time.perf_counter()
        for _ in range(products):
            a @ b
        wait_for(device)
        best = max(best, products * 2 * size**3 / _since(began))
    return best


def step_flops(clip: Clip, config: Config, task: TaskData, size: int) -> int:
    """Count the floating point operations of a step of the adapters, forward and backward."""
    student = Student(clip, config.method.lora, seed=0)
    index = torch.arange(size)
    labels, ids = task.labels[index].to(clip.device), clip.tokenize(task.classes)
    with FlopCounterMode(display=False) as counter:
        images, names = student.encode_tokens(task.tokens.batch(index)), student.encode_ids(ids)
        local_loss(images, names, labels, clip.logit_scale).backward()
    return counter.get_total_flops()


def export(clip: Clip, config: Config, method: Method, folder: Path) -> dict[str, float]:
    """Release the model as the trainer does; the seconds of each part."""
    settings, size = config.release, clip.preprocess.size
    images = np.random.default_rng(0).normal(size=(8, 3, size, size)).astype(np.float32)
    exporter = OnnxExporter(settings.opset, settings.max_batch, settings.parity_atol)
    text = TextToRelease(method.text_module(), lambda: clip.tokenizer)
    return dict(exporter.release(method.inference_module(), clip.preprocess, {}, folder, images, text=text).seconds)


def _built(clip: Clip, config: Config, name: str) -> Method:
    return methods.build(clip, config.method.model_copy(update={"name": name}))


def _stamp(progress: Progress, stamps: list[float]) -> None:
    """Note when a step of the adapters ends: the loss has been fetched then, so the device has done it."""
    if progress.phase == "train" and progress.step:
        stamps.append(time.perf_counter())


def _since(began: float) -> float:
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
