"""The trainer with ranks in processes of their own: the same model as alone, and what follows when one is lost."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from agent.config import Config
from agent.layout import LEARNER_TENSORS
from agent.sharing.lead import Sharing
from agent.sharing.machine import SharingError, device_of, interface_of
from agent.trainer import Trainer
from agent.values import Outcome, Progress
from agent.worker import RankLost
from streams.buffer import Task
from tests.bad_images import bad_images
from tests.test_trainer import Bench, images_of, unreleased
from tests.tiny import tiny_clip

SHARED = {"processes": 2, "timeout_s": 60.0, "fewer": False}
THREADS = {"threads": 1}


def tasks_of(bench: Bench) -> list[Task]:
    """Two tasks of the bundled stream, with an image that cannot be decoded on each rank."""
    broken = [("cat", image.data) for image in bad_images() if image.stage == "decode"][:3]
    return [bench.task([*images_of("cat", "ship"), *broken]), bench.task(images_of("dog", "truck", "cat", start=20))]


def secret_in(folder: Path) -> Path:
    file = folder / "secret"
    file.write_text("as long as it has to be")
    return file


def trainer_of(bench: Bench, commit: Path | None = None) -> Trainer:
    return unreleased(Trainer(bench.config, commit))


def scores_of(outcome: Outcome) -> list[object]:
    """All that is counted of right answers."""
    report = outcome.report
    return [report.matrix, report.avg, report.zero_shot, report.test_images, report.probe, report.old_classes]


def scoring(progress: Progress) -> bool:
    """Whether images are scored after an update."""
    return progress.phase == "evaluate" and bool(progress.steps)


def rank_of(trainer: Trainer) -> psutil.Process:
    """The other rank's process, once it has joined."""
    [process] = trainer._sharing._own.values()
    return psutil.Process(process.pid)


def killing(trainer: Trainer, at: Callable[[Progress], bool], sign: int = signal.SIGKILL) -> Callable[[Progress], None]:
    """Kills the other rank once, when progress is such."""
    killed = []

    def heard(progress: Progress) -> None:
        if not killed and at(progress):
            killed.append(progress)
            rank_of(trainer).send_signal(sign)

    return heard


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> Iterator[tuple[list, list, str, Trainer, Bench]]:
    """What a trainer learns alone, and what one learns whose other rank is killed in the second of two tasks."""
    alone = Bench(tmp_path_factory.mktemp("alone"), model=THREADS)
    trainer = trainer_of(alone)
    expected = [alone.learn(trainer, task) for task in tasks_of(alone)]

    bench = Bench(tmp_path_factory.mktemp("two"), training=SHARED, model=THREADS)
    first, second = tasks_of(bench)
    trainer = trainer_of(bench)
    outcome, commit = bench.learn(trainer, first)
    with pytest.raises(RankLost) as lost:
        trainer.learn(second, bench.store.stage(), killing(trainer, lambda p: p.phase == "train" and p.step == 1))
    trainer._sharing.close()
    again = trainer_of(bench, commit.path)
    yield expected, [(outcome, commit), bench.learn(again, second)], str(lost.value), again, bench
    again._sharing.close()


def test_a_trainer_learns_with_another_rank_what_it_learns_alone_though_it_is_killed(steps):
    expected, got, _, _, _ = steps
    for (outcome, commit), (alone, at) in zip(got, expected, strict=True):
        assert [share.device for share in outcome.shares] == ["cpu", "cpu"] and alone.shares == ()
        assert all(0 < share.waited_s < share.seconds for share in outcome.shares)
        assert outcome.classes == alone.classes and outcome.rejected == alone.rejected
        assert outcome.report.predict_before_learn == alone.report.predict_before_learn
        assert scores_of(outcome) == scores_of(alone)
        assert outcome.update.samples == alone.update.samples and outcome.update.steps == alone.update.steps
        assert outcome.report.gap.drift.after == pytest.approx(alone.report.gap.drift.after, abs=1e-4)
        tensors, others = (load_file(path / LEARNER_TENSORS) for path in (commit.path, at.path))
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, others[name], rtol=1e-3, atol=1e-3, msg=name)
    assert [len(outcome.rejected) for outcome, _ in got] == [3, 0]


