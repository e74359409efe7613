"""Answers from a release against eager PyTorch, and what replacing the release costs those who ask.

    python -m tests.bench.bench_inference               tinyclip and a ViT-B/32 with random weights, batch 1 and 16
    python -m tests.bench.bench_inference --model ViT-B-16 --threads 1 --rounds 5    another architecture of open_clip
    python -m tests.bench.bench_inference --swap        four clients while the release is replaced again and again
    python -m tests.bench.bench_inference --memory      the same over HTTP: memory of `gapstream serve` over 50 swaps

One JSON line per result; times are medians over interleaved rounds, in milliseconds: of the clock, and with one thread
of the processor, so that other work on the machine counts less. A speedup is the median of the rounds' ratios, with the
smallest and the largest. What has a limit says whether it is kept, and the exit code is 1 when it is not.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image

from agent.config import Model
from agent.methods.base import InferenceModule, TextModule
from agent.methods.classifiers import FaithfulFusion
from agent.model.clip import Clip, load_clip
from exporter.onnx import OnnxExporter
from exporter.release import Release
from exporter.runtime import Classifier, Session
from exporter.text_export import TextToRelease
from exporter.trace_cache import user_cache

MODELS = ("tinyclip", "ViT-B-32")


def model(name: str) -> Model:
    """The bundled model, or an architecture of open_clip with random weights."""
    return Model(name=name, pretrained="" if name == "tinyclip" else "random", device="cpu")


def inference_module(clip: Clip, classes: int) -> InferenceModule:
    names = tuple(f"class {index}" for index in range(classes))
    text = clip.encode_names(names)
    return FaithfulFusion(clip.image, names, text, text + 0.01 * torch.randn_like(text), clip.logit_scale)


def release(exporter: OnnxExporter, clip: Clip, classes: int, folder: Path) -> tuple[InferenceModule, Release]:
    size = clip.preprocess.size
    images = np.random.default_rng(0).normal(size=(4, 3, size, size)).astype(np.float32)
    module = inference_module(clip, classes)
    text = TextToRelease(TextModule(clip, clip.text), lambda: clip.tokenizer)
    return module, exporter.release(module, clip.preprocess, {"model": clip.identity}, folder, images, text=text)


def interleaved(rounds: int, clock: Callable[[], float], *calls: Callable[[], object]) -> list[list[float]]:
    """Milliseconds of each call in every round, taken in turns so that all see the same machine."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 2):
        for call, taken in zip(calls, times, strict=True):
            began = clock()
            call()
            if turn >= 2:
                taken.append((clock() - began) * 1000)
    return times


