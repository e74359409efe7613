"""Dead letters through a real broker: acknowledged, complete and listed, whatever happens to the broker."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import pytest
from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaTimeoutError
from kafka.future import Future as KafkaFuture

from streams.dead_letter_format import original
from streams.formats import Codec
from streams.kafka.connection import Connection
from streams.kafka.dead_letters import KafkaDeadLetters
from streams.kafka.replay import dead_letters
from streams.kafka.source import KafkaSource
from streams.record import Partition, Raw
from streams.source import DeadLetterDelayed, DeadLetterError
from tests.kafka.agents import wait_until
from tests.kafka.broker import start_broker
from tests.kafka.records import rejected


def test_letters_are_there_after_flush_with_everything_the_message_had(
    set_aside: Any, bootstrap: str, new_topic: Any
) -> None:
    topic = new_topic()
    raws = [
        Raw(b"k", b"v", (("label", b"cat"), ("x", None))),
        Raw(None, None),
        Raw(b"k", None, (("x\\xff", b"\xff"),)),
        Raw(None, b"", (("", b""),)),
    ]
    box = set_aside(topic)
    for offset, raw in enumerate(raws):
        box.put(rejected(topic, offset, raw))
    box.flush(10)

    found = list(dead_letters(Connection([bootstrap]), [f"{topic}.dlq"]))

    assert [(one.origin.partition, one.origin.offset) for one in found] == [(Partition(topic, 0), n) for n in range(4)]
    assert [original(one.raw) for one in found] == raws
    assert {one.origin.reason for one in found} == {"bomb"}


def test_a_letter_longer_than_its_topic_takes_goes_without_its_value(
    set_aside: Any, bootstrap: str, new_topic: Any
) -> None:
    topic = new_topic()
    new_topic(name=f"{topic}.dlq", **{"max.message.bytes": "20000"})
    box = set_aside(topic)
    box.put(rejected(topic, 0, Raw(b"k", bytes(30_000), (("label", b"cat"),))))
    box.flush(10)
    (letter,) = dead_letters(Connection([bootstrap]), [f"{topic}.dlq"])
    assert letter.raw.value is None and letter.origin.dropped == "value" and ("label", b"cat") in letter.raw.headers


def test_a_limit_that_was_lowered_later_is_found_out(
    set_aside: Any, bootstrap: str, new_topic: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.kafka.dead_letters.longest_message", lambda admin, topic: 10**6)
    topic = new_topic()
    new_topic(name=f"{topic}.dlq", **{"max.message.bytes": "20000"})
    box = set_aside(topic)
    box.put(rejected(topic, 0, Raw(b"k", bytes(30_000))))
    box.put(rejected(topic, 1, Raw(b"k", b"small")))
    box.flush(10)
    assert {one.origin.offset for one in dead_letters(Connection([bootstrap]), [f"{topic}.dlq"])} == {0, 1}


def test_a_dead_letter_topic_is_made_only_when_allowed(set_aside: Any, new_topic: Any) -> None:
    topic = new_topic()
    with pytest.raises(DeadLetterError, match=rf"no dead-letter topic {topic}\.dlq"):
        set_aside(topic, create=False)
    set_aside(topic)
    set_aside(topic, create=False)


def test_while_the_broker_is_away_flush_says_so_and_later_delivers(tmp_path: Any) -> None:
    broker = start_broker(tmp_path / "broker")
    try:
        where = Connection([broker.bootstrap])
        admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
        admin.create_topics({"t": {"num_partitions": 1, "replication_factor": 1}}, wait_for_metadata=True)
        admin.close()
        box = KafkaDeadLetters(where, ["t"], max_pending_bytes=5000)
        box.put(rejected("t", 0, Raw(b"k", b"v")))
        box.flush(10)
        broker.kill()
        box.put(rejected("t", 1, Raw(b"k", b"v")))
        with pytest.raises(DeadLetterDelayed, match="1 dead letters wait"):
            box.flush(1)
        with pytest.raises(DeadLetterError, match="at most 5000"):
            for offset in range(2, 20):
                box.put(rejected("t", offset, Raw(b"k", b"v")))
        broker.start()
        box.flush(60)
        offsets = [one.origin.offset for one in dead_letters(where, ["t.dlq"])]
        assert offsets[:2] == [0, 1] and len(offsets) == len(set(offsets))
        box.close()
    finally:
        broker.kill()


class Answer(KafkaFuture):
    def get(self, timeout: float) -> None: ...


class FakeProducer:
    """Stands in for the client's."""

    made: list[FakeProducer]
    answers: list[Exception]
    """To the letters to come, of all producers; without one a letter is acknowledged."""
    away: list[Exception]
    """Raised by the producers to come, one each."""

    def __init__(self, **settings: Any) -> None:
        if self.away:
            raise self.away.pop(0)
        self.made.append(self)
        self.sent: list[bytes | None] = []
        self.refuses: Exception | None = None
        self.closed = False

    def send(self, topic: str, value: bytes | None, key: bytes | None, headers: Any) -> Any:
        if self.refuses:
            raise self.refuses
        self.sent.append(value)
        future = Answer()
        if self.answers:
            future.failure(self.answers.pop(0))
        else:
            future.success(None)
        return future

    def close(self, timeout: float) -> None:
        self.closed = True


