"""`gapstream serve --kafka` as processes on a real broker: every image has one prediction, whoever is killed when."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient

from tests.kafka.agents import wait_until
from tests.kafka.broker import start_broker
from tests.kafka.test_exchange import read
from tests.processes import running
from tests.test_runtime import State, Toy, picture, png

IMAGES = [png(picture(seed, 20, 20)) for seed in range(8)]

DIE_BEFORE = """
import os, signal, sys
from kafka import KafkaProducer
from agent.cli import main
setattr(KafkaProducer, sys.argv[1], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
main(sys.argv[2:])
"""
DIE_AFTER_COMMIT = """
import os, signal, sys
from kafka import KafkaProducer
from agent.cli import main
commit = KafkaProducer.commit_transaction
def commit_and_die(self):
    commit(self)
    os.kill(os.getpid(), signal.SIGKILL)
KafkaProducer.commit_transaction = commit_and_die
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> State:
    state = State(tmp_path_factory.mktemp("state"))
    state.commit(Toy(5, seed=1))
    return state


class Process:
    """One serving process; `log` holds what it printed."""

    def __init__(self, state: Path, bootstrap: str, topic: str, log: Path, *code: str, **settings: object) -> None:
        """`code`: a program to run instead, and its first argument. `settings`: of [serve.kafka]."""
        keys = {
            "state.path": state,
            "serve.port": 0,
            "serve.threads": 1,
            "source.kafka.bootstrap_servers": bootstrap,
            "serve.kafka.topics": topic,
            "serve.kafka.output": f"{topic}.out",
            "serve.kafka.group": topic,
            **{f"serve.kafka.{key}": value for key, value in settings.items()},
        }
        arguments = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
        program = ("-c", *code) if code else ("-m", "agent")
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, *program, "serve", "--kafka", *arguments],
                stdout=file,
                stderr=file,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def get(self, path: str) -> tuple[int, str]:
        found: list[str] = []
        wait_until(lambda: found.extend(re.findall(r"(http://[\d.:]+)/v1", self.log.read_text())) or found, 30)
        try:
            with urllib.request.urlopen(found[-1] + path, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:  # not listening yet, or not any more
            return 0, ""

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


@contextmanager
def serving(*arguments: Any, **settings: object) -> Iterator[Process]:
    process = Process(*arguments, **settings)
    try:
        yield process
    finally:
        process.kill()


def play(producer: KafkaProducer, topic: str, count: int, start: int = 0, pause_s: float = 0) -> None:
    for number in range(start, start + count):
        image = b"no image" if number % 23 == 11 else IMAGES[number % len(IMAGES)]
        producer.send(topic, image, b"%d" % number, [("label", b"cat")])
        time.sleep(pause_s)
    producer.flush()


def origins(messages: list[Any]) -> Counter[tuple[int, int]]:
    found = [json.loads(message.value)["origin"] for message in messages]
    return Counter((origin["partition"], origin["offset"]) for origin in found)


def test_images_go_in_and_predictions_come_out_of_the_newest_release(
    state, bootstrap, new_topic, producer, tmp_path
) -> None:
    # given a process that answers a topic
    topic = new_topic(2)
    play(producer, topic, 30)
    with serving(state.path, bootstrap, topic, tmp_path / "log", headers="label") as process:
        wait_until(lambda: process.get("/readyz")[0] == 200, 30)
        wait_until(lambda: f"{topic}.out" in process.log.read_text(), 10)
        wait_until(lambda: len(read(bootstrap, topic)) == 30, 30)

        # when there is another release
        newest = state.commit(Toy(7, seed=2))
        wait_until(lambda: newest.id in process.log.read_text(), 20)
        play(producer, topic, 5, start=30)
        wait_until(lambda: len(read(bootstrap, topic)) == 35, 30)
        metrics = process.get("/metrics")[1]
        began = time.monotonic()

        # then it ends well when told to, and all are answered, the last ones by it
        assert process.stop() == 0 and time.monotonic() - began < 10
    messages = read(bootstrap, topic)
    assert sorted(int(message.key) for message in messages) == list(range(35))
    for message in messages:
        answer = json.loads(message.value)
        assert message.headers == [("label", b"cat"), ("content-type", b"application/json")]
        if int(message.key) % 23 == 11:
            assert answer["error"] == "unsupported_format"
        else:
            assert len(answer["labels"]) == len(answer["scores"]) == 5
            assert (answer["release"] == newest.id) == (int(message.key) >= 30)
    assert f'gapstream_serve_kafka_records_total{{topic="{topic}"}} 35.0' in metrics
    assert "gapstream_serve_kafka_predictions_total 33.0" in metrics
    assert f'gapstream_serve_kafka_lag_records{{partition="0",topic="{topic}"}} 0.0' in metrics
    assert "Traceback" not in process.log.read_text()


def test_started_before_the_broker_and_the_topic_it_answers_once_they_are_there(state, tmp_path) -> None:
    # given a process and a producer that are started first, as in a compose file
    broker = start_broker(tmp_path / "broker", start=False)
    log = tmp_path / "producer"
    producing = [sys.executable, "-m", "agent", "produce", "bundled", "--topic", "images", "--create", "2"]
    try:
        with (
            serving(state.path, broker.bootstrap, "images", tmp_path / "log") as process,
            running([*producing, "--bootstrap", broker.bootstrap, "--per-class", "1"], log) as producer,
        ):
            wait_until(lambda: "Waiting for it" in process.log.read_text() + log.read_text(), 30)

            # when the broker comes
            broker.start()

            # then the producer creates the topic, and every image is answered
            assert producer.wait(60) == 0, log.read_text()
            wait_until(lambda: process.get("/readyz")[0] == 200, 60)
            wait_until(lambda: len(read(broker.bootstrap, "images")) == 10, 60)
            assert "has no topic images.out" not in process.log.read_text()
            assert process.stop() == 0
    finally:
        broker.kill()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "killed", ["flush", "send_offsets_to_transaction", "commit_transaction", "close", "after the commit"]
)
def test_a_process_killed_in_a_transaction_leaves_neither_two_answers_nor_none(
    killed, state, bootstrap, new_topic, producer, tmp_path
) -> None:
    # given a process that is killed in its first transaction, at this step of it
    topic = new_topic(2)
    new_topic(2, name=f"{topic}.out")
    play(producer, topic, 40)
    code = (DIE_AFTER_COMMIT, "") if killed == "after the commit" else (DIE_BEFORE, killed)
    with serving(state.path, bootstrap, topic, tmp_path / "first", *code, max_records=10) as first:
        if killed == "close":
            wait_until(lambda: len(read(bootstrap, topic)) >= 10, 60)
            first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(60) == -signal.SIGKILL

    # when another one takes over
    with serving(state.path, bootstrap, topic, tmp_path / "second") as second:
        wait_until(lambda: len(read(bootstrap, topic)) >= 40, 90)
        wait_until(lambda: second.get("/readyz")[0] == 200, 60)
        assert second.stop() == 0

    # then every message has one answer
    found = origins(read(bootstrap, topic))
    assert len(found) == 40 and max(found.values()) == 1


