"""`gapstream join HOST:PORT`: this machine's ranks take part in the updates of a trainer elsewhere."""

from __future__ import annotations

import argparse
import logging
import threading

from agent.commands.arguments import add_config, config_from
from agent.config import ConfigError
from agent.config.training import is_local, parted
from agent.process import log_to_stderr, stop_on_signals
from agent.sharing.start import EXIT_REFUSED, RankProcess, secret_of

log = logging.getLogger(__name__)

_LOOK_S = 0.5
"""Seconds between two looks at the ranks: chosen by hand, little beside the start of one."""

_AGAIN_S = 2.0
"""Seconds before a rank that has ended is started again: chosen by hand. Its start takes longer than that, so that a
rank that dies every time costs no more than one that is always being started."""


class JoinError(Exception):
    """The trainer lets this machine's ranks not join."""


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
        raise ConfigError(f"the trainer's address: {error}") from error
    if config.training.secret_file is None and not is_local(address[0]):
        raise ConfigError("training.secret_file is empty; expected a file with the secret that the trainer has")
    secret = secret_of(config.training)
    stop = threading.Event()
    started: dict[int, RankProcess] = {}
    with stop_on_signals(stop):
        try:
            while not stop.is_set():
                for number in range(config.training.processes):
                    rank = started.get(number)
                    code = rank.ended() if rank is not None else None
                    if code == EXIT_REFUSED:
                        raise JoinError("a rank may not join, for the reason above")
                    if rank is None or code is not None:
                        if rank is not None:
                            log.warning(
                                "rank %d of this machine has ended (exit code %d) and is started again", number, code
                            )
                            rank.stop()
                            stop.wait(_AGAIN_S)
                        started[number] = RankProcess(config, address, secret, number, own=False)
                stop.wait(_LOOK_S)
        finally:
            for rank in started.values():
                rank.stop()
