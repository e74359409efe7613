"""What can be set about Kafka: the source [source.kafka], and [serve.kafka], which answers topics."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    SecretStr,
    ValidationInfo,
    model_validator,
)

from agent.config.base import Section, SourceSection, Unset


def _a_start(start: str) -> str:
    """Accept a word for where reading begins, or a time."""
    if start not in ("earliest", "latest", "group"):
        try:
            datetime.fromisoformat(start)
        except ValueError:
            text = f"got {start!r}, expected earliest, latest, group or a time like 2026-11-21T10:00:00Z"
            raise ValueError(text) from None
    return start


# The same rule as that of streams.claims.check_prefix, which the configuration cannot import; a test compares the two.
def _places(prefixes: tuple[str, ...]) -> tuple[str, ...]:
    """Accept prefixes of URLs that end where a name ends: without the slash `https://host` would allow `host.evil`."""
    for prefix in prefixes:
        scheme, separator, rest = prefix.partition("://")
        if scheme not in ("https", "http", "s3", "file") or not separator or len(rest) < 2 or not rest.endswith("/"):
            raise ValueError(f"got {prefix!r}, expected https://host/, http://host/, s3://bucket/ or file:///folder/")
    return prefixes


def _dead_letter_topic(name: str, info: ValidationInfo) -> str:
    """Accept a topic's name that is none of the topics read: its letters would be read, rejected and sent for ever."""
    rest = name.replace("{topic}", "")
    if not re.fullmatch(r"[\w.-]+", rest, re.ASCII):
        text = "letters, digits, `.`, `_` and `-`, and {topic} for the topic the records came from"
        raise ValueError(f"got {name!r}, expected a topic's name of its own: {text}")
    # A key sees only the keys above it, so `topics` stands before `dead_letter_topic`; it is absent when it is wrong.
    topics = info.data.get("topics", ())
    if both := [topic for topic in topics if name.replace("{topic}", topic) in topics]:
        read = name.replace("{topic}", both[0])
        raise ValueError(f"got {name!r}, so the rejected of {both[0]} would go to {read}, which is read itself")
    return name


class KafkaSecurity(Section):
    """This section says how the cluster and we know each other. A secret comes from the environment (say
    GAPSTREAM_SOURCE__KAFKA__SECURITY__PASSWORD), from the file that the key ending in `_file` names, or from here; it
    is never printed. A file is read again whenever a client connects."""

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """The connection is encrypted (TLS) with SSL and SASL_SSL, and has a login with SASL_PLAINTEXT and SASL_SSL."""
    cafile: Annotated[Path | None, Unset] = None
    """The brokers' certificates are checked against those in this PEM file; empty takes the system's."""
    certfile: Annotated[Path | None, Unset] = None
    """This PEM file holds our own certificate, for brokers that ask for one; empty sends none."""
    keyfile: Annotated[Path | None, Unset] = None
    """This PEM file holds the private key of `certfile`."""
    key_password: Annotated[SecretStr | None, Unset] = None
    """This password decrypts the private key; empty means that the key is not encrypted."""
    key_password_file: Annotated[Path | None, Unset] = None
    """This file holds `key_password`; only one of the two may be set."""
    check_hostname: bool = True
    """A broker's certificate must name the host that was connected to; false accepts any host's."""
    mechanism: Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = ""
    """The login happens this way; it must be set with SASL_PLAINTEXT and SASL_SSL, and only with them."""
    username: str = ""
    """PLAIN and SCRAM log in under this name, and need one."""
    password: Annotated[SecretStr | None, Unset] = None
    """PLAIN and SCRAM log in with this password, or with that in `password_file`, and need one of the two."""
    password_file: Annotated[Path | None, Unset] = None
    """This file holds `password`; only one of the two may be set."""
    token_file: Annotated[Path | None, Unset] = None
    """OAUTHBEARER takes the token from this file, which is read at every login; either this or `token_url` is set."""
    token_url: str = ""
    """OAUTHBEARER asks this URL for a token with client credentials (OAuth 2.0); a token is used until a minute before
    it expires."""
    client_id: str = ""
    """`token_url` is asked under this client's name."""
    client_secret: Annotated[SecretStr | None, Unset] = None
    """`token_url` is asked with this secret of the client."""
    client_secret_file: Annotated[Path | None, Unset] = None
    """This file holds `client_secret`; only one of the two may be set."""
    scope: str = ""
    """The token is asked for this scope; empty leaves the choice to `token_url`."""

    @model_validator(mode="after")
    def _complete(self) -> KafkaSecurity:
        missing: list[str] = []
        for name in ("key_password", "password", "client_secret"):
            if getattr(self, name) is not None and getattr(self, f"{name}_file") is not None:
                missing.append(f"only one of {name} and {name}_file")
        if self.protocol.startswith("SASL") != bool(self.mechanism):
            missing.append("mechanism exactly with the protocols SASL_PLAINTEXT and SASL_SSL")
        if self.mechanism == "OAUTHBEARER":
            if bool(self.token_file) == bool(self.token_url):
                missing.append("with OAUTHBEARER one of token_file and token_url")
        elif self.mechanism and not (self.username and (self.password or self.password_file)):
            missing.append(f"with {self.mechanism} username and password (or password_file)")
        if missing:
            raise ValueError(f"expected {'; '.join(missing)}")
        return self


