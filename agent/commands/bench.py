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

from agent.bench.runs import JOINT, bench
from agent.commands.arguments import add_config, config_from
from agent.config import Config, ConfigError
from agent.methods import METHODS
from agent.parts import require_archive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"""{parser.epilog or ""}

A method may carry settings, each with a colon before it: `seca:sg_akt=false` sets method.seca.sg_akt in that row only,
a key with a dot is below [method]: `mgclip:epochs=2:lora.rank=4`. The same method with other settings is another row.
`joint` is the upper bound: finetune with all tasks as one. The stream is cut at the ends of its groups of classes.
Finished runs are kept in DIR/runs and not run again while all their settings stay the same."""
    add = parser.add_argument
    add_config(parser)
    add("--data", metavar="PATH", help="folder or zip with train/class name/image and test/... (or val/...)")
    add("--methods", default=",".join([*METHODS, "joint"]), metavar="A,B:KEY=VALUE,...", help="(%(default)s)")
    add("--seeds", type=_numbers, default=(0,), metavar="N,N,...", help="of training; a run each (0)")
    add("--classes-per-task", type=int, metavar="N", help="(source.archive.classes_per_task, 2)")
    add("--tasks", type=int, default=0, metavar="N", help="only the first so many (all)")
    add("--order", metavar="SEED|FILE", help="of the classes: drawn with a seed, or a file (a name a line, or JSON)")
    add("--per-class", type=int, metavar="N", help="only the first so many training images of a class (all)")
    add("--probe", metavar="PATH", help="folder or zip of classes that are never learned, to measure retention on")
    add("--out", type=Path, default=Path("build/bench"), metavar="DIR", help="for the results (%(default)s)")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def run(arguments: argparse.Namespace) -> None:
    logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
    options = _options(arguments)

    def configured(more: Sequence[str] = ()) -> Config:
        return config_from(argparse.Namespace(config=arguments.config, set=[*arguments.set, *options, *more]))

    config = configured()
    require_archive(config, "bench reads an archive, which it can read again for every method")
    rows = {spec: configured(settings(spec)) for spec in split_methods(arguments.methods)}
    console = Console()
    console = console if console.is_terminal else Console(width=180)
    bench(config, rows, arguments.seeds, arguments.tasks, arguments.out, console)


def split_methods(text: str) -> list[str]:
    """`a,b:key=value:key=[1,2]` -> its method specs, each once."""
    return list(dict.fromkeys(spec for spec in (part.strip() for part in re.split(r",(?![^\[]*\])", text)) if spec))


def settings(spec: str) -> list[str]:
    """What a method spec sets: `seca:sg_akt=false` is `method.name=seca` and `method.seca.sg_akt=false`.

    A key with a dot is below `method`, any other below the method's own section. Raises ConfigError.
    """
    name, *parts = spec.split(":")
    if name not in (*METHODS, JOINT):
        raise ConfigError(f"--methods {spec}: expected one of {', '.join((*METHODS, JOINT))}")
    section = "finetune" if name == JOINT else name
    for part in parts:
        if "=" not in part:
            raise ConfigError(f"--methods {spec}: got {part!r}, expected KEY=VALUE, e.g. seca:sg_akt=false")
    keys = ("method." if "." in part.partition("=")[0] else f"method.{section}." for part in parts)
    return [f"method.name={section}", *(key + part for key, part in zip(keys, parts, strict=True))]


def _options(arguments: argparse.Namespace) -> list[str]:
    """The command's own options as KEY=VALUE."""
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
    """The keys that make `--order` win over whatever order a configuration file has."""
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
