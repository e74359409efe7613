"""`gapstream produce`: plays an archive into a Kafka topic."""

from __future__ import annotations

import argparse
import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agent.commands.arguments import add_config, config_from
from agent.commands.waiting import when_there
from agent.config import Config, ConfigError
from agent.parts import connection, record_limits
from streams.archive import ArchiveSource
from streams.kafka.produce import Played, create_topic, play
from streams.record import Control, Item


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the archive, the topic, and how the one is played into the other, to the shared arguments."""
    add_config(parser)
    add = parser.add_argument
    add("path", metavar="ARCHIVE", help="play this folder or zip of class-named folders, or `bundled`")
    add("--topic", help="send to this topic (default: that of source.kafka.topics, where it names one)")
    add("--bootstrap", metavar="HOST:PORT", help="ask these brokers (default: source.kafka.bootstrap_servers)")
    add(
        "--create",
        type=int,
        metavar="PARTITIONS",
        help="create the topic with this number of partitions where it does not exist (default: never)",
    )
    add(
        "--order",
        choices=("classes", "shuffled", "blurry"),
        default="classes",
        help="bring classes in groups, all mixed, or in groups with a tenth mixed (default: %(default)s)",
    )
    add(
        "--classes-per-task",
        type=int,
        default=2,
        metavar="N",
        help="bring N classes in a group, with a boundary mark after it (default: %(default)s)",
    )
    add("--class-order", type=Path, metavar="FILE", help="take classes as named here, one a line (default: drawn)")
    add("--tasks", type=int, default=0, metavar="N", help="play only the first N groups (default: all)")
    add("--per-class", type=int, default=0, metavar="N", help="play only N images of each class (default: all)")
    add("--split", default="", help="play this split folder of the archive (default: train, where there is one)")
    add(
        "--rate",
        type=float,
        default=0,
        metavar="N",
        help="send at most N records a second (default: as fast as they are taken)",
    )
    add("--seed", type=int, default=0, metavar="N", help="draw orders with this number (default: %(default)s)")
    add("--no-boundaries", action="store_true", help="send no marks between groups")
    add(
        "--compression",
        choices=("gzip", "snappy", "lz4", "zstd"),
        help="compress messages so (default: not at all, as images hardly get smaller)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Play until the archive ends or Ctrl-C comes, and say what arrived; records that arrived stay there. The exit code
    is 1 when none did.

    Raises ConfigError, StreamError.
    """
    config = config_from(arguments)
    if arguments.bootstrap:
        servers = tuple(arguments.bootstrap.split(","))
        kafka = config.source.kafka.model_copy(update={"bootstrap_servers": servers})
        config = config.model_copy(update={"source": config.source.model_copy(update={"kafka": kafka})})
    topic = arguments.topic or _only_topic(config)
    archive = ArchiveSource(
        path=arguments.path if arguments.path == "bundled" else Path(arguments.path),
        split=arguments.split,
        order=arguments.order,
        classes_per_task=arguments.classes_per_task,
        class_order_file=arguments.class_order,
        per_class=arguments.per_class,
        seed=arguments.seed,
        **record_limits(config),
    )
    where = connection(config)
    stop = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with contextlib.ExitStack() as parts:
        parts.callback(archive.close)
        # Ctrl-C ends the playing; what is on its way is acknowledged first, so that the counts below are true.
        parts.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, lambda *_: stop.set()))
        if arguments.create and when_there(lambda: create_topic(where, topic, arguments.create), stop):
            print(f"created topic {topic} with {arguments.create} partition(s)")
        progress = parts.enter_context(Progress(*columns, console=Console(stderr=True)))
        total = 0 if arguments.tasks else sum(archive.lag().values())
        if arguments.no_boundaries:
            total -= archive.listing().count(None)
        bar = progress.add_task(f"playing into {topic}", total=None)

        def on_progress(played: Played) -> None:
            # How many records the first groups have is known only once they were played.
            left = None if arguments.tasks else total - played.skipped.total()
            progress.update(bar, completed=played.records + played.boundaries, total=left)

        items = _items(archive, arguments.tasks, not arguments.no_boundaries)
        how = {"rate": arguments.rate, "compression": arguments.compression}
        played = when_there(lambda: play(items, where, topic, on_progress=on_progress, stop=stop, **how), stop)
    played = played or Played()
    print(
        f"{played.records} records ({played.bytes / 1e6:.1f} MB) and {played.boundaries} marks acknowledged by {topic}"
    )
    if played.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in played.skipped.most_common())
        print(f"{played.skipped.total()} images skipped: {reasons}")
    return 0 if played.records else 1


def _items(archive: ArchiveSource, tasks: int, boundaries: bool) -> Iterator[Item]:
    """Give the archive's items up to the mark that ends task number `tasks`, or all (0); `boundaries` keeps marks."""
    marks = 0
    while not archive.exhausted:
        for item in archive.poll(0):
            if isinstance(item, Control):
                marks += 1
            if boundaries or not isinstance(item, Control):
                yield item
            if tasks and marks == tasks:
                return


def _only_topic(config: Config) -> str:
    topics = config.source.kafka.topics
    if len(topics) != 1:
        raise ConfigError(f"--topic is missing, and source.kafka.topics names {len(topics)} topics")
    return topics[0]
