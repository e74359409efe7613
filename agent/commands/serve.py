"""`gapstream serve`: answers over HTTP with the newest release, and with --kafka from topic to topic."""

from __future__ import annotations

import argparse
import contextlib
import logging
import threading

from agent.commands.arguments import add_config, config_from
from agent.process import log_to_stderr, stop_on_signals
from exporter.serve import Server
from exporter.systemd import supervised

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --kafka to the shared arguments."""
    add_config(parser)
    parser.add_argument("--kafka", action="store_true", help="also answer the images of topics, see [serve.kafka]")


def run(arguments: argparse.Namespace) -> None:
    """Answer until SIGTERM or SIGINT; what has begun is answered first. Raises ConfigError, StreamError, OSError."""
    config = config_from(arguments)
    log_to_stderr(config)
    limits = config.serve.model_dump(exclude={"kafka"})
    limits |= {"max_pixels": config.source.max_image_pixels, "max_name_chars": config.source.max_label_chars}
    server = Server(config.state.path, **limits)
    log.info("answering on http://%s:%d/v1/classify", config.serve.host, server.port)
    stop = threading.Event()
    with stop_on_signals(stop), contextlib.ExitStack() as parts:
        # systemd hears of an event loop that is blocked, which /livez cannot tell: it is answered by that loop.
        watched = supervised(server.why_not_alive, lambda: server.answering, lambda: _doing(server), stop)
        parts.enter_context(watched)
        if arguments.kafka:
            from agent.commands.serve_kafka import beside  # the Kafka client, which HTTP alone does not need

            parts.enter_context(beside(config, server, stop))
        if not stop.is_set():
            server.run()


def _doing(server: Server) -> str:
    return f"release {server.classifier.release.id} answers" if server.classifier else "no release answers yet"
