"""`gapstream bench`: learn the same stream with several methods and seeds, and compare them in a table and pictures.

The methods are those the agent runs. Every image is decoded and passed through the frozen part once, for all of them.
A run is one method with one seed; its results are a JSON file, written when it is done, and a run whose file is there
is not run again: what was interrupted starts over, what is finished stays.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import hashlib
import json
import logging
import os
import re
import statistics
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
from rich.table import Table
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from agent import gap, methods, pictures
from agent.cli import config_from
from agent.clip import Clip, load_clip
from agent.config import Config, ConfigError, resolved
from agent.evaluation import (
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    last_accuracy,
    retention,
)
from agent.images import TokensAt, load_tokens
from agent.methods.base import InferenceModule, Method, Report, TaskData
from agent.values import Progress as Doing
from agent.values import Update
from exporter.preprocess import ImageError
from streams.archive import ArchiveFolder, ArchiveSource, Entry
from streams.record import Unusable

log = logging.getLogger(__name__)

JOINT = "joint"
"""The upper bound: `finetune` with all tasks as one. It needs the whole stream at once, so the agent cannot run it."""
_PACKAGES = ("gapstream", "torch", "open_clip_torch", "timm", "numpy", "pillow")


class BenchError(Exception):
    """There is nothing to compare; the message says why."""


@dataclass(frozen=True)
class Column:
    key: str
    title: str
    unit: float
    """What a value is divided by before it is shown."""
    digits: int


COLUMNS = (
    Column("avg", "Avg %", 0.01, 1),
    Column("last", "Last %", 0.01, 1),
    Column("forgetting", "Forgetting %", 0.01, 1),
    Column("backward_transfer", "BWT %", 0.01, 1),
    Column("retention", "Retention %", 0.01, 1),
    Column("gap_drift", "Gap drift %", 0.01, 1),
    Column("seconds", "Seconds", 1, 0),
    Column("peak_memory_bytes", "Peak memory MB", 1e6, 0),
    Column("trainable_parameters", "Trainable k", 1e3, 0),
    Column("stored_parameters", "Stored k", 1e3, 0),
)

LEGEND = """\
Avg: mean over tasks of the accuracy on all classes so far; Last: after the last task; forgetting: mean drop of the
earlier tasks from their best; BWT: mean change of the earlier tasks since they were learned; retention: zero-shot
accuracy on {probe} over the untouched model's; gap drift: change of the mean similarity to wrong names on the test
images after the last task, relative to the untouched model's separation; seconds: learning, on {device}; peak memory:
beyond the untouched model and the images, which all share; trainable: parameters given to an optimiser in a task;
stored: numbers kept between tasks, after the last."""


def bench_command(arguments: argparse.Namespace) -> None:
    logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
    options = _options(arguments)

    def configured(more: Sequence[str] = ()) -> Config:
        return config_from(argparse.Namespace(config=arguments.config, set=[*arguments.set, *options, *more]))

    config = configured()
    if config.source.kind != "archive":
        raise ConfigError("source.kind is kafka; bench reads an archive, which it can read again for every method")
    rows = {spec: configured(settings(spec)) for spec in split_methods(arguments.methods)}
    console = Console()
    console = console if console.is_terminal else Console(width=180)
    bench(config, rows, arguments.seeds, arguments.tasks, arguments.out, console)


def split_methods(text: str) -> list[str]:
    """`a,b:key=value:key=[1,2]` -> its method specs, each once."""
    return list(dict.fromkeys(spec for spec in (part.strip() for part in re.split(r",(?![^\[]*\])", text)) if spec))


def settings(spec: str) -> list[str]:
    """What a method spec sets: `seca:sg_akt=false` is `method.name=seca` and `method.seca.sg_akt=false`.

    A key with a dot is below `method`, any other below the method's own section. Raises ConfigError.
    """
    name, *parts = spec.split(":")
    if name not in (*methods.METHODS, JOINT):
        raise ConfigError(f"--methods {spec}: expected one of {', '.join((*methods.METHODS, JOINT))}")
    section = "finetune" if name == JOINT else name
    for part in parts:
        if "=" not in part:
            raise ConfigError(f"--methods {spec}: got {part!r}, expected KEY=VALUE, e.g. seca:sg_akt=false")
    keys = ("method." if "." in part.partition("=")[0] else f"method.{section}." for part in parts)
    return [f"method.name={section}", *(key + part for key, part in zip(keys, parts, strict=True))]


def _options(arguments: argparse.Namespace) -> list[str]:
    """The command's own options as KEY=VALUE."""
    values = {
        "source.archive.path": arguments.data,
        "source.archive.classes_per_task": arguments.classes_per_task,
        "source.archive.per_class": arguments.per_class,
        "evaluation.probe_archive": arguments.probe,
    }
    set_here = [f"{key}={value}" for key, value in values.items() if value is not None]
    return set_here if arguments.order is None else [*set_here, _order(arguments.order)]


