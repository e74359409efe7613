"""The trainer on the bundled model and stream: what a task becomes, what a broken image costs, what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from agent.commits import CommitStore, Provenance
from agent.config import Config
from agent.layout import LEARNER_TENSORS, LEARNER_VALUES
from agent.methods.base import TaskData
from agent.scoring.report import Report
from agent.trainer import LearnerError, Trainer
from agent.values import Commit, Outcome, Progress
from agent.worker import TaskFault
from exporter.release import ReleaseError
from exporter.runtime import Classifier
from streams.archive_folder import ArchiveFolder
from streams.buffer import Task
from streams.record import Partition, Reason, Record
from streams.spool import Spool
from tests.bad_images import TOO_SLOW, bad_images, good_images, slow_image

SAMPLE = Partition("sample", 0)
FACTS = Provenance("f", (), {}, {})


MGCLIP = {"name": "mgclip"}
"""It has all phases of an update."""


class Bench:
    """A state folder, a spool, and tasks from images."""

    def __init__(self, folder: Path, **settings: object) -> None:
        evaluation = {"holdout_fraction": 0.2, "test_archive": "bundled", "test_per_class": 5, "probe_per_class": 5}
        base = {"state": {"path": folder / "state"}, "evaluation": evaluation, "release": {"max_batch": 4}}
        self.config = Config.model_validate(base | {"method": MGCLIP} | settings)
        self.store = CommitStore(folder / "state", 3)
        self.store.lock()
        self.spool = Spool(folder / "state" / "spool", 2**28)
        self.offset = 0
        self.tasks = 0

    def task(self, images: Sequence[tuple[str, bytes]]) -> Task:
        samples = []
        for label, image in images:
            samples.append(self.spool.append(Record(SAMPLE, self.offset, label, image)))
            self.offset += 1
        self.spool.end_segment()
        self.tasks += 1
        classes = tuple(dict.fromkeys(label for label, _ in images))
        size = sum(len(image) for _, image in images)
        return Task(self.tasks, classes, tuple(samples), {SAMPLE: self.offset}, "end", size, len(samples), {})

    def learn(self, learner: Trainer, task: Task, seen: list[Progress] | None = None) -> tuple[Outcome, Commit]:
        on_progress = (lambda progress: None) if seen is None else seen.append
        outcome = learner.learn(task, self.store.stage(), on_progress)
        return outcome, self.store.commit(outcome, FACTS)


def unreleased(learner: Trainer) -> Trainer:
    """The same without the first release of a process, which takes most of such a test's time."""

    def refuse(*parts: object) -> None:
        raise ReleaseError("not in this test")

    learner._exporter.release = refuse  # type: ignore[method-assign, assignment]
    return learner


