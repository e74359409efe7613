"""Fixtures of the tests that need a broker: a session-wide one, topics of their own, and what a test sends."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient

from tests.kafka.broker import Broker, BrokerUnavailable


def start_broker(folder: Path, **overrides: str) -> Broker:
    """A started broker; skips the test where none can be had, unless CI is set."""
    try:
        return Broker(folder, **overrides).start()
    except BrokerUnavailable as why:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(why))


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A real broker of this session, for tests that need its secure listener or its own files."""
    started = start_broker(tmp_path_factory.mktemp("kafka"))
    yield started
    started.kill()


@pytest.fixture(scope="session")
def bootstrap(request: pytest.FixtureRequest) -> str:
    """host:port of the cluster: KAFKA_BOOTSTRAP_SERVERS, or the broker started for this session."""
    given = os.environ.get("KAFKA_BOOTSTRAP_SERVERS")
    return given or request.getfixturevalue("broker").bootstrap


@pytest.fixture(scope="session")
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
