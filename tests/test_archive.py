"""An archive is a stream with stable offsets, whatever is in it."""

import io
import json
import os
import random
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from streams.archive import ArchiveSource
from streams.buffer import CutRule, TaskBuffer
from streams.record import Control, Item, Partition, Reason, Record, Rejected
from streams.source import ArchiveError, PositionError
from streams.spool import Spool
from tests.archives import JPEG, both_forms, images, unpacked, zipped
from tests.bad_images import bad_images, good_images


def drained(source: ArchiveSource) -> list[Item]:
    items: list[Item] = []
    while not source.exhausted:
        items += source.poll(timeout_s=1)
    return items


def names(items: Iterable[Item]) -> list[str]:
    """Class of each record, `|` for a mark, `!` for a rejected record."""
    return [i.label if isinstance(i, Record) else "|" if isinstance(i, Control) else "!" for i in items]


class TestOrder:
    def test_classes_come_group_after_group_with_a_mark_behind_each(self, tmp_path):
        source = ArchiveSource(zipped(tmp_path / "data.zip", images("abcde")), classes_per_task=2)
        items = drained(source)
        groups = "".join(names(items)).split("|")
        assert [Counter(group) for group in groups[:-1]] == [
            Counter({name: 10 for name in source.classes[start : start + 2]}) for start in (0, 2, 4)
        ]
        assert groups[-1] == "" and groups[0] not in ("a" * 10 + "b" * 10, "b" * 10 + "a" * 10)
        assert [item.offset for item in items] == list(range(53))
        assert {item.partition for item in items} == {Partition("data", 0)}

    def test_shuffled_mixes_all_classes_and_marks_nothing(self, tmp_path):
        items = drained(ArchiveSource(zipped(tmp_path / "data.zip", images("abcd", 20)), order="shuffled"))
        assert Counter(names(items)) == Counter({name: 20 for name in "abcd"})
        assert len(set(names(items)[:20])) == 4

    def test_blurry_moves_a_share_of_every_class_to_other_groups(self, tmp_path):
        source = ArchiveSource(zipped(tmp_path / "data.zip", images("abcdef", 20)), order="blurry", blur=0.25)
        items = drained(source)
        groups = "".join(names(items)).split("|")[:-1]
        assert len(groups) == 3 and Counter("".join(groups)) == Counter({name: 20 for name in "abcdef"})
        for home, group in enumerate(groups):
            assert all(Counter(group)[name] == 15 for name in source.classes[2 * home : 2 * home + 2])
        assert len({(item.label, item.image) for item in items if isinstance(item, Record)}) == 120

    @pytest.mark.parametrize("order", ["classes", "shuffled", "blurry"])
    def test_the_order_depends_on_the_arguments_alone(self, tmp_path, order):
        # given the same images in a zip, in a zip written in another order, and in a folder
        files = images("abcdef", 5)
        shuffled = list(files.items())
        random.Random(1).shuffle(shuffled)
        (tmp_path / "other").mkdir()
        paths = [
            zipped(tmp_path / "data.zip", files),
            zipped(tmp_path / "other" / "data.zip", dict(shuffled)),
            unpacked(tmp_path / "data", files),
        ]

        # then all give the same stream, and another seed another one
        streams = [drained(ArchiveSource(path, order=order, seed=3)) for path in paths]
        assert streams[0] == streams[1] == streams[2]
        assert drained(ArchiveSource(paths[0], order=order, seed=4)) != streams[0]

    def test_the_order_is_the_same_in_every_version(self, tmp_path):
        path = zipped(tmp_path / "data.zip", images("abcd", 3))
        assert "".join(names(drained(ArchiveSource(path, seed=1)))) == "bbaaab|cccddd|"

    def test_a_class_order_is_followed(self, tmp_path):
        path = zipped(tmp_path / "data.zip", images(["polar bear", "cat"], 1))
        (tmp_path / "order.txt").write_text("polar  bear\n\ncat\n")
        (tmp_path / "order.json").write_text('["polar bear", "cat"]')
        for options in (
            {"class_order": ("polar bear", "cat")},
            {"class_order_file": tmp_path / "order.txt"},
            {"class_order_file": tmp_path / "order.json"},
        ):
            items = drained(ArchiveSource(path, classes_per_task=1, **options))
            assert names(items) == ["polar bear", "|", "cat", "|"]

    def test_a_class_order_that_does_not_fit_lists_every_mistake(self, tmp_path):
        path = zipped(tmp_path / "data.zip", images("abc", 1))
        message = "not in the archive: x, y; missing in the order: c; listed twice: a"
        with pytest.raises(ArchiveError, match=message):
            ArchiveSource(path, class_order=("a", "y", "a", "x", "b"))

    @pytest.mark.parametrize("content", ['["a", 1]', "[", None])
    def test_a_class_order_file_that_cannot_be_read_is_an_error(self, tmp_path, content):
        file = tmp_path / "order.json"
        if content:
            file.write_text(content)
        with pytest.raises(ArchiveError, match=r"cannot read the class order .*order\.json"):
            ArchiveSource(zipped(tmp_path / "data.zip", images("ab", 1)), class_order_file=file)

    def test_per_class_keeps_the_first_by_name(self, tmp_path):
        items = drained(ArchiveSource(zipped(tmp_path / "data.zip", images("ab", 5)), per_class=2))
        kept = {item.image for item in items if isinstance(item, Record)}
        assert kept == {JPEG + text for text in (b"a0", b"a1", b"b0", b"b1")}


