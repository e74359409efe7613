"""Runs the programs here one after the other and writes what they measured into README.md: `make bench`.

    make bench                                   all that can run here
    make bench DATA=folder                       with the files of Tiny-ImageNet, see agent/methods/README.md
    make bench ONLY=growth,export                some; the rows of the others stay

A program whose data or broker is missing is left out, and its rows stay as they were. The exit code is 1 when a program
failed or missed what it is held to.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.results import Result, read, result

TABLE = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"


def json_lines(output: str) -> list[dict]:
    """Every line of output that is a JSON object."""
    found = []
    for line in output.splitlines():
        if line.startswith("{"):
            found.append(json.loads(line))
    return found


def inference(output: str) -> list[Result]:
    return [
        result(f"{line['model']}, batch {line['batch']}: eager PyTorch / release, by the clock", [line["speedup"]])
        for line in json_lines(output)
    ]


def swap(output: str) -> list[Result]:
    [line] = json_lines(output)
    return [result("p99 time of an answer, releases replaced / not", [line["p99_ratio"]], most=line["limit"])]


def memory(output: str) -> list[Result]:
    [line] = json_lines(output)
    return [result("resident memory after 50 releases / after 5", [line["ratio"]], most=line["limit"])]


def precision(output: str) -> list[Result]:
    found = []
    for line in json_lines(output):
        if "faster" in line:
            middle, low, high = line["faster"]
            what = f"{line['model']}, batch {line['batch']}: fp32 / int8, by the clock"
            found.append(Result(what, middle, low, high, 20, "", True))
    return found


def intake(output: str) -> list[Result]:
    last = json_lines(output)[-1]
    found = []
    for name in sorted((name for name in last if name.startswith("ratio_")), key=lambda name: (len(name), name)):
        size, by = name.removeprefix("ratio_").split("_")
        found.append(result(f"bare poll loop / intake, records of {size} B, by the {by}", [last[name]]))
    return found


def start(output: str) -> list[Result]:
    seconds = {name.strip(): float(value) for name, value in re.findall(r"^(.+?)\s+([\d.]+) s\b", output, re.M)}
    imports = next(value for name, value in seconds.items() if name.startswith("imports"))
    return [
        result(f"{name} / imports of the trainer", [value / imports])
        for name, value in seconds.items()
        if not name.startswith("imports")
    ]


@dataclass(frozen=True)
class Program:
    """A program here, and where the claim is that it measures."""

    name: str
    claim: str
    """The README that makes it."""
    command: str
    """What follows `python -m tests.bench.bench_`; a file of DATA is named in braces."""
    results: Callable[[str], list[Result]] = read
    """Finds them in the output."""
    broker: bool = False
    gpu: bool = False

    @property
    def files(self) -> list[str]:
        return re.findall(r"\{(.+?)\}", self.command)

    def lacks(self, data: Path | None) -> str | None:
        """Say what is missing here; None where nothing is."""
        if self.gpu and not shutil.which("nvidia-smi"):
            return "a GPU"
        if self.broker and not (shutil.which("java") and shutil.which("mvn")):
            return "a Kafka broker (java and mvn)"
        missing = [name for name in self.files if data is None or not (data / name).exists()]
        return f"{', '.join(missing)} (DATA=folder)" if missing else None


STREAM = "--data {tiny-imagenet-stream.zip} --class-order {tiny-imagenet.json}"
PROGRAMS = (
    Program("demo", "README", "demo"),
    Program("growth", "agent", "growth --classes 10 100 1000 --tasks 10 1000"),
    Program("scoring", "agent", "scoring"),
    Program("update", "agent/methods", f"update {STREAM} --tasks 3 --plain-tasks 0"),
    Program("plain", "agent/methods", f"update {STREAM} --tasks 0 --plain-tasks 1 --per-class 200"),
    Program("export", "exporter", "export"),
    Program("decoders", "exporter", "decoders"),
    Program("large-jpegs", "exporter", "large_jpegs"),
    Program("inference", "exporter", "inference", inference),
    Program("precision", "exporter", "precision", precision),
    Program("swap", "exporter", "inference --swap", swap),
    Program("memory", "exporter", "inference --memory", memory),
    Program("start", "deploy", "start", start),
    Program("scrape", "deploy", "scrape"),
    Program("serving", "exporter", "serving"),
    Program("ranks", "agent", "ranks"),
    Program("intake", "streams", "intake --waiting-mb 500", intake, broker=True),
    Program("exchange", "exporter", "exchange", broker=True),
    Program("gpu", "deploy", "gpu", gpu=True),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help=f"some of {','.join(program.name for program in PROGRAMS)}")
    parser.add_argument("--data", type=Path, help="folder of archives that do not come with the code")
    arguments = parser.parse_args()
    wanted = [name for name in arguments.only.split(",") if name]
    if unknown := set(wanted) - {program.name for program in PROGRAMS}:
        parser.error(f"got {', '.join(sorted(unknown))}, expected some of {', '.join(p.name for p in PROGRAMS)}")
    rows, failed = {}, []
    for program in PROGRAMS:
        if wanted and program.name not in wanted:
            continue
        if lacking := program.lacks(arguments.data):
            print(f"{program.name}: left out, it needs {lacking}", flush=True)
            continue
        found, good = run(program, arguments.data)
        rows[program.name] = table_rows(program, found)
        if not good or not found:
            failed.append(program.name)
        TABLE.write_text(written(TABLE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(f"\n{TABLE} has the table." + (f" Failed or missed: {', '.join(failed)}." if failed else ""))
    return int(bool(failed))


def run(program: Program, data: Path | None) -> tuple[list[Result], bool]:
    """Run a program; gives its results, and whether it ended well."""
    name, *options = program.command.split()
    paths = {file: str(data / file) for file in program.files if data is not None}
    command = [sys.executable, "-m", f"tests.bench.bench_{name}", *(paths.get(o.strip("{}"), o) for o in options)]
    print(f"\n{program.name}: {shown(program)}", flush=True)
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            print("    " + line, end="", flush=True)
    try:
        found = program.results("".join(lines))
    except (ValueError, KeyError, IndexError, StopIteration) as error:
        print(f"{program.name}: no result could be read ({error!r})")
        found = []
    return found, process.returncode == 0 and all(one.kept for one in found)


def shown(program: Program) -> str:
    """The command as a reader would type it."""
    return f"python -m tests.bench.bench_{program.command}".replace("{", "").replace("}", "")


def machine() -> str:
    """Say what this machine is, as far as it matters, and how busy."""
    gpu = "a GPU" if shutil.which("nvidia-smi") else "no GPU"
    return f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, {gpu}, load {os.getloadavg()[0]:.0f}"


def table_rows(program: Program, found: Sequence[Result]) -> list[str]:
    if not found:
        return [f"| {program.name} | {program.claim} | no result | | | {machine()} |"]
    return [f"| {program.name} | {program.claim} | {one.row()} | {machine()} |" for one in found]


def written(text: str, rows: dict[str, list[str]]) -> str:
    """Put rows into the table between the marks, in the order of PROGRAMS; what is not among them stays."""
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    kept: dict[str, list[str]] = {}
    for line in table.strip().splitlines()[2:]:
        kept.setdefault(line.split("|")[1].strip(), []).append(line)
    kept |= rows
    head = ["| program | claim in | what | ratio, median (range) | wanted | machine |", "|---|---|---|---|---|---|"]
    body = [line for program in PROGRAMS for line in kept.get(program.name, [])]
    return f"{before}{BEGIN}\n" + "\n".join([*head, *body]) + f"\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
