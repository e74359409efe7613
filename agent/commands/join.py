"""`gapstream join HOST:PORT`: this machine's ranks take part in the updates of an agent on another one."""

from __future__ import annotations

import argparse
import logging
import threading

from agent.commands.arguments import add_config, config_from
from agent.config import ConfigError
from agent.config.training import parted
from agent.process import log_to_stderr, stop_on_signals
from agent.sharing.start import EXIT_REFUSED, RankProcess, secret_of

log = logging.getLogger(__name__)

_LOOK_S = 0.5
"""Seconds between two looks at the ranks: chosen by hand, little beside the start of one."""

_AGAIN_S = 2.0
"""Seconds before a rank that has ended is started again: chosen by hand, little beside its start, which takes several
seconds itself and so bounds what a rank costs that ends every time."""


class JoinError(Exception):
    """The agent does not let this machine's ranks join."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the address to the shared arguments."""
    parser.add_argument("address", metavar="HOST:PORT", help="training.listen of the agent")
    add_config(parser)


def run(arguments: argparse.Namespace) -> None:
    """Keep training.processes ranks joined until SIGTERM or SIGINT. Raises ConfigError, JoinError."""
    config = config_from(arguments)
    log_to_stderr(config)
    try:
        address = parted(arguments.address)
    except ValueError as error:
        raise ConfigError(f"the agent's address: {error}") from error
    if config.training.secret_file is None:
        raise ConfigError("training.secret_file is empty, expected a file with the same secret as the agent's")
    secret = secret_of(config.training)

    def start(number: int) -> RankProcess:
        return RankProcess(config, address, secret, number, own=False)

    stop = threading.Event()
    with stop_on_signals(stop):
        ranks = [start(number) for number in range(config.training.processes)]
        try:
            while not stop.wait(_LOOK_S):
                for number, rank in enumerate(ranks):
                    code = rank.ended()
                    if code == EXIT_REFUSED:
                        raise JoinError("the ranks of this machine may not join, for the reason above")
                    if code is not None and not stop.wait(_AGAIN_S):
                        log.info(
                            "rank %d of this machine has ended (exit code %d); another one is started", number, code
                        )
                        rank.stop()
                        ranks[number] = start(number)
        finally:
            for rank in ranks:
                rank.stop()
