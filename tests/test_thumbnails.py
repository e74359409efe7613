"""Pictures of rejected records: where there is something to see, within bounds, and never at the agent's risk."""

import base64
import io
import subprocess
import sys
from collections.abc import Generator, Iterable
from typing import Any

import pytest
from PIL import Image

from exporter.thumbnails import COUNT, LOOK_S, MAX_PIXELS, PAUSE_S, SIDE, Thumbnails, pictures_of
from tests.bad_images import bad_images, encoded, good_images, picture


class Maker:
    """Pretends to decode; remembers what it was given."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def __call__(self, images: Iterable[bytes]) -> Generator[bytes | None, None, None]:
        for data in images:
            self.seen.append(data)
            yield None if data == b"broken" else b"JPEG of " + data


@pytest.fixture
def maker():
    return Maker()


def uri(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(b"JPEG of " + data).decode()


def bad(name: str) -> bytes:
    (image,) = (image.data for image in bad_images() if image.name == name)
    return image


def seen(data: bytes) -> Image.Image:
    made = next(pictures_of([data]))
    assert made is not None
    return Image.open(io.BytesIO(made))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(encoded(picture(size=(500, 300)), "JPEG"), id="unlabelled"),
        pytest.param(bad("more bytes than allowed"), id="too large"),
        pytest.param(bad("jpeg, cut in half"), id="jpeg cut in half"),
        pytest.param(bad("png, cut in half"), id="png cut in half"),
        *[pytest.param(image.data, id=image.name) for image in good_images() if "tiff, 16" in image.name],
    ],
)
def test_what_can_be_seen_is_shown_small(data):
    image = seen(data)
    assert image.format == "JPEG" and image.mode == "RGB"
    assert max(image.size) <= SIDE


def test_a_picture_stands_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    width, height = seen(encoded(picture(size=(300, 200)), "JPEG", exif=exif)).size
    assert (width, height) == (64, 96)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"<!DOCTYPE html>", id="a page"),
        pytest.param(bad("jpeg, bomb"), id="a bomb"),
        pytest.param(bad("png, bomb"), id="another bomb"),
        pytest.param(encoded(Image.new("1", (4001, MAX_PIXELS // 4000)), "PNG"), id="too many pixels"),
    ],
)
def test_what_cannot_or_must_not_be_decoded_shows_nothing(data):
    assert next(pictures_of([data])) is None


def test_nothing_is_decoded_before_somebody_looks_and_everything_once(maker):
    kept = Thumbnails(make=maker)
    kept.add(1, b"one")
    kept.add(2, b"broken")
    assert maker.seen == [] and kept.numbers == {1, 2}

    assert kept.pictures() == {1: uri(b"one"), 2: None}
    assert kept.pictures() == {1: uri(b"one"), 2: None}
    assert maker.seen == [b"broken", b"one"]


def test_only_the_newest_are_kept_and_only_so_many_bytes(maker):
    kept = Thumbnails(max_bytes=100, make=maker)
    for number in range(50):
        kept.add(number, b"x")
    assert kept.numbers == set(range(50 - COUNT, 50))

    kept.add(50, b"y" * 95)
    assert kept.numbers == {45, 46, 47, 48, 49, 50}
    kept.add(51, b"z" * 101)  # alone too much
    assert kept.numbers == {45, 46, 47, 48, 49, 50}


def test_bytes_are_let_go_once_the_picture_is_made(maker):
    kept = Thumbnails(max_bytes=100, make=maker)
    kept.add(1, b"x" * 90)
    kept.pictures()
    kept.add(2, b"y" * 90)
    assert kept.numbers == {1, 2}


def test_what_is_pushed_out_while_it_is_decoded_leaves_nothing_behind():
    def make(images: Iterable[bytes]) -> Generator[bytes | None, None, None]:
        for _ in images:
            for number in range(2, 2 + COUNT):
                kept.add(number, b"x")
            yield b"late"

    kept = Thumbnails(max_bytes=100, make=make)
    kept.add(1, b"x" * 80)
    assert kept.pictures() == {}
    kept.add(20, b"y" * 80)
    assert 20 in kept.numbers and len(kept.numbers) == COUNT


def test_a_flood_is_decoded_only_now_and_then(maker):
    now = [100.0]
    kept = Thumbnails(make=maker, clock=lambda: now[0])
    kept.add(1, b"one")
    kept.pictures()
    kept.add(2, b"two")
    now[0] += PAUSE_S / 2
    assert kept.pictures() == {1: uri(b"one")}
    now[0] += PAUSE_S
    assert kept.pictures() == {1: uri(b"one"), 2: uri(b"two")}


def test_a_slow_machine_answers_with_the_newest_first_and_the_rest_later():
    now = [0.0]

    def make(images: Iterable[bytes]) -> Generator[bytes | None, None, None]:
        for _ in images:
            now[0] += LOOK_S
            yield b"slow"

    kept = Thumbnails(make=make, clock=lambda: now[0])
    for number in range(5):
        kept.add(number, b"x")
    assert set(kept.pictures()) == {4, 3}
    now[0] += PAUSE_S
    assert set(kept.pictures()) == {4, 3, 2, 1}


def test_a_machine_that_starts_no_process_shows_nothing(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/dev/null")
    assert list(pictures_of([encoded(picture(), "PNG")])) == [None]


def test_pictures_are_made_by_one_process_that_is_gone_when_nobody_looks(monkeypatch):
    started: list[subprocess.Popen[bytes]] = []

    class Started(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Started)
    kept = Thumbnails()
    for number in (1, 2):
        kept.add(number, encoded(picture(seed=number), "PNG"))

    assert all(kept.pictures().values())

    assert [process.poll() is None for process in started] == [False]
