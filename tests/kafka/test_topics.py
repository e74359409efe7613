"""Where reading begins and goes on, whatever happened to the topics and their logs meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
from kafka import KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient

from agent.config import Config
from agent.run import _cut_rule
from streams.kafka.connection import Connection
from streams.kafka.gaps import Gaps
from streams.kafka.source import KafkaSource
from streams.record import Partition
from streams.source import PositionError, StreamError
from tests.kafka.agents import wait_until
from tests.kafka.records import CODEC, Open, labels, read, send


def test_reading_goes_on_where_a_commit_ends(open_source: Open, producer: KafkaProducer, new_topic: Any) -> None:
    topic = new_topic(2)
    send(producer, topic, ["a0", "a1", "a2"], 0)
    send(producer, topic, ["b0", "b1"], 1)
    source = open_source(topic, at={Partition(topic, 0): 2, Partition(topic, 1): 1})
    assert labels(read(source, 2)) == ["a2", "b1"]
    assert source.positions == {Partition(topic, 0): 2, Partition(topic, 1): 1}


@pytest.mark.parametrize("start", ["earliest", "latest", "time"])
def test_without_a_commit_reading_begins_where_it_is_told(
    start: str, open_source: Open, producer: KafkaProducer, new_topic: Any
) -> None:
    topic = new_topic(**{"retention.ms": "-1"})  # the broker looks every second
    send(producer, topic, ["old"], timestamp_ms=1_600_000_000_000)
    send(producer, topic, ["middle"], timestamp_ms=1_700_000_000_000)
    source = open_source(topic, start="2023-01-01T00:00:00Z" if start == "time" else start)
    send(producer, topic, ["new"])
    expected = {"earliest": ["old", "middle", "new"], "latest": ["new"], "time": ["middle", "new"]}[start]
    assert labels(read(source, len(expected))) == expected


def test_commits_are_copied_to_the_group_and_read_only_when_asked(
    open_source: Open, producer: KafkaProducer, new_topic: Any, admin: KafkaAdminClient
) -> None:
    topic = new_topic()
    send(producer, topic, ["a", "b", "c"])
    source = open_source(topic, group=f"g-{topic}")
    read(source, 3)
    source.acknowledge({Partition(topic, 0): 2})
    source.close()

    offsets = admin.list_group_offsets(f"g-{topic}")
    assert [answer.offset for answer in offsets[f"g-{topic}"].values()] == [2]
    assert labels(read(open_source(topic, group=f"g-{topic}"), 3)) == ["a", "b", "c"]
    assert labels(read(open_source(topic, group=f"g-{topic}", start="group"), 1)) == ["c"]


def test_partitions_added_while_running_are_read_from_their_beginning(
    open_source: Open, producer: KafkaProducer, new_topic: Any, admin: KafkaAdminClient
) -> None:
    topic = new_topic(1)
    source = open_source(topic, start="latest", discover_s=0.2)
    admin.create_partitions({topic: 2})
    deadline = time.monotonic() + 20
    while True:  # the producer learns of the partition a little later than the broker
        try:
            send(producer, topic, ["new"], 1)
            break
        except AssertionError:
            assert time.monotonic() < deadline
            producer._metadata.request_update()
            time.sleep(0.1)
    items = read(source, 1)
    assert labels(items) == ["new"] and items[0].partition == Partition(topic, 1)


def test_what_retention_deleted_stops_or_is_skipped_and_counted(
    open_source: Open, producer: KafkaProducer, new_topic: Any, admin: KafkaAdminClient
) -> None:
    topic = new_topic()
    send(producer, topic, ["a", "b", "c", "d"])
    admin.delete_records({TopicPartition(topic, 0): 3})
    here = {Partition(topic, 0): 1}

    with pytest.raises(PositionError, match=r"the log has 3 to 4, next was 1.*on_lost"):
        open_source(topic, at=here)
    skipping = open_source(topic, at=here, on_lost="skip")
    assert labels(read(skipping, 1)) == ["d"]
    assert skipping.skipped == {topic: 2}


def test_records_deleted_while_they_wait_stop_the_source(
    open_source: Open, producer: KafkaProducer, new_topic: Any, admin: KafkaAdminClient
) -> None:
    topic = new_topic()
    send(producer, topic, ["a"])
    source = open_source(topic, fetch_bytes=1)
    source.throttle(True)
    time.sleep(1)  # until the fetch that is under way has come back empty
    send(producer, topic, ["b", "c"])
    admin.delete_records({TopicPartition(topic, 0): -1})
    source.throttle(False)
    assert labels(read(source, 1)) == ["a"]
    with pytest.raises(PositionError, match="retention deleted"):
        read(source, 1)


def test_a_commit_beyond_the_log_stops(open_source: Open, producer: KafkaProducer, new_topic: Any) -> None:
    topic = new_topic()
    send(producer, topic, ["a"])
    with pytest.raises(PositionError, match="next was 7"):
        open_source(topic, at={Partition(topic, 0): 7})


def test_a_topic_created_again_is_noticed_at_the_start_and_while_running(
    open_source: Open, producer: KafkaProducer, new_topic: Any, admin: KafkaAdminClient
) -> None:
    topic = new_topic()
    send(producer, topic, ["old", "older"])
    before = open_source(topic, discover_s=0.2)
    read(before, 2)
    admin.delete_topics([topic])
    while True:
        try:
            new_topic(name=topic)
            break
        except Exception as error:
            assert "AlreadyExists" in type(error).__name__
    with pytest.raises(PositionError, match=r"again|was there before"):
        read(before, 1)

    after = KafkaSource(before._connection, [topic], CODEC, group="")
    with pytest.raises(PositionError, match="created again"):
        after.continues(before.fingerprint)
    after.close()
    skipping = KafkaSource(before._connection, [topic], CODEC, group="", on_lost="skip")
    assert skipping.continues(before.fingerprint) and not skipping.continues("9f86d081884c7d65")
    skipping.seek({Partition(topic, 0): 2})
    send(producer, topic, ["new"])
    assert labels(read(skipping, 1)) == ["new"]
    skipping.close()


def test_a_topic_that_is_not_read_for_a_while_goes_on_where_it_was(
    open_source: Open, producer: KafkaProducer, new_topic: Any, bootstrap: str
) -> None:
    # given a commit of two topics
    one, other = new_topic(), new_topic()
    send(producer, one, ["a0", "a1"])
    send(producer, other, ["b0", "b1"])
    before = open_source(one, other)
    offsets = {Partition(one, 0): 2, Partition(other, 0): 1}
    # when the agent runs with one of them, and then with both again
    alone, again = (KafkaSource(Connection([bootstrap]), topics, CODEC, group="") for topics in ([one], [one, other]))
    try:
        assert alone.continues(before.fingerprint)
        alone.seek(offsets)
        assert alone.positions == offsets and alone.lag().keys() <= {(one, 0)}
        assert again.continues(alone.fingerprint)
        again.seek(alone.positions)
        # then nothing of the other is read a second time
        assert labels(read(again, 1)) == ["b1"]
    finally:
        alone.close()
        again.close()


def test_a_topic_that_is_not_there_and_a_cluster_that_does_not_answer_say_so(open_source: Open) -> None:
    with pytest.raises(StreamError, match="no topic absent"):
        open_source("absent")


def test_topics_may_be_added_and_removed_between_commits_but_not_created_again(scripted: Callable[..., Any]) -> None:
    source, _ = scripted()
    assert source.fingerprint == "kafka t=id"
    assert (
        source.continues("kafka t=id") and source.continues("kafka t=id u=other") and source.continues("kafka u=other")
    )
    assert not source.continues("0123456789abcdef")
    with pytest.raises(PositionError, match="created again"):
        source.continues("kafka t=before")


@pytest.mark.parametrize("abort", [False, True])
def test_positions_are_behind_the_marks_of_transactions(
    abort: bool, open_source: Open, bootstrap: str, new_topic: Any, admin: KafkaAdminClient
) -> None:
    # given a topic written in transactions, the last of which may have been given up
    topic = new_topic()
    here = Partition(topic, 0)
    writer = KafkaProducer(bootstrap_servers=bootstrap, transactional_id=topic)
    writer.init_transactions()
    for labelled in (["a"], ["b", "c"]):
        writer.begin_transaction()
        send(writer, topic, labelled)
        writer.commit_transaction()
    if abort:
        writer.begin_transaction()
        send(writer, topic, ["given up"])
        writer.abort_transaction()
    writer.close()
    end = 7 if abort else 5

    # when all is read
    source = open_source(topic)
    assert labels(read(source, 3)) == ["a", "b", "c"]
    wait_until(lambda: source.lag() == {(topic, 0): 0}, 10)

    # then a commit of any place is behind the marks that follow it
    assert source.past_marks({here: 1}) == {here: 2} and source.past_marks({here: 3}) == {here: 3}
    after = source.past_marks({here: 4})
    assert after == {here: end}
    # and nothing is missed when the topic has lost all that was read
    admin.delete_records({TopicPartition(topic, 0): -1})
    assert open_source(topic, at=after).positions == {here: end}
    # and a commit makes the places before it forgotten, and not its own
    source.acknowledge(after)
    wait_until(lambda: source.past_marks({here: 1}) == {here: 1}, 10)
    assert source.past_marks({here: 4}) == after


def test_only_some_thousand_gaps_are_remembered() -> None:
    gaps, here = Gaps(), Partition("t", 0)
    gaps.begin({here: 0})
    for number in range(12_000):
        gaps.read(here, 2 * number + 1, 2 * number + 2)
    assert gaps.past({here: 0}) == {here: 0} and gaps.past({here: 20_000}) == {here: 20_001}
    assert len(gaps._ends[here]) == 10_000
    gaps.forget({here: 23_999})
    assert gaps._ends[here] == {23_998: 23_999}


def test_the_shortest_retention_of_the_topics_is_known(open_source: Open, new_topic: Any) -> None:
    hour, day = new_topic(**{"retention.ms": "3600000"}), new_topic(**{"retention.ms": "86400000"})
    ever, compacted = new_topic(**{"retention.ms": "-1"}), new_topic(**{"cleanup.policy": "compact"})
    assert open_source(day, hour, ever).retention_s == 3600
    # and a task never fills for longer than half of it
    assert [_cut_rule(Config(), kept_s).age_s for kept_s in (3600, math.inf)] == [1800, 0]
    assert open_source(ever, compacted).retention_s == math.inf
