"""Fixtures of the tests that need a broker: one for all of them, topics of their own, and what a test sends."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient

from streams.kafka.connection import Connection
from streams.kafka.dead_letters import KafkaDeadLetters
from streams.kafka.source import KafkaSource
from streams.record import Offsets
from tests.kafka.broker import Broker, start_broker
from tests.kafka.fake_client import FakeClient
from tests.kafka.records import CODEC, Open


@pytest.fixture(scope="package")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A real broker while these tests run, for those that need its secure listener or its own files."""
    started = start_broker(tmp_path_factory.mktemp("kafka"))
    yield started
    started.kill()


@pytest.fixture(scope="package")
def bootstrap(request: pytest.FixtureRequest) -> str:
    """host:port of the cluster: KAFKA_BOOTSTRAP_SERVERS, or the broker started for these tests."""
    given = os.environ.get("KAFKA_BOOTSTRAP_SERVERS")
    return given or request.getfixturevalue("broker").bootstrap


@pytest.fixture(scope="package")
def admin(bootstrap: str) -> Iterator[KafkaAdminClient]:
    client = KafkaAdminClient(bootstrap_servers=bootstrap)
    yield client
    client.close()


@pytest.fixture
def new_topic(admin: KafkaAdminClient) -> Callable[..., str]:
    """`new_topic(partitions=1, **configs)` creates a topic nobody else uses and gives its name."""
    names = (f"t{uuid.uuid4().hex[:8]}-{number}" for number in itertools.count())

    def create(partitions: int = 1, name: str = "", **configs: str) -> str:
        topic = name or next(names)
        options = {"num_partitions": partitions, "replication_factor": 1, "configs": configs}
        admin.create_topics({topic: options}, wait_for_metadata=True)
        return topic

    return create


@pytest.fixture
def producer(bootstrap: str) -> Iterator[KafkaProducer]:
    client = KafkaProducer(
        bootstrap_servers=bootstrap, enable_idempotence=True, linger_ms=5, max_request_size=4 * 2**20
    )
    yield client
    client.close()


@pytest.fixture
def open_source(bootstrap: str) -> Iterator[Open]:
    """`open_source(*topics, at=offsets, **options)` gives a source that reads from `at`."""
    opened: list[KafkaSource] = []

    def make(*topics: str, at: Offsets | None = None, **options: Any) -> KafkaSource:
        source = KafkaSource(Connection([bootstrap]), topics, CODEC, **{"merge_wait_s": 0.2, "group": "", **options})
        opened.append(source)
        source.seek(at or {})
        return source

    yield make
    for source in opened:
        source.close()


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`scripted(step, ...)` gives a source and the clients it makes."""
    opened: list[KafkaSource] = []

    def make(*steps: Any, **options: Any) -> tuple[KafkaSource, list[FakeClient]]:
        own = type("Own", (FakeClient,), {"script": list(steps), "made": [], "log_ends": {}})
        monkeypatch.setattr("streams.kafka.source.Client", own)
        monkeypatch.setattr("streams.kafka.source._BACKOFF_S", 0.001)
        opened.append(KafkaSource(Connection(["x:1"]), ["t"], CODEC, **options))
        opened[-1].seek({})
        return opened[-1], own.made

    yield make
    for source in opened:
        source.close()


@pytest.fixture
def set_aside(bootstrap: str) -> Iterator[Callable[..., KafkaDeadLetters]]:
    opened: list[KafkaDeadLetters] = []

    def make(topic: str, **options: Any) -> KafkaDeadLetters:
        opened.append(KafkaDeadLetters(Connection([bootstrap]), [topic], **options))
        return opened[-1]

    yield make
    for one in opened:
        one.close()
