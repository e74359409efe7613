import base64
import io
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from agent.config import Evaluation
from agent.methods.base import InferenceModule, TaskData
from agent.scoring.evaluator import Evaluator
from agent.scoring.formulas import backward_transfer, forgetting
from agent.scoring.holdout import HoldOut
from agent.scoring.report import Drift, Gap, GapChange, OldClasses, Probe, Report
from agent.values import GapStatistics, Progress, Update
from exporter.decoders import Decoders
from exporter.preprocess import Preprocess, decode
from streams.record import Reason, Unusable

COLOURS = {
    "red": (250, 5, 5),
    "green": (5, 250, 5),
    "blue": (5, 5, 250),
    "lime": (120, 250, 5),
    "yellow": (250, 250, 5),
}


def image(name: str, number: int = 0) -> bytes:
    """A PNG of one colour; every number gives other bytes."""
    out = io.BytesIO()
    picture = Image.new("RGB", (5, 5), COLOURS[name])
    picture.putpixel((number % 5, number // 5 % 5), (number % 256, 0, 0))
    picture.save(out, "PNG")
    return out.getvalue()


def direction(*colour: float) -> Tensor:
    return F.normalize(torch.tensor(colour), dim=-1)


def right_names() -> dict[str, Tensor]:
    return {name: direction(*(float(value) for value in colour)) for name, colour in COLOURS.items()}


class FakeClip:
    """Embeds an image as its mean colour. It takes `lime` for a blue thing, and knows the other names."""

    def __init__(self) -> None:
        self.preprocess = Preprocess(size=5, mean=(0, 0, 0), std=(1, 1, 1))
        self.device = torch.device("cpu")
        self.embed_dim = 3
        self.logit_scale = 20.0
        self.encoded = self.embedded = 0
        self.towers = torch.zeros(1)
        self.names = {**right_names(), "lime": direction(0.0, 0.1, 0.9)}

    def prefix(self, images: Tensor) -> Tensor:
        self.encoded += len(images)
        return images.flatten(2).transpose(1, 2)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        return F.normalize(tokens.mean(1), dim=-1)

    def encode_names(self, names: Sequence[str]) -> Tensor:
        return torch.stack([self.names[name] for name in names])


class FakeModule(InferenceModule):
    def __init__(self, clip: FakeClip, rows: dict[str, Tensor]) -> None:
        super().__init__()
        self.clip, self.classes, self.rows = clip, tuple(rows), torch.stack(list(rows.values()))
        self.towers = clip.towers.clone()

    parts = ("embedding",)

    def encoder(self, part: str) -> dict[str, Tensor]:
        return {"towers": self.towers}

    def encode(self, tokens: Tensor, parts: Collection[str]) -> dict[str, Tensor]:
        self.clip.embedded += len(tokens)
        return {"embedding": self.clip.encode_tokens(tokens)}

    def answer(self, encoded: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        embedding = encoded["embedding"]
        logits = 50 * embedding @ self.rows.T
        return embedding, logits, logits.softmax(-1)


class FakeMethod:
    """Knows the classes it is told, by the row it is told."""

    def __init__(self, clip: FakeClip) -> None:
        self.clip = clip
        self.rows: dict[str, Tensor] = {}
        self.names = dict(clip.names)
        self.asked: list[str] = []

    def text_module(self) -> nn.Module:
        return nn.ParameterList([torch.stack(list(self.names.values()))])

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.rows)

    def encode_names(self, names: Sequence[str]) -> Tensor:
        self.asked += names
        return torch.stack([self.names[name] for name in names])

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        return self.clip.encode_tokens(tokens)


@dataclass(frozen=True)
class FakeFile:
    name: str
    data: bytes

    def read(self) -> bytes:
        if not self.data:
            raise Unusable(Reason.FETCH_FAILED, "the entry is damaged")
        return self.data


@dataclass(frozen=True)
class FakeSample:
    label: str
    data: bytes

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True)
class HeldSample:
    """Waits in a file until its task is committed."""

    label: str
    file: Path

    def read(self) -> bytes:
        return self.file.read_bytes()


class FakeFolder:
    def __init__(self, **images: list[bytes]) -> None:
        self._images = images

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._images)

    def images(self, class_name: str, limit: int = 0) -> list[FakeFile]:
        files = [FakeFile(f"{i}.png", data) for i, data in enumerate(self._images[class_name])]
        return files[:limit] if limit else files