def test_the_rank_that_is_lost_is_named(steps):
    assert re.fullmatch(r"rank 1, \S+ \(process \d+, cpu\), is gone", steps[2])


def test_an_idle_rank_that_dies_is_started_again_for_the_next_task(steps):
    *_, trainer, bench = steps
    dead = rank_of(trainer)
    dead.kill()
    dead.wait(10)
    outcome, _ = bench.learn(trainer, bench.task(images_of("frog", "ship", start=40, count=8)))
    assert len(outcome.shares) == 2 and outcome.shares[1].process == rank_of(trainer).pid != dead.pid


@pytest.mark.parametrize(
    "sign",
    [pytest.param(signal.SIGKILL, id="killed"), pytest.param(signal.SIGSTOP, id="stopped", marks=pytest.mark.slow)],
)
def test_a_rank_lost_while_a_task_is_scored_ends_the_attempt_and_changes_neither_model_nor_scores(tmp_path, sign):
    # given
    settings = {"model": THREADS, "method": {"name": "ncm"}}
    alone = Bench(tmp_path / "alone", **settings)
    expected, at = alone.learn(trainer_of(alone), tasks_of(alone)[0])
    bench = Bench(tmp_path / "two", training=SHARED | {"timeout_s": 5.0}, **settings)
    [first, _] = tasks_of(bench)
    trainer = trainer_of(bench)

    # when
    said = r"^rank 1, .* is gone" if sign == signal.SIGKILL else "no rank is known to be gone, but one was not heard"
    with pytest.raises(RankLost, match=said):
        trainer.learn(first, bench.store.stage(), killing(trainer, scoring, sign))
    trainer._sharing.close()
    trainer = trainer_of(bench)
    outcome, commit = bench.learn(trainer, first)
    trainer._sharing.close()

    # then
    assert len(outcome.shares) == 2 and outcome.classes == expected.classes
    assert scores_of(outcome) == scores_of(expected) and outcome.report.probe.images > 0
    tensors, others = (load_file(path / LEARNER_TENSORS) for path in (commit.path, at.path))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_killed_in_any_phase_leaves_the_same_final_model(tmp_path):
    # given
    whole = Bench(tmp_path / "whole", training=SHARED, model=THREADS)
    trainer = trainer_of(whole)
    undisturbed, expected = [whole.learn(trainer, task) for task in tasks_of(whole)][-1]
    trainer._sharing.close()
    bench = Bench(tmp_path / "killed", training=SHARED, model=THREADS)
    first, second = tasks_of(bench)
    trainer = trainer_of(bench)
    _, commit = bench.learn(trainer, first)

    # when it is killed in every phase, and then in none
    phases = [lambda p, now=now: p.phase == now for now in ("decode", "evaluate", "train", "compensate")]
    for phase in (*phases, scoring):
        with pytest.raises(RankLost):
            trainer.learn(second, bench.store.stage(), killing(trainer, phase))
        trainer._sharing.close()
        trainer = trainer_of(bench, commit.path)
    outcome, commit = bench.learn(trainer, second)
    trainer._sharing.close()

    # then the model is the same to the bit, and so are the scores
    assert (commit.path / LEARNER_TENSORS).read_bytes() == (expected.path / LEARNER_TENSORS).read_bytes()
    assert scores_of(outcome) == scores_of(undisturbed)


