"""What scraping an agent ten times a second costs the updates it makes meanwhile.

    .venv/bin/python -m tests.bench.bench_scrape

A whole agent learns the bundled images, mixed, in equal tasks, each a copy of the one before in kind and size; every
other update is scraped, by a process of its own on the same cores (its own work is in the result, too). Updates grow
slower as the machine warms up, so each scraped one is held against the mean of its two neighbours. Exits with 1 when
the median update is 2 % slower or more.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from multiprocessing.synchronize import Event
from typing import Any

from prometheus_client import CollectorRegistry

from agent.config import load
from agent.run import run_agent
from exporter.metrics import Metrics
from tests.bench.results import show
from tests.processes import free_port

PERIOD_S = 0.1
WARM_UP = 2
LIMIT = 1.02


class Watched(Metrics):
    """Switches the scraper at every commit, and notes what the update and this process took."""

    def __init__(self, registry: CollectorRegistry, on: Event) -> None:
        super().__init__(registry)
        self.on = on
        self.updates: list[tuple[bool, float, float]] = []
        """Scraped or not, wall seconds of the update, share of a core this process used during it."""
        self._began = time.monotonic(), time.process_time()

    def cut(self, reason: str, samples: int, classes: int) -> None:
        super().cut(reason, samples, classes)
        self._began = time.monotonic(), time.process_time()

    def committed(self, commit: Any, outcome: Any) -> None:
        wall, cpu = time.monotonic() - self._began[0], time.process_time() - self._began[1]
        self.updates.append((self.on.is_set(), sum(outcome.report.seconds.values()), cpu / wall))
        super().committed(commit, outcome)
        if self.on.is_set():
            self.on.clear()
        else:
            self.on.set()


def scrape(port: int, on: Event, scrapes: Any) -> None:
    """GET /metrics every PERIOD_S while `on`, as little in the way as can be: Prometheus has a machine of its own."""
    os.nice(19)
    while True:
        on.wait()
        started = time.monotonic()
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            while connection.recv(65536):
                pass
        scrapes.value += 1
        time.sleep(max(0.0, PERIOD_S - (time.monotonic() - started)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=135, help="in a task; 2700 images in all (%(default)s)")
    samples = parser.parse_args().samples
    logging.basicConfig(level="WARNING")
    context = multiprocessing.get_context("spawn")
    on, scrapes, port = context.Event(), context.Value("q"), free_port()
    scraper = context.Process(target=scrape, args=(port, on, scrapes), daemon=True)
    scraper.start()
    made: list[Watched] = []

    def metrics(registry: CollectorRegistry) -> Watched:
        made.append(Watched(registry, on))
        return made[0]

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "state.path": folder, "http.port": str(port), "source.archive.order": "shuffled",
            "task.samples": str(samples), "evaluation.holdout_fraction": "0", "agent.log_level": "WARNING",
        }  # fmt: skip
        run_agent(load(None, {}, settings), threading.Event(), metrics)
    scraper.kill()
    updates = made[0].updates[WARM_UP:]
    ratios = [
        seconds / statistics.mean((updates[i - 1][1], updates[i + 1][1]))
        for i, (scraped, seconds, _) in enumerate(updates)
        if scraped and 0 < i < len(updates) - 1
    ]
    for name, which in (("not scraped", False), ("scraped", True)):
        chosen = [(seconds, share) for scraped, seconds, share in updates if scraped is which]
        seconds, share = (statistics.median(values) for values in zip(*chosen, strict=True))
        print(f"{name:<12} {len(chosen):3} updates, median {seconds:6.3f} s; agent process {share:5.1%} of a core")
    ratio = statistics.median(ratios)
    spread = statistics.quantiles(ratios, n=4)
    print(f"{scrapes.value} scrapes, every {PERIOD_S} s while on")
    print(f"scraped / not scraped {ratio:.4f} (quartiles {spread[0]:.4f} to {spread[2]:.4f}; below {LIMIT})")
    show("an update, scraped ten times a second / not", ratios, most=LIMIT)
    return int(ratio >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
