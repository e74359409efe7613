"""The name of every file and folder inside a state folder; whoever reads or writes one takes its name from here.

    <state>/
      lock                      held by the one agent that may write here
      CURRENT                   symlink to commits/000042, replaced by one rename: the truth
      RELEASE                   symlink to CURRENT/release, or to pinned/000040: what readers follow
      commits/000042/           manifest.json (written last), learner.*, report.json, release/, holdout/
      commits/000043.staging/   being written; swept at the next start, like commits newer than CURRENT
      commits/000041.damaged/   a commit that failed its check, set aside for whoever wants to look
      commits/000039.pruned/    being deleted
      pinned/000040/            the release of a commit, linked, so that it outlives the commit
      dead_letters/             rejected records of an archive
      fleet/                    what the other sites of a fleet have published (streams/blobs.py)
      spool/, scratch/          caches: emptied at every start, or without a name while in use

Names that readers of releases need too are defined in exporter.release, which may not import this package.
"""

from __future__ import annotations

import re
from pathlib import Path

from exporter.release import CURRENT, RELEASE_FOLDER
from exporter.release import RELEASE as RELEASE

# The tree above says what each one is for. A state folder of any version has these names: a changed one would make
# every folder that exists unreadable.
LOCK = "lock"
COMMITS = "commits"
PINNED = "pinned"
SPOOL = "spool"
SCRATCH = "scratch"
DEAD_LETTERS = "dead_letters"
FLEET = "fleet"
POINTER = CURRENT

# Endings of a commit's folder that is no commit, or none any more: see the tree.
STAGING = ".staging"
PRUNED = ".pruned"
DAMAGED = ".damaged"

# What is in a commit's folder. The manifest lists the others with their hashes, so a rename breaks old commits.
MANIFEST = "manifest.json"
LEARNER_TENSORS = "learner.safetensors"
LEARNER_VALUES = "learner.json"
REPORT = "report.json"
RELEASE_IN_COMMIT = RELEASE_FOLDER
SHARED = "shared.safetensors"
"""What the other sites of a fleet get of the learner (agent/fleet_states.py)."""
MEMBER = "member.safetensors"
"""What the learner of a site of a fleet has beside that of an agent alone (agent.methods.publishing.SiteLearner)."""
HOLDOUT = "holdout"
TRAINED = "trained.zip"
"""The file of a hold-out that says what was trained on; beside it are packs of test images."""

NEWEST_RELEASE = Path(POINTER) / RELEASE_IN_COMMIT
"""Where readers are sent unless an older release is pinned; relative to the state folder, as a symlink needs it."""

_NUMBER = re.compile(r"\d{6,}")
"""Six digits make names sort as numbers do; longer ones, after a million commits, are read as numbers all the same."""


def commit_name(number: int) -> str:
    """Give the folder name of a commit, and of the release that is pinned of it."""
    return f"{number:06d}"


def commit_number(name: str) -> int | None:
    """Give the number that a folder is named after; None for every other name, like those of unfinished commits."""
    return int(name) if _NUMBER.fullmatch(name) else None


def current_commit(state: Path) -> Path | None:
    """Give the folder of the current commit of a state folder, or None when there is none yet."""
    pointer = state / POINTER
    return pointer.resolve() if pointer.exists() else None


def is_of_release(name: str) -> bool:
    """Tell whether a file of a commit, named relative to its folder, is part of the release."""
    return name.startswith(f"{RELEASE_IN_COMMIT}/")


def is_dispensable(name: str) -> bool:
    """Tell whether learning does without a file of a commit: it only scores, as hold-out packs do, or is served or
    published."""
    return is_of_release(name) or name == SHARED or (name.startswith(f"{HOLDOUT}/") and name != f"{HOLDOUT}/{TRAINED}")


def has_learned(commit: Path) -> bool:
    """Tell whether a commit's folder holds a learner; before the first task is learned, commits hold offsets alone."""
    return (commit / LEARNER_VALUES).exists()
