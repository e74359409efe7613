"""Small archives for tests, as a zip or as a folder."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from tests.bad_images import encoded, picture

JPEG = encoded(picture(), "JPEG")


def images(classes: Iterable[str] = "abcd", count: int = 10, prefix: str = "") -> dict[str, bytes]:
    """Distinct images (bytes after the end mark are no part of a JPEG) under `prefix` + class/number."""
    return {f"{prefix}{name}/{n:03d}.jpg": JPEG + f"{name}{n}".encode() for name in classes for n in range(count)}


def zipped(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


def unpacked(path: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


both_forms = pytest.mark.parametrize("make", [zipped, unpacked])