@pytest.fixture
def producers(monkeypatch: pytest.MonkeyPatch) -> Any:
    own = type("Own", (FakeProducer,), {"made": [], "answers": [], "away": []})
    monkeypatch.setattr("streams.kafka.dead_letters.KafkaProducer", own)
    monkeypatch.setattr("streams.kafka.dead_letters.KafkaDeadLetters._prepare_topics", lambda *_: {"t": 10**6})
    return own


def test_a_letter_given_up_while_the_broker_is_away_waits_for_a_new_producer(producers: Any) -> None:
    # given a broker that stays away for longer than the client tries, and than a new client needs to give up
    box = KafkaDeadLetters(Connection(["x:1"]), ["t"])
    producers.answers += [KafkaTimeoutError("expired")]
    producers.away += [KafkaTimeoutError("Unable to bootstrap")] * 2
    # when letters are put and the agent wants to commit
    box.put(rejected("t", 0, Raw(b"k", b"a")))
    box.put(rejected("t", 1, Raw(b"k", b"b")))
    with pytest.raises(DeadLetterDelayed, match=r"2 dead letters wait for x:1 \(KafkaTimeoutError"):
        box.flush(0.05)
    # then they are kept, in order, for when it is back
    box.flush(5)
    first, second = producers.made
    assert first.closed and second.sent == [b"a", b"b"]
    box.close()
    assert second.closed


def test_letters_that_cannot_be_sent_hold_up_nothing_and_count_against_the_bound(producers: Any) -> None:
    box = KafkaDeadLetters(Connection(["x:1"]), ["t"], max_pending_bytes=50_000)
    (producer,) = producers.made
    producer.refuses = KafkaTimeoutError("no metadata")
    tried = []
    producer.send = lambda *_: tried.append(1) or FakeProducer.send(producer, *_)

    for offset in range(20):
        box.put(rejected("t", offset, Raw(b"k", b"v")))
    assert len(tried) == 1
    with pytest.raises(DeadLetterDelayed, match="20 dead letters wait"):
        box.flush(0.05)
    assert len(tried) <= 3
    with pytest.raises(DeadLetterError, match="at most 50000"):
        for offset in range(20, 100):
            box.put(rejected("t", offset, Raw(b"k", b"v")))

    producer.refuses = None
    box.flush(5)
    assert len(producer.sent) < 50 and box._waiting_bytes == 0


def test_a_broker_away_for_longer_than_the_client_tries_costs_no_letter(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hasty(KafkaProducer):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings, delivery_timeout_ms=1000, request_timeout_ms=500)

    monkeypatch.setattr("streams.kafka.dead_letters.KafkaProducer", Hasty)
    monkeypatch.setattr("streams.kafka.connection.CONNECT_S", 1)
    broker = start_broker(tmp_path / "broker")
    try:
        where = Connection([broker.bootstrap])
        admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
        admin.create_topics({"t": {"num_partitions": 1, "replication_factor": 1}}, wait_for_metadata=True)
        admin.close()
        box = KafkaDeadLetters(where, ["t"])
        broker.kill()
        deadline = time.monotonic() + 5
        for offset in itertools.count():
            box.put(rejected("t", offset, Raw(b"k", b"v")))
            began = time.monotonic()
            with pytest.raises(DeadLetterDelayed):
                box.flush(0.2)
            assert time.monotonic() - began < 1.5
            if time.monotonic() > deadline:
                break
        broker.start()
        box.flush(60)
        offsets = [one.origin.offset for one in dead_letters(where, ["t.dlq"])]
        assert set(offsets) == set(range(offset + 1))
        box.close()
        wait_until(lambda: not any("producer" in thread.name for thread in threading.enumerate()), 10)
    finally:
        broker.kill()


def test_what_the_codec_rejects_comes_back_from_the_topic_as_it_was(
    set_aside: Any, bootstrap: str, new_topic: Any, producer: KafkaProducer
) -> None:
    topic = new_topic()
    producer.send(topic, b"no image", b"k", [("label", b"cat"), ("x", b"")])
    producer.flush()
    codec = Codec(max_image_bytes=10**6, max_image_pixels=10**6, max_label_chars=100)
    source = KafkaSource(Connection([bootstrap]), [topic], codec, group="")
    source.seek({})
    items: list[Any] = []
    while not items:
        items += source.poll(1)
    source.close()
    box = set_aside(topic)
    box.put(items[0])
    box.flush(10)
    (letter,) = dead_letters(Connection([bootstrap]), [f"{topic}.dlq"])
    assert original(letter.raw) == Raw(b"k", b"no image", (("label", b"cat"), ("x", b"")))
    assert letter.origin.reason == "unsupported_format"
