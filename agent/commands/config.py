"""`gapstream config`: prints the configuration in force, or every key with its default and what it means."""

from __future__ import annotations

import argparse

from agent.commands.arguments import add_config, config_from
from agent.config import Config, to_toml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --example to the shared arguments."""
    add_config(parser)
    parser.add_argument(
        "--example", action="store_true", help="print every key with its default and what it means instead"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the configuration as TOML, secrets masked; the example takes no notice of --config and --set."""
    config = Config() if arguments.example else config_from(arguments)
    print(to_toml(config, documented=arguments.example), end="")
