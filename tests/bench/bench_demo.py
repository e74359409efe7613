"""The demo from nothing to its report: seconds, peak memory of all its processes, and what it learned.

    .venv/bin/python -m tests.bench.bench_demo

The bundled model's graphs are those that the installation left in the cache; with an empty XDG_CACHE_HOME it traces.
Exits with 1 when it takes more than 150 s or 2.5 GB, or ends less than 15 points above the untouched model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.bench.results import show


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        demo = subprocess.Popen([sys.executable, "-m", "agent", "demo"], cwd=folder, stdin=subprocess.DEVNULL)
        peak = 0
        while demo.poll() is None:
            peak = max(peak, _memory(demo.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - started
        report = json.loads((Path(folder) / "build/demo/state/CURRENT/report.json").read_text())
    gain = 100 * (report["last"] - report["zero_shot"])
    print(f"seconds                 {seconds:7.1f}   (at most 150)")
    print(
        f"peak memory, MB         {peak / 2**20:7.0f}   (at most 2500; resident, shared pages counted in each process)"
    )
    print(f"points above untouched  {gain:7.1f}   (at least 15)")
    show("accuracy after the demo / of the untouched model", [report["last"] / report["zero_shot"]])
    return int(demo.returncode or seconds > 150 or peak > 2500 * 2**20 or gain < 15)


def _memory(pid: int) -> int:
    total = 0
    try:
        for process in (parent := psutil.Process(pid), *parent.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.Error:  # one that has just ended
        pass
    return total


if __name__ == "__main__":
    sys.exit(main())
