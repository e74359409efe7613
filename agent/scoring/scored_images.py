"""Test images: where they are, the untouched model's embeddings of them, and more of them as far as memory allows.

Scoring meets the same images after every task. Their embeddings by the untouched model never change and are small, so
they are kept for all. What a model's towers make of them is kept until the towers change, for which tokens (the output
of the frozen part, many times larger) give way: with both at hand an image costs the classifier alone.

Where several ranks share a task, each encodes the images whose serial number falls to it, and keeps their tokens; what
is made of them comes to rank 0. Every batch is that many times larger then, so that each rank has about one of them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from agent.methods.base import InferenceModule, Method
from agent.model import ranks
from agent.model.clip import Clip
from agent.model.images import LoadedImages, blank, failed_anywhere, load_tokens
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


@dataclass(frozen=True)
class Wanted:
    """It says what images are to be encoded to, in words that go to other ranks."""

    by: Literal["clip", "method", "module"]
    """By the untouched model, a method as it is now, or the module that is released."""
    parts: tuple[str, ...] = ("embedding",)
    """For a module those of its `parts` that are wanted."""

    def encode(
        self, tokens: Tensor, clip: Clip, method: Method | None = None, module: InferenceModule | None = None
    ) -> dict[str, Tensor]:
        """Encode tokens [B, tokens, width] to what is wanted: part -> rows [B, ...]."""
        if self.by == "module":
            assert module is not None, "nothing is wanted of a module that is not there yet"
            # In float32 whatever model.precision says: the module is scored as it is released.
            return module.encode(tokens.float(), self.parts)
        encoder = clip if self.by == "clip" else method
        assert encoder is not None, "who wants a method's embeddings has it"
        return {"embedding": encoder.encode_tokens(tokens)}


Ask = Callable[[Wanted, Sequence[int], Sequence[Callable[[], bytes]]], None]
"""Tells other ranks what is wanted of images by serial number, and sends them what they lack (agent.sharing.scores)."""


class ScoredImages:
    """It has test images by number: where they are, the untouched model's embeddings, and what else of them fits."""

    def __init__(
        self, clip: Clip, batch_size: int, decoders: Decoders, cache_bytes: int, ask: Ask | None = None
    ) -> None:
        """ask: needed where several ranks share a task, see agent.model.ranks."""
        self.refs: list[ImageRef] = []
        self.embeddings = torch.zeros(0, clip.embed_dim)
        """float32 [n, D], L2-normalised, on the CPU."""
        self._clip = clip
        self._batch_size = batch_size
        self._decoders = decoders
        self._free_bytes = cache_bytes
        self._ask = ask
        self._serials: list[int] = []
        """The serial number of each image: how many came to be decoded before it."""
        self._offered = 0
        """Images that came to be decoded, also those that cannot be."""
        self._elsewhere: set[int] = set()
        """Numbers of images that only other ranks have decoded so far."""
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
        wanted = Wanted("clip")
        for at in range(0, len(refs), self._together):
            part = refs[at : at + self._together]
            serials = range(self._offered, self._offered + len(part))
            self._offered += len(part)
            here = self._asked(wanted, part, serials)
            loaded = self._load([part[index] for index in here], tick)
            tick()
            failed = failed_anywhere({here[index]: error for index, error in loaded.failed})
            for index, error in failed.items():
                log.warning("test image %s of %r is left out: %s", part[index].key, part[index].label, error)
            kept = [index for index in range(len(part)) if index not in failed]
            if not kept:
                continue
            tokens = loaded.tokens.batch(torch.arange(len(loaded.kept))) if loaded.kept else blank(self._clip)
            rows = wanted.encode(tokens, self._clip)["embedding"]
            embeddings.append(ranks.collected(rows, _owners(serials)[kept]).cpu())
            numbers = {index: number for number, index in enumerate(kept, len(self.refs))}
            own = [numbers[here[index]] for index in loaded.kept]
            if own and tokens.nbytes <= self._free_bytes:
                self._free_bytes -= tokens.nbytes
                # Copies, each in memory of its own, so that giving one up gives its memory back.
                self._tokens |= zip(own, (one.clone() for one in tokens), strict=True)
            self._elsewhere |= set(numbers.values()).difference(own)
            self.refs += [part[index] for index in kept]
            self._serials += [serials[index] for index in kept]
        self.embeddings = torch.cat(embeddings)
        return list(range(first, len(self.refs)))

    def batches(self, numbers: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Give (numbers, tokens [B, tokens, width] on the device) of the images asked for, in order.

        Raises EvaluationError when an image that was decoded once cannot be decoded any more.
        """
        for at in range(0, len(numbers), self._batch_size):
            part = list(numbers[at : at + self._batch_size])
            yield part, self._tokens_of(part)

    def embedded(self, numbers: Sequence[int], method: Method) -> Iterator[Tensor]:
        """Give embeddings [B, D] of the images asked for, in order, by the method's towers as they are now.

        Raises EvaluationError as `batches` does.
        """
        for at in range(0, len(numbers), self._together):
            part = numbers[at : at + self._together]
            yield self._made(Wanted("method"), part, method=method)["embedding"]

    def encoded(self, numbers: Sequence[int], module: InferenceModule) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Give (numbers, all parts that `module.encode` makes of them) of the images asked for, in order.

        A part of an image is made again only when the tensors that it hangs on are not those of the call before, or
        when memory did not reach. Raises EvaluationError as `batches` does.
        """
        for part in module.parts:
            if not self._same_towers.setdefault(part, Unchanged())(module.encoder(part)):
                self._free_bytes += sum(row.nbytes for row in self._encoded.get(part, {}).values())
                self._encoded[part] = {}
        for at in range(0, len(numbers), self._together):
            here = list(numbers[at : at + self._together])
            known = {part: {n: rows[n] for n in here if n in rows} for part, rows in self._encoded.items()}
            lacking: dict[tuple[str, ...], list[int]] = {}
            for number in here:
                lacking.setdefault(tuple(part for part in module.parts if number not in known[part]), []).append(number)
            for parts, absent in lacking.items():
                made = self._made(Wanted("module", parts), absent, module=module) if parts else {}
                for part, rows in made.items():
                    known[part] |= zip(absent, rows, strict=True)
                    self._keep(part, absent, rows)
            yield here, {part: torch.stack([known[part][n] for n in here]) for part in module.parts}

    @property
    def _together(self) -> int:
        """The number of images that all ranks encode together at once."""
        return self._batch_size * ranks.size()

    def _made(
        self,
        wanted: Wanted,
        numbers: Sequence[int],
        method: Method | None = None,
        module: InferenceModule | None = None,
    ) -> dict[str, Tensor]:
        """Encode images, each on the rank whose it is: part -> rows [B, ...] in their order."""
        serials = [self._serials[number] for number in numbers]
        here = self._asked(wanted, [self.refs[number] for number in numbers], serials)
        tokens = self._tokens_of([numbers[index] for index in here]) if here else blank(self._clip)
        for index, error in failed_anywhere({}).items():
            raise self._lost(numbers[index], error)
        made = wanted.encode(tokens, self._clip, method, module)
        return {part: ranks.collected(made[part], _owners(serials)) for part in wanted.parts}

    def _asked(self, wanted: Wanted, refs: Sequence[ImageRef], serials: Sequence[int]) -> list[int]:
        """Ask other ranks to encode their share of some images; gives the indices of those that are left for this one.

        All ranks go on with `failed_anywhere`, and then `ranks.collected` for every part.
        """
        if ranks.size() > 1:
            assert self._ask is not None, "a trainer with other ranks can ask them"
            self._ask(wanted, serials, [ref.read for ref in refs])
        return (_owners(serials) == 0).nonzero().squeeze(1).tolist()

    def _lost(self, number: int, error: ImageError) -> EvaluationError:
        return EvaluationError(f"test image {self.refs[number].key} could be read before but not now: {error}")

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
                raise self._lost(absent[index], error)
            again = dict(zip(absent, loaded.tokens.batch(torch.arange(len(absent))), strict=True))
            for number in self._elsewhere.intersection(absent):
                if again[number].nbytes <= self._free_bytes:
                    self._free_bytes -= again[number].nbytes
                    self._tokens[number] = again[number].clone()
                    self._elsewhere.remove(number)
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


def _owners(serials: Sequence[int]) -> Tensor:
    """Give the rank whose each image is, int64 [B]."""
    return torch.tensor(serials, dtype=torch.int64) % ranks.size()


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
