"""Labels become canonical, and the header check turns away what must not be decoded: nothing else."""

import io
import random
import struct
import time
import timeit

import pytest
from PIL import Image

from streams import record
from streams.record import (
    LABEL_BYTES_PER_CHAR,
    MAX_DETAIL_CHARS,
    MAX_SCANS,
    Reason,
    Unusable,
    canonical_label,
    check_image,
)
from tests.bad_images import MAX_BYTES, MAX_PIXELS, OddImage, bad_images, encoded, good_images, picture, png_of

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        ("cat", "cat"),
        (b"cat", "cat"),
        ("  polar \t\n bear ", "polar bear"),
        ("polar\u00a0bear", "polar bear"),
        ("Zu\u0308rich", "Zürich"),
        ("Cat", "Cat"),
        ("x" * 20, "x" * 20),
        ("黒猫", "黒猫"),
    ],
)
def test_a_label_is_normalised_and_its_case_is_kept(raw, label):
    assert canonical_label(raw, max_chars=20) == label


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("", Reason.MISSING_LABEL),
        (b" \n ", Reason.MISSING_LABEL),
        (b"caf\xe9", Reason.LABEL_TYPE),
        ("caf\udce9", Reason.LABEL_TYPE),
        ("x" * 21, Reason.LABEL_TYPE),
        ("nul\0", Reason.LABEL_TYPE),
        ("bell\x07", Reason.LABEL_TYPE),
    ],
)
def test_a_label_that_is_no_text_is_unusable_with_a_reason(raw, reason):
    with pytest.raises(Unusable) as caught:
        canonical_label(raw, max_chars=20)
    assert caught.value.reason == reason
    caught.value.detail.encode()  # can be written to a dead letter


def test_a_label_is_bounded_before_anything_is_done_with_it():
    # given a syllable in three parts for every character allowed, the most that text can shrink
    hangul = "\u1112\u1161\u11ab" * 20
    assert canonical_label(hangul, max_chars=20) == "\ud55c" * 20
    assert canonical_label("x" + " " * (20 * LABEL_BYTES_PER_CHAR - 1), max_chars=20) == "x"

    # when there is one byte more than the bound
    with pytest.raises(Unusable, match="label of 241 bytes or characters, at most 240") as caught:
        canonical_label(b"x" + b" " * (20 * LABEL_BYTES_PER_CHAR), max_chars=20)
    assert caught.value.reason == Reason.LABEL_TYPE

    # then what is slow to put in order costs nothing
    slow = "a" + "\u0301\u0316" * 44_000
    began = time.perf_counter()
    with pytest.raises(Unusable):
        canonical_label(slow, max_chars=200)
    assert time.perf_counter() - began < 0.05


def test_the_detail_of_a_rejection_is_cut():
    assert len(Unusable(Reason.BOMB, "x" * 10**6).detail) == MAX_DETAIL_CHARS
    assert len(str(Unusable(Reason.BOMB, "x" * 10**6))) < MAX_DETAIL_CHARS + 20


def accepted(image: OddImage) -> None:
    check_image(image.data, MAX_BYTES, MAX_PIXELS)


@pytest.mark.parametrize("image", good_images(), ids=lambda image: image.name)
def test_an_unusual_image_is_accepted(image):
    accepted(image)


@pytest.mark.parametrize("image", [i for i in bad_images() if i.stage == "intake"], ids=lambda image: image.name)
def test_a_bad_header_is_rejected_with_its_reason(image):
    with pytest.raises(Unusable) as caught:
        accepted(image)
    assert caught.value.reason == image.reason


@pytest.mark.parametrize("image", [i for i in bad_images() if i.stage == "decode"], ids=lambda image: image.name)
def test_what_only_a_decoder_can_see_passes(image):
    accepted(image)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (150, 2), (300, 300)])
def test_the_pixel_limit_reads_the_dimensions_that_pillow_reads(kind, size):
    data = encoded(picture(size=size), kind)
    pixels = size[0] * size[1]
    check_image(data, MAX_BYTES, max_pixels=pixels)
    with pytest.raises(Unusable, match=f"{size[0]} x {size[1]} pixels"):
        check_image(data, MAX_BYTES, max_pixels=pixels - 1)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of corrupt metadata
@pytest.mark.parametrize("image", good_images(), ids=lambda image: image.name)
def test_no_mutation_makes_the_check_fail_otherwise_or_refuse_what_pillow_opens(image):
    draw = random.Random(image.name)
    for _ in range(100):
        data = bytearray(image.data)
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(min(len(data), 200))] = draw.randrange(256)
        del data[draw.choice([len(data), draw.randrange(1, len(data))]) :]
        try:
            check_image(bytes(data), MAX_BYTES, MAX_PIXELS)
        except Unusable as unusable:
            if unusable.reason in (Reason.BOMB, Reason.BAD_DIMENSIONS):
                continue
            with pytest.raises(Exception):  # noqa: B017 (Pillow raises nearly anything)
                Image.open(io.BytesIO(data), formats=FORMATS).load()


