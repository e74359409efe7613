"""Blobs of sites on their way through a compacted topic: cut into chunks, put together again, kept in a folder.

Each site has one blob at a time, some bytes that it replaces from time to time; of every site the newest complete one
is kept. Chunks may come in any order, twice, or never (compaction removes those of an older blob from its middle);
nothing that comes is trusted: a blob counts once all its chunks are there, its sha256 is right and `check` takes it.

A site's blobs take two generations of keys in turn, SITE/0, SITE/1, ... and SITE/500000000, SITE/500000001, ...: while
one is published, and where its publisher dies meanwhile, the topic has all chunks of the one before.

The folder:

    <site>.json                says which blob is kept, written last and by one rename
    <site>-<sequence>.blob     its bytes
    <site>-<sequence>.part     those of one that is not complete; swept at the start, as reading begins anew then
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
"""Format of a chunk. A chunk of another one is refused, until this version is replaced by one that reads it."""

HEADER = "gapstream.blob"
"""The header of a message that says, as JSON, what its chunk belongs to."""

MAX_SITES = 1000
"""Sites whose blobs are kept: chosen by hand. More would take a release minutes to be made of, and a topic of one
partition a terabyte a day; sites then merge in groups first (deploy/README.md#a-fleet)."""

IN_PROGRESS = 2
"""Blobs of a site that are put together at once, the newest ones: a publisher sends one after the other, so the second
is there only for chunks that come out of order."""

GENERATION = 500_000_000
"""The number of the first chunk of the second generation of keys: half of the nine digits that a number may have."""

LARGEST = 2**53
"""Whole numbers in a header are below this: JSON's are exact up to it."""

AHEAD_MS = 24 * 3600 * 1000
"""Milliseconds that a sequence may be ahead of our clock: a day, so that slow clocks, and those set to another zone, do
no harm. One from far ahead, taken once, would let nothing of its site pass until that time."""

_SITE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


class BlobRefused(Exception):
    """What came is no chunk, or its blob is not used; the message says why."""


@dataclass(frozen=True)
class Blob:
    """What is known of a blob beside its bytes."""

    site: str
    sequence: int
    """Grows with every blob of its site: the time of its publishing in milliseconds since the epoch, or one more than
    the blob's before where a clock was set back."""
    version: int
    """What its site calls it."""
    sha256: str
    bytes: int
    chunk_bytes: int
    """Size of each chunk but the last."""
    generation: int = 0
    """Which of the two generations of keys its chunks have: 0 or 1."""

    @property
    def chunks(self) -> int:
        """The number of its chunks."""
        return -(-self.bytes // self.chunk_bytes)

    def length(self, index: int) -> int:
        """Give the bytes of a chunk."""
        return min(self.chunk_bytes, self.bytes - index * self.chunk_bytes)


@dataclass(frozen=True)
class Chunk:
    """It is a message: a part of a blob, or, without a value, the end of what had its key."""

    key: bytes
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]


def cut(blob: Blob, data: bytes | mmap.mmap) -> Iterator[Chunk]:
    """Cut the bytes of a blob into its chunks, in order."""
    headers = _headers(asdict(blob))
    for index in range(blob.chunks):
        start = index * blob.chunk_bytes
        yield Chunk(
            _key(blob.site, blob.generation * GENERATION + index), data[start : start + blob.chunk_bytes], headers
        )


def ended(site: str, number: int, sequence: int) -> Chunk:
    """Give the message that ends the chunk of this number, see `place`. That of the number 0 forgets the site's blobs
    up to `sequence`."""
    return Chunk(_key(site, number), None, _headers({"sequence": sequence}))


def place(key: bytes | None) -> tuple[str, int]:
    """Give the site and the number of a chunk from its key: generation * GENERATION + index. Raises BlobRefused."""
    site, slash, number = (key or b"")[:100].decode("ascii", "replace").rpartition("/")
    if not slash or not _SITE.fullmatch(site) or not re.fullmatch(r"[0-9]{1,9}", number, re.ASCII):
        raise BlobRefused(f"the key {key[:100] if key else key!r} is not that of a chunk, SITE/NUMBER")
    return site, int(number)


def sequence(headers: Sequence[tuple[str, bytes | None]]) -> int:
    """Give the sequence that a message says. Raises BlobRefused."""
    return _whole(_said(headers), "sequence")


def kept(folder: Path) -> dict[str, tuple[Blob, Path]]:
    """Read which blobs are kept in a folder, and where: site -> blob and file. What cannot be read is left out."""
    found: dict[str, tuple[Blob, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        before = None
        while (blob := _entry(path)) is not None and blob != before:
            file, before = _file(folder, blob, "blob"), blob
            # Gone, where a newer one has taken its place since the entry was read: then that one is kept.
            with contextlib.suppress(FileNotFoundError):
                if blob.site == path.name.removesuffix(".json") and file.stat().st_size == blob.bytes:
                    found[blob.site] = blob, file
                break
    return found


def _entry(path: Path) -> Blob | None:
    """Read which blob a site's file says is kept; None where it cannot be read."""
    try:
        return Blob(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


@dataclass
class _Part:
    """A blob that is being put together."""

    blob: Blob
    path: Path
    present: set[int] = field(default_factory=set)

    @property
    def arrived(self) -> int:
        """Bytes that its chunks take."""
        return min(self.blob.bytes, len(self.present) * self.blob.chunk_bytes)


@dataclass
class _Own:
    """What the topic has of the own site in one generation of keys."""

    blob: Blob | None = None
    """The newest one."""
    present: set[int] = field(default_factory=set)
    """Its chunks."""
    there: set[int] = field(default_factory=set)
    """Chunks, of whichever blob, that are not ended."""


class Blobs:
    """It keeps the newest complete blob of every other site in a folder. Used from one thread, but for `known`."""

    def __init__(
        self,
        folder: Path,
        own: str,
        max_bytes: int,
        check: Callable[[str, Path], None],
        max_sites: int = MAX_SITES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """own: the site whose blobs are not kept. check: raises BlobRefused for a site's file that must not be used.
        clock: seconds since the epoch.

        Raises OSError.
        """
        self._folder = folder
        self._own = own
        self._max_bytes = max_bytes
        self._check = check
        self._max_sites = max_sites
        self._clock = clock
        folder.mkdir(parents=True, exist_ok=True)
        self._kept = {site: blob for site, (blob, _) in kept(folder).items() if site != own}
        self._parts: dict[tuple[str, int], _Part] = {}
        self._done_with: dict[str, int] = {}
        """Site -> the newest sequence that was forgotten or refused: nothing up to it is put together any more."""
        self._seen: set[str] = set()
        self.own_sequence = 0
        """The newest sequence that came of the own site."""
        self._own_generations = (_Own(), _Own())
        stay = {_file(folder, blob, "blob") for blob in self._kept.values()}
        for path in [*folder.glob("*.blob"), *folder.glob("*.part"), *folder.glob("*.new")]:
            if path not in stay:
                path.unlink()

    def known(self) -> dict[str, Blob]:
        """Give what is kept; may be called from any thread."""
        return self._kept

    def take(self, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes | None]]) -> bool:
        """Take a message; True when what is kept has changed. Raises BlobRefused, and OSError when the disk refuses."""
        site, number = place(key)
        said = _said(headers)
        sequence = _whole(said, "sequence")
        if sequence > self._clock() * 1000 + AHEAD_MS:
            raise BlobRefused(f"a chunk of {site} is dated more than a day ahead of this machine's clock")
        self._seen.add(site)
        if site == self._own:
            blob = None if value is None else _blob(site, said, number, value)
            self.own_sequence = max(self.own_sequence, sequence)
            self._note_own(number, blob)
            return False
        if value is None:
            return number == 0 and self._forget(site, sequence)
        newest = self._kept.get(site)
        if sequence <= max(self._done_with.get(site, 0), newest.sequence if newest else 0):
            return False  # older, or delivered again
        blob = _blob(site, said, number, value)
        index = number % GENERATION
        part = self._parts.get((site, sequence)) or self._begin(blob)
        if part.blob != blob:
            raise BlobRefused(f"{site} sent chunks of two blobs as one of sequence {sequence}")
        if index in part.present:
            return False
        # By what has come, not by what is said: one chunk of a large blob must not take the room of others.
        if (taken := self._taken()) + len(value) > self._max_bytes:
            self._end(part)
            self._refuse(blob, f"for what {site} sent there is no room: {taken} bytes are taken of fleet.max_bytes")
        with part.path.open("r+b") as file:
            file.seek(index * blob.chunk_bytes)
            file.write(value)
        part.present.add(index)
        return len(part.present) == blob.chunks and self._complete(part)

    def settle(self) -> set[str]:
        """Drop the sites of which the whole topic had nothing, once it was read from its beginning to its end; gives
        them. Where it had nothing of anybody it was made anew, and all stay."""
        gone = self._kept.keys() - self._seen if self._seen else set()
        for site in gone:
            self._drop(site)
        return set(gone)

    def torn(self) -> set[str]:
        """Give the sites of which nothing is kept and something is there: whose first blob is, or was, on its way."""
        return {site for site, _ in self._parts} - self._kept.keys()

    def begin_anew(self) -> None:
        """Reading begins at the topic's beginning again: what it had so far is no longer known."""
        self._seen = set()
        self._own_generations = (_Own(), _Own())

    def own_chunks(self, generation: int) -> list[int]:
        """Give the indices of the own site's chunks of a generation that came and are not ended, the largest first."""
        return sorted(self._own_generations[generation].there, reverse=True)

    def next_generation(self) -> int:
        """Give the generation of keys for the own site's next blob: not that of the newest one of which the topic has
        all chunks."""
        whole = [own.blob for own in self._own_generations if own.blob and len(own.present) == own.blob.chunks]
        return 1 - max(whole, key=lambda blob: blob.sequence).generation if whole else 0

    def _note_own(self, number: int, blob: Blob | None) -> None:
        """Note a chunk of the own site; without a blob it is ended."""
        generation, index = divmod(number, GENERATION)
        own = self._own_generations[generation]
        if blob is None:
            own.present.discard(index)
            own.there.discard(index)
            return
        own.there.add(index)
        if own.blob is None or blob.sequence > own.blob.sequence:
            own.blob, own.present = blob, set()
        if blob == own.blob:
            own.present.add(index)

    def _begin(self, blob: Blob) -> _Part:
        """Make room for a blob's chunks. Raises BlobRefused where there is none, once for each blob."""
        others = sorted(sequence for site, sequence in self._parts if site == blob.site)
        if len(others) >= IN_PROGRESS:
            if blob.sequence < others[0]:
                self._refuse(blob, f"{blob.site} sent chunks of a blob long after those of newer ones")
            self._end(self._parts[blob.site, others[0]])
        sites = self._kept.keys() | {site for site, _ in self._parts}
        if blob.site not in sites and len(sites) >= self._max_sites:
            self._refuse(blob, f"{blob.site} is one site too many, at most {self._max_sites} are kept")
        if blob.bytes > self._max_bytes // 2:
            self._refuse(
                blob,
                f"what {blob.site} sends has {blob.bytes} bytes; one site's may take half of the {self._max_bytes} of "
                "fleet.max_bytes",
            )
        part = self._parts[blob.site, blob.sequence] = _Part(blob, _file(self._folder, blob, "part"))
        part.path.touch()
        return part

    def _taken(self) -> int:
        """Give the bytes that the folder takes."""
        return sum(one.bytes for one in self._kept.values()) + sum(part.arrived for part in self._parts.values())

    def _complete(self, part: _Part) -> bool:
        """Put a blob whose chunks are all there in the place of the one before. Raises BlobRefused."""
        blob = part.blob
        with part.path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        try:
            if found != blob.sha256:
                raise BlobRefused(
                    f"{blob.site} sent a blob of sha256 {found[:12]}..., said to be {blob.sha256[:12]}..."
                )
            self._check(blob.site, part.path)
        except BlobRefused as error:
            self._end(part)
            self._refuse(blob, str(error))
        part.path.rename(_file(self._folder, blob, "blob"))
        new = self._folder / f"{blob.site}.json.new"
        with new.open("w", encoding="utf-8") as file:
            json.dump(asdict(blob), file)
            file.flush()
            os.fsync(file.fileno())
        new.rename(self._folder / f"{blob.site}.json")
        self._sync()
        before = self._kept.get(blob.site)
        self._kept = {**self._kept, blob.site: blob}
        if before is not None:
            _file(self._folder, before, "blob").unlink(missing_ok=True)
        for site, sequence in [*self._parts]:
            if site == blob.site and sequence <= blob.sequence:
                self._end(self._parts[site, sequence])
        return True

    def _forget(self, site: str, sequence: int) -> bool:
        self._done_with[site] = max(sequence, self._done_with.get(site, 0))
        for key, part in [*self._parts.items()]:
            if key[0] == site and key[1] <= sequence:
                self._end(part)
        newest = self._kept.get(site)
        if newest is None or newest.sequence > sequence:
            return False
        self._drop(site)
        return True

    def _drop(self, site: str) -> None:
        (self._folder / f"{site}.json").unlink(missing_ok=True)
        self._sync()
        _file(self._folder, self._kept[site], "blob").unlink(missing_ok=True)
        self._kept = {other: blob for other, blob in self._kept.items() if other != site}

    def _end(self, part: _Part) -> None:
        del self._parts[part.blob.site, part.blob.sequence]
        part.path.unlink(missing_ok=True)

    def _refuse(self, blob: Blob, why: str) -> None:
        """Raise BlobRefused, and let the other chunks of this blob pass in silence."""
        self._done_with[blob.site] = max(blob.sequence, self._done_with.get(blob.site, 0))
        raise BlobRefused(why)

    def _sync(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _key(site: str, index: int) -> bytes:
    return f"{site}/{index}".encode("ascii")


def _file(folder: Path, blob: Blob, ending: str) -> Path:
    return folder / f"{blob.site}-{blob.sequence}.{ending}"


def _headers(said: Mapping[str, Any]) -> tuple[tuple[str, bytes], ...]:
    return ((HEADER, json.dumps({"format": FORMAT, **said}).encode()),)


def _said(headers: Sequence[tuple[str, bytes | None]]) -> dict[str, Any]:
    """Read what a message says of its chunk. Raises BlobRefused."""
    found = dict(headers).get(HEADER)
    try:
        said = json.loads((found or b"")[:4096])
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise BlobRefused(f"a message has no header {HEADER} of format {FORMAT}, as other versions may send or others")
    return said


def _whole(said: Mapping[str, Any], name: str) -> int:
    value = said.get(name)
    if type(value) is not int or not 0 < value < LARGEST:
        raise BlobRefused(f"a chunk's {name} is {str(value)[:50]!r}, expected a whole number above 0")
    return value


def _blob(site: str, said: Mapping[str, Any], number: int, value: bytes) -> Blob:
    """Read what the chunk of this number says of its blob. Raises BlobRefused, also where it has no such one."""
    sha256 = said.get("sha256")
    if said.get("site") != site or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise BlobRefused(f"a chunk of {site} says that it is another's, or has no sha256")
    numbers = {name: _whole(said, name) for name in ("sequence", "version", "bytes", "chunk_bytes")}
    generation = said.get("generation", 0)  # of an earlier version, which had one
    if type(generation) is not int or generation not in (0, 1):
        raise BlobRefused(f"a chunk's generation is {str(generation)[:50]!r}, expected 0 or 1")
    blob = Blob(site=site, sha256=sha256, generation=generation, **numbers)
    index = number - generation * GENERATION
    if not 0 <= index < min(blob.chunks, GENERATION) or len(value) != blob.length(index):
        raise BlobRefused(f"{site} sent a chunk {number} of {len(value)} bytes, which its blob does not have")
    return blob
