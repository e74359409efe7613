"""`gapstream releases`: lists the releases that readers can be sent to."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from agent.commands.arguments import add_config, config_from
from agent.releases import kept_releases, pinned
from exporter.release import ReleaseError

add_arguments = add_config


def run(arguments: argparse.Namespace) -> None:
    """Print a table of the releases, oldest first. Raises ConfigError, and ReleaseError when there is none."""
    state = config_from(arguments).state.path
    found, held = kept_releases(state), pinned(state)
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
