"""Turns encoded images into the network's input, with numpy and Pillow alone; training and serving share these lines.

`planes` ends where hostile bytes end; `Preprocess` repeats open_clip's validation transform, bit for bit.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from exporter.image_header import FORMATS, MAX_ASPECT, ImageError, check_header

_MAGIC = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")
"""How files of FORMATS begin, but for WEBP and AVIF, whose names come later. They tell a broken image (`undecodable`)
from what never was one (`unsupported_format`) where Pillow cannot."""

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
"""open_clip's names of interpolations, which releases on disk have, and Pillow's. Pillow antialiases both."""

JPEG_OVERSAMPLING = 2
"""What Preprocess.jpeg_oversampling is for all that is learned now: at twice the size that is needed the resize still
does the last halving, so that hardly a pixel changes; see exporter/README.md."""

_RESIZE_MODES = ("shortest", "longest", "squash")
"""open_clip's names of what is done to an image that is not square, see Preprocess.resize_mode."""


_UPRIGHT = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, (2, 1, 0, 3)),
    3: (Image.Transpose.ROTATE_180, (2, 3, 0, 1)),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, (0, 3, 2, 1)),
    5: (Image.Transpose.TRANSPOSE, (1, 0, 3, 2)),
    6: (Image.Transpose.ROTATE_270, (3, 0, 1, 2)),
    7: (Image.Transpose.TRANSVERSE, (3, 2, 1, 0)),
    8: (Image.Transpose.ROTATE_90, (1, 2, 3, 0)),
}
"""EXIF orientation -> what turns the stored image upright, and which of its edges (0 left, 1 top, 2 right, 3 bottom) is
then the left, top, right and bottom one. Other values are taken for 1: upright already."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge of a part of an image, in its pixels."""


