"""Test images per class that are never trained on: chosen by hash, bounded, kept in the commits.

A commit's folder `holdout/` has one stored zip per task that added images (`000001.zip`, entries `class name
percent-encoded/sha256`) and `trained.zip`: which images of the hash space that qualifies were trained on. Packs of
earlier tasks are hard links to the parent commit's, so every commit is complete by itself and nothing is copied.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import quote, unquote

from agent.layout import HOLDOUT, TRAINED
from exporter.files import link_or_copy, patiently

log = logging.getLogger(__name__)

FRACTION = "facts.json"
"""The entry of trained.zip with the share of the hash space that qualifies for the hold-out."""

FILTER = "filter"
"""The entry of trained.zip with the cells of the TrainedFilter; compressed, since a young stream's are mostly zeros."""

Choice = Literal["train", "hold", "drop"]
"""What becomes of a sample: it is learned, held out, or left alone because it is held out already."""


class HoldOutError(Exception):
    """A commit's hold-out cannot be read; the message says which file."""


class EncodedImage(Protocol):
    """An encoded image with its class name (streams.spool.Sample is one)."""

    @property
    def label(self) -> str: ...

    def read(self) -> bytes: ...


@dataclass(frozen=True)
class ImageRef:
    """It is an image to score on."""

    label: str
    """Its class name."""
    key: str
    """What identifies it among all such images: its digest, or its place in an archive."""
    read: Callable[[], bytes]
    """Gives the encoded image."""


