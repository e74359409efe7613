"""Images are decoded in processes that a bad one may end: the same pixels, in fair turns, and only that one is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from exporter import decoder, decoders
from exporter.decoders import ATTEMPTS, REQUEST_IMAGES, Busy, Decoders, DecodersError, TooManyPixels
from exporter.image_header import ImageError
from exporter.preprocess import Preprocess, decode, planes
from tests.bad_images import (
    MAX_PIXELS,
    TOO_SLOW,
    all_images,
    encoded,
    jpeg_with_scans,
    picture,
    png_chunk,
    png_of,
    slow_image,
    webp_of,
)

PREPROCESS = Preprocess(32, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
LARGE = Preprocess(1300, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bilinear", "longest")
"""Its pixels do not fit into the shared memory."""
GOOD = encoded(picture(), "PNG")


@pytest.fixture
def two() -> Iterator[Decoders]:
    with closing(Decoders(MAX_PIXELS, workers=2)) as made:
        yield made


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"it did not come about within {seconds} s"
        time.sleep(0.01)
    return found


def pids(pool: Decoders) -> list[int]:
    return [one._process.pid for one in tuple(pool._decoders)]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def grey_png(width: int, height: int) -> bytes:
    """A black PNG, small as a file and as large as it says."""
    return png_of(width, height, bytes((width + 1) * height))


@pytest.mark.parametrize("preprocess", [PREPROCESS, LARGE], ids=["small", "large"])
def test_pixels_and_errors_are_those_of_decoding_here(two, preprocess):
    images = [image.data for image in all_images()]
    for image, got in zip(all_images(), two.pixels(images, preprocess), strict=True):
        try:
            wanted = preprocess.scale(planes(image.data, MAX_PIXELS, preprocess))
        except ImageError as error:
            assert isinstance(got, ImageError) and (got.reason, got.detail) == (error.reason, error.detail), image.name
        else:
            assert isinstance(got, np.ndarray) and np.array_equal(got, wanted), image.name


def test_an_avif_and_sixteen_bits_of_every_kind_are_the_same_too(two):
    deep = picture("I;16")
    images = [encoded(picture(), "AVIF"), encoded(deep, "TIFF"), encoded(deep, "PNG"), encoded(deep, "PPM")]
    images.append(encoded(deep.convert("I").convert("I;16B"), "TIFF"))
    for data, got in zip(images, two.pixels(images, PREPROCESS), strict=True):
        assert isinstance(got, np.ndarray) and np.array_equal(got, PREPROCESS(decode(data, MAX_PIXELS)))


def test_a_large_jpeg_is_scaled_there_as_it_is_here(two):
    large = encoded(Image.effect_mandelbrot((1000, 700), (-3, -2.5, 2, 2.5), 9).convert("RGB"), "JPEG")
    [got] = two.pixels([large], PREPROCESS)
    assert np.array_equal(got, PREPROCESS.scale(planes(large, MAX_PIXELS, PREPROCESS)))
    assert not np.array_equal(got, PREPROCESS(decode(large, MAX_PIXELS)))


def test_an_error_among_the_images_comes_back_in_its_place(two):
    error = ImageError("undecodable", "cannot be read")
    first, second, third = two.pixels([GOOD, error, GOOD], PREPROCESS)
    assert second is error and np.array_equal(first, third)


def test_a_picture_is_small_upright_and_shows_what_is_there(two):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(picture(size=(300, 200)), "JPEG", exif=exif)
    assert two.picture(turned, 96).size == (64, 96)
    assert two.picture(turned[:-500], 96).size == (64, 96)
    [cut] = two.pixels([turned[:-500]], PREPROCESS)
    assert isinstance(cut, ImageError)
    with pytest.raises(ImageError, match="unsupported_format"):
        two.picture(b"no image", 96)


def test_an_image_that_takes_too_long_is_a_bomb_and_its_neighbours_are_decoded(two, monkeypatch):
    monkeypatch.setattr(decoder, "CPU_S", 0.1)
    monkeypatch.setattr(decoder, "CPU_S_PER_PIXEL", 0.0)
    monkeypatch.setattr(decoder, "WALL_TIMES", 100)  # whatever else the machine has to do
    images = [GOOD] * 10 + [slow_image(TOO_SLOW)] + [GOOD] * 10
    found = list(two.pixels(images, PREPROCESS))
    bomb = found.pop(10)
    assert isinstance(bomb, ImageError) and bomb.reason == "bomb" and "0.1 s of processor time" in bomb.detail
    assert len(found) == 20 and all(isinstance(one, np.ndarray) for one in found)


def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give decoders less memory than headers promise."""
    program = decoder._PROGRAM.replace(
        "from exporter.decoder_child",
        "import exporter.decoder_child as c; c.memory_limit = lambda _: 2**24; c.SPARE_BYTES = 0; "
        "from exporter.decoder_child",
    )
    monkeypatch.setattr(decoder, "_PROGRAM", program)


