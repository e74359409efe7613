"""What a task costs as classes and tasks grow: start, update, scoring, export, commit, in seconds and bytes written.

    .venv/bin/python -m tests.bench.bench_growth

Every row is a state folder that has learned so many classes in so many tasks, and a process of its own that starts from
it and learns tasks of ten classes with ten images each: new classes where classes grow, the same ten where tasks grow.
The towers are tiny and random, the method and its statistics are as large as always, so what grows shows more than
with a real CLIP. Four images of each class are held out. Adapters are not trained (`drift_budget` 0): that costs the
same whatever was learned before, and whether they stay is not for random towers to say.

Seconds are the processor's, of the median task after the first, which also fills what is kept in memory (its column is
`first`, as a whole). Exits with 1 where a task among 1,000 classes takes more than 2.5 times the seconds of one among
10, or one after 1,000 tasks more than 1.3 times those of one after 10.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench.results import show

TASK = 10
"""Classes of a task."""
IMAGES = 10
"""Images of each."""
HELD = 4
"""Images held out of every class."""
CLASSES = (10, 100, 1000, 5000)
TASKS = (10, 100, 1000)
ROUNDS = 3
PHASES = ("update", "scoring", "export", "commit")
MOST = {"classes": 2.5, "tasks": 1.3}
PICTURE = Path(__file__).parents[2] / "deploy/images/growth.svg"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="*", default=CLASSES)
    parser.add_argument("--tasks", type=int, nargs="*", default=TASKS)
    parser.add_argument("--picture", type=Path, help="write an SVG file here, as " + PICTURE.name + " was made")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--grows", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--make", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        if arguments.make:
            make(arguments.one, *arguments.make)
        else:
            print(json.dumps(measure(arguments.one, arguments.grows)))
        return 0
    rows: dict[str, list[dict[str, Any]]] = {"classes": [], "tasks": []}
    print(
        "classes  tasks   start   first  " + "  ".join(f"{name:>7}" for name in PHASES) + "     sum   MB new  peak MB"
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        for axis, numbers in (("classes", arguments.classes), ("tasks", arguments.tasks)):
            for number in numbers:
                grows = axis == "classes"
                of = (number, math.ceil(number / TASK)) if grows else (TASK, number)
                rows[axis].append(measured(Path(folder) / "state", *of, grows))
    if arguments.picture:
        arguments.picture.write_text(picture(rows), encoding="utf-8")
    return judge(rows)


def measured(state: Path, classes: int, tasks: int, grows: bool) -> dict[str, Any]:
    """Make a state folder in one process and learn on in another, so that each has its own peak of memory."""
    command = [sys.executable, "-m", "tests.bench.bench_growth", "--one", str(state)]
    subprocess.run([*command, "--make", str(classes), str(tasks)], check=True, stdout=sys.stderr)
    command += ["--grows"] if grows else []
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    shutil.rmtree(state)
    found |= {"classes": classes, "tasks": tasks, "sum": sum(found[name] for name in PHASES)}
    seconds = "  ".join(f"{found[name]:7.2f}" for name in PHASES)
    print(
        f"{classes:7}  {tasks:5}  {found['start']:6.2f}  {found['first']:6.2f}  {seconds}  {found['sum']:6.2f}"
        f"  {found['new_mb']:7.1f}  {found['peak_mb']:7.0f}",
        flush=True,
    )
    return found


def judge(rows: dict[str, list[dict[str, Any]]]) -> int:
    """Say how a task's cost grows; 1 where it grows by more than it may."""
    kept = True
    for axis, most in MOST.items():
        cost = {row[axis]: row for row in rows[axis]}
        if TASK in cost and 1000 in cost:
            for name in (*PHASES, "sum"):
                what = "a task" if name == "sum" else f"its {name}"
                ratio = cost[1000][name] / cost[TASK][name]
                kept &= show(f"{what}, after 1,000 {axis} / after 10", [ratio], most=most if name == "sum" else None)
    return int(not kept)


# What follows imports the agent late: the process that only prints has no use for torch.


