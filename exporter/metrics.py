"""What the agent does, as Prometheus metrics on a registry passed in and as one value for the status page.

The pipeline calls one method per event; each is cheap (microseconds) and safe from any thread. Parameters named after
the agent's values (item, progress, commit, outcome) are read by attribute: this package imports neither agent nor
streams.

A measurement not made yet is NaN, never 0: no alert fires on it and no graph shows it. Counters that move only with a
commit (tasks, samples, steps) continue after a restart; the others start at 0, as Prometheus expects of a new process.
"""

from __future__ import annotations

import logging
import math
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info, ProcessCollector

from exporter.release import ReleaseError
from exporter.release import read as read_release
from exporter.thumbnails import Thumbnails

log = logging.getLogger(__name__)

STATES = ("starting", "recovering", "consuming", "training", "evaluating", "publishing", "paused", "draining", "failed")
"""What the agent does. Consuming goes on during an update, whose phase gives the state; draining stays to the end."""

PHASES = ("decode", "train", "compensate", "evaluate", "export", "commit")

REASONS = (
    "empty", "too_large", "bad_envelope", "bad_schema", "missing_label", "label_type", "unknown_label",
    "undecodable", "truncated", "bomb", "bad_dimensions", "unsupported_format", "fetch_failed", "fetch_forbidden",
    "duplicate", "stale", "task_failed",
)  # fmt: skip
"""The values of streams.record.Reason, which cannot be imported here."""

CUT_REASONS = ("new_classes", "samples", "bytes", "boundary", "idle", "end", "stop")

FAILURES = ("start", "error", "died", "silent")
"""How an update fails; the kinds of agent.worker.WorkerDied."""

SCOPES = ("all", "new", "old", "zero_shot", "predict_before_learn")

LAST_REJECTED = 20
RATE_WINDOW_S = 60

_STATE_OF_PHASE = {"evaluate": "evaluating", "export": "publishing", "commit": "publishing"}
_SIZES = [2.0**exponent for exponent in range(8, 27, 2)]
_AGES = [0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 6 * 3600, 24 * 3600]
_SECONDS = [0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200]
_SAMPLES = [1, 10, 100, 500, 1000, 2000, 5000, 10_000, 50_000, 100_000]


