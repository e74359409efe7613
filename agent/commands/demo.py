"""`gapstream demo`: the real agent on the bundled CIFAR-10 sample, watched live, a table and a report at the end."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agent.commands.report import last_retention, write_report
from agent.config import Config, load
from agent.layout import RELEASE
from agent.process import log_to_stderr, stop_on_signals
from agent.run import run_agent
from agent.scoring.report import Report
from exporter.metrics import Metrics
from exporter.release import MODEL
from streams.archive_folder import ArchiveFolder

STATE, PAGE = "state", "report.html"
"""What the demo makes in its folder: the agent's state folder, and the page that says it came to its end."""

FOLDER = Path("build/demo")
"""Where the demo learns, below the working directory: build/ is not under version control, and safe to delete."""

Status = Callable[[], Mapping[str, Any]]
"""The type of `exporter.metrics.Metrics.status`."""

PHASES = {
    "decode": "decoding images",
    "train": "learning the task",
    "compensate": "fitting the visual classifier",
    "evaluate": "scoring on held-back images",
    "export": "exporting to ONNX and checking",
    "commit": "committing",
}
"""Phase of an update (agent.values.Progress) -> what the demo calls it; a phase that is not here goes by its name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the demo has no arguments, GAPSTREAM_* variables set what it learns with."""


def run(arguments: argparse.Namespace) -> int:
    """Run the demo below the working directory; returns the exit code."""
    console = Console()
    # Where there is no terminal, rich takes 80 columns, too few for the table.
    return demo(FOLDER, console if console.is_terminal else Console(width=120))


def demo(folder: Path, console: Console, learner: str | None = None) -> int:
    """Learn the bundled stream in `folder`/state and write `folder`/report.html; returns the exit code.

    An interrupted demo goes on where it was, a finished one starts anew. `learner` is that of `run_agent`, whose errors
    pass through.
    """
    state = fresh(folder)
    config = demo_config(state)
    log_to_stderr(config)
    stop = threading.Event()
    console.print(
        f"[bold]gapstream[/] learns ten classes of CIFAR-10, two at a time, with {config.model.name} and "
        f"{config.method.name}.\nStatus page: http://{config.http.host}:{config.http.port}/"
    )
    with stop_on_signals(stop), ExitStack() as view:

        def watched_metrics(registry: CollectorRegistry) -> Metrics:
            metrics = Metrics(registry)
            view.enter_context(watched(metrics.status, console))
            return metrics

        commit = run_agent(config, stop, watched_metrics, learner)
    if commit is None or commit.report is None or stop.is_set():
        console.print("Stopped; `gapstream demo` goes on from the last task learned.")
        return 0
    write_report(state, folder / PAGE)
    console.print(tasks_table(commit.report))
    sample_images(folder / "images")
    console.print(summary(commit.report, folder), soft_wrap=True, highlight=False)
    return 0


def demo_config(state: Path) -> Config:
    """Load every default, the bundled stream and its test images, and a free port. GAPSTREAM_* variables count here
    too."""
    return load(
        None,
        os.environ,
        {
            "state.path": str(state),
            "evaluation.test_archive": "bundled",
            "evaluation.holdout_fraction": "0",  # the test images are scored, and all others learned
            "http.port": str(_free_port(9187)),
            "agent.log_level": "WARNING",  # more lines would tear the live view apart
        },
    )


def summary(report: Report, folder: Path) -> str:
    """Say what came out, where it is, and what to try next."""
    assert report.last is not None and report.zero_shot is not None, "the bundled stream has test images"
    gain = 100 * (report.last - report.zero_shot)
    retention = last_retention(report)
    kept = f", zero-shot retention {_percent(retention[0])} {retention[1]}" if retention else ""
    return "\n".join(
        [
            "",
            f"[bold]{_percent(report.last)}[/] over all {len(report.classes)} classes, {gain:+.1f} points "
            f"against the untouched model; forgetting {_percent(report.forgetting)}{kept}.",
            "",
            f"Report   {folder / PAGE}",
            f"Model    {folder / STATE / RELEASE / MODEL}",
            f"Try      {sys.argv[0]} predict --top 1 --model {folder / STATE} {folder / 'images'}/*.jpg",
        ]
    )


def sample_images(folder: Path) -> None:
    """Write one held-back image of each class of the bundled stream into `folder`, to try the released model on."""
    folder.mkdir(exist_ok=True)
    test = ArchiveFolder("bundled", "test")
    for name in test.classes:
        (folder / f"{name}.jpg").write_bytes(test.images(name, 1)[0].read())


@contextmanager
def watched(status: Status, console: Console) -> Iterator[None]:
    """Show what the agent does for as long as the block runs: redrawn in a terminal, a line per event elsewhere."""
    if console.is_terminal:
        with Live(get_renderable=lambda: live_view(status()), console=console, refresh_per_second=6, transient=True):
            yield
        return
    stop = threading.Event()
    lines = threading.Thread(target=_print_lines, args=(status, console, stop), name="demo-lines", daemon=True)
    lines.start()
    try:
        yield
    finally:
        stop.set()
        lines.join()


