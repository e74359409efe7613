"""`gapstream dlq`: lists the records that were set aside in dead-letter topics, or sends them again."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections import Counter, deque
from datetime import UTC, datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agent.commands.arguments import add_config, config_from
from agent.config import ConfigError
from agent.parts import connection
from streams.kafka.replay import DeadLetter, dead_letters, replay
from streams.record import Reason


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is done with which dead letters to the shared arguments; the reasons there are follow the example."""
    add_config(parser)
    parser.add_argument(
        "action",
        choices=("list", "replay"),
        nargs="?",
        default="list",
        help="list what was set aside, or send it to its topics again (default: %(default)s)",
    )
    parser.add_argument(
        "--reason",
        action="append",
        default=[],
        choices=[*Reason],
        metavar="REASON",
        help="take only what was rejected for this reason; may be repeated (default: all)",
    )
    parser.add_argument(
        "--limit", type=int, default=20, metavar="N", help="list only the N newest records (default: %(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="replay what was replayed before, too")
    reasons = textwrap.fill(", ".join(Reason), 78, initial_indent="  ", subsequent_indent="  ")
    parser.epilog = f"{parser.epilog or ''}\n\nreasons:\n{reasons}"


def run(arguments: argparse.Namespace) -> int:
    """Print how often each reason was given and the newest records, or replay; what was too large to be kept whole
    cannot be replayed. Raises ConfigError, StreamError."""
    config = config_from(arguments)
    section = config.source.kafka
    if not section.topics:
        raise ConfigError("source.kafka.topics is empty; expected the topics whose dead letters to look at")
    topics = sorted({section.dead_letter_topic.format(topic=topic) for topic in section.topics})
    where = connection(config)
    if arguments.action == "replay":
        counts = replay(where, topics, arguments.reason, section.group or "gapstream", arguments.again)
        print(f"{counts['sent']} records sent again to their topics")
        if counts["incomplete"]:
            print(f"{counts['incomplete']} could not be: parts of them were too large to be kept", file=sys.stderr)
        return 0
    counts = Counter()
    newest: deque[DeadLetter] = deque(maxlen=arguments.limit)
    for letter in dead_letters(where, topics):
        counts[letter.origin.reason] += 1
        if not arguments.reason or letter.origin.reason in arguments.reason:
            newest.append(letter)
    if not counts:
        print(f"no dead letters in {', '.join(topics)}")
        return 0
    summary = Table("reason", "dead letters")
    for reason, count in counts.most_common():
        summary.add_row(reason, str(count))
    table = Table("set aside", "from", "reason", "detail")
    for letter in newest:
        topic, number = letter.origin.partition
        moment = datetime.fromtimestamp(letter.timestamp_s, UTC).isoformat(timespec="seconds")
        table.add_row(
            moment, f"{topic}/{number}:{letter.origin.offset}", letter.origin.reason, escape(letter.origin.detail)
        )
    Console().print(summary, table)
    return 0