class TrainedFilter:
    """It is a Bloom filter of image hashes: at most a wrong "yes", which here only means that one image less is held
    out.
    """

    BITS = 2**23
    """Size of the filter, 1 MiB: with 4 positions for each entry it answers wrongly in 2 % of cases after a million
    entries, which is ten million samples at the default hold-out fraction. Remembering trained images exactly would
    grow with the stream. It is part of the file format: filters of another size mean nothing here."""

    def __init__(self, data: bytes = b"") -> None:
        self._cells = bytearray(data or self.BITS // 8)

    def add(self, digest: bytes) -> None:
        """Remember an image's hash."""
        for position in self._positions(digest):
            self._cells[position >> 3] |= 1 << (position & 7)

    def __contains__(self, digest: bytes) -> bool:
        return all(self._cells[position >> 3] >> (position & 7) & 1 for position in self._positions(digest))

    def __bytes__(self) -> bytes:
        return bytes(self._cells)

    def copy(self) -> TrainedFilter:
        """Give a filter that changes apart from this one."""
        return TrainedFilter(bytes(self._cells))

    def _positions(self, digest: bytes) -> list[int]:
        # Bytes 0 to 7 decide whether an image qualifies, so they are not evenly spread among those that come here.
        return [int.from_bytes(digest[i : i + 4], "big") % self.BITS for i in (8, 12, 16, 20)]


class HoldOut:
    """Decides what is held out and remembers it. Only hashes and class names are in memory.

    Built by `load`; per task: `split`, then `images` (which has the new ones), then `write` into the staging folder and
    `moved` when that was renamed. A `split` that is not followed by `write` is forgotten by the next one. `join` stands
    in the place of `split` for a learner that is merged. Used from one thread, but for the images' `read`, which may be
    called from several.
    """

    def __init__(self, fraction: float, per_class: int) -> None:
        self.fraction = fraction
        self.per_class = per_class
        self._trained = TrainedFilter()
        self._held: dict[bytes, tuple[str, str]] = {}
        """Digest -> class name, and the pack that the image is in."""
        self._new: dict[bytes, EncodedImage] = {}
        """Digest -> an image that the last `split` held out, or that `join` took over, and that no pack has yet."""
        # What the last `split` adds to the filter counts only once it is written: a task that fails is split again.
        self._trained_next = self._trained
        self._folder: Path | None = None
        """Where the packs are: the hold-out of the last commit, or of its staging folder."""
        self._open: zipfile.ZipFile | None = None
        self._reading = threading.Lock()

    @classmethod
    def load(cls, commit: Path | None, fraction: float, per_class: int) -> HoldOut:
        """Continue from a commit's folder, or begin with nothing (None).

        fraction: share of the hash space that qualifies, 0 <= fraction < 1. It can be lowered but not raised for a
        state folder (images trained on before would qualify): the smaller one is used, with a warning.
        per_class: largest number of held images of one class; images already held stay.
        A damaged pack is left out with an error in the log: its images are lost to scoring, and the next commit does
        not take it over. Raises HoldOutError when `trained.zip` is damaged or the disk cannot read a pack.
        """
        holdout = cls(fraction, per_class)
        folder = None if commit is None else commit / HOLDOUT
        if folder is None or not folder.is_dir():
            return holdout
        holdout._folder = folder
        with _reading(folder / TRAINED), zipfile.ZipFile(folder / TRAINED) as archive:
            before = json.loads(archive.read(FRACTION))["fraction"]
            holdout._trained = holdout._trained_next = TrainedFilter(archive.read(FILTER))
        if fraction > before:
            log.warning(
                "evaluation.holdout_fraction is %g but this state began with %g: what is already trained on cannot be "
                "held out any more; %g stays in force",
                fraction, before, before,
            )  # fmt: skip
            holdout.fraction = before
        for pack in holdout._packs():
            try:
                holdout._held |= patiently(partial(_images_in, pack))
            except _DamagedPack as error:
                log.error("%s is damaged (%s): its images are not scored on any more", pack, error)
            except OSError as error:
                raise HoldOutError(f"{pack} cannot be read: {error.strerror or error}; mend the disk") from error
        return holdout

    def __len__(self) -> int:
        return len(self._held) + len(self._new)

    def join(self, others: Sequence[HoldOut], spellings: Mapping[str, str]) -> None:
        """Begin with what the hold-outs of several learners remember, as the one of a learner that knows what they all
        know; `write` writes it down, and until then images are read from the others.

        spellings: name without case -> the class name to hold an image under. An image that any of them may have
        trained on is held no more; of the others `per_class` of each class stay, those of the smallest hashes. The
        smallest fraction is used: whoever has it does not remember what it trained on beyond.
        """
        self.fraction = min(self.fraction, *(other.fraction for other in others))
        cells = 0
        for other in others:
            cells |= int.from_bytes(bytes(other._trained), "big")
        self._trained = self._trained_next = TrainedFilter(cells.to_bytes(TrainedFilter.BITS // 8, "big"))
        held = Counter[str]()
        found = [
            (digest, spellings.get(label.casefold(), label), number)
            for number, other in enumerate(others)
            for digest, (label, _) in other._held.items()
        ]
        for digest, label, number in sorted(found):
            unseen = self._qualifies(digest) and digest not in self._trained
            if unseen and digest not in self._new and held[label] < self.per_class:
                self._new[digest] = ImageRef(label, digest.hex(), partial(others[number]._read, digest))
                held[label] += 1

    def split(self, samples: Sequence[EncodedImage]) -> list[Choice]:
        """Decide what happens to each sample of a task, in order. Reads every sample once; give it only decodable ones.

        "hold": from now on a test image. "drop": a copy of a held image, under whatever class name; never trained on.
        "train": everything else, also what qualifies beyond `per_class` and what was ever trained on. Of every class at
        least one image that was not held before this task trains. The same samples in the same order after the same
        history give the same answer.
        """
        digests = [hashlib.sha256(sample.read()).digest() for sample in samples]
        # An image may come with several labels; held out, it is lost to the training of all of them.
        names_of: dict[bytes, set[str]] = {}
        for digest, sample in zip(digests, samples, strict=True):
            if digest not in self._held:
                names_of.setdefault(digest, set()).add(sample.label)
        trainable = Counter(name for names in names_of.values() for name in names)
        held = Counter(label for label, _ in self._held.values())
        self._new = {}
        self._trained_next = self._trained.copy()
        choices: list[Choice] = []
        for digest, sample in zip(digests, samples, strict=True):
            if digest in self._held or digest in self._new:  # a copy that was trained on would be remembered, not known
                choices.append("drop")
                continue
            names = names_of[digest]
            if not self._qualifies(digest):
                choices.append("train")
            elif (
                digest in self._trained_next
                or held[sample.label] >= self.per_class
                or any(trainable[name] == 1 for name in names)
            ):
                self._trained_next.add(digest)
                choices.append("train")
            else:
                self._new[digest] = sample
                held[sample.label] += 1
                trainable.subtract(names)
                choices.append("hold")
        return choices

    def images(self) -> list[ImageRef]:
        """Give all held images in the order they were held, those of the last `split` included; readable for good."""
        labels = [(digest, label) for digest, (label, _) in self._held.items()]
        labels += [(digest, sample.label) for digest, sample in self._new.items()]
        return [ImageRef(label, digest.hex(), partial(self._read, digest)) for digest, label in labels]

    def write(self, staging: Path, parent: Path | None) -> None:
        """Write `staging`/holdout: the parent commit's packs linked (copied where links fail), one new pack.

        Files are not synced here; sealing the staging folder does that. Images of earlier tasks are read from `staging`
        from now on, so call `moved` when the folder is renamed.
        """
        folder = staging / HOLDOUT
        folder.mkdir()
        for pack in sorted({pack for _, pack in self._held.values()}):
            if parent is None:
                raise HoldOutError(
                    f"{pack} was held out before this task, but no parent commit was given to take it from"
                )
            link_or_copy(parent / HOLDOUT / pack, folder / pack)
        with zipfile.ZipFile(folder / TRAINED, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(zipfile.ZipInfo(FRACTION), json.dumps({"fraction": self.fraction}))
            archive.writestr(zipfile.ZipInfo(FILTER), bytes(self._trained_next), zipfile.ZIP_DEFLATED, 1)
        if self._new:
            last = max((int(Path(pack).stem) for _, pack in self._held.values()), default=0)
            name = f"{last + 1:06d}.zip"
            with zipfile.ZipFile(folder / name, "w") as archive:
                for digest, sample in self._new.items():
                    # ZipInfo's fixed date makes the same images the same file, byte for byte.
                    archive.writestr(zipfile.ZipInfo(f"{quote(sample.label, safe='')}/{digest.hex()}"), sample.read())
            self._held |= {digest: (sample.label, name) for digest, sample in self._new.items()}
            self._new = {}
        self._trained = self._trained_next
        self.moved(staging)

    def moved(self, commit: Path) -> None:
        """Read held images below `commit` from now on: the staging folder was renamed, or is about to be."""
        self.close()
        self._folder = commit / HOLDOUT

    def close(self) -> None:
        """Close the pack that is open."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _qualifies(self, digest: bytes) -> bool:
        return int.from_bytes(digest[:8], "big") < self.fraction * 2**64

    def _packs(self) -> list[Path]:
        assert self._folder is not None
        return sorted(self._folder.glob("[0-9]*.zip"))

    def _read(self, digest: bytes) -> bytes:
        if digest in self._new:
            return self._new[digest].read()
        assert self._folder is not None
        label, pack = self._held[digest]
        path = self._folder / pack
        with self._reading, _reading(path):
            # One pack stays open: images are read in the order in which they were held, so pack after pack.
            if self._open is None or self._open.filename != str(path):
                self.close()
                self._open = zipfile.ZipFile(path)
            return self._open.read(f"{quote(label, safe='')}/{digest.hex()}")


class _DamagedPack(Exception):
    """A pack is not what was written; the message says why."""


def _images_in(pack: Path) -> dict[bytes, tuple[str, str]]:
    """Read a pack: digest -> (class name, name of the pack). Raises _DamagedPack, and OSError when the disk refuses."""
    found: dict[bytes, tuple[str, str]] = {}
    try:
        with zipfile.ZipFile(pack) as archive:
            for name in archive.namelist():
                label, _, digest = name.partition("/")
                # All images, at every start: one that is found damaged while it is scored ends an update.
                if hashlib.sha256(archive.read(name)).hexdigest() != digest:
                    raise _DamagedPack(f"{name} is another image")
                found[bytes.fromhex(digest)] = (unquote(label), pack.name)
    except MemoryError:
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise _DamagedPack("it points outside itself") from error
    except Exception as error:  # zipfile answers a flipped bit with a dozen classes, NotImplementedError among them
        raise _DamagedPack(f"{type(error).__name__}: {error}") from error
    return found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what zipfile and the disk raise into HoldOutError with the file's name."""
    try:
        yield
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise HoldOutError(
            f"{path} cannot be read as part of the hold-out ({type(error).__name__}: {error}); its commit is damaged"
        ) from error
