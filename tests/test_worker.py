"""The spawned trainer: started early, heard without waiting, and never missed when it dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from agent.config import Config
from agent.values import Outcome
from agent.worker import ProcessWorker, WorkerDied
from streams.buffer import Task
from streams.spool import Sample
from tests.fakes import FAKE_LEARNER, LIST, FakeLearner, InlineWorker


class SlowStart(FakeLearner):
    def __init__(self, config: Config, commit: Path | None) -> None:
        time.sleep(1)
        super().__init__(config, commit)


class TellsThreads(FakeLearner):
    def learn(self, task, staging, on_progress):
        return replace(super().learn(task, staging, on_progress), classes=(os.environ.get("OMP_NUM_THREADS"),))


@pytest.fixture
def make_worker() -> Iterator:
    workers = []

    def make(config: Config | None = None, learner: str = FAKE_LEARNER, **arguments) -> ProcessWorker:
        workers.append(ProcessWorker(config or Config(), learner, **arguments))
        return workers[-1]

    yield make
    for worker in workers:
        worker.stop(5)


def task_of(folder: Path, *images: str, number: int = 1, copies: int = 1) -> Task:
    folder.mkdir(exist_ok=True)
    samples = []
    for offset, image in enumerate(images * copies):
        path = folder / f"{number}-{offset % len(images)}"
        path.write_text(image)
        samples.append(Sample("cat", LIST, offset, path, 0, len(image)))
    end = {LIST: len(samples)}
    return Task(number, ("cat",), tuple(samples), end, "samples", sum(s.length for s in samples), len(samples), {})


def staging_in(folder: Path) -> Path:
    folder.mkdir()
    return folder


def outcome_of(worker, timeout_s: float = 30) -> Outcome:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        match worker.poll():
            case Outcome() as outcome:
                return outcome
        time.sleep(0.005)
    raise AssertionError(f"no outcome within {timeout_s} s")


def wait_until(true, timeout_s: float = 30) -> None:
    until = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < until, f"not within {timeout_s} s"
        time.sleep(0.005)


def ready(worker: ProcessWorker) -> bool:
    worker.poll()
    return worker.ready


def test_a_task_is_learned_in_another_process(tmp_path, make_worker):
    # given
    worker = make_worker()
    worker.start(None)

    # when
    worker.submit(task_of(tmp_path / "spool", "a", "b"), staging_in(tmp_path / "staging"), None)
    assert not worker.idle
    outcome = outcome_of(worker)

    # then
    assert worker.idle and worker.ready
    assert worker.pid != os.getpid()
    assert outcome.next_offsets == {LIST: 2}
    assert set(outcome.files) >= {"learner.safetensors", "learner.json", "report.json"}


def test_the_process_and_what_it_knows_stay_for_the_next_task(tmp_path, make_worker):
    worker = make_worker()
    worker.submit(task_of(tmp_path / "spool", "a"), staging_in(tmp_path / "1"), None)
    outcome_of(worker)
    pid = worker.pid
    worker.submit(task_of(tmp_path / "spool", "b", number=2), staging_in(tmp_path / "2"), None)
    outcome = outcome_of(worker)
    assert worker.pid == pid
    assert [entry.task for entry in outcome.report.history] == [1, 2]


def test_a_large_task_is_submitted_at_once_while_the_trainer_is_still_loading(tmp_path, make_worker):
    # given a task much larger than a pipe's buffer
    worker = make_worker(learner="tests.test_worker:SlowStart")
    worker.start(None)
    task = replace(task_of(tmp_path / "spool", "a"), rejected={"x" * 2**20: 1})

    # when
    started = time.monotonic()
    worker.submit(task, staging_in(tmp_path / "staging"), None)
    worker.poll()
    took_s = time.monotonic() - started

    # then
    assert took_s < 0.5
    assert outcome_of(worker).next_offsets == {LIST: 1}


def test_progress_that_nobody_fetches_does_not_hold_up_the_trainer(tmp_path, make_worker):
    # given 2,000 messages, more than fit into a pipe
    worker = make_worker()
    worker.submit(task_of(tmp_path / "spool", "a", copies=2000), staging_in(tmp_path / "staging"), None)

    # when nobody polls until it is done, which a file shows
    wait_until((tmp_path / "staging" / "report.json").exists)

    # then the outcome is there
    assert outcome_of(worker).task == 1


def test_an_error_arrives_as_one_line_and_a_traceback(tmp_path, make_worker):
    worker = make_worker()
    worker.submit(task_of(tmp_path / "spool", "raise"), staging_in(tmp_path / "staging"), None)
    with pytest.raises(WorkerDied) as died:
        outcome_of(worker)
    assert (died.value.kind, str(died.value), died.value.blames_task) == ("error", "RuntimeError: told to raise", True)
    assert "in misbehave" in died.value.details
    assert worker.idle and worker.pid is None


def test_a_lost_rank_is_told_from_other_errors(tmp_path, make_worker):
    worker = make_worker()
    worker.submit(task_of(tmp_path / "spool", "break rank"), staging_in(tmp_path / "staging"), None)
    with pytest.raises(WorkerDied) as died:
        outcome_of(worker)
    assert (died.value.kind, died.value.blames_task) == ("rank", False)
    assert str(died.value) == "RankLost: rank 1, there (process 7, cuda:0), is gone"


def test_a_killed_trainer_is_noticed_and_started_again_with_the_next_task(tmp_path, make_worker):
    # given
    worker = make_worker()
    marker = tmp_path / "marker"
    task = task_of(tmp_path / "spool", f"die-once {marker}")
    worker.submit(task, staging_in(tmp_path / "1"), None)

    # when
    with pytest.raises(WorkerDied) as died:
        outcome_of(worker)

    # then
    assert (died.value.kind, str(died.value)) == ("died", "trainer was killed by SIGKILL (out of memory?)")
    worker.submit(task, staging_in(tmp_path / "2"), None)
    assert outcome_of(worker).task == 1


def test_a_trainer_killed_between_tasks_is_replaced_from_the_commit(tmp_path, make_worker):
    # given a trainer that has learned a task, which was committed
    worker = make_worker()
    commit = staging_in(tmp_path / "1")
    worker.submit(task_of(tmp_path / "spool", "a"), commit, None)
    outcome_of(worker)

    # when
    os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: worker.poll() is None and worker.pid is None)
    worker.submit(task_of(tmp_path / "spool", "b", number=2), staging_in(tmp_path / "2"), commit)

    # then it goes on from there
    outcome = outcome_of(worker)
    assert [entry.task for entry in outcome.report.history] == [1, 2]


def test_a_learner_that_cannot_be_built_says_why_before_any_task(make_worker):
    worker = make_worker(learner="tests.fakes:UnbuildableLearner")
    worker.start(None)
    with pytest.raises(WorkerDied) as died:
        wait_until(lambda: worker.poll() is not None)
    assert (died.value.kind, died.value.blames_task) == ("start", False)
    assert str(died.value) == "ValueError: no weights for this model; put them there"


def test_a_silent_trainer_is_killed(tmp_path, make_worker):
    # given a clock that has gone beyond the limit
    late_s = 0.0
    worker = make_worker(clock=lambda: time.monotonic() + late_s)
    worker.start(None)
    wait_until(lambda: ready(worker))
    pid = worker.pid
    worker.submit(task_of(tmp_path / "spool", "hang"), staging_in(tmp_path / "staging"), None)
    wait_until(lambda: worker.poll() is not None)

    # when
    late_s = Config().agent.trainer_silent_s + 1

    # then
    with pytest.raises(WorkerDied, match=r"said nothing for 60\d s"):
        worker.poll()
    assert not psutil.pid_exists(pid)


def test_an_idle_trainer_may_be_silent_for_ever(make_worker):
    late_s = 0.0
    worker = make_worker(clock=lambda: time.monotonic() + late_s)
    worker.start(None)
    wait_until(lambda: ready(worker))
    late_s = 1e9
    assert worker.poll() is None


@pytest.mark.parametrize("image", ["busy 60", "hang"])
def test_a_trainer_in_the_middle_of_an_update_is_stopped_quickly(tmp_path, make_worker, image):
    # given
    worker = make_worker()
    worker.submit(task_of(tmp_path / "spool", image), staging_in(tmp_path / "staging"), None)
    wait_until(lambda: worker.poll() is not None)
    pid = worker.pid

    # when
    started = time.monotonic()
    worker.stop(timeout_s=2)

    # then
    assert time.monotonic() - started < 5
    assert not psutil.pid_exists(pid)


def test_the_trainer_dies_with_its_parent(tmp_path):
    # given an agent whose trainer spins in the middle of an update
    code = f"""
