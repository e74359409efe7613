"""What scoring held-out images again costs: through the towers after every task, and only where these have changed.

    .venv/bin/python -m tests.bench.bench_scoring

600 images of the bundled archive and the bundled model with `gapstream` are scored both ways in turn, in seconds of the
processor: while the towers stay as they are, and where the adapters of the image tower have moved. Exits with 1 where
the two ways give other probabilities, or the second saves less than 20 and 1.5 times.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing

import torch
from torch import Tensor

from agent import methods
from agent.config import Config
from agent.methods.base import InferenceModule, TaskData
from agent.methods.discriminant import Discriminant
from agent.model.clip import load_clip
from agent.model.images import StoredTokens
from agent.model.lora import ADAPTED, merged
from agent.scoring.scored_images import ScoredImages, image_refs
from exporter.decoders import Decoders
from streams.archive_folder import ArchiveFolder
from tests.bench.results import show

ROUNDS = 5
LEARNED = 240
"""Images of the task that is learned first, so that there is a discriminant."""


@torch.no_grad()
def main() -> int:
    torch.set_num_threads(1)
    config, archive = Config(), ArchiveFolder("bundled", "test")
    clip = load_clip(config.model)
    with closing(Decoders(config.source.max_image_pixels)) as decoders:
        images = ScoredImages(clip, config.evaluation.batch_size, decoders, config.method.cache_bytes)
        numbers = images.add([ref for n in archive.classes for ref in image_refs(archive, n, 60)], lambda: None)
    tokens = torch.cat([part for _, part in images.batches(numbers[:LEARNED])])
    settings = config.method.model_copy(
        update={"gapstream": config.method.gapstream.model_copy(update={"drift_budget": 0.0})}
    )
    method = methods.build(clip, settings)
    task = TaskData(1, archive.classes, torch.arange(LEARNED) % 10, StoredTokens(tokens, clip.device))
    method.update(task, lambda progress: None)
    stays: InferenceModule = method.inference_module()
    assert isinstance(stays, Discriminant)

    def whole(module: InferenceModule) -> Tensor:
        return torch.cat([module.from_tokens(part.float())[2] for _, part in images.batches(numbers)])

    def kept(module: InferenceModule) -> Tensor:
        return torch.cat([module.answer(encoded)[2] for _, encoded in images.encoded(numbers, module)])

    def moved(by: float) -> InferenceModule:
        """A module like that, whose adapted tower no other call has."""
        weights = {name: p + by for name, p in clip.image.named_parameters() if name.endswith(ADAPTED)}
        head = (stays.classes, stays.names, stays.rows, stays.bias, stays.centre, stays.random, stays.depth)
        return Discriminant(stays.tower, merged(clip.image, weights), *head)

    ratios: dict[bool, list[float]] = {False: [], True: []}
    same = torch.equal(whole(stays), kept(stays))
    for number in range(ROUNDS):
        for moves, module in ((False, stays), (True, moved(1e-4 * (number + 1)))):
            if not moves:
                kept(module)  # the towers of the round before were others
            began = time.process_time()
            before = whole(module)
            half = time.process_time()
            after = kept(module)
            ratios[moves].append((half - began) / (time.process_time() - half))
            same &= torch.equal(before, after)
    print(f"{len(numbers)} images; the probabilities of both ways are {'the same bits' if same else 'NOT the same'}")
    good = show("600 images scored again, towers as they were: all anew / what changed", ratios[False], least=20)
    good &= show("600 images scored again, adapters moved: all anew / what changed", ratios[True], least=1.5)
    return int(not (good and same))


if __name__ == "__main__":
    sys.exit(main())