def images_of(*classes: str, count: int = 16, start: int = 0) -> list[tuple[str, bytes]]:
    archive = ArchiveFolder("bundled", "train")
    by_class = [[(name, e.read()) for e in archive.images(name)[start : start + count]] for name in classes]
    return [pair for turn in zip(*by_class, strict=True) for pair in turn]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Two tasks learned one after the other."""
    bench = Bench(tmp_path_factory.mktemp("learned"))
    learner = Trainer(bench.config, None)
    seen: list[Progress] = []
    tasks = [bench.task(images_of(*names)) for names in (("cat", "ship"), ("dog", "truck"))]
    steps = [bench.learn(learner, task, seen) for task in tasks]
    return bench, steps, seen


def test_an_update_passes_its_phases_in_order(learned):
    _, _, seen = learned
    phases = list(dict.fromkeys((progress.task, progress.phase) for progress in seen))
    order = ["decode", "evaluate", "train", "compensate", "export", "commit"]
    assert [phase for task, phase in phases if task == 1] == order
    training = [progress for progress in seen if progress.phase == "train"]
    assert all(p.loss is not None and p.drift is not None and p.budget is not None for p in training)


def test_the_report_has_what_it_promises(learned):
    _, steps, _ = learned
    report = json.loads((steps[1][1].path / "report.json").read_text())
    promised = (
        "task classes samples matrix avg last forgetting backward_transfer zero_shot predict_before_learn retention "
        "gap seconds model method fusion seed versions release history examples"
    )
    assert set(promised.split()) <= report.keys()
    assert report["classes"] == ["cat", "ship", "dog", "truck"]
    assert report["probe"]["of"] == "not learned yet" and report["retention"] > 0 and report["fusion"] == "calibrated"
    assert [len(row) for row in report["matrix"]] == [2, 2] and report["matrix"][0][1] is None
    assert 0 <= report["last"] <= 1 and 0 <= report["zero_shot"] <= 1
    for part in ("positive", "negative", "drift", "centroid"):
        assert {"before", "after"} <= report["gap"][part].keys()


def test_the_commit_holds_a_release_that_answers_without_torch_and_says_what_it_is(learned):
    _, steps, _ = learned
    commit = steps[1][1]
    facts = json.loads((commit.path / "release" / "release.json").read_text())
    assert facts["classes"] == ["cat", "ship", "dog", "truck"]
    [label, image] = images_of("ship", count=1, start=100)[0]
    [prediction] = Classifier(commit.path / "release").classify([image])
    assert prediction.labels[0] == label


@pytest.mark.parametrize(("never", "chance"), [("horse", 0.2), ("frog", 0.2)])
def test_photographs_of_a_class_never_learned_are_found_by_its_name(learned, never, chance):
    _, steps, _ = learned
    classifier = Classifier(steps[1][1].path / "release")
    images = {name: [image for _, image in images_of(name, count=40)] for name in (never, "ship", "truck")}
    first = {
        name: [prediction.labels[0] for prediction in classifier.classify(shown, 1, extra=[never])]
        for name, shown in images.items()
    }
    assert first[never].count(never) > 2.5 * chance * 40
    # and the learned ones stay what they are
    assert all(first[name].count(never) < chance * 40 for name in ("ship", "truck"))


def test_without_a_text_part_nothing_else_changes(learned, tmp_path):
    bench = Bench(tmp_path, release={"text": False, "max_batch": 4})
    _, commit = bench.learn(Trainer(bench.config, None), bench.task(images_of("cat", "ship")))
    assert {path.name for path in commit.release.iterdir()} == {"model.onnx", "golden.npz", "release.json"}
    whole = learned[1][0][1].release
    assert (commit.release / "model.onnx").read_bytes() == (whole / "model.onnx").read_bytes()


def test_training_samples_are_not_in_the_commit_and_held_out_ones_are_never_trained_on(learned):
    _, steps, _ = learned
    outcome = steps[0][0]
    trained, held = outcome.report.samples, outcome.report.held_out
    assert held > 0 and trained + held == 32
    # then nothing of the training images is on disk once the spool lets go of them
    image = images_of("cat", count=1)[0][1]
    held_images = b"".join(path.read_bytes() for path in (steps[0][1].path / "holdout").glob("0*.zip"))
    everything = b"".join(path.read_bytes() for path in steps[1][1].path.rglob("*") if path.is_file())
    assert (image in everything) == (image in held_images)


def test_a_new_trainer_on_the_commit_ends_with_the_same_bits(learned, tmp_path):
    _, steps, _ = learned
    # given the same stream, with the trainer replaced after the first task
    bench = Bench(tmp_path)
    first = bench.learn(unreleased(Trainer(bench.config, None)), bench.task(images_of("cat", "ship")))[1]
    again = unreleased(Trainer(bench.config, first.path))
    second = bench.learn(again, bench.task(images_of("dog", "truck")))[1]
    # then learner and scores are those of the undisturbed run
    assert (second.path / "learner.safetensors").read_bytes() == (steps[1][1].path / "learner.safetensors").read_bytes()
    undisturbed = steps[1][0].report
    report = Report.read(second.path / "report.json")
    assert (report.matrix, report.avg, report.gap) == (undisturbed.matrix, undisturbed.avg, undisturbed.gap)


def test_a_method_that_crops_reads_the_very_images_it_trains_on_again_and_repeats_bit_by_bit(tmp_path, monkeypatch):
    published = {"preset": "paper", "epochs": 1, "batch_size": 8, "lr": 1e-4}
    images = images_of("cat", "ship")
    images.insert(3, ("cat", b"broken"))
    saved = []
    for name in ("a", "b"):
        bench = Bench(tmp_path / name, method={"name": "vrlwf", "vrlwf": published})
        learner = unreleased(Trainer(bench.config, None))
        given: list[TaskData] = []
        update = learner._method.update
        monkeypatch.setattr(
            learner._method, "update", lambda task, heard, u=update, g=given: (g.append(task), u(task, heard))[1]
        )
        _, commit = bench.learn(learner, bench.task(images))
        saved.append((commit.path / "learner.safetensors").read_bytes())
    # with held-out and broken images left out, each is still the one of its label
    [task] = given
    label = {image: name for name, image in images}
    assert [label[read()] for read in task.cropped._read] == [task.classes[i] for i in task.labels]
    assert saved[0] == saved[1]


def test_broken_images_are_set_aside_with_their_reason_and_the_rest_is_learned(tmp_path):
    broken = [image for image in bad_images() if image.stage == "decode"]
    fine = good_images()
    assert broken and fine
    bench = Bench(tmp_path, evaluation={"holdout_fraction": 0})
    images = [("odd", image.data) for image in (*broken, *fine)] + images_of("cat", count=4)
    outcome, _ = bench.learn(unreleased(Trainer(bench.config, None)), bench.task(images))
    assert [(late.offset, late.reason) for late in outcome.rejected] == [(i, b.reason) for i, b in enumerate(broken)]
    assert outcome.report.samples == len(fine) + 4
    assert outcome.classes == ("odd", "cat")


def test_an_image_that_outlasts_its_limits_is_rejected_alone(tmp_path, monkeypatch):
    # given an image that takes longer to decode, among others
    monkeypatch.setattr("exporter.decoder.CPU_S", 0.1)
    monkeypatch.setattr("exporter.decoder.CPU_S_PER_PIXEL", 0.0)
    monkeypatch.setattr("exporter.decoder.WALL_TIMES", 100)  # whatever else the machine has to do
    bench = Bench(tmp_path)
    good = images_of("cat", "ship", count=4)

    # when the task is learned
    outcome, _ = bench.learn(
        unreleased(Trainer(bench.config, None)), bench.task([*good[:4], ("cat", slow_image(TOO_SLOW)), *good[4:]])
    )

    # then it is set aside, and the others are not
    [rejected] = outcome.rejected
    assert rejected.offset == 4 and rejected.reason == Reason.BOMB and "processor time" in rejected.detail


def test_a_task_of_nothing_but_broken_images_commits_its_offsets_and_releases_nothing(tmp_path):
    bench = Bench(tmp_path)
    outcome, commit = bench.learn(Trainer(bench.config, None), bench.task([("odd", b"\xff\xd8\xff not an image")] * 3))
    assert outcome.update is None and outcome.classes == () and "nothing was learned" in outcome.release_refused
    assert {late.reason for late in outcome.rejected} <= {Reason.UNDECODABLE, Reason.TRUNCATED}
    assert commit.offsets == {SAMPLE: 3} and commit.release is None
    # and the next one continues from there
    assert bench.learn(Trainer(bench.config, commit.path), bench.task(images_of("cat", "ship", count=4)))[1].release


def breaking(error: Exception):
    def update(task, on_progress):
        raise error

    return update


@pytest.mark.parametrize("error", [ValueError("nan"), IndexError("3"), torch.linalg.LinAlgError("singular")])
def test_values_that_cannot_be_learned_blame_the_task(tmp_path, monkeypatch, error):
    bench = Bench(tmp_path)
    learner = Trainer(bench.config, None)
    monkeypatch.setattr(learner._method, "update", breaking(error))
    with pytest.raises(TaskFault) as fault:
        bench.learn(learner, bench.task(images_of("cat", count=4)))
    assert fault.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        OSError(28, "No space left on device"),
    ],
)
def test_memory_gpu_and_disk_blame_no_task(tmp_path, monkeypatch, error):
    bench = Bench(tmp_path)
    learner = Trainer(bench.config, None)
    monkeypatch.setattr(learner._method, "update", breaking(error))
    with pytest.raises(type(error)) as raised:
        bench.learn(learner, bench.task(images_of("cat", count=4)))
    assert raised.value is error


def test_a_disk_that_is_full_when_the_learner_is_saved_blames_no_task(tmp_path, monkeypatch):
    bench = Bench(tmp_path)
    learner = unreleased(Trainer(bench.config, None))

    def full(tensors, path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("agent.trainer.save_file", full)
    with pytest.raises(SafetensorError):
        bench.learn(learner, bench.task(images_of("cat", count=4)))


def test_one_sample_of_a_name_never_seen_is_a_task(tmp_path):
    bench = Bench(tmp_path, evaluation={"holdout_fraction": 0.9})
    outcome, commit = bench.learn(Trainer(bench.config, None), bench.task([("zorblax 9", images_of("cat")[0][1])]))
    assert outcome.classes == ("zorblax 9",) and outcome.report.samples == 1 and commit.release is not None


def test_a_release_that_forgets_too_much_is_refused_and_the_one_before_serves_on(tmp_path, monkeypatch):
    bench = Bench(tmp_path, release={"max_old_class_drop": 0.05, "max_batch": 4})
    learner = Trainer(bench.config, None)
    _, first = bench.learn(learner, bench.task(images_of("cat", "ship")))
    # given an update that ruins the rows of the old classes
    update = learner._method.update

    def ruin(task, on_progress):
        done = update(task, on_progress)
        learner._method._visual.rows[:2] *= -10
        return done

    monkeypatch.setattr(learner._method, "update", ruin)
    outcome, commit = bench.learn(learner, bench.task(images_of("dog", "truck")))
    assert "fell from" in outcome.release_refused and "release.max_old_class_drop = 5.0%" in outcome.release_refused
    assert outcome.report.release.refused == outcome.release_refused
    # then the learner goes on, and readers keep the release before, with which the next one is compared
    assert bench.learn(learner, bench.task(images_of("frog", count=8)))[0].report.old_classes.before > 0.5
    assert commit.classes == ("cat", "ship", "dog", "truck")
    assert (commit.release / "model.onnx").read_bytes() == (first.release / "model.onnx").read_bytes()


def test_smaller_forms_are_scored_on_held_out_images_and_reported(tmp_path):
    bench = Bench(tmp_path, release={"precisions": ("int8",), "max_batch": 4})
    outcome, commit = bench.learn(Trainer(bench.config, None), bench.task(images_of("cat", "ship")))
    measured = outcome.report.release.variants["int8"]
    assert measured.parity.images == 4 and 0.5 < measured.accuracy_fp32 <= 1
    assert (commit.release / "model.int8.onnx").exists() == (measured.refused is None)


def test_tokens_beyond_the_memory_bound_go_to_disk_and_leave_nothing_behind(learned, tmp_path):
    bench = Bench(tmp_path, method=MGCLIP | {"cache_bytes": 0})
    _, commit = bench.learn(Trainer(bench.config, None), bench.task(images_of("cat", "ship")))
    expected = load_file(learned[1][0][1].path / "learner.safetensors")
    assert all(
        torch.equal(value, expected[key]) for key, value in load_file(commit.path / "learner.safetensors").items()
    )
    assert list((tmp_path / "state" / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"prompt": "a picture of a {}."}}, "a picture of a"),
        ({"method": {"name": "ncm"}}, "learned by mgclip"),
        ({"method": MGCLIP | {"lora": {"alpha": 2.0}}}, "alpha 1.*alpha 2"),
    ],
)
def test_a_checkpoint_of_another_model_or_method_is_refused(learned, change, said):
    bench, steps, _ = learned
    other = Config.model_validate(bench.config.model_dump() | change)
    with pytest.raises(LearnerError, match=rf"(?s){said}.*restore the configuration, or set state\.path"):
        Trainer(other, steps[1][1].path)


def test_a_checkpoint_whose_numbers_meant_something_else_in_the_version_before_is_refused(tmp_path):
    config = Config.model_validate({"method": {"name": "seca"}})
    learned_under = Trainer(config, None)._learned_under()
    save_file({}, tmp_path / LEARNER_TENSORS)
    (tmp_path / LEARNER_VALUES).write_text(json.dumps({**learned_under, "facts": {"classes": ["cat"], "learned": 1}}))
    with pytest.raises(
        LearnerError, match=r"format 1, but this version reads 2.*use the version that wrote it, or set"
    ):
        Trainer(config, tmp_path)


def test_a_checkpoint_of_the_same_method_with_other_sizes_is_refused(tmp_path):
    small = {"name": "gapstream", "gapstream": {"features": 32}}
    bench = Bench(tmp_path, method=small)
    _, commit = bench.learn(unreleased(Trainer(bench.config, None)), bench.task(images_of("cat", "ship")))
    other = Config.model_validate(bench.config.model_dump() | {"method": {"name": "gapstream"}})
    with pytest.raises(
        LearnerError, match=r"other settings below method\.gapstream .*\(.* 528 numbers .* 5000 features\).*restore"
    ):
        Trainer(other, commit.path)
