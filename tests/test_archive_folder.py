"""An archive is listed safely, whatever lies in it, and its files are read or say why not."""

import os
import shutil

import pytest

from streams.archive_folder import ArchiveFolder, bundled_archive
from streams.record import Reason, Unusable
from streams.source import ArchiveError
from tests.archives import JPEG, both_forms, images, unpacked, zipped


@both_forms
def test_classes_and_images_are_listed_in_text_order(tmp_path, make):
    files = {"b/10.jpg": b"x", "b/9.jpg": b"yy", "polar  bear/1.jpg": b"zzz", "a/1.jpg": b""}
    archive = ArchiveFolder(make(tmp_path / "data.zip", files))
    assert archive.classes == ("a", "b", "polar bear")
    assert [entry.name for entry in archive.images("b")] == ["10.jpg", "9.jpg"]
    assert [entry.read() for entry in archive.images("b")] == [b"x", b"yy"]
    assert [entry.name for entry in archive.images("b", limit=1)] == ["10.jpg"]
    assert archive.images("polar bear")[0].path == "polar  bear/1.jpg"


@both_forms
def test_a_split_is_chosen_by_name_or_from_the_fallback(tmp_path, make):
    files = images("ab", 1, "train/") | images("bc", 1, "val/") | {"README.md": b"hello"}
    path = make(tmp_path / "data.zip", files)
    assert ArchiveFolder(path, split="val").classes == ("b", "c")
    assert ArchiveFolder(path, fallback=("test", "val")).classes == ("b", "c")
    assert ArchiveFolder(path, split="train/", fallback=("val",)).classes == ("a", "b")


@both_forms
def test_an_archive_without_split_needs_none_even_with_a_class_called_train(tmp_path, make):
    path = make(tmp_path / "data.zip", images(["train", "plane"], 1))
    assert ArchiveFolder(path, fallback=("train",)).classes == ("plane", "train")


@both_forms
def test_a_split_may_lie_deeper(tmp_path, make):
    path = make(tmp_path / "data.zip", images("ab", 1, "set/train/"))
    assert ArchiveFolder(path, split="set/train").classes == ("a", "b")


@both_forms
@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ({}, "", "no images in .*; expected .*, got top folders: none"),
        ({"1.jpg": JPEG, ".hidden/x/1.jpg": JPEG}, "", "no images in .*, and files that lie in no folder: 1$"),
        (images("a", 1, "train/"), "test", "no images below 'test' .* got top folders: train"),
        (images("a", 1, "set/train/"), "", r"set/train/a/000.jpg lies too deep .* \('set/train' for .* folders: set$"),
        (images("a", 1, "photos/"), "", r"photos/a/000.jpg lies too deep .* as the split \('photos' for this image\)"),
        (images("a", 1, "train/") | {"train/a/more/1.jpg": JPEG}, "train", "too deep below 'train'"),
    ],
)
def test_another_layout_is_an_error_that_says_what_is_there(tmp_path, make, files, split, message):
    (tmp_path / "data").mkdir()
    path = make(tmp_path / ("data" if make is unpacked else "data.zip"), files)
    with pytest.raises(ArchiveError, match=message):
        ArchiveFolder(path, split)


@both_forms
def test_what_systems_leave_behind_is_passed_over(tmp_path, make):
    litter = ["__MACOSX/a/._1.jpg", ".DS_Store", "a/.DS_Store", "a/Thumbs.db", "notes"]
    archive = ArchiveFolder(make(tmp_path / "data.zip", {"a/1.jpg": JPEG} | dict.fromkeys(litter, b"?")))
    assert [entry.path for entry in archive.images("a")] == ["a/1.jpg"]


@pytest.mark.parametrize("name", ["../a/1.jpg", "/a/1.jpg", "a/../../1.jpg", "C:/a/1.jpg", "a\\1.jpg", "a//1.jpg"])
def test_a_zip_with_unsafe_names_is_refused(tmp_path, name):
    with pytest.raises(ArchiveError, match="unsafe name"):
        ArchiveFolder(zipped(tmp_path / "data.zip", images("a", 1) | {name: JPEG}))


def test_an_encrypted_zip_is_refused(tmp_path):
    path = zipped(tmp_path / "data.zip", images("a", 1))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(ArchiveError, match="is encrypted; make the zip without a password"):
        ArchiveFolder(path)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 not a zip", JPEG])
def test_a_file_that_is_no_zip_is_refused(tmp_path, data):
    (tmp_path / "data.zip").write_bytes(data)
    with pytest.raises(ArchiveError, match="neither a folder nor a readable zip"):
        ArchiveFolder(tmp_path / "data.zip")


def test_a_missing_archive_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ArchiveError, match=r"gone\.zip: No such file"):
        ArchiveFolder(tmp_path / "gone.zip")


def test_names_in_a_zip_of_macos_are_utf8(tmp_path):
    # given a name in decomposed UTF-8 without the flag that says so
    name = "zu\u0308rich/1.jpg".encode()
    path = zipped(tmp_path / "data.zip", {"z" * len(name): JPEG})
    path.write_bytes(path.read_bytes().replace(b"z" * len(name), name))
    archive = ArchiveFolder(path)
    assert archive.classes == ("zürich",)
    assert archive.images("zürich")[0].read() == JPEG


def test_a_link_to_a_folder_is_refused(tmp_path):
    path = unpacked(tmp_path / "data", images("a", 1))
    (path / "b").symlink_to(path / "a")
    with pytest.raises(ArchiveError, match=r"b in .* is a link to a folder"):
        ArchiveFolder(path)


def test_links_pipes_and_lost_files_cannot_be_read_and_say_why(tmp_path):
    path = unpacked(tmp_path / "data", images("a", 3))
    (path / "a/000.jpg").unlink()
    (path / "a/000.jpg").symlink_to("/etc/hostname")
    (path / "a/001.jpg").unlink()
    os.mkfifo(path / "a/001.jpg")
    entries = ArchiveFolder(path).images("a")
    (path / "a/002.jpg").unlink()
    reasons = []
    for entry in entries:
        with pytest.raises(Unusable) as caught:
            entry.read()
        reasons.append(caught.value.reason)
    assert reasons == [Reason.FETCH_FORBIDDEN, Reason.FETCH_FORBIDDEN, Reason.FETCH_FAILED]


def test_a_folder_that_goes_away_is_the_archives_error(tmp_path):
    path = unpacked(tmp_path / "data", images("a", 1))
    (entry,) = ArchiveFolder(path).images("a")
    shutil.rmtree(path)
    with pytest.raises(ArchiveError, match="No such file"):
        entry.read()


def test_the_bundled_sample_has_ten_classes_in_two_splits():
    assert bundled_archive().stat().st_size <= 4_000_000
    train, test = ArchiveFolder("bundled", "train"), ArchiveFolder("bundled", "test")
    assert train.classes == test.classes and len(train.classes) == 10
    assert {len(train.images(name)) for name in train.classes} == {270}
    assert {len(test.images(name)) for name in test.classes} == {100}