class Metrics:
    """All metrics of one agent, prefixed `gapstream_`, and the value behind its status page.

    `registry` gets every metric at once, with all known label values at 0. Raises ValueError when it already has them.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lock = threading.Lock()
        self._started = time.time()
        self._status: dict[str, Any] = {"state": "starting", "progress": None, "commit": None, "report": None}
        self._spool = {"records": 0, "bytes": 0, "capacity_bytes": 0}
        self._lag: dict[str, int] = {}
        self._consumed = {"records": 0, "bytes": 0, "rejected": 0}
        self._seconds: deque[list[int]] = deque(maxlen=RATE_WINDOW_S)
        self._by_topic: dict[str, tuple[Counter, Counter]] = {}
        """Children of the record and byte counters, since looking one up costs more than counting."""
        self._last_rejected: deque[dict[str, Any]] = deque(maxlen=LAST_REJECTED)
        self._thumbnails = Thumbnails()
        self._last_poll: float | None = None
        self._heartbeats: dict[str, float] = {}
        self._skipped_before: dict[str, int] = {}
        self._counted = {"tasks": 0.0, "training_samples": 0.0, "training_steps": 0.0}
        self._released = 0
        """Number of the commit that has the newest release."""
        self._pinned: Callable[[], int | None] = lambda: None

        def counter(name: str, text: str, label: str = "", values: tuple[str, ...] = ()) -> Counter:
            made = Counter(name, text, [label] if label else [], namespace="gapstream", registry=registry)
            for value in values:
                made.labels(value)
            return made

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, namespace="gapstream", registry=registry)

        def measured(name: str, text: str) -> Gauge:
            made = gauge(name, text)
            made.set(math.nan)
            return made

        def histogram(name: str, text: str, buckets: list[float], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, namespace="gapstream", registry=registry)

        ProcessCollector(registry=registry)
        build = Info("build", "Versions of gapstream and what it is built on", namespace="gapstream", registry=registry)
        build.info(_versions())
        self._model = Info("model", "The model that is learning", namespace="gapstream", registry=registry)
        self._state = Enum("state", "What the agent does", states=STATES, namespace="gapstream", registry=registry)
        self._heartbeat = gauge("loop_heartbeat_timestamp_seconds", "Last sign of life of a loop", "loop")

        self._records = counter("consumed_records", "Records read, rejected ones and marks included", "topic")
        self._bytes = counter("consumed_bytes", "Encoded image bytes read", "topic")
        self._rejected = counter("rejected_records", "Records that could not be used", "reason", REASONS)
        self._dead_letters = counter("dead_letters", "Rejected records set aside", "result", ("ok", "error"))
        self._size = histogram("record_size_bytes", "Size of an encoded image", _SIZES)
        self._age = histogram("record_age_seconds", "Time from production of a record to its intake", _AGES)
        self._lag_records = gauge("consumer_lag_records", "Records not read yet", "topic", "partition")
        self._skipped = counter("skipped_records", "Records that retention removed before they were read", "topic")
        self._last_poll_s = measured("last_poll_timestamp_seconds", "Last time the source was polled")
        self._spool_records = gauge("spool_records", "Samples waiting on disk for their update")
        self._spool_bytes = gauge("spool_bytes", "Bytes waiting on disk for their update")
        self._spool_capacity = gauge("spool_capacity_bytes", "Bytes at which fetching pauses")

        self._cuts = counter("task_cuts", "Tasks cut from the stream", "reason", CUT_REASONS)
        self._task_samples = histogram("task_samples", "Samples in a task", [float(n) for n in _SAMPLES])
        self._task_failures = counter("task_failures", "Failed attempts at an update", "kind", FAILURES)
        self._tasks = counter("tasks", "Tasks learned and committed, restarts included")
        self._samples = counter("training_samples", "Training samples times epochs, restarts included")
        self._steps = counter("training_steps", "Optimiser steps of committed updates, restarts included")
        self._phase_seconds = histogram("update_duration_seconds", "Seconds of an update by phase", _SECONDS, "phase")
        for phase in PHASES:
            self._phase_seconds.labels(phase)
        self._rollbacks = counter("updates_rolled_back", "Updates rolled back: gap budget crossed or loss not finite")
        self._loss = measured("training_loss", "Newest training loss")
        self._epoch = gauge("update_epoch", "Epoch of the running update; 0 when none runs")

        self._similarity = gauge("gap_similarity", "Mean cosine of images with the right or the other names", "pair")
        for pair in ("positive", "negative"):
            self._similarity.labels(pair).set(math.nan)
        self._drift = measured("gap_drift_ratio", "Drift of the negative similarity against the untouched model")
        self._budget_used = measured(
            "gap_budget_used_ratio", "Drift over its budget, if any; an update beyond 1 is undone"
        )
        self._centroid = measured("gap_centroid_distance", "Distance between the image and the text centroid")

        self._accuracy = gauge("accuracy_ratio", "Accuracy after the last update, 0 to 1", "scope")
        for scope in SCOPES:
            self._accuracy.labels(scope).set(math.nan)
        self._average = measured("average_accuracy_ratio", "Mean over tasks of the accuracy after each (Avg)")
        self._forgetting = measured("forgetting_ratio", "Mean drop of the earlier tasks from their best accuracy")
        self._transfer = measured("backward_transfer_ratio", "Mean change of the earlier tasks since they were learned")
        self._retention = measured("zero_shot_retention_ratio", "Probe accuracy now over that of the untouched model")
        self._classes = gauge("classes", "Classes learned")

        self._commit = gauge("commit_number", "Number of the current commit; 0 before the first")
        self._committed = measured("commit_timestamp_seconds", "When the last update was committed")
        self._commit_bytes = measured("commit_size_bytes", "Size of the last commit")
        self._offset = gauge("committed_offset", "Next offset after everything committed", "topic", "partition")
        self._releases = counter("releases", "Releases after an update", "result", ("published", "refused"))
        self._release_s = measured("release_timestamp_seconds", "When the current release was made")
        served = gauge("served_commit_number", "Commit whose release readers follow; 0 before the first")
        served.set_function(self._served)
        held = gauge("release_pinned", "1 while readers are held at one release (gapstream rollback), else 0")
        held.set_function(lambda: float(self._pinned() is not None))
        self._parity = measured("release_parity_max_abs_error", "Largest difference between torch and onnxruntime")
        self._agreement = measured("release_parity_agreement_ratio", "Share of images with the same first answer")

    def state(self, name: str) -> None:
        """What the agent does now, one of STATES (ValueError otherwise)."""
        self._state.state(name)
        with self._lock:
            self._status["state"] = name

    def consumed(self, item: Any, now: float) -> None:
        """A record, rejected record or control mark was read; a rejected one is counted by its reason too."""
        topic = item.partition.topic
        counters = self._by_topic.get(topic)
        if counters is None:
            counters = self._by_topic[topic] = (self._records.labels(topic), self._bytes.labels(topic))
        counters[0].inc()
        image = getattr(item, "image", None)
        size = len(image) if image is not None else 0
        if image is not None:
            counters[1].inc(size)
            self._size.observe(size)
            if item.timestamp_s is not None:
                self._age.observe(max(0.0, now - item.timestamp_s))
        with self._lock:
            self._consumed["records"] += 1
            self._consumed["bytes"] += size
            if self._seconds and self._seconds[-1][0] == int(now):
                self._seconds[-1][1] += 1
            else:
                self._seconds.append([int(now), 1])
        if hasattr(item, "reason"):
            self.rejected(item, now)

    def polled(self, now: float) -> None:
        """The source was polled at `now` (seconds since the epoch)."""
        self._last_poll_s.set(now)
        self._last_poll = now

    def spooled(self, records: int, bytes: int, capacity_bytes: int) -> None:
        """What waits on disk for its update."""
        self._spool_records.set(records)
        self._spool_bytes.set(bytes)
        self._spool_capacity.set(capacity_bytes)
        self._spool = {"records": records, "bytes": bytes, "capacity_bytes": capacity_bytes}

    def lag(self, lag: Mapping[tuple[str, int], int]) -> None:
        """Records not read yet, per (topic, partition)."""
        for (topic, partition), records in lag.items():
            self._lag_records.labels(topic, str(partition)).set(records)
        self._lag = {f"{topic}/{partition}": records for (topic, partition), records in lag.items()}

    def skipped(self, skipped: Mapping[str, int]) -> None:
        """Records per topic that were never read, in all since the start of the process."""
        for topic, records in skipped.items():
            self._skipped.labels(topic).inc(records - self._skipped_before.get(topic, 0))
        self._skipped_before = dict(skipped)

    def cut(self, reason: str, samples: int, classes: int) -> None:
        """A task was cut."""
        self._cuts.labels(reason).inc()
        self._task_samples.observe(samples)
        with self._lock:
            self._status["task"] = {"reason": reason, "samples": samples, "classes": classes}

    def progressed(self, progress: Any) -> None:
        """News from the running update; sets the state to that of its phase."""
        self._go_on(_STATE_OF_PHASE.get(progress.phase, "training"))
        self._epoch.set(progress.epoch)
        if progress.loss is not None:
            self._loss.set(progress.loss)
        self._set_gap(progress.drift, progress.budget)
        fields = ("phase", "task", "epoch", "epochs", "step", "steps", "samples", "loss", "drift", "budget", "accuracy")
        with self._lock:
            self._status["progress"] = {name: _finite(getattr(progress, name)) for name in fields}

    def committed(self, commit: Any, outcome: Any) -> None:
        """An update is committed: everything its report says becomes the current value."""
        update = outcome.update
        if update is not None:
            self._rollbacks.inc(int(update.rolled_back))
            self._set_gap(update.drift_after, update.budget)
        for phase, seconds in outcome.report.seconds.items():
            self._phase_seconds.labels(phase).observe(seconds)
        self._releases.labels("refused" if outcome.release_refused else "published").inc()
        self._commit_bytes.set(sum(size for size, _ in outcome.files.values()))
        self._committed.set(time.time())
        self._current(commit)
        self._epoch.set(0)
        with self._lock:
            self._status["progress"] = None
        self._go_on("consuming")

    def restored(self, commit: Any) -> None:
        """The agent continues from `commit`."""
        self._committed.set(commit.path.stat().st_mtime)
        self._current(commit)

    def rejected(self, item: Any, now: float) -> None:
        """A record was rejected, at its intake (`consumed` tells that by itself) or later."""
        self._rejected.labels(item.reason).inc()
        entry = {
            "time": now,
            "topic": item.partition.topic,
            "partition": item.partition.number,
            "offset": item.offset,
            "reason": str(item.reason),
            "detail": item.detail,
        }
        with self._lock:
            self._consumed["rejected"] += 1
            number = entry["number"] = self._consumed["rejected"]
            self._last_rejected.append(entry)
            if item.raw is not None and item.raw.value:
                self._thumbnails.add(number, item.raw.value)

    def dead_lettered(self, ok: bool) -> None:
        """A rejected record was set aside, or could not be."""
        self._dead_letters.labels("ok" if ok else "error").inc()

    def task_failed(self, kind: str) -> None:
        """An update failed; `kind` is one of FAILURES."""
        self._task_failures.labels(kind).inc()

    def heartbeat(self, loop: str, now: float) -> None:
        """`loop` is alive at `now`."""
        self._heartbeat.labels(loop).set(now)
        with self._lock:
            self._heartbeats[loop] = now

    def readers(self, pinned: Callable[[], int | None]) -> None:
        """`pinned` says which commit's release readers are held at, None while they follow the newest. Another process
        decides that, so it is asked at every scrape."""
        self._pinned = pinned

    def status(self) -> dict[str, Any]:
        """Everything the status page shows, as a JSON-able copy. `report` is the current commit's or None."""
        now = time.time()
        pictured = self._thumbnails.numbers
        readers = {"commit": self._served(), "pinned": self._pinned() is not None}
        with self._lock:
            window = [count for second, count in self._seconds if second > now - RATE_WINDOW_S]
            return {
                **self._status,
                "now": now,
                "started": self._started,
                "heartbeats": dict(self._heartbeats),
                "stream": {
                    **self._consumed,
                    "records_per_s": sum(window) / max(1.0, min(RATE_WINDOW_S, now - self._started)),
                    "last_poll": self._last_poll,
                    "spool": dict(self._spool),
                    "lag": dict(self._lag),
                },
                "rejected": [
                    {**entry, "picture": entry["number"] in pictured} for entry in reversed(self._last_rejected)
                ],
                "readers": readers,
            }

    def pictures(self) -> dict[int, str | None]:
        """What the newest rejected records look like: their `number` in the status -> data URI, or None where nothing
        can be seen. Those with `picture` are in it sooner or later. May take seconds."""
        return self._thumbnails.pictures()

    def _served(self) -> int:
        return self._pinned() or self._released

    def _go_on(self, state: str) -> None:
        if self._status["state"] != "draining":
            self.state(state)

    def _current(self, commit: Any) -> None:
        self._commit.set(commit.number)
        self._classes.set(len(commit.classes))
        for partition, offset in commit.offsets.items():
            self._offset.labels(partition.topic, str(partition.number)).set(offset)
        for name, counter in (
            ("tasks", self._tasks),
            ("training_samples", self._samples),
            ("training_steps", self._steps),
        ):
            total = commit.tasks if name == "tasks" else commit.totals.get(name, 0)
            counter.inc(max(0.0, total - self._counted[name]))
            self._counted[name] = max(total, self._counted[name])
        if commit.report is not None:
            self._set_report(commit.report)
        if commit.release is not None:
            self._released = commit.number
            self._set_release(commit.release)
        with self._lock:
            self._status["report"] = commit.report.to_json() if commit.report is not None else None
            self._status["commit"] = {"number": commit.number, "tasks": commit.tasks, "classes": len(commit.classes)}

    def _set_report(self, report: Any) -> None:
        scopes = {
            "all": report.last,
            "new": report.matrix[-1][-1] if report.matrix and report.matrix[-1] else None,
            "old": report.old_classes.after,
            "zero_shot": report.zero_shot,
            "predict_before_learn": report.predict_before_learn,
        }
        for scope, value in scopes.items():
            _set(self._accuracy.labels(scope), value)
        _set(self._average, report.avg)
        _set(self._forgetting, report.forgetting)
        _set(self._transfer, report.backward_transfer)
        _set(self._retention, report.retention)
        _set(self._similarity.labels("positive"), report.gap.positive.after)
        _set(self._similarity.labels("negative"), report.gap.negative.after)
        _set(self._drift, report.gap.drift.after)
        _set(self._centroid, report.gap.centroid.after)
        if report.learner is not None:
            model = report.learner.model
            self._model.info(
                {
                    "backbone": model.name,
                    "pretrained": model.pretrained,
                    "sha256": model.sha256[:12],
                    "method": report.learner.method,
                    "fusion": report.learner.fusion,
                }
            )

    def _set_release(self, folder: Path) -> None:
        try:
            release = read_release(folder)
        except ReleaseError as error:
            log.warning("the metrics of the release are left out: %s", error)
            return
        self._release_s.set(datetime.fromisoformat(release.created).timestamp())
        self._parity.set(max(release.parity.embedding, release.parity.probabilities))
        self._agreement.set(release.parity.top1)

    def _set_gap(self, drift: float | None, budget: float | None) -> None:
        if drift is not None:
            self._drift.set(drift)
            if budget:
                self._budget_used.set(drift / budget)


def _set(gauge: Gauge, value: float | None) -> None:
    gauge.set(math.nan if value is None else value)


def _finite(value: Any) -> Any:
    """JSON has no NaN, which a diverged loss may be."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for label, names in {
        "version": ("gapstream",),
        "torch": ("torch",),
        "open_clip": ("open_clip_torch",),
        "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    }.items():
        for name in names:
            try:
                found[label] = metadata.version(name)
                break
            except metadata.PackageNotFoundError:
                continue
    return found
