"""The log says everything once, what repeats without end a few times, and no credentials."""

import io
import logging
import time

import pytest

from agent import process
from agent.process import REPEATS, REPEATS_S, stderr_handler
from exporter.masking import masked


@pytest.fixture
def written():
    return io.StringIO()


@pytest.fixture
def log(written):
    logger, handler = logging.Logger("a log"), stderr_handler()
    handler.setStream(written)
    logger.addHandler(handler)
    return logger


def flood(log, lines):
    for number in range(lines):
        log.warning("invalid request %d", number)


def test_what_one_place_says_without_end_is_counted_instead(log, written, monkeypatch):
    # when
    flood(log, 1000)
    log.warning("something else")

    # then
    *lines, last, other = written.getvalue().splitlines()
    assert len(lines) == REPEATS - 1 and lines[3].endswith("WARNING a log: invalid request 3")
    assert "request 19 (more lines from the same place are left out for 60 s)" in last
    assert other.endswith("something else")

    # and when the minute is over
    now = time.monotonic()
    monkeypatch.setattr(process.time, "monotonic", lambda: now + REPEATS_S + 1)
    flood(log, 1)
    assert "request 0 (980 lines from the same place were left out)" in written.getvalue()


def test_what_just_fits_is_written_whole_and_nothing_is_said_later(log, written, monkeypatch):
    flood(log, REPEATS - 1)
    now = time.monotonic()
    monkeypatch.setattr(process.time, "monotonic", lambda: now + REPEATS_S + 1)
    flood(log, 1)
    assert written.getvalue().count("\n") == REPEATS and "left out" not in written.getvalue()


def test_who_asks_for_details_gets_all_of_them(log, written):
    for _ in range(1000):
        log.debug("a detail")
    assert written.getvalue().count("\n") == 1000


def test_a_traceback_tells_no_password(log, written):
    try:
        raise OSError("https://me:s3cret@images.example.com/a.jpg does not answer")
    except OSError:
        log.exception("asked %s", "https://me:s3cret@images.example.com/")
    assert "s3cret" not in written.getvalue()
    assert written.getvalue().count("https://***@images.example.com/") == 3  # the source line has it too


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:s3cret@host/a", "https://***@host/a"),
        ("http://s3cret@host:80", "http://***@host:80"),
        ("https://me:s3@cret@host/a@b", "https://***@host/a@b"),
        ("two: s3://a:s3cret@b/ ftp://c:s3cret@d", "two: s3://***@b/ ftp://***@d"),
        ("https://h/a?X-Amz-Credential=s3cret&X-Amz-Signature=s3cret&top=3", None),
        ("https://h/token?client_secret=s3cret&scope=a", "https://h/token?client_secret=***&scope=a"),
        ("https://h/a?sv=1&sig=s3cret%3D", "https://h/a?sv=1&sig=***"),
        ("mail me@example.com, https://h/a?signal=1", "mail me@example.com, https://h/a?signal=1"),
        ("file:///data/a@b/", "file:///data/a@b/"),
    ],
)
def test_credentials_inside_urls_are_masked_and_nothing_else(text, shown):
    assert "s3cret" not in masked(text)
    assert shown is None or masked(text) == shown
