"""What the first export of a process takes, with the traced graphs of an earlier one and without.

    .venv/bin/python -m tests.bench.bench_export

Each is a process of its own that learns two classes of noise and releases the bundled model with its text part; the two
take turns. Exits with 1 when an export with kept graphs takes more than 2 s of the clock in the median, which a machine
with other work does not show: the ratio of the processor's seconds is what counts there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.results import show

MOST_S = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--traces", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.traces:
        print(json.dumps(export(arguments.traces)))
        return 0
    found: dict[str, list[dict[str, float]]] = {"traced": [], "kept": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for name in found:  # the first of a round fills what the second uses
                command = [sys.executable, "-m", "tests.bench.bench_export", "--traces", f"{folder}/{number}"]
                found[name].append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
    for name, runs in found.items():
        clock, processor = (statistics.median(run[key] for run in runs) for key in ("clock", "processor"))
        print(f"{name:6}  clock {clock:6.2f} s   processor {processor:6.2f} s")
    ratios = sorted(a["processor"] / b["processor"] for a, b in zip(*found.values(), strict=True))
    print(f"processor, traced / kept: {statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})")
    show("first export of a process: traced / with kept graphs", ratios)
    return int(statistics.median(run["clock"] for run in found["kept"]) > MOST_S)


def export(traces: Path) -> dict[str, float]:
    """Seconds of the clock and of the processor."""
    import numpy as np
    import torch

    from agent import methods
    from agent.config import Config
    from agent.methods.base import TaskData
    from agent.model.clip import load_clip
    from agent.model.images import StoredTokens
    from exporter.onnx import OnnxExporter
    from exporter.text_export import TextToRelease
    from exporter.trace_cache import TraceCache

    config = Config()
    clip = load_clip(config.model)
    size = clip.preprocess.size
    method = methods.build(clip, config.method)
    images = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(0))
    tokens = StoredTokens(clip.prefix(images).cpu(), torch.device("cpu"))
    method.update(TaskData(1, ("zebra", "okapi"), torch.arange(16) % 2, tokens), lambda progress: None)
    module, text = method.inference_module(), TextToRelease(method.text_module(), lambda: clip.tokenizer)
    exporter = OnnxExporter(config.release.opset, config.release.max_batch, traces=TraceCache(traces))
    checked = np.random.default_rng(0).normal(size=(16, 3, size, size)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        clock, processor = time.monotonic(), time.process_time()
        exporter.release(module, clip.preprocess, {}, Path(folder) / "release", checked, text=text)
        return {"clock": time.monotonic() - clock, "processor": time.process_time() - processor}


if __name__ == "__main__":
    sys.exit(main())
