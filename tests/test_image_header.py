"""What an image's header tells before it is decoded: right for good images, a bound for bad ones, cheap always."""

import io
import random
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from exporter.image_header import (
    MAX_SCANS,
    MAX_SLOW_VALUES,
    Header,
    check_header,
    memory_limit,
)
from exporter.preprocess import MAX_ASPECT, ImageError, decode
from streams.record import Reason
from tests.bad_images import (
    MAX_PIXELS,
    all_images,
    bad_images,
    encoded,
    good_images,
    jpeg_of,
    jpeg_with_scans,
    picture,
    png_chunk,
    png_of,
    webp_of,
)

MILLION = 1_000_000


def refused(data: bytes, max_pixels: int = 50 * MILLION) -> str:
    with pytest.raises(ImageError) as caught:
        check_header(data, max_pixels)
    assert caught.value.detail
    return caught.value.reason


def ppm(kind: int, width: int, height: int, largest: int) -> bytes:
    return b"P%d %d %d %d\n" % (kind, width, height, largest)


def deep_png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize("image", good_images(), ids=lambda image: image.name)
def test_a_good_image_passes_with_the_size_it_has(image):
    header = check_header(image.data, MAX_PIXELS)

    assert {header.width, header.height} == set(decode(image.data, MAX_PIXELS).size)
    assert header.format == Image.open(io.BytesIO(image.data)).format
    assert header.memory_bytes >= 8 * header.pixels


@pytest.mark.parametrize("image", bad_images(), ids=lambda image: image.name)
def test_a_bad_image_is_refused_by_its_header_or_left_to_a_decoder(image):
    if image.stage == "decode" or image.reason is Reason.TOO_LARGE:
        check_header(image.data, MAX_PIXELS)
    else:
        reason = refused(image.data, MAX_PIXELS)
        assert reason == image.reason or image.reason is Reason.UNDECODABLE


@pytest.mark.parametrize(
    ("mode", "kind", "options", "expected"),
    [
        ("RGB", "JPEG", {}, Header("JPEG", 48, 32)),
        ("L", "JPEG", {}, Header("JPEG", 48, 32, 1)),
        ("CMYK", "JPEG", {}, Header("JPEG", 48, 32, 4)),
        ("RGB", "JPEG", {"progressive": True}, Header("JPEG", 48, 32, scans=10, keeps_coefficients=True)),
        ("RGBA", "PNG", {}, Header("PNG", 48, 32, 4)),
        ("LA", "PNG", {}, Header("PNG", 48, 32, 2)),
        ("P", "PNG", {}, Header("PNG", 48, 32, 1)),
        ("I;16", "PNG", {}, Header("PNG", 48, 32, 1, 16)),
        ("1", "PNG", {}, Header("PNG", 48, 32, 1, 1)),
        ("P", "GIF", {}, Header("GIF", 48, 32, 1)),
        ("RGB", "WEBP", {}, Header("WEBP", 48, 32, 4)),
        ("RGB", "WEBP", {"lossless": True}, Header("WEBP", 48, 32, 4)),
        ("RGBA", "WEBP", {"exif": b"Exif\0\0"}, Header("WEBP", 48, 32, 4)),
        ("RGB", "BMP", {}, Header("BMP", 48, 32, 3)),
        ("P", "BMP", {}, Header("BMP", 48, 32, 1)),
        ("RGB", "TIFF", {}, Header("TIFF", 48, 32, 3)),
        ("RGB", "TIFF", {"big_tiff": True}, Header("TIFF", 48, 32, 3)),
        ("I;16", "TIFF", {}, Header("TIFF", 48, 32, 1, 16)),
        ("I;16B", "TIFF", {}, Header("TIFF", 48, 32, 1, 16)),
        ("1", "TIFF", {}, Header("TIFF", 48, 32, 1, 1)),
        ("RGB", "PPM", {}, Header("PPM", 48, 32, 3)),
        ("1", "PPM", {}, Header("PPM", 48, 32, 1)),
        ("RGB", "AVIF", {}, Header("AVIF", 48, 32, 4)),
    ],
)
def test_the_facts_of_every_format(mode, kind, options, expected):
    image = picture("I;16").convert("I").convert("I;16B") if mode == "I;16B" else picture(mode)

    assert check_header(encoded(image, kind, **options), MAX_PIXELS) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"P6 # a comment\n48\t# another\r32\n255\n", Header("PPM", 48, 32, 3)),
        (ppm(5, 48, 32, 65535), Header("PPM", 48, 32, 1, 16)),
        (ppm(5, 48, 32, 4095), Header("PPM", 48, 32, 1, 16, slow=True)),
        (ppm(6, 48, 32, 100), Header("PPM", 48, 32, 3, slow=True)),
        (ppm(3, 48, 32, 255), Header("PPM", 48, 32, 3, slow=True)),
        (b"P1 48 32\n1 0 1", Header("PPM", 48, 32, 1, slow=True)),
    ],
)
def test_what_a_ppm_says_and_whether_it_is_decoded_value_by_value(data, expected):
    assert check_header(data, MAX_PIXELS) == expected


