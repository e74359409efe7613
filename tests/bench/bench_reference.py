"""MG-CLIP in its published form through the whole agent, against the published code on the same stream.

    .venv/bin/python tests/bench/bench_reference.py --data tiny-imagenet-stream.zip --class-order tiny-imagenet.json

The reference is the published training loop, adapters and visual classifier, run with tinyclip on 10 tasks of 10
Tiny-ImageNet classes (the first 200 training images of each, all 50 validation images, one epoch, CPU, fp32). The
agent reads the archive, cuts, learns, scores and releases as it always does. Exits with 1 when Avg or Last differ by
more than a point, or the untouched model's by more than 0.3.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import threading
from pathlib import Path

from agent.config import Config
from agent.run import run_agent

REFERENCE = {
    "accuracy after each task": (77.80, 70.90, 62.00, 60.00, 58.20, 55.90, 54.23, 51.00, 50.42, 48.92),
    "avg": 58.94,
    "last": 48.92,
    "zero-shot avg": 47.24,
    "zero-shot last": 35.34,
}
"""Percent; the published code with seed 42 (seed 0: Avg 58.89, Last 48.96)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="zip or folder with train and val splits")
    parser.add_argument("--class-order", type=Path, required=True, help="JSON list, or an object with stream_order")
    parser.add_argument("--fusion", choices=("faithful", "calibrated"), default="faithful")
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    order = json.loads(arguments.class_order.read_text())
    order = order["stream_order"] if isinstance(order, dict) else order
    stream = {"path": arguments.data, "class_order": order, "classes_per_task": 10, "per_class": 200}
    mgclip = {"schedule": "paper", "epochs": 1, "fusion": arguments.fusion}
    logging.basicConfig(level="INFO", format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        config = Config.model_validate(
            {
                "source": {"archive": stream},
                "task": {"samples": 0},
                "method": {"name": "mgclip", "seed": arguments.seed, "mgclip": mgclip},
                "evaluation": {"holdout_fraction": 0, "test_archive": arguments.data},
                "state": {"path": Path(folder)},
                "http": {"enabled": False},
            }
        )
        commit = run_agent(config, threading.Event())
        assert commit is not None
        report = json.loads((commit.path / "report.json").read_text())
    return compare(report)


def compare(report: dict) -> int:
    accuracies = [100 * entry["accuracy"] for entry in report["history"]]
    zero_shot = [100 * entry["zero_shot"] for entry in report["history"]]
    print("after task      " + "".join(f"{task:7}" for task in range(1, len(accuracies) + 1)))
    print("published code  " + "".join(f"{value:7.2f}" for value in REFERENCE["accuracy after each task"]))
    print("gapstream       " + "".join(f"{value:7.2f}" for value in accuracies))
    measured = {
        "avg": 100 * report["avg"],
        "last": 100 * report["last"],
        "zero-shot avg": sum(zero_shot) / len(zero_shot),
        "zero-shot last": zero_shot[-1],
    }
    failed = False
    for name, value in measured.items():
        allowed = 0.3 if name.startswith("zero-shot") else 1.0
        difference = value - REFERENCE[name]
        failed |= abs(difference) > allowed
        print(f"{name:15} {value:7.2f}, published code {REFERENCE[name]:.2f}: {difference:+.2f} (allowed: {allowed})")
    seconds = [sum(entry["seconds"].values()) for entry in report["history"]]
    print(f"seconds a task, scoring and release included: {', '.join(f'{s:.0f}' for s in seconds)}")
    print(f"fusion: {report['fusion']}; forgetting {report['forgetting']:.3f}; {report['model']}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
