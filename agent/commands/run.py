"""`gapstream run`: learns a stream until it ends or SIGTERM comes."""

from __future__ import annotations

import argparse
import threading

from agent.commands.arguments import add_config, config_from
from agent.process import log_to_stderr, stop_on_signals
from agent.run import run_agent

add_arguments = add_config


def run(arguments: argparse.Namespace) -> None:
    """Learn until the stream ends, SIGTERM or SIGINT. Raises ConfigError, and what `run_agent` raises."""
    config = config_from(arguments)
    log_to_stderr(config)
    stop = threading.Event()
    with stop_on_signals(stop):
        run_agent(config, stop)
