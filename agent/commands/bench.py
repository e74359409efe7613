"""`gapstream bench`: compares methods and seeds on the same stream."""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from agent.bench import JOINT
from agent.commands.arguments import add_config, config_from
from agent.config import Config, ConfigError
from agent.config.fleet import FLEET_METHODS
from agent.parts import require_archive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is compared on which data to the shared arguments, and how a method carries settings to the example."""
    parser.epilog = f"""{parser.epilog or ""}

A method may carry settings, each with a colon before it: `seca:sg_akt=false` sets method.seca.sg_akt in that row only,
a key with a dot is below [method]: `mgclip:epochs=2:lora.rank=4`. The same method with other settings is another row.
`joint` is the upper bound: finetune with all tasks as one. The stream is cut at the ends of its groups of classes.
Finished runs are kept in DIR/runs and not run again while all their settings stay the same."""
    add = parser.add_argument
    add_config(parser)
    add(
        "--data",
        metavar="PATH",
        help="compare on this folder or zip of train/class name/image and test/... or val/... (default: "
        "source.archive.path)",
    )
    add(
        "--methods",
        metavar="A,B:KEY=VALUE,...",
        help="compare these, a row of the table for each (default: all methods and joint)",
    )
    add("--seeds", type=_numbers, default=(0,), metavar="N,N,...", help="run each method with each seed (default: 0)")
    add(
        "--classes-per-task",
        type=int,
        metavar="N",
        help="learn N classes in a task (default: source.archive.classes_per_task)",
    )
    add("--tasks", type=int, default=0, metavar="N", help="learn only the first N tasks (default: all)")
    add(
        "--order",
        metavar="SEED|FILE",
        help="take the classes in an order drawn with this seed, or in that of this file, a name a line or JSON "
        "(default: as [source.archive] says)",
    )
    add(
        "--per-class",
        type=int,
        metavar="N",
        help="train on the first N images of each class (default: source.archive.per_class)",
    )
    add(
        "--probe",
        metavar="PATH",
        help="measure retention on this folder or zip of classes that are never learned (default: "
        "evaluation.probe_archive)",
    )
    add(
        "--sites",
        type=int,
        default=0,
        metavar="N",
        help="deal the stream over the N sites of a fleet instead, and compare what each answers alone, what all "
        "answer together, and what one learner that saw everything answers; learners of methods that cannot be in a "
        "fleet are merged at the end",
    )
    add(
        "--deal",
        choices=("class", "random"),
        default="class",
        help="with --sites, whole classes or single images come to a site (default: %(default)s)",
    )
    add(
        "--out",
        type=Path,
        default=Path("build/bench"),
        metavar="DIR",
        help="write the results to this folder (default: %(default)s)",
    )


def _numbers(text: str) -> tuple[int, ...]:
    """Read numbers with commas between them; what is none becomes argparse's error through ValueError."""
    return tuple(int(part) for part in text.split(","))


def run(arguments: argparse.Namespace) -> None:
    """Compare, print the table and write it with pictures to --out. Raises ConfigError, and what `bench` raises."""
    from agent.bench.runs import bench  # torch takes seconds to import, which --help and completion do without

    logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
    options = _options(arguments)

    def configured(more: Sequence[str] = ()) -> Config:
        return config_from(argparse.Namespace(config=arguments.config, set=[*arguments.set, *options, *more]))

    config = configured()
    require_archive(config, "bench reads an archive, which it can read again for every method")
    known = FLEET_METHODS if arguments.sites else _known()
    methods = split_methods(arguments.methods) if arguments.methods else known
    rows = {spec: configured(settings(spec)) for spec in methods}
    console = Console()
    # The table is as wide as that; a pipe or a file has no width, and rich would fold the columns into 80.
    console = console if console.is_terminal else Console(width=180)
    if arguments.sites:
        from agent.bench.sites import bench_sites

        chosen = arguments.sites, arguments.deal, arguments.out
        bench_sites(config, rows, arguments.seeds, arguments.tasks, *chosen, console)
    else:
        bench(config, rows, arguments.seeds, arguments.tasks, arguments.out, console)


def _known() -> list[str]:
    """Name all methods, and the upper bound."""
    from agent.methods import METHODS  # torch, as above

    return [*METHODS, JOINT]


def split_methods(text: str) -> list[str]:
    """Split `a,b:key=value:key=[1,2]` into method specs, each once; a comma inside a list does not separate."""
    return list(dict.fromkeys(spec for spec in (part.strip() for part in re.split(r",(?![^\[]*\])", text)) if spec))


def settings(spec: str) -> list[str]:
    """List what a method spec sets: `seca:sg_akt=false` is `method.name=seca` and `method.seca.sg_akt=false`.

    A key with a dot is below `method`, any other below the method's own section. Raises ConfigError.
    """
    name, *parts = spec.split(":")
    if name not in _known():
        raise ConfigError(f"--methods {spec}: expected one of {', '.join(_known())}")
    section = "finetune" if name == JOINT else name
    for part in parts:
        if "=" not in part:
            raise ConfigError(f"--methods {spec}: got {part!r}, expected KEY=VALUE, e.g. seca:sg_akt=false")
    keys = ("method." if "." in part.partition("=")[0] else f"method.{section}." for part in parts)
    return [f"method.name={section}", *(key + part for key, part in zip(keys, parts, strict=True))]


def _options(arguments: argparse.Namespace) -> list[str]:
    """Give the command's own options as KEY=VALUE; one that was not given leaves the configuration's value."""
    values: dict[str, Any] = {
        "source.archive.path": arguments.data,
        "source.archive.classes_per_task": arguments.classes_per_task,
        "source.archive.per_class": arguments.per_class,
        "evaluation.probe_archive": arguments.probe,
    }
    if arguments.order is not None:
        values |= _order(arguments.order)
    return [f"{key}={value}" for key, value in values.items() if value is not None]


def _order(text: str) -> dict[str, str]:
    """Give the keys that make `--order` win over whatever order a configuration file has.

    Raises ConfigError for a JSON object without `stream_order`, the form in which some data sets publish their order.
    """
    order, file, seed = (f"source.archive.{name}" for name in ("class_order", "class_order_file", "seed"))
    if text.isdecimal():
        return {order: "", file: "", seed: text}
    if text.endswith(".json"):
        try:
            content = json.loads(Path(text).read_text("utf-8"))
        except ValueError:
            content = None  # refused, with the reason, where the file is read
        if isinstance(content, dict):
            if "stream_order" not in content:
                raise ConfigError(f"--order {text}: got an object without `stream_order`, expected class names in it")
            return {order: json.dumps(content["stream_order"], ensure_ascii=False), file: ""}
    return {order: "", file: text}
