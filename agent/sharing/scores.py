"""What the trainer and its ranks do together to score a task: images are encoded where their turn is, both sides.

Rank 0 alone decides what is encoded, and keeps it (agent.scoring.scored_images). Each order goes to all ranks by its
serial numbers, which tell whose an image is: a rank says which of its images it has no tokens of, is sent these, and
gives back what it made of all. Tokens stay where they were made, so that an image is sent and decoded once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from agent.methods.base import InferenceModule, Method
from agent.model import ranks
from agent.model.clip import Clip
from agent.model.images import blank, failed_anywhere, load_tokens
from agent.scoring.scored_images import Wanted
from agent.sharing.deal import received_images, send_images
from exporter.decoders import Decoders


def ask(wanted: Wanted, serials: Sequence[int], read: Sequence[Callable[[], bytes]]) -> None:
    """Tell all ranks, which have to `ShareOfScoring.encode` now, what is wanted of which images, and send them those
    of their share that they lack. read: what gives each encoded image."""
    ranks.told(json.dumps([wanted.by, wanted.parts, list(serials)]).encode())
    for rank, lacking in enumerate(ranks.told_by_all(b"[]")):
        if rank:
            send_images(rank, [read[at] for at in json.loads(lacking)])


class ShareOfScoring:
    """It encodes a rank's share of the images that its trainer scores, and keeps their tokens within a bound."""

    def __init__(self, clip: Clip, decoders: Decoders, cache_bytes: int) -> None:
        self._clip = clip
        self._decoders = decoders
        self._free_bytes = cache_bytes
        self._tokens: dict[int, Tensor] = {}
        """Serial number -> tokens of an image. A rank lives no longer than the trainer that counts these numbers."""

    @torch.no_grad()
    def encode(self, method: Method, module: InferenceModule | None) -> None:
        """Do this rank's part of what rank 0 has to `ask` for now. module: what `method.inference_module()` gives."""
        by, parts, serials = json.loads(ranks.told())
        wanted, owners = Wanted(by, tuple(parts)), torch.tensor(serials) % ranks.size()
        mine = (owners == ranks.rank()).nonzero().squeeze(1).tolist()
        lacking = [at for at in mine if serials[at] not in self._tokens]
        ranks.told_by_all(json.dumps(lacking).encode())
        loaded = load_tokens(
            [partial(bytes, image) for image in received_images()],
            self._clip,
            decoders=self._decoders,
            cache_bytes=sys.maxsize,  # one batch of the trainer's, always in memory
            scratch=Path(),
        )
        failed = failed_anywhere({lacking[at]: error for at, error in loaded.failed})
        good = [at for at in range(len(serials)) if at not in failed]
        if not good:
            return
        rows = loaded.tokens.batch(torch.arange(len(loaded.kept)))
        new = dict(zip((serials[lacking[at]] for at in loaded.kept), rows, strict=True))
        known = self._tokens | new
        tokens = [known[serials[at]] for at in mine if at not in failed]
        # A rank that has none of the images computes the shape of what it does not give.
        made = wanted.encode(torch.stack(tokens) if tokens else blank(self._clip), self._clip, method, module)
        for part in wanted.parts:
            ranks.collected(made[part], owners[good])
        for serial, row in new.items():
            if row.nbytes <= self._free_bytes:
                self._free_bytes -= row.nbytes
                self._tokens[serial] = row.clone()