DECODERS = Decoders(100, workers=1)


class FakeTokens:
    def __init__(self, clip: FakeClip, images: list[bytes]) -> None:
        self._tokens = clip.prefix(torch.from_numpy(clip.preprocess.batch([decode(data, 100) for data in images])))

    def __len__(self) -> int:
        return len(self._tokens)

    def batch(self, index: Tensor) -> Tensor:
        return self._tokens[index]


def task(clip: FakeClip, number: int, labels: list[str]) -> TaskData:
    classes = tuple(dict.fromkeys(labels))
    tokens = FakeTokens(clip, [image(name, 100 + i) for i, name in enumerate(labels)] or [image("red")])
    return TaskData(number, classes, torch.tensor([classes.index(name) for name in labels], dtype=torch.int64), tokens)


def update(**changes: Any) -> Update:
    gap = GapStatistics(positive=0.5, negative=None, centroid=0.7)
    values: dict[str, Any] = {
        "epochs": 1, "epochs_run": 2, "steps": 3, "samples": 4, "loss": math.nan, "rolled_back": True,
        "gap_before": gap, "gap_after": GapStatistics(0.6, 0.1, 0.8), "gap_untouched": gap,
        "drift_before": None, "drift_after": 0.05, "budget": 0.1,
        "seconds": {"train": 1.5}, "details": {"fusion": "faithful", "drifts": [math.inf]},
    }  # fmt: skip
    return Update(**(values | changes))


def nothing(_: Progress) -> None: ...


def released(method: FakeMethod) -> InferenceModule | None:
    return FakeModule(method.clip, method.rows) if method.rows else None


def evaluator(clip: FakeClip, test: FakeFolder | None = None, cache_bytes: int = 2**20, **options: Any) -> Evaluator:
    settings = Evaluation(batch_size=3, **{k: v for k, v in options.items() if k.endswith("per_class")})
    holdout = options.get("holdout", HoldOut(0, 0))
    return Evaluator(
        clip, settings, holdout, test=test, probe=options.get("probe"), decoders=DECODERS, cache_bytes=cache_bytes
    )  # type: ignore[arg-type]


def learn(
    scorer: Evaluator, method: FakeMethod, data: TaskData, rows: dict[str, Tensor], parent: Report | None
) -> Report:
    before = scorer.before(method, released(method), data, nothing)
    method.rows = method.rows | rows
    return scorer.after(method, released(method), data, update(), before, parent, nothing)


def read_again(report: Report) -> Report:
    return Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False)))


def timeless(report: Report) -> dict[str, Any]:
    content = report.to_json()
    for scores in (content, *content["history"]):
        scores.pop("seconds")
    return content


def two_tasks(cache_bytes: int = 2**20) -> tuple[FakeClip, list[Report]]:
    """Task 1 learns red and lime perfectly; task 2 brings green and blue and makes lime (half the time wrong) worse."""
    clip = FakeClip()
    method = FakeMethod(clip)
    folder = FakeFolder(**{name: [image(name, i) for i in range(4)] for name in ("red", "lime", "green", "blue")})
    scorer = evaluator(clip, folder, cache_bytes)
    right = right_names()
    first = learn(
        scorer, method, task(clip, 1, ["red"] * 3 + ["lime"] * 2), {"red": right["red"], "lime": right["lime"]}, None
    )
    rows = {"green": right["green"], "blue": right["blue"], "lime": right["yellow"], "red": right["lime"]}
    second = learn(scorer, method, task(clip, 2, ["green", "lime", "blue"]), rows, read_again(first))
    return clip, [first, second]