class TestPosition:
    def test_a_stream_goes_on_where_a_commit_says(self, tmp_path):
        path = zipped(tmp_path / "data.zip", images())
        whole = drained(ArchiveSource(path))
        for offset in (0, 1, 21, len(whole)):
            source = ArchiveSource(path)
            source.seek({Partition("data", 0): offset})
            assert source.lag() == {("data", 0): len(whole) - offset}
            assert drained(source) == whole[offset:]

    def test_a_first_start_is_at_the_beginning(self, tmp_path):
        source = ArchiveSource(zipped(tmp_path / "data.zip", images()))
        source.seek({})
        assert source.poll(1)[0].offset == 0

    @pytest.mark.parametrize("position", [("data", 0, 43), ("data", 0, -1), ("other", 0, 0), ("data", 1, 0)])
    def test_a_commit_of_another_stream_is_refused(self, tmp_path, position):
        source = ArchiveSource(zipped(tmp_path / "data.zip", images()))
        topic, number, offset = position
        with pytest.raises(PositionError, match=r"this archive is data\[0\] with 42 items"):
            source.seek({Partition(topic, number): offset})

    def test_the_fingerprint_changes_with_the_order_and_with_the_files_and_with_nothing_else(self, tmp_path):
        path = zipped(tmp_path / "data.zip", images())
        same = ArchiveSource(path, classes_per_task=2).fingerprint
        assert ArchiveSource(path, rate=5, max_image_pixels=9).fingerprint == same
        options = {"classes_per_task": 3}, {"seed": 1}, {"per_class": 9}
        different = [ArchiveSource(path, **option) for option in options]
        (tmp_path / "moved").mkdir()
        assert ArchiveSource(path.rename(tmp_path / "moved" / "data.zip")).fingerprint == same
        different += [ArchiveSource(zipped(path, images() | {"a/000.jpg": JPEG + b"A0"}))]
        different += [ArchiveSource(zipped(path, images(count=11)))]
        assert len({same, *(source.fingerprint for source in different)}) == 6


