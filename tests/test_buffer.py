"""Tasks are cut by the items alone, cover every item once, and can be cut again from any commit."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from streams.buffer import CutRule, Task, TaskBuffer, halves
from streams.record import Control, ControlKind, Item, Partition, Reason, Record, Rejected
from streams.spool import LEAST, Spool

P, Q = Partition("images", 0), Partition("images", 1)


def stream(text: str, partition: Partition = P) -> list[Item]:
    """One item a word: a class name, `!` rejected, `|` a task boundary, `>` a flush."""
    marks = {"|": ControlKind.TASK_BOUNDARY, ">": ControlKind.FLUSH}
    items: list[Item] = []
    for offset, word in enumerate(text.split()):
        if word in marks:
            items.append(Control(partition, offset, marks[word]))
        elif word == "!":
            items.append(Rejected(partition, offset, Reason.EMPTY, "no bytes"))
        else:
            items.append(Record(partition, offset, word, f"{word}{offset}".encode()))
    return items


@pytest.fixture
def buffer(tmp_path):
    def make(
        rule: CutRule, max_bytes: int = 2**30, known: Sequence[str] = (), next_number: int = 1, offsets=None, **more
    ):
        return TaskBuffer(rule, Spool(tmp_path / "spool", max_bytes), known, next_number, offsets or {}, **more)

    return make


def taken(buffer: TaskBuffer, items: Sequence[Item], end: str | None = "end") -> list[Task]:
    for item in items:
        buffer.add(item)
    tasks = []
    while task := buffer.cut(0) or (buffer.end(end) if end else None):
        tasks.append(task)
    return tasks


def words(tasks: Sequence[Task]) -> list[str]:
    """`reason: the samples' class names -> next offset`, one a task."""
    return [f"{task.reason}: {' '.join(s.label for s in task.samples)} -> {task.next_offsets[P]}" for task in tasks]


def test_a_record_of_one_class_too_many_starts_the_next_task(buffer):
    tasks = taken(buffer(CutRule(new_classes=2)), stream("a b a ! c a c d b e"))
    assert words(tasks) == ["new_classes: a b a -> 4", "new_classes: c a c d b -> 9", "end: e -> 10"]
    assert [task.classes for task in tasks] == [("a", "b"), ("c", "a", "d", "b"), ("e",)]


def test_classes_of_the_commit_are_not_new(buffer):
    tasks = taken(buffer(CutRule(new_classes=1), known=["a", "b"]), stream("a b c a d"))
    assert words(tasks) == ["new_classes: a b c a -> 4", "end: d -> 5"]


def test_the_sample_that_fills_a_task_belongs_to_it(buffer):
    tasks = taken(buffer(CutRule(samples=2)), stream("a ! b ! c d e"))
    assert words(tasks) == ["samples: a b -> 3", "samples: c d -> 6", "end: e -> 7"]
    assert [task.records for task in tasks] == [3, 3, 1]
    assert [task.rejected for task in tasks] == [{"empty": 1}, {"empty": 1}, {}]


def test_bytes_of_images_cut_after_the_record_that_reaches_them(buffer):
    tasks = taken(buffer(CutRule(bytes=5)), stream("a b c d e f"))
    assert words(tasks) == ["bytes: a b c -> 3", "bytes: d e f -> 6"]
    assert [task.bytes for task in tasks] == [6, 6]


def test_the_first_rule_that_holds_cuts(buffer):
    tasks = taken(buffer(CutRule(new_classes=2, samples=3)), stream("a a a b c d"))
    assert words(tasks) == ["samples: a a a -> 3", "new_classes: b c -> 5", "end: d -> 6"]


def test_a_boundary_mark_ends_the_task_before_it_and_belongs_to_it(buffer):
    assert words(taken(buffer(CutRule()), stream("a b | c |"))) == ["boundary: a b -> 3", "boundary: c -> 5"]


def test_marks_without_a_sample_make_no_empty_task_and_their_offsets_go_with_the_next(buffer):
    tasks = taken(buffer(CutRule()), stream("| | a | | ! | b"))
    assert words(tasks) == ["boundary: a -> 4", "end: b -> 8"]
    assert [task.records for task in tasks] == [4, 4]


def test_boundary_marks_can_be_switched_off_and_flushes_cannot(buffer):
    assert words(taken(buffer(CutRule(boundaries=False)), stream("a | b > c"))) == ["boundary: a b -> 4", "end: c -> 5"]


def test_rejected_records_alone_are_no_task(buffer):
    assert taken(buffer(CutRule(samples=1)), stream("! ! |")) == []


def test_a_task_fills_no_more_than_the_spool(buffer):
    # given a rule that would wait for more than the spool holds
    buffered = buffer(CutRule(samples=10**6), max_bytes=4 * LEAST)

    # when the stream goes on
    tasks = taken(buffered, stream("a b c d e f g"), end=None)

    # then it is cut where it fills the spool alone, and committing makes room
    assert words(tasks) == ["bytes: a b c d -> 4"]
    assert buffered.full
    buffered.committed(tasks[0])
    assert not buffered.full and words([buffered.end("end")]) == ["end: e f g -> 7"]


def test_a_quiet_stream_is_cut_after_the_idle_time(buffer):
    buffered = buffer(CutRule(idle_s=10))
    assert buffered.cut(now=0) is None
    for item in stream("a b"):
        buffered.add(item)
    assert buffered.cut(now=100) is None
    assert buffered.cut(now=109) is None
    buffered.add(stream("a b c")[2])
    assert buffered.cut(now=111) is None
    assert buffered.cut(now=120.9) is None
    assert words([buffered.cut(now=121)]) == ["idle: a b c -> 3"]
    assert buffered.cut(now=1000) is None


def test_a_task_that_fills_slowly_is_cut_by_its_age_also_when_the_stream_is_never_quiet(buffer):
    buffered = buffer(CutRule(age_s=100, idle_s=60))
    items = stream("a b c d")
    assert buffered.cut(now=0) is None
    for item, now in zip(items, (50, 90, 140), strict=False):
        buffered.add(item)
        assert buffered.cut(now) is None
    assert words([buffered.cut(now=150)]) == ["age: a b c -> 3"]
    buffered.add(items[3])
    assert buffered.cut(now=200) is None
    assert words([buffered.cut(now=260)]) == ["idle: d -> 4"]


def test_in_a_quiet_stream_the_age_of_records_counts_also_over_restarts(buffer):
    # given an agent that has just been started, and reads again what an earlier one read long ago
    clock = [10_000.0]
    buffered = buffer(CutRule(age_s=100), clock=lambda: clock[0])
    old = [item._replace(timestamp_s=9_920.0 + item.offset) for item in stream("a b c")]
    for item in old[:2]:
        buffered.add(item)
    assert buffered.cut(now=0) is None and buffered.age_s == 80
    # when the oldest becomes too old while others arrive, then they may be many more
    clock[0] += 25
    buffered.add(old[2])
    assert buffered.cut(now=25) is None and buffered.cut(now=34.9) is None
    # and once nothing arrives, it waits no longer
    assert words([buffered.cut(now=35)]) == ["age: a b c -> 3"]
    # nor is anything cut where retention deletes nothing
    kept = buffer(CutRule(), clock=lambda: clock[0])
    kept.add(old[0])
    assert kept.cut(now=0) is None and kept.cut(now=10**6) is None


@pytest.mark.parametrize(("made_s", "age_s"), [(0.0, 0.0), (9_800.0, 0.0), (9_800.1, 199.9), (1.7e9, 0.0)])
def test_a_time_by_which_the_stream_would_have_deleted_the_record_is_not_believed(buffer, made_s, age_s):
    buffered = buffer(CutRule(age_s=100, kept_s=200), clock=lambda: 10_000.0)
    buffered.add(stream("a")[0]._replace(timestamp_s=made_s))
    assert buffered.age_s == pytest.approx(age_s)
    assert buffered.cut(now=0) is None
    assert (buffered.cut(now=10) is None) == (age_s < 100)


def test_the_age_is_that_of_the_oldest_sample_in_no_commit(buffer):
    clock = [1000.0]
    buffered = buffer(CutRule(samples=2), clock=lambda: clock[0])
    assert buffered.age_s == 0
    times = (None, 700.0, 2000.0, 400.0, 950.0)
    for item, made in zip(stream("a b c d e"), times, strict=True):
        buffered.add(item._replace(timestamp_s=made))
    assert buffered.age_s == 600
    first, second = buffered.cut(0), buffered.cut(0)
    # a task may be committed in parts
    for part in halves(first):
        buffered.committed(part)
    assert buffered.age_s == 600
    buffered.committed(second)
    clock[0] += 10
    assert buffered.age_s == 60
    buffered.committed(buffered.end("end"))
    assert buffered.age_s == 0


def test_labels_that_differ_in_case_are_the_class_seen_first(buffer):
    tasks = taken(buffer(CutRule(new_classes=1), known=["Polar Bear"]), stream("Cat CAT cat STRASSE Straße"))
    assert [task.classes for task in tasks] == [("Cat",), ("STRASSE",)]
    items = [Record(P, 0, "polar bear", b"x")]
    assert taken(buffer(CutRule(), known=["Polar Bear"]), items)[0].classes == ("Polar Bear",)


def test_an_item_that_comes_twice_or_from_before_the_commit_is_ignored(buffer):
    items = stream("a b ! c d")
    tasks = taken(buffer(CutRule(), offsets={P: 1, Q: 7}), items + items[2:] + items)
    assert words(tasks) == ["end: b c d -> 5"]
    assert tasks[0].records == 4 and tasks[0].next_offsets == {P: 5, Q: 7}


def test_offsets_that_the_stream_leaves_out_are_passed(buffer):
    items = [item for item in stream("a b c d e f") if item.offset not in (0, 3)]
    assert words(taken(buffer(CutRule(samples=2)), items)) == ["samples: b c -> 3", "samples: e f -> 6"]


def test_the_samples_hold_their_images_until_the_task_is_committed(buffer):
    buffered = buffer(CutRule(samples=2))
    first, second = taken(buffered, stream("a b c d"))
    assert [sample.read() for sample in first.samples + second.samples] == [b"a0", b"b1", b"c2", b"d3"]
    assert buffered.records == 4

    buffered.committed(first)
    assert buffered.records == 2 and not first.samples[0].path.exists()
    assert [sample.read() for sample in second.samples] == [b"c2", b"d3"]
    buffered.committed(second)
    assert buffered.records == buffered.bytes == 0


def test_it_knows_how_far_the_stream_was_read(buffer):
    buffered = buffer(CutRule(samples=1), offsets={Q: 7})
    taken(buffered, stream("a ! |"))
    assert buffered.next_offsets == {P: 3, Q: 7}


def random_stream(draw: random.Random) -> list[Item]:
    names = [*"abcdefgh", "A", "B"]
    lanes = [
        stream(" ".join(draw.choices([*names, "!", "|", ">"], [5] * len(names) + [10, 4, 1], k=80)), partition)
        for partition in (P, Q)
    ]
    merged: list[Item] = []
    while any(lanes):
        merged.append(draw.choice([lane for lane in lanes if lane]).pop(0))
    return merged


def plain(tasks: Sequence[Task]) -> list[Task]:
    """Everything about tasks but where their images are."""
    return [
        replace(task, samples=tuple(sample._replace(path=Path(), start=0) for sample in task.samples)) for task in tasks
    ]


@pytest.mark.parametrize("seed", range(30))
def test_the_same_stream_gives_the_same_tasks_however_it_is_polled_and_from_every_commit(tmp_path: Path, seed):
    draw = random.Random(seed)
    items = random_stream(draw)
    rule = CutRule(
        new_classes=draw.choice([0, 1, 3]),
        samples=draw.choice([0, 7, 20]),
        bytes=draw.choice([0, 30]),
        boundaries=draw.random() < 0.7,
    )
    spool_bytes = draw.choice([200, 2**20])

    def run(known, number, offsets) -> list[Task]:
        buffer = TaskBuffer(rule, Spool(tmp_path / "spool", spool_bytes), known, number, offsets)
        tasks: list[Task] = []
        for item in items:
            if item.offset >= offsets.get(item.partition, 0):
                buffer.add(item)
            while draw.random() < 0.3 and (task := buffer.cut(draw.random())):
                tasks.append(task)
                if draw.random() < 0.5:
                    buffer.committed(task)
        while task := buffer.cut(0) or buffer.end("end"):
            tasks.append(task)
        return tasks

    # given the tasks of one run
    whole = run((), 1, {})

    # then every record is in one of them, in order, with the offsets that follow it
    samples = [(s.partition, s.offset) for task in whole for s in task.samples]
    assert samples == [(item.partition, item.offset) for item in items if isinstance(item, Record)]
    for task in whole:
        passed = {*samples[: samples.index((task.samples[-1].partition, task.samples[-1].offset)) + 1]}
        assert all((p, o) in passed or o >= task.next_offsets.get(p, 0) for p, o in samples)
        assert all(o < task.next_offsets[p] for p, o in passed)

    # and a run that continues after any of them makes the rest of them
    expected = plain(whole)
    for done in range(len(whole)):
        known = list(dict.fromkeys(name for task in whole[:done] for name in task.classes))
        rest = run(known, done + 1, whole[done - 1].next_offsets if done else {})
        assert plain(rest) == expected[done:]
