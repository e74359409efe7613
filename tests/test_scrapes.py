"""An agent whose archive ended stays until its last values were read, where they are read regularly."""

import threading
import time
import urllib.request

from prometheus_client import CollectorRegistry, generate_latest

from agent.config import load
from agent.run import run_agent
from exporter.metrics import Metrics
from exporter.scrapes import LONGEST_S, Scrapes
from tests.fakes import FAKE_LEARNER
from tests.processes import free_port
from tests.test_archive import images, unpacked


class Clock:
    """A clock that moves when it is told to, and a little whenever it is asked."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def waited(reads: list[float], then: float, during: dict[int, str] | None = None, step_s: float = 1) -> float:
    """How long is waited `then`, after reads at `reads`; `during` says what happens in which step."""
    clock, registry, stop = Clock(), CollectorRegistry(), threading.Event()
    scrapes = Scrapes(registry, clock)
    began = clock.now
    for at in reads:
        clock.now = began + at
        generate_latest(registry)
    clock.now = began + then
    steps: list[int] = []

    def on_wait() -> None:
        steps.append(len(steps))
        clock.now += step_s
        if steps[-1] in (during or {}):
            generate_latest(registry) if during[steps[-1]] == "read" else stop.set()

    scrapes.wait_for_next(stop, on_wait)
    return round(clock.now - began - then)


def test_the_next_scrape_is_waited_for_and_no_longer():
    assert waited([0, 15, 30], then=35, during={3: "read"}) == 5
    assert waited([0, 15, 30], then=34, step_s=3) == 21, "half an interval late is given up"


def test_nothing_is_waited_for_where_nobody_reads_regularly():
    assert waited([], then=5) == 0
    assert waited([0], then=5) == 0
    assert waited([0, 2], then=300) == 0, "somebody looked twice, long ago"


def test_the_wait_has_a_bound_and_ends_when_the_agent_is_told_to_stop():
    assert waited([0, 600], then=600, step_s=10) == LONGEST_S
    assert waited([0, 60], then=60, during={2: "stop"}) == 3


def test_the_last_values_of_an_archive_are_read_before_its_agent_is_gone(tmp_path):
    # given an agent that learns an archive, and somebody who reads its metrics twice a second
    archive = unpacked(tmp_path / "archive", images(count=10))
    port = free_port()
    settings = {
        "state.path": tmp_path / "state", "source.archive.path": archive, "source.archive.rate": 20, "http.port": port,
    }  # fmt: skip
    answers: list[str] = []
    gone = threading.Event()

    def read() -> None:
        while not gone.wait(0.6):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                    answers.append(answer.read().decode())
            except OSError:
                pass

    reader = threading.Thread(target=read)
    reader.start()

    # when the archive ends
    began = time.monotonic()
    commit = run_agent(load(None, {}, settings), threading.Event(), learner=FAKE_LEARNER)
    took_s = time.monotonic() - began
    gone.set()
    reader.join()

    # then what was read last says so, and is of the last commit
    assert took_s < 30
    assert 'gapstream_state{gapstream_state="ended"} 1.0' in answers[-1]
    assert f"gapstream_commit_number {commit.number:.1f}" in answers[-1]


def test_an_agent_that_is_told_to_stop_has_not_ended(tmp_path):
    archive = unpacked(tmp_path / "archive", images(count=10))
    settings = {"state.path": tmp_path / "state", "source.archive.path": archive, "http.port": 0}
    seen: list[Metrics] = []

    def kept(registry: CollectorRegistry) -> Metrics:
        seen.append(Metrics(registry))
        return seen[-1]

    stop = threading.Event()
    stop.set()
    run_agent(load(None, {}, settings), stop, kept, FAKE_LEARNER)
    assert seen[0].status()["state"] == "draining"
