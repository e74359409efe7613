"""Which release readers follow: the newest, or one that is pinned; and the Triton repository beside them."""

from __future__ import annotations

import logging
import queue
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from agent.config import Release as Settings
from agent.layout import (
    COMMITS,
    NEWEST_RELEASE,
    PINNED,
    RELEASE,
    RELEASE_IN_COMMIT,
    STAGING,
    commit_name,
    commit_number,
)
from agent.values import Commit
from exporter import release as releases
from exporter import triton
from exporter.files import link_or_copy, point, sync, sync_folders
from exporter.release import Release, ReleaseError

log = logging.getLogger(__name__)

_CLOSE_S = 5
"""Longest wait at the end for a release that is being published: chosen by hand, a copy of the model to another disk
takes a second or two. What is cut off is swept there, and published at the next start."""


@dataclass(frozen=True)
class KeptRelease:
    """A release that readers can be sent to."""

    number: int
    """Number of the commit that it belongs to."""
    release: Release


def kept_releases(state: Path) -> list[KeptRelease]:
    """List the releases of all kept commits and the pinned one, oldest first.

    One that cannot be read is left out with a warning; a commit that only carries on the release before it is left out.
    """
    committed = [(path.parent.name, path) for path in state.glob(f"{COMMITS}/*/{RELEASE_IN_COMMIT}")]
    held = [(path.name, path) for path in state.glob(f"{PINNED}/*")]
    folders = {number: path for name, path in held + committed if (number := commit_number(name)) is not None}
    found: list[KeptRelease] = []
    for number, folder in sorted(folders.items()):
        try:
            release = releases.read(folder)
        except ReleaseError as error:
            log.warning("%s", error)
            continue
        if not found or release.id != found[-1].release.id:
            found.append(KeptRelease(number, release))
    return found


def pinned(state: Path) -> int | None:
    """Give the number of the commit whose release readers are held at; None while they follow the newest."""
    try:
        target = (state / RELEASE).readlink()
    except OSError:
        return None
    return commit_number(target.name) if target.parent.name == PINNED else None


def pin(state: Path, number: int) -> Release:
    """Send readers to the release of commit `number` until `unpin`; the learner goes on.

    Raises ReleaseError when there is no such release or it is damaged; readers stay where they were.
    """
    folder = state / PINNED / commit_name(number)
    source = state / COMMITS / folder.name / RELEASE_IN_COMMIT
    # Linked, not pointed to: the commit itself is deleted when newer ones take its place.
    if not folder.exists():
        release = releases.read(source)
        staging = folder.with_suffix(STAGING)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for name in (*release.files, releases.MANIFEST):
            try:
                link_or_copy(source / name, staging / name)
            except FileNotFoundError as error:  # a running agent deletes old commits at any time
                raise ReleaseError(f"commit {number} was deleted just now; choose a newer one") from error
        # RELEASE is durable the moment it points here, so what it points to has to be durable before.
        for name in (*release.files, releases.MANIFEST):
            sync(staging / name)
        sync_folders(staging)
        staging.rename(folder)
        sync(folder.parent)
        sync(state)
    release = releases.read(folder)
    try:
        release.verify()
    except ReleaseError:
        if pinned(state) != number:
            shutil.rmtree(folder)
        raise
    # The link moves before the release it left is deleted, so that readers always find one.
    point(state / RELEASE, folder.relative_to(state))
    for other in (state / PINNED).iterdir():
        if other != folder:
            shutil.rmtree(other)
    return release


def unpin(state: Path) -> Release:
    """Send readers to the newest release again, now and whenever there is a newer one. Raises ReleaseError."""
    newest = releases.read((state / NEWEST_RELEASE).resolve())
    point(state / RELEASE, NEWEST_RELEASE)
    shutil.rmtree(state / PINNED, ignore_errors=True)
    return newest


def publish(settings: Settings, state: Path, number: int, folder: Path) -> None:
    """Put the release in `folder`, of commit `number`, into the configured Triton repository.

    A release that is served there under the number of an earlier commit is not repeated. Raises ReleaseError, OSError.
    """
    repository, name = settings.triton.repository, settings.triton.name
    assert repository is not None
    model = repository / name
    release, held = releases.read(folder), pinned(state)
    model.mkdir(parents=True, exist_ok=True)
    there = triton.versions(repository, name)
    # Triton is told to serve the pinned version, so that one has to be there whatever came since.
    if held is not None and held not in (*there, number):
        publish(settings, state, held, state / RELEASE)
        there = triton.versions(repository, name)
    newest = releases.read(model / str(there[-1])) if there else None
    if newest is not None and number != held:
        if newest.id == release.id:
            number = there[-1]
        elif there[-1] >= number:
            raise ReleaseError(
                f"{model} has version {there[-1]} with another model, and commit {number} of "
                f"{state} is not newer; not published. Delete that folder, or set release.triton.name to another name"
            )
    limits = {"keep": settings.triton.versions, "max_batch": settings.max_batch}
    triton.publish(release, repository, name, number, **limits, pinned=held)


class Publisher:
    """Publishes the releases of commits on a thread of its own, since a repository on another disk takes copying.

    What fails is logged, and made up for by the next release or the next start: readers of the state folder have the
    release in any case, so it is no reason to stop learning.
    """

    def __init__(self, settings: Settings, state: Path) -> None:
        """Start the thread; `settings` is the section [release] with a Triton repository."""
        self._settings = settings
        self._state = state
        self._waiting: queue.SimpleQueue[Commit | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def __call__(self, commit: Commit) -> None:
        """Publish the release of `commit`, soon; returns at once."""
        self._waiting.put(commit)

    def close(self) -> None:
        """Wait some seconds for what is being published."""
        self._waiting.put(None)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while (commit := self._waiting.get()) is not None:
            assert commit.release is not None
            try:
                publish(self._settings, self._state, commit.number, commit.release)
            except (ReleaseError, OSError) as error:
                log.error("the release of commit %06d is not in the Triton repository: %s", commit.number, error)