def planes(data: bytes, max_pixels: int, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Decode the first frame of an image as `decode` does, and fit it: uint8 [3, size, size], which
    `Preprocess.scale` takes. Learning, scoring and serving all have it from here.

    A JPEG is decoded no larger than needed, see Preprocess.jpeg_oversampling. Raises ImageError.
    """
    return preprocess.fit(*_decoded(data, max_pixels, preprocess))


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """Decode the first frame of an image, all of its pixels: upright (EXIF orientation applied), 8-bit RGB.

    Transparency is dropped, not composited, as CLIP's own training data was read; 16-bit grey keeps its upper 8 bits.
    `max_pixels`: an image of more pixels is refused. Raises ImageError, before a decoder sees the bytes when the header
    alone tells (see exporter.image_header). Pillow itself takes headers of more than 178 million pixels for bombs, so a
    larger `max_pixels` has no effect.
    """
    return _decoded(data, max_pixels, None)[0]


def _decoded(data: bytes, max_pixels: int, preprocess: Preprocess | None) -> tuple[Image.Image, Box | None]:
    """Decode an image, for `preprocess` where one is given; gives also the part of it that is the image, None for all.

    Raises ImageError.
    """
    check_header(data, max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header alone
        width, height = image.size
        if width * height > max_pixels:
            # A header may say another size than the frame inside it has.
            raise ImageError("bomb", f"{width} x {height} pixels, at most {max_pixels} are decoded")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ImageError("bad_dimensions", f"{width} x {height} pixels, sides may differ {MAX_ASPECT}-fold at most")
        box = None
        if preprocess is not None and preprocess.jpeg_oversampling:
            box = _draft(image, preprocess)
        return upright_rgb(image), box
    except (ImageError, MemoryError):  # memory that is short here says nothing about the image
        raise
    except UnidentifiedImageError as error:
        if data.startswith(_MAGIC) or data[8:12] == b"WEBP" or data[4:12] == b"ftypavif":
            raise ImageError("undecodable", f"{len(data)} bytes begin like an image, the header is broken") from error
        found = f"{len(data)} bytes beginning with {data[:8]!r}"
        raise ImageError("unsupported_format", f"{found}, expected one of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ImageError("bomb", str(error)) from error
    # Pillow's plugins let nearly everything through on hostile bytes: OSError, SyntaxError, ValueError, struct.error,
    # IndexError, KeyError, TypeError, zlib.error.
    except Exception as error:
        text = str(error) or type(error).__name__
        reason = "truncated" if "truncated" in text.lower() or "EOF" in text else "undecodable"
        raise ImageError(reason, text) from error


def _draft(image: Image.Image, preprocess: Preprocess) -> Box | None:
    """Let a JPEG be decoded at a scale at which it is large enough for `preprocess`; gives the part that is the image.

    Where a side is no multiple of the scale, the last column or row has only a part of a pixel of the image: taken for
    a whole one, it would move the others, by more than all that a scale changes otherwise.
    """
    # As stored, not yet turned: the size that is needed turns with the image.
    wanted = preprocess.resized(image.size)
    drafted = image.draft(None, (wanted[0] * preprocess.jpeg_oversampling, wanted[1] * preprocess.jpeg_oversampling))
    if drafted is None:  # another format
        return None
    _, (_, _, width, height) = drafted
    margins = (0.0, 0.0, image.width - width, image.height - height)
    size = image.size
    turn = _UPRIGHT.get(_orientation(image))
    if turn is not None:
        margins = tuple(margins[edge] for edge in turn[1])  # type: ignore[assignment]
        size = size if turn[1][0] in (0, 2) else size[::-1]
    return margins[0], margins[1], size[0] - margins[2], size[1] - margins[3]


def _orientation(image: Image.Image) -> int:
    """Give the EXIF orientation of an image, 1 where it has none."""
    # A broken EXIF block says nothing about the pixels.
    with contextlib.suppress(OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turn any Pillow image as its EXIF orientation says, and into 8-bit RGB; the argument is left as it is.

    Raises ImageError for floating-point pixels, since nothing says what range they have, and what Pillow raises for
    pixels it cannot decode.
    """
    image.load()  # the only step that notices a truncated file: verify() does not
    turn = _UPRIGHT.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn[0])
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ImageError("unsupported_format", "floating-point pixels, expected 8 or 16 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255: all but the darkest pixels turn white.
        values = np.asarray(image)
        # Piece by piece: with a copy of all values a 16-bit image would take twice the memory of any other.
        high = np.empty(values.shape, np.uint8)
        for row, found in zip(high, values, strict=True):
            row[:] = found.clip(0, 65535) >> 8
        image = Image.fromarray(high)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # else Pillow warns about every such image
    return image.convert("RGB")


@dataclass(frozen=True)
class Preprocess:
    """This is open_clip's validation transform of an RGB image: resize, centre crop, scale to 0..1, normalise; and how
    large a JPEG is decoded for it.

    Raises ValueError for values out of range.
    """

    size: int
    """Side of the square output in pixels."""
    mean: tuple[float, float, float]
    """What is subtracted from the three channels, in 0..1."""
    std: tuple[float, float, float]
    """What the three channels are then divided by; each positive."""
    interpolation: str = "bicubic"
    """`bicubic` or `bilinear`, both antialiased."""
    resize_mode: str = "shortest"
    """`shortest`: that side becomes `size`, and the other is cropped; `longest`: that side becomes `size`, and the
    other is padded with black; `squash`: both sides become `size`."""
    jpeg_oversampling: int = JPEG_OVERSAMPLING
    """A JPEG is decoded at the smallest of 1/8, 1/4, 1/2 and 1/1 of its size (the scales of libjpeg's inverse cosine
    transform) at which both sides are still at least so many times what they are resized to; 0: always at its full
    size, as releases of older versions were made."""

    def __post_init__(self) -> None:
        if self.size < 1 or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"got {self}, expected size >= 1, three means and three positive standard deviations")
        if self.jpeg_oversampling < 0:
            raise ValueError(f"got a JPEG oversampling of {self.jpeg_oversampling}, expected 0 or more")
        if self.interpolation not in _RESAMPLING:
            raise ValueError(f"got interpolation {self.interpolation!r}, expected one of {', '.join(_RESAMPLING)}")
        if self.resize_mode not in _RESIZE_MODES:
            raise ValueError(f"got resize mode {self.resize_mode!r}, expected one of {', '.join(_RESIZE_MODES)}")

    def __call__(self, image: Image.Image, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Turn an RGB image of any size into float32 [3, size, size], written into `out` when given (a row of a batch).

        Raises ValueError for an image of another mode.
        """
        return self.scale(self.fit(image), out)

    def fit(self, image: Image.Image, box: Box | None = None) -> NDArray[np.uint8]:
        """Turn an RGB image of any size, or the part of it in `box`, into uint8 [3, size, size]: the half of the work
        that `scale` ends.

        Raises ValueError for an image of another mode.
        """
        if image.mode != "RGB":
            raise ValueError(f"got an image of mode {image.mode}, expected RGB (see upright_rgb)")
        return np.ascontiguousarray(np.asarray(self._cropped(image, box)).transpose(2, 0, 1))

    def scale(self, planes: NDArray[np.uint8], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Turn what `fit` gives into float32 [3, size, size], written into `out` when given."""
        if out is None:
            out = np.empty((3, self.size, self.size), np.float32)
        # Divisions instead of one multiply-add: the same roundings as torchvision, for 15 us an image.
        np.divide(planes, np.float32(255), out=out)
        np.subtract(out, np.array(self.mean, np.float32)[:, None, None], out=out)
        np.divide(out, np.array(self.std, np.float32)[:, None, None], out=out)
        return out

    def batch(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Turn RGB images into float32 [len(images), 3, size, size]."""
        out = np.empty((len(images), 3, self.size, self.size), np.float32)
        for image, row in zip(images, out, strict=True):
            self(image, row)
        return out

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as a JSON-able dict, which `from_dict` reads back.

        An oversampling of 0 is left out: so releases of older versions keep what they say of themselves, and their ids.
        """
        values = asdict(self)
        return values if self.jpeg_oversampling else {k: v for k, v in values.items() if k != "jpeg_oversampling"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Read the preprocessing that `to_dict` wrote, of this version or an older one. Raises KeyError, TypeError or
        ValueError for anything else."""
        return cls(**{"jpeg_oversampling": 0, **values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})

    def resized(self, size: tuple[float, float]) -> tuple[int, int]:
        """Give the width and height to which an image of this width and height is resized, before crop or padding: the
        same for a half, a quarter or an eighth of a size."""
        side, (width, height) = self.size, size
        if self.resize_mode == "shortest":
            shortest = min(width, height)
            return int(side * width / shortest), int(side * height / shortest)
        if self.resize_mode == "longest":
            ratio = max(width, height) / side
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        return side, side

    def _cropped(self, image: Image.Image, box: Box | None) -> Image.Image:
        left, top, right, bottom = box or (0, 0, *image.size)
        side, resized = self.size, self.resized((right - left, bottom - top))
        if resized != image.size:
            image = image.resize(resized, _RESAMPLING[self.interpolation], box)
        if resized == (side, side):
            return image
        # round() to even, as torchvision; a negative corner (`longest`) is filled with black by crop().
        left, top = _corner(resized[0], side), _corner(resized[1], side)
        return image.crop((left, top, left + side, top + side))


def _corner(length: int, side: int) -> int:
    """Give where the centre crop begins, or, negative, the padding. torchvision rounds the two differently."""
    return round((length - side) / 2) if length >= side else -((side - length) // 2)