@pytest.mark.slow
def test_a_rank_that_hangs_is_lost_after_its_time(tmp_path):
    bench = Bench(tmp_path, training=SHARED | {"timeout_s": 5.0}, model=THREADS)
    trainer = trainer_of(bench)
    first, _ = tasks_of(bench)
    stopping = killing(trainer, lambda progress: progress.phase == "train" and progress.step == 1, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(RankLost, match="no rank is known to be gone, but one was not heard"):
        trainer.learn(first, bench.store.stage(), stopping)
    assert time.monotonic() - started < 120
    trainer._sharing.close()


def test_too_few_ranks_fail_the_attempt_or_begin_with_fewer_as_configured(tmp_path):
    short = {"listen": "127.0.0.1:0", "secret_file": secret_in(tmp_path), "ranks": 3, "join_s": 0.5}
    for fewer in (False, True):
        bench = Bench(tmp_path / str(fewer), training=short | {"fewer": fewer}, model=THREADS, method={"name": "ncm"})
        trainer = trainer_of(bench)
        first, _ = tasks_of(bench)
        if fewer:
            assert bench.learn(trainer, first)[0].shares == ()
        else:
            with pytest.raises(RankLost, match="are there, 1 in all; expected were 1 and 3"):
                trainer.learn(first, bench.store.stage(), lambda progress: None)
        trainer._sharing.close()


def test_an_address_that_cannot_be_had_is_said(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = {"listen": address, "secret_file": secret_in(tmp_path)}
        with pytest.raises(SharingError, match=f"training.listen: {address} cannot be listened on"):
            Sharing(Config.model_validate({"training": settings}), tiny_clip())


def test_a_rank_ends_with_the_process_that_started_it():
    # given a rank that finds no trainer
    code = """
import time
from agent.config import Config
from agent.sharing.start import RankProcess
rank = RankProcess(Config(), ("127.0.0.1", 1), b"0" * 16, 1, own=True)
print(rank.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    rank = psutil.Process(int(parent.stdout.readline()))

    # when
    parent.kill()
    parent.wait()

    # then
    rank.wait(timeout=10)


def test_a_rank_has_a_device_of_its_own(monkeypatch):
    def config(device: str, processes: int) -> Config:
        return Config.model_validate({"model": {"device": device}, "training": {"processes": processes}})

    assert device_of(config("cpu", 3), 2) == device_of(config("auto", 3), 0) == "cpu"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [device_of(config("auto", 2), number) for number in range(2)] == ["cuda:0", "cuda:1"]
    assert device_of(config("cuda:1", 1), 0) == "cuda:1"
    with pytest.raises(SharingError, match=r"training\.processes is 3, but this machine has 2 CUDA device\(s\)"):
        device_of(config("cuda", 3), 0)
    with pytest.raises(SharingError, match=r"model\.device is cuda:1, which only one rank can have"):
        device_of(config("cuda:1", 2), 0)


def test_the_interface_of_an_address_is_found():
    assert interface_of("127.0.0.1") in ("lo", "lo0", "") and interface_of("203.0.113.7") == ""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_another_machine_joins_unless_its_configuration_differs(tmp_path, request):
    # given
    training = {"listen": "127.0.0.1:0", "secret_file": secret_in(tmp_path), "ranks": 2, "join_s": 120, "fewer": False}
    bench = Bench(tmp_path / "agent", training=training, model=THREADS, method={"name": "ncm"})
    trainer = trainer_of(bench)
    address = f"127.0.0.1:{trainer._sharing._members.port}"
    settings = {
        "method.name": "ncm",
        "model.threads": 1,
        "training.secret_file": training["secret_file"],
        "state.path": tmp_path / "rank",
    }

    def joining(**others: object) -> subprocess.Popen:
        sets = [f"--set={key}={value}" for key, value in (settings | others).items()]
        process = subprocess.Popen(
            [sys.executable, "-m", "agent", "join", address, *sets], stderr=subprocess.PIPE, text=True
        )
        request.addfinalizer(process.kill)
        return process

    # when, then
    refused = joining(**{"method.seed": 1})
    _, said = refused.communicate(timeout=120)
    assert refused.returncode == 1
    assert "method.seed is 1 for this rank and 0 for the trainer" in said

    joined = joining()
    first, _ = tasks_of(bench)
    outcome, _ = bench.learn(trainer, first)
    assert len(outcome.shares) == 2

    # when it is ended, then its ranks are gone
    joined.terminate()
    assert joined.wait(30) == 0
    assert not psutil.pid_exists(outcome.shares[1].process)
    assert trainer._sharing._members.there() == []
    trainer._sharing.close()
