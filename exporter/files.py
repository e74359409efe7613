"""Files that outlive a power cut: forced to the disk, shared by hard links, and replaced by one rename."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

READ_ATTEMPTS = 3
"""Times that a file is read before the disk's refusal is believed: chosen by hand. A network file system or a cable
that comes back within the pauses costs nothing then; more only delays the message."""

READ_PAUSE_S = 1.0
"""Pause between two of these attempts, chosen by hand as well."""

MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What opening raises when the file is not there; every other OSError is the disk's doing."""

_T = TypeVar("_T")


def cache_folder(name: str, env: Mapping[str, str] = os.environ) -> Path | None:
    """Give the folder `name` in this user's cache, `gapstream` in XDG_CACHE_HOME or else in ~/.cache; None without a
    home. It need not be there."""
    try:
        above = Path(env.get("XDG_CACHE_HOME", ""))
        # As the XDG base directory specification has it: a path that is not absolute is as good as none.
        above = above if above.is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # there is no home
        return None
    return above / "gapstream" / name


def patiently(read: Callable[[], _T]) -> _T:
    """Give what `read` gives, trying again when the disk refuses. Raises the last OSError, one of MISSING at once."""
    for _ in range(READ_ATTEMPTS - 1):
        try:
            return read()
        except MISSING:
            raise
        except OSError:
            time.sleep(READ_PAUSE_S)
    return read()


NEW = ".new"
"""The ending of what `point` makes beside a link before it takes its place; a process that died may leave one there."""


def sync(path: Path) -> None:
    """Force a file's bytes, or the names in a folder, to the disk. Raises OSError.

    A file that was made or renamed needs both: after a power cut its bytes may be there under no name.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folders(folder: Path) -> None:
    """Force the names in `folder` and in every folder below it to the disk. Raises OSError."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync(path)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a synced copy where the file systems have no common hard links.

    Only for files that never change once they are written. Raises OSError, FileNotFoundError when `source` is gone.
    """
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or one that has no hard links or no more of them for this file
        copy(source, target)


def copy(source: Path, target: Path) -> None:
    """Make `target` a synced copy of `source`, so that damage to one leaves the other. Raises OSError."""
    shutil.copyfile(source, target)
    sync(target)


def point(link: Path, target: Path) -> None:
    """Make `link` a symlink to `target` by one rename that survives a power cut. Raises OSError."""
    # A symlink cannot be made over another one, and deleting that first would leave a moment without any.
    new = link.with_name(f"{link.name}{NEW}")
    new.unlink(missing_ok=True)  # by a process that died
    new.symlink_to(target)
    new.replace(link)
    sync(link.parent)
