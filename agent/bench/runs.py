"""Runs of a comparison: learn the same stream with several methods and seeds, and compare them in a table and pictures.

The methods are those the agent runs. Every image is decoded and passed through the frozen part once, for all of them.
A run is one method with one seed; its results are a JSON file, written when it is done, and a run whose file is there
is not run again: what was interrupted starts over, what is finished stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from agent import methods
from agent.bench import JOINT, charts
from agent.bench.costs import device_name, optimised, peak_memory, wait_for
from agent.bench.data import Data, Listing, Scored, list_images, load_data
from agent.bench.results import GapResult, Result, TaskResult
from agent.bench.tables import terminal_table, write_tables
from agent.config import Config, resolved
from agent.methods.base import Method, OnProgress, TaskData
from agent.model import gap
from agent.model.clip import Clip, load_clip
from agent.scoring.formulas import (
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    last_accuracy,
    retention,
)
from agent.values import Progress as Doing
from agent.values import Update

_PACKAGES = ("gapstream", "torch", "open_clip_torch", "timm", "numpy", "pillow")
"""A run is made again when the version of one of these changes: learning and decoding are theirs, so its numbers may
differ."""


def bench(
    config: Config, rows: Mapping[str, Config], seeds: Sequence[int], tasks: int, out: Path, console: Console
) -> None:
    """Run what is not in `out`/runs yet and write table and pictures to `out`; prints the table.

    `rows` gives the configuration of each method spec, which differs from `config` in `method` only. Only the first
    `tasks` tasks are learned; 0 is all. Raises BenchError, StreamError, ModelError.
    """
    if config.model.threads:
        torch.set_num_threads(config.model.threads)
    listing = list_images(config, tasks)
    clip = load_clip(config.model)
    runs = [Run.of(spec, row, seed, clip, listing) for spec, row in rows.items() for seed in seeds]
    console.print(
        f"{len(rows)} methods x {len(seeds)} seeds on {len(listing.tasks)} tasks: "
        f"{sum(map(len, listing.tasks))} training, {len(listing.test)} test and {len(listing.probe)} probe images"
    )
    (out / "runs").mkdir(parents=True, exist_ok=True)
    waiting = [run for run in runs if not run.file(out).exists()]
    if waiting:
        _run_all(waiting, listing, clip, config, out, console)
    # Also those just made are read from their files, so that a table never shows what a later one could not.
    results = [Result.from_json(json.loads(run.file(out).read_text("utf-8"))) for run in runs]
    compared = [[result for result in results if result.method == spec] for spec in rows]
    write_tables(compared, out)
    charts.write(compared, out)
    console.print(terminal_table(compared))
    console.print(f"results in {out}: table.md, table.csv, accuracy.svg, matrices.svg, gap.svg, runs/")


def _run_all(waiting: Sequence[Run], listing: Listing, clip: Clip, config: Config, out: Path, console: Console) -> None:
    """Decode the images, then do one run after the other, each with a bar of its own below the two of the whole."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bars:
        images = bars.add_task("decoding images", total=listing.images)
        data = load_data(listing, clip, config, out, lambda done: bars.update(images, completed=done))
        overall = bars.add_task("runs", total=len(waiting))
        for run in waiting:
            steps = data.joint() if run.spec.partition(":")[0] == JOINT else tuple(enumerate(data.tasks))
            bar = bars.add_task(run.title, total=len(steps))

            # Defaults bind this run's bar and title; names of the loop would be those of the newest run.
            def on_progress(doing: Doing, bar: Any = bar, title: str = run.title) -> None:
                epoch = f" epoch {doing.epoch}/{doing.epochs}" if doing.epochs else ""
                bars.update(bar, description=f"{title}: {doing.phase}{epoch}")

            result = run_one(run, steps, data, clip, on_progress, partial(bars.advance, bar))
            _write(run.file(out), json.dumps(result.to_json(), indent=1, ensure_ascii=False, allow_nan=False))
            bars.remove_task(bar)
            bars.advance(overall)
            assert result.last is not None  # every run is scored after the last task
            bars.console.print(f"{run.title}: Last {result.last:.1%} after {result.seconds:.0f} s of learning")


