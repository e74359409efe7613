"""`gapstream predict`: classifies image files with a release, by onnxruntime alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agent.commands.arguments import add_config, config_from
from exporter.preprocess import ImageError
from exporter.runtime import Classifier


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the images, and by what and how they are classified, to the shared arguments."""
    add_config(parser)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="classify this image file")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="classify with this release, or with the current one of this state folder (default: state.path)",
    )
    parser.add_argument(
        "--top",
        type=int,
        default=5,
        metavar="K",
        help="print the K likeliest classes of each image, 0 for all (default: %(default)s)",
    )
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="NAME",
        help="score this name, which was never learned, beside the learned classes; may be repeated",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a table of answers; the exit code is 1 when an image could not be read."""
    classifier = Classifier(arguments.model or config_from(arguments).state.path)
    table = Table("image", "class", "score")
    failed = 0
    for path in arguments.images:
        try:
            (prediction,) = classifier.classify([path.read_bytes()], top=arguments.top, extra=arguments.name)
        except (ImageError, OSError) as error:
            print(f"gapstream: {path}: {error}", file=sys.stderr)
            failed = 1
            continue
        for rank, (label, score) in enumerate(zip(prediction.labels, prediction.scores, strict=True)):
            table.add_row(Text("" if rank else str(path)), Text(label), f"{score:.1%}")
        table.add_section()
    Console().print(table)
    return failed