def _order(text: str) -> str:
    if text.isdecimal():
        return f"source.archive.seed={text}"
    if text.endswith(".json"):
        content = json.loads(Path(text).read_text("utf-8"))
        if isinstance(content, dict):
            if "stream_order" not in content:
                raise ConfigError(f"--order {text}: got an object without `stream_order`, expected class names in it")
            return f"source.archive.class_order={json.dumps(content['stream_order'], ensure_ascii=False)}"
    return f"source.archive.class_order_file={text}"


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
    pictures.write(compared, out)
    console.print(_terminal_table(compared))
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

            def report(doing: Doing, bar: Any = bar, title: str = run.title) -> None:
                epoch = f" epoch {doing.epoch}/{doing.epochs}" if doing.epochs else ""
                bars.update(bar, description=f"{title}: {doing.phase}{epoch}")

            result = run_one(run, steps, data, clip, report, partial(bars.advance, bar))
            _write(run.file(out), json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False))
            bars.remove_task(bar)
            bars.advance(overall)
            bars.console.print(f"{run.title}: Last {result['last']:.1%} after {result['seconds']:.0f} s of learning")


@dataclass(frozen=True)
class Listing:
    """The images of a comparison, not read yet."""

    tasks: tuple[tuple[tuple[str, Entry], ...], ...]
    """(class name, file) of the training images of every task, in stream order."""
    test: tuple[tuple[str, Entry], ...]
    probe: tuple[tuple[str, Entry], ...]
    digest: str
    """Hex sha256 of all class names, file names, sizes and checksums, in order."""

    @property
    def images(self) -> int:
        return sum(map(len, self.tasks)) + len(self.test) + len(self.probe)


def list_images(config: Config, tasks: int = 0) -> Listing:
    """The stream cut at its boundary marks, its test images (of the same archive without `evaluation.test_archive`),
    and the probe. tasks: only the first so many; 0 is all. Raises BenchError and StreamError."""
    settings, limits = config.evaluation, config.source
    bounds: dict[str, Any] = {"max_image_bytes": limits.max_image_bytes, "max_label_chars": limits.max_label_chars}
    archive = config.source.archive
    groups: list[list[tuple[str, Entry]]] = [[]]
    for item in ArchiveSource(**archive.model_dump(exclude={"on_end"}), **bounds).listing():
        if item is None:
            groups.append([])
        else:
            groups[-1].append(item)
    groups = [group for group in groups if group]
    groups = groups[:tasks] if tasks else groups
    spelling = {name.casefold(): name for group in groups for name, _ in group}
    test = ArchiveFolder(settings.test_archive or archive.path, settings.test_split, ("test", "val"), **bounds)
    trained = {entry.path for group in groups for _, entry in group}
    if not settings.test_archive and any(e.path in trained for name in test.classes for e in test.images(name)):
        raise BenchError(
            f"{test.path} has no split folder `test` or `val` beside its training images; expected "
            "train/class name/image and test/class name/image, or evaluation.test_archive"
        )
    listed = [
        (spelling[name.casefold()], entry)
        for name in test.classes
        if name.casefold() in spelling
        for entry in test.images(name, settings.test_per_class)
    ]
    missing = sorted(set(spelling.values()) - {name for name, _ in listed})
    if missing:
        raise BenchError(f"{test.path} has no test images of {', '.join(missing[:5])}; every class needs some")
    probed: list[tuple[str, Entry]] = []
    if settings.probe_archive:
        probe = ArchiveFolder(settings.probe_archive, settings.probe_split, ("test", "val"), **bounds)
        probed = [(name, e) for name in probe.classes for e in probe.images(name, settings.probe_per_class)]
    parts = (*groups, listed, probed)
    facts = [[(name, entry.path, entry.size, entry.crc) for name, entry in part] for part in parts]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return Listing(tuple(map(tuple, groups)), tuple(listed), tuple(probed), digest)


