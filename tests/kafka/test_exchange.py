"""A group's messages and their replies on a real broker: each is replied to once, whatever happens in between."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import chain
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer, OffsetAndMetadata, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import CorruptRecordError

from streams.formats import Codec
from streams.kafka.connection import Connection
from streams.kafka.exchange import Arrival, Exchange, Moved, Reply
from streams.kafka.record_batches import Unreadable
from streams.record import Control, Partition, Reason, Record, Rejected
from streams.source import NotThere, StreamError
from tests.bad_images import encoded, picture
from tests.kafka.agents import wait_until

JPEG = encoded(picture(), "JPEG")
CODEC = Codec(max_image_bytes=10**6, max_image_pixels=10**6, max_label_chars=200, labelled=False)


@pytest.fixture
def member(bootstrap: str) -> Iterator[Callable[..., Exchange]]:
    """`member(topic)`: one more of the group that answers `topic` in `topic`.out."""
    members: list[Exchange] = []

    def join(topic: str, **settings: Any) -> Exchange:
        members.append(Exchange(Connection([bootstrap]), [topic], f"{topic}.out", CODEC, group=topic, **settings))
        return members[-1]

    yield join
    for one in members:
        one.close()


def play(producer: KafkaProducer, topic: str, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        producer.send(topic, JPEG, b"%d" % number)
    producer.flush()


def taken(exchange: Exchange) -> list[Arrival]:
    found: list[Arrival] = []
    wait_until(lambda: found.extend(exchange.take(0.5)) or found, 40)
    return found


def answer(exchange: Exchange, arrivals: list[Arrival]) -> None:
    """Answers them and waits for it."""
    exchange.commit(arrivals, replies(arrivals))
    exchange.settle()


def replies(arrivals: list[Arrival]) -> list[Reply]:
    return [reply(arrival) for arrival in arrivals]


def reply(arrival: Arrival) -> Reply:
    place = [*arrival.item.partition, arrival.item.offset]
    return Reply(arrival.raw.key if arrival.raw else None, json.dumps(place).encode(), [("a", b"b")])


def read(bootstrap: str, topic: str) -> list[Any]:
    """Every reply that is committed."""
    consumer = KafkaConsumer(bootstrap_servers=bootstrap, isolation_level="read_committed", enable_auto_commit=False)
    places = [TopicPartition(f"{topic}.out", number) for number in consumer.partitions_for_topic(f"{topic}.out")]
    consumer.assign(places)
    consumer.seek_to_beginning()
    found: list[Any] = []
    ends = consumer.end_offsets(places)
    while any(consumer.position(where) < end for where, end in ends.items()):
        for messages in consumer.poll(timeout_ms=500).values():
            found += messages
    consumer.close()
    return found


def test_every_message_gets_its_reply_under_its_key(bootstrap, new_topic, producer, member) -> None:
    # given images, a mark and a message that is none of them
    topic = new_topic(2)
    play(producer, topic, 20)
    producer.send(topic, b"no image", b"20", partition=0)
    producer.send(topic, None, b"mark", [("gapstream.control", b"flush")], partition=0)
    producer.flush()
    # when a group of one takes them all
    exchange = member(topic)
    seen: list[Arrival] = []
    while len(seen) < 22:
        arrivals = taken(exchange)
        answer(exchange, arrivals)
        seen += arrivals
    # then each has a reply in a topic that was made for them, and nothing is left
    assert Counter(type(arrival.item) for arrival in seen) == {Record: 20, Rejected: 1, Control: 1}
    assert all(arrival.timestamp_ms for arrival in seen)
    [bad] = [arrival.item for arrival in seen if isinstance(arrival.item, Rejected)]
    assert bad.reason == Reason.UNSUPPORTED_FORMAT
    found = read(bootstrap, topic)
    assert sorted((one.key, one.value) for one in found) == sorted((r.key, r.value) for r in replies(seen))
    assert {one.partition for one in found} == {0, 1} and found[0].headers == [("a", b"b")]
    assert exchange.lag() == {Partition(topic, 0): 0, Partition(topic, 1): 0}


def test_what_was_taken_and_not_passed_comes_again(new_topic, producer, member) -> None:
    topic = new_topic()
    play(producer, topic, 10)
    exchange = member(topic)
    first = taken(exchange)
    answer(exchange, first[:4])
    assert exchange.lag() == {Partition(topic, 0): 6}
    for _ in range(2):
        exchange.take_again()
        assert [arrival.item.offset for arrival in taken(exchange)] == [4, 5, 6, 7, 8, 9]


def test_more_is_taken_while_a_transaction_is_under_way(bootstrap, new_topic, producer, member, monkeypatch) -> None:
    # given a transaction that does not end yet
    topic = new_topic()
    play(producer, topic, 6)
    exchange = member(topic, max_records=2)
    end = delayed(monkeypatch)
    first = taken(exchange)
    outcome = exchange.commit(first, replies(first))
    # when the next are taken, and taken again
    second = taken(exchange)
    assert not outcome.done() and exchange.lag() == {Partition(topic, 0): 6}
    end.set()
    exchange.take_again()
    # then they are those that follow, and each is answered once
    assert outcome.done() and exchange.lag() == {Partition(topic, 0): 4}
    again = taken(exchange)
    assert [a.item.offset for a in second] == [a.item.offset for a in again] == [2, 3]
    with pytest.raises(StreamError, match="taken again"):
        exchange.commit(second[1:], replies(second[1:]))
    exchange.commit(again, replies(again))
    third = taken(exchange)
    answer(exchange, third)
    assert [one.value for one in read(bootstrap, topic)] == [r.value for r in replies([*first, *again, *third])]


def delayed(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The offsets of a transaction, and so its end, wait for the event."""
    end = threading.Event()
    send = KafkaProducer.send_offsets_to_transaction

    def wait_and_send(self: KafkaProducer, *args: Any) -> None:
        assert end.wait(30)
        send(self, *args)

    monkeypatch.setattr(KafkaProducer, "send_offsets_to_transaction", wait_and_send)
    return end


