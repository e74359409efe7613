"""`gapstream fleet`: lists the sites whose learning this one answers with; `fleet forget SITE` takes one out of it."""

from __future__ import annotations

import argparse
import contextlib
import time
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agent.commands.arguments import add_config, config_from
from agent.config import Config, ConfigError
from agent.fleet_states import SharedRefused, check
from agent.layout import FLEET, REPORT, current_commit
from agent.parts import connection
from agent.scoring.report import Report, Site
from streams.blobs import Blob, BlobRefused, ended, kept, place, sequence
from streams.source import StreamError

PATIENCE_S = 60
"""Seconds without a message after which `forget` gives up reading the topic: chosen by hand; somebody waits."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is done, and with which site, to the shared arguments."""
    add_config(parser)
    parser.add_argument(
        "action",
        choices=("list", "forget"),
        nargs="?",
        default="list",
        help="list the sites as the agent on state.path knows them, or forget one (default: %(default)s)",
    )
    parser.add_argument("site", nargs="?", default="", help="the site to forget; its agent has to be stopped first")


def run(arguments: argparse.Namespace) -> None:
    """List the sites, or forget one. Raises ConfigError, StreamError."""
    config = config_from(arguments)
    if not config.fleet.topic:
        raise ConfigError("fleet.topic is empty; expected the topic where the sites meet")
    if (arguments.action == "forget") != bool(arguments.site):
        raise ConfigError("`gapstream fleet forget SITE` forgets a site; `gapstream fleet` lists them")
    if arguments.action == "forget":
        _forget(config, arguments.site)
    else:
        _list(config)


def _list(config: Config) -> None:
    folder = config.state.path
    commit = current_commit(folder)
    report = Report.read(commit / REPORT) if commit is not None and (commit / REPORT).exists() else None
    told = {site.site: site for site in (report.fleet.sites if report and report.fleet else ())}
    found = kept(folder / FLEET)
    table = Table("site", "commit", "published", "age", "classes", "images", "MB", "in this site's release")
    for site in sorted(found.keys() | told.keys()):
        if site not in found:
            table.add_row(site, str(told[site].version), "", "", "", "", "", "to be left out: it is forgotten")
            continue
        blob, path = found[site]
        published = datetime.fromtimestamp(blob.sequence / 1000, UTC)
        row = [str(blob.version), published.isoformat(timespec="seconds"), age(time.time() - blob.sequence / 1000)]
        table.add_row(site, *row, *_size(path), f"{blob.bytes / 1e6:.1f}", escape(_fate(blob, told.get(site))))
    Console().print(table)
    own = f"{config.fleet.site} (this site)"
    learned = f"answers for {len(report.classes)} classes" if report else "has learned nothing yet"
    print(f"{own} {learned}; {len(found)} other sites on {config.fleet.topic}")


def _size(path: Path) -> tuple[str, str]:
    """Say how many classes and images a state is of."""
    try:
        shared = check(path)
    except SharedRefused:
        return "?", "?"
    return str(len(shared.classes)), str(sum(shared.images))


def _fate(blob: Blob, told: Site | None) -> str:
    """Say whether the release has a site's newest state."""
    if told is None:
        return "not yet; with the next release"
    if told.sha256 != blob.sha256:
        return f"behind: it has commit {told.version}; with the next release"
    return f"refused: {told.refused}" if told.refused else "yes"


def age(seconds: float) -> str:
    """Write a time since something for people."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _forget(config: Config, site: str) -> None:
    """End every chunk that the topic has of a site."""
    from streams.kafka.fleet import FleetTopic

    numbers: set[int] = set()
    newest = int(time.time() * 1000)
    with contextlib.closing(FleetTopic(connection(config), config.fleet.topic, {})) as topic:
        heard = time.monotonic()
        while not topic.caught_up:
            for message in topic.read(1):
                heard = time.monotonic()
                with contextlib.suppress(BlobRefused):
                    whose, number = place(message.key)
                    if whose == site:
                        newest = max(newest, sequence(message.headers))  # its clock may be ahead of ours
                        (numbers.discard if message.value is None else numbers.add)(number)
            if time.monotonic() - heard > PATIENCE_S:
                raise StreamError(f"{config.fleet.topic} could not be read for {PATIENCE_S} s; nothing is forgotten")
        if not numbers:
            print(f"{config.fleet.topic} has nothing of {site}")
            return
        # The first one last: it is what the others forget the site by, and until then this can be done again.
        topic.send(site, [ended(site, number, newest) for number in sorted(numbers | {0}, reverse=True)])
    print(f"{site} is forgotten; the other sites drop it with their next release, within fleet.pause_s at most")