@dataclass(frozen=True)
class Run:
    """A run is one method with one seed."""

    spec: str
    """The method with its settings, as it was asked for."""
    seed: int
    config: Config
    inputs: Mapping[str, Any]
    """All that its result depends on, JSON-able. A run with other inputs is another run, in another file."""

    @classmethod
    def of(cls, spec: str, config: Config, seed: int, clip: Clip, listing: Listing) -> Run:
        """Put a run together from what it is asked for, the model and the listed images."""
        method = config.method.model_copy(update={"seed": seed})
        # The sections of other methods do not count: changing one must not make this run again.
        used = {"name", "seed", "lora", method.name}
        inputs = {
            "spec": spec,
            "method": method.model_dump(mode="json", include=used),
            "model": clip.identity,
            "precision": config.model.precision,
            "threads": config.model.threads,
            "device": clip.device.type,
            "data": listing.digest,
            "versions": {name: metadata.version(name) for name in _PACKAGES},
        }
        return cls(spec, seed, config.model_copy(update={"method": method}), inputs)

    @property
    def title(self) -> str:
        """The run's name for people."""
        return f"{self.spec} seed {self.seed}"

    def file(self, out: Path) -> Path:
        """Give the run's file below the results' folder: ten hexadecimal digits of its inputs' hash tell runs apart."""
        digest = hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()[:10]
        return out / "runs" / f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', self.spec)}-seed{self.seed}-{digest}.json"


def run_one(
    run: Run,
    steps: Sequence[tuple[int, TaskData]],
    data: Data,
    clip: Clip,
    on_progress: OnProgress = lambda progress: None,
    advance: Callable[[], None] = lambda: None,
) -> Result:
    """Learn the stream and score after every task.

    `steps` are pairs of what to learn and the index of the task after which it is scored; `joint` has a single one.
    `advance` is called after each.
    """
    method = methods.build(clip, run.config.method)
    tasks = [task.classes for task in data.tasks]
    matrix: list[list[float | None]] = [[None] * len(tasks) for _ in tasks]
    accuracies: list[float | None] = [None] * len(tasks)
    history: list[TaskResult] = []
    trainable = peak = 0
    for at, task in steps:
        with optimised() as parameters, peak_memory(clip.device) as measured:
            started = time.perf_counter()
            update = method.update(task, on_progress)
            wait_for(clip.device)
            seconds = time.perf_counter() - started
            peak = max(peak, measured())
        trainable = max(trainable, sum(p.numel() for p in parameters.values()))
        on_progress(Doing("evaluate", task.number))
        started = time.perf_counter()
        scores = _score(method, data, tasks, clip, run.config.evaluation.batch_size)
        scoring = time.perf_counter() - started
        matrix[at], accuracies[at] = scores.row, scores.accuracy
        history.append(_entry(at, task, scores, update, seconds, scoring))
        advance()
    state = method.state().tensors.values()
    kept = [entry.retention for entry in history if entry.retention is not None]
    return Result(
        **{**run.inputs, "method": run.spec},
        settings=run.inputs["method"],
        seed=run.seed,
        fusion=method.fusion,
        device_name=device_name(clip.device),
        tasks=[list(classes) for classes in tasks],
        images={"train": sum(map(len, data.tasks)), "test": len(data.test.labels)},
        accuracies=accuracies,
        matrix=matrix,
        avg=average_incremental_accuracy(accuracies) if len(steps) == len(tasks) else None,
        last=last_accuracy(accuracies),
        forgetting=forgetting(matrix),
        backward_transfer=backward_transfer(matrix),
        retention=kept[-1] if kept else None,
        retention_of="probe" if data.probe else "not learned yet",
        gap_drift=history[-1].gap.drift,
        seconds=sum(entry.seconds for entry in history),
        peak_memory_bytes=peak,
        trainable_parameters=trainable,
        stored_parameters=sum(tensor.numel() for tensor in state),
        stored_bytes=sum(tensor.nbytes for tensor in state),
        history=history,
        config=resolved(run.config),
    )


