"""The agent wired together: its parts in the order they are opened, closed again whatever happens."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry

from agent.commits import CommitStore
from agent.config import Config, resolved
from agent.layout import SPOOL
from agent.parts import open_fleet, open_stream, source_parts
from agent.pipeline import Pipeline, Rules, resume
from agent.releases import Publisher, pinned
from agent.values import Commit
from agent.worker import FLEET_TRAINER, TRAINER, ProcessWorker
from exporter.http import StatusServer
from exporter.metrics import Metrics
from exporter.scrapes import Scrapes
from exporter.systemd import supervised
from streams.buffer import CutRule, TaskBuffer
from streams.spool import Spool

log = logging.getLogger(__name__)

STALLED_S = 30
"""A loop that gave no heartbeat for this time is not alive. A pass of the pipeline takes half a second, and a commit on
a slow disk seconds; the supervisor restarts what is not alive, so a smaller value would end agents that are only slow.
"""

_RETENTION_SHARE = 0.5
"""Share of the stream's retention for which a task may fill. Chosen by hand: the other half is left for the update, and
for an agent that is down meanwhile. Nearer to 1, a record may be gone before the commit that learns it."""

_SHORT_S = 3600
"""Seconds to fill a task below which the rule of retention is worth a warning: then it may be the one that cuts. Chosen
by hand; Kafka's default retention leaves three and a half days."""


def run_agent(
    config: Config,
    stop: threading.Event,
    make_metrics: Callable[[CollectorRegistry], Metrics] | None = None,
    learner: str | None = None,
) -> Commit | None:
    """Run an agent until its stream ends or `stop` is set; returns its last commit.

    The parts are opened in the order in which they need each other: the lock comes first, so that a second agent on the
    same folder fails before it has moved anything, and the source before the commit that must fit it.

    `make_metrics` builds what is told of everything that happens (exporter.metrics.Metrics by default, a subclass to
    watch), `learner` names the class that learns (agent.trainer:Trainer by default). Raises StreamError, StateError,
    AgentError, and OSError when the HTTP address cannot be had.
    """
    registry = CollectorRegistry()
    scrapes = Scrapes(registry)
    metrics = (make_metrics or Metrics)(registry)
    metrics.readers(lambda: pinned(config.state.path))  # `gapstream rollback` is another process
    with contextlib.ExitStack() as parts:
        commits = CommitStore(config.state.path, config.state.keep_commits)
        parts.callback(commits.close)
        commits.lock()
        source, dead_letters = open_stream(config)
        parts.callback(source.close)
        parts.callback(dead_letters.close)
        commit = resume(commits, source)
        if commit is not None:
            log.info("continuing from commit %06d: %d classes learned", commit.number, len(commit.classes))
            metrics.restored(commit)
        # The spool is a cache: what an earlier run left there is deleted, and read again from the commit's offsets.
        spool = Spool(config.state.path / SPOOL, config.spool.max_bytes)
        rule = _cut_rule(config, source.retention_s)
        known, done = (commit.seen, commit.tasks) if commit else ((), 0)
        worker = ProcessWorker(config, learner or (FLEET_TRAINER if config.fleet.topic else TRAINER))
        pipeline = Pipeline(
            source=source,
            buffer=TaskBuffer(rule, spool, known, done + 1, source.positions),
            spool=spool,
            worker=worker,
            commits=commits,
            dead_letters=dead_letters,
            metrics=metrics,
            stop=stop,
            rules=_rules(config),
            config=resolved(config),
            commit=commit,
            published=_publisher(config, commit, parts),
            renewal_due=open_fleet(config, metrics, parts),
        )
        if config.http.enabled:
            server = StatusServer(
                config.http.host,
                config.http.port,
                registry,
                live=lambda: _why_not_alive(metrics.status()),
                ready=lambda: _why_not_ready(worker.ready, pipeline.commit),
                status=metrics.status,
                heartbeat=metrics.heartbeat,
                pictures=metrics.pictures,
                allowed_hosts=config.http.allowed_hosts,
            )
            parts.callback(server.stop)
            server.start()
            log.info("metrics and status page on http://%s:%d/", config.http.host, server.port)
        # Last: systemd is told that the agent is ready by a thread that looks at the parts above.
        parts.enter_context(
            supervised(
                live=lambda: _why_not_alive(metrics.status()),
                ready=lambda: worker.ready,
                doing=lambda: _doing(metrics.status()),
                stop=stop,
            )
        )
        commit = _run(pipeline)
        if not stop.is_set():
            # Else Prometheus sees neither the last commit of an archive nor why nobody answers from now on.
            metrics.state("ended")
            scrapes.wait_for_next(stop, lambda: metrics.heartbeat("pipeline", time.time()))
        return commit


def _run(pipeline: Pipeline) -> Commit | None:
    """Run the pipeline, and keep the garbage collector from what is there before, which stays to the end.

    Else it goes through all of that after some ten thousand records, and small ones are read a sixth slower.
    """
    gc.collect()
    gc.freeze()
    try:
        return pipeline.run()
    finally:
        gc.unfreeze()


def _rules(config: Config) -> Rules:
    """What the pipeline does at the edges of its work, as configured."""
    return Rules(
        poll_timeout_s=config.agent.poll_timeout_s,
        learn_at_end=source_parts(config).learn_at_end(config),
        learn_at_stop=config.task.on_stop == "learn",
        quarantine=config.agent.on_task_failure == "quarantine",
        stop_timeout_s=config.agent.stop_timeout_s,
    )


def _cut_rule(config: Config, retention_s: float) -> CutRule:
    """The rules of [task], and one that no key sets: a task ends before retention deletes what it holds."""
    age_s = _RETENTION_SHARE * retention_s if math.isfinite(retention_s) else 0
    if age_s:
        told = "the stream keeps records for %.0f s, so a task is cut when its first sample has waited for %.0f s"
        level = logging.INFO if age_s > _SHORT_S else logging.WARNING
        log.log(level, told, retention_s, age_s)
    return CutRule(**config.task.model_dump(exclude={"on_stop"}), age_s=age_s, kept_s=retention_s)


def _publisher(config: Config, commit: Commit | None, parts: contextlib.ExitStack) -> Callable[[Commit], None]:
    """Make what takes each release where `release.layout` wants it, beside the state folder.

    It begins with the release of `commit`: an agent killed between commit and publishing has left it out.
    """
    if config.release.layout == "folder":
        return lambda commit: None
    publisher = Publisher(config.release, config.state.path)
    parts.callback(publisher.close)
    if commit is not None and commit.release is not None:
        publisher(commit)
    return publisher


def _why_not_alive(status: dict[str, Any]) -> list[str]:
    """Give the reasons for /livez and the watchdog to call the agent dead; none while every loop turns. The stream's
    own state is no reason: a restart mends no broker."""
    return [
        f"the {loop} loop was last seen {silent:.0f} s ago, expected every few seconds"
        for loop, silent in status["silent_s"].items()
        if silent > STALLED_S
    ]


def _doing(status: dict[str, Any]) -> str:
    """Write the line that `systemctl status` shows."""
    commit = status["commit"]
    learned = f"{commit['classes']} classes learned" if commit and commit["tasks"] else "nothing learned yet"
    return f"{status['state']}; {learned}"


def _why_not_ready(trainer_ready: bool, commit: Commit | None) -> list[str]:
    """Give the reasons for /readyz: a ready agent can learn, and has a release for readers."""
    reasons = [] if trainer_ready else ["the trainer is being set up"]
    if commit is None or commit.release is None:
        reasons.append("nothing is released yet; the first release comes with the first learned task")
    return reasons
