"""Answers from a release against eager PyTorch, and what replacing the release costs those who ask.

    python -m tests.bench.bench_inference               tinyclip and a ViT-B/32 with random weights, batch 1 and 16
    python -m tests.bench.bench_inference --swap        four clients while the release is replaced again and again

One JSON line per result; times are medians over interleaved rounds, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch

from agent.clip import Clip, load_clip
from agent.config import Model
from agent.methods.base import InferenceModule
from agent.methods.heads import FaithfulFusion
from exporter.onnx import OnnxExporter
from exporter.release import Release
from exporter.runtime import Classifier, Session

MODELS = {"tinyclip": Model(device="cpu"), "ViT-B-32": Model(name="ViT-B-32", pretrained="random", device="cpu")}


def inference_module(clip: Clip, classes: int) -> InferenceModule:
    names = tuple(f"class {index}" for index in range(classes))
    text = clip.encode_names(names)
    return FaithfulFusion(clip.image, names, text, text + 0.01 * torch.randn_like(text), clip.logit_scale)


def release(exporter: OnnxExporter, clip: Clip, classes: int, folder: Path) -> tuple[InferenceModule, Release]:
    size = clip.preprocess.size
    images = np.random.default_rng(0).normal(size=(4, 3, size, size)).astype(np.float32)
    module = inference_module(clip, classes)
    return module, exporter.release(module, clip.preprocess, {"model": clip.identity}, folder, images)


def interleaved(rounds: int, *calls: Callable[[], object]) -> list[float]:
    """Median milliseconds of each call, taken in turns so that all see the same machine."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 2):
        for call, taken in zip(calls, times, strict=True):
            began = time.perf_counter()
            call()
            if turn >= 2:
                taken.append((time.perf_counter() - began) * 1000)
    return [statistics.median(taken) for taken in times]


def speed(rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for name, settings in MODELS.items():
        clip = load_clip(settings)
        with tempfile.TemporaryDirectory() as scratch:
            module, made = release(OnnxExporter(max_batch=16), clip, 100, Path(scratch) / "release")
            session = Session(made.model, device="cpu", threads=threads)
            for batch in (1, 16):
                size = clip.preprocess.size
                images = np.random.default_rng(1).normal(size=(batch, 3, size, size)).astype(np.float32)
                tensor = torch.from_numpy(images)
                with torch.inference_mode():
                    eager, onnx = interleaved(rounds, lambda: module(tensor), lambda: session.run(images))  # noqa: B023
                result = {"model": name, "batch": batch, "torch_ms": eager, "onnxruntime_ms": onnx}
                print(json.dumps(rounded(result | {"speedup": eager / onnx})), flush=True)


def swap(swaps: int, clients: int, threads: int) -> None:
    """p99 of single images from `clients` threads, first undisturbed, then with a swap about every half second."""
    clip = load_clip(MODELS["tinyclip"])
    with tempfile.TemporaryDirectory() as scratch:
        state = Path(scratch)
        exporter = OnnxExporter(max_batch=4)
        for number in (1, 2):
            release(exporter, clip, 10 * number, state / "commits" / str(number) / "release")
        current(state, 1)
        classifier = Classifier(state, threads=threads, device="cpu")
        image = clip.preprocess.size
        picture = np.random.default_rng(0).integers(0, 256, (image, image, 3), dtype=np.uint8)
        from PIL import Image

        asked = Image.fromarray(picture)
        stop, failed = threading.Event(), [0]
        times: list[float] = []

        def client() -> None:
            while not stop.is_set():
                began = time.perf_counter()
                try:
                    (answer,) = classifier.classify([asked], top=0)
                    failed[0] += len(answer.labels) not in (10, 20)
                except Exception:
                    failed[0] += 1
                times.append((time.perf_counter() - began) * 1000)

        asking = [threading.Thread(target=client) for _ in range(clients)]
        for thread in asking:
            thread.start()
        time.sleep(2)
        times.clear()
        time.sleep(swaps * 0.5)
        alone = sorted(times)
        times.clear()
        resident = []
        for turn in range(swaps):
            current(state, 2 - turn % 2)
            assert classifier.refresh()
            resident.append(psutil.Process().memory_info().rss / 2**20)
            time.sleep(0.5)
        during = sorted(times)
        stop.set()
        for thread in asking:
            thread.join()
    result = {
        "swaps": swaps,
        "clients": clients,
        "answers": len(alone) + len(during),
        "failed": failed[0],
        "p50_ms": quantile(alone, 0.5),
        "p99_ms": quantile(alone, 0.99),
        "p50_swapping_ms": quantile(during, 0.5),
        "p99_swapping_ms": quantile(during, 0.99),
        "p99_ratio": quantile(during, 0.99) / quantile(alone, 0.99),
        "resident_mib_after_5": resident[4],
        "resident_mib_at_end": resident[-1],
    }
    print(json.dumps(rounded(result)), flush=True)


def current(state: Path, number: int) -> None:
    link = state / "CURRENT.new"
    link.symlink_to(f"commits/{number}")
    link.rename(state / "CURRENT")


def quantile(ordered: list[float], share: float) -> float:
    return ordered[int(share * (len(ordered) - 1))]


def rounded(result: dict[str, object]) -> dict[str, object]:
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swap", action="store_true", help="measure hot swaps instead of speed")
    parser.add_argument("--rounds", type=int, default=20, help="rounds, or swaps (at least 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and onnxruntime")
    options = parser.parse_args()
    if options.swap:
        swap(max(5, options.rounds), 4, options.threads)
    else:
        speed(options.rounds, options.threads)


if __name__ == "__main__":
    main()