@pytest.mark.parametrize(
    "of", [jpeg_of, png_of, webp_of, lambda w, h: ppm(6, w, h, 255)], ids=["jpeg", "png", "webp", "ppm"]
)
def test_one_pixel_more_than_allowed_is_a_bomb(of):
    assert check_header(of(1000, 1000), MILLION).pixels == MILLION
    assert refused(of(1001, 1000), MILLION) == "bomb"


def test_sides_may_differ_so_many_times_and_no_more():
    check_header(png_of(10 * MAX_ASPECT, 10), MAX_PIXELS)
    assert refused(png_of(10 * MAX_ASPECT + 1, 10), MAX_PIXELS) == "bad_dimensions"
    assert refused(png_of(10, 10 * MAX_ASPECT + 1), MAX_PIXELS) == "bad_dimensions"


def test_one_scan_more_than_allowed_is_a_bomb():
    assert check_header(jpeg_with_scans(MAX_SCANS), MAX_PIXELS).scans == MAX_SCANS
    assert refused(jpeg_with_scans(MAX_SCANS + 1), MAX_PIXELS) == "bomb"
    assert refused(jpeg_with_scans(400), MAX_PIXELS) == "bomb"


def test_scans_are_not_what_a_camera_appends_or_keeps_in_a_segment():
    film = b"\xff\xda" * 1000
    segment = b"\xff\xe5" + struct.pack(">H", 2002) + film[:2000]
    jpeg = encoded(picture(), "JPEG", progressive=True)
    frame = jpeg.index(b"\xff\xc2") + 19  # behind the frame header

    assert check_header(jpeg + film, MAX_PIXELS).scans == 10
    assert check_header(jpeg[:frame] + segment + jpeg[frame:], MAX_PIXELS).scans == 10


def test_a_scan_by_itself_makes_a_decoder_keep_coefficients_and_need_more_memory():
    simple = check_header(encoded(picture(), "JPEG"), MAX_PIXELS)
    progressive = check_header(encoded(picture(), "JPEG", progressive=True), MAX_PIXELS)

    assert progressive.memory_bytes > simple.memory_bytes


def test_a_format_that_needs_more_memory_may_have_fewer_pixels():
    side = int((memory_limit(50 * MILLION) / 18) ** 0.5)

    check_header(webp_of(side - 1, side - 1), 50 * MILLION)
    assert refused(webp_of(side + 1, side + 1)) == "bomb"


@pytest.mark.parametrize(
    "of",
    [jpeg_of, png_of, deep_png, lambda w, h: ppm(6, w, h, 255), lambda w, h: ppm(5, w, h, 65535)],
    ids=["jpeg", "png", "deep png", "ppm", "deep ppm"],
)
def test_ordinary_images_may_be_as_large_as_allowed(of):
    check_header(of(10_000, 5_000), 50 * MILLION)


