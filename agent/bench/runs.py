"""Runs of a comparison: learn the same stream with several methods and seeds, and compare them in a table and pictures.

The methods are those the agent runs. Every image is decoded and passed through the frozen part once, for all of them.
A run is one method with one seed; its results are a JSON file, written when it is done, and a run whose file is there
is not run again: what was interrupted starts over, what is finished stays.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from agent import methods
from agent.bench import charts
from agent.bench.data import Data, Listing, Scored, list_images, load_data
from agent.bench.tables import terminal_table, write_tables
from agent.config import Config, resolved
from agent.methods.base import InferenceModule, Method, OnProgress, TaskData
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

JOINT = "joint"
"""The upper bound: `finetune` with all tasks as one. It needs the whole stream at once, so the agent cannot run it."""
_PACKAGES = ("gapstream", "torch", "open_clip_torch", "timm", "numpy", "pillow")


def bench(
    config: Config, rows: Mapping[str, Config], seeds: Sequence[int], tasks: int, out: Path, console: Console
) -> None:
    """Run what is not in `out`/runs yet and write table and pictures to `out`; prints the table.

    rows: method spec -> configuration, which differs from `config` in `method` only. tasks: only the first so many; 0
    is all. Raises BenchError, StreamError, ModelError.
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
    results = [json.loads(run.file(out).read_text("utf-8")) for run in runs]
    compared = [[result for result in results if result["method"] == spec] for spec in rows]
    write_tables(compared, out)
    charts.write(compared, out)
    console.print(terminal_table(compared))
    console.print(f"results in {out}: table.md, table.csv, accuracy.svg, matrices.svg, gap.svg, runs/")


def _run_all(waiting: Sequence[Run], listing: Listing, clip: Clip, config: Config, out: Path, console: Console) -> None:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bars:
        images = bars.add_task("decoding images", total=listing.images)
        data = load_data(listing, clip, config, out, lambda done: bars.update(images, completed=done))
        overall = bars.add_task("runs", total=len(waiting))
        for run in waiting:
            steps = data.joint() if run.spec.partition(":")[0] == JOINT else tuple(enumerate(data.tasks))
            bar = bars.add_task(run.title, total=len(steps))

            def on_progress(doing: Doing, bar: Any = bar, title: str = run.title) -> None:
                epoch = f" epoch {doing.epoch}/{doing.epochs}" if doing.epochs else ""
                bars.update(bar, description=f"{title}: {doing.phase}{epoch}")

            result = run_one(run, steps, data, clip, on_progress, partial(bars.advance, bar))
            _write(run.file(out), json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False))
            bars.remove_task(bar)
            bars.advance(overall)
            bars.console.print(f"{run.title}: Last {result['last']:.1%} after {result['seconds']:.0f} s of learning")


@dataclass(frozen=True)
class Run:
    """One method with one seed."""

    spec: str
    seed: int
    config: Config
    facts: Mapping[str, Any]
    """All that its result depends on."""

    @classmethod
    def of(cls, spec: str, config: Config, seed: int, clip: Clip, listing: Listing) -> Run:
        method = config.method.model_copy(update={"seed": seed})
        used = {"name", "seed", "lora", method.name}
        facts = {
            "spec": spec,
            "method": method.model_dump(mode="json", include=used),
            "model": clip.identity,
            "precision": config.model.precision,
            "threads": config.model.threads,
            "device": clip.device.type,
            "data": listing.digest,
            "versions": {name: metadata.version(name) for name in _PACKAGES},
        }
        return cls(spec, seed, config.model_copy(update={"method": method}), facts)

    @property
    def title(self) -> str:
        return f"{self.spec} seed {self.seed}"

    def file(self, out: Path) -> Path:
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:10]
        return out / "runs" / f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', self.spec)}-seed{self.seed}-{digest}.json"