def scans_of(count: int) -> bytes:
    """A progressive JPEG of `count` scans: its last one again and again."""
    data = encoded(picture(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (count - data.count(b"\xff\xda") + 1) + data[-2:]


def bomb(data: bytes, max_pixels: int) -> bool:
    try:
        check_image(data, 10**7, max_pixels)
    except Unusable as unusable:
        return unusable.reason == Reason.BOMB
    return False


def test_a_jpeg_may_have_scans_up_to_their_bound_and_no_more():
    assert not bomb(scans_of(MAX_SCANS), MAX_PIXELS) and bomb(scans_of(MAX_SCANS + 1), MAX_PIXELS)
    # what only looks like scans, in a comment or behind the image, counts for nothing
    plain = encoded(picture(), "JPEG", comment=b"\xff\xda" * 100)
    assert not bomb(plain + b"\xff\xda\0\2" * 100, MAX_PIXELS)


def test_a_jpeg_as_most_encoders_write_it_is_known_without_a_walk_and_says_the_same():
    draw = random.Random(0)
    jpegs = [encoded(picture(mode), "JPEG", **options) for mode in ("RGB", "L", "CMYK") for options in FORMS_OF_JPEG]
    known = 0
    for jpeg in jpegs:
        for _ in range(200):
            data = bytearray(jpeg)
            for _ in range(draw.randrange(3)):
                data[draw.randrange(len(data) // 2)] = draw.randrange(256)
            if record._USUAL_JPEG.match(bytes(data)):
                known += 1
                frame = record._jpeg_frame(bytes(data))
                height, width = struct.unpack_from(">HH", data, frame + 5)
                assert record._dimensions(bytes(data)) == (width, height, 0)
                assert record._jpeg_scans(bytes(data), frame) == 1
    assert known > 200


FORMS_OF_JPEG = ({}, {"optimize": True}, {"progressive": True}, {"subsampling": 0}, {"comment": b"x" * 70})


def test_what_takes_more_memory_to_decode_than_others_may_have_fewer_pixels():
    # with 50 million pixels allowed, 617 MB of memory are
    def webp(width: int, height: int) -> bytes:
        bits = struct.pack("<I", (width - 1) | (height - 1) << 14)
        return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8L" + struct.pack("<I", 9) + b"\x2f" + bits + bytes(5)

    assert not bomb(png_of(9999, 5000), 50_000_000)
    assert not bomb(webp(6800, 5000), 50_000_000) and bomb(webp(6900, 5000), 50_000_000)


def test_forms_that_are_decoded_in_python_are_small():
    assert not bomb(b"P2 2000 1000 255\n", 10**7) and bomb(b"P2 2001 1000 255\n", 10**7)
    assert not bomb(b"P3 1000 666 255\n", 10**7) and bomb(b"P3 1000 667 255\n", 10**7)
    assert not bomb(b"P6 2001 1000 255\n", 10**7)
    bmp = bytearray(encoded(picture("P"), "BMP"))
    bmp[18:26] = struct.pack("<ii", 2001, 1000)
    assert not bomb(bytes(bmp), 10**7)
    bmp[30] = 1
    assert bomb(bytes(bmp), 10**7)


def test_the_check_costs_a_few_microseconds():
    data = encoded(picture(size=(500, 400)), "JPEG", quality=95)
    seconds = min(timeit.repeat(lambda: check_image(data, MAX_BYTES, MAX_PIXELS), number=200, repeat=5)) / 200
    assert seconds < 50e-6


@pytest.mark.parametrize("filling", [b" ", b"#"])
def test_a_ppm_whose_header_never_ends_is_refused_at_once(filling):
    began = time.perf_counter()
    with pytest.raises(Unusable) as refused:
        check_image(b"P6 " + filling * 16_000_000, 2**25, 50_000_000)
    assert refused.value.reason == Reason.UNDECODABLE
    assert time.perf_counter() - began < 1  # 4.4 s where all of it is read byte by byte


def test_a_tiff_of_many_tags_is_looked_at_in_a_moment():
    tags = struct.pack("<HHII", 256, 4, 1, 48) + struct.pack("<HHII", 257, 4, 1, 32)
    tags += b"".join(struct.pack("<HHII", 60_000, 4, 1, number) for number in range(65_533))
    data = b"II*\0" + struct.pack("<IH", 8, 65_535) + tags
    began = time.process_time()
    check_image(data, 2**25, MAX_PIXELS)
    assert time.process_time() - began < 0.1  # 0.6 s where all of them are read