def live_view(status: Mapping[str, Any]) -> RenderableType:
    """Draw the agent's status as a panel: stream, running update with its gap budget, and the tasks learned so far."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", min_width=9)
    grid.add_column()
    stream, progress, task = status["stream"], status["progress"], status.get("task")
    grid.add_row("stream", f"{stream['records']} records read, {stream['rejected']} rejected")
    if progress is None:
        grid.add_row("update", {"starting": "loading the model", "draining": "stopping"}.get(status["state"], "-"))
    else:
        size = f", {task['samples']} samples" if task else ""
        grid.add_row("update", f"task {progress['task']}{size}: {PHASES.get(progress['phase'], progress['phase'])}")
        grid.add_row("epoch", _epoch(progress))
        if progress["loss"] is not None:
            grid.add_row("loss", f"{progress['loss']:.3f}")
        if progress["drift"] is not None and progress["budget"]:
            used = progress["drift"] / progress["budget"]
            grid.add_row("gap", _bar(used, f"{used:.0%} of the drift budget used", "red" if used > 1 else "cyan"))
    report = _report(status)
    parts: list[RenderableType] = [grid]
    if report:
        grid.add_row("accuracy", f"[bold]{_percent(report.last)}[/] over {len(report.classes)} classes so far")
        if adaptation := report.history[-1].adaptation:
            grid.add_row("towers", adaptation.words())
        parts += [Text(), tasks_table(report)]
    return Panel(Group(*parts), title="gapstream demo", title_align="left", border_style="blue", padding=(1, 2))


def tasks_table(report: Report) -> Table:
    """Make a row for each task: the learned model against the untouched one on the same held-back images."""
    probed = any(entry.retention is not None for entry in report.history)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("task", justify="right")
    table.add_column("classes learned")
    for name in ("accuracy", "untouched", "gain", "forgetting", *(["retention"] if probed else []), "seconds"):
        table.add_column(name, justify="right")
    for entry in report.history:
        accuracy, untouched = entry.accuracy, entry.zero_shot
        gain = "-" if accuracy is None or untouched is None else f"{100 * (accuracy - untouched):+.1f}"
        table.add_row(
            str(entry.task),
            Text(", ".join(entry.classes)),
            f"[bold]{_percent(accuracy)}[/]",
            _percent(untouched),
            gain,
            _percent(entry.forgetting),
            *([_percent(entry.retention)] if probed else []),
            f"{sum(entry.seconds.values()):.1f}",
        )
    return table


def fresh(folder: Path) -> Path:
    """Give the state folder in `folder`: an interrupted demo's, which goes on, or a new one after a finished demo."""
    state = folder / STATE
    if (folder / PAGE).exists():
        shutil.rmtree(state, ignore_errors=True)
        (folder / PAGE).unlink()
    return state


def _free_port(wanted: int) -> int:
    """Find the port `wanted`, or any when it is taken, as by an agent that runs here already."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            # As the server does: else a port whose last connections are still closing counts as taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise OSError("no free port on 127.0.0.1")


def _print_lines(status: Status, console: Console, stop: threading.Event) -> None:
    phase: tuple[int, str] | None = None
    tasks = 0
    while True:
        ended = stop.wait(0.2)
        now = status()
        progress, report = now["progress"], _report(now)
        if progress and (progress["task"], progress["phase"]) != phase:
            phase = progress["task"], progress["phase"]
            console.print(f"task {phase[0]}: {PHASES.get(phase[1], phase[1])}")
        # From the history, not from the commits: two that come between two looks are both told.
        for entry in report.history[tasks:] if report else ():
            tasks += 1
            console.print(
                f"task {entry.task} learned: accuracy {_percent(entry.accuracy)} over the classes so far, "
                f"untouched model {_percent(entry.zero_shot)}"
            )
            if entry.adaptation:
                console.print(f"task {entry.task} {entry.adaptation.words()}")
        if ended:
            return


def _report(status: Mapping[str, Any]) -> Report | None:
    """Give the current commit's report, which the status has as it is in report.json."""
    return Report.from_json(status["report"]) if status["report"] else None


def _epoch(progress: Mapping[str, Any]) -> RenderableType:
    if not progress["epochs"]:
        return _bar(progress["step"] / progress["steps"], "") if progress["steps"] else Text("-")
    done = max(0, progress["epoch"] - 1) + (progress["step"] / progress["steps"] if progress["steps"] else 0)
    words = f"{progress['epoch']} of {progress['epochs']}, step {progress['step']} of {progress['steps']}"
    return _bar(done / progress["epochs"], words)


def _bar(share: float, words: str, style: str = "cyan") -> RenderableType:
    row = Table.grid(padding=(0, 2))
    share = min(1.0, share)
    row.add_row(ProgressBar(total=1, completed=share, width=28, complete_style=style, finished_style=style), words)
    return row


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
