"""The content of report.json: the same bytes whoever wrote them, and readable across versions."""

import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from agent.scoring.report import (
    Adaptation,
    Earlier,
    Example,
    Gap,
    GapChange,
    LearnerIdentity,
    ModelIdentity,
    OldClasses,
    Probe,
    ReleaseSummary,
    Report,
    TaskReport,
)
from exporter.release import Parity, Variant

BEFORE = Path(__file__).parent / "fixtures/state-before-the-move.zip"

PARITY = Parity(1e-7, 1e-6, 2e-6, 0.9999, 1.0, 64, (1, 3, 64), "CPUExecutionProvider")
LEARNER = LearnerIdentity(
    model=ModelIdentity(name="tinyclip", pretrained="bundled", sha256="5f2c", prompt="a photo of a {}."),
    method="gapstream", fusion="text+discriminant", device="cpu", versions={"torch": "2.15.0"},
)  # fmt: skip


def scored() -> Report:
    """A report as the evaluator gives it after a second task."""
    gap = Gap(positive=GapChange(before=0.1, after=0.2, untouched=0.1))
    history = (TaskReport(task=1, new_classes=("wren",)), TaskReport(task=2, classes=("ö",), new_classes=("ö",)))
    answer = (("wren", 0.75), ("ö", 0.25))
    return Report(
        task=2,
        gap=gap,
        seconds={"train": 1.0, "evaluate": 2.0},
        classes=("wren", "ö"),
        old_classes=OldClasses(before=0.5, after=0.25),
        matrix=((0.5, None), (0.25, 1.0)),
        first=(0.5, 1.0),
        best=(0.5, None),
        probe=Probe(of="probe", images=4, classes=2, untouched=0.5, now=0.25),
        history=history,
        examples=(Example(image="data:", label="ö", task=2, before=answer, after=answer, untouched=answer),),
    )


def written(report: Report) -> str:
    return json.dumps(report.to_json(), indent=1, allow_nan=False)


def test_reports_of_the_version_before_are_written_again_byte_for_byte():
    with zipfile.ZipFile(BEFORE) as state:
        names = [name for name in state.namelist() if name.endswith("report.json")]
        texts = [state.read(name).decode() for name in names]
    assert len(texts) >= 2
    assert [written(Report.from_json(json.loads(text))) for text in texts] == texts


