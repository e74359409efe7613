"""What a task over two ranks on one machine costs beside one of the trainer alone, each rank with one CPU thread.

Both learn the same two tasks of the bundled stream in turn. The second one is measured without its scoring, and the
scoring of both by itself. CPU seconds are those of a rank with its decoders; the longest rank's over the trainer's
alone is what as many free cores take at least, and what is beyond an even share is what every rank computes for itself,
as the class names, or rank 0 alone. Exit code 1 where the models differ by more than rounding.

    .venv/bin/python -m tests.bench.bench_ranks --methods gapstream,mgclip,finetune,ncm --per-class 100 --rounds 3
    .venv/bin/python -m tests.bench.bench_ranks --methods gapstream,mgclip,ncm --per-class 100 --rounds 3 --scored 100
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from agent.commits import CommitStore, Provenance
from agent.config import Config
from agent.layout import LEARNER_TENSORS
from agent.sharing import scores
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
    """One task."""

    cpu_s: list[float]
    """CPU seconds of each rank without scoring, its decoders included."""
    scoring_s: list[float]
    """Those that scoring both tasks took: decoding and embedding what is new, and all that follows an update."""
    wall_s: float
    waiting: list[float]
    """The share of its time that each rank spent in collectives."""
    tensors: dict[str, torch.Tensor]
    right: float | None
    """The accuracy."""
    sent: int
    """Bytes of encoded images that were sent to be scored."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="gapstream,mgclip,finetune,ncm")
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scored", type=int, default=0, help="test images of each class that are scored")
    arguments = parser.parse_args()
    print(
        f"{CLASSES} classes, {CLASSES * arguments.per_class} images a task, {arguments.scored} test images of each of "
        f"{2 * CLASSES} classes, {arguments.rounds} rounds in turn; load {os.getloadavg()[0]:.1f} on "
        f"{os.cpu_count()} cores"
    )
    print("method      CPU s alone   of 2 ranks     longest/alone   sum/alone   waiting        wall: 2 ranks/alone")
    same = True
    for method in arguments.methods.split(","):
        pairs = [
            tuple(learn(method, processes, arguments.per_class, arguments.scored) for processes in (1, 2))
            for _ in range(arguments.rounds)
        ]
        alone, both = zip(*pairs, strict=True)
        waiting = [statistics.median(one.waiting[rank] for one in both) for rank in (0, 1)]
        wall = statistics.median(two.wall_s / one.wall_s for one, two in pairs)
        print(f"{method:<11} {_row(alone, both, 'cpu_s')} {waiting[0]:>9.0%} {waiting[1]:>4.0%} {wall:>16.2f}")
        ratios = [max(two.cpu_s) / sum(one.cpu_s) for one, two in pairs]
        show(f"{method}: seconds of the busier of 2 ranks / alone, by the processor", ratios)
        if arguments.scored:
            print(f"  scoring   {_row(alone, both, 'scoring_s')}   {both[0].sent / 1e6:.2f} MB of images sent")
            ratios = [max(two.scoring_s) / sum(one.scoring_s) for one, two in pairs]
            show(f"{method}: scoring, seconds of the busier of 2 ranks / alone, by the processor", ratios)
        for one, two in pairs:
            if one.right != two.right:
                print(f"  accuracy is {one.right} alone and {two.right} of two ranks")
            for name, tensor in one.tensors.items():
                if not torch.allclose(tensor, two.tensors[name], rtol=ROUNDING, atol=ROUNDING):
                    same = False
                    print(f"  {name} differs by up to {(tensor - two.tensors[name]).abs().max().item():.1e}")
    return 0 if same else 1


def _row(alone: Sequence[Measured], both: Sequence[Measured], what: str) -> str:
    """The cells of a table for the seconds in the field `what`: alone, of each rank, and their ratios."""
    cpu = statistics.median(sum(getattr(one, what)) for one in alone)
    ranks = [statistics.median(getattr(one, what)[rank] for one in both) for rank in (0, 1)]
    return f"{cpu:>11.2f} {ranks[0]:>8.2f} {ranks[1]:>5.2f} {max(ranks) / cpu:>15.2f} {sum(ranks) / cpu:>11.2f}"


