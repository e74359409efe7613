"""The joint order of partitions follows from the records alone."""

from __future__ import annotations

import random

from streams.merge import AHEAD_S, PATIENCE_S, Merge
from streams.record import Partition

A, B, C = Partition("t", 0), Partition("t", 1), Partition("t", 2)
FAR_MS = 10.0**15


def read(logs: dict[Partition, list[int]], seed: int) -> list[tuple[Partition, int]]:
    """Everything in the logs, (partition, index), when their parts arrive in an order of chance."""
    rng = random.Random(seed)
    merge: Merge[tuple[Partition, int]] = Merge(0)
    merge.track(logs)
    at = dict.fromkeys(logs, 0)
    out = []
    while any(at[where] < len(log) for where, log in logs.items()):
        where = rng.choice(list(logs))
        part = logs[where][at[where] : at[where] + rng.randrange(1, 9)]
        merge.add(where, [(timestamp, (where, at[where] + index)) for index, timestamp in enumerate(part)], 0)
        at[where] += len(part)
        if at[where] == len(logs[where]):
            merge.quiet(where, FAR_MS)
        out += merge.take()
    return out + merge.take()


def test_the_same_logs_give_the_same_order_however_they_arrive() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        logs = {}
        for number in range(rng.randrange(1, 6)):
            log = [rng.randrange(50) for _ in range(rng.randrange(1, 60))]
            logs[Partition(f"t{number % 2}", number)] = log if rng.random() < 0.3 else sorted(log)

        order = read(logs, 1)

        assert order == read(logs, 2)
        for where, log in logs.items():
            assert [index for partition, index in order if partition == where] == list(range(len(log)))


def test_sorted_logs_come_out_sorted_by_time_then_partition() -> None:
    assert read({A: [1, 3, 5], B: [1, 2, 6]}, 1) == [(A, 0), (B, 0), (B, 1), (A, 1), (A, 2), (B, 2)]


def test_one_partition_is_never_held_back() -> None:
    merge: Merge[str] = Merge(10)
    merge.track([A])
    merge.add(A, [(5, "x"), (3, "y")], 0)
    assert merge.take() == ["x", "y"] and not merge.blocking


def test_an_entry_waits_until_the_silent_partition_was_empty_long_enough_after_it() -> None:
    merge: Merge[str] = Merge(wait_s=2)
    merge.track([A, B])
    merge.add(A, [(10_000, "x")], 10_000)
    assert merge.take() == [] and list(merge.blocking) == [B]
    merge.quiet(B, 11_999)
    assert merge.take() == []
    merge.quiet(B, 12_001)
    assert merge.take() == ["x"] and not merge.blocking


def test_what_waits_too_long_may_be_let_go() -> None:
    merge: Merge[str] = Merge(wait_s=2)
    merge.track([A, B])
    merge.add(A, [(10_000, "x"), (10_001, "y")], 10_000)
    assert merge.waiting(A) == 2
    assert merge.take(PATIENCE_S - 1) == []
    assert merge.take(1) == ["x", "y"]


def test_a_partition_that_cannot_be_read_holds_up_no_other_whatever_a_third_delivers() -> None:
    merge: Merge[str] = Merge(wait_s=0)
    merge.track([A, B, C])
    merge.quiet(B, 50)
    merge.add(A, [(100, "waits")], 100)
    # given old records of C, whose place is certain, in every second in which nothing is heard of B
    out = []
    for second in range(PATIENCE_S):
        merge.add(C, [(10, f"c{second}")], 100)
        merge.quiet(C, 200)
        out += merge.take(1)
    # then what waits for B goes out all the same, and so does what follows while B stays away
    assert out[-1] == "waits" and len(out) == PATIENCE_S + 1
    merge.quiet(A, 300)
    merge.quiet(C, 300)
    merge.add(A, [(150, "next")], 300)
    assert merge.take(1) == ["next"]
    # and B is waited for again as soon as something is heard of it
    merge.add(A, [(250, "later")], 300)
    merge.quiet(B, 200)
    assert merge.take(1) == []


def test_a_time_far_ahead_holds_back_its_partition_by_the_tolerance_and_is_counted() -> None:
    # given a producer that dates in microseconds, and another an hour ahead
    now_ms = 1_700_000_000_000
    merge: Merge[str] = Merge(wait_s=2)
    merge.track([A, B])
    merge.add(A, [(now_ms * 1000, "micro"), (now_ms + 3_600_000, "hour"), (now_ms + AHEAD_S * 1000, "fine")], now_ms)
    assert merge.clamped == {"t": 2}
    # when the other partition goes on as ever
    merge.quiet(B, now_ms + (AHEAD_S + 2) * 1000)
    assert merge.take() == []
    merge.quiet(B, now_ms + (AHEAD_S + 2) * 1000 + 1)
    # then they come as soon as the tolerance is over
    assert merge.take() == ["micro", "hour", "fine"]