def test_an_image_that_takes_too_much_memory_is_a_bomb(monkeypatch):
    short_of_memory(monkeypatch)
    with closing(Decoders(50_000_000, workers=1)) as pool:
        large, small = pool.pixels([grey_png(4000, 4000), GOOD], PREPROCESS)
    assert isinstance(large, ImageError) and large.reason == "bomb" and "more than 588 MiB of memory" in large.detail
    assert isinstance(small, np.ndarray)


def test_where_the_machine_has_no_memory_no_image_is_blamed(monkeypatch):
    short_of_memory(monkeypatch)
    monkeypatch.setattr(decoder, "_has_memory", lambda size: False)
    with (
        closing(Decoders(50_000_000, workers=1)) as pool,
        pytest.raises(DecodersError, match="has no 588 MiB of memory left"),
    ):
        list(pool.pixels([grey_png(4000, 4000)], PREPROCESS))


def dying(monkeypatch: pytest.MonkeyPatch, signal_name: str, mark: bytes) -> None:
    """Let decoders be ended by a signal when they meet an image that ends in `mark`."""
    program = decoder._PROGRAM.replace(
        "from exporter.decoder_child",
        "import os, signal, exporter.decoder_child as c; real = c.planes; "
        f"c.planes = lambda data, *more: os.kill(os.getpid(), signal.{signal_name}) "
        f"if data.endswith({mark!r}) else real(data, *more); from exporter.decoder_child",
    )
    monkeypatch.setattr(decoder, "_PROGRAM", program)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL"])
def test_an_image_that_ends_its_process_again_and_again_is_rejected_alone(two, monkeypatch, name):
    dying(monkeypatch, name, b"poison")
    images = [GOOD] * 5 + [GOOD + b"poison"] + [GOOD] * 5
    found = list(two.pixels(images, PREPROCESS))
    guilty = found.pop(5)
    assert isinstance(guilty, ImageError) and guilty.reason == "undecodable"
    assert guilty.detail == f"the decoder process was killed by {name}, {ATTEMPTS} times"
    assert len(found) == 10 and all(isinstance(one, np.ndarray) for one in found)


def test_processes_killed_from_outside_cost_no_image(two):
    stop, killed = threading.Event(), []

    def kill() -> None:
        while not stop.wait(0.2):
            # One that has answered: three that are killed before they are up are a fault of the machine.
            for one in [one for one in tuple(two._decoders) if one._images][:1]:
                one._process.kill()
                killed.append(one)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        until = time.monotonic() + 60
        while len(killed) < 6:
            assert time.monotonic() < until
            assert all(isinstance(one, np.ndarray) for one in two.pixels([GOOD] * 40, PREPROCESS))
    finally:
        stop.set()
        killer.join()


def test_a_process_that_stands_still_is_killed_and_blames_no_image(two, monkeypatch):
    monkeypatch.setattr(decoder, "CPU_S", 0.1)
    dying(monkeypatch, "SIGSTOP", b"still")
    with pytest.raises(DecodersError, match="did not answer in time"):
        list(two.pixels([GOOD + b"still"], PREPROCESS))
    [again] = two.pixels([GOOD], PREPROCESS)
    assert isinstance(again, np.ndarray)


def test_a_decoder_that_is_late_for_long_is_told(two, monkeypatch):
    assert two.why_not_alive() == []
    list(two.pixels([GOOD], PREPROCESS))
    for one in two._decoders:
        one._due = time.monotonic() - decoders.STUCK_S - 5
    assert "stuck for 35 s" in two.why_not_alive()[0]


