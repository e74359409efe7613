"""Rejected records of the embedded stream, set aside in files of JSON lines: what came, from where, and why."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from streams.record import MAX_DETAIL_CHARS, Offsets, Partition, Rejected
from streams.source import DeadLetterError

log = logging.getLogger(__name__)

_FILES = 8
"""Files that share the bound. The oldest is deleted as a whole: with more files less is lost at once, with fewer a
larger value still fits into one."""

_NAMES = "[0-9]" * 8 + ".jsonl"
"""The names of our files, in the order of their numbers; others in the folder are left alone."""


class FileDeadLetters:
    """Keeps the newest dead letters in `folder`, about `max_bytes` of them, in files of an eighth of that.

    The bound removes the oldest files, and never a letter of this process that no commit has passed: the folder grows
    beyond its bound until one does. What an earlier process left may go, as what no commit had passed then is read, and
    rejected, again.

    A line has `time` (UTC), `topic`, `partition`, `offset`, `reason`, `detail`, and of the message as it came `key`,
    `value` (base64 or null) and `headers` (pairs of name and base64 or null). A value too large for a file is left out:
    `value_bytes` and `value_sha256` say what it was. After a crash the same coordinates may stand there twice.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self._folder = folder
        self._max_bytes = max_bytes
        self._file_bytes = max(1, max_bytes // _FILES)
        self._file: BinaryIO | None = None
        self._written = 0
        self._failed: OSError | None = None
        self._committed: Offsets = {}
        self._untold: Counter[str] = Counter()
        """Letters of each reason that were put since a commit was last told of."""
        self._next: dict[str, dict[Partition, int]] = {}
        """Name of a file of this process -> the offsets that follow its letters."""
        self.removed = 0
        """Letters that the bound removed, since the process began."""

    def put(self, rejected: Rejected) -> None:
        """Write a record, not yet for good. `flush` raises for a disk that did not take it."""
        if self._failed:
            return
        line = _line(rejected, self._file_bytes)
        try:
            if self._file is None or self._written + len(line) > self._file_bytes:
                self._next_file(len(line))
            assert self._file is not None
            self._file.write(line)
            self._written += len(line)
            self._untold[rejected.reason] += 1
            ends = self._next.setdefault(Path(self._file.name).name, {})
            ends[rejected.partition] = max(rejected.offset + 1, ends.get(rejected.partition, 0))
        except OSError as error:
            self._failed = error

    def flush(self, timeout_s: float = 0) -> None:
        """Write everything put before to the disk for good; a disk has no time-out.

        Raises DeadLetterError, and from then on always, when a letter could not be written: the record is read, and
        rejected, again after the next start.
        """
        try:
            if self._file and not self._failed:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            self._failed = error
        if self._failed:
            raise DeadLetterError(
                f"cannot set rejected records aside in {self._folder}: {self._failed.strerror or self._failed}; make"
                " room there and start again. Nothing is lost: records after the last commit are read again"
            ) from self._failed

    def committed(self, offsets: Offsets) -> None:
        """Note that a commit has passed the letters before `offsets`: the bound may remove them from now on.

        Logs how many were set aside since the commit before, and why: an archive is often learned with nobody looking
        at metrics."""
        self._committed = offsets
        if self._untold:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self._untold.most_common())
            log.warning("records set aside in %s: %s", self._folder, reasons)
            self._untold.clear()
        if self._file is None or self._failed:
            return
        try:
            self._make_room()
        except OSError as error:
            self._failed = error

    def close(self) -> None:
        """Close the file. Letters that no `flush` followed may be lost."""
        file, self._file = self._file, None
        if file:
            try:
                file.close()
            except OSError as error:
                self._failed = error

    def _next_file(self, line_bytes: int) -> None:
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        files = sorted(self._folder.glob(_NAMES))
        if self._file is None and files and (size := _whole_bytes(files[-1])) + line_bytes <= self._file_bytes and size:
            # Gone on with, or every start would leave a file of a few lines.
            self._file = files[-1].open("ab")
            self._written = size
        else:
            number = int(files[-1].stem) + 1 if files else 1
            self._file = (self._folder / f"{number:08d}.jsonl").open("xb")
            self._written = 0
            # A file is there after a crash only when its folder's entry is on the disk too.
            # exporter.files.sync would do this, but streams may not import that package.
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self._make_room()

    def _make_room(self) -> None:
        """Delete the oldest files that may go until the newest has its full size within the bound."""
        older = sorted(self._folder.glob(_NAMES))[:-1]  # none where the folder cannot be listed: `glob` hides that
        sizes = {file: file.stat().st_size for file in older}
        excess = sum(sizes.values()) + self._file_bytes - self._max_bytes
        before, deleted = self.removed, []
        for file, size in sizes.items():
            ends = self._next.get(file.name, {})
            if any(offset > self._committed.get(partition, 0) for partition, offset in ends.items()):
                continue
            if excess <= 0:
                break
            with file.open("rb") as content:
                self.removed += sum(1 for _ in content)
            file.unlink()
            self._next.pop(file.name, None)
            deleted.append(file.name)
            excess -= size
        if deleted:
            log.warning(
                "dead letters in %s exceed %d bytes; deleted the oldest %d of them (%s)",
                self._folder,
                self._max_bytes,
                self.removed - before,
                ", ".join(deleted),
            )


def _whole_bytes(file: Path) -> int:
    """Give the size of a file that ends with a whole line; 0 for one cut short by a crash, which is never continued."""
    with file.open("rb") as content:
        size = content.seek(0, os.SEEK_END)
        content.seek(max(0, size - 1))
        return size if content.read(1) == b"\n" else 0


def _line(rejected: Rejected, max_bytes: int) -> bytes:
    line: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "topic": rejected.partition.topic,
        "partition": rejected.partition.number,
        "offset": rejected.offset,
        "reason": rejected.reason,
        "detail": rejected.detail[:MAX_DETAIL_CHARS],
    }
    raw = rejected.raw
    if raw is not None:
        line |= {"key": _base64(raw.key), "headers": [[name, _base64(value)] for name, value in raw.headers]}
        # As base64 it has 4 characters for 3 bytes; half a file is left for the rest of the line.
        if raw.value is not None and len(raw.value) * 4 // 3 > max_bytes // 2:
            line |= {"value_bytes": len(raw.value), "value_sha256": hashlib.sha256(raw.value).hexdigest()}
        else:
            line["value"] = _base64(raw.value)
    return json.dumps(line).encode() + b"\n"


def _base64(value: bytes | None) -> str | None:
    return None if value is None else base64.b64encode(value).decode()
