"""`gapstream merge` from folders to a folder: what is in it, how an agent goes on from it, and what is refused."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agent.cli import main
from agent.commands.doctor import examine
from agent.commands.merge import merge_states
from agent.commands.report import write_report
from agent.commits import CommitStore, Provenance, StateError
from agent.config import Config, load
from agent.layout import COMMITS, HOLDOUT, LEARNER_TENSORS, MANIFEST, REPORT, current_commit
from agent.methods.merging import MergeError
from agent.pipeline import Pipeline, resume
from agent.scoring.report import Report
from agent.trainer import LearnerError, Trainer
from exporter.onnx import OnnxExporter
from exporter.release import ReleaseError
from exporter.runtime import Classifier
from streams.buffer import CutRule
from streams.record import Record
from streams.source import PositionError
from tests.fakes import LIST, InlineWorker, ListSource, pipeline, records
from tests.test_continued import MADE
from tests.test_trainer import Bench, images_of, unreleased

KEYS = {
    "model.threads": 1,
    "method.gapstream.features": 64,
    "release.text": "false",
    "release.max_batch": 4,
    "evaluation.holdout_fraction": 0.2,
}


def settings(**keys: object) -> Config:
    return load(None, {}, {key: str(value) for key, value in KEYS.items()} | {k: str(v) for k, v in keys.items()})


def taught(folder: Path, *tasks: list[tuple[str, bytes]], **sections: object) -> Bench:
    """A state folder that has learned."""
    chosen = {name: section.model_dump() for name, section in settings() if name in ("model", "method", "evaluation")}
    bench = Bench(folder, **(chosen | sections))
    learner = unreleased(Trainer(bench.config, None))
    for images in tasks:
        bench.learn(learner, bench.task(images))
    return bench


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two state folders with a class in common, and one that learned everything."""
    folder = tmp_path_factory.mktemp("sites")
    a = [images_of("ship", "cat"), images_of("cat", count=6, start=40)]
    b = [images_of("dog", "cat", start=16)]
    for name, tasks in (("a", a), ("b", b), ("both", a + b)):
        taught(folder / name, *tasks)
    return {name: folder / name / "state" for name in ("a", "b", "both")}


