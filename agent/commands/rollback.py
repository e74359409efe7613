"""`gapstream rollback`: sends readers to an older release, or to the newest again; the learner goes on."""

from __future__ import annotations

import argparse

from agent.commands.arguments import add_config, config_from
from agent.layout import commit_number
from agent.releases import pin, publish, unpin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the number of a commit, or --newest in its place, to the shared arguments."""
    add_config(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "number",
        type=int,
        nargs="?",
        metavar="N",
        help="hold readers at the release of commit N, one of those `gapstream releases` lists",
    )
    which.add_argument("--newest", action="store_true", help="let readers follow the newest release again")


def run(arguments: argparse.Namespace) -> None:
    """Move readers, those of a Triton repository too, and say where they are. Raises ConfigError, ReleaseError."""
    config = config_from(arguments)
    state = config.state.path
    if arguments.newest:
        release = unpin(state)
        number = commit_number(release.path.parent.name)
        assert number is not None, "a release lies in the folder of its commit"
        print(f"readers follow the newest release again: {release.id} of commit {number}")
    else:
        number = arguments.number
        release = pin(state, number)
        print(f"readers are held at release {release.id} of commit {number}; the learner goes on")
        print("`gapstream rollback --newest` lets them follow it again")
    if config.release.layout == "triton":
        publish(config.release, state, number, release.path)
