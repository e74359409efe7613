"""All parts of the monkey one after the other: `make test-monkey KILLS=1000 RECORDS=1000000 IMAGES=100000 SEED=7`.

They are `records`, `images`, `faults` (of the disk and clock, damaged files), `kills`, and `brokers` (kills on Kafka).

Each part is a program of its own and prints its progress, and at its end the figures; these are repeated at the end of
all. The exit code is 1 when a part found something; it says how to run that case again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

PARTS = {"records": 50_000, "images": 5000, "faults": 500, "kills": 30, "brokers": 15}
"""Parts, and how many cases each has when nobody says otherwise."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.monkey")
    parser.add_argument("--seed", default="1")
    for part, count in PARTS.items():
        parser.add_argument(f"--{part}", default=count, help=f"number of cases; 0: leave the part out ({count})")
    asked = vars(parser.parse_args())
    figures, failed = [], False
    for part in (part for part in PARTS if int(asked[part])):
        command = [sys.executable, "-m", f"tests.monkey.{part}", "--seed", asked["seed"], "--count", str(asked[part])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            line = ""
            for line in process.stdout:
                print(line, end="", flush=True)
        figures.append(line)
        failed |= process.returncode != 0
    print(*figures, sep="", end="")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
