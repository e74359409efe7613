"""Frozen values that cross boundaries: between agent and trainer, and from both to disk. Plain data, no tensors.

The largest of them, the report, is in agent.scoring.report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.scoring.report import Adaptation, Report
from streams.record import Offsets, Partition, Reason

MOST_IMAGES = 2**40
"""Images that another site of a fleet may have counted of a class, at most: chosen by hand, more than anybody counts,
and few enough that float32 sums over all sites, also of what so many images add to a scatter, are finite."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What the trainer is doing now; sent often, only the newest matters."""

    phase: str
    """decode | train | compensate | evaluate | export | commit (the phases of an update, in this order)."""
    task: int
    """Number of the task, from 1."""
    epoch: int = 0
    """Number of the current epoch, from 1; 0 in a phase without epochs, as is `epochs`."""
    epochs: int = 0
    """Epochs that this update has when nothing ends it early."""
    step: int = 0
    """Steps of the current epoch, or of the phase, that are done."""
    steps: int = 0
    """Steps it has in all; 0 where that is not known."""
    samples: int = 0
    """Training samples seen in this update so far."""
    loss: float | None = None
    """Training loss of the newest step; None in a phase without one."""
    drift: float | None = None
    """Relative change of the negative similarity against the untouched model (>= 0), as it was last measured."""
    budget: float | None = None
    """Drift at which the update is rolled back; drift / budget is the share of the budget used."""
    accuracy: float | None = None
    """Accuracy over all classes learned so far, 0 to 1; None but in the one message that follows the scoring."""


OnProgress = Callable[[Progress], None]
"""Is told how far an update is; returns at once."""


@dataclass(frozen=True, slots=True)
class GapStatistics:
    """Modality gap of one model on one set of images and class names (raw cosines, sample-weighted)."""

    positive: float
    """Mean similarity to the right class name."""
    negative: float | None
    """Mean similarity to the other names; None when there is no other name."""
    centroid: float
    """Distance between the mean image feature and the mean text feature (names weighted by frequency)."""


@dataclass(frozen=True, slots=True)
class Update:
    """It says what a method did with a task."""

    epochs: int
    """Epochs whose effect is in the model (rolled-back ones are not)."""
    epochs_run: int
    """Epochs that were trained, rolled-back ones included."""
    steps: int
    """Optimiser steps of these epochs; 0 for a method without an optimiser."""
    samples: int
    """Training samples of the task, each counted once."""
    loss: float | None
    """Mean training loss of the last epoch kept; None when there is no such epoch."""
    rolled_back: bool
    """True when the update crossed `budget`, or its loss was not finite, and the last state within it was restored."""
    gap_before: GapStatistics
    """The gap on the task's training images before the update."""
    gap_after: GapStatistics
    gap_untouched: GapStatistics
    """The same of the untouched model."""
    drift_before: float | None
    """Relative change of the negative similarity against the untouched model, from 0 on; None where the task has but
    one name, as is `drift_after`."""
    drift_after: float | None
    budget: float | None
    """Largest drift allowed; None where there is no budget."""
    seconds: Mapping[str, float]
    """Wall seconds per phase (train, compensate, ...)."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able values particular to the method (fusion form, epochs fixed by the paper's schedule, ...)."""
    adaptation: Adaptation | None = None
    """What was decided about new adapters; None where nothing was to be decided."""


@dataclass(frozen=True, slots=True)
class LateRejection:
    """It is a record the trainer could not decode: set aside by the agent before the commit."""

    partition: Partition
    offset: int
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Share:
    """It says what part a process (rank) had in an update that several shared."""

    host: str
    """The name of its machine."""
    process: int
    """Its process id there."""
    device: str
    """`cpu`, or a CUDA device."""
    seconds: float
    """Wall seconds from the first image it was sent to the end of the scoring."""
    waited_s: float
    """Of these, what it spent in collectives: moving data and waiting for other ranks, as far as the CPU waits. What
    passes until rank 0 has another order is not in it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """It is the trainer's answer to a task: everything is in `staging`, fsynced, except the manifest."""

    task: int
    """Number of the task."""
    next_offsets: Offsets
    """What follows the task, for every partition: the offsets of the commit."""
    staging: Path
    """The folder that `CommitStore.stage` gave for it."""
    files: Mapping[str, tuple[int, str]]
    """Relative path -> (size in bytes, sha256) of every file in `staging`."""
    report: Report
    """What report.json in `staging` says."""
    classes: tuple[str, ...]
    """All learned class names in order of first appearance."""
    update: Update | None
    """What the method did; None when nothing could be learned (every sample undecodable or held out)."""
    release_refused: str | None
    """Why no new release was made (parity, accuracy gate); None when `release/` is new."""
    rejected: tuple[LateRejection, ...] = ()
    """Samples of the task that could not be decoded."""
    shares: tuple[Share, ...] = ()
    """The ranks of the update, the trainer first; empty where it learned alone."""


@dataclass(frozen=True, slots=True)
class Commit:
    """A point the agent can continue from; all paths are inside `path` and immutable."""

    number: int
    """From 1, one more than its parent's."""
    path: Path
    offsets: Offsets
    """Next offset to read, for every partition."""
    fingerprint: str
    """Fingerprint of the source whose offsets these are (streams.source.Source); empty where none was read from, as in
    the first commit of a merged learner."""
    classes: tuple[str, ...]
    """All learned class names in order of first appearance."""
    tasks: int
    """Number of the last task that is over, learned or set aside; the next one has the next number."""
    totals: Mapping[str, float]
    """Monotonic counters worth keeping across restarts (records, samples, rejected by reason, ...)."""
    report: Report | None
    """What its report.json says: the scores after the last update; None before the first."""
    release: Path | None
    """Folder of the release that serves at this commit (perhaps an earlier one, linked); None before the first."""
    seen: tuple[str, ...] = ()
    """Class names of all tasks that are over, also those of which nothing was learned: the cutting rule knows them."""
    damaged: tuple[str, ...] = ()
    """Files that are not what was committed, and that learning does without: hold-out packs, or parts of the release.
    They are lost to the commits that follow."""
    epochs: Mapping[Partition, int] = field(default_factory=dict)
    """Which history of the stream lies before the offsets (streams.source.Source), where that is known."""