class KafkaImages(Section):
    """A record may carry the URL of its image instead of the image. This section says where such images may be."""

    allowed: Annotated[tuple[str, ...], AfterValidator(_places)] = ()
    """Images are fetched from below these prefixes and nowhere else: `https://images.example.com/`,
    `s3://bucket/path/`, `file:///data/`, each ending in a slash. Empty fetches none, and rejects such records."""
    timeout_s: float = Field(10, gt=0, le=30)
    """One attempt to fetch an image may take this number of seconds from end to end (more than 0, at most 30). After
    three failed attempts the record is rejected; where the store does not answer at all, it is waited for."""
    cafile: Annotated[Path | None, Unset] = None
    """Certificates of https servers are checked against those in this PEM file; empty takes the system's."""
    s3_endpoint: str = "https://s3.amazonaws.com"
    """URLs that begin with s3:// are fetched from this service; any that speaks S3 will do."""
    s3_region: str = "us-east-1"
    """Requests to `s3_endpoint` are signed for this region."""
    s3_access_key: str = ""
    """Requests to `s3_endpoint` are signed with this key; empty sends them unsigned, as for public buckets."""
    s3_secret_key: Annotated[SecretStr | None, Unset] = None
    """This is the secret of `s3_access_key`."""
    s3_secret_key_file: Annotated[Path | None, Unset] = None
    """This file holds `s3_secret_key`, which wins where both are set."""