@pytest.mark.parametrize("in_time", [True, False])
def test_a_group_that_moves_its_partitions_waits_for_the_transaction_under_way(
    in_time, bootstrap, new_topic, producer, member, monkeypatch
) -> None:
    # given a member with a transaction under way, and all else taken
    monkeypatch.setattr("streams.kafka.exchange._REVOKED_S", 30 if in_time else 0)
    topic = new_topic(2)
    play(producer, topic, 40)
    exchange = member(topic, max_records=5)
    end = delayed(monkeypatch)
    first = taken(exchange)
    outcome = exchange.commit(first, replies(first))
    seen = len(first)
    while seen < 40:
        seen += len(taken(exchange))
    # when another one joins, and the transaction goes on once the group moves its partitions, or has moved them
    other = member(topic, max_records=5)
    left = threading.Event()

    def join() -> None:
        wait_until(lambda: left.is_set() or (other.take(0.2) and False), 60)
        other.close()

    threads = [threading.Thread(target=join)]
    until = exchange._revoked.is_set if in_time else lambda: other.joined
    threads.append(threading.Thread(target=lambda: wait_until(until, 60) or end.set()))
    for thread in threads:
        thread.start()
    with pytest.raises(StreamError) as error:
        wait_until(lambda: exchange.take(0.2) and False, 60)
    # then what was taken is void, and the transaction ends well only where it was waited for
    assert isinstance(error.value, Moved) == in_time
    assert (outcome.exception() is None) == in_time
    left.set()
    for thread in threads:
        thread.join()
    # and each message has one answer
    rest = 35 if in_time else 40
    while rest:
        arrivals = taken(exchange)
        answer(exchange, arrivals)
        rest -= len(arrivals)
    found = Counter(one.value for one in read(bootstrap, topic))
    assert len(found) == 40 and max(found.values()) == 1


def test_a_reply_that_is_not_delivered_takes_its_whole_transaction_with_it(
    admin, bootstrap, new_topic, producer, member
) -> None:
    # given a topic that does not take one of the replies any more
    topic = new_topic()
    play(producer, topic, 3)
    exchange = member(topic)
    arrivals = taken(exchange)
    assert exchange.max_reply_bytes > 10**6
    admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, f"{topic}.out", {"max.message.bytes": "2000"})])
    large = replies(arrivals)
    large[1] = large[1]._replace(value=b"x" * 5000)
    # when they are sent
    with pytest.raises(StreamError, match="3 messages were not answered"):
        exchange.commit(arrivals, large)
        exchange.settle()
    # then none of them can be read, and the messages are answered at the second try, once
    again = taken(exchange)
    assert exchange.max_reply_bytes < 2000
    assert [arrival.item.offset for arrival in again] == [0, 1, 2]
    answer(exchange, again)
    assert len(read(bootstrap, topic)) == 3


