"""The agent's metrics: their names, help texts, labels and buckets. What sets them is in exporter.metrics.

A metric is added here, in the table of deploy/README.md and on the dashboard; tests compare the three.

A measurement not made yet is NaN, never 0: no alert fires on it and no graph shows it.
"""

from __future__ import annotations

import math
import platform
from importlib import metadata
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info, ProcessCollector

STATES = ("starting", "consuming", "training", "evaluating", "publishing", "paused", "draining", "ended")
"""What the agent does. Consuming goes on during an update, whose phase gives the state; draining stays to the end. An
agent has ended when its archive did: that tells it from one that is gone, see the alert GapstreamDown."""

PHASES = ("decode", "train", "compensate", "evaluate", "export")
"""The phases of an update whose seconds are in its report: all but `commit`, in which the report is written."""

REASONS = (
    "empty", "too_large", "bad_envelope", "bad_schema", "missing_label", "label_type", "undecodable", "truncated",
    "bomb", "bad_dimensions", "unsupported_format", "fetch_failed", "fetch_forbidden", "task_failed",
)  # fmt: skip
"""The values of streams.record.Reason, which cannot be imported here."""

CUT_REASONS = ("new_classes", "samples", "bytes", "boundary", "idle", "age", "end", "stop")
"""Why a task was cut: the rules of streams.buffer.CutRule, and the stream's or the agent's end."""

SET_ASIDE = ("ok", "error", "removed")
"""What became of dead letters: set aside, not set aside, or removed by state.dead_letter_bytes."""

DECISIONS = ("kept", "refused", "undone")
"""What becomes of new adapters: `agent.scoring.report.Adaptation.decision`."""

FAILURES = ("start", "error", "died", "silent", "rank")
"""How an update fails; the kinds of agent.worker.WorkerDied."""

SCOPES = ("all", "new", "old", "zero_shot", "predict_before_learn")
"""What an accuracy is measured on, or with: all classes, those of the last task, those before it; the untouched model;
the model as it was before it learned the task."""

FLEET_STATUSES = ("added", "refused")
"""What becomes of another site's learner: it is added to this one's, or cannot be (agent.scoring.report.Site)."""

_SIZES = [2.0**exponent for exponent in range(8, 27, 2)]
"""Bounds of the buckets for an image's bytes: 256 B to 64 MiB by factors of four, past source.max_image_bytes. Other
bounds start other series, with which the old ones cannot be added up; that goes for all four lists."""

_AGES = [0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 6 * 3600, 24 * 3600]
"""Bounds of the buckets for a record's age in seconds: from a producer next door to a backlog of a day."""

_SECONDS = [0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200]
"""Bounds of the buckets for the seconds of an update's phase: from a tiny task to two hours on a CPU."""

_SAMPLES = [1, 10, 100, 500, 1000, 2000, 5000, 10_000, 50_000, 100_000]
"""Bounds of the buckets for the samples of a task."""


