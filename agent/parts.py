"""Configuration sections become parts here: sources, dead letters, connections, image stores, limits.

This is the one place that asks which kind of source is configured. A new source is a file in streams/, its section
below [source], its parts here and a line in SOURCES. Each client library is imported when a part needs it: the Kafka
client's import takes some half a second and 25 MB, which an agent that reads an archive does without.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import SecretStr

from agent.config import Config, ConfigError, KafkaImages, KafkaSecurity
from agent.layout import DEAD_LETTERS

if TYPE_CHECKING:
    from agent.fleet import Metrics
    from agent.values import Commit
    from streams.archive import ArchiveSource
    from streams.claims import ImageStore
    from streams.formats import Codec
    from streams.kafka.connection import Connection, Secret
    from streams.kafka.dead_letters import KafkaDeadLetters
    from streams.kafka.exchange import Exchange
    from streams.kafka.source import KafkaSource
    from streams.source import DeadLetters, Source


class SourceParts(Protocol):
    """What a kind of source is made of."""

    def source(self, config: Config) -> Source:
        """Open the source; it reads no record before it is told where to begin. Raises StreamError."""

    def dead_letters(self, config: Config, create: bool) -> DeadLetters:
        """Open the place for rejected records; without `create` nothing is made there. Raises DeadLetterError."""

    def place(self, config: Config) -> str:
        """Say where the records come from, for people."""

    def dead_letter_place(self, config: Config) -> str:
        """Say where outside the state folder rejected records go, for people; empty where they stay inside it."""

    def may_create_dead_letters(self, config: Config) -> bool:
        """Tell whether the agent makes that place where it does not exist."""

    def learn_at_end(self, config: Config) -> bool:
        """Tell whether the unfinished task is learned at the end of the stream; one without an end is never asked."""


class ArchiveParts:
    """They are the parts of an archive: a folder or zip on disk; rejected records are kept in the state folder."""

    def source(self, config: Config) -> ArchiveSource:
        from streams.archive import ArchiveSource

        # `on_end` is for the pipeline, which alone knows what a task is.
        return ArchiveSource(**config.source.archive.model_dump(exclude={"on_end"}), **record_limits(config))

    def dead_letters(self, config: Config, create: bool) -> DeadLetters:
        from streams.dead_letters import FileDeadLetters

        return FileDeadLetters(config.state.path / DEAD_LETTERS, config.state.dead_letter_bytes)

    def place(self, config: Config) -> str:
        return str(config.source.archive.path)

    def dead_letter_place(self, config: Config) -> str:
        return ""

    def may_create_dead_letters(self, config: Config) -> bool:
        return True

    def learn_at_end(self, config: Config) -> bool:
        return config.source.archive.on_end == "learn"


class KafkaParts:
    """These are the parts of topics: a reader of their partitions, and a producer for the dead-letter topics."""

    def source(self, config: Config) -> KafkaSource:
        from streams.kafka.breaker import Breaker
        from streams.kafka.source import KafkaSource

        section = config.source.kafka
        return KafkaSource(
            connection(config),
            section.topics,
            codec(config),
            images=image_store(config),
            breaker=Breaker(section.breaker_share, pause_s=section.breaker_pause_s),
            **section.model_dump(
                include={"group", "start", "on_lost", "merge_wait_s", "discover_s", "fetch_bytes", "stall_s"}
            ),
        )

    def dead_letters(self, config: Config, create: bool) -> KafkaDeadLetters:
        from streams.kafka.dead_letters import KafkaDeadLetters

        section = config.source.kafka
        create = create and section.dead_letter_create
        return KafkaDeadLetters(connection(config), section.topics, section.dead_letter_topic, create)

    def place(self, config: Config) -> str:
        section = config.source.kafka
        return f"{', '.join(section.topics)} on {', '.join(section.bootstrap_servers)}"

    def dead_letter_place(self, config: Config) -> str:
        return config.source.kafka.dead_letter_topic

    def may_create_dead_letters(self, config: Config) -> bool:
        return config.source.kafka.dead_letter_create

    def learn_at_end(self, config: Config) -> bool:
        return True


SOURCES: dict[str, SourceParts] = {"archive": ArchiveParts(), "kafka": KafkaParts()}
"""The value of source.kind -> the parts of that kind."""


def source_parts(config: Config) -> SourceParts:
    """Look up the parts of the configured kind of source."""
    return SOURCES[config.source.kind]


def open_stream(config: Config) -> tuple[Source, DeadLetters]:
    """Open the configured source, and the place where its rejected records go. Raises StreamError."""
    parts = source_parts(config)
    source = parts.source(config)
    try:
        return source, parts.dead_letters(config, create=True)
    except BaseException:  # also Ctrl-C: the source is connected already
        source.close()
        raise


def require_archive(config: Config, why: str) -> None:
    """Raise ConfigError, saying `why`, unless the source is an archive."""
    if not isinstance(source_parts(config), ArchiveParts):
        raise ConfigError(f"source.kind is {config.source.kind}; {why}")


def record_limits(config: Config) -> dict[str, Any]:
    """Give the limits that every record is held to, as keyword arguments of what reads records."""
    return config.source.model_dump(include={"max_image_bytes", "max_image_pixels", "max_label_chars"})


def codec(config: Config, labelled: bool = True) -> Codec:
    """Make what decodes messages within the configured limits; `labelled` False for images without a class name."""
    from streams.formats import Codec

    return Codec(**record_limits(config), labelled=labelled)


def connection(config: Config) -> Connection:
    """Say how the configured cluster is reached; secrets are read from their files when a client connects."""
    from streams.kafka.connection import Connection

    security = config.source.kafka.security
    secrets: dict[str, Any] = {name: _secret(security, name) for name in ("key_password", "password", "client_secret")}
    plain = security.model_dump(exclude={name for key in secrets for name in (key, f"{key}_file")})
    return Connection(config.source.kafka.bootstrap_servers, **plain, **secrets)


def image_store(config: Config) -> ImageStore | None:
    """Make what fetches images that messages only point at; None where no place is allowed.

    Raises StreamError when the file of the store's secret cannot be read.
    """
    images = config.source.kafka.images
    if not images.allowed:
        return None
    from streams.claims import S3, ImageStore
    from streams.kafka.connection import read_secret

    secret = read_secret(_secret(images, "s3_secret_key")) or ""
    s3 = S3(images.s3_endpoint, images.s3_region, images.s3_access_key, secret)
    return ImageStore(images.allowed, config.source.max_image_bytes, images.timeout_s, s3, images.cafile)


def open_exchange(config: Config, create: bool) -> Exchange:
    """Open the topics that `gapstream serve --kafka` answers; `create` makes the output topic where it is missing.

    Raises TopicMissing, StreamError.
    """
    from streams.kafka.exchange import Exchange

    section = config.serve.kafka
    return Exchange(
        connection(config),
        section.topics,
        section.output,
        codec(config, labelled=False),
        create=create,
        **section.model_dump(include={"group", "start", "max_records", "fetch_bytes"}),
    )


def open_fleet(config: Config, metrics: Metrics, parts: ExitStack) -> Callable[[Commit | None], bool]:
    """Make this agent a site of the configured fleet, until `parts` is closed; gives what tells the pipeline that a
    release is due. Without a fleet none ever is. Raises OSError."""
    if not config.fleet.topic:
        return lambda commit: False
    from agent.fleet import FleetSite
    from streams.kafka.fleet import FleetTopic

    where, topic = connection(config), config.fleet.topic
    site = FleetSite(config, metrics, lambda positions: FleetTopic(where, topic, positions))
    parts.callback(site.close)
    site.start()
    return site.due


def _secret(section: KafkaSecurity | KafkaImages, name: str) -> Secret:
    """Give a secret as text, or the file that holds it where none is written; the text is only unwrapped here."""
    value: SecretStr | None = getattr(section, name)
    return getattr(section, f"{name}_file") if value is None else value.get_secret_value()
