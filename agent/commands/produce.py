"""`gapstream produce`: plays an archive into a Kafka topic."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agent.commands.arguments import add_config, config_from
from agent.config import Config, ConfigError
from agent.parts import connection, record_limits
from streams.archive import ArchiveSource
from streams.kafka.produce import Played, create_topic, play
from streams.record import Control, Item


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("path", metavar="ARCHIVE", help="folder or zip of class-named folders, or `bundled`")
    parser.add_argument("--topic", help="(the configured one, where there is only one)")
    parser.add_argument("--bootstrap", metavar="HOST:PORT", help="(source.kafka.bootstrap_servers)")
    parser.add_argument("--create", type=int, metavar="PARTITIONS", help="create the topic if it does not exist")
    parser.add_argument("--order", choices=("classes", "shuffled", "blurry"), default="classes", help="(%(default)s)")
    parser.add_argument("--classes-per-task", type=int, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--class-order", type=Path, metavar="FILE", help="a class name a line (drawn with the seed)")
    parser.add_argument("--tasks", type=int, default=0, metavar="N", help="only the first so many tasks")
    parser.add_argument("--per-class", type=int, default=0, metavar="N", help="only so many images of a class")
    parser.add_argument("--split", default="", help="split folder of the archive (train, where there is one)")
    parser.add_argument(
        "--rate", type=float, default=0, metavar="N", help="records a second (as fast as they are taken)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--no-boundaries", action="store_true", help="send no marks between tasks")
    parser.add_argument(
        "--compression", choices=("gzip", "snappy", "lz4", "zstd"), help="(none: images hardly compress)"
    )


def run(arguments: argparse.Namespace) -> int:
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
    if arguments.create and create_topic(where, topic, arguments.create):
        print(f"created topic {topic} with {arguments.create} partition(s)")
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        total = 0 if arguments.tasks else sum(archive.lag().values())
        if arguments.no_boundaries:
            total -= archive.listing().count(None)
        bar = progress.add_task(f"playing into {topic}", total=None)

        def on_progress(played: Played) -> None:
            left = None if arguments.tasks else total - played.skipped.total()
            progress.update(bar, completed=played.records + played.boundaries, total=left)

        items = _items(archive, arguments.tasks, not arguments.no_boundaries)
        try:
            played = play(
                items,
                where,
                topic,
                rate=arguments.rate,
                on_progress=on_progress,
                stop=stop,
                compression=arguments.compression,
            )
        finally:
            archive.close()
            signal.signal(signal.SIGINT, before)
    print(
        f"{played.records} records ({played.bytes / 1e6:.1f} MB) and {played.boundaries} marks acknowledged by {topic}"
    )
    if played.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in played.skipped.most_common())
        print(f"{played.skipped.total()} images skipped: {reasons}")
    return 0


def _items(archive: ArchiveSource, tasks: int, boundaries: bool) -> Iterator[Item]:
    """The archive's items, up to the mark after so many tasks (0: all)."""
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