def test_processes_are_replaced_after_so_many_images(two, monkeypatch):
    monkeypatch.setattr(decoder, "MAX_IMAGES", 3)
    list(two.pixels([GOOD], PREPROCESS))
    [before] = pids(two)
    list(two.pixels([GOOD] * 4, PREPROCESS))
    assert before not in pids(two) and gone(before)


def futures(pool: Decoders, *images: bytes) -> list[Future[Any]]:
    return pool.submit(pool.check(images), PREPROCESS)


def test_a_lone_image_does_not_wait_for_all_of_anothers():
    with closing(Decoders(MAX_PIXELS, workers=1)) as pool:
        others = futures(pool, *[grey_png(1000, 1000 - number) for number in range(4)])
        more = futures(pool, *[grey_png(1000, 900 - number) for number in range(4)])
        [lone] = futures(pool, GOOD)
        lone.result(60)
        assert sum(one.done() for one in others + more) <= 2
        for one in others + more:
            one.result(60)


def test_what_is_cancelled_is_never_decoded(monkeypatch):
    begun: list[str] = []

    class Counting(decoder.Decoder):
        def decode(self, orders: Any) -> Any:
            begun.extend(str(order.pixels) for order in orders)
            return super().decode(orders)

    monkeypatch.setattr(decoders, "Decoder", Counting)
    monkeypatch.setattr(decoder, "WALL_TIMES", 100)  # whatever else the machine has to do
    with closing(Decoders(MAX_PIXELS, workers=1)) as pool:
        first = futures(pool, slow_image(TOO_SLOW))
        wait_for(lambda: begun)
        left = futures(pool, *[grey_png(100, 100)] * 3)
        for one in left:
            one.cancel()
        [last] = futures(pool, GOOD)
        assert first[0].result(60) is not None and last.result(60) is not None
        assert begun == ["666000", str(48 * 32)]
        assert pool._pixels == pool._images == pool._bytes == 0 and not pool._turns


def test_a_request_has_so_many_pixels_and_no_more():
    with closing(Decoders(1000, workers=1)) as pool:
        whole = grey_png(50, 20)
        for one in futures(pool, *[whole] * REQUEST_IMAGES):
            one.result(60)
        with pytest.raises(TooManyPixels, match=f"{1000 * REQUEST_IMAGES + 1} pixels in all"):
            futures(pool, *[whole] * REQUEST_IMAGES, grey_png(1, 1))


def test_where_much_waits_large_requests_are_told_to_come_again_and_small_ones_are_taken():
    with closing(Decoders(MAX_PIXELS, workers=1)) as pool:
        whole = [grey_png(1000, 1000)] * REQUEST_IMAGES
        waiting = futures(pool, *whole) + futures(pool, *whole)
        with pytest.raises(Busy, match="come again"):
            futures(pool, *whole)
        small = futures(pool, GOOD)
        for one in waiting + small:
            one.result(60)
        for one in futures(pool, *whole):
            one.result(60)


def test_reading_ahead_is_bounded():
    with closing(Decoders(1000, workers=1)) as pool:
        read = 0

        def images() -> Iterator[bytes]:
            nonlocal read
            for _ in range(1000):
                read += 1
                yield GOOD[:20] + bytes(2**20)  # no image is larger than what its header says

        next(iter(pool.pixels(images(), PREPROCESS)))
        assert read <= 2 * decoders.TRIP_IMAGES + 1


def test_what_waits_when_it_is_closed_fails_at_once_and_what_comes_later_too():
    pool = Decoders(MAX_PIXELS, workers=1)
    waiting = futures(pool, slow_image(TOO_SLOW), *[GOOD] * 3)
    wait_for(lambda: pids(pool))
    running = pids(pool)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 5
    assert all(gone(pid) for pid in running)
    for one in waiting:
        with pytest.raises(DecodersError, match="closed"):
            one.result(0)
    with pytest.raises(DecodersError, match="closed"):
        futures(pool, GOOD)
    with pytest.raises(DecodersError, match="closed"):
        list(pool.pixels([GOOD], PREPROCESS))


