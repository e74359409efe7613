"""The table of a comparison: a row per method with mean and spread over its seeds, for people and for programs."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from agent.bench.results import Compared, Result


@dataclass(frozen=True)
class Column:
    """It is a column of the table: one number of each result."""

    key: str
    """The field of Result that has the number, and the column's name in table.csv."""
    title: str
    """What stands above the column for people, with the unit."""
    unit: float
    """A value is divided by this before it is shown."""
    digits: int
    """A value is shown with this number of digits after the point."""


COLUMNS = (
    Column("avg", "Avg %", 0.01, 1),
    Column("last", "Last %", 0.01, 1),
    Column("forgetting", "Forgetting %", 0.01, 1),
    Column("backward_transfer", "BWT %", 0.01, 1),
    Column("retention", "Retention %", 0.01, 1),
    Column("gap_drift", "Gap drift %", 0.01, 1),
    Column("seconds", "Seconds", 1, 0),
    Column("peak_memory_bytes", "Peak memory MB", 1e6, 0),
    Column("trainable_parameters", "Trainable k", 1e3, 0),
    Column("stored_parameters", "Stored k", 1e3, 0),
)
"""The columns from left to right: what is learned, what is kept, what it costs."""

LEGEND = (
    "Avg: mean over tasks of the accuracy on all classes so far; Last: after the last task; forgetting: mean drop of "
    "the earlier tasks from their best; BWT: mean change of the earlier tasks since they were learned; retention: "
    "zero-shot accuracy on {probe} over the untouched model's; gap drift: change of the mean similarity to wrong names "
    "on the test images after the last task, relative to the untouched model's separation; seconds: learning, on "
    "{device}; peak memory: while learning, beyond the model and the images, which all share; trainable: parameters "
    "given to an optimiser in a task; stored: numbers kept between tasks, after the last."
)
"""This stands below the table, so that nobody has to guess what a column means; {probe} and {device} differ by run."""


def write_tables(compared: Compared, out: Path) -> None:
    """Write table.csv (raw values, mean and spread) and table.md (as shown) into `out`."""
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seeds", *(f"{c.key}_{kind}" for c in COLUMNS for kind in ("mean", "spread"))])
        for results in compared:
            values = [value for column in COLUMNS for value in mean_and_spread(_values(results, column))]
            seeds = " ".join(str(result.seed) for result in results)
            writer.writerow([results[0].method, seeds, *("" if value is None else value for value in values)])
    head = ["Method", *(column.title for column in COLUMNS)]
    lines = [head, ["---", *("--:" for _ in COLUMNS)], *([f"`{row[0]}`", *row[1:]] for row in _cells(compared))]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    (out / "table.md").write_text(f"{text}\n\n{_legend(compared)}\n", encoding="utf-8")


def mean_and_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Give the mean of those that are defined, and their sample standard deviation (None for fewer than two)."""
    defined = [value for value in values if value is not None]
    if not defined:
        return None, None
    return statistics.fmean(defined), statistics.stdev(defined) if len(defined) > 1 else None


def _values(results: Sequence[Result], column: Column) -> list[float | None]:
    return [getattr(result, column.key) for result in results]


def _cells(compared: Compared) -> list[list[str]]:
    return [[results[0].method, *(_cell(results, column) for column in COLUMNS)] for results in compared]


def _cell(results: Sequence[Result], column: Column) -> str:
    """Show a mean with its spread; none is shown where all seeds agree, as for methods without randomness."""
    mean, spread = mean_and_spread(_values(results, column))
    if mean is None:
        return "-"
    text = f"{mean / column.unit:,.{column.digits}f}"
    return f"{text} ± {spread / column.unit:,.{column.digits}f}" if spread else text


def _legend(compared: Compared) -> str:
    """Say what the columns mean and over which seeds they are; the data are those of the first run, as of all."""
    first = compared[0][0]
    never = first.retention_of == "probe"
    probe = "classes never learned" if never else "the classes not learned yet (where last measured)"
    seeds = len(compared[0])
    text = LEGEND.format(probe=probe, device=first.device_name)
    return text + (
        f"\nMean ± standard deviation over {seeds} seeds; no ± where all agree."
        if seeds > 1
        else f" Seed {first.seed}."
    )


def terminal_table(compared: Compared) -> Table:
    """Make the table that is printed, with the legend below it."""
    table = Table("method", caption=_legend(compared), caption_justify="left")
    for column in COLUMNS:
        table.add_column(column.title, justify="right")
    for row in _cells(compared):
        table.add_row(*row)
    return table
