import io
import socket
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from rich.console import Console

from agent.commands import demo
from agent.scoring.report import Adaptation, Report, TaskReport
from agent.sealing import seal
from agent.values import Commit, Outcome, Progress
from exporter.metrics import Metrics
from streams.record import Partition, Record
from tests.fakes import write_release


def entry(number, *classes, retention=None) -> TaskReport:
    scores = {"accuracy": 0.9, "zero_shot": 0.4, "predict_before_learn": 0.5, "retention": retention}
    return TaskReport(task=number, classes=classes, seconds={"train": 2.0}, epochs=1, **scores)


class ReportingLearner:
    """Learns nothing, and says it did, with every score a page shows."""

    def __init__(self, config, commit):
        self.report = Report(task=0, last=0.9, zero_shot=0.4, forgetting=0.05)

    def learn(self, task, staging, on_progress):
        classes = (*self.report.classes, *task.classes)
        history = (*self.report.history, entry(task.number, *task.classes))
        self.report = replace(self.report, task=task.number, classes=classes, history=history)
        on_progress(Progress("train", task.number, epoch=1, epochs=1, step=1, steps=1, loss=0.5))
        for name in ("learner.safetensors", "learner.json", "report.json"):
            self.report.write(staging / name)
        write_release(staging / "release", classes, "a model")
        return Outcome(task.number, task.next_offsets, staging, seal(staging), self.report, classes, None, None)


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=140)


def said(console) -> str:
    return console.file.getvalue()


def test_without_a_terminal_the_demo_says_every_phase_once_and_ends_with_table_report_and_images(tmp_path, console):
    code = demo.demo(tmp_path, console, "tests.test_demo:ReportingLearner")

    assert code == 0
    text = said(console)
    assert text.count("task 5 learned: accuracy 90.0 %") == 1
    assert "90.0 % over all 10 classes, +50.0 points against the untouched model; forgetting 5.0 %." in text
    assert "10 classes learned in 5 tasks" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "state/CURRENT/release/model.onnx").exists()
    assert len(list((tmp_path / "images").glob("*.jpg"))) == 10


def test_an_interrupted_demo_goes_on_and_a_finished_one_starts_anew(tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    assert demo.fresh(tmp_path) == state
    assert state.exists()

    (tmp_path / "report.html").touch()
    assert demo.fresh(tmp_path) == state
    assert not state.exists()


def test_a_taken_port_does_not_stop_the_demo(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert demo._free_port(port) != port


def test_the_live_view_shows_epoch_loss_budget_and_accuracy_so_far(tmp_path, console):
    metrics = Metrics(CollectorRegistry())
    metrics.consumed(Record(Partition("a", 0), 0, "cat", b"x"), 1.0)
    console.print(demo.live_view(metrics.status()))
    assert "1 records read" in said(console)

    adaptation = Adaptation(kept=True, epochs=1, drift=0.1, budget=0.25, images=30, gain=0.01, error=0.001)
    history = (replace(entry(1, "[wren]"), adaptation=adaptation),)
    report = Report(task=1, classes=("[wren]",), last=0.9, history=history)
    metrics.restored(Commit(1, tmp_path, {}, "f", ("[wren]",), 1, {}, report, None))
    metrics.progressed(Progress("train", 2, 1, 2, 3, 4, 300, 1.25, 0.05, 0.25))
    console.print(demo.live_view(metrics.status()))
    text = said(console)
    assert "epoch" in text and "1 of 2, step 3 of 4" in text
    assert "1.250" in text
    assert "20% of the drift budget used" in text
    assert "90.0 % over 1 classes so far" in text
    assert adaptation.words() in text
    assert "[wren]" in text  # a class name is text, not markup


def test_retention_has_a_column_where_it_was_measured():
    report = Report(task=1, history=(entry(1, "wren"),))
    assert "retention" not in [column.header for column in demo.tasks_table(report).columns]
    report = replace(report, history=(*report.history, entry(2, "owl", retention=0.98)))
    assert "retention" in [column.header for column in demo.tasks_table(report).columns]


def test_in_a_terminal_the_view_is_drawn_and_then_gone():
    metrics = Metrics(CollectorRegistry())
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with demo.watched(metrics.status, console):
        metrics.state("consuming")
    assert "gapstream demo" in said(console)
    assert said(console).endswith("\x1b[1A\x1b[2K")
