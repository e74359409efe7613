"""How to reach and be let into a Kafka cluster. Secrets come as text or as the file that holds them; none is shown.

The few things that every client of ours needs are here too: an error as a line of text, the end of a producer, the
longest message of a topic.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kafka import KafkaProducer
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
from kafka.errors import KafkaError, UnknownTopicOrPartitionError
from kafka.net.sasl.oauth import AbstractTokenProvider

from streams.source import NotThere, StreamError

log = logging.getLogger(__name__)

Secret = str | Path | None
"""A secret, or the file that holds it, read whenever a client is made: a changed secret needs no restart."""

CONNECT_S = 10
"""Seconds until a cluster that does not answer is an error; the client's default is 30. Chosen by hand: at a start
somebody waits for the message."""

REQUEST_MS = 5_000
"""Time for the answer to a single question, as where a log ends; the client's default is 30 s. Chosen by hand: the
reader's thread does nothing else meanwhile."""

PARTITION_BYTES = 4 * 2**20
"""Bytes of one partition in a fetch; the client's default is 1 MiB. A larger batch comes all the same, alone (KIP-74):
this is no limit for images, it only says how well a fetch is filled."""

METADATA_MS = 30_000
"""Age at which the list of brokers and leaders is asked for again, also when nothing failed. The client's default is
five minutes; chosen by hand, shorter so that moved partitions are known about sooner."""

LINGER_MS = 5
"""Time that a message waits for others to share its request; the client's default is 0, a request for every message."""

_LARGEST_REQUEST = 2**30
"""Bytes of a message that our producers let pass: more than any topic takes, so that the topic's own limit counts. The
client's default, 1 MiB, would refuse messages that the topic takes."""

NOTHING_LOST = "Nothing is lost: a restart continues at the last commit"
"""The last sentence of every message that ends the stream."""

UNKNOWN_TOPIC = UnknownTopicOrPartitionError.errno
"""The protocol's error code of a topic that is not there; descriptions of topics carry it instead of raising."""

_BATCH_OVERHEAD = 512
"""Bytes of `max.message.bytes` that no message gets: the broker compares it with the whole batch, whose header takes 61
bytes (message format 2), and the lengths inside the record take a few more."""

_USUAL_LONGEST = 1_000_000
"""Bytes of the longest message where we may not ask for the limit: a little below the brokers' default of 1 MiB."""

_ERROR_CHARS = 500
"""Characters of an error in a message: some errors of the client repeat a whole response."""

_TOKEN_S = 300
"""Seconds that a token is kept for where the service does not say."""


@dataclass(frozen=True)
class Connection:
    """The address of a cluster, and who asks to be let in. `settings` has it as the client library wants it."""

    bootstrap_servers: Sequence[str]
    protocol: str = "PLAINTEXT"
    """PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL."""
    cafile: Path | None = None
    certfile: Path | None = None
    keyfile: Path | None = None
    key_password: Secret = field(default=None, repr=False)
    check_hostname: bool = True
    mechanism: str = ""
    """PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or OAUTHBEARER."""
    username: str = ""
    password: Secret = field(default=None, repr=False)
    token_file: Path | None = None
    """The file with the current token for OAUTHBEARER; else one is asked for at `token_url` with client credentials."""
    token_url: str = ""
    client_id: str = ""
    client_secret: Secret = field(default=None, repr=False)
    scope: str = ""

    def settings(self) -> dict[str, Any]:
        """Give the keyword arguments that every client of the library takes.

        Raises StreamError when a secret's file cannot be read.
        """
        settings: dict[str, Any] = {
            "bootstrap_servers": list(self.bootstrap_servers),
            "security_protocol": self.protocol,
            "bootstrap_timeout_ms": CONNECT_S * 1000,
            "client_id": "gapstream",
        }
        if self.protocol.endswith("SSL"):
            settings["ssl_check_hostname"] = self.check_hostname
            settings["ssl_password"] = read_secret(self.key_password)
            for name in ("cafile", "certfile", "keyfile"):
                path = getattr(self, name)
                settings[f"ssl_{name}"] = str(path) if path else None
        if self.protocol.startswith("SASL"):
            settings["sasl_mechanism"] = self.mechanism
            if self.mechanism == "OAUTHBEARER":
                settings["sasl_oauth_token_provider"] = _TokenFile(self) if self.token_file else _TokenService(self)
            else:
                settings["sasl_plain_username"] = self.username
                settings["sasl_plain_password"] = read_secret(self.password)
        return settings

    def producer_settings(self) -> dict[str, Any]:
        """Give the keyword arguments that every producer takes beside its own: no message is lost or written twice."""
        return self.settings() | {
            "acks": "all",
            "enable_idempotence": True,  # the default, but kafka-python drops it silently where an option conflicts
            "max_request_size": _LARGEST_REQUEST,
            "metrics_enabled": False,  # nobody reads them
        }

    def __str__(self) -> str:
        return ",".join(self.bootstrap_servers)