def speed(models: Sequence[str], rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    for name in models:
        clip = load_clip(model(name))
        with tempfile.TemporaryDirectory() as scratch:
            exporter = OnnxExporter(max_batch=16, threads=threads, traces=user_cache())
            module, made = release(exporter, clip, 100, Path(scratch) / "release")
            session = Session(made.model, device="cpu", threads=threads)
            for batch in (1, 16):
                size = clip.preprocess.size
                images = np.random.default_rng(1).normal(size=(batch, 3, size, size)).astype(np.float32)
                tensor = torch.from_numpy(images)
                with torch.inference_mode():
                    times = interleaved(rounds, clock, lambda: module(tensor), lambda: session.run(images))  # noqa: B023
                eager, onnx = map(statistics.median, times)
                ratios = [one / other for one, other in zip(*times, strict=True)]
                result = {"model": name, "batch": batch, "torch_ms": eager, "onnxruntime_ms": onnx}
                result |= {"speedup": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
                print(json.dumps(rounded(result | {"load": os.getloadavg()[0]})), flush=True)


BLOCKS = 5
SWAP_S = 0.5
MAX_P99_RATIO = 2.0
MAX_GROWTH = 1.15


def swap(swaps: int, clients: int, threads: int) -> bool:
    """p99 of single images from `clients` threads, undisturbed and with a swap about every half second, in turns."""
    clip = load_clip(model("tinyclip"))
    with tempfile.TemporaryDirectory() as scratch:
        state = Path(scratch)
        two_releases(clip, state)
        classifier = Classifier(state, threads=threads, device="cpu")
        asked = Image.fromarray(picture(clip.preprocess.size))
        stop, failed = threading.Event(), [0]
        times: list[float] = []

        def client() -> None:
            while not stop.is_set():
                began = time.perf_counter()
                try:
                    (answer,) = classifier.classify([asked], top=0)
                    failed[0] += len(answer.labels) != CLASSES[answer.release]
                except Exception:
                    failed[0] += 1
                times.append((time.perf_counter() - began) * 1000)

        asking = [threading.Thread(target=client) for _ in range(clients)]
        for thread in asking:
            thread.start()
        time.sleep(2)
        alone: list[float] = []
        during: list[float] = []
        done = 0
        per_block = -(-swaps // BLOCKS)
        for _ in range(BLOCKS):
            times.clear()
            time.sleep(per_block * SWAP_S)
            alone += times
            times.clear()
            for _ in range(per_block):
                began = time.perf_counter()
                current(state, 2 - done % 2)
                assert classifier.refresh()
                done += 1
                time.sleep(max(0.0, SWAP_S - (time.perf_counter() - began)))
            during += times
        stop.set()
        for thread in asking:
            thread.join()
    alone.sort()
    during.sort()
    ratio = quantile(during, 0.99) / quantile(alone, 0.99)
    kept = not failed[0] and ratio <= MAX_P99_RATIO
    result = {
        "swaps": done,
        "clients": clients,
        "answers": len(alone) + len(during),
        "failed_or_mixed": failed[0],
        "p50_ms": quantile(alone, 0.5),
        "p99_ms": quantile(alone, 0.99),
        "p50_swapping_ms": quantile(during, 0.5),
        "p99_swapping_ms": quantile(during, 0.99),
        "p99_ratio": ratio,
        "limit": MAX_P99_RATIO,
        "kept": kept,
    }
    print(json.dumps(rounded(result)), flush=True)
    return kept


def memory(swaps: int, clients: int, threads: int) -> bool:
    """Resident memory of a serving process after 5 swaps and at the end, while clients ask with and without names."""
    clip = load_clip(model("tinyclip"))
    with tempfile.TemporaryDirectory() as scratch:
        state = Path(scratch)
        two_releases(clip, state)
        keys = {"state.path": state, "serve.port": 0, "serve.threads": threads, "serve.device": "cpu"}
        options = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
        process = subprocess.Popen(
            [sys.executable, "-m", "agent", "serve", *options], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        log = iter(process.stderr)
        port = next(int(found[1]) for line in log if (found := re.search(r"http://[^:]+:(\d+)/v1/classify", line)))
        threading.Thread(target=lambda: [None for _ in log], daemon=True).start()
        encoded = io.BytesIO()
        Image.fromarray(picture(clip.preprocess.size)).save(encoded, "PNG")
        stop, failed, answers = threading.Event(), [0], [0]

        def ask(path: str, body: bytes | None = None) -> dict[str, Any]:
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "image/png"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)

        def client(names: str, more: int) -> None:
            while not stop.is_set():
                try:
                    answer = ask(f"/v1/classify?top=0{names}", encoded.getvalue())
                    failed[0] += len(answer["predictions"][0]["labels"]) != CLASSES[answer["release"]] + more
                except Exception:
                    failed[0] += 1
                answers[0] += 1

        def serves() -> str | None:
            try:
                return ask("/v1/labels")["release"]
            except (urllib.error.HTTPError, urllib.error.URLError):
                return None

        while serves() is None:
            time.sleep(0.05)
        asking = [
            threading.Thread(target=client, args=(("&name=zebra", 1) if i % 2 else ("", 0))) for i in range(clients)
        ]
        for thread in asking:
            thread.start()
        resident = []
        try:
            for turn in range(swaps):
                before = serves()
                current(state, 2 - turn % 2)
                while serves() == before:
                    time.sleep(0.05)
                resident.append(psutil.Process(process.pid).memory_info().rss / 2**20)
        finally:
            stop.set()
            for thread in asking:
                thread.join()
            process.terminate()
            process.wait(30)
    # medians: a sample may fall into the moment when both releases are open
    early, late = statistics.median(resident[2:7]), statistics.median(resident[-5:])
    growth = late / early
    kept = not failed[0] and growth <= MAX_GROWTH
    result = {
        "swaps": swaps,
        "clients": clients,
        "answers": answers[0],
        "failed_or_mixed": failed[0],
        "resident_mib_after_5": early,
        "resident_mib_largest": max(resident),
        "resident_mib_at_end": late,
        "ratio": growth,
        "limit": MAX_GROWTH,
        "kept": kept,
    }
    print(json.dumps(rounded(result)), flush=True)
    return kept


CLASSES: dict[str, int] = {}
"""How many classes each release of `two_releases` has, by its id."""


def two_releases(clip: Clip, state: Path) -> None:
    exporter = OnnxExporter(max_batch=4)
    for number in (1, 2):
        folder = state / "commits" / str(number) / "release"
        _, made = release(exporter, clip, 10 * number, folder)
        CLASSES[made.id] = 10 * number
    current(state, 1)


def picture(size: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


def current(state: Path, number: int) -> None:
    link = state / "CURRENT.new"
    link.symlink_to(f"commits/{number}")
    link.rename(state / "CURRENT")


def quantile(ordered: list[float], share: float) -> float:
    return ordered[int(share * (len(ordered) - 1))]


def rounded(result: dict[str, object]) -> dict[str, object]:
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in result.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swap", action="store_true", help="measure hot swaps instead of speed")
    parser.add_argument("--memory", action="store_true", help="measure the memory that hot swaps take")
    parser.add_argument("--model", help="measure the speed of this one alone: bundled, or an architecture of open_clip")
    parser.add_argument("--rounds", type=int, help="rounds (20), or swaps (20, and 50 with --memory; at least 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and onnxruntime")
    options = parser.parse_args()
    if options.swap:
        return not swap(max(5, options.rounds or 20), 4, options.threads)
    if options.memory:
        return not memory(max(5, options.rounds or 50), 4, options.threads)
    speed([options.model] if options.model else MODELS, options.rounds or 20, options.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