def test_the_report_scores_every_seen_class_beside_the_untouched_model() -> None:
    # given a model that answers red and lime rightly where the untouched one takes every lime for red
    _, [first, second] = two_tasks()

    # then after the first task
    assert first.classes == ("red", "lime")
    assert first.accuracy == first.last == first.avg == 1.0
    assert first.zero_shot == 0.5
    assert first.matrix == ((1.0,),)
    assert first.forgetting is first.backward_transfer is None
    assert first.samples == 5
    assert first.test_images == 8

    # and after the second, which ruins red and lime, of which lime came back
    assert second.matrix == ((1.0, None), (0.0, 1.0))
    assert second.accuracy == second.last == 0.5
    assert second.avg == 0.75
    assert second.forgetting == 1.0
    assert second.backward_transfer == -1.0
    assert second.zero_shot == 0.75
    assert second.old_classes == OldClasses(before=1.0, after=0.0)
    assert [entry.new_classes for entry in second.history] == [("red", "lime"), ("green", "blue")]
    assert [entry.classes for entry in second.history] == [("red", "lime"), ("green", "lime", "blue")]
    assert [entry.accuracy for entry in second.history] == [1.0, 0.5]


def test_the_report_has_what_the_update_says_and_no_number_that_json_lacks() -> None:
    _, [first, _] = two_tasks()

    first = read_again(first)
    assert first.gap == Gap(
        positive=GapChange(before=0.5, after=0.6, untouched=0.5),
        negative=GapChange(before=None, after=0.1, untouched=None),
        centroid=GapChange(before=0.7, after=0.8, untouched=0.7),
        drift=Drift(before=None, after=0.05, budget=0.1),
    )
    [entry] = first.history
    assert (entry.loss, entry.epochs, entry.rolled_back) == (None, 1, True)
    assert entry.details == {"fusion": "faithful", "drifts": [None]}
    assert first.seconds["train"] == 1.5
    assert first.seconds["evaluate"] > 0


def test_before_the_first_task_its_names_are_answered_zero_shot() -> None:
    _, [first, _] = two_tasks()
    # three red samples are right; the two limes are taken for red
    assert first.predict_before_learn == pytest.approx(3 / 5)


def test_new_names_are_told_from_seen_classes_by_text_and_seen_classes_by_the_method() -> None:
    # given a method that tells lime from red, whose names the text towers confuse
    clip, right = FakeClip(), right_names()
    method = FakeMethod(clip)
    method.rows = {"red": right["red"], "lime": right["lime"]}

    # when a task brings known and new names
    before = evaluator(clip).before(method, released(method), task(clip, 2, ["blue", "lime", "red", "red"]), nothing)

    # then lime (the text says: a seen class, red; the method says: lime), red and blue are all right
    assert before.accuracy == 1.0


def test_images_are_encoded_once_within_the_memory_bound_and_the_bound_changes_no_number() -> None:
    kept, reports = two_tasks()
    again, without = two_tasks(cache_bytes=0)

    for one, other in zip(reports, without, strict=True):
        assert timeless(one) == timeless(other)
    assert kept.encoded == 16 + 8, "16 test images and the 8 training samples"
    assert again.encoded > kept.encoded


def test_a_long_stream_keeps_its_newest_rows_and_the_metrics_of_the_whole_matrix(monkeypatch) -> None:
    # given six tasks whose accuracies go up and down, and a report that keeps three rows
    monkeypatch.setattr("agent.scoring.evaluator.MATRIX_ROWS", 3)
    clip, right = FakeClip(), right_names()
    names = list(right)[:4]
    wrong = direction(0.0, 0.0, -1.0)
    method, parent, full, changed = FakeMethod(clip), None, [], False
    scorer = evaluator(clip, FakeFolder(**{name: [image(name, i) for i in range(4)] for name in names}))
    for number, forgotten in enumerate([(), (), (0,), (1,), (0, 1), ()], 1):
        labels = [names[number - 1]] if number <= len(names) else [names[0]]
        rows = {name: right[name] for name in names[:number]} | {names[i]: wrong for i in forgotten}
        parent = learn(scorer, method, task(clip, number, labels), rows, parent)
        full = [[*old, None] for old in full] + [parent.matrix[-1]]
        # then the numbers are the formulas' over all rows
        for key, formula in (("forgetting", forgetting), ("backward_transfer", backward_transfer)):
            assert getattr(parent, key) == (None if number == 1 else pytest.approx(formula(full)))
        changed = changed or bool(parent.forgetting)
    assert [bool(row) for row in parent.matrix] == [False] * 3 + [True] * 3
    assert changed, "the example must forget something"


