"""A source without a broker: the images of an archive as an ordered stream with offsets."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from streams.archive_folder import ArchiveFolder, Entry, name_list, printable
from streams.record import (
    Control,
    ControlKind,
    Item,
    Offsets,
    Partition,
    Raw,
    Record,
    Rejected,
    Unusable,
    canonical_label,
    check_image,
)
from streams.source import ArchiveError, PositionError

_POLL_ITEMS = 256
"""Items that one `poll` gives at most. Chosen by hand: the agent does its other work between polls, so more of them
only make it look away for longer, and fewer cost more calls."""

_POLL_BYTES = 8 * 2**20
"""Bytes of images after which a `poll` ends: what one call may add to the agent's memory, but for its last image."""

_CATCH_UP_S = 1
"""Seconds of a missed pace that are caught up after a pause, so that the pause does not end in a burst."""


class ArchiveSource:
    """This is an archive as a `Source`: every image is a record, in an order that follows from the arguments alone.

    Offsets count the items in that order, boundary marks included; the topic is the archive's name without its suffix,
    the partition is 0. Orders: `classes` interleaves `classes_per_task` classes, then a boundary mark, then the next;
    `blurry` is the same with the share `blur` (0 to 1) of every class's records moved into other groups; `shuffled`
    mixes all. `class_order` (or the file with one name a line, or a JSON list) must name every class once; without it
    `seed` draws the order. `per_class` is the number of images kept of a class, the first by name, and `rate` is in
    records a second; 0 is no limit.

    Only names stay in memory. Raises ArchiveError (see `ArchiveFolder`), also for a class order that does not fit.
    """

    holding = ""
    retention_s = math.inf
    live = False

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
        self.clamped: dict[str, int] = {}
        self._throttled = False
        self._due: float | None = None
        names = [*self._archive.classes, *sorted(self._archive.unusable)]
        if class_order or class_order_file:
            wanted = _read_class_order(class_order_file) if class_order_file else class_order
            names = _checked_order(wanted, names, max_label_chars, self._archive.path)
        else:
            names.sort(key=lambda name: _draw(seed, "class", name))
        self.classes = tuple(names)
        """Class names in the order in which the stream brings them."""
        size = len(names) if order == "shuffled" else classes_per_task
        groups = [names[start : start + size] for start in range(0, len(names), size)]
        self._stream = list(self._ordered(groups, per_class, seed, blur if order == "blurry" else 0))
        if order == "shuffled":
            self._stream.pop()  # the mark behind the one group there is
        self._fingerprint = self._digest()

    @property
    def exhausted(self) -> bool:
        """True once the last item was handed out."""
        return self._at >= len(self._stream)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the topic and of every item's class, name, size and checksum, in order."""
        return self._fingerprint

    def continues(self, fingerprint: str) -> bool:
        """Tell whether a commit was made on exactly this order of exactly these files."""
        return fingerprint == self._fingerprint

    def seek(self, offsets: Offsets, epochs: Mapping[Partition, int] | None = None) -> None:
        """Continue at `offsets`, or at the beginning when there are none. Raises PositionError."""
        at = offsets.get(self._partition, 0)
        if (offsets and self._partition not in offsets) or not 0 <= at <= len(self._stream):
            raise PositionError(
                f"the commit continues at {_positions(offsets)}, this archive is {self._partition.topic}[0] with"
                f" {len(self._stream)} items; start with the archive of that commit or with another state folder"
            )
        self._at = at
        self.positions = {self._partition: at}

    def poll(self, timeout_s: float) -> Sequence[Item]:
        """Give the next items: at most 256, or about 8 MiB of images.

        Waits out `timeout_s` when throttled, at the end, or ahead of the rate. Raises ArchiveError.
        """
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
        """Give the class name and file of every record in stream order, None for a boundary mark; nothing is read.

        Records whose class name is unusable are left out.
        """
        unusable = self._archive.unusable
        items = [item for item in self._stream if item is None or item.class_name not in unusable]
        return [None if item is None else (item.class_name, item.entry) for item in items]

    def throttle(self, full: bool) -> None:
        """Hand out no item while `full`."""
        self._throttled = full

    def vouches(self, timeout_s: float) -> bool:
        """Answer True always: the order was fixed when the archive was opened."""
        return True

    def past_marks(self, offsets: Offsets) -> Offsets:
        """Give the same offsets: every one of an archive holds an item."""
        return offsets

    def epochs(self, offsets: Offsets) -> Mapping[Partition, int]:
        """Give none: an archive is what its fingerprint says."""
        return {}

    def acknowledge(self, offsets: Offsets) -> None:
        """Do nothing: nobody else looks at an archive's position."""

    def judged(self, samples: int, rejected: int) -> None:
        """Do nothing: an archive ends however much of it is rejected."""

    def lag(self) -> dict[tuple[str, int], int]:
        """Give the number of items not handed out yet."""
        return {self._partition: len(self._stream) - self._at}

    def close(self) -> None:
        """Close the archive's files."""
        self._archive.close()

    def _ordered(self, groups: list[list[str]], per_class: int, seed: int, blur: float) -> Iterator[_Item | None]:
        """Give the items in stream order, None for a boundary mark."""
        # By hash rather than by a random generator: a commit's offsets must mean the same in every version of Python.
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
        # Every commit holds this digest: what goes into it can never change, the repr of a Partition included.
        digest = hashlib.sha256(repr(self._partition).encode("utf-8", "surrogateescape"))
        for item in self._stream:
            described = (item.class_name, item.entry.path, item.entry.size, item.entry.crc) if item else ()
            digest.update(json.dumps(described).encode())
        return digest.hexdigest()

    def _allowed(self, timeout_s: float) -> int:
        """Tell how many items may come now, after waiting for the first where that ends within `timeout_s`."""
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
        self._due = max(self._due, now - _CATCH_UP_S)
        return min(_POLL_ITEMS, 1 + max(0, int((now - self._due) * self._rate)))

    def _item(self, offset: int) -> Item:
        item = self._stream[offset]
        if item is None:
            return Control(self._partition, offset, ControlKind.TASK_BOUNDARY)
        path = printable(item.entry.path)
        image = None  # kept for the dead letter where it could be read and is of no use
        try:
            image = item.entry.read()
            check_image(image, self._max_bytes, self._max_pixels)
            if item.class_name in self._archive.unusable:
                raise self._archive.unusable[item.class_name]
        except Unusable as unusable:
            detail = f"{path}: {unusable.detail}"
            return Rejected(self._partition, offset, unusable.reason, detail, Raw(path.encode(), image))
        # With its path as the key, so that a dead letter also names the file when the image is found broken later.
        return Record(self._partition, offset, item.class_name, image, raw=Raw(path.encode(), image))


@dataclass(frozen=True, slots=True)
class _Item:
    class_name: str
    entry: Entry


def _draw(seed: int, purpose: str, name: str) -> int:
    """Give a number of 64 bits that looks random and follows from the arguments; `purpose` keeps draws independent."""
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


def _checked_order(wanted: Iterable[str], present: Iterable[str], max_chars: int, archive: Path) -> list[str]:
    try:
        names = [canonical_label(name, max_chars) for name in wanted]
    except Unusable as unusable:
        raise ArchiveError(f"the class order has no usable name: {unusable.detail}") from None
    wrong = {
        "not in the archive": sorted(set(names) - set(present)),
        "missing in the order": sorted(set(present) - set(names)),
        "listed twice": sorted({name for name in names if names.count(name) > 1}),
    }
    if any(wrong.values()):
        mistakes = "; ".join(f"{what}: {name_list(which)}" for what, which in wrong.items() if which)
        raise ArchiveError(f"the class order must name each class of {archive} once; {mistakes}")
    return names


def _positions(offsets: Offsets) -> str:
    return ", ".join(f"{topic}[{number}]@{offset}" for (topic, number), offset in sorted(offsets.items()))
