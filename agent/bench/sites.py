"""A stream dealt over sites: what each answers alone and in a fleet, beside one learner that saw everything."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from agent import methods
from agent.bench.data import BenchError, Data, Scored, list_images, load_data
from agent.config import Config
from agent.config.fleet import FLEET_METHODS
from agent.methods.base import Cropped, Method, TaskData, task_generator
from agent.methods.merging import MERGED, merge
from agent.methods.publishing import SiteLearner, incoming
from agent.model.clip import Clip, load_clip
from agent.model.images import TokensAt
from agent.model.ranks import Part

Deal = Literal["class", "random"]
"""Whether a class, or an image, comes to a site whole and by itself."""


@dataclass(frozen=True)
class Scores:
    """Accuracies on the test images of all classes of the stream, from 0 to 1, with one seed."""

    central: float
    """That of one learner that saw all images."""
    alone: tuple[float, ...]
    """Of each site by itself; a class that it never saw counts as wrong."""
    union: tuple[float, ...]
    """Of each site with what the others published."""


def bench_sites(
    config: Config,
    rows: Mapping[str, Config],
    seeds: Sequence[int],
    tasks: int,
    sites: int,
    deal: Deal,
    out: Path,
    console: Console,
) -> None:
    """Deal the stream over `sites`, learn it, and print and write the table; `rows` as for agent.bench.runs.bench.

    Raises BenchError, StreamError, ModelError.
    """
    unfit = sorted({row.method.name for row in rows.values()} - set(MERGED))
    if unfit:
        raise BenchError(f"learners of {', '.join(unfit)} cannot be merged; expected {' or '.join(MERGED)}")
    if sites < 2:
        raise BenchError(f"got {sites} sites, expected 2 or more")
    if config.model.threads:
        torch.set_num_threads(config.model.threads)
    out.mkdir(parents=True, exist_ok=True)
    clip = load_clip(config.model)
    data = load_data(list_images(config, tasks), clip, config, out)
    found: dict[str, list[Scores]] = {}
    for spec, row in rows.items():
        for seed in seeds:
            seeded = row.model_copy(update={"method": row.method.model_copy(update={"seed": seed})})
            scores = compared(seeded, data, clip, sites, deal)
            found.setdefault(spec, []).append(scores)
            console.print(f"{spec} seed {seed}: central {scores.central:.1%}, union {min(scores.union):.1%} or more")
    head = ["method", "alone %", "union %", "lowest union %", "central %", "union - central, points"]
    lines = [[spec, *_cells(results)] for spec, results in found.items()]
    title = f"{sites} sites, dealt by {deal}, at least {config.fleet.min_images} images of a class leave together"
    merged = dict.fromkeys(row.method.name for row in rows.values() if row.method.name not in FLEET_METHODS)
    title += f"; learners of {', '.join(merged)} are merged at the end" if merged else ""
    table = Table(*head, title=title)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    written = [head, ["---", *("--:" for _ in head[1:])], *([f"`{line[0]}`", *line[1:]] for line in lines)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in written)
    (out / f"sites-{deal}.md").write_text(f"{title}\n\n{text}\n", encoding="utf-8")
    console.print(f"results in {out}: sites-{deal}.md")


def compared(config: Config, data: Data, clip: Clip, sites: int, deal: Deal) -> Scores:
    """Learn a stream with one learner, and with one for each site; the methods are those of merging.MERGED.

    Sites of FLEET_METHODS publish after each task, as in a fleet; those of the others are merged after the last one.
    """
    central = methods.build(clip, config.method)
    for task in data.tasks:
        central.update(task, _unheard)
    if config.method.name not in FLEET_METHODS:
        return _merged_at_the_end(config, central, data, clip, sites, deal)
    classes = list(dict.fromkeys(name for task in data.tasks for name in task.classes))
    learners = [SiteLearner(methods.build(clip, config.method), config.fleet.min_images) for _ in range(sites)]
    sent: list[tuple[dict[str, Tensor], list[str], bool]] = [({}, [], False)] * sites

    def answers(site: int) -> Method:
        """What a site answers with, all having heard of each other."""
        own = learners[site].own()
        others = {
            f"site {other}": incoming(own, tensors, names, own.values.get("depth", 0), fitted)
            for other, (tensors, names, fitted) in enumerate(sent)
            if other != site and names
        }
        return learners[site].answers(lambda: methods.build(clip, config.method), others)

    def publish(site: int) -> None:
        answers(site)
        learner = learners[site]
        sent[site] = *learner.sends(), bool(learner.own().values.get("fitted"))

    for task in data.tasks:
        at = _dealt(task, classes, sites, deal, config.method.seed)
        for site, learner in enumerate(learners):
            if not (at == site).any():
                continue
            part = _part(task, (at == site).nonzero().squeeze(1))
            learner.method.update(part, _unheard)
            learner.learned(part)
            publish(site)
        for site, learner in enumerate(learners):  # each takes up what the others learned meanwhile
            if learner.method.classes:
                publish(site)
    batch = config.evaluation.batch_size
    alone = [_accuracy(one.method, data.test, batch) if one.method.classes else 0.0 for one in learners]
    union = [_accuracy(answers(site), data.test, batch) for site in range(sites)]
    return Scores(_accuracy(central, data.test, batch), tuple(alone), tuple(union))


def _merged_at_the_end(config: Config, central: Method, data: Data, clip: Clip, sites: int, deal: Deal) -> Scores:
    """Learn a stream with one learner for each site, and merge them once all has come: the union is the same for each
    site."""
    classes = list(dict.fromkeys(name for task in data.tasks for name in task.classes))
    learners = [methods.build(clip, config.method) for _ in range(sites)]
    for task in data.tasks:
        at = _dealt(task, classes, sites, deal, config.method.seed)
        for site, learner in enumerate(learners):
            if (at == site).any():
                learner.update(_part(task, (at == site).nonzero().squeeze(1)), _unheard)
    learned = {f"site {site}": learner.state() for site, learner in enumerate(learners) if learner.classes}
    union = methods.build(clip, config.method)
    union.load_state(merge(union.name, learned))
    batch = config.evaluation.batch_size
    alone = tuple(_accuracy(one, data.test, batch) if one.classes else 0.0 for one in learners)
    return Scores(_accuracy(central, data.test, batch), alone, (_accuracy(union, data.test, batch),) * sites)


def _dealt(task: TaskData, classes: Sequence[str], sites: int, deal: Deal, seed: int) -> Tensor:
    """Give the site of each image of a task, int64 [N]."""
    if deal == "class":
        return torch.tensor([classes.index(name) % sites for name in task.classes])[task.labels]
    return torch.randint(sites, (len(task),), generator=task_generator(seed, task.number, "dealt over sites"))


def _part(task: TaskData, index: Tensor) -> TaskData:
    """Give some images of a task as a task."""
    present = task.labels[index].unique().tolist()
    place = torch.zeros(len(task.classes), dtype=torch.int64)
    place[present] = torch.arange(len(present))
    names = tuple(task.classes[label] for label in present)
    cropped = None if task.cropped is None else _CroppedAt(task.cropped, index)
    return TaskData(task.number, names, place[task.labels[index]], TokensAt(task.tokens, index), cropped)


@dataclass(frozen=True)
class _CroppedAt:
    """They are some images of a task, cropped at random like all of them."""

    cropped: Cropped
    index: Tensor
    """int64 [n] on the CPU: where they are in the task."""

    def batch(self, index: Tensor, generator: torch.Generator, part: Part | None = None) -> Tensor:
        return self.cropped.batch(self.index[index], generator, part)


@torch.no_grad()
def _accuracy(method: Method, test: Scored, batch: int) -> float:
    """Score a method on the test images of all classes, also of those that it does not know."""
    module = method.inference_module()
    index, labels = test.of(method.classes)
    right = 0
    for part, truth in zip(index.split(batch), labels.split(batch), strict=True):
        right += int((module.from_tokens(test.tokens.batch(part).float())[2].cpu().argmax(1) == truth).sum())
    return right / len(test.labels)


def _cells(results: Sequence[Scores]) -> list[str]:
    """Write means over seeds and sites, in per cent."""
    central = statistics.fmean(one.central for one in results)
    union = statistics.fmean(accuracy for one in results for accuracy in one.union)
    values = (
        statistics.fmean(accuracy for one in results for accuracy in one.alone),
        union,
        min(accuracy for one in results for accuracy in one.union),
        central,
    )
    return [*(f"{100 * value:.1f}" for value in values), f"{100 * (union - central):+.2f}"]


def _unheard(progress: object) -> None:
    """Nobody watches one learner of many."""
