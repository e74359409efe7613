"""`gapstream merge`: makes a state folder whose learner saw what the learners of several state folders saw.

What they counted is added up, and what they trained averaged, see agent/methods/merging.py. The folders are only read,
also while agents run on them.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agent.commands.arguments import add_config, config_from
from agent.commits import CommitStore, Provenance, StateError
from agent.config import Config, Training, resolved
from agent.layout import COMMITS, LEARNER_TENSORS, LOCK, commit_number, current_commit
from agent.values import Commit
from exporter.release import digest

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the state folders to the shared arguments."""
    add_config(parser)
    parser.add_argument(
        "states",
        nargs="+",
        type=Path,
        metavar="STATE",
        help="merge the learner of this state folder; two or more, in any order",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="STATE", help="make this new state folder")


def run(arguments: argparse.Namespace) -> None:
    """Merge, and say what came from where. Raises what `merge_states` raises."""
    made = merge_states(arguments.states, arguments.out, config_from(arguments))
    report = made.report
    assert report is not None and report.merged is not None and report.learner is not None
    table = Table("state", "commit", "classes", "images", "adapters")
    for origin in report.merged.of:
        counts = [count for count in origin.images.values() if count is not None]
        kept = "averaged" if report.merged.averaged else "kept"
        fate = "" if not origin.adapted else kept if report.merged.adapted else "left out, they differ"
        images = str(sum(counts)) if counts else "not counted"
        table.add_row(origin.state, str(origin.commit), str(len(origin.images)), images, fate)
    Console().print(table)
    accuracy = "" if report.last is None else f", {report.last:.1%} of {report.test_images} images held back are right"
    print(f"{arguments.out} knows {len(made.classes)} classes{accuracy}")
    if report.merged.averaged:
        print(f"{report.learner.method} trains, so this is an average, not what one learner of all streams would be")
    if report.release is not None and report.release.refused:
        print(f"nothing is released: {report.release.refused}")
    print(f"`gapstream run --set state.path={arguments.out}` begins its stream with what they know")


def merge_states(states: list[Path], out: Path, config: Config) -> Commit:
    """Make the state folder `out` from the current commits of `states`; `config` is that of its learner.

    Raises StateError for folders that cannot be used, MergeError where the learners cannot become one, and what the
    trainer raises.
    """
    if len(states) < 2:
        raise StateError(f"{states[0]} alone is merged already; name two state folders or more")
    commits = {str(state): _newest(state) for state in states}
    _check_apart(commits, states)
    _check_new(out)
    changed = {"state": config.state.model_copy(update={"path": out.absolute()}), "training": Training()}
    config = config.model_copy(update=changed)  # nothing is trained, so nothing is shared with other ranks
    from agent.trainer import Trainer  # here, as --help waits for no torch

    trainer, store = Trainer(config, None), CommitStore(out, config.state.keep_commits)

    def stage() -> Path:
        store.lock()
        store.sweep()
        return store.stage()

    try:
        outcome = trainer.merge(commits, stage)
        return store.commit(outcome, Provenance("", _seen(commits, outcome.classes), {}, resolved(config)))
    except Exception as error:
        gone = [str(commit.path) for commit in commits.values() if not commit.path.exists()]
        if gone:
            raise StateError(
                f"{gone[0]} was deleted by the agent that runs there before it was read; try again"
            ) from error
        raise
    finally:
        store.close()


def _newest(state: Path) -> Commit:
    """Read and verify the current commit of a folder; an agent may run there. Raises StateError."""
    if not state.is_dir():
        raise StateError(f"{state} is no folder; expected the state folder of an agent (its state.path)")
    folder = current_commit(state)
    try:
        commit = CommitStore(state, 1).verified()
    except StateError:
        if current_commit(state) != folder:
            raise StateError(f"the agent on {state} made a commit while the one before was read; try again") from None
        raise
    if commit is None or not commit.classes:
        raise StateError(f"nothing is learned in {state} yet, so there is nothing to merge; leave it out")
    return commit


def _seen(commits: Mapping[str, Commit], classes: tuple[str, ...]) -> tuple[str, ...]:
    """Give the names that the learners' tasks had: those learned first, as the merged learner spells them."""
    learned = {name.casefold() for name in classes}
    others = {name for commit in commits.values() for name in commit.seen if name.casefold() not in learned}
    return *classes, *sorted(others)


def _check_apart(commits: Mapping[str, Commit], states: list[Path]) -> None:
    """Raise StateError where two learners have a past in common: its images would count twice."""
    marks = {name: _marks(commit) for name, commit in commits.items()}
    if len(commits) < len(states):
        raise StateError("a state folder is named twice, so its images would count twice; name it once")
    for (one, of_one), (other, of_other) in itertools.combinations(marks.items(), 2):
        if of_one & of_other:
            raise StateError(
                f"{one} and {other} have learned in part the same: one is a copy of the other or was merged of it, or "
                "both went on from one learner. What they share would count twice; leave one out, or merge learners "
                "that began apart"
            )
        if commits[one].fingerprint and commits[one].fingerprint == commits[other].fingerprint:
            log.warning("%s and %s learned from the same stream: an image that both learned counts twice", one, other)


def _marks(commit: Commit) -> set[str]:
    """Give what no two learners have in common that began apart: the roots of its report; its tensors, where the report
    does not know when it began."""
    assert commit.report is not None, "what is learned is scored in the same commit"
    # Not the tensors of all: those of learners that have trained nothing, as with a single class each, are the same.
    began = commit.report.began
    return commit.report.roots if began else {digest(commit.path / LEARNER_TENSORS)[1], *commit.report.roots}


def _check_new(out: Path) -> None:
    """Raise StateError unless `out` is not there, is empty, or has what a merge left that did not come to its end."""
    if not out.exists():
        return
    found = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    if found - {LOCK, COMMITS} or any(commit_number(path.name) for path in (out / COMMITS).glob("*")):
        raise StateError(f"{out} exists and is not empty; --out names the state folder that is to be made")
