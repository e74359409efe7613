"""What a smaller form of a release brings and costs: images a second against fp32, and seconds to make it.

    python -m tests.bench.bench_precision                              the bundled model
    python -m tests.bench.bench_precision --model ViT-B-32 --rounds 5  another one, with random weights

One JSON line per result. Speed is the median of interleaved pairs, with the smallest and the largest of their ratios.
The last line is what `serve.precision = "auto"` chose, and in how many seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from agent.config import Model
from agent.model.clip import load_clip
from agent.trainer import ACCURACY_IMAGES
from exporter.fastest import fastest
from exporter.onnx import OnnxExporter
from exporter.precision import FP32, PRECISIONS
from exporter.runtime import Session
from exporter.trace_cache import user_cache
from tests.bench.bench_inference import inference_module

CLASSES = 100
CHECKED = 64
"""Images of a check batch, the default of release.max_batch."""


def measure(model: Model, precision: str, rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    clip = load_clip(model)
    size = clip.preprocess.size
    images = np.random.default_rng(0).normal(size=(CHECKED, 3, size, size)).astype(np.float32)
    # As many held-out images as the trainer scores a form on, in batches of the same size.
    batches = -(-ACCURACY_IMAGES // CHECKED)
    holdout = [(images, np.zeros(CHECKED, np.int64))] * batches
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "release"
        exporter = OnnxExporter(max_batch=CHECKED, threads=threads, precisions=(precision,), traces=user_cache())
        release = exporter.release(inference_module(clip, CLASSES), clip.preprocess, {}, folder, images[:4], holdout)
        parity = release.variants[precision].parity
        shown(model=model.name, seconds=dict(release.seconds), top1=parity and parity.top1)
        sessions = {name: Session(release.model_in(name), device="cpu", threads=threads) for name in (FP32, precision)}
        for batch in (1, 16):
            times: dict[str, list[float]] = {name: [] for name in sessions}
            for _ in range(rounds + 2):
                for name, session in sessions.items():
                    began = time.perf_counter()
                    session.run(images[:batch])
                    times[name].append(time.perf_counter() - began)
            ratios = [full / small for full, small in zip(times[FP32][2:], times[precision][2:], strict=True)]
            rates = {name: round(batch / statistics.median(found[2:]), 1) for name, found in times.items()}
            spread = [round(ratio, 2) for ratio in (statistics.median(ratios), min(ratios), max(ratios))]
            shown(model=model.name, batch=batch, images_per_s=rates, faster=spread)
        began = time.perf_counter()
        timing = fastest(sessions, FP32, images[:4], CHECKED)
        shown(model=model.name, auto=timing.chosen, rates=str(timing), seconds=round(time.perf_counter() - began, 2))


def shown(**result: object) -> None:
    print(json.dumps(result | {"load": round(os.getloadavg()[0], 1)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinyclip", help="bundled, or an architecture of open_clip")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="int8")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and onnxruntime")
    options = parser.parse_args()
    pretrained = "" if options.model == "tinyclip" else "random"
    model = Model(name=options.model, pretrained=pretrained, device="cpu")
    measure(model, options.precision, options.rounds, options.threads)


if __name__ == "__main__":
    main()
