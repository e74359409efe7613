"""The files of an archive: a folder or zip of `[split/]class name/image`, listed safely, read one at a time."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from streams.record import Reason, Unusable, canonical_label
from streams.source import ArchiveError

_LITTER = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})
"""Names that macOS and Windows leave in folders and zips; without this list `__MACOSX` would be taken for a class."""

_UTF8_NAME = 0x800
"""Flag of a zip entry whose name is UTF-8 (APPNOTE 4.4.4, bit 11)."""

_ENCRYPTED = 1
"""Flag of a zip entry that needs a password (APPNOTE 4.4.4, bit 0)."""


def bundled_archive() -> Path:
    """Find the CIFAR-10 sample shipped with gapstream: `train` and `test`, ten classes, 270 and 100 images of each."""
    return Path(__file__).parent / "assets" / "cifar10-sample.zip"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of an archive, not read yet."""

    path: str
    """The file's path inside the archive, with `/` between its parts."""
    size: int
    """The file's bytes, as the listing says."""
    crc: int
    """The checksum that a zip's listing gives; 0 in a folder."""
    _archive: ArchiveFolder = field(repr=False)
    _member: zipfile.ZipInfo | None = field(repr=False)

    @property
    def name(self) -> str:
        """The image's file name."""
        return self.path.rpartition("/")[2]

    def read(self) -> bytes:
        """Read the encoded image.

        Raises Unusable when this file cannot be had: TOO_LARGE, FETCH_FORBIDDEN (a link or device), FETCH_FAILED (a
        damaged zip entry, a file that is gone or unreadable); ArchiveError when the archive as a whole cannot.
        """
        return self._archive._read(self)