@pytest.mark.parametrize(("kind", "largest", "channels"), [(3, 255, 3), (2, 255, 1), (6, 100, 3), (5, 4095, 1)])
def test_what_is_decoded_value_by_value_may_have_few_values(kind, largest, channels):
    rows = MAX_SLOW_VALUES // channels // 1000

    check_header(ppm(kind, 1000, rows, largest), 50 * MILLION)
    assert refused(ppm(kind, 1000, rows + 1, largest)) == "bomb"


def run_length_bmp() -> bytes:
    bmp = bytearray(encoded(picture("P"), "BMP"))
    bmp[30:34] = struct.pack("<I", 1)
    return bytes(bmp)


def test_a_run_length_bmp_is_slow():
    assert check_header(run_length_bmp(), MAX_PIXELS).slow


def test_tags_of_a_tiff_that_are_broken_are_passed_over_as_pillow_does():
    tiff = bytearray(encoded(picture(), "TIFF"))
    (at,) = struct.unpack_from("<I", tiff, 4)
    (count,) = struct.unpack_from("<H", tiff, at)
    for number in range(count):
        entry = at + 2 + 12 * number
        if struct.unpack_from("<H", tiff, entry)[0] == 258:  # bits, which are elsewhere
            struct.pack_into("<I", tiff, entry + 8, 2**32 - 1)

    assert check_header(bytes(tiff), MAX_PIXELS) == Header("TIFF", 48, 32, 3, 1)


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_flipped_bytes_raise_nothing_else_and_refuse_nothing_that_is_decoded(kind):
    # Given images with a few bytes changed in their first half
    rng = np.random.default_rng(0)
    original = encoded(picture(), kind)
    for _ in range(300):
        data = bytearray(original)
        for position in rng.integers(0, len(data) // 2, 2):
            data[position] = rng.integers(0, 256)
        try:
            decode(bytes(data), MAX_PIXELS)
        except ImageError:
            decoded = False
        else:
            decoded = True
        # When their headers are read
        try:
            check_header(bytes(data), MAX_PIXELS)
        except ImageError as error:
            # Then all that can be decoded passes, but for what decoding would cost
            assert not decoded or error.reason == "bomb", error


def test_any_beginning_of_any_image_gives_a_header_or_an_error():
    for image in all_images():
        for length in range(min(len(image.data), 120)):
            for data in (image.data[:length], image.data[:length] + b"\xff" * 30):
                try:
                    check_header(data, MAX_PIXELS)
                except ImageError as error:
                    assert error.reason in set(Reason)


MIB = 2**20
FRAME = jpeg_of(48, 32)[: jpeg_of(48, 32).index(b"\xff\xc0") + 19]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xff\xd8" + b"\xff" * 16 * MIB, id="jpeg of fill bytes"),
        pytest.param(b"\xff\xd8\xff\xfe\x00\x02" * 4 * MIB, id="jpeg of empty comments"),
        pytest.param(FRAME + b"\xff\xda\x00\x02" * 60 + b"\xff\0" * 8 * MIB + b"\xff\xda" * 10, id="jpeg of stuffing"),
        pytest.param(FRAME + random.Random(0).randbytes(16 * MIB), id="jpeg of noise"),
        pytest.param(b"P6 #" + b"a" * 16 * MIB, id="ppm of one comment"),
        pytest.param(b"P6 " + b"#\n" * 8 * MIB, id="ppm of many comments"),
        pytest.param(b"\0\0\0\x20ftypavif" + b"\0\0\0\x14ispe\0\0\0\0" * MIB, id="avif of sizes"),
        pytest.param(b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 256, 4, 1, 5) * 65535, id="tiff of tags"),
    ],
)
def test_megabytes_made_to_be_slow_take_a_moment(data):
    began = time.process_time()
    try:
        check_header(data, MAX_PIXELS)
    except ImageError as error:
        assert error.reason in set(Reason)

    assert time.process_time() - began < 1
