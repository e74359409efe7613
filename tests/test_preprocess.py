"""Preprocessing equals open_clip's, and bad bytes become reasons."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from exporter.preprocess import ImageError, Preprocess, decode, planes, upright_rgb

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 1_000_000


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def open_clip_transform(preprocess: Preprocess):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    values = preprocess.to_dict()
    del values["jpeg_oversampling"]  # open_clip knows nothing of how an image was decoded
    return image_transform_v2(PreprocessCfg(**values), is_train=False)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    "size", [(32, 32), (64, 64), (63, 41), (41, 63), (224, 224), (225, 224), (301, 500), (1, 1), (3, 90), (447, 448)]
)
def test_an_image_of_any_size_equals_the_torch_transform(size, interpolation, resize_mode):
    preprocess = Preprocess(64, MEAN, STD, interpolation, resize_mode)
    image = picture(*size)

    expected = open_clip_transform(preprocess)(image).numpy()

    assert np.array_equal(preprocess(image), expected)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
def test_an_image_of_any_mode_equals_the_torch_transform_after_conversion(mode):
    preprocess = Preprocess(128, MEAN, STD)
    image = picture(50, 77, mode)

    mine = preprocess(decode(encoded(image), MAX_PIXELS))

    assert np.array_equal(mine, open_clip_transform(preprocess)(image.convert("RGB")).numpy())


@pytest.mark.parametrize(("mode", "format"), [("RGBA", "PNG"), ("LA", "PNG"), ("CMYK", "JPEG"), ("RGBA", "WEBP")])
def test_alpha_is_dropped_and_cmyk_converted(mode, format):
    data = encoded(picture(40, 30, mode), format)

    image = decode(data, MAX_PIXELS)

    assert image.mode == "RGB"
    assert image.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def test_a_palette_with_transparency_keeps_its_colours():
    image = picture(30, 30, "P")
    data = encoded(image, transparency=bytes(range(256)))

    assert decode(data, MAX_PIXELS).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_range_instead_of_turning_white(format):
    values = np.linspace(0, 65535, 30 * 20).reshape(20, 30).astype(np.uint16)

    decoded = np.asarray(decode(encoded(Image.fromarray(values), format), MAX_PIXELS))

    assert np.array_equal(decoded[..., 0], values >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_every_exif_orientation_is_undone(orientation, format):
    # Given an upright picture and how a camera in that orientation would have stored it
    upright = picture(48, 32)
    store = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Transpose that inverts each orientation's remedy
    stored = upright.transpose(Image.Transpose(store[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"quality": 100, "subsampling": 0} if format == "JPEG" else {"lossless": True}

    decoded = decode(encoded(stored, format, exif=exif.tobytes(), **lossless), MAX_PIXELS)

    assert decoded.size == upright.size
    difference = np.abs(np.asarray(decoded, np.int16) - np.asarray(upright, np.int16))
    assert difference.max() <= (4 if format == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore::Warning")
def test_a_broken_exif_block_does_not_lose_the_image():
    data = encoded(picture(20, 10), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0garbage")

    assert decode(data, MAX_PIXELS).size == (20, 10)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (12, 9), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)

    assert decode(data, MAX_PIXELS).getpixel((5, 5)) == (255, 0, 0)


SMALL = Preprocess(64, MEAN, STD)
"""At twice its size it needs JPEGs of 128 pixels on the shorter side."""


def decoded_size(data: bytes, preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """The size of the image that is resized."""
    sizes = []
    real = Preprocess.fit
    monkeypatch.setattr(
        Preprocess, "fit", lambda self, image, box=None: sizes.append(image.size) or real(self, image, box)
    )
    planes(data, 20_000_000, preprocess)
    monkeypatch.undo()
    return sizes[0]


def strayed(data: bytes, preprocess: Preprocess) -> tuple[float, int]:
    """How far the values, 0 to 255, are from those of an image that is decoded whole: the mean and the largest."""
    whole = preprocess.fit(decode(data, 20_000_000))
    difference = np.abs(planes(data, 20_000_000, preprocess).astype(np.int16) - whole)
    return float(difference.mean()), int(difference.max())


@pytest.mark.parametrize(
    ("size", "resize_mode", "expected"),
    [
        ((255, 400), "shortest", (255, 400)),
        ((256, 400), "shortest", (128, 200)),
        ((4000, 3000), "shortest", (500, 375)),
        ((1023, 2000), "shortest", (256, 500)),
        ((1024, 2000), "shortest", (128, 250)),
        ((1024, 200), "longest", (128, 25)),
        ((1024, 300), "squash", (512, 150)),
        ((300, 1024), "squash", (150, 512)),
        ((259, 515), "shortest", (130, 258)),
    ],
)
def test_a_large_jpeg_is_decoded_at_the_smallest_scale_with_twice_the_pixels_that_are_needed(
    size, resize_mode, expected, monkeypatch
):
    preprocess = Preprocess(64, MEAN, STD, resize_mode=resize_mode)

    assert decoded_size(encoded(picture(*size), "JPEG"), preprocess, monkeypatch) == expected


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=["", "progressive", "4:4:4"])
def test_a_scaled_jpeg_of_any_kind_hardly_differs_from_one_that_is_decoded_whole(mode, options):
    mean, largest = strayed(encoded(picture(1200, 900, mode), "JPEG", quality=90, **options), SMALL)

    assert 0 < mean < 0.5 and largest <= 4


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_jpeg_of_any_orientation_is_not_moved_where_its_sides_are_no_multiples_of_the_scale(
    orientation, resize_mode
):
    # Given sides that are one more than a multiple, of which the last column and row are hardly there
    preprocess = Preprocess(64, MEAN, STD, resize_mode=resize_mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stripes = Image.fromarray(np.random.default_rng(0).integers(0, 256, (11, 13, 3), dtype=np.uint8))
    data = encoded(stripes.resize((1145, 1025), Image.Resampling.BICUBIC), "JPEG", quality=95, exif=exif)

    mean, largest = strayed(data, preprocess)

    assert 0 < mean < 0.5 and largest <= 5


def test_a_jpeg_that_is_not_much_too_large_is_decoded_whole_bit_by_bit():
    assert strayed(encoded(picture(255, 400), "JPEG"), SMALL) == (0, 0)


def test_the_first_picture_of_a_camera_file_with_several_is_scaled_too(monkeypatch):
    buffer = io.BytesIO()
    picture(800, 600).save(buffer, "MPO", save_all=True, append_images=[picture(800, 600, "L").convert("RGB")])

    assert decoded_size(buffer.getvalue(), SMALL, monkeypatch) == (200, 150)
    assert strayed(buffer.getvalue(), SMALL)[1] <= 4


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "BMP"])
def test_other_formats_are_decoded_with_all_their_pixels(format):
    assert strayed(encoded(picture(800, 600), format), SMALL) == (0, 0)


def test_the_limits_of_a_scaled_jpeg_are_those_of_all_its_pixels():
    data = encoded(picture(1200, 900), "JPEG")

    for wrong, most, reason in ((data, 1_000_000, "bomb"), (data[: len(data) // 2], 2_000_000, "truncated")):
        with pytest.raises(ImageError) as caught:
            planes(wrong, most, SMALL)
        assert caught.value.reason == reason


def test_preprocessing_that_an_older_version_wrote_decodes_all_pixels():
    values = SMALL.to_dict()
    del values["jpeg_oversampling"]
    older = Preprocess.from_dict(values)

    assert older != SMALL and older.to_dict() == values
    assert strayed(encoded(picture(800, 600), "JPEG"), older) == (0, 0)


HALF_JPEG = encoded(picture(64, 64), "JPEG")[:600]
HALF_PNG = encoded(picture(64, 64), "PNG")
HALF_PNG = HALF_PNG[: len(HALF_PNG) // 2]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is no image", "unsupported_format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_format"),
        (b"\0" * 64, "unsupported_format"),
        (encoded(picture(16, 16), "ICO"), "unsupported_format"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "unsupported_format"),
        (HALF_JPEG, "truncated"),
        (HALF_PNG, "truncated"),
        (b"\xff\xd8\xff", "truncated"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 30, "undecodable"),
        (encoded(picture(64, 64), "WEBP")[:40], "truncated"),
        (png_header(0, 10), "bad_dimensions"),
        (png_header(2000, 2000), "bomb"),
        (png_header(60000, 60000), "bomb"),
        (png_header(1, 50_000), "bad_dimensions"),
    ],
)
def test_bad_bytes_become_an_error_with_a_reason(data, reason):
    with pytest.raises(ImageError) as caught:
        decode(data, MAX_PIXELS)

    assert caught.value.reason == reason
    assert caught.value.detail


def test_every_reason_is_one_the_stream_knows():
    from streams.record import Reason

    for reason in ("empty", "unsupported_format", "undecodable", "truncated", "bomb", "bad_dimensions"):
        assert Reason(reason)


@pytest.mark.filterwarnings("ignore::Warning")
def test_flipped_bytes_never_raise_anything_else():
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        original = encoded(picture(24, 24), format)
        for _ in range(60):
            data = bytearray(original[: rng.integers(1, len(original) + 1)])
            for position in rng.integers(0, len(data), 5):
                data[position] = rng.integers(0, 256)
            with contextlib.suppress(ImageError):
                decode(bytes(data), MAX_PIXELS)


def test_a_batch_equals_its_images_one_by_one():
    preprocess = Preprocess(32, MEAN, STD)
    images = [picture(40, 30), picture(30, 40), picture(32, 32)]

    batch = preprocess.batch(images)

    assert batch.shape == (3, 3, 32, 32) and batch.dtype == np.float32
    assert all(np.array_equal(row, preprocess(image)) for row, image in zip(batch, images, strict=True))


def test_the_settings_survive_json():
    import json

    preprocess = Preprocess(224, MEAN, STD, "bilinear", "squash")

    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"std": (0.0, 1.0, 1.0)},
        {"interpolation": "nearest"},
        {"resize_mode": "fit"},
        {"jpeg_oversampling": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        Preprocess(**{"size": 8, "mean": MEAN, "std": STD, **wrong})


def test_an_image_that_is_not_rgb_is_refused_until_converted():
    preprocess = Preprocess(8, MEAN, STD)
    with pytest.raises(ValueError, match="upright_rgb"):
        preprocess(picture(9, 9, "L"))

    assert preprocess(upright_rgb(picture(9, 9, "L"))).shape == (3, 8, 8)
