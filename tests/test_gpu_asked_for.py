"""`make test-gpu` fails where there is nothing to say: without a GPU, and without tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent


def asked(*more: str) -> subprocess.CompletedProcess[str]:
    """Run what the Makefile runs, where no GPU is to be seen."""
    recipe = (TOP / "Makefile").read_text(encoding="utf-8").partition("\ntest-gpu:")[2].splitlines()[1]
    _, program, *arguments = recipe.replace("/", " ", 1).split()
    command = [sys.executable, "-m", program, *arguments, "-p", "no:cacheprovider", *more]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    return subprocess.run(command, cwd=TOP, env=hidden, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_without_a_gpu_it_fails_and_says_so():
    done = asked("-k", "zeroshot")
    assert done.returncode == 1 and "torch sees no CUDA device" in done.stdout
    assert "passed" not in done.stdout and "skipped" not in done.stdout


@pytest.mark.slow
def test_without_a_test_it_fails():
    assert asked("-k", "nothing_is_named_so").returncode == pytest.ExitCode.NO_TESTS_COLLECTED
