"""A Kafka client that does what a test says, also what no cluster can be brought to do."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

from streams.kafka.connection import Connection
from streams.kafka.record_batches import Message
from streams.record import Partition, Raw
from tests.kafka.records import JPEG

HERE = Partition("t", 0)


def message(offset: int, label: str = "cat", epoch: int = -1) -> Message:
    return Message(offset, 1000 + offset, Raw(None, JPEG, (("label", label.encode()),)), epoch)


class FakeClient:
    """Stands in for streams.kafka.source.Client: `script` is what the polls of all clients do, one after the other."""

    script: list[Any]
    made: list[FakeClient]
    log_ends: dict[Partition, int | None]
    """Where the epoch that is asked for ended, for partitions that know."""

    def __init__(self, connection: Connection, group: str, fetch_bytes: int) -> None:
        self.made.append(self)
        self.positions: dict[Partition, int] = {}
        self.sought: list[int] = []
        self.closed = False

    def poll(self, timeout_s: float) -> dict[Partition, list[Any]]:
        step = self.script.pop(0) if self.script else None
        if isinstance(step, Exception):
            raise step
        if callable(step):
            step()
        if not isinstance(step, list):
            time.sleep(0.01)
            return {}
        return {HERE: step}

    def describe(self, topics: Iterable[str]) -> list[dict[str, Any]]:
        return [{"name": "t", "error_code": 0, "topic_id": "id", "partitions": [{"partition_index": 0}]}]

    def retention_s(self, topics: Iterable[str]) -> float:
        return math.inf

    def epoch_ends(self, epochs: dict[Partition, int]) -> dict[Partition, int | None]:
        return {where: end for where, end in self.log_ends.items() if where in epochs}

    def assign(self, positions: dict[Partition, int], epochs: dict[Partition, int]) -> None:
        self.positions, self.epochs = dict(positions), dict(epochs)

    def seek(self, where: Partition, offset: int) -> None:
        self.sought.append(offset)

    def reached(self) -> dict[Partition, tuple[int, int]]:
        return {}

    def beginnings(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return dict.fromkeys(partitions, 0)

    def ends(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return dict.fromkeys(partitions, 100)

    def end(self, where: Partition) -> int:
        return 100

    def pause(self, wanted: set[Partition]) -> None: ...

    def commit(self, offsets: dict[Partition, int], wait: bool) -> None: ...

    def close(self) -> None:
        self.closed = True
