"""The kills once more, on a topic: the agent reads from a real broker, which is killed and held up as well.

`python -m tests.monkey.brokers --count 30 --seed 7`; without Java and Kafka's jars it skips and says so.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient

from streams.kafka.connection import Connection
from streams.kafka.replay import dead_letters
from tests.kafka.broker import Broker, BrokerUnavailable
from tests.monkey.kills import CLASSES_PER_TASK, TASKS, Monkey, main
from tests.monkey.runs import Run

PARTITIONS = 2


class BrokerMonkey(Monkey):
    """Its stream is a topic of two partitions, whose order is the broker's clock's."""

    def prepare_stream(self, images: Path) -> dict[str, object]:
        self.broker = Broker(self.folder / "broker").start()
        admin = KafkaAdminClient(bootstrap_servers=self.broker.bootstrap)
        configs = {"message.timestamp.type": "LogAppendTime"}
        topic = {"num_partitions": PARTITIONS, "replication_factor": 1, "configs": configs}
        admin.create_topics({"t": topic}, wait_for_metadata=True)
        admin.close()
        producer = KafkaProducer(bootstrap_servers=self.broker.bootstrap)
        self.total = 0
        for task in range(TASKS):
            for number in range(CLASSES_PER_TASK):
                name = f"class {task * CLASSES_PER_TASK + number}"
                for file in sorted((images / name).iterdir()):
                    headers = [("label", name.encode())]
                    producer.send("t", file.read_bytes(), b"key", headers, partition=self.total % PARTITIONS)
                    self.total += 1
            producer.flush()
            time.sleep(0.1)  # the mark's time is later than that of all before it
            producer.send("t", None, b"key", [("gapstream.control", b"task-boundary")], partition=0)
            self.total += 1
            producer.flush()
            time.sleep(0.1)
        producer.close()
        return {
            "source.kind": "kafka",
            "source.kafka.bootstrap_servers": json.dumps([self.broker.bootstrap]),
            "source.kafka.topics": "t",
            "source.kafka.group": "",
            "source.kafka.merge_wait_s": 0.2,
        }

    def settings(self, state: Path) -> dict[str, object]:
        return super().settings(state) | {"source.kafka.dead_letter_topic": self.letter_topic(state)}

    def letter_topic(self, state: Path) -> str:
        return f"dlq-{state.parent.name}-{state.name}"

    def ended(self, state: Path) -> bool:
        try:
            manifest = json.loads((state / "CURRENT/manifest.json").read_text())
        except OSError:  # none yet, or looked at while it changes
            return False
        return sum(offset for *_, offset in manifest["offsets"]) >= self.total

    def letters(self, state: Path) -> frozenset[tuple[int, int, str]]:
        found = dead_letters(Connection([self.broker.bootstrap]), [self.letter_topic(state)])
        origins = (letter.origin for letter in found)
        return frozenset((one.partition.number, one.offset, str(one.reason)) for one in origins if one.partition)

    def disturb_stream(self, chance: random.Random) -> Counter[str]:
        how = chance.random()
        process = self.broker._process
        if how < 0.15:
            self.broker.kill()
            self.broker.start()
            return Counter({"broker kill": 1})
        if how < 0.3 and process is not None and not os.fork():  # while the next agent runs
            time.sleep(chance.uniform(0.2, 2))
            process.send_signal(signal.SIGSTOP)
            time.sleep(chance.uniform(0.1, 2))
            process.send_signal(signal.SIGCONT)
            os._exit(0)
        return Counter({"broker stop": 1} if how < 0.3 else {})

    def close(self) -> None:
        self.broker.kill()


def on_a_broker(run: Run) -> None:
    try:
        main(run, BrokerMonkey)
    except BrokerUnavailable as why:
        run.say(f"skipped: {why}")


if __name__ == "__main__":
    Run("brokers", 30).watched(on_a_broker)
