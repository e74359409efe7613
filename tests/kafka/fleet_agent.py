"""`python -m tests.kafka.fleet_agent STATE LEARNER KEY=VALUE...`: the whole agent of a site of a fleet as a process."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from agent.config import load
from agent.fleet_states import check, facts
from agent.layout import FLEET, SHARED
from agent.process import stop_on_signals
from agent.run import run_agent
from agent.scoring.report import Fleet, Site
from agent.sealing import seal
from agent.values import OnProgress, Outcome
from streams.blobs import kept
from streams.buffer import Task
from tests.fakes import FakeLearner

UNION = "union.json"
"""What a site answers: class -> images, of all sites."""


class CountingLearner(FakeLearner):
    """Counts the images of every class, shares that, and answers with the sum over all sites."""

    def learn(self, task: Task, staging: Path, on_progress: OnProgress) -> Outcome:
        made = super().learn(task, staging, on_progress)
        own = self.state.setdefault("counts", {})
        for sample in task.samples:
            own[sample.label] = own.get(sample.label, 0) + 1
        (staging / "learner.safetensors").write_text(json.dumps(self.state))
        total, sites = Counter(own), []
        for site, (blob, path) in sorted(kept(self.config.state.path / FLEET).items()):
            shared = check(path)
            total.update(dict(zip(shared.classes, shared.images, strict=True)))
            sites.append(Site(site=site, sequence=blob.sequence, version=blob.version, sha256=blob.sha256))
        (staging / UNION).write_text(json.dumps(dict(sorted(total.items()))))
        if own:
            # a megabyte, so that it travels in chunks
            means = np.ones((len(own), 50_000), np.float32)
            model = {"name": "none", "sha256": "", "prompt": ""}
            said = facts("ncm", model, task.number, [self.config.fleet.site], {}, list(own))
            save_file({"counts": np.array(list(own.values()), np.float32), "means": means}, staging / SHARED, said)
        self.report = replace(self.report, fleet=Fleet(site=self.config.fleet.site, sites=tuple(sites)))
        self.report.write(staging / "report.json")
        return replace(made, report=self.report, files=seal(staging))


if __name__ == "__main__":
    state, learner, *others = sys.argv[1:]
    logging.basicConfig(level="INFO")
    settings = dict(setting.split("=", 1) for setting in others)
    config = load(None, {}, {"state.path": state, "http.enabled": "false", "source.kind": "kafka", **settings})
    stop = threading.Event()
    with stop_on_signals(stop):
        run_agent(config, stop, learner=learner or None)
