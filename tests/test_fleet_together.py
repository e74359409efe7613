"""Whole sites on one topic, each with its thread and its trainer: their union is that of one agent that saw everything,
whoever restarts, joins late, is lost or sends what nobody can have counted."""

from __future__ import annotations

import hashlib
import itertools
import time
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import load_file, save

from agent.fleet import FleetSite
from agent.fleet_states import check, facts
from agent.layout import SHARED
from agent.methods.base import LearnerState
from agent.trainer import Trainer
from exporter.metrics import Metrics
from streams.blobs import Blob, cut
from tests.test_fleet import Log, LogTopic
from tests.test_fleet_trainer import SiteBench, answers
from tests.test_trainer import images_of

KEYS = {
    "evaluation": {"holdout_fraction": 0},
    "method": {"gapstream": {"features": 64, "drift_budget": 0}},
}
TEST = images_of("cat", "dog", "frog", "ship", "truck", count=10, start=200)


class WholeSite(SiteBench):
    """A site whose thread is asked for its steps."""

    def __init__(self, folder: Path, site: str, log: Log) -> None:
        super().__init__(folder / site, site, **KEYS)
        self.log = log
        self.restart()

    def restart(self) -> None:
        """Both processes die, and begin with what is on the disk."""
        commit = self.store.current()
        self.begin(commit.path if commit else None)
        self.registry = CollectorRegistry()
        self.topic = LogTopic(self.log, {}, [])
        self.thread = FleetSite(self.config, Metrics(self.registry), lambda positions: self.topic)

    def step(self) -> None:
        for _ in range(2):
            self.thread.step(self.topic)

    def union(self) -> LearnerState:
        return self.trainer._answers.state()


def settle(*sites: WholeSite) -> None:
    """All hear of each other, and then of the weights that each fitted beside the others."""
    for _ in range(2):
        for site in sites:
            site.step()
        for site in sites:
            site.step()
            site.renew()


def right(bench: SiteBench) -> int:
    """Images of TEST that are answered rightly."""
    found = answers(bench, TEST)
    names = list(found)
    best = torch.tensor(list(found.values())).argmax(0).tolist()
    return sum(names[at] == label for at, (label, _) in zip(best, TEST, strict=True))


def assert_same(site: WholeSite, central: SiteBench) -> None:
    """A site's union is what one learner counted of everything: counts exactly, the rest but for rounding."""
    union, whole = site.union(), central.trainer._method.state()
    order = [whole.values["classes"].index(name) for name in union.values["classes"]]
    assert sorted(order) == list(range(len(whole.values["classes"])))
    assert torch.equal(union.tensors["counts"], whole.tensors["counts"][order])
    for key in ("means", "embeddings"):
        torch.testing.assert_close(union.tensors[key], whole.tensors[key][order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(union.tensors["scatter"], whole.tensors["scatter"], rtol=1e-4, atol=1e-3)


def test_after_a_restart_a_late_join_and_with_a_lost_site_the_union_is_that_of_one_agent_that_saw_everything(tmp_path):
    # given two sites with a class in common, and one agent that sees everything
    log = Log()
    a, b = WholeSite(tmp_path, "a", log), WholeSite(tmp_path, "b", log)
    central = SiteBench(tmp_path / "central", "", Trainer, **KEYS)
    tasks = {
        "a": [images_of("cat", "ship", count=12), images_of("frog", count=12)],
        "b": [images_of("dog", "cat", count=12, start=40), images_of("ship", "dog", count=8, start=80)],
        "c": [images_of("truck", "frog", count=12, start=40)],
    }
    for site, name in ((a, "a"), (b, "b")):
        site.teach(tasks[name][0])
        central.teach(tasks[name][0])
    settle(a, b)
    for site in (a, b):
        assert_same(site, central)
    # when one is lost for good after its second task, one joins late, and one restarts
    b.teach(tasks["b"][1])
    b.step()
    log.compact()
    c = WholeSite(tmp_path, "c", log)
    c.step()
    c.renew()
    c.teach(tasks["c"][0])
    a.restart()
    assert a.union().values["classes"] == ["cat", "dog", "ship"]
    a.teach(tasks["a"][1])
    for images in (tasks["b"][1], tasks["c"][0], tasks["a"][1]):
        central.teach(images)
    settle(a, c)
    # then both have what all three learned
    for site in (a, c):
        assert_same(site, central)
    # and after another restart, with the topic out of reach, too
    a.restart()
    assert_same(a, central)
    # and of 50 images as many are right; the two weights, fitted to other images, may move one
    assert right(a) == pytest.approx(right(central), abs=1)


def test_states_that_nobody_can_have_counted_are_counted_or_named_and_the_union_of_the_others_stays(tmp_path):
    # given a site that answers with another one
    log = Log()
    a, b = WholeSite(tmp_path, "a", log), WholeSite(tmp_path, "b", log)
    a.teach(images_of("cat", "ship", count=8))
    b.teach(images_of("dog", "cat", count=8, start=40))
    settle(a, b)
    expected, shared = a.union(), b.store.current().path / SHARED
    good, tensors, told = shared.read_bytes(), load_file(shared), check(shared)

    def state(classes: tuple[str, ...] = told.classes, **spoiled: torch.Tensor) -> bytes:
        values = {"depth": told.depth, "fitted": told.fitted}
        return save({**tensors, **spoiled}, facts("gapstream", told.model, 1, ["evil"], values, classes))

    counts, means, scatter = (tensors[key] for key in ("counts", "means", "scatter"))
    refused = {
        "truncated": good[:-9], "text": b"{}",
        "nan": state(means=means.index_fill(0, torch.tensor(1), float("nan"))),
        "inf": state(scatter=scatter.index_fill(0, torch.tensor(3), float("inf"))),
        "minus": state(counts=-counts), "many": state(counts=counts * 1e30),
        "control": state(("dog\n", "\x1b[31mcat")),
    }  # fmt: skip
    named = {"long": state(means=means * 1e30), "wide": state(scatter=scatter * 1e34)}
    # when all of it comes, and with it one of another sha256, one too large, and one that says it is this very site's
    now = int(time.time() * 1000) + 1
    for name, data in {**refused, **named, "a": good}.items():
        log.append(cut(Blob(name, now, 1, hashlib.sha256(data).hexdigest(), len(data), 1000), data))
    log.append(cut(Blob("other", now, 1, "0" * 64, len(good), 1000), good))
    log.append(list(itertools.islice(cut(Blob("large", now, 1, "0" * 64, 2**45, 1000), bytes(1000)), 1)))
    a.step()
    # then what does not verify is counted, once each, and what only adding it would show is left out by its name
    count = a.registry.get_sample_value("gapstream_fleet_refused_total")
    assert count == len(refused) + 3
    sites = {site.site: site.refused for site in a.renew().report.fleet.sites}
    assert sites.keys() == {"b", *named} and sites["b"] is None
    assert "has the length" in sites["long"] and "which no images have" in sites["wide"]
    union = a.union()
    assert union.values == expected.values
    for key, tensor in expected.tensors.items():
        assert torch.equal(union.tensors[key], tensor), key
