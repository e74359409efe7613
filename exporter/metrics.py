"""What the agent does: every event sets its metrics (exporter.instruments) and the value behind the status page.

The pipeline calls one method per event; each is cheap (microseconds) and safe from any thread. Parameters named after
the agent's values (item, progress, commit, outcome) are read by attribute: this package imports neither agent nor
streams.

Counters that move only with a commit (tasks, samples, steps) continue after a restart; the others start at 0, as
Prometheus expects of a new process.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from exporter.instruments import Instruments
from exporter.masking import masked
from exporter.release import ReleaseError
from exporter.release import read as read_release
from exporter.thumbnails import Thumbnails

log = logging.getLogger(__name__)

LAST_REJECTED = 20
"""Rejected records that the status page lists, the newest. Chosen by hand: a page full."""

DETAIL_CHARS = 1000
"""Characters of a rejected record's detail on the status page. It may repeat what a producer sent: 20 of them made the
page 105 MB. As in streams.record, which cannot be imported here."""

RATE_WINDOW_S = 60
"""Seconds that the records per second on the status page are a mean over. Shorter, and a stream that comes in bursts
jumps; longer, and a stream that has stopped is seen late."""

_STATE_OF_PHASE = {"evaluate": "evaluating", "export": "publishing", "commit": "publishing"}
"""The state that a phase of an update gives; every other phase gives `training`."""


class Metrics(Instruments):
    """It holds all metrics of one agent, set by what happens to it, and the value behind its status page."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Put every metric on `registry`. Raises ValueError when it already has them."""
        super().__init__(registry)
        self._lock = threading.Lock()
        self._started = time.time()
        self._status: dict[str, Any] = {"state": "starting", "progress": None, "commit": None, "report": None}
        self._status["ranks"] = []
        self._spool = {"records": 0, "bytes": 0, "capacity_bytes": 0}
        self._lag: dict[str, int] = {}
        self._consumed = {"records": 0, "bytes": 0, "rejected": 0}
        self._seconds: deque[list[int]] = deque(maxlen=RATE_WINDOW_S)
        """[second, records read in it] of the newest seconds that had any."""
        self._by_topic: dict[str, tuple[Counter, Counter]] = {}
        """The record and the byte counter of each topic, since looking one up costs more than counting."""
        self._last_rejected: deque[dict[str, Any]] = deque(maxlen=LAST_REJECTED)
        self._thumbnails = Thumbnails()
        self._last_poll: float | None = None
        self._heartbeats: dict[str, float] = {}
        # Beside the time of day that is shown: a clock set forward must not make a watchdog end an agent that is well.
        # A pipeline that has given no heartbeat yet, since its parts are being opened, counts from the start.
        self._alive = {"pipeline": time.monotonic()}
        self._skipped_before: dict[str, int] = {}
        """Totals that `skipped` was told last."""
        self._clamped_before: dict[str, int] = {}
        """Totals that `clamped` was told last."""
        self._removed_before = 0
        """Total that `dead_letters_removed` was told last."""
        self._counted = {"tasks": 0.0, "training_samples": 0.0, "training_steps": 0.0}
        """What the counters that go on after a restart stand at."""
        self._fleet_known: set[str] = set()
        """Sites that `fleet_states` was told last."""
        self._released = 0
        """Number of the commit that has the newest release."""
        self._pinned: Callable[[], int | None] = lambda: None
        self._served_commit.set_function(self._served)
        self._held.set_function(lambda: float(self._pinned() is not None))

    def state(self, name: str) -> None:
        """The agent is in this state now, one of exporter.instruments.STATES. Raises ValueError for any other."""
        self._state.state(name)
        with self._lock:
            self._status["state"] = name

    def consumed(self, item: Any, now: float) -> None:
        """A record, rejected record or control mark was read at `now` (seconds since the epoch).

        A rejected one is counted by its reason too.
        """
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
                self._age.observe(max(0.0, now - item.timestamp_s))  # a producer's clock may be ahead of ours
        with self._lock:
            self._consumed["records"] += 1
            self._consumed["bytes"] += size
            # One number a second, not one time stamp a record: thousands may come in a second.
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
        """`records` samples of `bytes` wait on disk for their update; fetching pauses at `capacity_bytes`."""
        self._spool_records.set(records)
        self._spool_bytes.set(bytes)
        self._spool_capacity.set(capacity_bytes)
        self._spool = {"records": records, "bytes": bytes, "capacity_bytes": capacity_bytes}

    def waiting(self, age_s: float, retention_s: float) -> None:
        """The oldest record that was read and is in no commit is so old, of a stream that keeps records for
        `retention_s` (infinite where it keeps them for ever; 0 is a setting that topics take)."""
        self._retention_used.set(age_s / max(retention_s, 1))

    def lag(self, lag: Mapping[tuple[str, int], int]) -> None:
        """This number of records per (topic, partition) is not read yet."""
        for (topic, partition), records in lag.items():
            self._lag_records.labels(topic, str(partition)).set(records)
        self._lag = {f"{topic}/{partition}": records for (topic, partition), records in lag.items()}

    def holding(self, why: str) -> None:
        """The source does not read at present because of `why`; it does when that is empty."""
        self._holding.set(bool(why))
        with self._lock:
            self._status["holding"] = masked(why)[:DETAIL_CHARS]

    def skipped(self, skipped: Mapping[str, int]) -> None:
        """Retention removed this number of records per topic before they were read, since the process started."""
        for topic, records in skipped.items():
            self._skipped.labels(topic).inc(records - self._skipped_before.get(topic, 0))
        self._skipped_before = dict(skipped)

    def clamped(self, clamped: Mapping[str, int]) -> None:
        """This number of records per topic was dated far after its arrival, since the process started."""
        for topic, records in clamped.items():
            self._clamped.labels(topic).inc(records - self._clamped_before.get(topic, 0))
        self._clamped_before = dict(clamped)

    def cut(self, reason: str, samples: int, classes: int) -> None:
        """A task was cut; `reason` is one of exporter.instruments.CUT_REASONS."""
        self._cuts.labels(reason).inc()
        self._task_samples.observe(samples)
        with self._lock:
            self._status["task"] = {"reason": reason, "samples": samples, "classes": classes}

    def progressed(self, progress: Any) -> None:
        """The running update has come this far; the state becomes that of its phase."""
        self._go_on(_STATE_OF_PHASE.get(progress.phase, "training"))
        self._epoch.set(progress.epoch)
        if progress.loss is not None:
            self._loss.set(progress.loss)
        self._set_gap(progress.drift, progress.budget)
        fields = ("phase", "task", "epoch", "epochs", "step", "steps", "samples", "loss", "drift", "budget", "accuracy")
        with self._lock:
            self._status["progress"] = {name: _finite(getattr(progress, name)) for name in fields}

    def committed(self, commit: Any, outcome: Any) -> None:
        """An update is committed: everything that its report says becomes the current value."""
        update = outcome.update
        if update is not None:
            self._rollbacks.inc(int(update.rolled_back))
            self._set_gap(update.drift_after, update.budget)
            if update.adaptation is not None:
                self._adaptations.labels(update.adaptation.decision).inc()
        self._shared(outcome.shares)
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

    def _shared(self, shares: Sequence[Any]) -> None:
        """Show which ranks the update had; there are none where the trainer learned alone."""
        self._ranks.set(len(shares) or 1)
        self._rank_waiting.clear()  # another update may have fewer
        waiting = [share.waited_s / max(share.seconds, 1e-9) for share in shares]
        for rank, (share, part) in enumerate(zip(shares, waiting, strict=True)):
            self._rank_waiting.labels(str(rank), share.device).set(part)
        told = [
            {"host": share.host, "process": share.process, "device": share.device, "waiting": part}
            for share, part in zip(shares, waiting, strict=True)
        ]
        with self._lock:
            self._status["ranks"] = told

    def restored(self, commit: Any) -> None:
        """The agent continues from `commit`."""
        # Not now: the age of the model is that of its commit, which may be days old.
        self._committed.set(commit.path.stat().st_mtime)
        self._current(commit)

    def rejected(self, item: Any, now: float) -> None:
        """A record was rejected at `now`, after its intake; for one rejected at its intake `consumed` calls this."""
        self._rejected.labels(item.reason).inc()
        entry = {
            "time": now,
            "topic": item.partition.topic,
            "partition": item.partition.number,
            "offset": item.offset,
            "reason": str(item.reason),
            "detail": masked(item.detail)[:DETAIL_CHARS],
        }
        with self._lock:
            self._consumed["rejected"] += 1
            number = entry["number"] = self._consumed["rejected"]
            self._last_rejected.append(entry)
            # A record whose batch could not even be unpacked has no bytes to look at.
            if item.raw is not None and item.raw.value:
                self._thumbnails.add(number, item.raw.value)

    def dead_lettered(self, ok: bool) -> None:
        """A rejected record was set aside (`ok`), or could not be."""
        self._dead_letters.labels("ok" if ok else "error").inc()

    def dead_letters_removed(self, removed: int) -> None:
        """This number of dead letters was removed by their bound, since the process started."""
        self._dead_letters.labels("removed").inc(removed - self._removed_before)
        self._removed_before = removed

    def task_failed(self, kind: str) -> None:
        """An update failed; `kind` is one of exporter.instruments.FAILURES."""
        self._task_failures.labels(kind).inc()

    def heartbeat(self, loop: str, now: float) -> None:
        """`loop` is alive at `now`."""
        self._heartbeat.labels(loop).set(now)
        with self._lock:
            self._heartbeats[loop] = now
            self._alive[loop] = time.monotonic()

    def fleet_states(self, published: Mapping[str, float]) -> None:
        """The newest known states of the sites of the fleet were published then (seconds since the epoch)."""
        for site in self._fleet_known - published.keys():
            self._fleet_states.remove(site)
        self._fleet_known = set(published)
        for site, moment in published.items():
            self._fleet_states.labels(site).set(moment)

    def fleet_published(self, bytes: int) -> None:
        """A state of this site, of that many bytes, was published."""
        self._fleet_bytes.inc(bytes)

    def fleet_failed(self) -> None:
        """The fleet's topic could not be read or written; it is tried again."""
        self._fleet_failures.inc()

    def fleet_refused(self) -> None:
        """A message of the fleet's topic, or the state it completes, did not verify."""
        self._fleet_refusals.inc()

    def readers(self, pinned: Callable[[], int | None]) -> None:
        """Ask `pinned` at every scrape which commit's release readers are held at; it gives None while they follow the
        newest. Another process decides that (gapstream rollback), and tells nobody."""
        self._pinned = pinned

    def status(self) -> dict[str, Any]:
        """Give everything that the status page shows, as a JSON-able copy. `report` is that of the current commit, or
        None."""
        now = time.time()
        pictured = self._thumbnails.numbers
        readers = {"commit": self._served(), "pinned": self._pinned() is not None}
        with self._lock:
            window = [count for second, count in self._seconds if second > now - RATE_WINDOW_S]
            # A copy made under the lock: a request thread writes it out later, while events go on.
            return {
                **self._status,
                "now": now,
                "started": self._started,
                "heartbeats": dict(self._heartbeats),
                "silent_s": {loop: time.monotonic() - last for loop, last in self._alive.items()},
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
        """Show what the newest rejected records look like: their `number` in the status -> data URI of a JPEG, or None
        where nothing can be seen.

        One that has `picture` in the status is in it now or at a later call. May take seconds.
        """
        return self._thumbnails.pictures()

    def _served(self) -> int:
        """Give the number of the commit whose release readers follow; 0 before the first."""
        return self._pinned() or self._released

    def _go_on(self, state: str) -> None:
        """Change the state, unless the agent is about to end: that is what matters to whoever looks."""
        if self._status["state"] != "draining":
            self.state(state)

    def _current(self, commit: Any) -> None:
        """Show `commit` as the current one. Counters that go on after a restart catch up with its totals."""
        self._commit.set(commit.number)
        self._classes.set(len(commit.classes))
        self._damaged.set(len(commit.damaged))
        for partition, offset in commit.offsets.items():
            self._offset.labels(partition.topic, str(partition.number)).set(offset)
        for name, counter in (
            ("tasks", self._tasks),
            ("training_samples", self._samples),
            ("training_steps", self._steps),
        ):
            total = commit.tasks if name == "tasks" else commit.totals.get(name, 0)
            # A counter must not fall, which Prometheus would take for a restart.
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
        sites = report.fleet.sites if report.fleet is not None else ()
        refused = sum(site.refused is not None for site in sites)
        self._fleet_sites.labels("refused").set(refused)
        self._fleet_sites.labels("added").set(len(sites) - refused)
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
    """Give `value`, or None for a float that JSON cannot hold, as a diverged loss may be."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