@pytest.mark.parametrize(
    "release",
    [
        ReleaseSummary(refused="old classes fell"),
        ReleaseSummary(
            id="0123456789ab", parity=PARITY, seconds={"trace": 0.5},
            variants={"int8": Variant(PARITY, 0.1, 0.5, 0.75, None), "fp16": Variant(None, 0.1, None, None, "no")},
        ),
    ],
)  # fmt: skip
def test_a_report_comes_back_from_its_file_as_it_was(tmp_path, release):
    report = scored().completed(LEARNER, release, {"decode": 0.5})
    report.write(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json") == report


UNDONE = Adaptation(kept=False, epochs=0, drift=None, budget=0.25, images=30)
REFUSED = Adaptation(kept=False, epochs=1, drift=0.1, budget=0.25, images=30, gain=-0.0123, error=0.001)
KEPT = replace(REFUSED, kept=True, gain=0.0123)


@pytest.mark.parametrize(
    ("adaptation", "words"),
    [
        (UNDONE, "adapted: undone, no epoch"),
        (replace(UNDONE, drift=0.3), "adapted: undone, no epoch, 120 % of the gap budget"),
        (REFUSED, "adapted: refused, 1 epoch, 40 % of the gap budget, gain -0.0123 +- 0.0010 nats on 30 images"),
        (KEPT, "adapted: kept, 1 epoch, 40 % of the gap budget, gain +0.0123 +- 0.0010 nats on 30 images"),
    ],
)
def test_what_became_of_new_adapters_comes_back_from_the_file_and_is_said_in_a_line(tmp_path, adaptation, words):
    report = replace(scored(), history=(TaskReport(task=1, adaptation=adaptation),))
    report.write(tmp_path / "report.json")
    read = Report.read(tmp_path / "report.json")
    assert read == report and read.history[0].adaptation.words() == words


def test_what_is_known_only_after_the_scoring_is_noted_in_the_report_and_its_history():
    # given a report that nobody has completed
    report = scored()
    assert not {"release", "model", "released"} & (report.to_json().keys() | report.to_json()["history"][-1].keys())

    # when
    done = report.completed(LEARNER, ReleaseSummary(refused="parity"), {"decode": 0.5, "export": 3.0})

    # then phases and release are in both places, and the learner's keys are the report's own
    assert done.seconds == done.history[-1].seconds == {"train": 1.0, "evaluate": 2.0, "decode": 0.5, "export": 3.0}
    assert [task.released for task in done.history] == [None, False]
    content = done.to_json()
    assert list(content)[-7:] == ["model", "method", "fusion", "seed", "device", "versions", "release"]
    assert content["release"] == {"refused": "parity"}
    assert report == scored(), "the first one is as it was"


def test_keys_of_a_later_version_are_passed_over_and_missing_ones_have_their_defaults():
    content = scored().completed(LEARNER, ReleaseSummary(), {}).to_json()
    content |= {"calibration": 0.1, "gap": content["gap"] | {"curvature": 1}}
    content["history"][0] |= {"mood": "good"}
    for key in ("first", "best", "probe", "device", "release"):
        del content[key]
    report = Report.from_json(content)
    assert (report.first, report.best, report.probe, report.release) == ((), (), None, None)
    assert report.learner == replace(LEARNER, device="")
    assert report.gap == scored().gap


def test_old_tasks_are_left_out_but_for_those_that_brought_a_class_and_the_newest_release(tmp_path):
    # given ten tasks, of which the first and the third brought a class, and the fifth made the last release
    brought = {1: ("wren",), 3: ("owl",)}
    history = tuple(
        TaskReport(
            task=n, classes=("wren", "owl"), new_classes=brought.get(n, ()), accuracy=None if n == 2 else n / 10,
            released=n == 5, details={"long": [0] * 9},
        )
        for n in range(1, 11)
    )  # fmt: skip
    row = tuple(float(n) for n in range(1, 11))
    whole = Report(task=10, history=history, first=row, best=row, matrix=((),) * 8 + (row[:9], row))

    # when
    short = whole.shortened(3)

    # then
    assert [entry.task for entry in short.history] == [1, 3, 5, 8, 9, 10]
    assert short.first == short.best == short.matrix[-1] == (1, 3, 5, 8, 9, 10)
    assert short.matrix == ((), (), (), (), (1, 3, 5, 8, 9), (1, 3, 5, 8, 9, 10))
    assert short.earlier == Earlier(tasks=4, scored=3, accuracy=pytest.approx(0.4 + 0.6 + 0.7))
    # and what may be long is told of the newest alone
    assert [len(entry.classes) for entry in short.history] == [1, 1, 0, 2, 2, 2]
    assert [bool(entry.details) for entry in short.history] == [False] * 3 + [True] * 3
    # nothing changes a second time, nor where there is nothing old, and the file has it all
    assert short.shortened(3) == short and whole.shortened(10) == whole
    short.write(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json") == short
    assert "earlier" not in whole.to_json()


def test_a_number_that_json_lacks_is_written_as_null():
    task = TaskReport(task=1, loss=math.nan, details={"drifts": [math.inf, 0.5]})
    [entry] = Report(task=1, history=(task,)).to_json()["history"]
    assert (entry["loss"], entry["details"]) == (None, {"drifts": [None, 0.5]})


@pytest.mark.parametrize("content", [{}, [], {"task": 1, "gap": 3}, {"task": 1, "history": 7}])
def test_what_is_not_a_report_is_a_clear_error(content):
    with pytest.raises(ValueError, match="this is not a report"):
        Report.from_json(content)