def test_a_member_the_group_has_gone_on_without_changes_nothing(bootstrap, new_topic, producer, member) -> None:
    # given a member whose generation is over
    topic = new_topic()
    play(producer, topic, 5)
    exchange = member(topic)
    arrivals = taken(exchange)
    exchange._member = exchange._member._replace(generation_id=exchange._member.generation_id + 7)
    # when it answers
    with pytest.raises(StreamError, match="metadata mismatch"):
        answer(exchange, arrivals)
    # then nobody sees that, and what it wanted to pass is not passed with the next transaction either
    play(producer, topic, 1, start=5)
    again = taken(exchange)
    assert [arrival.item.offset for arrival in again][:2] == [0, 1]
    answer(exchange, again[:2])
    assert len(read(bootstrap, topic)) == 2
    consumer = KafkaConsumer(bootstrap_servers=bootstrap, group_id=topic)
    assert consumer.committed(TopicPartition(topic, 0)) == 2
    consumer.close()


def test_a_membership_lost_in_the_background_lets_nothing_through_unfenced(new_topic, producer, member) -> None:
    # given a member that the client takes out of its group, as it does when nobody polls for long
    topic = new_topic()
    play(producer, topic, 5)
    exchange = member(topic)
    first = taken(exchange)
    answer(exchange, first[:2])
    exchange.take_again()
    second = taken(exchange)
    exchange._consumer._coordinator.maybe_leave_group()
    # when it answers nevertheless
    with pytest.raises(StreamError, match="metadata mismatch"):
        answer(exchange, second)
    # then the messages wait for the group's next member
    assert [arrival.item.offset for arrival in taken(member(topic))] == [2, 3, 4]


def test_kept_partitions_follow_the_group_and_not_their_own_memory(bootstrap, new_topic, producer, member) -> None:
    # given a member whose partition others have gone on with, unnoticed
    topic = new_topic()
    play(producer, topic, 8)
    exchange = member(topic)
    first = taken(exchange)
    answer(exchange, first[:2])
    other = member(topic)
    other._connect()
    other._producer.begin_transaction()
    offsets = {TopicPartition(topic, 0): OffsetAndMetadata(6, "", -1)}
    other._producer.send_offsets_to_transaction(offsets, exchange._consumer.group_metadata())
    other._producer.commit_transaction()
    # when it joins again
    exchange._consumer._coordinator.request_rejoin()
    with pytest.raises(Moved, match="6 messages are taken again"):
        wait_until(lambda: exchange.take(0.5) and False, 40)
    # then it takes what follows theirs
    assert [arrival.item.offset for arrival in taken(exchange)] == [6, 7]


def test_what_was_taken_before_a_move_comes_again_where_the_group_has_no_offset_yet(
    new_topic, producer, member, monkeypatch
) -> None:
    # given a new group that has taken the first messages and committed nothing
    topic = new_topic()
    play(producer, topic, 6)
    exchange = member(topic, max_records=2)
    assert [arrival.item.offset for arrival in taken(exchange)] == [0, 1]
    # when the group moves while the next ones come, and the partition is kept
    polled = exchange._consumer.poll

    def poll(*args: Any, **options: Any) -> Any:
        found = polled(*args, **options)
        if found:
            exchange._on_assigned()
        return found

    monkeypatch.setattr(exchange._consumer, "poll", poll)
    with pytest.raises(Moved, match="2 messages are taken again"):
        wait_until(lambda: exchange.take(0.5) and False, 40)
    monkeypatch.undo()
    # then they come again from the first
    assert [arrival.item.offset for arrival in taken(exchange)] == [0, 1]


def test_what_comes_after_the_newest_is_passed_over_by_no_failure_and_no_restart(new_topic, producer, member) -> None:
    # given a member that begins at the newest of two partitions with messages
    topic = new_topic(2)
    for partition in (0, 0, 1):
        producer.send(topic, JPEG, partition=partition)
    producer.flush()
    exchange = member(topic, start="latest")
    wait_until(lambda: exchange.take(0.2) or len(exchange.lag()) == 2, 40)
    # when its first transaction fails in one, and the other is silent until nobody is there
    producer.send(topic, JPEG, partition=0).get(10)
    arrivals = taken(exchange)
    exchange._member = exchange._member._replace(generation_id=exchange._member.generation_id + 7)
    with pytest.raises(StreamError, match="metadata mismatch"):
        answer(exchange, arrivals)
    producer.send(topic, JPEG, partition=1).get(10)
    # then who comes next takes both, and nothing older
    seen: set[tuple[int, int]] = set()
    successor = member(topic, start="latest")
    wait_until(
        lambda: seen.update((a.item.partition.number, a.item.offset) for a in successor.take(0.5)) or len(seen) > 1, 40
    )
    assert seen == {(0, 2), (1, 1)}


