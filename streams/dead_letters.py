"""Rejected records of the embedded stream, set aside in files of JSON lines: what came, from where, and why."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from streams.record import Rejected
from streams.source import DeadLetterError

log = logging.getLogger(__name__)

_FILES = 8
"""Files that share the bound. The oldest is deleted as a whole: with more files less is lost at once, with fewer a
larger value still fits into one."""


class FileDeadLetters:
    """Keeps the newest dead letters in `folder`, about `max_bytes` of them, in files of an eighth of that.

    A line has `time` (UTC), `topic`, `partition`, `offset`, `reason`, `detail`, and of the message as it came `key`,
    `value` (base64 or null) and `headers` (pairs of name and base64 or null). A value too large for a file is left out:
    `value_bytes` and `value_sha256` say what it was. After a crash the same coordinates may stand there twice.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self._folder = folder
        self._file_bytes = max(1, max_bytes // _FILES)
        self._file: BinaryIO | None = None
        self._written = 0
        self._failed: OSError | None = None

    def put(self, rejected: Rejected) -> None:
        """Write a record, not yet for good. `flush` raises for a disk that did not take it."""
        if self._failed:
            return
        line = _line(rejected, self._file_bytes)
        try:
            if self._file is None or self._written + len(line) > self._file_bytes:
                self._next_file()
            assert self._file is not None
            self._file.write(line)
            self._written += len(line)
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

    def close(self) -> None:
        """Close the file. Letters that no `flush` followed may be lost."""
        file, self._file = self._file, None
        if file:
            try:
                file.close()
            except OSError as error:
                self._failed = error

    def _next_file(self) -> None:
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        files = sorted(self._folder.glob("*.jsonl"))
        for old in files[: max(0, len(files) - _FILES + 1)]:
            log.warning("dead letters in %s exceed their bound; deleted the oldest file %s", self._folder, old.name)
            old.unlink()
        # Always a new file: a line that a crash cut short is never continued.
        number = int(files[-1].stem) + 1 if files else 1
        self._file = (self._folder / f"{number:08d}.jsonl").open("xb")
        self._written = 0
        # A file is there after a crash only when its folder's entry is on the disk too.
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _line(rejected: Rejected, max_bytes: int) -> bytes:
    line: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "topic": rejected.partition.topic,
        "partition": rejected.partition.number,
        "offset": rejected.offset,
        "reason": rejected.reason,
        "detail": rejected.detail,
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
