"""Pictures of a comparison as SVG files that need nothing else: accuracy over tasks, accuracy matrices, the gap."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from agent.bench.results import Compared

COLORS = ("#0b5cad", "#c2570c", "#2e7d4f", "#8a3ffc", "#a3123f", "#5b6470", "#b8860b", "#00838f", "#d0489e", "#6b4f3a")
"""Methods in the order of the table; chosen by hand to differ in hue and to be dark enough on white. After the tenth
they come again with the next of DASHES."""
DASHES = ("", "7 4", "2 4")
"""Lengths of stroke and gap in pixels: whole lines for the first ten methods, then dashes, then dots."""
INK, SOFT, LINE = "#1b1f24", "#5b6470", "#e2e3de"
"""Titles; labels; lines of the grid. They are the colours of the status page."""
CHARACTER = 7.6
"""Pixels that a letter of a method's name takes, chosen by hand: about a bold letter of 12 pixels. Text cannot be
measured without a browser; smaller cuts long names off at the right edge."""
APART = 16.0
"""Pixels between the names at the right edge, a line of 12 pixel text; smaller and they cover each other."""
MOST_MARKS = 20
"""Task numbers below the picture at most: more do not fit beside each other into its 580 pixels."""
FIGURES_FROM = 20
"""A cell of a matrix that is at least this many pixels wide has its number in it; a smaller one has no room for two
figures of 10 pixels."""


def write(compared: Compared, out: Path) -> None:
    """Write accuracy.svg, matrices.svg and gap.svg into `out`; over several seeds lines and dots' names are means, and
    a matrix is the first seed's."""
    for name, picture in (("accuracy", accuracy), ("matrices", matrices), ("gap", gap_against_retention)):
        (out / f"{name}.svg").write_text(picture(compared), encoding="utf-8")


def accuracy(compared: Compared) -> str:
    """Draw accuracy on all classes so far over the tasks: a line per method, a dot for a method scored once."""
    right = _margin(f"{results[0].method}  99.9" for results in compared)
    height, left, top, bottom, inner = 430, 52, 44, 46, 580
    width, tall = left + inner + right, height - top - bottom
    count = max(len(results[0].accuracies) for results in compared)
    lines = [_means([result.accuracies for result in results]) for results in compared]
    known = [value for line in lines for value in line if value is not None]
    low, high, step = _scale(min(known), max(known))

    def x(index: int) -> float:
        return left + inner * (index / (count - 1) if count > 1 else 0.5)

    def y(value: float) -> float:
        return top + tall * (1 - (value - low) / (high - low))

    parts = [_text(left, 24, "Accuracy on all classes so far, %", weight=620, fill=INK, size=15)]
    for value in _ticks(low, high, step):
        parts.append(_line(left, y(value), left + inner, y(value)))
        parts.append(_text(left - 8, y(value) + 4, f"{100 * value:.0f}", anchor="end"))
    every = math.ceil(count / MOST_MARKS)
    parts += [_text(x(i), height - 22, str(i + 1), anchor="middle") for i in range(0, count, every)]
    parts.append(_text(left + inner / 2, height - 4, "after task", anchor="middle"))
    ends = []
    for number, (results, line) in enumerate(zip(compared, lines, strict=True)):
        color, dash = _look(number)
        points = [(x(i), y(value)) for i, value in enumerate(line) if value is not None]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2.25" stroke-linejoin="round" '
            f'stroke-linecap="round" stroke-dasharray="{dash}"/>'
        )
        if len(points) < max(count, 2):
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{color}"/>' for a, b in points]
        last = next(value for value in reversed(line) if value is not None)
        end_x, end_y = points[-1]
        ends.append((end_y, end_x, f"{results[0].method}  {100 * last:.1f}", color))
    parts += _labels(left + inner + 26, ends, top, height - bottom)
    return _svg(width, height, parts)


def matrices(compared: Compared) -> str:
    """Draw accuracy on task i (column) after task t (row): a heat map per method."""
    columns, size, gap, head = 3, 250, 30, 54
    rows = math.ceil(len(compared) / columns)
    width = min(columns, len(compared)) * (size + gap) + gap
    parts = [_text(gap, 24, "Accuracy on each task (column) after each task (row), %", weight=620, fill=INK, size=15)]
    for number, results in enumerate(compared):
        left, top = gap + number % columns * (size + gap), head + number // columns * (size + head)
        matrix = results[0].matrix
        cell = size / len(matrix)
        parts.append(_text(left, top - 8, results[0].method, weight=620, fill=INK))
        for t, row in enumerate(matrix):
            for i, value in enumerate(row):
                if value is None:
                    continue
                place = f'x="{left + cell * i + 0.5:.1f}" y="{top + cell * t + 0.5:.1f}"'
                side = f'width="{cell - 1:.1f}" height="{cell - 1:.1f}" rx="{min(5, cell / 6):.1f}"'
                parts.append(f'<rect {place} {side} fill="{_shade(value)}"/>')
                if cell >= FIGURES_FROM:
                    fill = "#ffffff" if value > 0.6 else INK
                    at = left + cell * (i + 0.5), top + cell * (t + 0.5) + 3.5
                    parts.append(_text(*at, f"{100 * value:.0f}", anchor="middle", fill=fill, size=10))
    return _svg(width, head + rows * (size + head), parts)