class TestBadInput:
    @both_forms
    def test_every_bad_image_is_rejected_with_its_reason_and_all_else_comes_through(self, tmp_path, make):
        # given good and bad images
        odd = [*good_images(), *bad_images()]
        path = make(tmp_path / "data.zip", {f"a/{n:03d}": image.data for n, image in enumerate(odd)})

        # when the archive is streamed
        items = drained(ArchiveSource(path, order="shuffled", max_image_bytes=1_000_000, max_image_pixels=1_000_000))

        # then only what the header check refuses is rejected, with the file's name and its bytes
        rejected = {item.raw.key.decode(): item for item in items if isinstance(item, Rejected) and item.raw}
        expected = {f"a/{n:03d}": i for n, i in enumerate(odd) if i.reason and i.stage == "intake"}
        assert {name: item.reason for name, item in rejected.items()} == {n: i.reason for n, i in expected.items()}
        for name, item in rejected.items():
            assert item.detail.startswith(f"{name}: ")
            assert item.raw and item.raw.value == (None if item.reason == Reason.TOO_LARGE else expected[name].data)
        assert len(items) == len(odd)
        # and the others carry both too, for the dead letter of one that cannot be decoded later
        passed = {item.raw.key.decode(): item for item in items if isinstance(item, Record) and item.raw}
        assert passed.keys() | rejected.keys() == {f"a/{n:03d}" for n in range(len(odd))}
        assert all(item.raw.value == item.image for item in passed.values() if item.raw)

    def test_a_damaged_zip_entry_costs_that_record_only(self, tmp_path):
        path = zipped(tmp_path / "data.zip", images("a", 3))
        path.write_bytes(path.read_bytes().replace(JPEG + b"a1", JPEG + b"a?"))
        items = sorted(drained(ArchiveSource(path, order="shuffled")), key=lambda item: isinstance(item, Rejected))
        assert names(items) == ["a", "a", "!"]
        assert items[2].reason == Reason.FETCH_FAILED and "a/001.jpg: damaged zip entry: Bad CRC" in items[2].detail

    def test_a_zip_bomb_is_rejected_without_unpacking_it(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/bomb.png", bytes(50_000_000))
            archive.writestr("a/good.jpg", JPEG)
        # and one that claims to be small
        data = (tmp_path / "data.zip").read_bytes()
        lying = tmp_path / "lying.zip"
        lying.write_bytes(data.replace((50_000_000).to_bytes(4, "little"), (5_000).to_bytes(4, "little")))
        for path, reason in ((tmp_path / "data.zip", Reason.TOO_LARGE), (lying, Reason.FETCH_FAILED)):
            items = drained(ArchiveSource(path, order="shuffled", max_image_bytes=1_000_000))
            assert Counter(names(items)) == Counter("a!")
            assert [item.reason for item in items if isinstance(item, Rejected)] == [reason]

    def test_links_and_nested_zips_in_a_zip_are_rejected(self, tmp_path):
        link = zipfile.ZipInfo("a/link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w") as nested:
            nested.writestr("a/1.jpg", JPEG)
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            archive.writestr(link, "/etc/passwd")
            archive.writestr("a/more.zip", inner.getvalue())
        items = drained(ArchiveSource(tmp_path / "data.zip", order="shuffled"))
        assert {item.reason for item in items} == {Reason.FETCH_FORBIDDEN, Reason.UNSUPPORTED_FORMAT}

    @pytest.mark.parametrize("folder", [b"caf\xe9", b" ", b"x" * 201, b"bell\x07"])
    def test_a_folder_that_is_no_class_name_costs_its_own_records_only(self, tmp_path, folder):
        path = unpacked(tmp_path / "data", images("a", 2))
        bad = path / os.fsdecode(folder)
        bad.mkdir()
        (bad / "1.jpg").write_bytes(JPEG)
        items = drained(ArchiveSource(path, classes_per_task=5))
        assert Counter(names(items)) == Counter("aa!|")
        (rejected,) = [item for item in items if isinstance(item, Rejected)]
        assert rejected.reason in (Reason.LABEL_TYPE, Reason.MISSING_LABEL)
        rejected.detail.encode()

    def test_classes_that_differ_in_spaces_are_one_and_in_case_are_one_in_the_task(self, tmp_path):
        path = zipped(tmp_path / "data.zip", images(["Polar bear", "Polar  bear ", "polar BEAR"], 2))
        source = ArchiveSource(path, order="shuffled")
        assert sorted(source.classes) == ["Polar bear", "polar BEAR"]
        buffer = TaskBuffer(CutRule(), Spool(tmp_path / "spool", 2**20), (), 1, {})
        for item in drained(source):
            buffer.add(item)
        task = buffer.end("end")
        assert task and len(task.classes) == 1 and len(task.samples) == 6


class FakeTime:
    def __init__(self) -> None:
        self.now = 1000.0
        self.clock: Callable[[], float] = lambda: self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class TestPace:
    def source(self, path: Path, time: FakeTime, rate: float) -> ArchiveSource:
        return ArchiveSource(path, order="shuffled", rate=rate, clock=time.clock, sleep=time.sleep)

    @pytest.mark.parametrize("rate", [0.5, 7, 3000])
    def test_records_come_at_the_rate_and_no_poll_waits_longer_than_asked(self, tmp_path, rate):
        time = FakeTime()
        source = self.source(zipped(tmp_path / "data.zip", images("abcd", 10)), time, rate)
        items: list[Item] = []
        while not source.exhausted:
            before = time.now
            items += source.poll(timeout_s=0.3)
            assert time.now - before <= 0.3 + 1e-6
            time.now += 0.001
            assert len(items) <= rate * (time.now - 1000) + 1
        assert len(items) >= rate * (time.now - 1000 - 0.31) - 1

    def test_after_a_pause_it_catches_up_a_second_at_most(self, tmp_path):
        time = FakeTime()
        source = self.source(zipped(tmp_path / "data.zip", images("abcd", 10)), time, rate=5)
        source.poll(0.3)
        time.now += 100
        assert len(source.poll(0.3)) == 6

    def test_a_throttled_or_ended_stream_waits_and_brings_nothing(self, tmp_path):
        time = FakeTime()
        source = self.source(zipped(tmp_path / "data.zip", images("a", 1)), time, rate=0)
        source.throttle(True)
        assert source.poll(0.5) == [] and time.now == 1000.5
        source.throttle(False)
        assert len(source.poll(0.5)) == 1 and time.now == 1000.5
        assert source.exhausted and source.poll(0.5) == [] and time.now == 1001

    def test_a_poll_is_bounded_in_items_and_bytes(self, tmp_path):
        many = ArchiveSource(zipped(tmp_path / "many.zip", images("a", 300)), order="shuffled")
        assert [len(many.poll(9)), len(many.poll(9))] == [256, 44]
        large = {f"a/{n}.jpg": JPEG + bytes(3 * 2**20) for n in range(5)}
        assert len(ArchiveSource(zipped(tmp_path / "large.zip", large), order="shuffled").poll(9)) == 3

    def test_a_slow_disk_ends_a_poll_early(self, tmp_path):
        time = FakeTime()

        def slow_clock() -> float:
            time.now += 0.1
            return time.now

        path = zipped(tmp_path / "data.zip", images("a", 50))
        source = ArchiveSource(path, order="shuffled", clock=slow_clock, sleep=time.sleep)
        assert 1 <= len(source.poll(0.5)) <= 6


def test_what_is_shown_of_a_stream_can_be_written_as_json(tmp_path):
    source = ArchiveSource(zipped(tmp_path / "data.zip", images("ab", 1)))
    assert json.loads(json.dumps([source.fingerprint, source.classes]))[0] == source.fingerprint
    source.acknowledge({Partition("data", 0): 1})
    source.close()
