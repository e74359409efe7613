"""`gapstream serve` against a bare loop that decodes the same images and runs the same release, in batches.

    .venv/bin/python -m tests.bench.bench_serving [--pairs 7] [--clients 16] [--images 600] [--threads 1]

The clients are a process of their own, and each sends one photograph of 500 x 400 pixels after the other. Loop and
server are run in turns; of each pair the ratio of their times for an image counts, by the clock and in seconds of the
processor, the decoders' included and the clients' left out.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from exporter.runtime import Classifier
from tests.bench.bench_inference import load_clip, model, two_releases
from tests.bench.results import show
from tests.processes import free_port, gapstream, get, running, until

ADDRESS = "127.0.0.1"


def photo() -> bytes:
    """A JPEG of 500 x 400 pixels with about the detail of a photograph."""
    coarse = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(coarse).resize((500, 400), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=85)
    return encoded.getvalue()


def ask(port: int, image: bytes, clients: int, images: int) -> float:
    """Send `images` requests from `clients` threads, each over one connection; gives the seconds it took."""
    left = iter(range(images))
    lock = threading.Lock()

    def client() -> None:
        connection = http.client.HTTPConnection(ADDRESS, port)
        while True:
            with lock:
                if next(left, None) is None:
                    return
            connection.request("POST", "/v1/classify", image, {"Content-Type": "image/jpeg"})
            answer = connection.getresponse()
            assert answer.read() and answer.status == 200

    asking = [threading.Thread(target=client) for _ in range(clients)]
    began = time.perf_counter()
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    return time.perf_counter() - began


def used(process: psutil.Process) -> float:
    """Seconds of the processor that a process and those it started have taken."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1, help="threads of onnxruntime, in the loop and the server")
    parser.add_argument("--state", type=Path, metavar="FOLDER", help="use its release instead of one of its own")
    parser.add_argument("--ask", type=int, metavar="PORT", help="be the clients")
    options = parser.parse_args()
    image = photo()
    if options.ask:
        print(ask(options.ask, image, options.clients, options.images))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        state = options.state or Path(scratch)
        if not (state / "CURRENT").exists():
            two_releases(load_clip(model("tinyclip")), state)
        classifier = Classifier(state, options.threads, device="cpu")
        port = free_port()
        serving = gapstream(
            "serve", serve__port=port, state__path=state, serve__threads=options.threads, serve__device="cpu"
        )
        rows = []
        with running(serving, Path(scratch) / "log") as process:
            until(lambda: get(f"http://{ADDRESS}:{port}/readyz"), "ready", Path(scratch) / "log")
            watched = psutil.Process(process.pid)
            asking = [sys.executable, "-m", "tests.bench.bench_serving", "--ask", str(port)]
            asking += ["--clients", str(options.clients), "--images", str(options.images)]
            for turn in range(options.pairs + 1):
                began, cpu = time.perf_counter(), time.process_time()
                for _ in range(options.images // 16):
                    classifier.classify([image] * 16)
                loop = (time.perf_counter() - began, time.process_time() - cpu)
                loop = tuple(seconds / (options.images // 16 * 16) for seconds in loop)
                before = used(watched)
                # by the clients' own clock: they import torch before they ask
                took = float(subprocess.run(asking, check=True, stdout=subprocess.PIPE, text=True).stdout)
                server = (took, used(watched) - before)
                server = tuple(seconds / options.images for seconds in server)
                if turn:  # the first warms up
                    rows.append((loop, server))
    good = True
    for which, (name, wanted) in enumerate({"clock": 0.92, "processor": None}.items()):
        ratios = [loop[which] / server[which] for loop, server in rows]
        print(
            json.dumps(
                {
                    "by": name,
                    "loop_ms": round(1000 * statistics.median(loop[which] for loop, _ in rows), 2),
                    "server_ms": round(1000 * statistics.median(server[which] for _, server in rows), 2),
                    "ratio": round(statistics.median(ratios), 3),
                    "range": [round(min(ratios), 3), round(max(ratios), 3)],
                }
            )
        )
        kept = show(f"bare loop / serve at {options.clients} clients, an image, by the {name}", ratios, least=wanted)
        good = good and kept
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
