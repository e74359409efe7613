"""What holds for every test: in how many processes all of them run, and where traced graphs are kept.

Graphs that are traced are kept in build/, so that a checkout traces each only once, and what one process has traced the
others need not. Tests of the tracing itself make exporters without a cache, and trace.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

HERE = Path(__file__).parent

LONG = (
    *("tests/kafka/", "tests/monkey/", "tests/test_trainer.py", "tests/test_method_contract.py"),
    *("tests/test_simulated_cuda.py", "tests/test_watched.py", "tests/test_merge_command.py", "tests/test_bench.py"),
)
"""What takes half a minute and more is begun first, so that no process works on one alone in the end."""

# Not the user's own: its newest graphs would be those of toys. Processes that tests start have it too.
os.environ["XDG_CACHE_HOME"] = str(HERE.parent / "build" / "cache")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: it would take all cores in each of the processes, and they would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """All tests run in a process for each core and one more, since some wait; 0: those that are named run in this one,
    which begins sooner and shows what they print."""
    everything = [Path(part).resolve() for part in config.args] == [HERE]
    if not everything or config.option.keyword:
        return 0
    return min(len(os.sched_getaffinity(0)), 4) + 1  # with more, those of Kafka would last longer than all others


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not item.nodeid.startswith(LONG))


class Scheduling(LoadFileScheduling):
    """The tests of a file stay in one process, for what they share; those of Kafka do all together, for the brokers."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/kafka" if nodeid.startswith("tests/kafka/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)