@pytest.fixture(scope="module")
def merged(sites, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "state"
    keys = [word for key, value in KEYS.items() for word in ("--set", f"{key}={value}")]
    assert main(["merge", str(sites["a"]), str(sites["b"]), "--out", str(out), *keys]) == 0
    return out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No release is made, which would take ten seconds."""

    def refuse(*_: object) -> None:
        raise ReleaseError("not in this test")

    monkeypatch.setattr(OnnxExporter, "release", refuse)


def test_the_folder_has_a_verified_commit_of_a_learner_that_saw_both_streams(sites, merged):
    commit, both = (CommitStore(state, 1).verified() for state in (merged, sites["both"]))
    assert (commit.number, commit.tasks, commit.classes) == (1, 1, ("cat", "dog", "ship"))
    assert (commit.seen, commit.offsets, commit.fingerprint, commit.totals) == (commit.classes, {}, "", {})
    tensors, expected = (load_file(one.path / LEARNER_TENSORS) for one in (commit, both))
    rows = [both.classes.index(name) for name in commit.classes]
    assert torch.equal(tensors["counts"], expected["counts"][rows])
    torch.testing.assert_close(tensors["means"], expected["means"][rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tensors["scatter"], expected["scatter"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(tensors["names"], expected["names"][rows], rtol=1e-4, atol=1e-5)


def test_its_release_was_checked_and_answers(merged):
    classifier = Classifier(merged)
    assert classifier.release.classes == ("cat", "dog", "ship") and classifier.release.parity.top1 == 1
    [[_, image]] = images_of("ship", count=1, start=100)
    [prediction] = classifier.classify([image])
    assert prediction.labels[0] == "ship"


def test_the_report_says_what_came_from_where_and_is_scored_on_what_was_held_back(sites, merged, tmp_path):
    report = Report.read(merged / "CURRENT" / REPORT)
    counts = {name: Report.read(sites[name] / "CURRENT" / REPORT) for name in ("a", "b")}
    one, other = report.merged.of
    assert [one.state, other.state] == [str(sites["a"]), str(sites["b"])]
    assert (one.commit, other.commit) == (2, 1)
    assert list(one.images) == ["ship", "cat"] and list(other.images) == ["dog", "cat"]
    learned = sum(entry.samples for source in counts.values() for entry in source.history)
    assert sum(one.images.values()) + sum(other.images.values()) == report.samples == learned
    assert report.held_out == report.test_images == sum(source.held_out for source in counts.values()) > 0
    assert report.last is not None and report.history[0].new_classes == ("cat", "dog", "ship")
    write_report(merged, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "3 classes merged from 2 learners" in page and str(sites["b"]) in page


def test_the_merged_folders_stay_as_they_are_while_their_agents_run(sites, tmp_path, quick):
    # given folders that agents have locked
    states = [sites["a"], sites["b"]]
    running = [CommitStore(state, 3) for state in states]
    for store in running:
        store.lock()
    before = [(path, path.lstat().st_mtime_ns) for state in states for path in sorted(state.rglob("*"))]

    merge_states(states, tmp_path / "out", settings())

    for store in running:
        store.close()
    assert before == [(path, path.lstat().st_mtime_ns) for state in states for path in sorted(state.rglob("*"))]


def test_doctor_finds_an_agent_ready_to_go_on_from_it(merged):
    found = list(examine(settings(**{"state.path": merged, "http.enabled": "false"})))
    assert {finding.level for finding in found} <= {"ok", "warning"}, found


def continued(state: Path, source: ListSource) -> Pipeline:
    """An agent on a state folder, with the real trainer in this process."""
    config = settings(**{"state.path": state})
    return pipeline(
        state, source, InlineWorker(config, "agent.trainer:Trainer"), rule=CutRule(samples=16), config=config
    )


def test_an_agent_on_it_begins_its_own_stream_and_knows_what_was_merged(merged, tmp_path, quick):
    # given a copy of the merged folder, and a stream that none of the learners knew
    state = tmp_path / "state"
    shutil.copytree(merged, state, symlinks=True)
    stream = [Record(LIST, at, label, image) for at, (label, image) in enumerate(images_of("frog", "cat", start=60))]

    # when it is learned, in two runs
    agent = continued(state, ListSource(stream[:16], fingerprint="new"))
    agent.run()
    agent.commits.close()
    again = continued(state, ListSource(stream, fingerprint="new"))
    commit = again.run()
    again.commits.close()

    # then its commits are of this stream, and follow the merge
    assert (commit.number, commit.tasks, commit.fingerprint, commit.offsets) == (3, 3, "new", {LIST: len(stream)})
    assert commit.classes == ("cat", "dog", "ship", "frog")
    before, report = Report.read(merged / "CURRENT" / REPORT), commit.report
    assert report.merged == before.merged and report.began == before.began
    assert [entry.task for entry in report.history] == [1, 2, 3] and report.history[1].new_classes == ("frog",)
    assert report.held_out > before.held_out and report.matrix[2][0] is not None
    # and from here on another stream is refused as ever
    store = CommitStore(state, 3)
    with pytest.raises(PositionError, match="was learned from another stream"):
        resume(store, ListSource([], fingerprint="other"))


class FromTheNewest(ListSource):
    """A live stream that begins at its newest record."""

    def seek(self, offsets, epochs=None):
        super().seek(offsets or {LIST: len(self.items)})


def test_where_an_agent_on_it_begins_a_live_stream_is_committed_first_with_all_that_was_merged(merged, tmp_path):
    state = tmp_path / "state"
    shutil.copytree(merged, state, symlinks=True)
    agent = continued(state, FromTheNewest(records("old"), live=True, fingerprint="live"))
    agent.stop.set()
    commit = agent.run()
    agent.commits.close()
    assert (commit.number, commit.fingerprint, commit.offsets, commit.tasks) == (2, "live", {LIST: 1}, 1)
    assert commit.classes == ("cat", "dog", "ship") and commit.report.merged and commit.release


def test_merging_merged_learners_is_merging_all_at_once(sites, merged, tmp_path, quick):
    third = taught(tmp_path / "c", images_of("frog", start=30)).config.state.path
    config = settings()
    at_once = merge_states([third, sites["b"], sites["a"]], tmp_path / "at once", config)
    in_turn = merge_states([merged, third], tmp_path / "in turn", config)
    assert at_once.classes == in_turn.classes == ("cat", "dog", "frog", "ship")
    one, other = (load_file(commit.path / LEARNER_TENSORS) for commit in (at_once, in_turn))
    assert torch.equal(one["counts"], other["counts"])
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-4, atol=1e-4, msg=key)
    assert at_once.report.last == in_turn.report.last and at_once.report.held_out == in_turn.report.held_out
    assert [origin.state for origin in in_turn.report.merged.of[0].merged.of] == [str(sites["a"]), str(sites["b"])]


def test_a_report_of_a_merge_of_merged_learners_comes_back_from_its_file(merged, tmp_path):
    report = Report.read(merged / "CURRENT" / REPORT)
    report.write(tmp_path / REPORT)
    assert Report.read(tmp_path / REPORT) == report


def test_the_same_learner_is_refused_under_every_name(sites, merged, tmp_path):
    copy, link = tmp_path / "copy", tmp_path / "link"
    shutil.copytree(sites["a"], copy, symlinks=True)
    link.symlink_to(sites["a"])
    for states, message in (
        ([sites["a"], sites["a"]], "named twice, so its images would count twice"),
        ([sites["a"], link], r"a/state and .*link have learned in part the same"),
        ([sites["a"], copy], r"a/state and .*copy have learned in part the same"),
        ([sites["b"], sites["a"], merged], r"b/state and .*merged.* have learned in part the same"),
    ):
        with pytest.raises(StateError, match=message):
            merge_states(states, tmp_path / "out", settings())
    assert not (tmp_path / "out").exists()


def test_learners_that_went_on_from_one_are_refused(merged, tmp_path, quick):
    states = [tmp_path / name for name in ("left", "right")]
    for start, state in zip((60, 80), states, strict=True):
        shutil.copytree(merged, state, symlinks=True)
        stream = [Record(LIST, at, *pair) for at, pair in enumerate(images_of("frog", count=8, start=start))]
        agent = continued(state, ListSource(stream, fingerprint=f"{start}"))
        agent.run()
        agent.commits.close()
    with pytest.raises(StateError, match=r"left and .*right have learned in part the same.* both went on from one"):
        merge_states(states, tmp_path / "out", settings())


def test_learners_of_one_stream_are_merged_with_a_warning(sites, tmp_path, quick, caplog):
    # the benches all say that their stream is `f`
    merge_states([sites["a"], sites["b"]], tmp_path / "out", settings())
    assert "learned from the same stream: an image that both learned counts twice" in caplog.text


def test_other_settings_are_refused_naming_both_sides(sites, tmp_path):
    prompt = taught(tmp_path / "prompt", images_of("frog", count=4), model={"prompt": "a {}", "threads": 1})
    seed = taught(tmp_path / "seed", images_of("frog", count=4), method={"seed": 1, "gapstream": {"features": 64}})
    means = taught(tmp_path / "means", images_of("frog", count=4), method={"name": "ncm"})
    for other, message in (
        (prompt, r"a/state and .*prompt/state cannot be merged: .*'a good photo of a {}\.'.*'a {}'"),
        (seed, r"a/state and .*seed/state cannot be merged: .* another method\.seed"),
        (means, r"a/state and .*means/state cannot be merged: .* learned by gapstream .* by ncm"),
    ):
        with pytest.raises(MergeError, match=message):
            merge_states([sites["a"], other.config.state.path], tmp_path / "out", settings())
    both = [sites["a"], sites["b"]]
    cure = "Nothing was made: give the command the configuration that its agent has"
    with pytest.raises(LearnerError, match=rf"a/state was learned by .* the configuration says .*'one {{}}'.*{cure}"):
        merge_states(both, tmp_path / "out", settings(**{"model.prompt": "one {}"}))
    with pytest.raises(LearnerError, match=rf"a/state was learned with other settings .* 32 features\)\. {cure}"):
        merge_states(both, tmp_path / "out", settings(**{"method.gapstream.features": 32}))
    assert not (tmp_path / "out").exists()


def test_damage_and_other_versions_are_refused_and_say_so(sites, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(sites["b"], copy, symlinks=True)
    tensors = current_commit(copy) / LEARNER_TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"!")
    with pytest.raises(StateError, match=r"commit 000001 is damaged \(learner\.safetensors"):
        merge_states([sites["a"], copy], tmp_path / "out", settings())
    monkeypatch.setattr("agent.commits.FORMAT", 2)
    with pytest.raises(StateError, match="has format 1, this version of gapstream reads 2"):
        merge_states([sites["a"], sites["b"]], tmp_path / "out", settings())


def test_a_damaged_hold_out_pack_costs_no_more_than_itself(sites, tmp_path, quick):
    copy = tmp_path / "copy"
    shutil.copytree(sites["b"], copy, symlinks=True)
    [pack] = (current_commit(copy) / HOLDOUT).glob("0*.zip")
    pack.write_bytes(b"broken")
    report = merge_states([sites["a"], copy], tmp_path / "out", settings()).report
    assert report.held_out == Report.read(sites["a"] / "CURRENT" / REPORT).held_out


def test_folders_without_a_learner_or_with_something_in_the_way_are_refused(sites, tmp_path):
    a, b = sites["a"], sites["b"]
    empty = CommitStore(tmp_path / "empty", 1)
    empty.lock()
    empty.carry({LIST: 3}, 0, Provenance("f", (), {}, {}))
    (tmp_path / "file").touch()
    for states, out, message in (
        ([a], "out", "alone is merged already; name two state folders or more"),
        ([a, tmp_path / "nowhere"], "out", "nowhere is no folder; expected the state folder of an agent"),
        ([a, tmp_path / "file"], "out", "file is no folder"),
        ([a, tmp_path / "empty"], "out", r"nothing is learned in .*empty yet"),
        ([a, b], "file", "file exists and is not empty"),
        ([a, b], "empty", "empty exists and is not empty"),
    ):
        with pytest.raises(StateError, match=message):
            merge_states(states, tmp_path / out, settings())


def test_a_merge_that_was_killed_is_made_anew_in_its_folder(sites, tmp_path, quick):
    (tmp_path / "out" / COMMITS / "000001.staging").mkdir(parents=True)
    (tmp_path / "out" / COMMITS / "000001.staging" / "half").touch()
    commit = merge_states([sites["a"], sites["b"]], tmp_path / "out", settings())
    assert not (commit.path / "half").exists() and commit.number == 1
    config = json.loads((commit.path / MANIFEST).read_text())["config"]
    assert config["state"]["path"] == str(tmp_path / "out")


def test_a_commit_that_is_replaced_while_it_is_read_is_told_from_damage(sites, tmp_path, monkeypatch):
    def replaced(store: CommitStore) -> None:
        (sites["b"] / "CURRENT").replace(sites["b"] / "CURRENT.old")
        raise StateError("commit 000001 is damaged")

    monkeypatch.setattr(CommitStore, "verified", replaced)
    try:
        with pytest.raises(StateError, match="made a commit while the one before was read; try again"):
            merge_states([sites["b"], sites["a"]], tmp_path / "out", settings())
    finally:
        (sites["b"] / "CURRENT.old").replace(sites["b"] / "CURRENT")


def test_a_commit_that_is_deleted_while_it_is_read_is_told_from_damage(sites, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(sites["b"], copy, symlinks=True)
    monkeypatch.setattr("agent.trainer.HoldOut.join", lambda *_: shutil.rmtree(copy / COMMITS))
    with pytest.raises(StateError, match=r"000001 was deleted by the agent that runs there before it was read"):
        merge_states([sites["a"], copy], tmp_path / "out", settings())


@pytest.mark.parametrize("method", [{"name": "ncm"}, {"name": "ranpac", "ranpac": {"features": 32}}])
def test_learners_of_other_methods_that_add_up_are_merged_by_the_same_command(tmp_path, quick, method):
    states = [
        taught(tmp_path / name, images_of(name, "cat", start=start), method=method).config.state.path
        for start, name in ((0, "ship"), (20, "dog"))
    ]
    keys = {"method.name": method["name"], "method.ranpac.features": 32}
    commit = merge_states(states, tmp_path / "out", settings(**keys))
    assert commit.classes == ("cat", "dog", "ship") and commit.report.last is not None
    counted = [set(origin.images.values()) == {None} for origin in commit.report.merged.of]
    assert counted == [method["name"] == "ranpac"] * 2 and not commit.report.merged.averaged


def test_learners_that_train_become_an_average_which_is_said_wherever_it_is_told(tmp_path, quick, capsys):
    # given two state folders of a method that trains
    method = {"name": "mgclip", "mgclip": {"visual_epochs": 1}}
    states = [
        taught(tmp_path / name, images_of(name, "cat", start=start), method=method).config.state.path
        for start, name in ((0, "ship"), (20, "dog"))
    ]
    keys = {**KEYS, "method.name": "mgclip"}

    # when
    words = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    assert main(["merge", *map(str, states), "--out", str(tmp_path / "out"), *words]) == 0

    # then the tensors are the mean, weighted by images
    report = Report.read(tmp_path / "out" / "CURRENT" / REPORT)
    one, other = (sum(origin.images.values()) for origin in report.merged.of)
    assert one + other == report.samples and one > 0 < other
    tensors, *of = (load_file(current_commit(state) / LEARNER_TENSORS) for state in (tmp_path / "out", *states))
    for key in tensors.keys() - {"rows"}:
        mean = (one * of[0][key] + other * of[1][key]) / (one + other)
        torch.testing.assert_close(tensors[key], mean, rtol=1e-4, atol=1e-6)
    # and terminal, report and page say what it is
    printed = capsys.readouterr().out
    assert "mgclip trains, so this is an average, not what one learner of all streams would be" in printed
    assert printed.count("averaged") == 2
    assert report.merged.averaged and report.merged.adapted and report.last is not None
    write_report(tmp_path / "out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "this is inexact, an average, not what one learner" in page and "was added up" not in page
    # and learners that would answer in another way are refused before anything is made
    method["mgclip"] = {"fusion": "faithful"}
    faithful = taught(tmp_path / "faithful", images_of("frog", "cat", start=40), method=method).config.state.path
    with pytest.raises(MergeError, match=r"ship/state and .*faithful/state .* fusion 'calibrated' .* 'faithful'"):
        merge_states([states[0], faithful], tmp_path / "none", settings(**{"method.name": "mgclip"}))
    assert not (tmp_path / "none").exists()


def test_learners_that_have_trained_nothing_are_not_taken_for_one(tmp_path, quick):
    # given learners of a single class each, which has nothing to be told apart from: their tensors are the same
    states = [
        taught(tmp_path / name, images_of(name), method={"name": "finetune"}).config.state.path
        for name in ("dog", "ship")
    ]
    one, other = (load_file(current_commit(state) / LEARNER_TENSORS) for state in states)
    assert all(torch.equal(one[key], other[key]) for key in one)
    # then they are merged, and a copy is refused all the same
    config = settings(**{"method.name": "finetune"})
    commit = merge_states(states, tmp_path / "out", config)
    assert commit.classes == ("dog", "ship") and commit.report.merged.averaged and not commit.report.merged.adapted
    shutil.copytree(states[0], tmp_path / "copy", symlinks=True)
    with pytest.raises(StateError, match="have learned in part the same"):
        merge_states([states[0], tmp_path / "copy"], tmp_path / "none", config)


def test_a_folder_of_an_older_version_is_merged(sites, tmp_path, quick):
    with zipfile.ZipFile(MADE) as made:
        made.extractall(tmp_path / "old")
    (tmp_path / "old" / "CURRENT").symlink_to("commits/000002")
    old = CommitStore(tmp_path / "old", 1).verified()
    commit = merge_states([tmp_path / "old", sites["a"]], tmp_path / "out", settings())
    assert set(commit.classes) == {*old.classes, "cat", "ship"}


def copied(folder: Path, start: int, *names: str) -> Path:
    """A folder of photographs for an agent to learn."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for number, (_, image) in enumerate(images_of(name, count=12, start=start)):
            (folder / name / f"{number}.png").write_bytes(image)
    return folder


@pytest.mark.slow
def test_two_agents_learn_apart_and_a_third_goes_on_from_both_by_commands_alone(tmp_path):
    a, b, out = (tmp_path / name for name in ("a", "b", "out"))
    keys = [word for key, value in {**KEYS, "http.enabled": "false"}.items() for word in ("--set", f"{key}={value}")]

    def run(state: Path, photographs: Path) -> None:
        where = ["--set", f"state.path={state}", "--set", f"source.archive.path={photographs}"]
        assert main(["run", *where, *keys]) == 0

    run(a, copied(tmp_path / "first", 0, "cat", "ship"))
    run(b, copied(tmp_path / "second", 20, "cat", "dog"))
    assert main(["merge", str(a), str(b), "--out", str(out), *keys]) == 0
    run(out, copied(tmp_path / "third", 40, "frog", "ship"))

    assert Classifier(out).release.classes == ("cat", "dog", "ship", "frog")
    report = Report.read(out / "CURRENT" / REPORT)
    assert [entry.new_classes for entry in report.history] == [("cat", "dog", "ship"), ("frog",)]
    assert len(report.merged.of) == 2 and report.last is not None