@dataclass(frozen=True)
class Scored:
    """Images to score on, with the untouched model's embeddings."""

    names: tuple[str, ...]
    labels: Tensor
    """int64 [N] on the CPU, index into `names`."""
    tokens: TokensAt
    untouched: Tensor
    """float32 [N, D], L2-normalised, on the CPU."""

    def of(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Index int64 [n] of the images of these names, and their labels int64 [n] as index into them."""
        place = torch.full((len(self.names),), -1)
        for i, name in enumerate(names):
            if name in self.names:
                place[self.names.index(name)] = i
        labels = place[self.labels]
        index = (labels >= 0).nonzero().squeeze(1)
        return index, labels[index]


@dataclass(frozen=True)
class Data:
    tasks: tuple[TaskData, ...]
    test: Scored
    probe: Scored | None
    _tokens: TokensAt
    """Of all training images, in stream order."""

    def joint(self) -> tuple[tuple[int, TaskData], ...]:
        """All tasks as one, to be scored where the last one is."""
        classes = tuple(dict.fromkeys(name for task in self.tasks for name in task.classes))
        labels = [torch.tensor([classes.index(name) for name in task.classes])[task.labels] for task in self.tasks]
        return ((len(self.tasks) - 1, TaskData(1, classes, torch.cat(labels), self._tokens)),)


def load_data(
    listing: Listing, clip: Clip, config: Config, scratch: Path, advance: Callable[[int], None] = lambda done: None
) -> Data:
    """Decode every image of the listing once, in this order: tasks, test, probe. Images that cannot be decoded are left
    out with a warning. Raises BenchError when a task has none left."""
    parts = (*listing.tasks, listing.test, listing.probe)
    entries = [item for part in parts for item in part]
    loaded = load_tokens(
        [partial(_read, entry) for _, entry in entries],
        clip,
        max_pixels=config.source.max_image_pixels,
        # on a CPU in a file, so that memory stays bounded and what a method needs can be told apart
        cache_bytes=config.method.cache_bytes if clip.device.type != "cpu" else 0,
        scratch=scratch,
        advance=advance,
    )
    for index, error in loaded.failed:
        log.warning("image %s is left out: %s", entries[index][1].path, error)
    ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
    sections: list[list[int]] = [[] for _ in parts]
    part = 0
    for row, index in enumerate(loaded.kept):
        while index >= ends[part]:
            part += 1
        sections[part].append(row)

    def of(rows: Sequence[int]) -> tuple[tuple[str, ...], Tensor, TokensAt]:
        labels = [entries[loaded.kept[row]][0] for row in rows]
        names = tuple(dict.fromkeys(labels))
        number = {name: i for i, name in enumerate(names)}
        index = torch.tensor([number[label] for label in labels], dtype=torch.int64)
        return names, index, TokensAt(loaded.tokens, torch.tensor(rows, dtype=torch.int64))

    *learned, test, probe = sections
    if not all(learned) or not test:
        raise BenchError("a task or the test set has no image that can be decoded; see the warnings above")
    return Data(
        tuple(TaskData(number, *of(rows)) for number, rows in enumerate(learned, 1)),
        _scored(*of(test), clip, config.evaluation.batch_size),
        _scored(*of(probe), clip, config.evaluation.batch_size) if probe else None,
        TokensAt(loaded.tokens, torch.tensor([row for rows in learned for row in rows])),
    )


def _scored(names: tuple[str, ...], labels: Tensor, tokens: TokensAt, clip: Clip, batch: int) -> Scored:
    parts = [clip.encode_tokens(tokens.batch(index)).cpu() for index in torch.arange(len(labels)).split(batch)]
    return Scored(names, labels, tokens, torch.cat(parts))


def _read(entry: Entry) -> bytes:
    try:
        return entry.read()
    except Unusable as error:
        raise ImageError("undecodable", str(error)) from error


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
    report: Report = lambda progress: None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Learn the stream and score after every task; gives the content of the run's JSON file.

    steps: (index of the task that is learned with it, what to learn); `joint` has one. All accuracies and ratios are
    fractions, times are seconds; what is undefined is None.

    - `accuracies` [T], `matrix` [T][T], `avg`, `last`, `forgetting`, `backward_transfer`: as in `agent.evaluation`
    - `retention`: the last one measured; `retention_of`: `probe`, or `not learned yet` (the stream's later classes)
    - `gap_drift`, `seconds`, `peak_memory_bytes`, `trainable_parameters`, `stored_parameters`: the table's columns
    - `history`: per task learned, the above where it has a meaning there, the update's facts and seconds of scoring
    - `spec`, `method`, `model`, `data`, `versions`, ...: what the result depends on; `config`: every key
    """
    method = methods.build(clip, run.config.method)
    tasks = [task.classes for task in data.tasks]
    count = len(tasks)
    matrix: list[list[float | None]] = [[None] * count for _ in range(count)]
    accuracies: list[float | None] = [None] * count
    history: list[dict[str, Any]] = []
    trainable = 0
    with peak_memory(clip.device) as peak:
        for at, task in steps:
            started = time.perf_counter()
            with optimised() as parameters:
                update = method.update(task, report)
            _wait(clip.device)
            seconds = time.perf_counter() - started
            trainable = max(trainable, sum(p.numel() for p in parameters.values()))
            parameters.clear()
            report(Doing("evaluate", task.number))
            scores = _score(method, method.inference_module(), data, tasks, clip, run.config.evaluation.batch_size)
            matrix[at], accuracies[at] = scores.pop("row"), scores["accuracy"]
            history.append(
                {"task": at + 1, "classes": list(task.classes), "samples": len(task), **scores}
                | {"seconds": seconds, "scoring_seconds": time.perf_counter() - started - seconds}
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
        "peak_memory_bytes": peak(),
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
    raise BenchError("/proc/self/status has no RssAnon; memory is measured on Linux 4.5 or newer")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


Compared = Sequence[Sequence[Mapping[str, Any]]]
"""Results of the runs of one method spec after the other."""


def write_tables(compared: Compared, out: Path) -> None:
    """table.csv (raw values, mean and spread) and table.md (as shown) in `out`."""
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seeds", *(f"{c.key}_{kind}" for c in COLUMNS for kind in ("mean", "spread"))])
        for results in compared:
            values = [value for column in COLUMNS for value in mean_and_spread(results, column.key)]
            seeds = " ".join(str(result["seed"]) for result in results)
            writer.writerow([results[0]["method"], seeds, *("" if value is None else value for value in values)])
    head = ["Method", *(column.title for column in COLUMNS)]
    lines = [head, ["---", *("--:" for _ in COLUMNS)], *([f"`{row[0]}`", *row[1:]] for row in _cells(compared))]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    _write(out / "table.md", f"{text}\n\n{_legend(compared)}\n")


def mean_and_spread(results: Sequence[Mapping[str, Any]], key: str) -> tuple[float | None, float | None]:
    """Mean over the runs, and their sample standard deviation (None for fewer than two)."""
    values = [result[key] for result in results if result[key] is not None]
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _cells(compared: Compared) -> list[list[str]]:
    return [[results[0]["method"], *(_cell(results, column) for column in COLUMNS)] for results in compared]


def _cell(results: Sequence[Mapping[str, Any]], column: Column) -> str:
    mean, spread = mean_and_spread(results, column.key)
    if mean is None:
        return "-"
    text = f"{mean / column.unit:,.{column.digits}f}"
    return f"{text} ± {spread / column.unit:,.{column.digits}f}" if spread else text


def _legend(compared: Compared) -> str:
    first = compared[0][0]
    never = first["retention_of"] == "probe"
    probe = "classes never learned" if never else "the classes not learned yet, last measured"
    seeds = len(compared[0])
    text = LEGEND.format(probe=probe, device=first["device_name"])
    return text + (
        f"\nMean ± standard deviation over {seeds} seeds; no ± where all agree."
        if seeds > 1
        else f" Seed {first['seed']}."
    )


def _terminal_table(compared: Compared) -> Table:
    table = Table("method", caption=_legend(compared), caption_justify="left")
    for column in COLUMNS:
        table.add_column(column.title, justify="right")
    for row in _cells(compared):
        table.add_row(*row)
    return table


def _write(path: Path, text: str) -> None:
    """As a whole or not at all: a file that is there is complete."""
    handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(name).chmod(0o644)
    Path(name).replace(path)
