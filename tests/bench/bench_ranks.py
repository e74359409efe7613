"""What an update over two ranks on one machine costs beside one of the trainer alone, each rank with one CPU thread.

Both learn the same two tasks of the bundled stream in turn, and the second one is measured. CPU seconds are those of a
rank with its decoders; the longest rank's over the trainer's alone is what an update of as many free cores takes at
least, and what is beyond an even share is what every rank computes for itself, as the class names. Exit code 1 where
the models differ by more than rounding.

    .venv/bin/python -m tests.bench.bench_ranks --methods gapstream,mgclip,finetune,ncm --per-class 100 --rounds 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from agent.commits import CommitStore, Provenance
from agent.config import Config
from agent.layout import LEARNER_TENSORS
from agent.trainer import Trainer
from exporter.release import ReleaseError
from streams.archive_folder import ArchiveFolder
from streams.buffer import Task
from streams.record import Partition, Record
from streams.spool import Spool
from tests.bench.results import show

PARTITION = Partition("bench", 0)
CLASSES = 5
"""Classes of a task."""
ROUNDING = 1e-3
"""Tensors of the two models may differ by this, absolutely and relatively."""


@dataclass(frozen=True)
class Measured:
    """One update."""

    cpu_s: list[float]
    """CPU seconds of each rank, its decoders included."""
    wall_s: float
    waiting: list[float]
    """The share of its time that each rank spent in collectives."""
    tensors: dict[str, torch.Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="gapstream,mgclip,finetune,ncm")
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(
        f"{CLASSES} classes, {CLASSES * arguments.per_class} images a task, {arguments.rounds} rounds in turn; load",
        end=" ",
    )
    print(f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print("method      CPU s alone   of 2 ranks     longest/alone   sum/alone   waiting        wall: 2 ranks/alone")
    same = True
    for method in arguments.methods.split(","):
        pairs = [
            (update(method, 1, arguments.per_class), update(method, 2, arguments.per_class))
            for _ in range(arguments.rounds)
        ]
        alone, both = zip(*pairs, strict=True)
        cpu = statistics.median(sum(one.cpu_s) for one in alone)
        ranks = [statistics.median(one.cpu_s[rank] for one in both) for rank in (0, 1)]
        waiting = [statistics.median(one.waiting[rank] for one in both) for rank in (0, 1)]
        wall = statistics.median(two.wall_s / one.wall_s for one, two in pairs)
        parts = f"{cpu:>11.2f} {ranks[0]:>8.2f} {ranks[1]:>5.2f} {max(ranks) / cpu:>15.2f} {sum(ranks) / cpu:>11.2f}"
        print(f"{method:<11} {parts} {waiting[0]:>9.0%} {waiting[1]:>4.0%} {wall:>16.2f}")
        ratios = [max(two.cpu_s) / sum(one.cpu_s) for one, two in pairs]
        show(f"{method}: seconds of the busier of 2 ranks / alone, by the processor", ratios)
        for one, two in pairs:
            for name, tensor in one.tensors.items():
                if not torch.allclose(tensor, two.tensors[name], rtol=ROUNDING, atol=ROUNDING):
                    same = False
                    print(f"  {name} differs by up to {(tensor - two.tensors[name]).abs().max().item():.1e}")
    return 0 if same else 1


def update(method: str, processes: int, per_class: int) -> Measured:
    """Learn two tasks, and measure the second."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        config = Config.model_validate(
            {
                "state": {"path": state},
                "method": {"name": method},
                "model": {"threads": 1},
                "training": {"processes": processes, "fewer": False},
                "evaluation": {"holdout_fraction": 0},
            }
        )
        store, spool = CommitStore(state, 2), Spool(state / "spool", 2**30)
        store.lock()
        trainer = Trainer(config, None)
        trainer._exporter.release = _refused  # type: ignore[method-assign, assignment]
        for number in (1, 2):
            task = task_of(spool, number, per_class)
            trees = [psutil.Process()] + [psutil.Process(rank.pid) for rank in trainer._sharing._own.values()]
            before, started = [cpu_of(tree, trees) for tree in trees], time.perf_counter()
            outcome = trainer.learn(task, store.stage(), lambda progress: None)
            wall_s = time.perf_counter() - started
            cpu_s = [cpu_of(tree, trees) - earlier for tree, earlier in zip(trees, before, strict=True)]
            commit = store.commit(outcome, Provenance("bench", task.classes, {}, {}))
            spool.release(task.samples)
        waiting = [share.waited_s / share.seconds for share in outcome.shares]
        trainer._sharing.close()
        trainer._decoders.close()
        store.close()
        return Measured(cpu_s, wall_s, waiting, load_file(commit.path / LEARNER_TENSORS))


def task_of(spool: Spool, number: int, per_class: int) -> Task:
    archive = ArchiveFolder("bundled", "train")
    names = tuple(sorted(archive.classes))[CLASSES * (number - 1) : CLASSES * number]
    images = [(name, entry.read()) for name in names for entry in archive.images(name)[:per_class]]
    samples = tuple(spool.append(Record(PARTITION, i, name, data)) for i, (name, data) in enumerate(images))
    spool.end_segment()
    return Task(number, names, samples, {PARTITION: number}, "end", 0, len(samples), {})


def cpu_of(process: psutil.Process, ranks: list[psutil.Process]) -> float:
    """CPU seconds so far of a rank and of the decoders it has."""
    own = [process, *(child for child in process.children() if child not in ranks)]
    return sum(times.user + times.system for times in (one.cpu_times() for one in own))


def _refused(*parts: object) -> None:
    raise ReleaseError("not measured here")


if __name__ == "__main__":
    sys.exit(main())