@contextlib.contextmanager
def connecting(connection: Connection) -> Iterator[None]:
    """Make clients in this context: a failure becomes a StreamError that says why, NotThere where nobody answers.

    The error that kafka-python raises says only that no broker could be reached; why (a refused password, a certificate
    that is not trusted) it only logs, so its log is listened to.
    """
    reasons: list[str] = []

    def listen(record: logging.LogRecord) -> bool:
        arguments = record.args if isinstance(record.args, tuple) else ()
        reasons.extend(str(argument) for argument in arguments if isinstance(argument, Exception))
        return True

    loggers = [logging.getLogger(f"kafka.net.{name}") for name in ("manager", "connection")]
    for logger in loggers:
        logger.addFilter(listen)
    try:
        yield
    except KafkaError as error:
        found = [reason for reason in reasons if "Unable to bootstrap" not in reason]
        # A cluster has several addresses: that one refused us says more than that another was not there.
        refused = [reason for reason in found if "Sasl" in reason or "SSL" in reason]
        reason = [*refused[:1], *found[-1:], str(error)][0]
        # A cluster that refuses us will do so again; one that does not answer may be about to start.
        failure = StreamError if refused else NotThere
        raise failure(f"cannot connect to {connection}: {reason[:_ERROR_CHARS]}") from error
    finally:
        for logger in loggers:
            logger.removeFilter(listen)


def describe_error(error: Any) -> str:
    """Give the text of an error with its class name, in at most 500 characters."""
    text = str(error)
    return (text if type(error).__name__ in text else f"{type(error).__name__}: {text}")[:_ERROR_CHARS]


def abandon(producer: KafkaProducer) -> None:
    """End a producer at once; what it has not sent is not sent."""
    try:
        producer.close(timeout=0)
    except KafkaError:  # its `close` begins with a flush, and leaves the sender at work when that fails
        producer._sender.force_close()


def longest_message(admin: KafkaAdminClient, topic: str) -> int:
    """Give the bytes a message in `topic` may have; the usual number where we may not ask for `max.message.bytes`."""
    try:
        wanted = ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": None})
        found = admin.describe_configs([wanted], config_filter="all")
        return int(found["topic"][topic]["max.message.bytes"]["value"]) - _BATCH_OVERHEAD
    except (KafkaError, KeyError, ValueError, TypeError) as error:
        log.debug("max.message.bytes of %s: %s", topic, error)
        return _USUAL_LONGEST


def read_secret(secret: Secret) -> str | None:
    """Give the text of a secret, from its file where it has one. Raises StreamError."""
    if not isinstance(secret, Path):
        return secret
    try:
        return secret.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StreamError(f"the secret in {secret} cannot be read: {error}; nothing was connected") from None


class _TokenFile(AbstractTokenProvider):
    """A token that somebody else keeps fresh in a file."""

    def __init__(self, connection: Connection) -> None:
        self._path = connection.token_file

    def token(self) -> str:
        return read_secret(self._path) or ""


class _TokenService(AbstractTokenProvider):
    """It holds tokens of an OAuth 2.0 service for client credentials; each is kept until a minute before it expires."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._token = ""
        self._until = 0.0

    def token(self) -> str:
        if time.monotonic() >= self._until:
            asked = self._connection
            form = {"grant_type": "client_credentials", "client_id": asked.client_id, "scope": asked.scope}
            form["client_secret"] = read_secret(asked.client_secret) or ""
            body = urllib.parse.urlencode({name: value for name, value in form.items() if value}).encode()
            try:
                # kafka-python asks for the token while it connects, and does nothing else until it has one.
                with urllib.request.urlopen(asked.token_url, body, timeout=10) as response:
                    answer = json.load(response)
                self._token = answer["access_token"]
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
                raise KafkaError(f"no token from {asked.token_url}: {type(error).__name__}: {error}") from None
            self._until = time.monotonic() + max(10, float(answer.get("expires_in", _TOKEN_S)) - 60)
        return self._token
