"""`gapstream report`: writes a state folder's report as one HTML page that needs no network and no other file.

Everything shown comes from the current commit: report.json (scores, with their history), manifest.json (settings,
versions, hashes) and release/release.json (what was released and how well it agrees with torch).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from markupsafe import Markup

from agent.commands.arguments import add_config, config_from
from agent.layout import MANIFEST, RELEASE_IN_COMMIT, REPORT, current_commit
from agent.scoring.report import Report
from exporter.release import MANIFEST as RELEASE_MANIFEST

T = TypeVar("T")


class ReportError(Exception):
    """There is nothing to report on; the message says why and what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `gapstream report`."""
    add_config(parser)
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page (%(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Write the page and say where. Raises what `write_report` raises."""
    write_report(config_from(arguments).state.path, arguments.out)
    print(f"wrote {arguments.out}")


def write_report(state: Path, out: Path) -> None:
    """Write the report of `state`'s current commit to `out` (folders are made). Safe while an agent is running there.

    Raises ReportError when nothing is learned yet or the commit cannot be read, OSError when `out` cannot be written.
    """
    # The commit's own folder, not CURRENT, which may move to another one between two of the files.
    folder = current_commit(state)
    if folder is None:
        raise ReportError(f"nothing is committed in {state} yet, so nothing to report; run `gapstream run` first")
    if not (folder / REPORT).exists():
        raise ReportError(f"nothing is learned in {state} yet, so nothing to report; its commit holds offsets alone")
    report = _read(folder / REPORT, Report.read)
    page = render(report, _read(folder / MANIFEST, _json), _release(folder))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")


def render(report: Report, manifest: dict[str, Any], release: dict[str, Any] | None) -> str:
    """Render the page; manifest and release are the contents of manifest.json and release.json (None when nothing was
    released)."""
    scores = report.to_json()
    looks = resources.files("exporter").joinpath("assets")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("agent", "assets"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,  # what an older report lacks is shown as a dash
    )
    environment.filters |= {"percent": _percent, "number": _number, "bytes": _bytes}
    return environment.get_template("report.html.j2").render(
        report=scores,
        retention=last_retention(report),
        gain=None if report.last is None or report.zero_shot is None else report.last - report.zero_shot,
        manifest=manifest,
        release=release,
        css=Markup(looks.joinpath("look.css").read_text(encoding="utf-8")),
        charts=Markup(looks.joinpath("charts.js").read_text(encoding="utf-8")),
        data=_script_safe({key: value for key, value in scores.items() if key != "examples"}),
        config=json.dumps(manifest.get("config", {}), indent=2, ensure_ascii=False),
    )


def last_retention(report: Report) -> tuple[float, str] | None:
    """Give the newest zero-shot retention that was measured, and on what; None when it never was."""
    for entry in reversed(report.history):
        if entry.retention is not None:
            if report.probe is not None:
                return entry.retention, "on classes never learned"
            return entry.retention, f"after task {entry.task}, on the classes still to come"
    return None


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _read(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except (OSError, ValueError) as error:
        raise ReportError(
            f"{path} of the current commit cannot be read ({error}); `gapstream run` checks the folder when it starts"
        ) from error


def _release(commit: Path) -> dict[str, Any] | None:
    path = commit / RELEASE_IN_COMMIT / RELEASE_MANIFEST
    return _read(path, _json) if path.exists() else None


def _script_safe(value: Any) -> Markup:
    """Write JSON for a <script> element: class names come from the stream, and one may contain `</script>`."""
    return Markup(json.dumps(value, allow_nan=False).replace("<", "\\u003c"))


Number = float | jinja2.Undefined | None
"""What a report may say of a quantity; null or missing is shown as a dash."""


def _percent(value: Number) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else "-"


def _number(value: Number) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
