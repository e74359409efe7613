"""A line of output for each ratio that a program here measured; `python -m tests.bench` gathers them into a table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

MARK = "RESULT "


@dataclass(frozen=True)
class Result:
    """A ratio that was measured within one run, so that it says something on any machine."""

    what: str
    """What over what."""
    ratio: float
    """The median."""
    low: float
    high: float
    pairs: int
    """Number of pairs that each gave a ratio."""
    wanted: str
    """What it is held to; empty where nothing is."""
    kept: bool

    def row(self) -> str:
        """The cells of a table: what, ratio with its range, what is wanted."""
        spread = f" ({_figure(self.low)} to {_figure(self.high)}, {self.pairs} pairs)" if self.pairs > 1 else ""
        wanted = self.wanted + ("" if self.kept else ", **missed**")
        return f"{self.what} | {_figure(self.ratio)}{spread} | {wanted}"


def result(what: str, ratios: Sequence[float], *, least: float | None = None, most: float | None = None) -> Result:
    """Sum ratios up, one for each pair, and judge their median."""
    middle = statistics.median(ratios)
    wanted = f"at least {least:g}" if least is not None else f"at most {most:g}" if most is not None else ""
    kept = (least is None or middle >= least) and (most is None or middle <= most)
    return Result(what, middle, min(ratios), max(ratios), len(ratios), wanted, kept)


def show(what: str, ratios: Sequence[float], *, least: float | None = None, most: float | None = None) -> bool:
    """Print the line; tells whether the median is what is wanted."""
    found = result(what, ratios, least=least, most=most)
    print(MARK + json.dumps(asdict(found)), flush=True)
    return found.kept


def read(output: str) -> list[Result]:
    """Find the lines in what a program printed."""
    return [Result(**json.loads(line.removeprefix(MARK))) for line in output.splitlines() if line.startswith(MARK)]


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