def test_no_process_outlives_a_parent_that_is_killed():
    code = (
        "import time; from exporter.decoders import Decoders; from exporter.preprocess import Preprocess; "
        "from tests.test_decoders import *; pool = Decoders(MAX_PIXELS, 2); "
        "list(pool.pixels([GOOD] * 64, PREPROCESS)); futures(pool, *[slow_image(TOO_SLOW)] * 2); "
        "wait_for(lambda: len(pids(pool)) == 2); print(*pids(pool), flush=True); time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2 and not any(gone(pid) for pid in children)
    parent.kill()
    parent.communicate()
    wait_for(lambda: all(gone(pid) for pid in children))


def test_a_process_has_no_secrets_of_the_environment_and_no_files_of_its_parent(two, monkeypatch, tmp_path):
    monkeypatch.setenv("GAPSTREAM_SOURCE__KAFKA__PASSWORD", "hush")
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        list(two.pixels([GOOD], PREPROCESS))
        [pid] = pids(two)
        assert b"hush" not in Path(f"/proc/{pid}/environ").read_bytes()
        files = [one.readlink() for one in Path(f"/proc/{pid}/fd").iterdir()]
    assert len(files) == 5 and tmp_path / "open" not in files
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"


def test_a_machine_that_starts_no_process_blames_no_image(two, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/dev/null")
    with pytest.raises(DecodersError, match="could not be started"):
        list(two.pixels([GOOD], PREPROCESS))
    monkeypatch.undo()
    assert isinstance(next(two.pixels([GOOD], PREPROCESS)), np.ndarray)


def test_a_decoder_needs_neither_torch_nor_a_server():
    code = "import sys, exporter.decoder_child; print({'torch', 'onnxruntime', 'starlette'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def deep_png(side: int) -> bytes:
    """97 kB of 16-bit grey that took 940 MB to decode."""
    header = side.to_bytes(4, "big") * 2 + bytes([16, 0, 0, 0, 0])
    pixels = zlib.compress(bytes((2 * side + 1) * side), 9)
    parts = (b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, data) for kind, data in parts)


def poison() -> dict[str, bytes]:
    """What once took 10 to 30 seconds, or a gigabyte, of whoever decoded it."""
    return {
        "jpeg of a hundred scans": jpeg_with_scans(100, (4000, 4000)),
        "jpeg whose last scan is repeated 400 times": jpeg_with_scans(400, (4000, 4000)),
        "webp of 38 bytes and 982 MB": webp_of(7389, 7389),
        "plain ppm of 31 MB": b"P3 2000 2580 255\n" + b"90 " * 2000 * 2580 * 2,
    }


@pytest.mark.parametrize("name", poison())
def test_poison_of_old_is_refused_by_its_header_without_a_process(name):
    with closing(Decoders(50_000_000)) as pool:
        [answer] = pool.pixels([poison()[name]], PREPROCESS)
        assert isinstance(answer, ImageError) and answer.reason == "bomb" and not pids(pool)


def test_sixteen_bits_take_no_more_memory_than_eight():
    with closing(Decoders(42_000_000, workers=1)) as pool:
        [answer] = pool.pixels([deep_png(6480)], PREPROCESS)
    assert isinstance(answer, np.ndarray)


@pytest.mark.slow
def test_the_largest_honest_images_of_every_format_pass_within_the_limits():
    """Takes a minute: .venv/bin/python -m pytest -m slow tests/test_decoders.py."""
    side = 7000
    image = Image.effect_noise((side, side), 60).convert("RGB")
    kinds: dict[str, bytes] = {"deep png": deep_png(side)}
    for kind, options in (
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {"compress_level": 1}),
        ("GIF", {}),
        ("BMP", {}),
        ("AVIF", {"speed": 10}),
    ):
        kinds[kind + str(options)] = encoded(image, kind, **options)
    kinds["WEBP"] = encoded(image.crop((0, 0, 5400, 5400)), "WEBP", method=0)
    kinds["PPM"] = encoded(image, "PPM")
    kinds["TIFF"] = encoded(image.crop((0, 0, 6000, 6000)), "TIFF")  # its header lets expect twice the file
    with closing(Decoders(50_000_000, workers=1)) as pool:
        for (name, data), got in zip(kinds.items(), pool.pixels(kinds.values(), PREPROCESS), strict=True):
            assert isinstance(got, np.ndarray), (name, len(data), got)
