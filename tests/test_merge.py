"""The joint order of partitions follows from the records alone."""

from __future__ import annotations

import random

from streams.merge import Merge
from streams.record import Partition

A, B = Partition("t", 0), Partition("t", 1)
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
        merge.add(where, [(timestamp, (where, at[where] + index)) for index, timestamp in enumerate(part)])
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
    merge.add(A, [(5, "x"), (3, "y")])
    assert merge.take() == ["x", "y"] and not merge.blocking


def test_an_entry_waits_until_the_silent_partition_was_empty_long_enough_after_it() -> None:
    merge: Merge[str] = Merge(wait_s=2)
    merge.track([A, B])
    merge.add(A, [(10_000, "x")])
    assert merge.take() == [] and list(merge.blocking) == [B]
    merge.quiet(B, 11_999)
    assert merge.take() == []
    merge.quiet(B, 12_001)
    assert merge.take() == ["x"] and not merge.blocking


def test_what_waits_too_long_may_be_let_go() -> None:
    merge: Merge[str] = Merge(wait_s=2)
    merge.track([A, B])
    merge.add(A, [(10_000, "x"), (10_001, "y")])
    assert merge.waiting(A) == 2
    assert merge.take(uncertain=True) == ["x", "y"]
