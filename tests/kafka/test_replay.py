"""Dead letters are sent again to where they came from, each once."""

from __future__ import annotations

from typing import Any

from kafka import KafkaConsumer
from kafka.admin import KafkaAdminClient

from streams.kafka.connection import Connection
from streams.kafka.replay import replay
from streams.record import Raw, Reason
from tests.kafka.records import rejected


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


def test_what_was_replayed_for_one_reason_is_not_replayed_with_all_the_others(
    set_aside: Any, bootstrap: str, new_topic: Any
) -> None:
    topic = new_topic()
    box = set_aside(topic)
    raw = Raw(b"k", b"v")
    reasons = [Reason.BOMB, Reason.EMPTY, Reason.MISSING_LABEL]
    for offset, reason in enumerate(reasons):
        box.put(rejected(topic, offset, raw, reason))
    box.flush(10)

    def sent(*reasons: str) -> int:
        return replay(Connection([bootstrap]), [f"{topic}.dlq"], reasons, topic)["sent"]

    assert sent("bomb") == 1
    assert sent("bomb", "empty") == 1
    assert sent() == 1
    assert [sent(), sent("bomb"), sent("empty", "missing_label")] == [0, 0, 0]
    box.put(rejected(topic, 3, raw, Reason.BOMB))
    box.put(rejected(topic, 4, raw, Reason.EMPTY))
    box.flush(10)
    assert [sent("empty"), sent("empty"), sent(), sent()] == [1, 0, 1, 0]