class Instruments:
    """It holds all metrics of one agent, prefixed `gapstream_`, for a subclass that sets them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Put every metric on `registry`, with all known label values at 0, so that `rate()` and alerts work from the
        first scrape on. Raises ValueError when the registry already has them."""
        ProcessCollector(registry=registry)  # a registry of one's own lacks CPU, memory and open files
        # In the order of an update, which is the order of /metrics.
        make = _Maker(registry)
        self._add_process(make)
        self._add_stream(make)
        self._add_updates(make)
        self._add_scores(make)
        self._add_commits(make)
        self._add_fleet(make)

    def _add_process(self, make: _Maker) -> None:
        make.info("build", "Versions of gapstream and what it is built on").info(_versions())
        self._model = make.info("model", "The model that is learning")
        self._state = make.states("state", "What the agent does", STATES)
        self._heartbeat = make.gauge("loop_heartbeat_timestamp_seconds", "Last sign of life of a loop", "loop")

    def _add_stream(self, make: _Maker) -> None:
        self._records = make.counter("consumed_records", "Records read, rejected ones and marks included", "topic")
        self._bytes = make.counter("consumed_bytes", "Encoded image bytes read", "topic")
        self._rejected = make.counter("rejected_records", "Records that could not be used", "reason", REASONS)
        self._dead_letters = make.counter(
            "dead_letters", "Rejected records set aside, or removed again by their bound", "result", SET_ASIDE
        )
        self._size = make.histogram("record_size_bytes", "Size of an encoded image", _SIZES)
        self._age = make.histogram("record_age_seconds", "Time from production of a record to its intake", _AGES)
        self._lag_records = make.gauge("consumer_lag_records", "Records not read yet", "topic", "partition")
        self._retention_used = make.gauge(
            "retention_used_ratio", "Age of the oldest record read and not committed over its topic's retention"
        )
        self._skipped = make.counter("skipped_records", "Records that retention removed before they were read", "topic")
        self._clamped = make.counter("future_timestamps", "Records dated far after their arrival", "topic")
        self._holding = make.gauge("source_holding", "1 while the source waits for something and reads nothing, else 0")
        self._last_poll_s = make.measured("last_poll_timestamp_seconds", "Last time the source was polled")
        self._spool_records = make.gauge("spool_records", "Samples waiting on disk for their update")
        self._spool_bytes = make.gauge("spool_bytes", "Bytes waiting on disk for their update")
        self._spool_capacity = make.gauge("spool_capacity_bytes", "Bytes at which fetching pauses")

    def _add_updates(self, make: _Maker) -> None:
        self._cuts = make.counter("task_cuts", "Tasks cut from the stream", "reason", CUT_REASONS)
        self._task_samples = make.histogram("task_samples", "Samples in a task", [float(n) for n in _SAMPLES])
        self._task_failures = make.counter("task_failures", "Failed attempts at an update", "kind", FAILURES)
        self._tasks = make.counter("tasks", "Tasks learned and committed, restarts included")
        self._samples = make.counter("training_samples", "Training samples times epochs, restarts included")
        self._steps = make.counter("training_steps", "Optimiser steps of committed updates, restarts included")
        self._phase_seconds = make.histogram(
            "update_duration_seconds", "Seconds of an update by phase", _SECONDS, "phase"
        )
        for phase in PHASES:
            self._phase_seconds.labels(phase)
        self._rollbacks = make.counter(
            "updates_rolled_back", "Updates rolled back: gap budget crossed or loss not finite"
        )
        self._adaptations = make.counter(
            "adaptations", "Updates that trained new adapters, by what became of them", "decision", DECISIONS
        )
        self._ranks = make.gauge("ranks", "Processes that shared the last update, the trainer counted; 0 before it")
        self._rank_waiting = make.gauge(
            "rank_waiting_ratio", "Share of the last update that a rank spent in collectives", "rank", "device"
        )
        self._loss = make.measured("training_loss", "Newest training loss")
        self._epoch = make.gauge("update_epoch", "Epoch of the running update; 0 when none runs")

    def _add_scores(self, make: _Maker) -> None:
        pairs = ("positive", "negative")
        self._similarity = make.measured(
            "gap_similarity", "Mean cosine of images with the right or the other names", "pair", pairs
        )
        self._drift = make.measured("gap_drift_ratio", "Drift of the negative similarity against the untouched model")
        self._budget_used = make.measured(
            "gap_budget_used_ratio", "Drift over its budget, if any; an update beyond 1 is undone"
        )
        self._centroid = make.measured("gap_centroid_distance", "Distance between the image and the text centroid")
        self._accuracy = make.measured("accuracy_ratio", "Accuracy after the last update, 0 to 1", "scope", SCOPES)
        self._average = make.measured("average_accuracy_ratio", "Mean over tasks of the accuracy after each (Avg)")
        self._forgetting = make.measured("forgetting_ratio", "Mean drop of the earlier tasks from their best accuracy")
        self._transfer = make.measured(
            "backward_transfer_ratio", "Mean change of the earlier tasks since they were learned"
        )
        self._retention = make.measured(
            "zero_shot_retention_ratio", "Probe accuracy now over that of the untouched model"
        )
        self._classes = make.gauge("classes", "Classes learned")

    def _add_commits(self, make: _Maker) -> None:
        self._commit = make.gauge("commit_number", "Number of the current commit; 0 before the first")
        self._committed = make.measured("commit_timestamp_seconds", "When the last update was committed")
        self._commit_bytes = make.measured("commit_size_bytes", "Size of the last commit")
        self._damaged = make.gauge(
            "commit_damaged_files", "Damaged hold-out packs and release files of the current commit"
        )
        self._offset = make.gauge("committed_offset", "Next offset after everything committed", "topic", "partition")
        self._releases = make.counter("releases", "Releases after an update", "result", ("published", "refused"))
        self._release_s = make.measured("release_timestamp_seconds", "When the current release was made")
        self._served_commit = make.gauge(
            "served_commit_number", "Commit whose release readers follow; 0 before the first"
        )
        self._held = make.gauge(
            "release_pinned", "1 while readers are held at one release (gapstream rollback), else 0"
        )
        self._parity = make.measured("release_parity_max_abs_error", "Largest difference between torch and onnxruntime")
        self._agreement = make.measured("release_parity_agreement_ratio", "Share of images with the same first answer")

    def _add_fleet(self, make: _Maker) -> None:
        self._fleet_sites = make.gauge(
            "fleet_sites", "Other sites whose learning the release has, or refuses", "status"
        )
        for status in FLEET_STATUSES:
            self._fleet_sites.labels(status)
        self._fleet_states = make.gauge(
            "fleet_state_timestamp_seconds", "When the newest known state of a site was published", "site"
        )
        self._fleet_bytes = make.counter("fleet_published_bytes", "Bytes of this site's states that were published")
        self._fleet_failures = make.counter("fleet_failures", "Failed attempts to reach the fleet's topic")
        self._fleet_refusals = make.counter("fleet_refused", "Messages and states of the fleet that did not verify")


