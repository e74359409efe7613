"""A short run of every part of the monkey; `make test-monkey` has long ones. A failing case says how to repeat it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SEED = os.environ.get("SEED", "1")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("part", "count"),
    [
        ("records", 3000),
        ("images", 1000),
        ("faults", 30),
        ("kills", 7),
        pytest.param("brokers", 30, marks=pytest.mark.slow),
    ],
)
def test_nothing_that_the_monkey_does_breaks_it(part: str, count: int) -> None:
    command = [sys.executable, "-m", f"tests.monkey.{part}", "--seed", SEED, "--count", str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)  # the figures, shown by `pytest -rP`
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
