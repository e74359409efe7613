"""A folder or zip of `[split/]class name/image`, listed safely and read as an ordered stream with offsets."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from streams.record import (
    Control,
    ControlKind,
    Item,
    Offsets,
    Partition,
    Raw,
    Reason,
    Record,
    Rejected,
    Unusable,
    canonical_label,
    check_image,
)
from streams.source import ArchiveError, PositionError

_POLL_ITEMS = 256
_POLL_BYTES = 8 * 2**20
_LITTER = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})


def bundled_archive() -> Path:
    """The CIFAR-10 sample that comes with gapstream: `train` and `test`, ten classes, 270 and 100 images of each."""
    return Path(__file__).parent / "assets" / "cifar10-sample.zip"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of an archive, not read yet."""

    path: str
    """Inside the archive, `/` between its parts."""
    size: int
    """Bytes, as the listing says."""
    crc: int
    """Of a zip's listing; 0 in a folder."""
    _archive: ArchiveFolder = field(repr=False)
    _member: zipfile.ZipInfo | None = field(repr=False)

    @property
    def name(self) -> str:
        """The image's file name."""
        return self.path.rpartition("/")[2]

    def read(self) -> bytes:
        """The encoded image.

        Raises Unusable when this file cannot be had: TOO_LARGE, FETCH_FORBIDDEN (a link or device), FETCH_FAILED (a
        damaged zip entry, a file that is gone or unreadable); ArchiveError when the archive as a whole cannot.
        """
        return self._archive._read(self)