@dataclass(frozen=True)
class _Scores:
    """What a method is worth after a task; the fields but `row` are those of TaskResult."""

    row: list[float | None]
    """[T] accuracy on the classes that each task brought first; None where none of them is learned."""
    accuracy: float
    zero_shot: float
    retention: float | None
    gap: GapResult


def _entry(at: int, task: TaskData, scores: _Scores, update: Update, seconds: float, scoring: float) -> TaskResult:
    """Put together what is written about one task."""
    return TaskResult(
        task=at + 1,
        classes=list(task.classes),
        samples=len(task),
        accuracy=scores.accuracy,
        zero_shot=scores.zero_shot,
        retention=scores.retention,
        gap=scores.gap,
        seconds=seconds,
        scoring_seconds=scoring,
        loss=update.loss,
        epochs=update.epochs,
        rolled_back=update.rolled_back,
        phases=dict(update.seconds),
        drift_on_training_images=update.drift_after,
        details=dict(update.details),
    )


@torch.no_grad()
def _score(method: Method, data: Data, tasks: Sequence[Sequence[str]], clip: Clip, batch: int) -> _Scores:
    """Score the method as it would be released, on the test images of the learned classes, and its retention."""
    module = method.inference_module()
    test = data.test
    index, labels = test.of(method.classes)
    right, embeddings = [], []
    for part, truth in zip(index.split(batch), labels.split(batch), strict=True):
        embedding, _, probabilities = module.from_tokens(test.tokens.batch(part).float())
        right.append(probabilities.cpu().argmax(1) == truth)
        embeddings.append(embedding.cpu())
    correct = torch.cat(right).double()
    row: list[float | None] = []
    seen: set[str] = set()
    for classes in tasks:
        # With `blurry` a class comes in several tasks; its images count for the first, as in agent.scoring.formulas.
        new = [i for i, name in enumerate(method.classes) if name in classes and name not in seen]
        seen |= set(classes)
        here = torch.isin(labels, torch.tensor(new, dtype=labels.dtype))
        row.append(correct[here].mean().item() if here.any() else None)
    untouched_names = clip.encode_names(method.classes).cpu()
    now = gap.statistics(torch.cat(embeddings), method.encode_names(method.classes).cpu(), labels)
    untouched = gap.statistics(test.untouched[index], untouched_names, labels)
    zero_shot = (test.untouched[index] @ untouched_names.T).argmax(1) == labels
    later = [name for name in test.names if name not in method.classes]
    probe, unlearned = (data.probe, data.probe.names) if data.probe else (test, later)
    return _Scores(
        row=row,
        accuracy=correct.mean().item(),
        zero_shot=zero_shot.double().mean().item(),
        # With a single name every answer is right, whatever the model knows.
        retention=_retention(method, probe, unlearned, clip, batch) if len(unlearned) > 1 else None,
        gap=GapResult(now.positive, now.negative, now.centroid, gap.drift(now, untouched, "separation")),
    )


def _retention(method: Method, images: Scored, names: Sequence[str], clip: Clip, batch: int) -> float | None:
    """Measure zero-shot accuracy of the method's towers among `names`, over the untouched model's."""
    index, labels = images.of(names)
    before = (images.untouched[index] @ clip.encode_names(names).cpu().T).argmax(1)
    text = method.encode_names(names)
    parts = [(method.encode_tokens(images.tokens.batch(part)) @ text.T).argmax(1) for part in index.split(batch)]
    now = torch.cat(parts).cpu()
    return retention([((now == labels).double().mean().item(), (before == labels).double().mean().item())])


def _write(path: Path, text: str) -> None:
    """Write a file as a whole or not at all: a run whose file is there is taken for finished."""
    handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(name).chmod(0o644)  # mkstemp's is for its owner alone
    Path(name).replace(path)