def run_one(
    run: Run,
    steps: Sequence[tuple[int, TaskData]],
    data: Data,
    clip: Clip,
    on_progress: OnProgress = lambda progress: None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Learn the stream and score after every task; gives the content of the run's JSON file.

    steps: (index of the task that is learned with it, what to learn); `joint` has one. All accuracies and ratios are
    fractions, times are seconds; what is undefined is None.

    - `accuracies` [T], `matrix` [T][T], `avg`, `last`, `forgetting`, `backward_transfer`: see agent.scoring.formulas
    - `retention`: the last one measured; `retention_of`: `probe`, or `not learned yet` (the stream's later classes)
    - `gap_drift`, `seconds`, `peak_memory_bytes`, `trainable_parameters`, `stored_parameters`: the table's columns
    - `history`: per task learned, the above where it has a meaning there, the update's facts and seconds of scoring
    - `method` is the spec, `settings` are its keys; with `model`, `data`, `versions`, ... all that the result depends
      on; `config`: every key
    """
    method = methods.build(clip, run.config.method)
    tasks = [task.classes for task in data.tasks]
    count = len(tasks)
    matrix: list[list[float | None]] = [[None] * count for _ in range(count)]
    accuracies: list[float | None] = [None] * count
    history: list[dict[str, Any]] = []
    trainable = peak = 0
    for at, task in steps:
        with optimised() as parameters, peak_memory(clip.device) as measured:
            started = time.perf_counter()
            update = method.update(task, on_progress)
            _wait(clip.device)
            seconds = time.perf_counter() - started
            peak = max(peak, measured())
        trainable = max(trainable, sum(p.numel() for p in parameters.values()))
        on_progress(Doing("evaluate", task.number))
        started = time.perf_counter()
        scores = _score(method, method.inference_module(), data, tasks, clip, run.config.evaluation.batch_size)
        matrix[at], accuracies[at] = scores.pop("row"), scores["accuracy"]
        history.append(
            {"task": at + 1, "classes": list(task.classes), "samples": len(task), **scores}
            | {"seconds": seconds, "scoring_seconds": time.perf_counter() - started}
            | _facts(update)
        )
        advance()
    state = method.state().tensors.values()
    kept = [entry["retention"] for entry in history if entry["retention"] is not None]
    result = {
        **run.facts,
        "settings": run.facts["method"],
        "method": run.spec,
        "seed": run.seed,
        "fusion": method.fusion,
        "device_name": _device_name(clip.device),
        "tasks": [list(classes) for classes in tasks],
        "images": {"train": sum(map(len, data.tasks)), "test": len(data.test.labels)},
        "accuracies": accuracies,
        "matrix": matrix,
        "avg": average_incremental_accuracy(accuracies) if len(steps) == count else None,
        "last": last_accuracy(accuracies),
        "forgetting": forgetting(matrix),
        "backward_transfer": backward_transfer(matrix),
        "retention": kept[-1] if kept else None,
        "retention_of": "probe" if data.probe else "not learned yet",
        "gap_drift": history[-1]["gap"]["drift"],
        "seconds": sum(entry["seconds"] for entry in history),
        "peak_memory_bytes": peak,
        "trainable_parameters": trainable,
        "stored_parameters": sum(tensor.numel() for tensor in state),
        "stored_bytes": sum(tensor.nbytes for tensor in state),
        "history": history,
        "config": resolved(run.config),
    }
    return result


@torch.no_grad()
def _score(
    method: Method, module: InferenceModule, data: Data, tasks: Sequence[Sequence[str]], clip: Clip, batch: int
) -> dict[str, Any]:
    """Accuracies on the test images of the learned classes, the gap on them, and retention."""
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
    return {
        "row": row,
        "accuracy": correct.mean().item(),
        "zero_shot": zero_shot.double().mean().item(),
        "retention": _retention(method, probe, unlearned, clip, batch) if len(unlearned) > 1 else None,
        "gap": {
            "positive": now.positive,
            "negative": now.negative,
            "centroid": now.centroid,
            "drift": gap.drift(now, untouched, "separation"),
        },
    }


def _retention(method: Method, images: Scored, names: Sequence[str], clip: Clip, batch: int) -> float | None:
    index, labels = images.of(names)
    before = (images.untouched[index] @ clip.encode_names(names).cpu().T).argmax(1)
    text = method.encode_names(names)
    parts = [(method.encode_tokens(images.tokens.batch(part)) @ text.T).argmax(1) for part in index.split(batch)]
    now = torch.cat(parts).cpu()
    return retention([((now == labels).double().mean().item(), (before == labels).double().mean().item())])


def _facts(update: Update) -> dict[str, Any]:
    return {
        "loss": update.loss,
        "epochs": update.epochs,
        "rolled_back": update.rolled_back,
        "phases": dict(update.seconds),
        "drift_on_training_images": update.drift_after,
        "details": dict(update.details),
    }


@contextmanager
def optimised() -> Iterator[dict[int, Tensor]]:
    """Collects every parameter that an optimiser steps, by id (and kept alive, so that no id comes twice)."""
    found: dict[int, Tensor] = {}

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            found.update((id(p), p) for p in group["params"] if p.requires_grad)

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def peak_memory(device: torch.device, interval_s: float = 0.02) -> Iterator[Callable[[], int]]:
    """Gives a function for the most memory in use since the block began, beyond what was then: the device's, or this
    process's own (mapped files do not count) looked at every `interval_s`."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - start
        return
    ctypes.CDLL(None).malloc_trim(0)  # else what the run before freed would be used again unseen
    start = peak = _own_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(interval_s):
            peak = max(peak, _own_memory())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: max(peak, _own_memory()) - start
    finally:
        done.set()
        thread.join()


def _own_memory() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon; memory is measured on Linux 4.5 or newer")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _write(path: Path, text: str) -> None:
    """As a whole or not at all: a file that is there is complete."""
    handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(name).chmod(0o644)
    Path(name).replace(path)
