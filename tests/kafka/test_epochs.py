"""Leader epochs: a log that was truncated and has grown again is not taken for the one that was read."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient
from kafka.errors import LogTruncationError, UnsupportedVersionError

from streams.kafka.connection import Connection
from streams.kafka.epochs import Epochs, ends_of
from streams.kafka.record_batches import Unreadable
from streams.kafka.source import KafkaSource
from streams.record import Partition
from streams.source import PositionError
from tests.kafka.agents import wait_until
from tests.kafka.broker import Broker, start_broker
from tests.kafka.fake_client import HERE, message
from tests.kafka.records import CODEC, labels, offsets, read, send

OTHER = Partition("t", 1)


def test_the_epoch_before_an_offset_is_that_of_the_last_record() -> None:
    epochs = Epochs()
    epochs.begin({HERE: 5, OTHER: 0}, {HERE: 2})
    assert epochs.before({HERE: 5, OTHER: 0}) == {HERE: 2}
    # given records 5 and 6 of one epoch, a mark, and record 8 of a later one
    for next_offset, epoch in ((6, 2), (7, 2), (9, 4)):
        epochs.read(HERE, next_offset, epoch)
    # then the mark counts to the later one: the earlier may have ended before it
    assert [epochs.before({HERE: at})[HERE] for at in (5, 6, 7, 8, 9)] == [2, 2, 2, 4, 4]
    # and one that cannot be read makes it unknown
    epochs.read(HERE, 12, -1)
    assert epochs.before({HERE: 12}) == {} and epochs.before({HERE: 9}) == {HERE: 4}
    epochs.read(HERE, 13, 4)
    assert epochs.before({HERE: 13, OTHER: 0}) == {HERE: 4}


def test_epochs_before_a_commit_are_forgotten_and_its_own_is_not() -> None:
    epochs = Epochs()
    epochs.begin({HERE: 0}, {})
    for number in range(100):
        epochs.read(HERE, number + 1, number)
    epochs.forget({HERE: 60, OTHER: 3})
    assert len(epochs._starts[HERE]) == 41
    assert epochs.before({HERE: 60}) == {HERE: 59} and epochs.before({HERE: 59}) == {}


def test_a_commit_s_epochs_are_those_of_its_records(scripted: Callable[..., Any]) -> None:
    source, made = scripted([message(0, epoch=1), message(1, epoch=1), message(2, epoch=3)], ValueError("odd"))
    assert offsets(read(source, 3)) == [0, 1, 2]
    assert source.epochs({HERE: 2}) == {HERE: 1} and source.epochs({HERE: 3}) == {HERE: 3}
    # and a new client is told, so that it can notice a truncation itself
    wait_until(lambda: len(made) == 2 and made[1].positions == {HERE: 3}, 10)
    assert made[1].epochs == {HERE: 3}


def test_behind_a_batch_that_cannot_be_read_nothing_is_claimed(scripted: Callable[..., Any]) -> None:
    broken = Unreadable(1, 4, ValueError("checksum"))
    source, _ = scripted([message(0, epoch=1), broken], [broken])
    read(source, 4)
    assert source.epochs({HERE: 4}) == {} and source.epochs({HERE: 1}) == {HERE: 1}


def test_whoever_knows_of_a_gap_finds_the_epoch_behind_it(scripted: Callable[..., Any]) -> None:
    # given a commit that is moved behind marks of a later epoch in the moment in which they are noticed
    go_on, found = threading.Event(), []
    source, _ = scripted([message(0, epoch=1)], go_on.wait, [message(5, epoch=3)])
    assert offsets(read(source, 1)) == [0]
    notice = source._gaps.nothing_before

    def noticed(partition: Partition, position: int) -> None:
        notice(partition, position)
        found.append((source.past_marks({HERE: 1}), source.epochs({HERE: position})))

    source._gaps.nothing_before = noticed
    go_on.set()
    assert offsets(read(source, 1)) == [5]
    # then it does not claim the earlier one, which ended before the marks: that would look like a truncation
    assert found == [({HERE: 5}, {HERE: 3})]


@pytest.mark.parametrize("end", [7, None])
def test_a_log_truncated_below_a_commit_stops_or_is_gone_on_with_where_it_differs(
    end: int | None, scripted: Callable[..., Any]
) -> None:
    # given a log whose records from `end` on are others by now, and that is longer than ever
    stopping, made = scripted()
    type(made[0]).log_ends = {HERE: end}
    with pytest.raises(PositionError, match=r"t/0: the log has 0 to 100, next was 10, and what came before"):
        stopping.seek({HERE: 10}, {HERE: 2})
    skipping, made = scripted(on_lost="skip")
    type(made[0]).log_ends = {HERE: end}
    # when it is gone on with, then where it differs; where that is cannot be told of an epoch it never had
    skipping.seek({HERE: 10}, {HERE: 2})
    expected = 10 if end is None else end
    assert skipping.positions == {HERE: expected} and made[0].positions == {HERE: expected}
    assert made[0].epochs == {} == skipping.epochs({HERE: expected})
    assert skipping.skipped == {"t": 0}


def test_a_commit_without_epochs_and_an_epoch_that_still_holds_go_on(scripted: Callable[..., Any]) -> None:
    source, made = scripted()
    type(made[0]).log_ends = {HERE: 10}
    source.seek({HERE: 11})
    assert source.positions == {HERE: 11}
    source.seek({HERE: 10}, {HERE: 2})
    assert source.positions == {HERE: 10} and source.epochs({HERE: 10}) == {HERE: 2}


@pytest.mark.parametrize("on_lost", ["stop", "skip"])
def test_a_log_truncated_below_what_was_read_stops_the_stream(scripted: Callable[..., Any], on_lost: str) -> None:
    records = [message(n, epoch=2) for n in range(5)]
    source, made = scripted(records, None, LogTruncationError({}), on_lost=on_lost)
    type(made[0]).log_ends = {HERE: 3}
    assert offsets(read(source, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(PositionError, match=r"truncated|no longer has"):
        read(source, 1)


def test_a_truncated_log_is_not_vouched_for(scripted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    source, made = scripted([message(n, epoch=2) for n in range(5)])
    asked: list[Any] = []
    ends: dict[Partition, int | None] = {HERE: 5}

    def answer(connection: Connection, topics: Any, epochs: Any) -> Any:
        asked.append(epochs)
        return made[0].describe(topics), ends

    monkeypatch.setattr("streams.kafka.topics.ask_anew", answer)
    read(source, 5)
    assert source.vouches(5) and asked == [{HERE: 2}]
    for end in (4, None):
        ends[HERE] = end
        with pytest.raises(PositionError, match="t/0 on x:1 was truncated below what was read; stopping with nothing"):
            source.vouches(5)


def test_a_cluster_that_knows_no_epochs_has_none() -> None:
    class Old:
        def __init__(self) -> None:
            self._manager = self

        def run(self, *_: Any) -> None:
            raise UnsupportedVersionError("OffsetForLeaderEpoch")

    assert ends_of(Old(), {HERE: 3}) == {}  # type: ignore[arg-type]


def _produce(broker: Broker, topic: str, names: list[str]) -> None:
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap, enable_idempotence=True)
    send(producer, topic, names)
    producer.close()


def test_a_restarted_broker_costs_nothing_and_a_truncated_log_is_noticed(tmp_path: Path) -> None:
    # given a topic with an older copy of its log, as a replica has that lagged behind
    broker = start_broker(tmp_path / "broker")
    opened: list[KafkaSource] = []

    def source(**options: Any) -> KafkaSource:
        opened.append(KafkaSource(Connection([broker.bootstrap]), ["t"], CODEC, group="", merge_wait_s=0.2, **options))
        return opened[-1]

    try:
        admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
        admin.create_topics({"t": {"num_partitions": 1, "replication_factor": 1}}, wait_for_metadata=True)
        admin.close()
        _produce(broker, "t", ["a0", "a1", "a2"])
        broker.stop()
        log, copy = tmp_path / "broker/data/t-0", tmp_path / "copy"
        shutil.copytree(log, copy)
        broker.start()
        _produce(broker, "t", ["b3", "b4"])
        first = source()
        first.seek({})
        assert labels(read(first, 5, 60)) == ["a0", "a1", "a2", "b3", "b4"]
        here = Partition("t", 0)
        middle, end = first.epochs({here: 3}), first.epochs({here: 5})
        # the broker's restart has raised the epoch
        assert middle[here] < end[here]

        # when it is restarted, reading goes on and the source vouches for what was read
        broker.stop()
        broker.start()
        _produce(broker, "t", ["c5"])
        assert labels(read(first, 1, 60)) == ["c5"]
        wait_until(lambda: first.vouches(5), 60)
        again = source()
        again.seek({here: 5}, end)
        assert labels(read(again, 1, 60)) == ["c5"]

        # and when the older copy is elected, and has grown beyond the position since
        broker.stop()
        shutil.rmtree(log)
        shutil.copytree(copy, log)
        broker.start()
        new = [f"d{n}" for n in range(3, 12)]
        _produce(broker, "t", new)

        # then it is noticed while running, at a commit and at a start
        def noticed() -> bool:
            first.vouches(1)
            return False

        with pytest.raises(PositionError, match="truncated below what was read"):
            wait_until(noticed, 60)
        with pytest.raises(PositionError, match=r"truncated|no longer has"):
            read(first, 1, 60)
        with pytest.raises(PositionError, match=r"next was 5, and what came before that was replaced"):
            source().seek({here: 5}, end)
        # and a commit before that place is gone on with, without a word
        before = source()
        before.seek({here: 3}, middle)
        assert labels(read(before, 9, 60)) == new
        skipping = source(on_lost="skip")
        skipping.seek({here: 5}, end)
        assert skipping.positions == {here: 3} and labels(read(skipping, 9, 60)) == new
    finally:
        for one in opened:
            one.close()
        broker.kill()
