"""The images of a comparison: listed without reading any, then decoded once for all methods."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agent.config import Config
from agent.methods.base import TaskData
from agent.model.clip import Clip
from agent.model.images import CroppedImages, TokensAt, load_tokens
from exporter.decoders import Decoders
from exporter.image_header import ImageError
from streams.archive import ArchiveSource
from streams.archive_folder import ArchiveFolder, Entry
from streams.record import Unusable
from streams.source import ArchiveError

log = logging.getLogger(__name__)


class BenchError(Exception):
    """There is nothing to compare; the message says why."""


@dataclass(frozen=True)
class Listing:
    """The images of a comparison, not read yet."""

    tasks: tuple[tuple[tuple[str, Entry], ...], ...]
    """(class name, file) of the training images of every task, in stream order."""
    test: tuple[tuple[str, Entry], ...]
    """(class name, file) of the test images, of the stream's classes alone and spelled as there."""
    probe: tuple[tuple[str, Entry], ...]
    """(class name, file) of images of classes that are never learned; empty without a probe."""
    digest: str
    """Hex sha256 of all class names, file names, sizes and checksums, in order."""

    @property
    def images(self) -> int:
        """The number of all images."""
        return sum(map(len, self.tasks)) + len(self.test) + len(self.probe)


def list_images(config: Config, tasks: int = 0) -> Listing:
    """List the stream, cut at its boundary marks, its test images and the probe.

    Test images are those of the same archive where there is no `evaluation.test_archive`. Only the first `tasks` tasks
    are listed; 0 is all. Raises BenchError when a class has no test images, or they are those trained on; StreamError.
    """
    settings, limits = config.evaluation, config.source
    bounds: dict[str, Any] = {"max_image_bytes": limits.max_image_bytes, "max_label_chars": limits.max_label_chars}
    archive = config.source.archive
    groups: list[list[tuple[str, Entry]]] = [[]]
    for item in ArchiveSource(**archive.model_dump(exclude={"on_end"}), **bounds).listing():
        if item is None:
            groups.append([])
        else:
            groups[-1].append(item)
    groups = [group for group in groups if group]
    groups = groups[:tasks] if tasks else groups
    # A stream's labels that differ in case are one class; the test folder's may be spelled another way.
    spelling = {name.casefold(): name for group in groups for name, _ in group}
    no_split = (
        f"{archive.path} has no split folder `test` or `val` beside its training images; expected "
        "train/class name/image and test/class name/image, the name of another split as evaluation.test_split, or "
        "evaluation.test_archive"
    )
    try:
        test = ArchiveFolder(settings.test_archive or archive.path, settings.test_split, ("test", "val"), **bounds)
    except ArchiveError as error:
        if settings.test_archive or settings.test_split:
            raise
        # The training images were found in it, so it is the split that is missing, whatever the layout looks like.
        raise BenchError(no_split) from error
    trained = {entry.path for group in groups for _, entry in group}
    if not settings.test_archive and any(e.path in trained for name in test.classes for e in test.images(name)):
        raise BenchError(no_split)
    listed = [
        (spelling[name.casefold()], entry)
        for name in test.classes
        if name.casefold() in spelling
        for entry in test.images(name, settings.test_per_class)
    ]
    missing = sorted(set(spelling.values()) - {name for name, _ in listed})
    if missing:
        raise BenchError(f"{test.path} has no test images of {', '.join(missing[:5])}; every class needs some")
    probed: list[tuple[str, Entry]] = []
    if settings.probe_archive:
        probe = ArchiveFolder(settings.probe_archive, settings.probe_split, ("test", "val"), **bounds)
        probed = [(name, e) for name in probe.classes for e in probe.images(name, settings.probe_per_class)]
    parts = (*groups, listed, probed)
    # Not the content of the files: reading them all would take as long as decoding them.
    seen = [[(name, entry.path, entry.size, entry.crc) for name, entry in part] for part in parts]
    digest = hashlib.sha256(json.dumps(seen).encode()).hexdigest()
    return Listing(tuple(map(tuple, groups)), tuple(listed), tuple(probed), digest)


