"""Seals a commit's folder before it is committed: hashes every file and forces it to the disk, unless that was done."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from agent.commits import StateError, sealed
from exporter.files import sync_folders


def seal(folder: Path, before: Path | None = None) -> dict[str, tuple[int, str]]:
    """Give the size and sha256 of every file below `folder`, and force files and folders to the disk.

    before: folder of the commit that this one follows. A file that is a hard link to one of the same name there is on
    the disk already, and has the hash of that commit's manifest: it is not read again, or each commit would read all
    that was ever held out. Should it have been damaged since, the next start finds that out by this hash.

    Returns relative path -> (size, sha256), ready for an Outcome. Raises StateError for anything that is neither a
    file nor a folder, and OSError when the disk refuses.
    """
    known = {} if before is None else sealed(before)
    files: dict[str, tuple[int, str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StateError(f"{path} is neither a file nor a folder; a commit holds nothing else")
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        size = path.stat().st_size
        # by its size too: one that was cut short since would not pass for what was committed
        if before is not None and name in known and known[name][0] == size and _same(path, before / name):
            files[name] = known[name]
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[name] = (size, digest)
    sync_folders(folder)
    return files


def _same(one: Path, other: Path) -> bool:
    """Tell whether two names are hard links to one file; False where there is no other."""
    try:
        return one.samefile(other)
    except FileNotFoundError:
        return False