class _Maker:
    """Makes metrics on one registry, all prefixed `gapstream_`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._common: dict[str, Any] = {"namespace": "gapstream", "registry": registry}

    def counter(self, name: str, text: str, label: str = "", values: tuple[str, ...] = ()) -> Counter:
        """Make a counter, with at most one label, whose known `values` are there from the start at 0."""
        made = Counter(name, text, [label] if label else [], **self._common)
        for value in values:
            made.labels(value)
        return made

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        """Make a gauge; without labels it is 0 until it is set."""
        return Gauge(name, text, labels, **self._common)

    def measured(self, name: str, text: str, label: str = "", values: tuple[str, ...] = ()) -> Gauge:
        """Make a gauge that is NaN until it is measured."""
        made = self.gauge(name, text, *([label] if label else []))
        for child in [made.labels(value) for value in values] or [made]:
            child.set(math.nan)
        return made

    def histogram(self, name: str, text: str, buckets: list[float], *labels: str) -> Histogram:
        """Make a histogram with these upper bounds of its buckets; the last, infinity, is added."""
        return Histogram(name, text, labels, buckets=buckets, **self._common)

    def info(self, name: str, text: str) -> Info:
        """Make labels that are shown as a series of value 1; only the newest set of them exists."""
        return Info(name, text, **self._common)

    def states(self, name: str, text: str, states: tuple[str, ...]) -> Enum:
        """Make a series for each state, of which one is 1 and the others are 0."""
        return Enum(name, text, states=states, **self._common)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    # Asked of the packages, not the modules: this process must not import torch.
    for label, names in {
        "version": ("gapstream",),
        "torch": ("torch",),
        "open_clip": ("open_clip_torch",),
        "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),  # two packages of one module
    }.items():
        for name in names:
            try:
                found[label] = metadata.version(name)
                break
            except metadata.PackageNotFoundError:
                continue
    return found
