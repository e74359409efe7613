"""The agent on Kafka: nothing lost, nothing learned twice, nothing blocked."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient
from kafka.errors import TopicAlreadyExistsError

from agent.config import Config
from agent.pipeline import Pipeline
from streams.buffer import CutRule
from streams.dead_letter_format import original
from streams.formats import Codec
from streams.kafka.connection import Connection
from streams.kafka.dead_letters import KafkaDeadLetters
from streams.kafka.replay import dead_letters
from streams.kafka.source import KafkaSource
from streams.record import Partition, Reason
from streams.source import PositionError
from tests.bad_images import OddImage, all_images, encoded, picture
from tests.fakes import InlineWorker, pipeline
from tests.kafka.agents import Agent, current, model, wait_until
from tests.kafka.broker import start_broker
from tests.kafka.records import send

MAX_PIXELS = MAX_BYTES = 10**6


def jpeg(number: int) -> bytes:
    """A valid image like no other."""
    return JPEG + b"%d" % number


JPEG = encoded(picture(), "JPEG")
Sent = dict[tuple[Partition, int], Reason | None]
"""Where each message ended up, and why it has to be rejected; None: it has to be learned."""


def poison(rng: random.Random, odd: list[OddImage]) -> tuple[bytes | None, list[tuple[str, bytes]], Reason]:
    """A broken message of some kind."""
    kind = rng.randrange(10)
    label = [("label", b"cat")]
    if kind < 4:
        bad = rng.choice(odd)
        assert bad.reason
        return bad.data, label, bad.reason
    image = base64.b64encode(JPEG).decode()
    return [
        (None, label, Reason.EMPTY),
        (JPEG, [], Reason.MISSING_LABEL),
        (JPEG, [("label", b"\xff\xfe")], Reason.LABEL_TYPE),
        (json.dumps({"label": "a", "image": image})[: rng.randrange(1, 50)].encode(), [], Reason.BAD_ENVELOPE),
        (json.dumps({"label": "a", "image_url": "s3://x/y"}).encode(), [], Reason.BAD_SCHEMA),
        (b"\x01" + rng.randbytes(rng.randrange(60)), label, Reason.UNSUPPORTED_FORMAT),
    ][kind - 4]


@pytest.mark.parametrize("count", [1500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_of_a_poisoned_stream_the_good_is_learned_and_the_bad_set_aside_with_its_reason(
    count: int, bootstrap: str, new_topic: Any, producer: KafkaProducer, tmp_path: Path
) -> None:
    # given a stream of which 5 % are broken in every way there is
    topic = new_topic(3)
    rng = random.Random(3)
    odd = [image for image in all_images() if image.reason and image.stage == "intake"]
    odd += [image for image in all_images() if image.reason and image.stage == "decode"]
    futures = []
    for number in range(count):
        value, headers, reason = jpeg(number), [("label", b"class %d" % (number % 7))], None
        if rng.random() < 0.05:
            value, headers, reason = poison(rng, odd)
        futures.append((producer.send(topic, value, b"%d" % number, headers), reason, value))
    producer.send(topic, None, b"mark", [("gapstream.control", b"flush")], timestamp_ms=int(time.time() * 1000) + 1)
    producer.flush()
    sent = {(Partition(topic, made.partition), made.offset): (reason, value) for made, reason, value in
            ((future.get(), reason, value) for future, reason, value in futures)}  # fmt: skip

    # when an agent reads it
    connection = Connection([bootstrap])
    codec = Codec(max_image_bytes=MAX_BYTES, max_image_pixels=MAX_PIXELS, max_label_chars=200)
    source = KafkaSource(connection, [topic], codec, group="", merge_wait_s=0.2)
    box = KafkaDeadLetters(connection, [topic])
    stop = threading.Event()
    agent = pipeline(
        tmp_path, source, InlineWorker(Config(), "tests.kafka.agents:DecodingLearner"), box, stop, CutRule(samples=400)
    )
    running = threading.Thread(target=agent.run)
    running.start()
    wait_until(lambda: agent.commit and sum(agent.commit.offsets.values()) == count + 1, 240)
    stop.set()
    running.join()
    source.close()
    box.close()

    # then every good one is learned once, every bad one set aside once with its reason and as it was
    learned = Counter((Partition(*place[:2]), place[2]) for place in json.loads(model(tmp_path))["learned"])
    aside = {(one.origin.partition, one.origin.offset): one for one in dead_letters(connection, [f"{topic}.dlq"])}
    assert learned == Counter(place for place, (reason, _) in sent.items() if reason is None)
    assert aside.keys() == {place for place, (reason, _) in sent.items() if reason}
    assert len(aside) == sum(1 for _ in dead_letters(connection, [f"{topic}.dlq"]))
    for place, letter in aside.items():
        reason, value = sent[place]
        assert original(letter.raw).value == value
        if reason not in (Reason.TRUNCATED, Reason.UNDECODABLE):  # where the decoder may use either word
            assert letter.origin.reason == reason, letter.origin.detail
        else:
            assert letter.origin.reason in (Reason.TRUNCATED, Reason.UNDECODABLE)


def test_an_agent_that_is_stopped_before_its_first_commit_goes_on_where_it_began(
    bootstrap: str, new_topic: Any, producer: KafkaProducer, tmp_path: Path
) -> None:
    # given an agent that began at the newest record, and was stopped before it had learned any
    topic = new_topic()
    send(producer, topic, ["old"] * 3)

    def run(until: Callable[[Pipeline], Any], **rule: int) -> None:
        codec = Codec(max_image_bytes=MAX_BYTES, max_image_pixels=MAX_PIXELS, max_label_chars=200)
        source = KafkaSource(Connection([bootstrap]), [topic], codec, group="", start="latest")
        agent = pipeline(
            tmp_path, source, InlineWorker(Config(), "tests.kafka.agents:DecodingLearner"), rule=CutRule(**rule),
            stop=threading.Event(),
        )  # fmt: skip
        running = threading.Thread(target=agent.run)
        running.start()
        try:
            send(producer, topic, ["new"] * 6)
            wait_until(lambda: until(agent), 30)
        finally:
            agent.stop.set()
            running.join()
            source.close()
            agent.commits.close()

    run(lambda agent: agent.buffer.records == 6, samples=100)
    # when more came before the next start
    run(lambda agent: agent.commit and agent.commit.tasks, samples=12)
    # then all since the beginning is learned
    assert [place[2] for place in json.loads(model(tmp_path))["learned"]] == list(range(3, 15))


def test_of_a_topic_created_again_nothing_is_learned_twice(
    bootstrap: str, new_topic: Any, producer: KafkaProducer, admin: KafkaAdminClient, tmp_path: Path
) -> None:
    # given an agent that looks at the topic's identity once an hour, and has learned ten records
    topic = new_topic()
    send(producer, topic, ["old"] * 10)
    agents: list[Pipeline] = []

    def start() -> threading.Thread:
        codec = Codec(max_image_bytes=MAX_BYTES, max_image_pixels=MAX_PIXELS, max_label_chars=200)
        source = KafkaSource(Connection([bootstrap]), [topic], codec, group="", on_lost="skip", discover_s=3600)
        worker = InlineWorker(Config(), "tests.kafka.agents:DecodingLearner")
        agents.append(pipeline(tmp_path, source, worker, rule=CutRule(samples=10)))

        def run() -> None:
            with contextlib.suppress(PositionError):
                agents[-1].run()
            source.close()
            agents[-1].commits.close()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def learned() -> list[int]:
        return [place[2] for place in json.loads(model(tmp_path) or '{"learned": []}')["learned"]]

    before = start()
    try:
        wait_until(lambda: len(learned()) == 10, 30)
        # when the topic is deleted and created again, and soon has more records than before
        admin.delete_topics([topic])
        create_again(new_topic, topic)
        send(producer, topic, ["new"] * 50)
        # then the agent stops without a commit of what it read of it
        before.join(30)
        assert not before.is_alive() and learned() == list(range(10))
        # and the next start learns all of it, once
        before = start()
        wait_until(lambda: len(learned()) >= 60, 30)
        assert learned() == [*range(10), *range(50)]
    finally:
        agents[-1].stop.set()
        before.join()


def create_again(new_topic: Any, topic: str) -> None:
    while True:  # the broker takes a moment to delete it
        try:
            new_topic(name=topic)
            return
        except TopicAlreadyExistsError:
            time.sleep(0.05)


def play(producer: KafkaProducer, topic: str, partitions: int, count: int, pause_s: float, start: int = 0) -> None:
    rng = random.Random(start)
    for number in range(start, start + count):
        image = b"no image" if number % 23 == 11 else jpeg(number)
        label = b"class %d" % (number // 60)
        producer.send(topic, image, b"%d" % number, [("label", label)], partition=rng.randrange(partitions))
        time.sleep(pause_s)
    producer.flush()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("partitions", "stamp"), [(1, "CreateTime"), (3, "LogAppendTime")])
def test_killed_agents_trainers_and_brokers_leave_the_model_of_an_undisturbed_run(
    partitions: int, stamp: str, tmp_path: Path
) -> None:
    # given a broker, a producer at work, and an agent
    broker = start_broker(tmp_path / "broker")
    rng = random.Random(partitions)
    agents: list[Agent] = []

    def start(folder: Path) -> Agent:
        agents.append(Agent(folder, broker.bootstrap, ["t"], task__samples=40, task__new_classes=3))
        return agents[-1]

    try:
        admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
        options = {"num_partitions": partitions, "replication_factor": 1, "configs": {"message.timestamp.type": stamp}}
        admin.create_topics({"t": options}, wait_for_metadata=True)
        admin.close()
        producer = KafkaProducer(
            bootstrap_servers=broker.bootstrap, enable_idempotence=True, linger_ms=5, reconnect_backoff_max_ms=500
        )
        playing = threading.Thread(target=play, args=(producer, "t", partitions, 900, 0.05))
        playing.start()
        state = tmp_path / "disturbed"
        agent = start(state)

        # when all of them are killed again and again
        broker_lives = 3
        while playing.is_alive():
            time.sleep(rng.uniform(0.5, 4))
            victim = rng.choice(["agent", "agent", "trainer", "broker"])
            if victim == "broker" and broker_lives:
                broker_lives -= 1
                broker.kill()
                time.sleep(rng.uniform(0, 2))
                broker.start()
            elif victim == "trainer":
                agent.kill_trainer()
            if victim == "agent" or agent.process.poll() is not None:
                agent.kill()
                agent = start(state)
        play(producer, "t", partitions, 100, 0, 900)
        for number in range(partitions):
            producer.send("t", None, b"end", [("gapstream.control", b"flush")], partition=number)
        producer.close()
        total = 1000 + partitions

        def covered(folder: Path, running: Agent) -> bool:
            assert running.process.poll() is None, running.log.read_text()[-3000:]
            commit = current(folder)
            return bool(commit) and sum(commit.offsets.values()) >= total - (partitions - 1)

        wait_until(lambda: covered(state, agent), 120)
        assert agent.stop() == 0

        # then the model is that of an agent that nobody disturbed, and every record was learned or set aside
        calm = start(tmp_path / "calm")
        wait_until(lambda: covered(tmp_path / "calm", calm), 120)
        assert calm.stop() == 0
        assert model(state) == model(tmp_path / "calm")
        learned = Counter(tuple(place) for place in json.loads(model(state))["learned"])
        letters = dead_letters(Connection([broker.bootstrap]), ["t.dlq"])
        aside = {(*letter.origin.partition, letter.origin.offset) for letter in letters}
        assert max(learned.values()) == 1 and not learned.keys() & aside
        assert len(learned) + len(aside) == 1000
    finally:
        for one in agents:
            one.kill()
        broker.kill()


def test_a_stop_takes_no_ten_seconds_however_long_the_broker_is_away(tmp_path: Path) -> None:
    # given an agent that cannot set a task's records aside, because the broker is gone
    broker = start_broker(tmp_path / "broker")
    try:
        admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
        admin.create_topics({"t": {"num_partitions": 1, "replication_factor": 1}}, wait_for_metadata=True)
        admin.close()
        producer = KafkaProducer(bootstrap_servers=broker.bootstrap)
        producer.send("t", jpeg(0), b"0", [("label", b"strain 2")])
        producer.send("t", None, b"mark", [("gapstream.control", b"flush")])
        producer.close()
        settings = {"agent__on_task_failure": "quarantine", "source__kafka__group": "g"}
        with Agent(tmp_path / "state", broker.bootstrap, ["t"], **settings) as agent:
            wait_until(lambda: "busy now" in agent.log.read_text(), 60)
            broker.kill()
            wait_until(lambda: "cannot be set aside; nothing is committed" in agent.log.read_text(), 60)
            # when it is told to stop
            began = time.monotonic()
            status = agent.stop()
            # then it does, and says nothing of a failure
            assert time.monotonic() - began < 10
            assert status == 0 and "Traceback" not in agent.log.read_text().rpartition("stopping")[2]
            commit = current(tmp_path / "state")
            assert commit and (commit.tasks, commit.offsets) == (0, {Partition("t", 0): 0})
    finally:
        broker.kill()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_update_of_minutes_holds_up_neither_the_stream_nor_the_metrics(
    bootstrap: str, new_topic: Any, producer: KafkaProducer, tmp_path: Path
) -> None:
    topic = new_topic(2)
    seconds = 150
    producer.send(topic, jpeg(0), b"0", [("label", b"busy %d" % seconds)], partition=0)
    producer.send(topic, None, b"mark", [("gapstream.control", b"flush")], partition=0)
    producer.flush()
    with Agent(tmp_path, bootstrap, [topic], task__samples=100, spool__max_bytes=2**20) as agent:
        url = agent.url()
        wait_until(lambda: "busy now" in agent.log.read_text(), 60)
        playing = threading.Thread(target=play, args=(producer, topic, 2, 1200, 0.1, 1))
        playing.start()
        slowest = 0.0
        until = time.monotonic() + seconds - 10
        while time.monotonic() < until:
            began = time.monotonic()
            with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
                answer.read()
            slowest = max(slowest, time.monotonic() - began)
            with urllib.request.urlopen(f"{url}/livez", timeout=5) as answer:
                assert answer.status == 200
            time.sleep(0.5)
        playing.join()
        commit = current(tmp_path)
        assert commit and commit.tasks == 0 and not any(commit.offsets.values()) and agent.process.poll() is None
        wait_until(lambda: (commit := current(tmp_path)) and sum(commit.offsets.values()) >= 1100, 120)
        assert agent.stop() == 0
        assert slowest < 0.5
        assert "Traceback" not in agent.log.read_text()
