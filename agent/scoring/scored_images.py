"""Test images: where they are, the untouched model's embeddings of them, and more of them as far as memory allows.

Scoring meets the same images after every task. Their embeddings by the untouched model never change and are small, so
they are kept for all. What a model's towers make of them is kept until the towers change, for which tokens (the output
of the frozen part, many times larger) give way: with both at hand an image costs the classifier alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from agent.methods.base import InferenceModule
from agent.model.clip import Clip
from agent.model.images import LoadedImages, load_tokens
from agent.scoring.holdout import ImageRef
from exporter.decoders import Decoders
from exporter.image_header import ImageError
from exporter.tensors import Unchanged
from streams.record import Unusable

log = logging.getLogger(__name__)


class EvaluationError(Exception):
    """A model cannot be scored; the message says which image is the reason."""


class ImageFolder(Protocol):
    """It has test images by class (streams.archive_folder.ArchiveFolder)."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def images(self, class_name: str, limit: int = 0) -> Sequence[ImageFile]:
        """Give the images of a class, always in the same order; at most `limit`, or all of them (0)."""


class ImageFile(Protocol):
    """It is an encoded image in such a folder; `read` raises Unusable when it cannot be had."""

    @property
    def name(self) -> str: ...

    def read(self) -> bytes: ...


class ScoredImages:
    """It has test images by number: where they are, the untouched model's embeddings, and what else of them fits."""

    def __init__(self, clip: Clip, batch_size: int, decoders: Decoders, cache_bytes: int) -> None:
        self.refs: list[ImageRef] = []
        self.embeddings = torch.zeros(0, clip.embed_dim)
        """float32 [n, D], L2-normalised, on the CPU."""
        self._clip = clip
        self._batch_size = batch_size
        self._decoders = decoders
        self._free_bytes = cache_bytes
        self._tokens: dict[int, Tensor] = {}
        self._encoded: dict[str, dict[int, Tensor]] = {}
        """Part (see InferenceModule.parts) -> number -> what the current towers made of that image."""
        self._same_towers: dict[str, Unchanged] = {}

    def add(self, refs: Sequence[ImageRef], tick: Callable[[], None]) -> list[int]:
        """Decode and embed new images, with a `tick` after each batch.

        Gives the numbers of those that can be decoded, in order; the others are left out with a warning.
        """
        first = len(self.refs)
        embeddings = [self.embeddings]
        for at in range(0, len(refs), self._batch_size):
            part = refs[at : at + self._batch_size]
            loaded = self._load(part, tick)
            tick()
            for index, error in loaded.failed:
                log.warning("test image %s of %r is left out: %s", part[index].key, part[index].label, error)
            if not loaded.kept:
                continue
            tokens = loaded.tokens.batch(torch.arange(len(loaded.kept)))
            embeddings.append(self._clip.encode_tokens(tokens).cpu())
            if tokens.nbytes <= self._free_bytes:
                self._free_bytes -= tokens.nbytes
                # Copies, each in memory of its own, so that giving one up gives its memory back.
                self._tokens |= enumerate((one.clone() for one in tokens), len(self.refs))
            self.refs += [part[index] for index in loaded.kept]
        self.embeddings = torch.cat(embeddings)
        return list(range(first, len(self.refs)))

    def batches(self, numbers: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Give (numbers, tokens [B, tokens, width] on the device) of the images asked for, in order.

        Raises EvaluationError when an image that was decoded once cannot be decoded any more.
        """
        for at in range(0, len(numbers), self._batch_size):
            part = list(numbers[at : at + self._batch_size])
            yield part, self._tokens_of(part)

    def encoded(self, numbers: Sequence[int], module: InferenceModule) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Give (numbers, all parts that `module.encode` makes of them) of the images asked for, in order.

        A part of an image is made again only when the tensors that it hangs on are not those of the call before, or
        when memory did not reach. Raises EvaluationError as `batches` does.
        """
        for part in module.parts:
            if not self._same_towers.setdefault(part, Unchanged())(module.encoder(part)):
                self._free_bytes += sum(row.nbytes for row in self._encoded.get(part, {}).values())
                self._encoded[part] = {}
        for at in range(0, len(numbers), self._batch_size):
            here = list(numbers[at : at + self._batch_size])
            known = {part: {n: rows[n] for n in here if n in rows} for part, rows in self._encoded.items()}
            lacking: dict[tuple[str, ...], list[int]] = {}
            for number in here:
                lacking.setdefault(tuple(part for part in module.parts if number not in known[part]), []).append(number)
            for parts, absent in lacking.items():
                # In float32 whatever model.precision says: the module is scored as it is released.
                made = module.encode(self._tokens_of(absent).float(), parts) if parts else {}
                for part, rows in made.items():
                    known[part] |= zip(absent, rows, strict=True)
                    self._keep(part, absent, rows)
            yield here, {part: torch.stack([known[part][n] for n in here]) for part in module.parts}

    def _keep(self, part: str, numbers: Sequence[int], rows: Tensor) -> None:
        """Keep what was encoded, as far as there is room when the tokens taken in last have given way."""
        for number, row in zip(numbers, rows, strict=True):
            while row.nbytes > self._free_bytes and self._tokens:
                self._free_bytes += self._tokens.popitem()[1].nbytes
            if row.nbytes > self._free_bytes:
                return
            self._free_bytes -= row.nbytes
            self._encoded[part][number] = row.clone()

    def _tokens_of(self, part: Sequence[int]) -> Tensor:
        """Give the tokens [B, tokens, width] of some images; what is not in memory is decoded again."""
        absent = [number for number in part if number not in self._tokens]
        again: dict[int, Tensor] = {}
        if absent:
            loaded = self._load([self.refs[number] for number in absent])
            if loaded.failed:
                index, error = loaded.failed[0]
                raise EvaluationError(
                    f"test image {self.refs[absent[index]].key} could be read before but not now: {error}"
                )
            again = dict(zip(absent, loaded.tokens.batch(torch.arange(len(absent))), strict=True))
        return torch.stack([self._tokens[n] if n in self._tokens else again[n] for n in part])

    def _load(self, refs: Sequence[ImageRef], tick: Callable[[], None] = lambda: None) -> LoadedImages:
        return load_tokens(
            [ref.read for ref in refs],
            self._clip,
            decoders=self._decoders,
            cache_bytes=sys.maxsize,  # a batch at a time, always in memory
            scratch=Path(),
            advance=lambda done: tick(),
        )


def image_refs(folder: ImageFolder, label: str, limit: int) -> list[ImageRef]:
    """List at most `limit` images of each of the folder's classes that differ from `label` at most in case: a stream
    keeps the spelling that it saw first."""
    same = [name for name in folder.classes if name.casefold() == label.casefold()]
    files = [(name, file) for name in same for file in folder.images(name, limit)]
    return [ImageRef(label, f"{name}/{file.name}", partial(_read, file)) for name, file in files]


def _read(file: ImageFile) -> bytes:
    """Read a file; what cannot be had is treated like what cannot be decoded."""
    try:
        return file.read()
    except Unusable as error:
        raise ImageError("undecodable", str(error)) from error