@pytest.mark.slow
def test_a_stop_takes_no_ten_seconds_while_the_broker_is_away(state, tmp_path) -> None:
    broker = start_broker(tmp_path / "broker")
    try:
        admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
        admin.create_topics({"images": {"num_partitions": 1, "replication_factor": 1}}, wait_for_metadata=True)
        admin.close()
        with serving(state.path, broker.bootstrap, "images", tmp_path / "log") as process:
            wait_until(lambda: process.get("/readyz")[0] == 200, 30)
            broker.kill()
            time.sleep(12)  # longer than the group waits for a member
            assert process.get("/livez")[0] == 200
            began = time.monotonic()
            assert process.stop() == 0 and time.monotonic() - began < 10
    finally:
        broker.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processes_and_brokers_that_are_killed_leave_one_answer_to_every_message(state, tmp_path) -> None:
    # given two processes that share four partitions, and a producer at work
    broker = start_broker(tmp_path / "broker")
    rng = random.Random(5)
    topic = "images"
    processes: list[Process] = []

    def start() -> Process:
        number = len(processes)
        processes.append(Process(state.path, broker.bootstrap, topic, tmp_path / f"log{number}", max_records=20))
        return processes[-1]

    try:
        admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
        admin.create_topics({topic: {"num_partitions": 4, "replication_factor": 1}}, wait_for_metadata=True)
        admin.close()
        producer = KafkaProducer(
            bootstrap_servers=broker.bootstrap, enable_idempotence=True, linger_ms=5, reconnect_backoff_max_ms=500
        )
        playing = threading.Thread(target=play, args=(producer, topic, 3000, 0, 0.03))
        playing.start()
        alive = [start(), start()]

        # when processes are killed or stopped, and the broker twice
        broker_lives = 2
        while playing.is_alive():
            time.sleep(rng.uniform(2, 8))
            victim = rng.choice(["kill", "kill", "stop", "broker"])
            at = rng.randrange(2)
            if victim == "broker" and broker_lives:
                broker_lives -= 1
                broker.kill()
                time.sleep(rng.uniform(0, 3))
                broker.start()
            elif victim == "stop":
                alive[at].process.send_signal(signal.SIGTERM)
                alive[at].process.wait(30)
                alive[at] = start()
            elif victim == "kill":
                alive[at].kill()
                alive[at] = start()
        producer.close()

        # then every message has one answer
        wait_until(lambda: len(read(broker.bootstrap, topic)) >= 3000, 180)
        for process in alive:
            assert process.process.poll() is None, process.log.read_text()[-3000:]
            assert process.stop() == 0
        found = origins(read(broker.bootstrap, topic))
        assert len(found) == 3000 and max(found.values()) == 1
    finally:
        for process in processes:
            process.kill()
        broker.kill()