def make(state: Path, classes: int, tasks: int) -> None:
    """Write a state folder whose learner knows `classes` classes, with the hold-out and the report of `tasks` tasks.

    All classes are learned in one task, to which the statistics are indifferent; the packs of held-out images and the
    history are then divided as if they had come in many.
    """
    from agent.commits import CommitStore, Provenance
    from agent.layout import REPORT
    from agent.sealing import seal

    store = CommitStore(state, 2)
    store.lock()
    names = [f"class {i}" for i in range(classes)]
    learner = trainer(state, None)
    outcome = learner.learn(a_task(state, 1, names, HELD + 1), store.stage(), lambda progress: None)
    divide_packs(outcome.staging / "holdout", tasks)
    divided(outcome.report, tasks).write(outcome.staging / REPORT)
    store.commit(replace(outcome, files=seal(outcome.staging)), Provenance("bench", tuple(names), {}, {}))
    store.close()


def divide_packs(folder: Path, tasks: int) -> None:
    """Divide the one pack of a hold-out into as many as there were tasks that held images out."""
    with zipfile.ZipFile(folder / "000001.zip") as pack:
        images = {name: pack.read(name) for name in pack.namelist()}
    (folder / "000001.zip").unlink()
    each = math.ceil(len(images) / tasks)
    for at in range(0, len(images), each):
        with zipfile.ZipFile(folder / f"{at // each + 1:06d}.zip", "w") as pack:
            for name in list(images)[at : at + each]:
                pack.writestr(zipfile.ZipInfo(name), images[name])


