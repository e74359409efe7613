"""The status page and the report in a real browser."""

import json
import time

import pytest
from prometheus_client import CollectorRegistry

from agent.commands.report import write_report
from agent.scoring.report import Report
from agent.values import Commit, Progress
from exporter.http import StatusServer
from exporter.metrics import Metrics
from streams.record import Partition, Raw, Reason, Record, Rejected
from tests.bad_images import encoded, picture
from tests.browser import browser
from tests.test_report import made_up_state

PARTITION = Partition("birds", 0)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def metrics():
    return Metrics(CollectorRegistry())


@pytest.fixture
def server(metrics, tab):
    server = StatusServer("127.0.0.1", 0, CollectorRegistry(), list, list, metrics.status, pictures=metrics.pictures)
    server.start()
    yield server
    tab.open("about:blank")  # so that no page asks a server that is gone and complains in the next test
    tab.errors.clear()
    server.stop()


def commit(path, number):
    history = [
        {
            "task": task, "classes": ["<b>wren</b>"], "accuracy": 0.9, "zero_shot": 0.5, "predict_before_learn": 0.4,
            "gap": {"drift": {"after": 0.1, "budget": 0.25}}, "seconds": {"train": 2.0, "evaluate": 1.0},
        }
        for task in range(1, number + 1)
    ]  # fmt: skip
    history[0]["adaptation"] = {"kept": False, "epochs": 0, "drift": 0.3, "budget": 0.25, "images": 30}
    matrix = [[0.9 if other <= task else None for other in range(number)] for task in range(number)]
    scores = {"task": number, "test_images": 1234, "last": 0.9, "zero_shot": 0.5, "gap": history[-1]["gap"]}
    report = Report.from_json({**scores, "matrix": matrix, "history": history})
    return Commit(number, path, {PARTITION: 7}, "f", ("<b>wren</b>",), number, {}, report, None)


def text(tab, id):
    return tab.evaluate(f"document.getElementById('{id}').innerText")


def test_the_status_page_shows_what_happens_and_follows_a_commit(tab, metrics, server, tmp_path):
    # given an agent that has learned nothing yet
    metrics.consumed(Record(PARTITION, 0, "wren", b"x" * 300), time.time())
    metrics.consumed(Rejected(PARTITION, 1, Reason.TRUNCATED, "<i>ends</i> after 12 bytes"), time.time())
    metrics.cut("samples", 486, 2)
    metrics.progressed(Progress("train", 1, 1, 2, 3, 4, 100, 1.25, 0.05, 0.25))
    tab.size(1200, 900)
    tab.open(f"http://127.0.0.1:{server.port}/")

    # then the page shows the update and the rejected record, as text
    tab.wait("document.getElementById('headline').innerText === 'Learning'")
    assert "Nothing is learned yet" in text(tab, "lead")
    assert "epoch 1 of 2, step 3 of 4, loss 1.250" in text(tab, "update-note")
    assert "5.0 % of at most 25.0 %" in text(tab, "budget-note")
    assert "<i>ends</i> after 12 bytes" in text(tab, "rejected")
    assert tab.evaluate("document.getElementById('charts').hidden")

    # when two updates are committed
    for number in (1, 2):
        metrics.restored(commit(tmp_path, number))
        tab.wait(f"document.querySelectorAll('#matrix rect').length === {number * (number + 1) // 2}")

    # then accuracy, charts and counts are those of the last
    assert text(tab, "accuracy-now").startswith("90.0 %")
    assert "all classes, 1\u202f234 held-back images" in text(tab, "accuracy-now")
    assert "2 tasks learned, commit 2 is current" in text(tab, "lead")
    assert text(tab, "adaptation") == "Task 1 adapted: undone, no epochs, 120 % of the gap budget."
    assert tab.evaluate("document.querySelectorAll('#accuracy path').length") == 3
    assert tab.errors == []


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_rejected_records_are_pictured_where_something_can_be_seen(tab, metrics, server, tmp_path, width, dark):
    # given an image without a label, one that ends early, and what is none
    cut = encoded(picture(size=(200, 300)), "JPEG")[:9000]
    for offset, (reason, data) in enumerate(
        [
            (Reason.MISSING_LABEL, encoded(picture(size=(300, 200)), "PNG")),
            (Reason.TRUNCATED, cut),
            (Reason.UNSUPPORTED_FORMAT, b"<!DOCTYPE html>"),
        ]
    ):
        metrics.consumed(Rejected(PARTITION, offset, reason, "x" * 300, Raw(None, data)), time.time())

    # when
    tab.size(width, 900, dark)
    tab.open(f"http://127.0.0.1:{server.port}/")
    tab.wait("document.querySelectorAll('#rejected img').length === 2")

    # then each is beside its reason, small, and nothing runs over the edge
    rows = "[...document.querySelectorAll('#rejected li')]"
    reasons = tab.evaluate(f"{rows}.map(row => row.querySelector('b').innerText)")
    sizes = tab.evaluate(f"{rows}.map(row => row.querySelector('img')?.naturalHeight ?? 0)")
    assert list(zip(reasons, sizes, strict=True)) == [
        ("unsupported format", 0),
        ("truncated", 96),
        ("missing label", 64),
    ]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.errors == []


def test_the_status_page_says_where_readers_are_held(tab, metrics, server, tmp_path):
    held = [1]
    metrics.readers(lambda: held[0])
    metrics.restored(commit(tmp_path, 2))
    tab.open(f"http://127.0.0.1:{server.port}/")
    tab.wait("document.getElementById('readers').innerText.startsWith('Readers are held at the release of commit 1.')")
    held[0] = None
    tab.wait("document.getElementById('readers').hidden")
    assert tab.errors == []


def test_the_status_page_says_when_the_agent_is_gone(tab, metrics, server):
    tab.open(f"http://127.0.0.1:{server.port}/")
    tab.wait("document.getElementById('headline').innerText === 'Starting'")
    server.stop()
    tab.wait("document.getElementById('headline').innerText === 'The agent does not answer'")
    tab.errors.clear()


@pytest.mark.parametrize("tasks", [1, 5, 60])
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_the_report_is_drawn_without_complaint_and_fits_its_width(tab, tmp_path, tasks, width, dark):
    write_report(made_up_state(tmp_path, tasks=tasks), tmp_path / "report.html")
    tab.size(width, 900, dark)
    tab.open((tmp_path / "report.html").as_uri())
    tab.wait("document.querySelectorAll('#seconds rect').length > 0")
    assert tab.evaluate("document.querySelectorAll('#matrix rect').length") == tasks * (tasks + 1) // 2
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.errors == []


def test_a_gap_that_never_drifts_is_a_line_at_the_bottom_of_a_small_scale(tab, tmp_path):
    still = {"drift": {"before": 0.0, "after": 0.0, "budget": None}}
    state = made_up_state(tmp_path, tasks=2, gap=still)
    report = state / "CURRENT" / "report.json"
    values = json.loads(report.read_text())
    report.write_text(json.dumps(values | {"history": [entry | {"gap": still} for entry in values["history"]]}))
    write_report(state, tmp_path / "report.html")
    tab.size(1200, 900)
    tab.open((tmp_path / "report.html").as_uri())
    tab.wait("document.querySelectorAll('#drift circle').length === 2")
    texts = tab.evaluate("[...document.querySelectorAll('#drift text')].map(text => text.textContent)")
    assert texts == ["0 %", "5 %", "10 %", "1", "2", "drift"]
    assert tab.errors == []
