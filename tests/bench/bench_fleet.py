"""What a site of a fleet publishes, in bytes, and what adding the others up costs, in CPU seconds.

    .venv/bin/python -m tests.bench.bench_fleet

On random statistics of the default size: 5,000 features, 100 classes of which 20 are known everywhere.
"""

from __future__ import annotations

import resource
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from agent.config import Gapstream
from agent.fleet_states import check, facts
from agent.methods.base import NOTHING, Counted, LearnerState
from agent.methods.publishing import incoming, outgoing, together
from agent.methods.training import packed

CLASSES, COMMON, IMAGES, WIDTH = 100, 20, 60, 256


def cpu_s() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def main() -> None:
    features = Gapstream().features
    pictures = torch.rand(CLASSES * IMAGES, features)
    scatter = packed(pictures.T @ pictures)

    def state(site: int) -> LearnerState:
        names = [f"common {at}" if at < COMMON else f"site {site} {at}" for at in range(CLASSES)]
        tensors = {
            "counts": torch.full((CLASSES,), float(IMAGES)),
            "means": torch.rand(CLASSES, features),
            "embeddings": torch.rand(CLASSES, WIDTH),
            "scatter": scatter,  # the same for all, which takes as long to add and less memory
            "fusion": torch.tensor([0.002, 0.5], dtype=torch.float64),
            "random.tokens": torch.zeros(WIDTH, features * 3 // 5),
            "random.embedding": torch.zeros(WIDTH, features * 2 // 5),
            "names": torch.zeros(CLASSES, WIDTH),
        }
        return LearnerState(tensors, {"classes": names, "fitted": True})

    own = state(0)
    held = Counted(pictures[:400], torch.rand(400, WIDTH), tuple(own.values["classes"][at // 4] for at in range(400)))
    for words, waiting in (("four images of each class held back", held), ("nothing held back", NOTHING)):
        started = cpu_s()
        tensors, classes = outgoing("gapstream", own, waiting, 5)
        print(f"what leaves, {words}: {cpu_s() - started:.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shared"
        model = {"name": "tinyclip", "sha256": "0" * 64, "prompt": "a good photo of a {}."}
        save_file(tensors, path, facts("gapstream", model, 1, [], {"fitted": True}, classes))
        print(f"a state has {path.stat().st_size / 1e6:.1f} MB")
        started = cpu_s()
        shared = check(path)
        incoming(own, tensors, list(shared.classes), shared.depth, shared.fitted)
        print(f"checking a new one: {cpu_s() - started:.2f} s")
    for sites in (10, 100):
        others = {str(site): state(site) for site in range(1, sites)}
        started = cpu_s()
        union = together("gapstream", own, others)
        print(f"adding up {sites} sites, {len(union.values['classes'])} classes: {cpu_s() - started:.1f} s")


if __name__ == "__main__":
    main()