def test_a_report_that_leaves_out_old_tasks_has_the_scores_of_one_that_keeps_all(monkeypatch) -> None:
    # given twelve tasks, most of which bring a class that came before, and a report that tells all of two
    def stream(newest: int) -> list[Report]:
        monkeypatch.setattr("agent.scoring.evaluator.HISTORY", newest)
        clip, right = FakeClip(), right_names()
        names = list(right)[:3]
        method, reports = FakeMethod(clip), [None]
        scorer = evaluator(clip, FakeFolder(**{name: [image(name, i) for i in range(4)] for name in names}))
        for number in range(1, 13):
            came = names[: 1 + number // 5]
            rows = {name: right[name] for name in came} | ({names[0]: -right[names[0]]} if number in (6, 7, 12) else {})
            reports.append(learn(scorer, method, task(clip, number, [came[-1]]), rows, reports[-1]))
        return reports[1:]

    whole, short = stream(100), stream(2)

    # then what comes of all of them is the same at every task
    for one, other in zip(whole, short, strict=True):
        for name in ("accuracy", "last", "forgetting", "backward_transfer", "old_classes", "classes", "examples"):
            assert getattr(one, name) == getattr(other, name)
        assert other.avg == pytest.approx(one.avg)
        rows = [row for row in other.matrix if row]
        assert {len(row) for row in rows} == {len(other.history)} == {len(other.first)} == {len(other.best)}
    # and the tasks that brought a class are there, with the newest two
    assert [entry.task for entry in short[-1].history] == [1, 5, 10, 11, 12]
    assert (short[-1].earlier.tasks, short[-1].earlier.scored) == (7, 7) and whole[-1].earlier is None


def test_retention_compares_zero_shot_on_the_probe_with_the_untouched_model() -> None:
    # given a probe of which the untouched model knows two of three classes, and an update that loses one of the two
    clip, right = FakeClip(), right_names()
    method = FakeMethod(clip)
    probe = FakeFolder(**{name: [image(name, i) for i in range(6)] for name in ("green", "blue", "lime")})
    scorer = evaluator(clip, FakeFolder(), probe=probe, probe_per_class=4)
    data = task(clip, 1, ["red"])
    before = scorer.before(method, released(method), data, nothing)
    method.rows = {"red": right["red"]}
    method.names["blue"] = direction(1.0, 0.0, 0.0)
    method.names["lime"] = direction(0.0, 0.0, -1.0)

    report = scorer.after(method, released(method), data, update(), before, None, nothing)

    assert report.probe == Probe(
        of="probe", images=12, classes=3, untouched=pytest.approx(2 / 3), now=pytest.approx(1 / 3)
    )
    assert report.retention == pytest.approx(0.5)


def test_without_a_probe_the_test_classes_not_learned_yet_stand_in_for_it_and_are_decoded_once() -> None:
    # given a test folder of three classes, one learned after the other
    clip, right = FakeClip(), right_names()
    method = FakeMethod(clip)
    names = ("red", "green", "blue")
    scorer = evaluator(clip, FakeFolder(**{name: [image(name, i) for i in range(6)] for name in names}))
    parent, probes = None, []
    for number, name in enumerate(names, 1):
        parent = learn(scorer, method, task(clip, number, [name]), {name: right[name]}, parent)
        probes.append(parent.probe)
    # then the classes to come are scored as long as there are two
    assert [probe and (probe.of, probe.classes) for probe in probes] == [("not learned yet", 2), None, None]
    assert parent is not None and parent.retention is None and parent.history[0].retention is not None
    # and each test image was encoded once, beside the three training samples
    assert parent.test_images == 18
    assert clip.encoded <= 18 + 2 * 3


def test_hold_out_and_test_images_are_scored_together_and_what_cannot_be_decoded_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # given a hold-out with one good image and a test folder with two broken ones, its class in another spelling
    clip, right = FakeClip(), right_names()
    holdout = HoldOut(0.999, 1)
    samples = [FakeSample("red", image("red", i)) for i in range(2)]
    assert sorted(holdout.split(samples)) == ["hold", "train"]
    folder = FakeFolder(Red=[image("red", 7), b"not an image", image("red", 8), b""])
    scorer = evaluator(clip, folder, holdout=holdout)

    report = learn(scorer, FakeMethod(clip), task(clip, 1, ["red"]), {"red": right["red"]}, None)

    assert report.test_images == 3
    assert report.held_out == 1
    assert report.accuracy == 1.0
    assert "Red/1.png of 'red' is left out" in caplog.text
    assert "Red/3.png of 'red' is left out" in caplog.text


def test_hold_out_of_earlier_tasks_is_read_again_from_the_commit(tmp_path: Path) -> None:
    # given an evaluator that keeps no tokens, and a first task whose samples are gone after its commit
    clip, right = FakeClip(), right_names()
    method = FakeMethod(clip)
    holdout = HoldOut(0.999, 2)
    scorer = evaluator(clip, cache_bytes=0, holdout=holdout)
    samples = [HeldSample("red", tmp_path / f"{i}.png") for i in range(3)]
    for i, sample in enumerate(samples):
        sample.file.write_bytes(image("red", i))
    holdout.split(samples)
    first = learn(scorer, method, task(clip, 1, ["red"]), {"red": right["red"]}, None)
    staging, commit = tmp_path / "000001.staging", tmp_path / "000001"
    staging.mkdir()
    holdout.write(staging, None)
    staging.rename(commit)
    holdout.moved(commit)
    for sample in samples:
        sample.file.unlink()

    # when the next task is scored
    holdout.split([])
    second = learn(scorer, method, task(clip, 2, ["green"]), {"green": right["green"]}, first)

    # then the first one's hold-out is scored and shown
    assert second.matrix == ((1.0, None), (1.0, None))
    assert [example.label for example in second.examples] == ["red", "red"]


def test_without_test_images_and_without_anything_learned_the_scores_are_null() -> None:
    clip = FakeClip()
    method = FakeMethod(clip)
    scorer = evaluator(clip)
    data = task(clip, 1, [])

    before = scorer.before(method, released(method), data, nothing)
    report = scorer.after(method, released(method), data, None, before, None, nothing)

    for key in ("accuracy", "avg", "last", "forgetting", "zero_shot", "predict_before_learn", "retention", "probe"):
        assert getattr(report, key) is None
    assert report.matrix == ((None,),)
    assert report.gap.drift == Drift(before=None, after=None, budget=None)
    assert report.history[0].epochs == 0


def test_examples_are_few_spread_over_classes_and_show_what_changed() -> None:
    _, [first, second] = two_tasks()

    # one class after the other, as far as there are images; lime, whose answer changed, has its turn like red
    assert [example.label for example in first.examples[:4]] == ["lime", "red", "lime", "red"]
    [example] = first.examples[:1]
    assert example.task == 1
    assert [name for name, _ in example.before] == ["red", "lime"]
    assert example.after[0][0] == "lime"
    assert example.untouched[0][0] == "red"
    kind, _, data = example.image.partition(",")
    assert kind == "data:image/jpeg;base64"
    assert decode(base64.b64decode(data), 10_000).size == (5, 5)

    assert len(second.examples) == 12
    assert Counter(example.label for example in second.examples) == {"red": 3, "lime": 3, "green": 3, "blue": 3}
    assert {example.label: example.task for example in second.examples} == {
        "red": 1, "lime": 1, "green": 2, "blue": 2,
    }  # fmt: skip
    assert all(len(example.after) == 3 for example in second.examples)


def test_a_restarted_evaluator_continues_the_report_as_the_undisturbed_one() -> None:
    # given the report of a first task, and a new process that finds it
    _, [first, second] = two_tasks()
    clip, right = FakeClip(), right_names()
    method = FakeMethod(clip)
    method.rows = {"red": right["red"], "lime": right["lime"]}
    folder = FakeFolder(**{name: [image(name, i) for i in range(4)] for name in ("red", "lime", "green", "blue")})
    rows = {"green": right["green"], "blue": right["blue"], "lime": right["yellow"], "red": right["lime"]}

    resumed = learn(evaluator(clip, folder), method, task(clip, 2, ["green", "lime", "blue"]), rows, first)

    for key in ("matrix", "accuracy", "zero_shot", "predict_before_learn", "forgetting", "examples", "old_classes"):
        assert getattr(resumed, key) == getattr(second, key), key
