"""The encoded images of a release, with which a reader tests its own decoding and preprocessing."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from exporter.preprocess import Preprocess, planes

ENCODED = ("encoded_png", "encoded_jpeg")
"""Arrays of golden.npz with the files' bytes, uint8. Releases of older versions have none of them."""

PIXELS = "pixels"
"""Array of golden.npz with what the learner's preprocessing made of these files, float32 [2, 3, H, W]."""

PIXEL_ATOL = 1 / 255
"""Largest mean difference of a pixel, 0 to 1: one step of 8 bits. Decoders of JPEG and resizers differ in single pixels
by a step or two and hardly in the mean; another mean, resampling or order of channels differs by several steps."""

_WIDTH, _HEIGHT = 160, 120
"""Pixels of the two images: not square, so that the crop is tested, and 60 kB at most, of which a release is hardly
larger."""


def encoded() -> dict[str, NDArray[np.uint8]]:
    """Make the two files, the same at every call: colours and fine detail as PNG and, lying on its side, as JPEG.

    They are drawn, not taken from the stream: no image that was trained on may leave in a release.
    """
    y, x = np.mgrid[0 : 1 : _HEIGHT * 1j, 0 : 1 : _WIDTH * 1j]
    smooth = np.stack([x, y, 1 - x * y], axis=2) * 191
    detail = np.random.default_rng(0).integers(0, 64, (_HEIGHT // 2, _WIDTH // 2, 3)).repeat(2, 0).repeat(2, 1)
    image = Image.fromarray((smooth + detail).astype(np.uint8))
    on_its_side = Image.Exif()
    on_its_side[ExifTags.Base.Orientation] = 6
    files = io.BytesIO(), io.BytesIO()
    image.save(files[0], "PNG")
    image.save(files[1], "JPEG", quality=90, exif=on_its_side)
    return {name: np.frombuffer(file.getvalue(), np.uint8) for name, file in zip(ENCODED, files, strict=True)}


def pixels(files: Mapping[str, NDArray[Any]], preprocess: Preprocess) -> NDArray[np.float32]:
    """Decode and preprocess the files, float32 [2, 3, H, W]. Raises ImageError."""
    return np.stack([preprocess.scale(planes(files[name].tobytes(), _WIDTH * _HEIGHT, preprocess)) for name in ENCODED])


def difference(golden: Mapping[str, NDArray[Any]], preprocess: Preprocess) -> float | None:
    """Measure how far our decoding and `preprocess` are from the learner's: the mean over all pixels, 0 to 1, of the
    worse file; None where the release, of an older version, has no files. Raises ImageError."""
    if any(name not in golden for name in (*ENCODED, PIXELS)):
        return None
    # Back in 0..1: what it is normalised by must not say how large a difference is.
    std = np.array(preprocess.std, np.float32)[:, None, None]
    steps = np.abs(pixels(golden, preprocess) - golden[PIXELS]) * std
    return float(steps.mean(axis=(1, 2, 3)).max())
