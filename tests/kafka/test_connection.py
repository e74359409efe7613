"""TLS, SASL and many partitions, codecs and topics at once; and that no secret is ever shown."""

from __future__ import annotations

import base64
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient

from agent.config import ConfigError, load, resolved, to_toml
from agent.parts import connection
from streams.formats import encode_image
from streams.kafka.connection import Connection
from streams.kafka.dead_letters import KafkaDeadLetters
from streams.kafka.replay import dead_letters
from streams.kafka.source import KafkaSource
from streams.record import Record, Rejected
from streams.source import StreamError
from tests.kafka.broker import PASSWORD, USER, Broker
from tests.kafka.records import CODEC, JPEG, read


def unsecured_token(lifetime_s: int = 3600) -> str:
    """A JSON web token without signature, which the test broker believes."""

    def part(content: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")

    now = int(time.time())
    return f"{part({'alg': 'none'})}.{part({'sub': USER, 'iat': now, 'exp': now + lifetime_s})}."


def secured(broker: Broker, mechanism: str, **credentials: Any) -> Connection:
    return Connection(
        [broker.secure_bootstrap], protocol="SASL_SSL", cafile=broker.cafile, mechanism=mechanism, **credentials
    )


def test_two_topics_with_twelve_partitions_three_codecs_tls_and_scram(
    broker: Broker, new_topic: Any, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text(PASSWORD + "\n")
    safe = secured(broker, "SCRAM-SHA-512", username=USER, password=tmp_path / "password")
    topics = [new_topic(12), new_topic(12)]
    rng = random.Random(1)
    sent = set()
    for codec in ("gzip", "lz4", "zstd"):
        producer = KafkaProducer(**safe.settings(), compression_type=codec, linger_ms=20)
        for number in range(200):
            topic, partition = rng.choice(topics), rng.randrange(12)
            value, headers = encode_image(f"{codec} {number}", JPEG)
            good = number % 20
            producer.send(topic, value if good else b"x", b"k", headers, partition=partition)
            sent.add((topic, f"{codec} {number}" if good else "rejected"))
        producer.flush()
        producer.close()

    orders = []
    for _ in range(2):
        source = KafkaSource(safe, topics, CODEC, group="secure", merge_wait_s=0.2)
        source.seek({})
        items = read(source, 600, 60)
        source.acknowledge({item.partition: item.offset + 1 for item in items})
        source.close()
        orders.append([(item.partition, item.offset) for item in items])
    box = KafkaDeadLetters(safe, topics)
    rejected = [item for item in items if isinstance(item, Rejected)]
    for item in rejected:
        box.put(item)
    box.flush(20)
    box.close()

    assert orders[0] == orders[1] and len(set(orders[0])) == 600
    assert len({partition for partition, _ in orders[0]}) == 24
    found = {(item.partition.topic, item.label if isinstance(item, Record) else "rejected") for item in items}
    assert found == sent
    assert sum(1 for _ in dead_letters(safe, [f"{topic}.dlq" for topic in topics])) == len(rejected) == 30


@pytest.mark.parametrize("mechanism", ["PLAIN", "OAUTHBEARER"])
def test_other_ways_to_log_in(mechanism: str, broker: Broker, new_topic: Any, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(unsecured_token())
    credentials = (
        {"username": USER, "password": PASSWORD} if mechanism == "PLAIN" else {"token_file": tmp_path / "token"}
    )
    source = KafkaSource(secured(broker, mechanism, **credentials), [new_topic()], CODEC, group="")
    source.seek({})
    assert not source.poll(0.1)
    source.close()


def test_a_wrong_password_and_an_unknown_certificate_are_said(
    broker: Broker, new_topic: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.kafka.connection.CONNECT_S", 6)
    topic = new_topic()
    wrong = secured(broker, "SCRAM-SHA-512", username=USER, password="wrong")
    with pytest.raises(StreamError, match=r"(?i)authentication") as refused:
        KafkaSource(wrong, [topic], CODEC)
    assert "wrong" not in str(refused.value) + repr(wrong)
    stranger = Connection(
        [broker.secure_bootstrap], protocol="SASL_SSL", mechanism="PLAIN", username=USER, password="x"
    )
    with pytest.raises(StreamError, match=r"(?i)certificate"):
        KafkaSource(stranger, [topic], CODEC)
    with pytest.raises(StreamError, match="absent"):
        secured(broker, "PLAIN", username=USER, password=Path("absent")).settings()


def test_secrets_come_from_the_environment_and_are_never_shown() -> None:
    env = {
        "GAPSTREAM_SOURCE__KAFKA__SECURITY__PROTOCOL": "SASL_SSL",
        "GAPSTREAM_SOURCE__KAFKA__SECURITY__MECHANISM": "PLAIN",
        "GAPSTREAM_SOURCE__KAFKA__SECURITY__USERNAME": "me",
        "GAPSTREAM_SOURCE__KAFKA__SECURITY__PASSWORD": "[s3cret",
        "GAPSTREAM_SOURCE__KAFKA__IMAGES__S3_SECRET_KEY": "s3cret too",
    }
    config = load(None, env)
    assert connection(config).settings()["sasl_plain_password"] == "[s3cret"
    shown = f"{to_toml(config)}{resolved(config)}{config!r}{connection(config)!r}{connection(config)}"
    assert "s3cret" not in shown and "me" in shown


def test_what_does_not_fit_together_is_said_without_the_secret(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[source.kafka.security]\npassword = 4711\nmechanism = "PLAIN"\n')
    with pytest.raises(ConfigError) as mistakes:
        load(file, {"GAPSTREAM_SOURCE__KIND": "kafka", "GAPSTREAM_SOURCE__KAFKA__START": "yesterday"})
    text = str(mistakes.value)
    assert "4711" not in text and "security.password" in text and "yesterday" in text
    file.write_text('[source]\nkind = "kafka"\n[source.kafka.security]\nprotocol = "SASL_SSL"\n')
    with pytest.raises(ConfigError, match="mechanism exactly with"):
        load(file, {})
    with pytest.raises(ConfigError, match=r"kafka\.topics is empty"):
        load(None, {"GAPSTREAM_SOURCE__KIND": "kafka"})


def test_an_administrator_can_see_how_far_the_agent_is(broker: Broker) -> None:
    admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
    offsets = admin.list_group_offsets("secure")["secure"]
    admin.close()
    assert sum(answer.offset for answer in offsets.values()) == 600