def test_where_retention_was_faster_what_it_left_is_taken(admin, new_topic, producer, member) -> None:
    topic = new_topic()
    exchange = member(topic, start="latest")
    wait_until(lambda: exchange.take(0.2) or exchange.lag(), 40)
    exchange.close()
    play(producer, topic, 5)
    admin.delete_records({TopicPartition(topic, 0): 3})
    assert [arrival.item.offset for arrival in taken(exchange)] == [3, 4]


def test_a_batch_that_cannot_be_read_is_fetched_once_more_and_then_passed(
    new_topic, producer, member, monkeypatch
) -> None:
    # given a message whose batch is torn
    class TornConsumer(KafkaConsumer):
        def poll(self, *args: Any, **options: Any) -> Any:
            polled = super().poll(*args, **options)
            torn = [
                Unreadable(1, 2, CorruptRecordError("torn")) if one.offset == 1 else one
                for one in chain(*polled.values())
            ]
            return {where: torn for where in polled}

    monkeypatch.setattr("streams.kafka.exchange.KafkaConsumer", TornConsumer)
    topic = new_topic()
    play(producer, topic, 3)
    exchange = member(topic)
    # when it is taken
    with pytest.raises(StreamError, match="torn"):
        taken(exchange)
    arrivals = taken(exchange)
    # then it is rejected, between the others
    assert [arrival.item.offset for arrival in arrivals] == [0, 1, 2]
    item = arrivals[1].item
    assert isinstance(item, Rejected) and item.reason == Reason.UNDECODABLE and arrivals[1].raw is None
    # and once it is passed, nothing of it is remembered
    answer(exchange, arrivals)
    assert not exchange._fetched_again


def test_members_that_come_and_go_answer_everything_once(bootstrap, new_topic, producer, member) -> None:
    # given two members at work on four partitions, the second joining late
    topic = new_topic(4)
    counts: Counter[str] = Counter()
    ends = {"one": threading.Event(), "two": threading.Event()}

    def work(name: str, exchange: Exchange) -> None:
        while not ends[name].is_set():
            try:
                arrivals = exchange.take(0.2)
                if arrivals:  # answered while the next are taken
                    outcome = exchange.commit(arrivals, replies(list(arrivals)))
                    outcome.add_done_callback(partial(count, name, len(arrivals)))
            except StreamError:
                counts["failures"] += 1
        exchange.close()

    def count(name: str, messages: int, outcome: Future[None]) -> None:
        if outcome.exception() is None:
            counts[name] += messages

    one = threading.Thread(target=work, args=("one", member(topic, max_records=10)))
    two = threading.Thread(target=work, args=("two", member(topic, max_records=10)))
    one.start()
    play(producer, topic, 100)
    wait_until(lambda: counts["one"] >= 50, 90)
    two.start()
    total = 100

    def more() -> None:
        """Plays on, though not far ahead of a busy machine."""
        nonlocal total
        if counts["one"] + counts["two"] > total - 200:
            play(producer, topic, 20, total)
            total += 20

    wait_until(lambda: more() or counts["two"] >= 50, 60)
    # when the first goes
    ends["one"].set()
    one.join()
    before = counts["two"]
    wait_until(lambda: more() or counts["two"] > before + 100, 60)
    wait_until(lambda: counts["one"] + counts["two"] >= total, 60)
    ends["two"].set()
    two.join()
    # then every message has one reply
    found = Counter(one.value for one in read(bootstrap, topic))
    assert len(found) == total and max(found.values()) == 1


def test_a_topic_that_is_not_there_is_a_clear_error(bootstrap, new_topic, member) -> None:
    with pytest.raises(NotThere, match="has no topic nowhere; create it"):
        member("nowhere")  # its output is missing too, but is made with it
    topic = new_topic()
    with pytest.raises(StreamError, match=f"has no topic {topic}.out; create it"):
        member(topic, create=False)
