"""A fleet on a real broker: agents with a topic each, which answer alike in the end whatever is killed meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient

from agent.cli import main
from agent.layout import FLEET, current_commit
from exporter.runtime import Classifier
from streams.blobs import Blob, Blobs, cut, kept
from streams.kafka.connection import Connection
from streams.kafka.fleet import FleetTopic
from streams.source import StreamError
from tests.kafka.agents import wait_until
from tests.kafka.fleet_agent import UNION
from tests.kafka.records import send
from tests.test_trainer import images_of

COUNTING = "tests.kafka.fleet_agent:CountingLearner"
SITES = ("a", "b", "c")


class FleetAgent:
    """An agent process of a site; `start` again after `kill`."""

    def __init__(
        self, folder: Path, site: str, bootstrap: str, topic: str, fleet: str, learner: str, **keys: Any
    ) -> None:
        self.state, self.learner = folder / site, learner
        self.keys = {
            "source.kafka.bootstrap_servers": json.dumps([bootstrap]), "source.kafka.topics": json.dumps([topic]),
            "source.kafka.group": "", "source.kafka.merge_wait_s": "0.2", "fleet.topic": fleet, "fleet.site": site,
            "fleet.pause_s": "0.5", "fleet.min_images": "1", **keys,
        }  # fmt: skip
        self.state.mkdir()
        self.process: subprocess.Popen[bytes] | None = None

    def options(self) -> list[str]:
        return [word for pair in self.keys.items() for word in ("--set", "=".join(pair))]

    def start(self) -> None:
        with (self.state / "agent.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.kafka.fleet_agent", self.state, self.learner,
                 *("=".join(pair) for pair in self.keys.items())],
                stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def file(self, name: str) -> bytes:
        """Of the current commit; empty while there is none, or it is replaced this moment."""
        with contextlib.suppress(OSError):
            commit = current_commit(self.state)
            return (commit / name).read_bytes() if commit else b""
        return b""

    def union(self) -> dict[str, int]:
        return json.loads(self.file(UNION) or b"{}")


@pytest.fixture
def make(bootstrap: str, new_topic: Callable[..., str], tmp_path: Path) -> Iterator[Callable[..., list[FleetAgent]]]:
    """`make(fleet, learner)` gives an agent for each of SITES, with a topic of its own; none is started."""
    made: list[FleetAgent] = []

    def agents(fleet: str, learner: str, **keys: Any) -> list[FleetAgent]:
        made.extend(FleetAgent(tmp_path, site, bootstrap, new_topic(), fleet, learner, **keys) for site in SITES)
        return made

    yield agents
    for agent in made:
        agent.kill()


def topic_of(agent: FleetAgent) -> str:
    return json.loads(agent.keys["source.kafka.topics"])[0]


def test_killed_agents_of_a_fleet_answer_alike_in_the_end(
    make: Any, producer: KafkaProducer, bootstrap: str, admin: KafkaAdminClient, capsys: pytest.CaptureFixture[str]
) -> None:
    # given three sites, each of which is killed again and again while its stream comes and the others publish
    fleet, rng = f"fleet-{time.time_ns()}", random.Random(3)
    agents = make(fleet, COUNTING, **{"task.samples": "4"})
    for agent in agents:
        agent.start()
    expected: Counter[str] = Counter()
    for turn in range(9):
        agent = agents[turn % 3]
        labels = [rng.choice((agent.keys["fleet.site"], "common")) for _ in range(4)]
        send(producer, topic_of(agent), labels)
        expected.update(labels)
        time.sleep(rng.random())
        if turn >= 3:
            agent.kill()
            agent.start()
    # then all of them answer with what all learned, and know it again after a restart
    wait_until(lambda: all(agent.union() == expected for agent in agents), 60)
    [config] = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, fleet)], config_filter="all")[
        "topic"
    ].values()
    assert config["cleanup.policy"]["value"] == "compact"
    # and what each has learned is its own alone
    for agent in agents:
        own = json.loads(agent.file("learner.safetensors"))["counts"]
        assert sum(own.values()) == 12 and own.keys() <= {agent.keys["fleet.site"], "common"}
    # when one leaves, the others drop it
    a, b, c = agents
    c.kill()
    assert main(["fleet", *a.options(), "--set", f"state.path={a.state}"]) == 0
    shown = capsys.readouterr().out
    assert "a (this site) answers" in shown and "2 other sites" in shown
    assert main(["fleet", "forget", "c", *a.options()]) == 0
    left = expected - Counter(json.loads(c.file("learner.safetensors"))["counts"])
    wait_until(lambda: a.union() == b.union() == left, 60)
    assert main(["fleet", "forget", "c", *a.options()]) == 0 and "has nothing of c" in capsys.readouterr().out
    # and when it comes back, they take it up again
    c.start()
    wait_until(lambda: all(agent.union() == expected for agent in agents), 60)


def test_chunks_fit_the_topic_and_come_back_from_it(bootstrap: str, new_topic: Any, tmp_path: Path) -> None:
    topic = new_topic(3, **{"max.message.bytes": "20000", "cleanup.policy": "compact"})
    data = random.Random(1).randbytes(200_000)
    writer, reader = (FleetTopic(Connection([bootstrap]), topic, {}) for _ in range(2))
    assert writer.chunk_bytes < 20_000
    store = Blobs(tmp_path / FLEET, "a", 2**20, lambda site, path: None)
    for sequence in (1, 2):
        blob = Blob("b", sequence, 7, hashlib.sha256(data).hexdigest(), len(data), writer.chunk_bytes)
        writer.send("b", cut(blob, data))
    deadline = time.monotonic() + 20
    while not store.known() or store.known()["b"].sequence < 2:
        for message in reader.read(0.2):
            store.take(message.key, message.value, message.headers)
        assert time.monotonic() < deadline
    assert {site: path.read_bytes() for site, (_, path) in kept(tmp_path / FLEET).items()} == {"b": data}
    # reading goes on where it was, and begins anew where that place is gone
    again = FleetTopic(Connection([bootstrap]), topic, reader.positions)
    lost = FleetTopic(Connection([bootstrap]), topic, {where: 10**9 for where in reader.positions})
    assert not again.anew and again.caught_up and lost.anew
    for one in (writer, reader, again, lost):
        one.close()


def test_a_cluster_that_is_away_is_an_error_and_no_wait_without_end() -> None:
    with pytest.raises(StreamError, match="cannot connect"):
        FleetTopic(Connection(["127.0.0.1:1"]), "fleet", {})


@pytest.mark.slow
def test_killed_trainers_of_a_fleet_release_the_same_answers_in_the_end(
    make: Any, producer: KafkaProducer, bootstrap: str
) -> None:
    # given three sites that learn classes of their own and one in common, with towers that stay the same everywhere
    keys = {
        "task.samples": "16", "model.threads": "1", "method.gapstream.features": "64", "release.text": "false",
        "release.max_batch": "4", "evaluation.holdout_fraction": "0", "method.gapstream.drift_budget": "0",
    }  # fmt: skip
    agents = make(f"fleet-{time.time_ns()}", "", **keys)
    classes = [("ship", "cat"), ("dog", "cat"), ("frog", "truck")]
    for start, (agent, names) in enumerate(zip(agents, classes, strict=True)):
        for label, image in images_of(*names, start=20 * start):
            producer.send(topic_of(agent), image, None, [("label", label.encode())])
    producer.flush()
    rng = random.Random(5)
    for agent in agents:
        agent.start()
    # when each is killed twice, wherever it is
    for agent in agents * 2:
        time.sleep(rng.uniform(2, 12))
        agent.kill()
        agent.start()
    # then all three releases have the five classes, of all images, and answer alike
    names = ["cat", "dog", "frog", "ship", "truck"]

    def images(agent: FleetAgent) -> int:
        report = json.loads(agent.file("report.json") or b"{}")
        own = sum(task["samples"] for task in report.get("history", ()))
        return own + sum(site["images"] for site in report.get("fleet", {}).get("sites", ()))

    wait_until(lambda: all(images(agent) == 96 for agent in agents), 400)
    shown = [image for name in names for _, image in images_of(name, count=4, start=90)]
    answers = []
    for agent in agents:
        predictions = Classifier(agent.state).classify(shown, len(names))
        answers.append([dict(zip(one.labels, one.scores, strict=True)) for one in predictions])
    for other in answers[1:]:
        for one, two in zip(answers[0], other, strict=True):
            assert two == pytest.approx(one, abs=5e-3)