def gap_against_retention(compared: Compared) -> str:
    """Draw gap drift against zero-shot retention after the last task: a dot per run, the name at a method's mean."""
    right = _margin(results[0].method for results in compared)
    height, left, top, bottom, inner = 430, 60, 44, 52, 580
    width, tall = left + inner + right, height - top - bottom
    title = _text(left, 24, "Zero-shot retention against drift of the modality gap, %", weight=620, fill=INK, size=15)
    dots = [
        [(r.gap_drift, r.retention) for r in results if r.gap_drift is not None and r.retention is not None]
        for results in compared
    ]
    every = [dot for some in dots for dot in some]
    if not every:
        return _svg(width, 90, [title, _text(left, 60, "No retention was measured: there is no probe.")])
    left_end, right_end, step = _scale(0, max(drift for drift, _ in every))
    low, high, rise = _scale(min(kept for _, kept in every), max(kept for _, kept in every))

    def place(drift: float, kept: float) -> tuple[float, float]:
        across, up = (drift - left_end) / (right_end - left_end), (kept - low) / (high - low)
        return left + inner * across, top + tall * (1 - up)

    parts = [title]
    for value in _ticks(low, high, rise):
        y = place(left_end, value)[1]
        parts += [_line(left, y, left + inner, y), _text(left - 8, y + 4, f"{100 * value:.4g}", anchor="end")]
    for value in _ticks(left_end, right_end, step):
        x = place(value, low)[0]
        parts += [_line(x, top, x, top + tall), _text(x, height - 28, f"{100 * value:.4g}", anchor="middle")]
    parts.append(_text(left + inner / 2, height - 8, "gap drift after the last task", anchor="middle"))
    ends = []
    for number, (results, some) in enumerate(zip(compared, dots, strict=True)):
        color = _look(number)[0]
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{color}" fill-opacity="0.75"/>'
            for x, y in (place(*dot) for dot in some)
        ]
        if some:
            x, y = (statistics.fmean(axis) for axis in zip(*(place(*dot) for dot in some), strict=True))
            ends.append((y, x, results[0].method, color))
    parts += _labels(left + inner + 26, ends, top, height - bottom)
    return _svg(width, height, parts)


def _means(series: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Average over the seeds at every task; None where no seed has a value, as `joint` before its only score."""
    there = [[value for value in values if value is not None] for values in zip(*series, strict=True)]
    return [statistics.fmean(values) if values else None for values in there]


def _scale(low: float, high: float) -> tuple[float, float, float]:
    """Find round ends around the values, and a round distance of the lines between, of which there are a handful."""
    span = max(high - low, 0.01)
    magnitude = 10 ** math.floor(math.log10(span / 4))
    step = next(magnitude * factor for factor in (1, 2, 5, 10) if magnitude * factor >= span / 5)
    return math.floor(low / step + 1e-9) * step, math.ceil(max(high, low + step / 2) / step - 1e-9) * step, step


def _ticks(low: float, high: float, step: float) -> list[float]:
    # By multiplication: a running sum would show 0.30000000000000004.
    return [low + step * i for i in range(round((high - low) / step) + 1)]


def _look(number: int) -> tuple[str, str]:
    return COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]


def _margin(names: Iterable[str]) -> float:
    """Reckon the room for the longest name beside a picture, in pixels."""
    return 40 + CHARACTER * max(map(len, names))


def _labels(at: float, ends: Sequence[tuple[float, float, str, str]], top: float, bottom: float) -> list[str]:
    """Write names at x = `at`, each joined by a line to its (y, x), moved apart so that none covers another."""
    places: list[float] = []
    ordered = sorted(ends)
    for wanted, *_ in ordered:
        places.append(max(wanted, places[-1] + APART if places else top))
    # Those pushed below the picture go back up, and push the ones above them.
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], bottom - APART * (len(places) - 1 - index))
    parts = []
    for place, (y, x, name, color) in zip(places, ordered, strict=True):
        parts.append(_line(x, y, at - 5, place, color=color, opacity=0.3))
        parts.append(_text(at, place + 4, name, weight=620, fill=color))
    return parts


def _shade(value: float) -> str:
    """Mix a colour for an accuracy: from nearly white at 0 to that of the first method at 1.

    The power is chosen by hand: a straight mix makes everything above a half look alike.
    """
    share = 0.05 + 0.95 * max(0.0, min(1.0, value)) ** 1.6
    mixed = (round(255 + share * (full - 255)) for full in (0x0B, 0x5C, 0xAD))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: int = 400, fill: str = SOFT, size: float = 12
) -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}" fill="{fill}" font-size="{size}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style} xml:space="preserve">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str = LINE, opacity: float = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{color}" stroke-opacity="{opacity}"/>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    font = "system-ui, -apple-system, Segoe UI, Roboto, sans-serif"
    paper = f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{font}">', paper, *parts, "</svg>\n"]
    )