import time
from pathlib import Path
from tests.test_worker import *
if __name__ == "__main__":
    worker = ProcessWorker(Config(), FAKE_LEARNER)
    folder = Path({str(tmp_path)!r})
    worker.submit(task_of(folder / "spool", "busy 60"), staging_in(folder / "staging"), None)
    wait_until(lambda: worker.poll() is not None)
    print(worker.pid, flush=True)
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()

    # when
    parent.kill()
    parent.wait()

    # then
    child.wait(timeout=5)


def test_the_configured_number_of_threads_is_in_force_before_the_learner_is_imported(tmp_path, make_worker):
    config = Config.model_validate({"model": {"threads": 3}})
    worker = make_worker(config, "tests.test_worker:TellsThreads")
    worker.submit(task_of(tmp_path / "spool", "a"), staging_in(tmp_path / "staging"), None)
    assert outcome_of(worker).classes == ("3",)


def test_the_worker_of_other_tests_keeps_the_same_contract(tmp_path):
    # given
    worker = InlineWorker()
    worker.submit(task_of(tmp_path / "spool", "raise"), staging_in(tmp_path / "1"), None)

    # when, then
    with pytest.raises(WorkerDied, match="told to raise"):
        worker.poll()
    assert worker.idle and not worker.ready
    worker.submit(task_of(tmp_path / "spool", "a"), staging_in(tmp_path / "2"), None)
    assert isinstance(worker.poll(), Outcome)
    assert worker.poll() is None