def learn(method: str, processes: int, per_class: int, scored: int) -> Measured:
    """Learn two tasks, and measure the second."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        test = {"test_archive": "bundled", "test_per_class": scored, "probe_per_class": scored} if scored else {}
        config = Config.model_validate(
            {
                "state": {"path": state},
                "method": {"name": method},
                "model": {"threads": 1},
                "training": {"processes": processes, "fewer": False},
                "evaluation": {"holdout_fraction": 0, **test},
            }
        )
        store, spool = CommitStore(state, 2), Spool(state / "spool", 2**30)
        store.lock()
        trainer = Trainer(config, None)
        trainer._exporter.release = _refused  # type: ignore[method-assign, assignment]
        scoring_s, sent = [0.0] * processes, 0
        for number in (1, 2):
            task = task_of(spool, number, per_class)
            trees = [psutil.Process()] + [psutil.Process(rank.pid) for rank in trainer._sharing._own.values()]
            with _scoring(trainer, trees) as (scored_s, images):
                before, started = _cpu_of(trees), time.perf_counter()
                outcome = trainer.learn(task, store.stage(), lambda progress: None)
                wall_s = time.perf_counter() - started
                whole = [cpu - earlier for cpu, earlier in zip(_cpu_of(trees), before, strict=True)]
            cpu_s = [cpu - some for cpu, some in zip(whole, scored_s, strict=True)]
            scoring_s = [one + other for one, other in zip(scoring_s, scored_s, strict=True)]
            sent += sum(images)
            commit = store.commit(outcome, Provenance("bench", task.classes, {}, {}))
            spool.release(task.samples)
        waiting = [share.waited_s / share.seconds for share in outcome.shares]
        trainer._sharing.close()
        trainer._decoders.close()
        store.close()
        tensors = load_file(commit.path / LEARNER_TENSORS)
        return Measured(cpu_s, scoring_s, wall_s, waiting, tensors, outcome.report.last, sent)


@contextmanager
def _scoring(trainer: Trainer, trees: list[psutil.Process]) -> Iterator[tuple[list[float], list[int]]]:
    """Give the CPU seconds of each rank in `admit` and `after` of the evaluator, and the bytes of each image that was
    sent to be scored; both are filled while the block runs."""
    seconds, sent = [0.0] * len(trees), []
    evaluator, send = trainer._evaluator, scores.send_images

    def measured(name: str) -> None:
        inner = getattr(type(evaluator), name)

        def outer(*arguments: Any) -> Any:
            before = _cpu_of(trees)
            result = inner(evaluator, *arguments)
            for at, (cpu, earlier) in enumerate(zip(_cpu_of(trees), before, strict=True)):
                seconds[at] += cpu - earlier
            return result

        setattr(evaluator, name, outer)

    def counted(rank: int, read: Sequence[Callable[[], bytes]]) -> None:
        sent.extend(len(one()) for one in read)
        send(rank, read)

    measured("admit")
    measured("after")
    scores.send_images = counted  # type: ignore[assignment]
    try:
        yield seconds, sent
    finally:
        scores.send_images = send


def task_of(spool: Spool, number: int, per_class: int) -> Task:
    archive = ArchiveFolder("bundled", "train")
    names = tuple(sorted(archive.classes))[CLASSES * (number - 1) : CLASSES * number]
    images = [(name, entry.read()) for name in names for entry in archive.images(name)[:per_class]]
    samples = tuple(spool.append(Record(PARTITION, i, name, data)) for i, (name, data) in enumerate(images))
    spool.end_segment()
    return Task(number, names, samples, {PARTITION: number}, "end", 0, len(samples), {})


def _cpu_of(ranks: list[psutil.Process]) -> list[float]:
    """CPU seconds so far of each rank with the decoders it has."""
    own = [[rank, *(child for child in rank.children() if child not in ranks)] for rank in ranks]
    return [sum(times.user + times.system for times in (one.cpu_times() for one in tree)) for tree in own]


def _refused(*parts: object) -> None:
    raise ReleaseError("not measured here")


if __name__ == "__main__":
    sys.exit(main())