@dataclass(frozen=True)
class Scored:
    """It has the images to score on, with the untouched model's embeddings."""

    names: tuple[str, ...]
    """The class names among them, in order of first appearance."""
    labels: Tensor
    """int64 [N] on the CPU, index into `names`."""
    tokens: TokensAt
    """Output of the image tower's frozen part for them [N, tokens, width]."""
    untouched: Tensor
    """float32 [N, D], L2-normalised, on the CPU."""

    def of(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Find the images of these names: their index int64 [n], and their labels int64 [n] as index into `names`."""
        place = torch.full((len(self.names),), -1)
        for i, name in enumerate(names):
            if name in self.names:
                place[self.names.index(name)] = i
        labels = place[self.labels]
        index = (labels >= 0).nonzero().squeeze(1)
        return index, labels[index]


@dataclass(frozen=True)
class Data:
    """It has the images of a comparison, decoded."""

    tasks: tuple[TaskData, ...]
    """The stream's tasks, in order."""
    test: Scored
    """The test images of their classes."""
    probe: Scored | None
    """Images of classes that are never learned; None without a probe."""
    _tokens: TokensAt
    """Tokens of all training images, in stream order."""

    def joint(self) -> tuple[tuple[int, TaskData], ...]:
        """Give all tasks as one, to be scored after the last: a single pair as `run_one` takes them."""
        classes = tuple(dict.fromkeys(name for task in self.tasks for name in task.classes))
        labels = [torch.tensor([classes.index(name) for name in task.classes])[task.labels] for task in self.tasks]
        return ((len(self.tasks) - 1, TaskData(1, classes, torch.cat(labels), self._tokens)),)


def load_data(
    listing: Listing, clip: Clip, config: Config, scratch: Path, advance: Callable[[int], None] = lambda done: None
) -> Data:
    """Decode every image of the listing once, in this order: tasks, test, probe.

    Images that cannot be decoded are left out with a warning. `advance(done)` is called as they are done. Raises
    BenchError when a task, or the test set, has none left.
    """
    parts = (*listing.tasks, listing.test, listing.probe)
    entries = [item for part in parts for item in part]
    with closing(Decoders(config.source.max_image_pixels)) as decoders:
        loaded = load_tokens(
            [partial(_read, entry) for _, entry in entries],
            clip,
            decoders=decoders,
            # On a CPU in a file, so that memory stays bounded and what a method needs can be told apart.
            cache_bytes=config.method.cache_bytes if clip.device.type != "cpu" else 0,
            scratch=scratch,
            advance=advance,
        )
    for index, error in loaded.failed:
        log.warning("image %s is left out: %s", entries[index][1].path, error)
    # `loaded.kept` ascends, as do the ends of the parts: one pass tells which part each row belongs to.
    ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
    sections: list[list[int]] = [[] for _ in parts]
    part = 0
    for row, index in enumerate(loaded.kept):
        while index >= ends[part]:
            part += 1
        sections[part].append(row)

    def of(rows: Sequence[int]) -> tuple[tuple[str, ...], Tensor, TokensAt]:
        labels = [entries[loaded.kept[row]][0] for row in rows]
        names = tuple(dict.fromkeys(labels))
        number = {name: i for i, name in enumerate(names)}
        index = torch.tensor([number[label] for label in labels], dtype=torch.int64)
        return names, index, TokensAt(loaded.tokens, torch.tensor(rows, dtype=torch.int64))

    # Others than those above, which have ended: these begin when a method first asks for cropped images.
    decoders = Decoders(config.source.max_image_pixels)

    def learnable(number: int, rows: Sequence[int]) -> TaskData:
        read = [partial(_read, entries[loaded.kept[row]][1]) for row in rows]
        return TaskData(number, *of(rows), CroppedImages(read, clip, decoders))

    *learned, test, probe = sections
    empty = [f"task {number}" for number, rows in enumerate(learned, 1) if not rows]
    empty += [] if test else ["the test set"]
    if empty:
        raise BenchError(
            f"no image of {', '.join(empty[:5])} can be decoded, see the warnings above; mend these images or take "
            "their classes out of the archive"
        )
    return Data(
        tuple(learnable(number, rows) for number, rows in enumerate(learned, 1)),
        _scored(*of(test), clip, config.evaluation.batch_size),
        _scored(*of(probe), clip, config.evaluation.batch_size) if probe else None,
        TokensAt(loaded.tokens, torch.tensor([row for rows in learned for row in rows])),
    )


def _scored(names: tuple[str, ...], labels: Tensor, tokens: TokensAt, clip: Clip, batch: int) -> Scored:
    parts = [clip.encode_tokens(tokens.batch(index)).cpu() for index in torch.arange(len(labels)).split(batch)]
    return Scored(names, labels, tokens, torch.cat(parts))


def _read(entry: Entry) -> bytes:
    """Read a file; one that cannot be had is treated like one that cannot be decoded."""
    try:
        return entry.read()
    except Unusable as error:
        raise ImageError("undecodable", str(error)) from error
