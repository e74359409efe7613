"""What decoding in processes of their own costs, against the same in threads of this process.

    .venv/bin/python -m tests.bench.bench_decoders

Both decode the same images to the pixels of ViT-B/32, in turn, round after round, and each round gives one ratio. The
seconds are those of the processor, of this process and its decoders together: on a machine with other work they say
more than the clock does. Exits with 1 when the median ratio is larger than that of KINDS.

Measured in 9 rounds on 2 cores that had other work too, medians, and the smallest and largest ratio:

    image             threads   ratio                   by the clock
    JPEG 500 x 400    4.7 ms    1.07 (0.96 to 1.23)     1.00 (0.82 to 1.31)
    PNG 32 x 32       1.05 ms   1.12 (0.97 to 1.19)     0.89 (0.71 to 1.38)
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from exporter.decoders import Decoders
from exporter.preprocess import Preprocess, decode
from tests.bad_images import encoded, picture
from tests.bench.results import show

PREPROCESS = Preprocess(224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
MAX_PIXELS = 50_000_000
KINDS = {"JPEG 500 x 400": ("JPEG", (500, 400), 300, 1.15), "PNG 32 x 32": ("PNG", (32, 32), 2000, 1.5)}
"""Name -> format, size, images in a round, and the largest ratio that is taken."""


def processor_s(decoders: Decoders) -> float:
    """Seconds of the processor that this process and its decoders have used."""
    used = time.process_time()
    for decoder in decoders._decoders:
        user, system = Path(f"/proc/{decoder._process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        used += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return used


def measured(work: Callable[[], object], decoders: Decoders) -> tuple[float, float]:
    """Seconds of the clock and of the processor."""
    clock, processor = time.monotonic(), processor_s(decoders)
    work()
    return time.monotonic() - clock, processor_s(decoders) - processor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    decoders, good = Decoders(MAX_PIXELS), True
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for name, (kind, size, count, limit) in KINDS.items():
            images = [encoded(picture(size=size, seed=seed), kind) for seed in range(8)] * (count // 8)
            runs: dict[str, Callable[[], object]] = {
                "threads": lambda images=images: list(  # type: ignore[misc]
                    threads.map(lambda data: PREPROCESS(decode(data, MAX_PIXELS)), images)
                ),
                "processes": lambda images=images: list(decoders.pixels(images, PREPROCESS)),  # type: ignore[misc]
            }
            found: dict[str, list[tuple[float, float]]] = {one: [] for one in runs}
            for number in range(rounds + 1):
                for one in sorted(runs, reverse=bool(number % 2)):
                    seconds = measured(runs[one], decoders)
                    if number:  # the first round warms up
                        found[one].append(seconds)
            print(f"{name}, {rounds} rounds of {len(images)} images")
            for column, what in enumerate(("clock", "processor")):
                ms = {one: [1e3 * run[column] / len(images) for run in found[one]] for one in runs}
                ratios = sorted(p / t for p, t in zip(ms["processes"], ms["threads"], strict=True))
                print(
                    f"  {what}: threads {statistics.median(ms['threads']):.3f} ms, processes "
                    f"{statistics.median(ms['processes']):.3f} ms an image; ratio {statistics.median(ratios):.3f} "
                    f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
                )
            good &= show(f"{name}: decoded in processes / in threads", ratios, most=limit)
    decoders.close()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
