"""The spool gives back what it was given, frees what is released, and says what to do when the disk is full."""

import os
import pickle
from pathlib import Path

import pytest

from streams.record import Partition, Raw, Record
from streams.source import SpoolError
from streams.spool import LEAST, Spool

P = Partition("images", 0)


def record(offset: int, image: bytes = b"image", raw: Raw | None = None) -> Record:
    return Record(P, offset, "cat", image, raw=raw)


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_samples_are_read_back_as_they_came(tmp_path):
    # given images of all sizes over several segments
    spool = Spool(tmp_path, max_bytes=2**20, segment_bytes=1000)
    images = [os.urandom(size) for size in (1, 999, 1, 5000, 0, 300)]

    # when they are spooled
    samples = [spool.append(record(offset, image)) for offset, image in enumerate(images)]
    spool.end_segment()

    # then each comes back, also where the sample went through a pipe
    assert [pickle.loads(pickle.dumps(sample)).read() for sample in samples] == images  # noqa: S301
    assert [(sample.label, sample.partition, sample.offset) for sample in samples] == [("cat", P, n) for n in range(6)]


@pytest.mark.parametrize(
    "raw",
    [
        Raw(None, None),
        Raw(b"", b""),
        Raw(b"key", b"image", (("label", b"cat"), ("label", None), ("", b""))),
        Raw(b"\xff", b'{"image": "..."}', (("not \udcff utf-8", b"\0\xff"),)),
    ],
)
def test_the_message_around_an_image_is_kept_unchanged(tmp_path, raw):
    spool = Spool(tmp_path, max_bytes=2**20)
    before, sample, after = (spool.append(record(n, b"image", kept)) for n, kept in enumerate([None, raw, None]))
    spool.end_segment()
    assert spool.raw(sample) == raw
    assert spool.raw(before) == spool.raw(after) == Raw(None, b"image")
    assert [s.read() for s in (before, sample, after)] == [b"image"] * 3


def test_an_image_that_is_the_message_is_stored_once(tmp_path):
    spool = Spool(tmp_path, max_bytes=2**20)
    image = os.urandom(10_000)
    spool.append(record(0, image, Raw(b"key", image, (("label", b"cat"),))))
    assert spool.bytes < 10_100


def test_a_segment_goes_when_all_its_samples_are_released(tmp_path):
    spool = Spool(tmp_path, max_bytes=2**20)
    first = [spool.append(record(n, bytes(5000))) for n in range(3)]
    spool.end_segment()
    second = [spool.append(record(n, bytes(5000))) for n in range(3, 5)]
    spool.end_segment()
    assert spool.bytes == on_disk(tmp_path)

    spool.release(first[:2])
    assert first[2].read() == bytes(5000)
    spool.release(first[2:])
    assert not first[0].path.exists() and second[0].read() == bytes(5000)
    assert spool.bytes == on_disk(tmp_path) < 10_100

    spool.release(second)
    assert spool.bytes == on_disk(tmp_path) == 0
    assert spool.append(record(9)).path not in {first[0].path, second[0].path}


def test_it_is_full_at_its_bound_and_not_after_a_release(tmp_path):
    spool = Spool(tmp_path, max_bytes=8000)
    samples = [spool.append(record(0, bytes(6000)))]
    assert not spool.full
    samples.append(spool.append(record(1, bytes(6000))))
    assert spool.full
    spool.release(samples)
    assert not spool.full


def test_tiny_images_fill_it_by_the_memory_that_their_samples_take(tmp_path):
    spool = Spool(tmp_path, max_bytes=100 * LEAST)
    samples = [spool.append(record(n, bytes(40))) for n in range(99)]
    assert not spool.full and spool.bytes == 99 * LEAST
    samples.append(spool.append(record(99, bytes(40))))
    spool.end_segment()
    assert spool.full and on_disk(tmp_path) <= 100 * 50
    assert samples[50].read() == bytes(40)
    spool.release(samples)
    assert spool.bytes == 0


def test_what_an_earlier_run_left_is_deleted_and_nothing_else(tmp_path):
    left = Spool(tmp_path, max_bytes=2**20).append(record(0))
    (tmp_path / "notes.txt").write_text("mine")
    spool = Spool(tmp_path, max_bytes=2**20)
    assert not left.path.exists() and spool.bytes == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path):
    # given a segment file on a device that is always full
    spool = Spool(tmp_path, max_bytes=2**30)
    (tmp_path / "00000001.segment").symlink_to("/dev/full")

    # when more is spooled than fits the write buffer
    with pytest.raises(SpoolError, match=r"No space left on device; make room .* Nothing is lost"):
        for n in range(100):
            spool.append(record(n, bytes(2**18)))


def test_a_full_disk_found_at_the_end_of_a_segment_is_one_too(tmp_path):
    spool = Spool(tmp_path, max_bytes=2**30)
    (tmp_path / "00000001.segment").symlink_to("/dev/full")
    spool.append(record(0))
    with pytest.raises(SpoolError, match="No space left on device"):
        spool.end_segment()


def test_a_folder_that_cannot_be_made_is_an_error_that_says_which(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SpoolError, match=r"cannot keep samples in .*file/spool: Not a directory"):
        Spool(tmp_path / "file" / "spool", max_bytes=2**20)


def test_a_segment_that_vanished_or_shrank_is_an_error_and_not_another_image(tmp_path):
    spool = Spool(tmp_path, max_bytes=2**20)
    sample = spool.append(record(0, bytes(100)))
    spool.end_segment()
    os.truncate(sample.path, 50)
    with pytest.raises(SpoolError, match="ends after 50 bytes, expected a sample up to 100"):
        sample.read()
    sample.path.unlink()
    with pytest.raises(SpoolError, match="No such file"):
        sample.read()
