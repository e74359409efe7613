"""A site of a fleet as its trainer sees it: it learns its own stream, and is scored and released with all sites."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agent.commands.merge import merge_states
from agent.fleet_states import check
from agent.fleet_trainer import FleetTrainer
from agent.layout import LEARNER_TENSORS, LEARNER_VALUES, MEMBER, REPORT, SHARED
from agent.scoring.report import Report
from agent.trainer import Trainer
from agent.values import Commit
from exporter.release import digest
from streams.blobs import Blob, Blobs, cut
from streams.buffer import Task
from tests.test_merge_command import settings
from tests.test_trainer import FACTS, Bench, images_of, unreleased


class SiteBench(Bench):
    """A site with a trainer of its own."""

    def __init__(self, folder: Path, site: str, trainer: type[Trainer] = FleetTrainer, **sections: Any) -> None:
        base = {name: part.model_dump() for name, part in settings() if name in ("model", "method", "evaluation")}
        base["fleet"] = {"topic": "fleet", "site": site} if trainer is FleetTrainer else {}
        super().__init__(folder, **{**base, **sections})
        self.kind = trainer
        self.state = self.config.state.path
        self.begin(None)

    def begin(self, commit: Path | None) -> None:
        self.trainer = unreleased(self.kind(self.config, commit))

    def teach(self, images: list[tuple[str, bytes]]) -> Commit:
        return self.learn(self.trainer, self.task(images))[1]

    def renew(self) -> Commit:
        commit = self.store.current()
        number, offsets = (commit.tasks, dict(commit.offsets)) if commit else (0, {})
        outcome = self.trainer.learn(
            Task(number, (), (), offsets, "renewal", 0, 0, {}), self.store.stage(), lambda progress: None
        )
        return self.store.commit(outcome, FACTS)


def deliver(sender: SiteBench, *receivers: SiteBench, site: str = "", file: Path | None = None) -> None:
    """What `sender` published last arrives."""
    commit = sender.store.current()
    path = file or commit.path / SHARED
    data = path.read_bytes()
    for receiver in receivers:
        store = Blobs(receiver.state / "fleet", receiver.config.fleet.site, 2**30, lambda site, path: None)
        known = store.known()
        name = site or sender.config.fleet.site
        sequence = max((blob.sequence for blob in known.values()), default=0) + 1
        for chunk in cut(Blob(name, sequence, commit.number, digest(path)[1], len(data), 10_000), data):
            store.take(chunk.key, chunk.value, chunk.headers)


def answers(bench: SiteBench, images: list[tuple[str, bytes]]) -> dict[str, list[float]]:
    """Class -> its probability for each image."""
    trainer = bench.trainer
    pixels = torch.from_numpy(trainer._pixels([_Image(*pair) for pair in images]))
    probabilities = trainer._module(pixels)[2]
    return {name: probabilities[:, at].tolist() for at, name in enumerate(trainer._module.classes)}


class _Image:
    def __init__(self, label: str, data: bytes) -> None:
        self.label, self.read = label, lambda: data


FIRST, SECOND, THIRD = images_of("ship", "cat"), images_of("dog", "cat", start=16), images_of("frog", start=40)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> tuple[SiteBench, SiteBench]:
    """Two sites with a class in common, which have heard nothing of each other."""
    folder = tmp_path_factory.mktemp("sites")
    a, b = SiteBench(folder / "a", "a"), SiteBench(folder / "b", "b")
    a.teach(FIRST)
    b.teach(SECOND)
    return a, b


def copied(bench: SiteBench, folder: Path) -> SiteBench:
    """The same site elsewhere, so that a test may change it."""
    shutil.copytree(bench.state, folder / "state", symlinks=True)
    copy = SiteBench(folder, bench.config.fleet.site)
    copy.offset, copy.tasks = bench.offset, bench.tasks
    copy.begin(copy.store.current().path)
    return copy


def test_a_site_alone_learns_and_is_scored_as_without_a_fleet(sites, tmp_path):
    alone = SiteBench(tmp_path, "", Trainer)
    commit, site = alone.teach(FIRST), sites[0].store.current()
    for name in (LEARNER_TENSORS, LEARNER_VALUES):
        assert (commit.path / name).read_bytes() == (site.path / name).read_bytes()
    assert commit.report.fleet is None and site.report.fleet.sites == ()
    assert commit.report.history[0].accuracy == site.report.history[0].accuracy
    assert not (commit.path / SHARED).exists() and "fleet" not in (commit.path / REPORT).read_text()


def test_what_is_shared_has_what_was_counted_and_no_image_or_hold_out(sites):
    shared = check(sites[0].store.current().path / SHARED)
    learned = load_file(sites[0].store.current().path / LEARNER_TENSORS)
    assert shared.classes == ("ship", "cat") and list(shared.images) == learned["counts"].tolist()
    assert (shared.method, shared.features, shared.task) == ("gapstream", 64, 1)
    assert shared.roots == sites[0].store.current().report.roots


def test_a_renewal_answers_with_both_and_changes_nothing_of_the_learner(sites, tmp_path):
    a, b = (copied(bench, tmp_path / name) for bench, name in zip(sites, "ab", strict=True))
    before = a.store.current()
    deliver(b, a)
    # when nothing is learned, and a release is made anew
    commit = a.renew()
    # then learner and offsets are the same, byte for byte, and what it publishes is but for the two weights
    assert (commit.number, commit.tasks, commit.offsets) == (before.number + 1, before.tasks, before.offsets)
    for name in (LEARNER_TENSORS, LEARNER_VALUES):
        assert (commit.path / name).read_bytes() == (before.path / name).read_bytes()
    was, now = (load_file(path / SHARED) for path in (before.path, commit.path))
    assert [name for name in was if not torch.equal(was[name], now[name])] == ["fusion"]
    assert commit.classes == before.classes == ("ship", "cat")
    # and the report is of both, on this site's own images, and tells of the update as before
    report, old = commit.report, before.report
    assert report.classes == ("cat", "dog", "ship") and report.test_images >= old.test_images
    [site] = report.fleet.sites
    told = check(b.store.current().path / SHARED)
    assert (site.site, site.classes, site.images, site.refused) == ("b", 2, sum(told.images), None)
    assert len(report.history) == 1 and report.task == 1 and report.began == old.began
    assert (report.samples, report.gap, report.history[0].seconds.keys()) == (
        old.samples, old.gap, old.history[0].seconds.keys(),
    )  # fmt: skip
    # once more, it takes the place of the renewal before, and there is nothing to publish
    published = (commit.path / SHARED).read_bytes()
    again = a.renew()
    assert (again.path / SHARED).read_bytes() == published
    assert not commit.path.exists() and before.path.exists() and again.report.classes == report.classes


def test_sites_that_know_each_other_answer_alike_and_after_a_restart_still(sites, tmp_path):
    a, b = (copied(bench, tmp_path / name) for bench, name in zip(sites, "ab", strict=True))
    for _ in range(2):  # what both learned, and then the weights that each fitted beside the other
        deliver(a, b)
        deliver(b, a)
        commit, _ = a.renew(), b.renew()
    images = images_of("ship", "dog", "cat", count=5, start=90)
    one, other = answers(a, images), answers(b, images)
    assert one.keys() == other.keys() == {"cat", "dog", "ship"}
    for name, probabilities in one.items():
        assert other[name] == pytest.approx(probabilities, abs=2e-3)
    a.begin(commit.path)
    assert answers(a, images) == one
    # and what a learns next is added to what b knew
    later = a.teach(THIRD)
    assert later.classes == ("ship", "cat", "frog") and later.report.classes == ("cat", "dog", "frog", "ship")
    assert [entry.task for entry in later.report.history] == [1, 2]


def test_a_site_that_joins_late_answers_before_it_has_learned_and_goes_on(sites, tmp_path):
    c = SiteBench(tmp_path, "c")
    deliver(sites[0], c)
    deliver(sites[1], c)
    commit = c.renew()
    assert (commit.tasks, commit.classes, commit.report.classes) == (0, (), ("cat", "dog", "ship"))
    assert not (commit.path / SHARED).exists()
    c.begin(commit.path)
    assert answers(c, images_of("ship", count=1)).keys() == {"cat", "dog", "ship"}
    commit = c.teach(THIRD)
    assert (commit.tasks, commit.classes) == (1, ("frog",)) and len(commit.report.classes) == 4
    assert commit.report.last is not None and len(commit.report.history) == 2


def test_sites_that_cannot_be_added_are_named_and_left_out(sites, tmp_path, caplog):
    a = copied(sites[0], tmp_path / "a")
    model = {"threads": 1, "prompt": "a {}"}
    prompt = SiteBench(tmp_path / "prompt", "prompt", model=model)
    seed = SiteBench(tmp_path / "seed", "seed", method={"seed": 1, "gapstream": {"features": 64}})
    for other in (prompt, seed):
        other.teach(THIRD)
        deliver(other, a)
    deliver(a, a, site="twin")  # a copy of this very learner
    deliver(sites[1], a)
    report = a.renew().report
    told = {site.site: site.refused for site in report.fleet.sites}
    assert told["b"] is None and report.classes == ("cat", "dog", "ship")
    assert "a and prompt cannot be merged: the one was learned by gapstream" in told["prompt"]
    assert "'a good photo of a {}.'" in told["prompt"] and "'a {}'" in told["prompt"]
    assert told["seed"].startswith("a and seed cannot be merged:") and "method.seed" in told["seed"]
    assert told["twin"].startswith("a and twin cannot be merged: both went on from one learner")
    assert all(words in caplog.text for words in told.values() if words)


def test_of_two_others_with_a_common_past_one_counts(sites, tmp_path):
    b = copied(sites[1], tmp_path / "b")
    deliver(sites[0], b, site="x")
    deliver(sites[0], b, site="y")
    told = {site.site: site.refused for site in b.renew().report.fleet.sites}
    assert told["x"] is None and told["y"].startswith("x and y cannot be merged: both went on from one learner")
    # as does a learner that was merged of one of them
    merge_states([sites[0].state, sites[1].state], tmp_path / "merged", settings())
    merged = SiteBench(tmp_path / "m", "m")
    shutil.rmtree(merged.state)
    shutil.copytree(tmp_path / "merged", merged.state, symlinks=True)
    merged = SiteBench(tmp_path / "m", "m")
    merged.begin(merged.store.current().path)
    merged.teach(THIRD)
    deliver(merged, b)
    told = {site.site: site.refused for site in b.renew().report.fleet.sites}
    assert told["m"] is not None and "both went on from one learner" in told["m"]


def test_a_damaged_file_or_a_failure_leaves_the_site_answering_alone(sites, tmp_path, monkeypatch):
    a = copied(sites[0], tmp_path / "a")
    deliver(sites[1], a)
    [file] = (a.state / "fleet").glob("b-*.blob")
    good = file.read_bytes()
    file.write_bytes(good[:-1] + b"!")
    told = a.renew().report
    assert "damaged" in told.fleet.sites[0].refused and set(told.classes) == {"ship", "cat"}
    file.write_bytes(good)
    a.trainer._read.clear()

    def fail(*_: object) -> None:
        raise torch.linalg.LinAlgError("not positive definite")

    with monkeypatch.context() as patched:
        patched.setattr("agent.methods.publishing.together", fail)
        told = a.renew().report
    assert "adding failed" in told.fleet.sites[0].refused and set(told.classes) == {"ship", "cat"}
    assert a.renew().report.fleet.sites[0].refused is None


def test_a_state_that_is_replaced_while_it_is_read_is_added_as_the_newer_one_is(sites, tmp_path, monkeypatch):
    a, real = copied(sites[0], tmp_path / "a"), FleetTrainer._judged
    deliver(sites[1], a)
    again = iter([True])

    def replaced_meanwhile(trainer: FleetTrainer, *arguments: Any) -> Any:
        if next(again, False):
            deliver(sites[1], a)
        return real(trainer, *arguments)

    monkeypatch.setattr(FleetTrainer, "_judged", replaced_meanwhile)
    report = a.renew().report
    assert [(one.site, one.sequence, one.refused) for one in report.fleet.sites] == [("b", 2, None)]
    assert report.classes == ("cat", "dog", "ship")


def test_a_forgotten_site_is_answered_without(sites, tmp_path):
    a = copied(sites[0], tmp_path / "a")
    deliver(sites[1], a)
    assert "dog" in a.renew().report.classes
    shutil.rmtree(a.state / "fleet")
    commit = a.renew()
    assert set(commit.report.classes) == {"ship", "cat"} and commit.report.fleet.sites == ()
    assert set(answers(a, images_of("ship", count=1))) == {"ship", "cat"}


def test_a_site_of_an_earlier_version_goes_on_with_what_it_held_back(tmp_path):
    # given a commit whose images that wait have no embeddings
    a = SiteBench(tmp_path, "a", evaluation={"holdout_fraction": 0})
    commit = a.teach([*images_of("ship", count=8), *images_of("cat", count=2)])
    kept = {key: tensor for key, tensor in load_file(commit.path / MEMBER).items() if key in ("features", "classes")}
    save_file(kept, commit.path / MEMBER)
    a.begin(commit.path)
    # when another image has to wait with them, and then they leave
    commit = a.teach(images_of("cat", count=1, start=2))
    held = load_file(commit.path / MEMBER)
    assert held["embeddings"].isfinite().all(1).tolist() == [False, False, True]
    commit = a.teach(images_of("cat", count=2, start=3))
    # then their class leaves, and the mean of its embeddings, which was counted from the first on, with it
    sent = load_file(commit.path / SHARED)
    assert sent["counts"].tolist() == [8, 5] and sent["embeddings"].any(1).all()


def test_what_is_held_back_is_in_the_commit_and_leaves_later_after_a_restart(tmp_path):
    a = SiteBench(tmp_path, "a", evaluation={"holdout_fraction": 0})
    commit = a.teach([*images_of("ship", count=8), *images_of("cat", count=3)])
    assert check(commit.path / SHARED).classes == ("ship",)
    assert load_file(commit.path / MEMBER)["classes"].tolist() == [1, 1, 1]
    a.begin(commit.path)
    commit = a.teach(images_of("cat", count=2, start=3))
    assert check(commit.path / SHARED).classes == ("ship", "cat")
    assert "classes" not in load_file(commit.path / MEMBER)
    learned, sent = load_file(commit.path / LEARNER_TENSORS), load_file(commit.path / SHARED)
    for key in ("counts", "means", "scatter"):
        torch.testing.assert_close(sent[key], learned[key], rtol=1e-4, atol=1e-4)


def test_a_report_of_a_fleet_comes_back_from_its_file(sites, tmp_path):
    b = copied(sites[1], tmp_path / "b")
    deliver(sites[0], b)
    report = b.renew().report
    report.write(tmp_path / REPORT)
    assert Report.read(tmp_path / REPORT) == report