class ArchiveFolder:
    """The classes and images of an archive.

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
        """Canonical class names, sorted as text."""
        return tuple(sorted(self._images.keys() - self.unusable.keys()))

    def images(self, class_name: str, limit: int = 0) -> list[Entry]:
        """The images of a class, names sorted as text; only the first `limit` when that is not 0."""
        entries = sorted(self._images[class_name], key=lambda entry: entry.name)
        return entries[:limit] if limit else entries

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()

    def _files(self) -> Iterator[Entry]:
        folders = [""]
        while folders:
            prefix = folders.pop()
            with os.scandir(self.path / prefix) as inside:
                for file in inside:
                    path = prefix + file.name
                    if file.is_dir(follow_symlinks=False):
                        folders.append(path + "/")
                    elif file.is_symlink() and file.is_dir():
                        raise ArchiveError(f"{_shown(path)} in {self.path} is a link to a folder; put the folder there")
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
            if "\\" in path or re.match(r"[A-Za-z]:", path) or {"", ".", ".."} & set(path.split("/")):
                raise ArchiveError(f"unsafe name {path!r} in {self.path}; expected `[split/]class name/image`")
            if member.flag_bits & 1:
                raise ArchiveError(f"{path!r} in {self.path} is encrypted; make the zip without a password")
            yield Entry(path, member.file_size, member.CRC, self, member)

    def _read(self, entry: Entry) -> bytes:
        if entry.size > self._max_bytes:
            raise Unusable(Reason.TOO_LARGE, f"{entry.size} bytes, at most {self._max_bytes}")
        return self._read_file(entry.path) if entry._member is None else self._read_member(entry._member)

    def _read_file(self, path: str) -> bytes:
        try:
            # Without O_NONBLOCK a named pipe would wait for a writer.
            descriptor = os.open(self.path / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise Unusable(Reason.FETCH_FORBIDDEN, "not a regular file")
                return file.read(self._max_bytes + 1)
        except OSError as error:
            if (self.path / path).is_symlink():
                raise Unusable(Reason.FETCH_FORBIDDEN, "a symbolic link; links are not followed") from None
            if isinstance(error, FileNotFoundError | PermissionError) and self.path.is_dir():
                raise Unusable(Reason.FETCH_FAILED, str(error.strerror)) from None
            raise ArchiveError(f"cannot read {_shown(path)} in {self.path}: {error.strerror or error}") from error

    def _read_member(self, member: zipfile.ZipInfo) -> bytes:
        if stat.S_ISLNK(member.external_attr >> 16):
            raise Unusable(Reason.FETCH_FORBIDDEN, "a symbolic link; links are not followed")
        assert self._zip is not None
        try:
            return self._zip.read(member)
        except OSError as error:
            raise ArchiveError(f"cannot read {self.path}: {error.strerror or error}") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            raise Unusable(Reason.FETCH_FAILED, f"damaged zip entry: {error}") from None


def _member_path(member: zipfile.ZipInfo) -> str:
    """Names without the UTF-8 flag are code page 437 by the standard and UTF-8 from macOS: as UTF-8 when they are."""
    if not member.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            return member.filename.encode("cp437").decode()
    return member.filename


def _below(entries: Sequence[Entry], split: str, fallback: Sequence[str], archive: Path) -> list[Entry]:
    """The entries that are `class name/image` below the split."""
    entries = [e for e in entries if not any(p.startswith(".") or p in _LITTER for p in e.path.split("/"))]
    if not split:
        split = next((name for name in fallback if any(_depth(e, name) == 2 for e in entries)), "")
    images = [entry for entry in entries if _depth(entry, split) >= 2]
    deeper = next((entry.path for entry in images if _depth(entry, split) > 2), None)
    tops = sorted({entry.path.split("/")[0] for entry in entries if "/" in entry.path})
    where = f"below {split!r} in {archive}" if split else f"in {archive}"
    if deeper is not None:
        raise ArchiveError(
            f"{_shown(deeper)} lies too deep {where}; expected `[split/]class name/image`, and the split as one of the"
            f" top folders: {_listed(tops)}"
        )
    if not images:
        raise ArchiveError(
            f"no images {where}; expected `[split/]class name/image`, got top folders: {_listed(tops) or 'none'}"
        )
    return images


def _depth(entry: Entry, split: str) -> int:
    """Parts of the path below the split; 0 when it is not below."""
    if not split:
        return entry.path.count("/") + 1
    return entry.path.count("/", len(split) + 1) + 1 if entry.path.startswith(split + "/") else 0


class ArchiveSource:
    """Implements `Source` on an archive: every image is a record, in an order that follows from the arguments alone.

    Offsets count the items in that order, boundary marks included; the topic is the archive's name without its suffix,
    the partition is 0. Orders: `classes` interleaves `classes_per_task` classes, then a boundary mark, then the next;
    `blurry` is the same with the share `blur` of every class's records moved into other groups; `shuffled` mixes all.
    `class_order` (or the file with one name a line, or a JSON list) must name every class once; without it `seed` draws
    the order. `per_class` keeps the first so many images of a class, `rate` is in records a second; 0 is no limit.

    Only names stay in memory. Raises ArchiveError (see `ArchiveFolder`), also for a class order that does not fit.
    """

    holding = ""

    def __init__(
        self,
        path: Path | Literal["bundled"],
        *,
        split: str = "",
        order: Literal["classes", "shuffled", "blurry"] = "classes",
        classes_per_task: int = 2,
        class_order: Sequence[str] = (),
        class_order_file: Path | None = None,
        per_class: int = 0,
        blur: float = 0.1,
        seed: int = 0,
        rate: float = 0,
        max_image_bytes: int = 16 * 2**20,
        max_image_pixels: int = 50_000_000,
        max_label_chars: int = 200,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._archive = ArchiveFolder(path, split, ("train",), max_image_bytes, max_label_chars)
        self._max_bytes = max_image_bytes
        self._max_pixels = max_image_pixels
        self._rate = rate
        self._clock = clock
        self._sleep = sleep
        self._partition = Partition(self._archive.path.resolve().stem, 0)
        self._at = 0
        self.positions: Offsets = {self._partition: 0}
        self.skipped: dict[str, int] = {}
        self._throttled = False
        self._due: float | None = None
        names = [*self._archive.classes, *sorted(self._archive.unusable)]
        if class_order or class_order_file:
            listed = _read_class_order(class_order_file) if class_order_file else class_order
            names = _checked_order(listed, names, max_label_chars, self._archive.path)
        else:
            names.sort(key=lambda name: _draw(seed, "class", name))
        self.classes = tuple(names)
        """Class names in the order in which the stream brings them."""
        size = len(names) if order == "shuffled" else classes_per_task
        groups = [names[start : start + size] for start in range(0, len(names), size)]
        self._stream = list(self._ordered(groups, per_class, seed, blur if order == "blurry" else 0))
        if order == "shuffled":
            self._stream.pop()
        self._fingerprint = self._digest()

    @property
    def exhausted(self) -> bool:
        return self._at >= len(self._stream)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the topic and of every item's class, name, size and checksum, in order."""
        return self._fingerprint

    def continues(self, fingerprint: str) -> bool:
        return fingerprint == self._fingerprint

    def seek(self, offsets: Offsets) -> None:
        at = offsets.get(self._partition, 0)
        if (offsets and self._partition not in offsets) or not 0 <= at <= len(self._stream):
            raise PositionError(
                f"the commit continues at {_positions(offsets)}, this archive is {self._partition.topic}[0] with"
                f" {len(self._stream)} items; start with the archive of that commit or with another state folder"
            )
        self._at = at
        self.positions = {self._partition: at}

    def poll(self, timeout_s: float) -> Sequence[Item]:
        """At most 256 items or about 8 MiB. Waits out `timeout_s` when throttled, at the end, or ahead of the rate."""
        allowed = self._allowed(timeout_s)
        until = self._clock() + timeout_s
        items: list[Item] = []
        size = 0
        while len(items) < allowed and self._at < len(self._stream) and size < _POLL_BYTES:
            item = self._item(self._at)
            self._at += 1
            items.append(item)
            size += len(item.image) if isinstance(item, Record) else 0
            if self._clock() > until:
                break
        if self._due is not None:
            self._due += len(items) / self._rate
        return items

    def listing(self) -> list[tuple[str, Entry] | None]:
        """Class name and file of every record in stream order, None for a boundary mark; nothing is read.

        Left out are records whose class name is unusable.
        """
        unusable = self._archive.unusable
        items = [item for item in self._stream if item is None or item.class_name not in unusable]
        return [None if item is None else (item.class_name, item.entry) for item in items]

    def throttle(self, full: bool) -> None:
        self._throttled = full

    def acknowledge(self, offsets: Offsets) -> None:
        """Nobody else looks at an archive's position."""

    def judged(self, samples: int, rejected: int) -> None:
        """Nothing to do: an archive ends however much of it is rejected."""

    def lag(self) -> dict[tuple[str, int], int]:
        return {self._partition: len(self._stream) - self._at}

    def close(self) -> None:
        self._archive.close()

    def _ordered(self, groups: list[list[str]], per_class: int, seed: int, blur: float) -> Iterator[_Item | None]:
        """Items in stream order, None for a boundary mark."""
        # By hash rather than by a generator: the order is the same in every version of Python.
        mixed: list[list[_Item]] = [[] for _ in groups]
        for home, names in enumerate(groups):
            for name in names:
                items = [_Item(name, entry) for entry in self._archive.images(name, per_class)]
                if blur and len(groups) > 1:
                    items.sort(key=lambda item: _draw(seed, "blur", item.entry.path))
                    away = round(blur * len(items))
                    for item in items[:away]:
                        others = _draw(seed, "group", item.entry.path) % (len(groups) - 1)
                        mixed[others + (others >= home)].append(item)
                    items = items[away:]
                mixed[home] += items
        for group in mixed:
            yield from sorted(group, key=lambda item: _draw(seed, "record", item.entry.path))
            yield None

    def _digest(self) -> str:
        digest = hashlib.sha256(repr(self._partition).encode("utf-8", "surrogateescape"))
        for item in self._stream:
            facts = (item.class_name, item.entry.path, item.entry.size, item.entry.crc) if item else ()
            digest.update(json.dumps(facts).encode())
        return digest.hexdigest()

    def _allowed(self, timeout_s: float) -> int:
        """How many items may come now, after waiting for the first where that ends within `timeout_s`."""
        if self._throttled or self.exhausted:
            self._sleep(timeout_s)
            return 0
        if not self._rate:
            return _POLL_ITEMS
        now = self._clock()
        if self._due is None:
            self._due = now
        if self._due > now:
            self._sleep(min(self._due - now, timeout_s))
            if self._due > now + timeout_s:
                return 0
            now = self._clock()
        # After a pause the stream races to catch up a second at most.
        self._due = max(self._due, now - 1)
        return min(_POLL_ITEMS, 1 + max(0, int((now - self._due) * self._rate)))

    def _item(self, offset: int) -> Item:
        item = self._stream[offset]
        if item is None:
            return Control(self._partition, offset, ControlKind.TASK_BOUNDARY)
        image = None
        try:
            image = item.entry.read()
            check_image(image, self._max_bytes, self._max_pixels)
            if item.class_name in self._archive.unusable:
                raise self._archive.unusable[item.class_name]
        except Unusable as unusable:
            path = _shown(item.entry.path)
            detail = f"{path}: {unusable.detail}"
            return Rejected(self._partition, offset, unusable.reason, detail, Raw(path.encode(), image))
        return Record(self._partition, offset, item.class_name, image)


