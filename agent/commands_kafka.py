"""What the command line has for Kafka: the source of `run`, `produce` and `dlq`. The client is imported when needed."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from agent.config import Config, ConfigError, KafkaImages, KafkaSecurity
from streams.record import Control, Item, Reason

if TYPE_CHECKING:
    from streams.archive import ArchiveSource
    from streams.claims import Fetcher
    from streams.connection import Connection, Secret
    from streams.kafka import KafkaDeadLetters, KafkaSource
    from streams.letters import Letter


def open_kafka(config: Config) -> tuple[KafkaSource, KafkaDeadLetters]:
    """The configured topics, and where their rejected records go. Raises StreamError."""
    source = open_topics(config)
    try:
        return source, open_dead_letters(config, create=config.source.kafka.dead_letter_create)
    except BaseException:
        source.close()
        raise


def open_topics(config: Config) -> KafkaSource:
    """Raises StreamError."""
    from streams.formats import Codec
    from streams.kafka import Breaker, KafkaSource

    section = config.source.kafka
    limits = config.source.model_dump(include={"max_image_bytes", "max_image_pixels", "max_label_chars"})
    return KafkaSource(
        connection(config),
        section.topics,
        Codec(**limits),
        fetcher=fetcher(section.images, config.source.max_image_bytes),
        breaker=Breaker(section.breaker_share, pause_s=section.breaker_pause_s),
        **section.model_dump(
            include={"group", "start", "on_lost", "merge_wait_s", "discover_s", "fetch_bytes", "stall_s"}
        ),
    )


def open_dead_letters(config: Config, create: bool) -> KafkaDeadLetters:
    """`create`: a topic that does not exist. Raises DeadLetterError."""
    from streams.kafka import KafkaDeadLetters

    section = config.source.kafka
    return KafkaDeadLetters(connection(config), section.topics, section.dead_letter_topic, create)


def connection(config: Config) -> Connection:
    """How the configured cluster is reached; secrets are read from their files when a client connects."""
    from streams.connection import Connection

    security = config.source.kafka.security
    secrets: dict[str, Any] = {name: _secret(security, name) for name in ("key_password", "password", "client_secret")}
    plain = security.model_dump(exclude={name for key in secrets for name in (key, f"{key}_file")})
    return Connection(config.source.kafka.bootstrap_servers, **plain, **secrets)


def _secret(section: KafkaSecurity | KafkaImages, name: str) -> Secret:
    value: SecretStr | None = getattr(section, name)
    return getattr(section, f"{name}_file") if value is None else value.get_secret_value()


def fetcher(images: KafkaImages, max_bytes: int) -> Fetcher | None:
    """What fetches images that messages only point at; None where that is not allowed. Raises StreamError."""
    if not images.allowed:
        return None
    from streams.claims import S3, Fetcher
    from streams.connection import revealed

    secret = revealed(_secret(images, "s3_secret_key")) or ""
    s3 = S3(images.s3_endpoint, images.s3_region, images.s3_access_key, secret)
    return Fetcher(images.allowed, max_bytes, images.timeout_s, s3, images.cafile)


def add_produce(parser: argparse.ArgumentParser) -> None:
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


def produce_command(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from agent.cli import config_from
    from streams.archive import ArchiveSource
    from streams.produce import Played, create_topic, play

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
        **config.source.model_dump(include={"max_image_bytes", "max_image_pixels", "max_label_chars"}),
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

        def report(played: Played) -> None:
            left = None if arguments.tasks else total - played.skipped.total()
            progress.update(bar, completed=played.records + played.boundaries, total=left)

        items = _items(archive, arguments.tasks, not arguments.no_boundaries)
        try:
            played = play(
                items, where, topic, rate=arguments.rate, report=report, stop=stop, compression=arguments.compression
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


def add_dlq(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "replay"), nargs="?", default="list", help="(%(default)s)")
    parser.add_argument(
        "--reason", action="append", default=[], choices=[*Reason], metavar="REASON", help="only these; repeatable"
    )
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="list: the newest so many (%(default)s)")
    parser.add_argument("--again", action="store_true", help="replay: also what was replayed before")


def dlq_command(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from agent.cli import config_from
    from streams.letters import letters, replay

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
    newest: deque[Letter] = deque(maxlen=arguments.limit)
    for letter in letters(where, topics):
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