def divided(report: Any, tasks: int) -> Any:
    """Give the report of a single task as if it were that of many, shortened as every report is."""
    from agent.scoring.evaluator import MATRIX_ROWS
    from agent.scoring.report import HISTORY

    [entry] = report.history
    each = max(1, len(report.classes) // tasks)
    groups = [report.classes[i * each : (i + 1) * each] for i in range(tasks)]
    history = [
        replace(entry, task=i + 1, classes=group or report.classes, new_classes=group) for i, group in enumerate(groups)
    ]
    rows = [tuple([0.5] * (t + 1) + [None] * (tasks - t - 1)) for t in range(tasks)]
    matrix = [row if t >= tasks - MATRIX_ROWS else () for t, row in enumerate(rows)]
    whole = replace(
        report, history=tuple(history), matrix=tuple(matrix), first=(0.5,) * tasks, best=(0.5,) * tasks, task=tasks
    )
    return whole.shortened(HISTORY)


def measure(state: Path, grows: bool) -> dict[str, float]:
    """Start from a state folder and learn on, new classes if it `grows` and else the same.

    Gives seconds of the processor, MB written, and the peak of memory in MB."""
    import agent.trainer  # noqa: F401  # before the clock runs
    from agent.commits import CommitStore, Provenance
    from tests.tiny import tiny_clip

    tiny_clip()  # reads the tokenizer, which every start does

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, after the imports
    seconds: dict[str, list[float]] = {name: [] for name in (*PHASES, "start", "learn")}
    store = CommitStore(state, 2)
    store.lock()
    with timed(seconds["start"]):
        commit = store.current()
        assert commit is not None and commit.report is not None
        learner = trainer(state, commit.path)
    parts: Any = learner
    watch(parts._method, "update", seconds["update"])
    watch(parts._evaluator, "before", seconds["scoring"])
    watch(parts._evaluator, "after", seconds["scoring"])
    watch(parts._exporter, "release", seconds["export"])
    watch(parts, "_complete", seconds["commit"])
    watch(store, "commit", seconds["commit"])
    known, new = len(commit.classes), []
    for number in range(2, ROUNDS + 3):
        names = [f"class {(known if grows else 0) + i}" for i in range(TASK)]
        known += TASK
        task = a_task(state, number, names, IMAGES)
        with timed(seconds["learn"]):
            outcome = learner.learn(task, store.stage(), lambda progress: None)
            commit = store.commit(outcome, Provenance("bench", tuple(names), {}, {}))
        files = [path.stat() for path in commit.path.rglob("*") if path.is_file()]
        new.append(sum(file.st_size for file in files if file.st_nlink == 1) / 1e6)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    pairs = zip(seconds["scoring"][::2], seconds["scoring"][1::2], strict=True)
    seconds["scoring"] = [before + after for before, after in pairs]
    # `_complete` has the export in it
    whole = zip(seconds["commit"][::2], seconds["commit"][1::2], seconds["export"], strict=True)
    seconds["commit"] = [inside + renamed - export for inside, renamed, export in whole]
    found = {name: statistics.median(seconds[name][1:]) for name in PHASES}
    return {
        **found,
        "start": seconds["start"][0],
        "first": seconds["learn"][0],
        "new_mb": statistics.median(new[1:]),
        "peak_mb": int(peak.split()[1]) / 1024,
    }


def trainer(state: Path, commit: Path | None) -> Any:
    """Build a trainer whose towers are tiny."""
    import agent.trainer
    from agent.config import Config
    from tests.tiny import tiny_clip

    agent.trainer.load_clip = lambda settings: tiny_clip()
    config = {
        "state": {"path": state},
        "model": {"threads": 1},
        "method": {"gapstream": {"drift_budget": 0}},
        "evaluation": {"holdout_fraction": 0.8, "holdout_per_class": HELD},
    }
    return agent.trainer.Trainer(Config.model_validate(config), commit)


def a_task(state: Path, number: int, names: Sequence[str], images: int) -> Any:
    """Draw a task of small pictures: each class around a colour of its own."""
    import numpy as np
    from PIL import Image

    from streams.buffer import Task
    from streams.record import Partition, Record
    from streams.spool import Spool

    partition = Partition("bench", 0)
    spool = Spool(state / f"spool/{number}", 2**33)
    samples = []
    for name in names:
        generator = np.random.default_rng([number, *name.encode()])
        colour = np.random.default_rng(list(name.encode())).integers(40, 216, 3)
        for _ in range(images):
            out = io.BytesIO()
            pixels = (colour + generator.integers(-40, 40, (32, 32, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(out, "JPEG")
            samples.append(spool.append(Record(partition, len(samples), name, out.getvalue())))
    spool.end_segment()
    return Task(number, tuple(names), tuple(samples), {partition: number}, "end", 0, len(samples), {})


def watch(owner: Any, name: str, seconds: list[float]) -> None:
    """Have every call of a method note the seconds that it took."""
    method: Callable[..., Any] = getattr(owner, name)

    def timed_method(*args: Any, **options: Any) -> Any:
        with timed(seconds):
            return method(*args, **options)

    setattr(owner, name, timed_method)


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Note the processor's seconds that the block took."""
    began = time.process_time()
    yield
    seconds.append(time.process_time() - began)


def picture(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Draw the seconds of a task's phases over classes and over tasks, both axes by powers of ten."""
    from agent.bench.charts import COLORS, INK, _line, _svg, _text

    names = (*PHASES, "start")
    every = [row[name] for some in rows.values() for row in some for name in names]
    low, high = math.floor(math.log10(max(min(every), 1e-3))), math.ceil(math.log10(max(every)))
    left, top, inner, tall, apart = 60, 70, 300, 300, 70
    parts = [_text(left, 24, "Seconds of the processor that a task takes", weight=620, fill=INK, size=15)]
    for number, name in enumerate(names):
        parts.append(_text(left + 90 * number, 46, name, weight=620, fill=COLORS[number]))
    for panel, (axis, some) in enumerate(rows.items()):
        at = left + panel * (inner + apart)
        first, last = (math.log10(some[end][axis]) for end in (0, -1))

        def x(value: float, at: float = at, first: float = first, last: float = last) -> float:
            return at + inner * (math.log10(value) - first) / ((last - first) or 1)

        def y(value: float) -> float:
            return top + tall * (high - math.log10(max(value, 10**low))) / (high - low)

        for power in range(low, high + 1):
            parts.append(_line(at, y(10**power), at + inner, y(10**power)))
            parts.append(_text(at - 8, y(10**power) + 4, f"{10**power:g}", anchor="end"))
        parts += [_text(x(row[axis]), top + tall + 18, f"{row[axis]:,}", anchor="middle") for row in some]
        parts.append(_text(at + inner / 2, top + tall + 38, f"{axis} learned before", anchor="middle"))
        for number, name in enumerate(names):
            points = " ".join(f"{x(row[axis]):.1f},{y(row[name]):.1f}" for row in some)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{COLORS[number]}" stroke-width="2.25"/>')
    return _svg(left + 2 * (inner + apart), top + tall + 50, parts)


if __name__ == "__main__":
    sys.exit(main())
