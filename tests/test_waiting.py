"""Who is started together with a cluster waits for it, but neither for ever nor against a stop."""

import logging
import threading
import time

import pytest

from agent.commands import waiting
from agent.commands.waiting import when_there
from streams.source import NotThere, StreamError


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(waiting, "WAIT_S", 0.3)
    monkeypatch.setattr(waiting, "_PAUSE_S", 0.02)


def attempts(*outcomes):
    """An attempt that has these outcomes in turn, and the last one again and again."""
    left = list(outcomes)

    def attempt():
        outcome = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return attempt


def test_what_is_on_its_way_is_waited_for_and_the_log_says_so_once(caplog):
    away = NotThere("cannot connect to kafka:9092")
    with caplog.at_level(logging.WARNING):
        assert when_there(attempts(away, away, NotThere("no topic images"), "found"), threading.Event()) == "found"
    assert [record.getMessage().partition(".")[0] for record in caplog.records] == [
        "cannot connect to kafka:9092",
        "no topic images",
    ]


def test_what_does_not_come_is_an_error_after_a_while():
    began = time.monotonic()
    with pytest.raises(NotThere, match="no topic images"):
        when_there(attempts(NotThere("no topic images")), threading.Event())
    assert 0.3 <= time.monotonic() - began < 5


def test_what_waiting_does_not_mend_is_an_error_at_once(monkeypatch):
    monkeypatch.setattr(waiting, "WAIT_S", 1000)
    with pytest.raises(StreamError, match="password"):
        when_there(attempts(StreamError("the password was refused")), threading.Event())


def test_a_stop_ends_the_wait(monkeypatch):
    monkeypatch.setattr(waiting, "WAIT_S", 1000)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    assert when_there(attempts(NotThere("no topic images")), stop) is None
