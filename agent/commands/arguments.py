"""Arguments that commands share: --config and --set, and the configuration they ask for."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from agent.errors import ConfigError

if TYPE_CHECKING:
    from agent.config import Config


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add --config and --set to a command."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="read settings from this TOML file; without one every key has its default",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set one key, say task.samples=1000; wins over file and environment; may be repeated",
    )


def config_from(arguments: argparse.Namespace) -> Config:
    """Read the configuration of a command that has --config and --set. Raises ConfigError."""
    # Here, so that a command that needs no setting starts without: all sections with pydantic take 0.15 s.
    from agent.config import load

    overrides = {}
    for text in arguments.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: expected KEY=VALUE, e.g. task.samples=1000")
        overrides[key] = value
    return load(arguments.config, os.environ, overrides)
