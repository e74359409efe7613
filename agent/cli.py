# PYTHON_ARGCOMPLETE_OK
"""The command `gapstream`: a table of commands, and `main`. A command's module is imported when it is chosen.

Exit codes: 0 done, 1 stopped by an error, 2 wrong usage, 78 wrong configuration (RestartPreventExitStatus of systemd),
130 ended by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import argcomplete

from agent.errors import ConfigError
from agent.process import is_ours
from exporter.masking import masked

EXIT_ERROR = 1
"""The exit code of whatever stops a command; by convention of shells. systemd starts an agent again that ends so."""
EXIT_CONFIG = 78
"""EX_CONFIG of sysexits.h. The systemd unit does not start an agent again that ends so: a restart cures no mistake."""

_SPINS = "1000"
"""Turns in which a thread of OpenMP waits for work before it lets go of its core. GNU's takes 300,000 and so holds the
core that the thread it waits for may need: beside one busy program on 2 cores the demo takes 84 s so, and 60 s with
1,000 turns, which is what GNU's takes where it knows of more threads than cores (10,000: 79 s). Alone it takes 38 s
both ways."""


class Command(NamedTuple):
    """It is one command of the table."""

    group: str
    """It is listed under this heading."""
    help: str
    """This line says what it does."""
    example: str
    """This command line shows its use."""


LEARN, USE, LOOK, KAFKA = "Learn", "Use what was learned", "Look and check", "Kafka"

COMMANDS = {
    "run": Command(
        LEARN, "learn a stream until it ends or SIGTERM comes", "gapstream run --set source.archive.path=photos.zip"
    ),
    "demo": Command(LEARN, "learn the bundled stream and look at the result", "gapstream demo"),
    "join": Command(
        LEARN,
        "take part in the updates of an agent on another machine",
        "gapstream join 10.0.0.5:29400 --config gapstream.toml --set training.secret_file=secret",
    ),
    "merge": Command(
        LEARN,
        "make one learner of several that learned apart, without their training images",
        "gapstream merge site-a/state site-b/state --out state",
    ),
    "bench": Command(
        LEARN,
        "compare methods on a stream of your own",
        "gapstream bench --data photos.zip --methods gapstream,mgclip,ncm --seeds 0,1,2",
    ),
    "serve": Command(
        USE,
        "classify over HTTP, or from topic to topic, with the release that readers follow",
        "gapstream serve --set state.path=state --set serve.port=9188",
    ),
    "predict": Command(
        USE,
        "classify images with the release that readers follow",
        "gapstream predict --model state --top 3 --name zebra photo.jpg",
    ),
    "releases": Command(USE, "list the releases readers can be sent to", "gapstream releases --set state.path=state"),
    "rollback": Command(
        USE,
        "send readers to an older release; the learner goes on",
        "gapstream rollback 41 --set state.path=state",
    ),
    "report": Command(
        LOOK, "write report.html from a state folder", "gapstream report --set state.path=state --out report.html"
    ),
    "doctor": Command(
        LOOK,
        "look whether an agent can run, and say how to mend what is wrong",
        "gapstream doctor --config gapstream.toml",
    ),
    "config": Command(LOOK, "print the configuration in force", "gapstream config --example > gapstream.toml"),
    "produce": Command(
        KAFKA, "play an archive into a Kafka topic", "gapstream produce bundled --topic images --create 1 --rate 20"
    ),
    "fleet": Command(
        KAFKA,
        "list the sites of a fleet, or forget one",
        "gapstream fleet forget old-site --config gapstream.toml",
    ),
    "dlq": Command(
        KAFKA,
        "list or replay the records that were set aside",
        "gapstream dlq replay --reason label_type --config gapstream.toml",
    ),
}
"""Name -> what the command is. Its module, agent/commands/<name>.py, has `add_arguments(parser)` and `run(arguments)`,
which returns the exit code (None is 0). ConfigError becomes exit code 78, any other exception class of this project one
line and exit code 1."""


class _CommandParser(argparse.ArgumentParser):
    """A parser that asks the command's module for its arguments when it is first used, so that no other is imported."""

    name = ""

    def fill(self) -> None:
        """Add the command's arguments, once."""
        if not self.get_default("function"):
            module = importlib.import_module(f"agent.commands.{self.name}")
            self.set_defaults(function=module.run)
            module.add_arguments(self)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.fill()
        return super().parse_known_args(args, namespace)


class _Version(argparse.Action):
    """It prints the version, which is looked up only here, as that takes 20 ms."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib import metadata

        print(f"gapstream {metadata.version('gapstream')}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line; a command's own arguments are known once it is chosen."""
    top = argparse.ArgumentParser(
        prog="gapstream",
        usage="gapstream [-h] [--version] COMMAND ...",
        description=f"Keeps a CLIP model learning from a stream of labelled images.\n\n{_grouped()}",
        epilog="`gapstream COMMAND --help` explains a command and has an example. The tab key completes commands and\n"
        'options in bash and zsh after: eval "$(register-python-argcomplete gapstream)"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    # Suppressed, since the description lists them by group; `prog`, or the usage above would stand before every name.
    commands = top.add_subparsers(
        prog="gapstream", metavar="COMMAND", required=True, parser_class=_CommandParser, help=argparse.SUPPRESS
    )
    typed = os.environ["COMP_LINE"].split() if "_ARGCOMPLETE" in os.environ else ()
    for name, command in COMMANDS.items():
        made = commands.add_parser(
            name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.name = name
        if name in typed:  # argcomplete looks at a parser's arguments before it lets it parse
            made.fill()
    return top


def _grouped() -> str:
    """Write the table for people: a heading for each group, a line for each command."""
    lines: list[str] = []
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {name:<10} {command.help}" for name, command in COMMANDS.items() if command.group == group]
    return "\n".join(lines).lstrip("\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Wrong usage raises SystemExit(2), as argparse does."""
    # Read once, when torch is imported, here or in a process that this one starts.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    top = parser()
    argcomplete.autocomplete(top)  # answers and ends the process when a shell asks for completions
    chosen = top.parse_args(arguments)
    try:
        return chosen.function(chosen) or 0
    except ConfigError as error:
        print(f"gapstream: {masked(str(error))}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output has gone, as in `gapstream config | head`
        # Python flushes what is left at its end, and would complain of the pipe once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except Exception as error:
        if not is_ours(error) and not isinstance(error, OSError):
            raise  # a mistake of ours: with its traceback
        print(f"gapstream: {masked(str(error))}", file=sys.stderr)
        return EXIT_ERROR
