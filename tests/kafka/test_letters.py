"""Dead letters through a real broker: acknowledged, complete, listed and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer
from kafka.admin import KafkaAdminClient

from streams.connection import Connection
from streams.formats import Codec, original
from streams.kafka import KafkaDeadLetters, KafkaSource
from streams.letters import letters, replay
from streams.record import Partition, Raw, Reason, Rejected
from streams.source import DeadLetterDelayed, DeadLetterError
from tests.kafka.conftest import start_broker


@pytest.fixture
def set_aside(bootstrap: str) -> Iterator[Callable[..., KafkaDeadLetters]]:
    opened: list[KafkaDeadLetters] = []

    def make(topic: str, **options: Any) -> KafkaDeadLetters:
        opened.append(KafkaDeadLetters(Connection([bootstrap]), [topic], **options))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def rejected(topic: str, offset: int, raw: Raw | None, reason: Reason = Reason.BOMB) -> Rejected:
    return Rejected(Partition(topic, 0), offset, reason, "why", raw)


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

    found = list(letters(Connection([bootstrap]), [f"{topic}.dlq"]))

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
    (letter,) = letters(Connection([bootstrap]), [f"{topic}.dlq"])
    assert letter.raw.value is None and letter.origin.dropped == "value" and ("label", b"cat") in letter.raw.headers


def test_a_limit_that_was_lowered_later_is_found_out(
    set_aside: Any, bootstrap: str, new_topic: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.kafka._longest_message", lambda admin, topic: 10**6)
    topic = new_topic()
    new_topic(name=f"{topic}.dlq", **{"max.message.bytes": "20000"})
    box = set_aside(topic)
    box.put(rejected(topic, 0, Raw(b"k", bytes(30_000))))
    box.put(rejected(topic, 1, Raw(b"k", b"small")))
    box.flush(10)
    assert {one.origin.offset for one in letters(Connection([bootstrap]), [f"{topic}.dlq"])} == {0, 1}


def test_a_dead_letter_topic_is_made_only_when_allowed(set_aside: Any, new_topic: Any) -> None:
    topic = new_topic()
    with pytest.raises(DeadLetterError, match=rf"no dead-letter topic {topic}\.dlq"):
        set_aside(topic, create=False)
    set_aside(topic)
    set_aside(topic, create=False)


def test_replay_sends_each_record_again_once(
    set_aside: Any, bootstrap: str, new_topic: Any, admin: KafkaAdminClient
) -> None:
    topic = new_topic()
    where = Connection([bootstrap])
    box = set_aside(topic)
    raw = Raw(b"k", b"v", (("label", b"cat"), ("x", None)))
    box.put(rejected(topic, 5, raw))
    box.put(rejected(topic, 5, raw))
    box.put(rejected(topic, 6, raw, Reason.EMPTY))
    box.put(rejected(topic, 7, None, Reason.EMPTY))
    box.flush(10)
    dead = [f"{topic}.dlq"]

    assert replay(where, dead, ["bomb"], topic) == {"sent": 1, "twice": 1}
    assert replay(where, dead, ["bomb"], topic) == {}
    assert replay(where, dead, ["bomb"], topic, again=True) == {"sent": 1, "twice": 1}

    consumer = KafkaConsumer(topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest", consumer_timeout_ms=2000)
    sent = [Raw(message.key, message.value, tuple(message.headers)) for message in consumer]
    consumer.close()
    assert sent == [Raw(b"k", b"v", (("label", b"cat"), ("x", b"")))] * 2


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
        offsets = [one.origin.offset for one in letters(where, ["t.dlq"])]
        assert offsets[:2] == [0, 1] and len(offsets) == len(set(offsets))
        box.close()
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
    (letter,) = letters(Connection([bootstrap]), [f"{topic}.dlq"])
    assert original(letter.raw) == Raw(b"k", b"no image", (("label", b"cat"), ("x", b"")))
    assert letter.origin.reason == "unsupported_format"
