"""While a trainer spins in Python, the agent goes on polling, answering and listening to signals."""

import threading
import time
import urllib.request

import pytest
from prometheus_client import CollectorRegistry

from agent.config import Config
from agent.run import STALLED_S, _why_not_alive
from agent.worker import ProcessWorker
from exporter.http import StatusServer
from exporter.metrics import Metrics
from tests.fakes import FAKE_LEARNER, ListSource, pipeline, records


class TimedSource(ListSource):
    """Remembers when it was polled, and brings a record a poll."""

    def __init__(self, items) -> None:
        super().__init__(items, batch=1)
        self.polls: list[float] = []

    def poll(self, timeout_s):
        self.polls.append(time.monotonic())
        return super().poll(timeout_s)


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
def test_a_clock_that_is_set_makes_no_loop_dead(monkeypatch, jump_s):
    # given loops that turn
    metrics = Metrics(CollectorRegistry())
    for loop in ("pipeline", "http"):
        metrics.heartbeat(loop, time.time())

    # when the clock jumps by eleven days
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)

    # then both live, and a loop that hangs is found all the same
    assert _why_not_alive(metrics.status()) == []
    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + STALLED_S + 1)
    metrics.heartbeat("http", time.time())
    [reason] = _why_not_alive(metrics.status())
    assert "the pipeline loop was last seen 31 s ago" in reason


def test_an_agent_that_opens_its_parts_for_too_long_is_dead_too(monkeypatch):
    metrics = Metrics(CollectorRegistry())
    assert _why_not_alive(metrics.status()) == []
    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + STALLED_S + 1)
    assert len(_why_not_alive(metrics.status())) == 1


def test_polling_and_metrics_go_on_while_the_trainer_is_busy(tmp_path):
    # given an update that spins for three seconds, with an HTTP server beside it
    source = TimedSource(records("busy 3", "a", "b"))
    worker = ProcessWorker(Config(), FAKE_LEARNER)
    registry = CollectorRegistry()
    agent = pipeline(tmp_path, source, worker, poll_timeout_s=0.5)
    agent.metrics = Metrics(registry)
    server = StatusServer("127.0.0.1", 0, registry, lambda: [], lambda: [], agent.metrics.status)
    server.start()
    done = threading.Event()
    answers: list[tuple[float, str]] = []

    def scrape() -> None:
        while not done.is_set():
            started = time.monotonic()
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as answer:
                body = answer.read().decode()
            answers.append((time.monotonic() - started, body))
            done.wait(0.1)

    scraper = threading.Thread(target=scrape)
    scraper.start()

    # when
    started = time.monotonic()
    try:
        agent.run()
    finally:
        took_s = time.monotonic() - started
        done.set()
        scraper.join()
        server.stop()

    # then
    assert took_s > 3
    gaps = [after - before for before, after in zip(source.polls, source.polls[1:], strict=False)]
    assert max(gaps) < 1
    assert len(answers) > 10
    assert max(seconds for seconds, _ in answers) < 1
    assert any('gapstream_state{gapstream_state="training"} 1.0' in body for _, body in answers)
