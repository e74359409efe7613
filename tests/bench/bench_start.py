"""Cold starts with the bundled model: an agent from its last commit to ready, a server to its first answer.

    .venv/bin/python -m tests.bench.bench_start

Every round starts both anew, one after the other, with Python's bytecode on disk, as from the second start of any
installation on (compiling it all takes three times as long). Beside them, what an agent's start spends on imports
alone. Exits with 1 when a median is 15 s or more.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from streams.archive_folder import ArchiveFolder
from tests.processes import free_port, gapstream, get, running

LIMIT_S = 15
WAIT_S = 120


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
        agent = {"state__path": folder / "state", "source__archive__per_class": 20}
        bundled = ArchiveFolder("bundled", "test")
        image = bundled.images(bundled.classes[0], 1)[0].read()

        def ready(port: int) -> Any:
            return get(f"http://127.0.0.1:{port}/readyz")

        def answer(port: int) -> Any:
            return get(f"http://127.0.0.1:{port}/v1/classify", image)

        # The first release, and an end in the middle of the stream: what is started later has something to go on with.
        port = free_port()
        seconds_to(ready, port, gapstream("run", http__port=port, source__archive__rate=20, **agent), folder)
        took: dict[str, list[float]] = {"agent, from a commit to /readyz": [], "server, to its first answer": []}
        imports = []
        for _ in range(rounds):
            port = free_port()
            learning = gapstream("run", http__port=port, source__archive__rate=0.1, **agent)
            took["agent, from a commit to /readyz"].append(seconds_to(ready, port, learning, folder))
            port = free_port()
            serving = gapstream("serve", serve__port=port, state__path=folder / "state")
            took["server, to its first answer"].append(seconds_to(answer, port, serving, folder))
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import agent.trainer"], check=True)
            imports.append(time.perf_counter() - started)
    for what, seconds in took.items():
        spread = f"from {min(seconds):.2f} to {max(seconds):.2f}"
        print(f"{what:<34} {statistics.median(seconds):6.2f} s ({spread}; below {LIMIT_S})")
    print(f"{'imports of the trainer alone':<34} {statistics.median(imports):6.2f} s")
    return int(any(statistics.median(seconds) >= LIMIT_S for seconds in took.values()))


def seconds_to(condition: Callable[[int], Any], port: int, command: Sequence[str | Path], folder: Path) -> float:
    """From the start of the process to the first time that `condition` holds."""
    started = time.perf_counter()
    with running(command, folder / "log"):
        while not condition(port):
            assert time.perf_counter() - started < WAIT_S, (folder / "log").read_text()[-3000:]
            time.sleep(0.02)
        return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