@dataclass(frozen=True, slots=True)
class _Item:
    class_name: str
    entry: Entry


def _draw(seed: int, purpose: str, name: str) -> int:
    text = f"{seed}/{purpose}/{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _read_class_order(file: Path) -> list[str]:
    try:
        text = file.read_text("utf-8")
        if not text.lstrip().startswith("["):
            return [line for line in text.splitlines() if line.strip()]
        names = json.loads(text)
        if not all(isinstance(name, str) for name in names):
            raise ValueError("not all of its items are text")
        return names
    except (OSError, ValueError) as error:
        expected = "expected one name a line or a JSON list of names"
        raise ArchiveError(f"cannot read the class order {file}: {error}; {expected}") from error


def _checked_order(listed: Iterable[str], present: Iterable[str], max_chars: int, archive: Path) -> list[str]:
    try:
        names = [canonical_label(name, max_chars) for name in listed]
    except Unusable as unusable:
        raise ArchiveError(f"the class order has no usable name: {unusable.detail}") from None
    wrong = {
        "not in the archive": sorted(set(names) - set(present)),
        "missing in the order": sorted(set(present) - set(names)),
        "listed twice": sorted({name for name in names if names.count(name) > 1}),
    }
    if any(wrong.values()):
        mistakes = "; ".join(f"{what}: {_listed(which)}" for what, which in wrong.items() if which)
        raise ArchiveError(f"the class order must name each class of {archive} once; {mistakes}")
    return names


def _listed(names: Sequence[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(_shown, names[:most])) + more


def _shown(path: str) -> str:
    """A name that may not be UTF-8 as text that is."""
    return path.encode("utf-8", "backslashreplace").decode()


def _positions(offsets: Offsets) -> str:
    return ", ".join(f"{topic}[{number}]@{offset}" for (topic, number), offset in sorted(offsets.items()))
