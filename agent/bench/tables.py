"""The table of a comparison: a row per method with mean and spread over its seeds, for people and for programs."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Column:
    key: str
    title: str
    unit: float
    """What a value is divided by before it is shown."""
    digits: int


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

LEGEND = (
    "Avg: mean over tasks of the accuracy on all classes so far; Last: after the last task; forgetting: mean drop of "
    "the earlier tasks from their best; BWT: mean change of the earlier tasks since they were learned; retention: "
    "zero-shot accuracy on {probe} over the untouched model's; gap drift: change of the mean similarity to wrong names "
    "on the test images after the last task, relative to the untouched model's separation; seconds: learning, on "
    "{device}; peak memory: while learning, beyond the model and the images, which all share; trainable: parameters "
    "given to an optimiser in a task; stored: numbers kept between tasks, after the last."
)


Compared = Sequence[Sequence[Mapping[str, Any]]]
"""Results of the runs of one method spec after the other (see agent.bench.runs.run_one)."""


def write_tables(compared: Compared, out: Path) -> None:
    """table.csv (raw values, mean and spread) and table.md (as shown) in `out`."""
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seeds", *(f"{c.key}_{kind}" for c in COLUMNS for kind in ("mean", "spread"))])
        for results in compared:
            values = [value for column in COLUMNS for value in mean_and_spread(results, column.key)]
            seeds = " ".join(str(result["seed"]) for result in results)
            writer.writerow([results[0]["method"], seeds, *("" if value is None else value for value in values)])
    head = ["Method", *(column.title for column in COLUMNS)]
    lines = [head, ["---", *("--:" for _ in COLUMNS)], *([f"`{row[0]}`", *row[1:]] for row in _cells(compared))]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    (out / "table.md").write_text(f"{text}\n\n{_legend(compared)}\n", encoding="utf-8")


def mean_and_spread(results: Sequence[Mapping[str, Any]], key: str) -> tuple[float | None, float | None]:
    """Mean over the runs, and their sample standard deviation (None for fewer than two)."""
    values = [result[key] for result in results if result[key] is not None]
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _cells(compared: Compared) -> list[list[str]]:
    return [[results[0]["method"], *(_cell(results, column) for column in COLUMNS)] for results in compared]


def _cell(results: Sequence[Mapping[str, Any]], column: Column) -> str:
    mean, spread = mean_and_spread(results, column.key)
    if mean is None:
        return "-"
    text = f"{mean / column.unit:,.{column.digits}f}"
    return f"{text} ± {spread / column.unit:,.{column.digits}f}" if spread else text


def _legend(compared: Compared) -> str:
    first = compared[0][0]
    never = first["retention_of"] == "probe"
    probe = "classes never learned" if never else "the classes not learned yet (where last measured)"
    seeds = len(compared[0])
    text = LEGEND.format(probe=probe, device=first["device_name"])
    return text + (
        f"\nMean ± standard deviation over {seeds} seeds; no ± where all agree."
        if seeds > 1
        else f" Seed {first['seed']}."
    )


def terminal_table(compared: Compared) -> Table:
    table = Table("method", caption=_legend(compared), caption_justify="left")
    for column in COLUMNS:
        table.add_column(column.title, justify="right")
    for row in _cells(compared):
        table.add_row(*row)
    return table
