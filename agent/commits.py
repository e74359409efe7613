"""The state folder: finds the commit to continue from, and makes the next one current by a single rename.

A folder holds a commit only if its manifest is intact and names every other file with size and sha256. Where everything
lies in a state folder says agent.layout.

An agent may be killed at any moment (tests/test_crash.py does so before every change of the disk). What the next start
finds, and what it does:

    killed                             found                         next start
    while reading or learning          NNNNNN.staging, half full     sweeps it; the task is read and learned again
    while the manifest is written      NNNNNN.staging                the same
    after the rename to NNNNNN         a commit newer than CURRENT   sweeps it; the same
    after CURRENT is replaced          the new commit                goes on from it; offsets and readers with it
    while an old commit is deleted     NNNNNN.pruned                 sweeps it

So learning happens once in effect: state, release, report and offsets become true together, when CURRENT is replaced.

Damage is a file that is missing or has another hash. What learning needs (learner.*, report.json, holdout/trained.zip,
the manifest) is a file of its own in every commit, so that a flipped bit costs one commit and the one before it is
intact. Hold-out packs and an unchanged release are hard links in many commits; damaged, they are lost from the next
commit on, and learning goes on. A disk that refuses to read is no damage: nothing is renamed, the agent stops.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, TypeVar

from agent.layout import (
    COMMITS,
    DAMAGED,
    LOCK,
    MANIFEST,
    NEWEST_RELEASE,
    POINTER,
    PRUNED,
    RELEASE,
    RELEASE_IN_COMMIT,
    REPORT,
    STAGING,
    commit_name,
    commit_number,
    is_dispensable,
    is_of_release,
)
from agent.scoring.report import Report
from agent.values import Commit, Outcome
from exporter.files import MISSING, NEW, READ_ATTEMPTS, copy, link_or_copy, patiently, point, sync, sync_folders
from streams.record import Offsets, Partition

log = logging.getLogger(__name__)

FORMAT = 1
"""Format of a manifest, and of all that it names. Another number makes this version refuse the folder, untouched."""

_PACKAGES = (
    "gapstream", "torch", "open_clip_torch", "timm", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy",
)  # fmt: skip
"""Packages whose versions a manifest notes, as far as they are installed: what learns, and what makes the release."""

_T = TypeVar("_T")

Files = Mapping[str, tuple[int, str]]
"""Path relative to the commit's folder -> (size in bytes, sha256)."""


@dataclass(frozen=True)
class Provenance:
    """It is what a commit records beside the outcome."""

    fingerprint: str
    """Fingerprint of the source whose offsets are committed; empty where there was none."""
    classes: tuple[str, ...]
    """Class names of the task, learned or not."""
    totals: Mapping[str, float]
    """The counters as they are after the task, see agent.pipeline.counted."""
    config: Mapping[str, Any]
    """The resolved configuration, secrets masked."""
    epochs: Mapping[Partition, int] = field(default_factory=dict)
    """Which history of the stream lies before the offsets, see Commit."""


class StateError(Exception):
    """The state folder cannot be used; the message says what to do.

    StateError
    └── StateLocked      another agent works on it
    """


class StateLocked(StateError):
    """Another agent works on the state folder."""


class _Damaged(Exception):
    """A commit's folder cannot be trusted; the message says why."""


def sealed(commit: Path) -> Files:
    """Give the files that a commit's manifest names, none of them looked at; no file where the manifest is damaged."""
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
        body = json.loads((commit / MANIFEST).read_bytes())
        if body.pop("sha256") == _digest(body) and body["format"] == FORMAT:
            return {name: (size, digest) for name, (size, digest) in body["files"].items()}
    return {}


@dataclass(frozen=True)
class _Verified:
    """A commit, and those of its files that have the hashes of its manifest."""

    commit: Commit
    files: Files