class Kafka(SourceSection):
    """This source reads all partitions of topics of a Kafka cluster. A single agent reads them for a state folder, and
    its position is in its commits."""

    bootstrap_servers: tuple[str, ...] = ("localhost:9092",)
    """The cluster is found by asking these brokers, each written `host:port`; one that answers names the others."""
    topics: tuple[str, ...] = ()
    """All partitions of these topics are read; with `source.kind = "kafka"` at least one topic is needed."""
    group: str = "gapstream"
    """The offsets of every commit are copied to this consumer group, where lag tools look for them; empty copies none.
    They are read back by `start = "group"` alone."""
    start: Annotated[str, AfterValidator(_a_start)] = "earliest"
    """A topic that no commit knows yet is read from here on: `earliest` (its oldest record), `latest` (what comes from
    now on), `group` (the offsets of `group`, else the oldest record) or a time (ISO 8601, UTC unless it says
    otherwise). The first commit holds that place and is made before the first record is taken; afterwards reading
    continues at the last commit, whatever this key says."""
    on_lost: Literal["stop", "skip"] = "stop"
    """Records after the last commit may be lost: retention deleted them, or the topic was truncated or created again.
    `stop` ends the agent with an error that says so; `skip` goes on with what there is and counts those skipped."""
    merge_wait_s: float = Field(2, ge=0)
    """Several partitions become one stream in the order of the records' timestamps. A record that its producer delivers
    at most this number of seconds after dating it still finds its place; while a partition is silent the stream runs
    this far behind."""
    discover_s: float = Field(10, gt=0)
    """The agent looks for new partitions, and whether the topics are still the same, once in this number of seconds."""
    fetch_bytes: int = Field(16 * 2**20, ge=2**16)
    """Records that were fetched and are not in the spool yet take about this number of bytes of memory (at least 65536)
    before fetching waits."""
    stall_s: float = Field(120, ge=60)
    """The agent stops with an error when the Kafka client has not returned for this number of seconds (at least 60)."""
    dead_letter_topic: Annotated[str, AfterValidator(_dead_letter_topic)] = Field("{topic}.dlq", validate_default=True)
    """Rejected records are sent to this topic, in which `{topic}` stands for the topic they came from. It must not be
    one of `topics`."""
    dead_letter_create: bool = True
    """A dead-letter topic that does not exist is created, with one partition and otherwise the cluster's defaults;
    false stops the start instead."""
    breaker_share: float = Field(0.9, gt=0, le=1)
    """When more than this share (above 0, at most 1) of the last 1000 records was rejected, reading pauses and says so,
    so that a wrong setting does not empty a topic into its dead letters; 1 never pauses."""
    breaker_pause_s: float = Field(60, gt=0)
    """A pause because of `breaker_share` takes this number of seconds; then reading goes on."""
    security: KafkaSecurity = KafkaSecurity()
    images: KafkaImages = KafkaImages()

    def missing(self) -> str:
        """Say what must be set before topics can be read; empty: nothing."""
        return "" if self.topics else 'topics is empty; expected the topics to read, like ["images"]'


class ServeKafka(Section):
    """`gapstream serve --kafka` takes images from topics and sends predictions to another, beside HTTP. The cluster,
    its security, and where images may be that messages only point at, are those of [source.kafka]."""

    topics: tuple[str, ...] = ()
    """Messages of these topics are answered; their format is that of the learner's, without need of a class name."""
    output: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,249}$")] = "predictions"
    """Predictions are sent to this topic, each under the key of its image. It must not be one of `topics`."""
    create: bool = True
    """An `output` that does not exist is created, with as many partitions as the largest of `topics`; false stops the
    start instead."""
    group: str = Field("gapstream-serve", min_length=1)
    """The processes of this consumer group share the partitions, and continue at its offsets. It must not be
    `source.kafka.group`. The names of its transactions begin with it."""
    start: Literal["earliest", "latest"] = "earliest"
    """In a partition for which the group has no offset it begins with the oldest message or with what comes from now
    on. Where retention deleted the group's next messages it goes on with the oldest there are."""
    top: int = Field(5, ge=0)
    """A prediction lists this number of classes, the likeliest first; 0 lists all."""
    headers: tuple[str, ...] = ()
    """A prediction carries the headers of its message that have these names."""
    max_records: int = Field(256, ge=1)
    """One transaction answers at most this number of messages. More cost less for each message, but the first of them
    waits longer for its answer."""
    fetch_bytes: int = Field(16 * 2**20, ge=2**16)
    """One fetch brings about this number of bytes of messages (at least 65536). Memory for three is needed: what is
    answered, what is prepared meanwhile, and what is fetched."""

    @model_validator(mode="after")
    def _no_circle(self) -> ServeKafka:
        if self.output in self.topics:
            raise ValueError(f"output is {self.output}, which is one of the topics; expected a topic of its own")
        return self
