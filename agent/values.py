"""Frozen values that cross boundaries: between agent and trainer, and from both to disk. Plain data, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streams.record import Offsets, Partition, Reason


@dataclass(frozen=True, slots=True)
class Progress:
    """What the trainer is doing now; sent often, only the newest matters."""

    phase: str
    """decode | train | compensate | evaluate | export | commit (the phases of an update, in this order)."""
    task: int
    """Number of the task, from 1."""
    epoch: int = 0
    epochs: int = 0
    step: int = 0
    steps: int = 0
    """Steps of the current epoch done and to do."""
    samples: int = 0
    """Training samples seen in this update so far."""
    loss: float | None = None
    drift: float | None = None
    """Relative change of the negative similarity against the untouched model (>= 0)."""
    budget: float | None = None
    """Drift at which the update is rolled back; drift / budget is the share of the budget used."""
    accuracy: float | None = None
    """Accuracy over all classes learned so far, 0 to 1, when just measured."""


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
    """What a method did with a task."""

    epochs: int
    """Epochs whose effect is in the model (rolled-back ones are not)."""
    epochs_run: int
    steps: int
    samples: int
    loss: float | None
    """Mean training loss of the last epoch kept."""
    rolled_back: bool
    gap_before: GapStatistics
    gap_after: GapStatistics
    gap_untouched: GapStatistics
    drift_before: float | None
    drift_after: float | None
    budget: float | None
    seconds: Mapping[str, float]
    """Wall seconds per phase (train, compensate, ...)."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able facts particular to the method (fusion form, epochs fixed by the paper's schedule, ...)."""


@dataclass(frozen=True, slots=True)
class LateRejection:
    """A record the trainer could not decode: set aside by the agent before the commit."""

    partition: Partition
    offset: int
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The trainer's answer to a task: everything is in `staging`, fsynced, except the manifest."""

    task: int
    next_offsets: Offsets
    staging: Path
    files: Mapping[str, tuple[int, str]]
    """Relative path -> (size in bytes, sha256) of every file in `staging`."""
    report: Mapping[str, Any]
    """Content of report.json."""
    classes: tuple[str, ...]
    """All learned class names in order of first appearance."""
    update: Update | None
    """None when nothing could be learned (every sample undecodable or held out)."""
    release_refused: str | None
    """Why no new release was made (parity, accuracy gate); None when `release/` is new."""
    rejected: tuple[LateRejection, ...] = ()


@dataclass(frozen=True, slots=True)
class Commit:
    """A point the agent can continue from; all paths are inside `path` and immutable."""

    number: int
    path: Path
    offsets: Offsets
    fingerprint: str
    """Of the source whose offsets these are."""
    classes: tuple[str, ...]
    tasks: int
    """Number of the last task that is over, learned or set aside; the next one has the next number."""
    totals: Mapping[str, float]
    """Monotonic counters worth keeping across restarts (records, samples, rejected by reason, ...)."""
    report: Mapping[str, Any]
    release: Path | None
    """Folder of the release that serves at this commit (perhaps an earlier one, linked); None before the first."""
    seen: tuple[str, ...] = ()
    """Class names of all tasks that are over, also those of which nothing was learned: the cutting rule knows them."""