class CommitStore:
    """It owns a state folder: its lock, its commits, and which of them is current. Used from one thread."""

    def __init__(self, path: Path, keep: int) -> None:
        """keep: number of commits that stay when a new one is made, at least 1; older ones are deleted."""
        self.path = path.absolute()
        self._commits = self.path / COMMITS
        self._pointer = self.path / POINTER
        self._keep = keep
        self._lock: IO[str] | None = None
        self._last: _Verified | None = None
        self._passing = False
        """True when the last commit has the learner of the one before: nothing but offsets, or its release, is new."""

    def lock(self) -> None:
        """Become the only agent on this folder, creating it when needed, until `close` or the end of the process.

        Raises StateLocked when another agent has it, StateError when it cannot be written.
        """
        with self._writing():
            self._commits.mkdir(parents=True, exist_ok=True)
            # Opened without truncation: the process id in it belongs to whoever has the lock.
            file = (self.path / LOCK).open("a+")
        # The kernel lets go of the lock when its owner ends, however it ends; a file that merely exists would have to
        # be deleted by hand after a kill -9.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise StateLocked(
                f"{self.path} is in use by another agent (process {owner}); stop it first, or give this one a folder "
                "of its own with state.path"
            ) from error
        with self._writing():
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        self._lock = file

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def current(self) -> Commit | None:
        """Give the commit to continue from, every file verified (what learning does without may be `damaged`); None in
        a new folder.

        A damaged commit is set aside and the newest intact one before it becomes current, with its own offsets: what
        was learned since is learned again. Without CURRENT (a copy that lost its symlinks) the newest intact commit is
        taken. Raises StateError when there are commits and none is intact, or when the disk cannot read them.
        """
        numbers = sorted(self._numbers(), reverse=True)
        target = self._target()
        damaged: list[str] = []
        for number in numbers:
            if target is not None and number > target:
                continue  # it never became current: readers have not seen it, its offsets were never acknowledged
            try:
                known = self._read(number)
            except _Damaged as reason:
                log.error("commit %06d is damaged (%s); trying the one before it", number, reason)
                damaged.append(f"{number:06d}: {reason}")
                self._set_aside(number)
                continue
            if known.commit.damaged:
                log.error(
                    "commit %06d is damaged where learning does without: %s is lost",
                    number, ", ".join(known.commit.damaged),
                )  # fmt: skip
            if number != target:  # CURRENT has to say so at once, since readers follow it
                log.warning("continuing from commit %06d; what was learned after it will be learned again", number)
                with self._writing():
                    self._point(number)
            self._last = known
            return known.commit
        # To begin anew without being asked would throw away all that was learned.
        if damaged or target is not None:
            raise StateError(
                f"no commit in {self._commits} is intact ({'; '.join(damaged) or f'{target:06d} is missing'}); restore "
                "the folder from a backup, or move it away to begin again from the start of the stream"
            )
        return None

    def verified(self) -> Commit | None:
        """Read what CURRENT names, every file compared with its hash; None in a new folder. Changes nothing, needs no
        lock.

        Raises StateError when it is damaged or missing.
        """
        number = self._target()
        if number is None:
            return None
        try:
            return self._read(number).commit
        except _Damaged as reason:
            raise StateError(
                f"commit {number:06d} is damaged ({reason}); the agent will go on from the newest intact one before it"
            ) from reason

    def sweep(self) -> None:
        """Delete what a killed agent left: unfinished folders, and commits that never became current.

        Raises StateError when the disk refuses.
        """
        target = self._target()
        with self._writing():
            for link in (self._pointer, self.path / RELEASE):
                link.with_name(f"{link.name}{NEW}").unlink(missing_ok=True)
            for folder in [*self._commits.glob(f"*{STAGING}"), *self._commits.glob(f"*{PRUNED}")]:
                shutil.rmtree(folder)
            for number in self._numbers():
                if target is not None and number > target:
                    self._delete(number)

    def stage(self) -> Path:
        """Make an empty folder for the next commit; an earlier one that was not committed is emptied.

        Raises StateError when the disk refuses.
        """
        staging = self._folder(self._next).with_suffix(STAGING)
        with self._writing():
            if staging.exists():
                shutil.rmtree(staging)
            staging.mkdir()
        return staging

    def commit(self, outcome: Outcome, provenance: Provenance) -> Commit:
        """Make `outcome` the current commit; from the return on, a crash continues from here.

        `outcome.staging` is the folder `stage` gave, sealed. When it has no `release/`, the release of the commit
        before serves on. Of several commits in a row after one task the newest is kept. Raises StateError when the
        folder is not what the outcome says or the disk refuses; nothing changed then.
        """
        files = dict(outcome.files)
        if self._last and not any(is_of_release(name) for name in files):
            files |= self._link(
                outcome.staging, {name: file for name, file in self._last.files.items() if is_of_release(name)}
            )
        return self._publish(outcome.staging, files, outcome.next_offsets, outcome.task, outcome.classes, provenance)

    def carry(self, offsets: Offsets, task: int, provenance: Provenance) -> Commit:
        """Commit `offsets` with nothing newly learned: all else is the commit before, linked.

        `task` is the number of the last task that is over, learned or not. Where it is that of the last commit, nothing
        but the offsets is new; of several such commits in a row the newest is kept. Raises StateError when the disk
        refuses.
        """
        last = self._last
        staging = self.stage()
        files = self._link(staging, last.files) if last else {}
        classes = last.commit.classes if last else ()
        return self._publish(staging, files, offsets, task, classes, provenance)

    def _publish(
        self,
        staging: Path,
        files: Files,
        offsets: Offsets,
        tasks: int,
        classes: tuple[str, ...],
        provenance: Provenance,
    ) -> Commit:
        number = self._next
        passing = self._last is not None and self._last.commit.tasks == tasks
        # Or hours of rejected records would leave nothing but copies of one learner to go back to.
        replaced = self._last.commit.number if self._last is not None and passing and self._passing else None
        seen = dict.fromkeys([*(self._last.commit.seen if self._last else ()), *provenance.classes])
        body = {
            "format": FORMAT,
            "number": number,
            "parent": self._last.commit.number if self._last else None,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "offsets": sorted([*partition, offset] for partition, offset in offsets.items()),
            "epochs": sorted([*partition, epoch] for partition, epoch in provenance.epochs.items()),
            "fingerprint": provenance.fingerprint,
            "classes": list(classes),
            "seen": list(seen),
            "tasks": tasks,
            "totals": dict(provenance.totals),
            "files": {name: list(entry) for name, entry in sorted(files.items())},
            "config": dict(provenance.config),
            "versions": _versions(),
        }
        # The order is what a crash is safe by: the data were synced by `seal`, the manifest that vouches for them comes
        # after them, its folder's entries after it, then the name of the folder, and CURRENT last. Every step is forced
        # to the disk before the next, since a file system may write them down in another order.
        with self._writing():
            _check_present(staging, files)
            with (staging / MANIFEST).open("w", encoding="utf-8") as file:
                json.dump(body | {"sha256": _digest(body)}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            sync_folders(staging)
            staging.rename(self._folder(number))
            sync(self._commits)
            self._point(number)
            self._last, self._passing = _Verified(self._describe(number, body), files), passing
            # After CURRENT has moved: until then the oldest commit may be the only intact one.
            for old in sorted(self._numbers())[: -self._keep] if replaced is None else [replaced]:
                self._delete(old)
        return self._last.commit

    def _read(self, number: int) -> _Verified:
        folder = self._folder(number)
        try:
            body = json.loads(_read_file(folder / MANIFEST, lambda file: file.read()) or b"")
            expected = body.pop("sha256")
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise _Damaged(f"{MANIFEST}: {error!r}") from error
        if _digest(body) != expected:
            raise _Damaged(f"{MANIFEST} does not have the checksum it carries")
        if body["format"] != FORMAT:
            raise StateError(
                f"{folder / MANIFEST} has format {body['format']}, this version of gapstream reads {FORMAT}; "
                "use the version that wrote it, or another state.path"
            )
        files = {name: (size, digest) for name, (size, digest) in body["files"].items()}
        # All of them, at every start: a disk that lies about one file is noticed before anything is learned on it.
        damaged: list[str] = []
        for name, (size, digest) in files.items():
            found = _read_file(folder / name, lambda file: hashlib.file_digest(file, "sha256").hexdigest())
            if found == digest:
                continue
            if not is_dispensable(name):
                what = "is missing" if found is None else f"has sha256 {found[:12]}..."
                raise _Damaged(f"{name} {what}, expected {digest[:12]}... and {size} bytes")
            damaged.append(name)
        lost = {name for name in files if is_of_release(name)} if any(map(is_of_release, damaged)) else set()
        intact = {name: file for name, file in files.items() if name not in {*damaged, *lost}}
        return _Verified(self._describe(number, body | {"files": intact}, tuple(damaged)), intact)

    def _describe(self, number: int, body: Mapping[str, Any], damaged: tuple[str, ...] = ()) -> Commit:
        folder = self._folder(number)
        report = folder / REPORT
        return Commit(
            number=number,
            path=folder,
            offsets={Partition(topic, partition): offset for topic, partition, offset in body["offsets"]},
            fingerprint=body["fingerprint"],
            classes=tuple(body["classes"]),
            tasks=body["tasks"],
            totals=body["totals"],
            report=Report.read(report) if REPORT in body["files"] else None,
            release=folder / RELEASE_IN_COMMIT if any(is_of_release(name) for name in body["files"]) else None,
            seen=tuple(body["seen"]),
            damaged=damaged,
            epochs={Partition(topic, number): epoch for topic, number, epoch in body.get("epochs", ())},
        )

    def _link(self, staging: Path, files: Files) -> Files:
        """Put the last commit's `files` into `staging` too: copies of what learning needs, hard links of the rest."""
        assert self._last is not None
        with self._writing():
            for name in files:
                source, target = self._last.commit.path / name, staging / name
                target.parent.mkdir(parents=True, exist_ok=True)
                (link_or_copy if is_dispensable(name) else copy)(source, target)
        return files

    def _point(self, number: int) -> None:
        point(self._pointer, Path(COMMITS) / commit_name(number))
        # Made once: where it leads afterwards is for `gapstream rollback` to say, and no commit may undo that.
        if not (self.path / RELEASE).is_symlink():
            point(self.path / RELEASE, NEWEST_RELEASE)

    def _target(self) -> int | None:
        """Give the number that CURRENT names, whether or not that commit is there."""
        try:
            name = self._pointer.readlink().name
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(
                f"{self._pointer} is not a symlink; delete it, and the newest intact commit will be taken"
            ) from error
        if commit_number(name) is None:
            raise StateError(f"{self._pointer} names {name!r}, not a commit; delete it to take the newest intact one")
        return commit_number(name)

    def _set_aside(self, number: int) -> None:
        aside = self._folder(number).with_suffix(DAMAGED)
        with self._writing():
            if aside.exists():
                shutil.rmtree(aside)
            self._folder(number).rename(aside)

    def _delete(self, number: int) -> None:
        """Delete a commit in two steps, so that a folder with a commit's name is never half deleted."""
        doomed = self._folder(number).with_suffix(PRUNED)
        self._folder(number).rename(doomed)
        shutil.rmtree(doomed)

    def _numbers(self) -> list[int]:
        return [n for path in self._commits.glob("*") if (n := commit_number(path.name)) is not None]

    def _folder(self, number: int) -> Path:
        return self._commits / commit_name(number)

    @property
    def _next(self) -> int:
        return self._last.commit.number + 1 if self._last else 1

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what the disk refuses into StateError."""
        try:
            yield
        except OSError as error:
            raise StateError(
                f"cannot write the state folder {self.path}: {error.strerror or error} ({error.filename}); nothing new "
                "is committed; make it writable or free some space, then start again"
            ) from error


def _read_file(path: Path, read: Callable[[BufferedReader], _T]) -> _T | None:
    """Give what `read` makes of a file; None where there is none. Raises StateError when the disk refuses for good."""

    def attempt() -> _T:
        with path.open("rb") as file:
            return read(file)

    try:
        return patiently(attempt)
    except MISSING:
        return None
    except OSError as error:
        raise StateError(
            f"cannot read {path}: {error.strerror or error}, tried {READ_ATTEMPTS} times. A disk that refuses is no "
            "damaged commit, so nothing was changed; mend the disk and start again"
        ) from error


def _check_present(folder: Path, files: Files) -> None:
    present = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    expected = {name: size for name, (size, _) in files.items()}
    if present != expected:
        differing = sorted(name for name, _ in set(present.items()) ^ set(expected.items()))
        raise StateError(f"{folder} is not what was sealed (differing: {', '.join(differing)}); nothing was committed")


def _digest(body: Mapping[str, Any]) -> str:
    """Give the checksum that a manifest carries of its own content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@functools.cache
def _versions() -> dict[str, str]:
    """Ask the installed packages' metadata: importing torch for its version would cost seconds, and this process must
    not have torch."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