class ArchiveFolder:
    """It holds the classes and images of an archive.

    `path` is a folder, a zip, or `bundled`. Only what lies below the folder `split` counts; without one, below the
    first of `fallback` that has class folders in it, or the top. Hidden files, files beside the class folders and what
    operating systems leave behind are passed over. Nothing is extracted and no link is followed. Raises ArchiveError
    for what is unreadable, empty, unsafe (absolute names, `..`, encryption) or laid out otherwise.
    """

    def __init__(
        self,
        path: Path | Literal["bundled"],
        split: str = "",
        fallback: Sequence[str] = (),
        max_image_bytes: int = 16 * 2**20,
        max_label_chars: int = 200,
    ):
        self.path = bundled_archive() if path == "bundled" else Path(path)
        self.unusable: dict[str, Unusable] = {}
        """Folders whose name is no class name, and why; `images` knows them, `classes` does not."""
        self._max_bytes = max_image_bytes
        self._zip: zipfile.ZipFile | None = None
        self._images: dict[str, list[Entry]] = {}
        try:
            found = self._files() if self.path.is_dir() else self._members()
            entries = _below(sorted(found, key=lambda entry: entry.path), split.strip("/"), fallback, self.path)
        except OSError as error:
            raise ArchiveError(f"cannot read the archive {self.path}: {error.strerror or error}") from error
        for entry in entries:
            folder = entry.path.split("/")[-2]
            try:
                name = canonical_label(folder, max_label_chars)
            except Unusable as unusable:
                self.unusable[folder] = unusable
                name = folder
            self._images.setdefault(name, []).append(entry)

    @property
    def classes(self) -> tuple[str, ...]:
        """The canonical class names, sorted as text."""
        return tuple(sorted(self._images.keys() - self.unusable.keys()))

    def images(self, class_name: str, limit: int = 0) -> list[Entry]:
        """Give the images of a class, names sorted as text; only the first `limit` when that is not 0."""
        entries = sorted(self._images[class_name], key=lambda entry: entry.name)
        return entries[:limit] if limit else entries

    def close(self) -> None:
        """Close the zip; entries cannot be read any more."""
        if self._zip is not None:
            self._zip.close()

    def _files(self) -> Iterator[Entry]:
        folders = [""]  # a list instead of recursion: a deep folder must not exhaust the stack
        while folders:
            prefix = folders.pop()
            with os.scandir(self.path / prefix) as inside:
                for file in inside:
                    path = prefix + file.name
                    if file.is_dir(follow_symlinks=False):
                        folders.append(path + "/")
                    elif file.is_symlink() and file.is_dir():
                        shown = printable(path)
                        raise ArchiveError(f"{shown} in {self.path} is a link to a folder; put the folder there")
                    else:
                        yield Entry(path, file.stat(follow_symlinks=False).st_size, 0, self, None)

    def _members(self) -> Iterator[Entry]:
        try:
            self._zip = zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise ArchiveError(f"{self.path} is neither a folder nor a readable zip: {error}") from error
        for member in self._zip.infolist():
            path = _member_path(member)
            if member.is_dir():
                continue
            # Nothing is extracted, but a path also becomes a class name, and somebody may extract what we accepted.
            if "\\" in path or re.match(r"[A-Za-z]:", path) or {"", ".", ".."} & set(path.split("/")):
                raise ArchiveError(f"unsafe name {path!r} in {self.path}; expected `[split/]class name/image`")
            if member.flag_bits & _ENCRYPTED:
                raise ArchiveError(f"{path!r} in {self.path} is encrypted; make the zip without a password")
            yield Entry(path, member.file_size, member.CRC, self, member)

    def _read(self, entry: Entry) -> bytes:
        if entry.size > self._max_bytes:
            raise Unusable(Reason.TOO_LARGE, f"{entry.size} bytes, at most {self._max_bytes}")
        return self._read_file(entry.path) if entry._member is None else self._read_member(entry._member)

    def _read_file(self, path: str) -> bytes:
        try:
            # Without O_NOFOLLOW a link could lead out of the archive; without O_NONBLOCK a named pipe would wait for a
            # writer. The descriptor is asked what the file is, as the path may be something else by then.
            descriptor = os.open(self.path / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise Unusable(Reason.FETCH_FORBIDDEN, "not a regular file")
                # It may have grown since it was listed; one byte too many is enough for `check_image` to say so.
                return file.read(self._max_bytes + 1)
        except OSError as error:
            if (self.path / path).is_symlink():
                raise Unusable(Reason.FETCH_FORBIDDEN, "a symbolic link; links are not followed") from None
            if isinstance(error, FileNotFoundError | PermissionError) and self.path.is_dir():
                raise Unusable(Reason.FETCH_FAILED, str(error.strerror)) from None
            # The disk fails or the archive is gone as a whole: to reject its records one by one would lose them all.
            raise ArchiveError(f"cannot read {printable(path)} in {self.path}: {error.strerror or error}") from error

    def _read_member(self, member: zipfile.ZipInfo) -> bytes:
        # Zips made on Unix keep a file's mode in the upper half of this field.
        if stat.S_ISLNK(member.external_attr >> 16):
            raise Unusable(Reason.FETCH_FORBIDDEN, "a symbolic link; links are not followed")
        assert self._zip is not None
        try:
            # zipfile gives no more bytes than the listing says, and `_read` has looked at that: no bomb unpacks here.
            return self._zip.read(member)
        except OSError as error:
            raise ArchiveError(f"cannot read {self.path}: {error.strerror or error}") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            raise Unusable(Reason.FETCH_FAILED, f"damaged zip entry: {error}") from None


def _member_path(member: zipfile.ZipInfo) -> str:
    """Give the path of a zip entry.

    A name without the UTF-8 flag is in code page 437 by the standard, but macOS writes UTF-8 without setting the flag:
    such a name is read as UTF-8 when it can be.
    """
    if not member.flag_bits & _UTF8_NAME:
        with contextlib.suppress(UnicodeError):
            return member.filename.encode("cp437").decode()
    return member.filename


def _below(entries: Sequence[Entry], split: str, fallback: Sequence[str], archive: Path) -> list[Entry]:
    """Give the entries that are `class name/image` below the split."""
    entries = [
        entry for entry in entries if not any(part.startswith(".") or part in _LITTER for part in entry.path.split("/"))
    ]
    if not split:
        split = next((name for name in fallback if any(_depth(e, name) == 2 for e in entries)), "")
    images = [entry for entry in entries if _depth(entry, split) >= 2]
    deeper = next((entry.path for entry in images if _depth(entry, split) > 2), None)
    tops = sorted({entry.path.split("/")[0] for entry in entries if "/" in entry.path})
    beside = sum("/" not in entry.path for entry in entries)
    where = f"below {split!r} in {archive}" if split else f"in {archive}"
    if deeper is not None:
        above = deeper.rpartition("/")[0].rpartition("/")[0]
        raise ArchiveError(
            f"{printable(deeper)} lies too deep {where}; expected `[split/]class name/image`. Name the folder that has"
            f" the class folders in it as the split ({printable(above)!r} for this image), or move the images up; got"
            f" top folders: {name_list(tops)}"
        )
    if not images:
        raise ArchiveError(
            f"no images {where}; expected `[split/]class name/image`, got top folders: {name_list(tops) or 'none'}"
            + (f", and files that lie in no folder: {beside}" if beside else "")
        )
    return images


def _depth(entry: Entry, split: str) -> int:
    """Give the number of parts that the path has below the split; 0 when it is not below it."""
    if not split:
        return entry.path.count("/") + 1
    return entry.path.count("/", len(split) + 1) + 1 if entry.path.startswith(split + "/") else 0


def name_list(names: Sequence[str], most: int = 20) -> str:
    """Give the first `most` names as one line for a message, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more


def printable(path: str) -> str:
    """Turn a name that may not be UTF-8 (Python keeps its bytes as surrogates) into text that is."""
    return path.encode("utf-8", "backslashreplace").decode()
