"""Which release readers follow: `gapstream releases`, `gapstream rollback`, and the Triton repository beside it.

<state>/RELEASE          symlink: CURRENT/release, or pinned/<number>
<state>/pinned/<number>/ the release of commit <number>, linked, so that it outlives the commit
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from agent.commits import NEWEST_RELEASE, point
from agent.config import Release as Settings
from agent.values import Commit
from exporter import release as releases
from exporter import triton
from exporter.release import RELEASE, Release, ReleaseError

log = logging.getLogger(__name__)

_PINNED = "pinned"
_CLOSE_S = 5


@dataclass(frozen=True)
class Known:
    """A release that readers can be sent to."""

    number: int
    """Of its commit."""
    release: Release


def known(state: Path) -> list[Known]:
    """The releases of all kept commits and the pinned one, oldest first. Unreadable ones are left out with a warning.

    Commits that only carry on the release before them are left out too.
    """
    folders = {int(path.parent.name): path for path in state.glob("commits/[0-9]*/release") if _is_number(path.parent)}
    folders = {int(path.name): path for path in state.glob(f"{_PINNED}/*") if _is_number(path)} | folders
    found: list[Known] = []
    for number, folder in sorted(folders.items()):
        try:
            release = releases.read(folder)
        except ReleaseError as error:
            log.warning("%s", error)
            continue
        if not found or release.id != found[-1].release.id:
            found.append(Known(number, release))
    return found


def pinned(state: Path) -> int | None:
    """Number of the commit whose release readers are held at; None while they follow the newest."""
    try:
        target = (state / RELEASE).readlink()
    except OSError:
        return None
    return int(target.name) if target.parent.name == _PINNED and _is_number(target) else None


def pin(state: Path, number: int) -> Release:
    """Send readers to the release of commit `number` until `unpin`; the learner goes on.

    Raises ReleaseError when there is no such release or it is damaged; readers stay where they were.
    """
    folder = state / _PINNED / f"{number:06d}"
    source = state / "commits" / folder.name / "release"
    if not folder.exists():
        release = releases.read(source)
        staging = folder.with_suffix(".staging")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for name in (*release.files, releases.MANIFEST):
            try:
                os.link(source / name, staging / name)
            except FileNotFoundError as error:
                raise ReleaseError(f"commit {number} was deleted just now; choose a newer one") from error
            except OSError:  # no hard links here
                shutil.copyfile(source / name, staging / name)
        staging.rename(folder)
    release = releases.read(folder)
    try:
        release.verify()
    except ReleaseError:
        if pinned(state) != number:
            shutil.rmtree(folder)
        raise
    point(state / RELEASE, folder.relative_to(state))
    for other in (state / _PINNED).iterdir():
        if other != folder:
            shutil.rmtree(other)
    return release


def unpin(state: Path) -> Release:
    """Send readers to the newest release again, now and whenever there is a newer one. Raises ReleaseError."""
    newest = releases.read((state / NEWEST_RELEASE).resolve())
    point(state / RELEASE, NEWEST_RELEASE)
    shutil.rmtree(state / _PINNED, ignore_errors=True)
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
    """Publishes the releases of commits on a thread of its own, since a repository on another disk takes copying. What
    fails is logged, and made up for by the next one or the next start."""

    def __init__(self, settings: Settings, state: Path) -> None:
        self._settings = settings
        self._state = state
        self._waiting: queue.SimpleQueue[Commit | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def __call__(self, commit: Commit) -> None:
        """Takes a commit with a release; returns at once."""
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


def releases_command(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from agent.cli import config_from

    state = config_from(arguments).state.path
    found, held = known(state), pinned(state)
    if not found:
        raise ReleaseError(f"nothing is released in {state} yet")
    table = Table("commit", "release", "made (UTC)", "classes", "accuracy", "forms", "parity", "")
    followed = held if held is not None else found[-1].number
    for entry in found:
        release, accuracy = entry.release, entry.release.facts.get("accuracy")
        forms = [release.precision, *(name for name in release.variants if release.offers(name))]
        table.add_row(
            str(entry.number),
            release.id,
            release.created.removesuffix("+00:00").replace("T", " "),
            str(len(release.classes)),
            "" if accuracy is None else f"{accuracy:.1%}",
            ", ".join(forms),
            f"{release.parity.probabilities:.1g}",
            ("readers are held here" if held else "readers are here") if entry.number == followed else "",
        )
    Console().print(table)


def rollback_command(arguments: argparse.Namespace) -> None:
    from agent.cli import config_from

    config = config_from(arguments)
    state = config.state.path
    if arguments.newest:
        release = unpin(state)
        number = int(release.path.parent.name)
        print(f"readers follow the newest release again: {release.id} of commit {number}")
    else:
        number = arguments.number
        release = pin(state, number)
        print(f"readers are held at release {release.id} of commit {number}; the learner goes on")
        print("`gapstream rollback --newest` lets them follow it again")
    if config.release.layout == "triton":
        publish(config.release, state, number, release.path)


def _is_number(path: Path) -> bool:
    return path.name.isdecimal()
