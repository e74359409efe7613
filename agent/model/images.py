"""Encoded images in, tokens out: decoded once, passed through the frozen part once, kept within a memory bound."""

from __future__ import annotations

import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from agent.model import ranks
from agent.model.clip import Clip
from agent.model.ranks import Part
from exporter.decoders import Decoders
from exporter.image_header import ImageError

CHUNK = 16
"""Images decoded and encoded together: so few that a convolution's activations stay in a core's cache. Together with
one thread per core and folded batch norms that made tinyclip's trunk about 4 times as fast as the plain forward."""

_TICK_S = 2.0
"""Seconds after which a chunk that is waited for is looked at again. Images that are made to be slow take many seconds
each, which must not make the trainer silent (agent.trainer_silent_s)."""


WIDER = 8 / 7
"""Images that are cropped at random are made larger than the model's input by this factor: 256 of 224 pixels, as in the
published code of VR-LwF."""


class CroppedImages:
    """It encodes images anew whenever they are asked for, each cropped and mirrored at random."""

    def __init__(self, read: Sequence[Callable[[], bytes]], clip: Clip, decoders: Decoders) -> None:
        """`read` gives the encoded images, none of which failed to be decoded before."""
        self._read = read
        self._clip = clip
        self._decoders = decoders

    def batch(self, index: Tensor, generator: torch.Generator, part: Part | None = None) -> Tensor:
        """Encode some images: index int64 [B] -> float [B, tokens, width] on the device. Of the centre's square each is
        a random part of the model's size, mirrored with probability 1/2. Where they are `part` of a batch, the draws
        are for the whole batch. Raises ImageError, DecodersError."""
        whole = part or Part(len(index))
        size = self._clip.preprocess.size
        wider = replace(self._clip.preprocess, size=round(size * WIDER))
        room = wider.size - size + 1
        drawn = [
            whole.of(torch.randint(bound, (whole.images,), generator=generator)).tolist() for bound in (room, room, 2)
        ]
        crops = []
        decoded = self._decoders.pixels((self._read[at]() for at in index.tolist()), wider)
        for image, top, left, mirrored in zip(decoded, *drawn, strict=True):
            if isinstance(image, ImageError):
                raise image
            crop = torch.from_numpy(image[:, top : top + size, left : left + size])
            crops.append(crop.flip(-1) if mirrored else crop)
        return torch.cat([self._clip.prefix(chunk) for chunk in torch.stack(crops).split(CHUNK)])


class StoredTokens:
    """It has the tokens of N images in one tensor: in memory (a GPU's where there is one) or mapped from a file without
    a name."""

    owners: Tensor | None = None

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self._tensor = tensor
        self._device = device

    def __len__(self) -> int:
        return len(self._tensor)

    def batch(self, index: Tensor) -> Tensor:
        """Fetch the tokens of some images: index int64 [B] -> float [B, tokens, width] on the device."""
        return self._tensor[index.to(self._tensor.device)].to(self._device, non_blocking=True)


class TokensOfRank:
    """It has the tokens of those of N images that this rank owns, and of the others blank ones."""

    def __init__(self, own: StoredTokens, owners: Tensor, rank: int, clip: Clip) -> None:
        """own: tokens of this rank's images, in the order of the N; owners: the rank of each, int64 [N]."""
        self.owners: Tensor | None = owners
        self._own = own
        here = owners == rank
        self._place = torch.where(here, here.cumsum(0) - 1, -1)
        self._clip = clip

    def __len__(self) -> int:
        return len(self._place)

    def batch(self, index: Tensor) -> Tensor:
        """Fetch the tokens of some images, see StoredTokens.batch. Those of an image that another rank owns stand for
        nothing (see ranks.Part): all of its pixels are 0."""
        place = self._place[index.cpu()]
        if (place >= 0).all():
            return self._own.batch(place)
        return blank(self._clip).expand(len(index), -1, -1)


def blank(clip: Clip) -> Tensor:
    """Give the tokens of an image whose pixels are all 0, float [1, tokens, width] on the device."""
    size = clip.preprocess.size
    return clip.prefix(torch.zeros(1, 3, size, size))


class Batches(Protocol):
    """It fetches tokens, as StoredTokens does."""

    @property
    def owners(self) -> Tensor | None:
        """See agent.model.ranks.Owned."""

    def batch(self, index: Tensor) -> Tensor:
        """See StoredTokens.batch."""


class TokensAt:
    """It has some rows of other tokens, in the order of `rows` (int64 [N])."""

    def __init__(self, tokens: Batches, rows: Tensor) -> None:
        self._tokens = tokens
        self._rows = rows

    @property
    def owners(self) -> Tensor | None:
        """The rank of each row, see agent.model.ranks.Owned."""
        owners = self._tokens.owners
        return None if owners is None else owners[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, index: Tensor) -> Tensor:
        """Fetch some of the rows, see StoredTokens.batch."""
        return self._tokens.batch(self._rows[index.to(self._rows.device)])


@dataclass(frozen=True)
class LoadedImages:
    """What became of the images that were asked for."""

    tokens: StoredTokens | TokensOfRank
    """Of an update that several ranks share, those of this one."""
    kept: tuple[int, ...]
    """The index of each row of `tokens` in what was asked for."""
    failed: tuple[tuple[int, ImageError], ...]
    """The index of each image that could not be decoded, and why."""


def load_tokens(
    read: Sequence[Callable[[], bytes]],
    clip: Clip,
    *,
    decoders: Decoders,
    cache_bytes: int,
    scratch: Path,
    advance: Callable[[int], None] = lambda done: None,
) -> LoadedImages:
    """Decode, preprocess and encode every image once. Memory: `cache_bytes` plus a few chunks of images.

    What `read` cannot give raises ImageError.
    When all tokens together exceed `cache_bytes` they go to a file in `scratch` that has no name any more once it is
    open, so nothing is left behind whatever happens. `advance(done)` is called after every chunk, and every few seconds
    as long as images are decoded. Raises DecodersError.
    """
    kept: list[int] = []
    failed: list[tuple[int, ImageError]] = []
    store: Tensor | None = None
    done = 0
    for images in _chunks(read, clip, decoders, lambda: advance(len(kept) + len(failed))):
        good = []
        for image in images:
            if isinstance(image, ImageError):
                failed.append((done, image))
            else:
                kept.append(done)
                good.append(image)
            done += 1
        if good:
            tokens = torch.stack(good)
            if clip.device.type != "cpu":
                tokens = clip.prefix(tokens)
            if store is None:
                store = _allocate((len(read), *tokens.shape[1:]), tokens.dtype, clip.device, cache_bytes, scratch)
            store[len(kept) - len(good) : len(kept)] = tokens
        advance(done)
    tokens = torch.empty(0, 1, 1) if store is None else store[: len(kept)]
    return LoadedImages(StoredTokens(tokens, clip.device), tuple(kept), tuple(failed))


def failed_anywhere(own: Mapping[int, ImageError]) -> dict[int, ImageError]:
    """Give the images that any rank could not decode, by number and in order, and why; `own` are those of this one."""
    told = ranks.told_by_all(json.dumps([(at, str(error.reason), error.detail) for at, error in own.items()]).encode())
    return dict(sorted((at, ImageError(reason, detail)) for one in told for at, reason, detail in json.loads(one)))


def _chunks(
    read: Sequence[Callable[[], bytes]], clip: Clip, decoders: Decoders, tick: Callable[[], None]
) -> Iterator[list[Tensor | ImageError]]:
    """Yield chunk after chunk, in order, worked on by one thread per core; images for a GPU, tokens on a CPU.

    On a CPU each chunk is encoded by a single thread: faster than splitting every small convolution over the cores, and
    the result does not depend on how many there are. `tick()` is called while one is waited for and images are decoded.
    """
    decoded = 0

    def chunk(readers: Sequence[Callable[[], bytes]]) -> list[Tensor | ImageError]:
        nonlocal decoded
        images = []
        for image in decoders.pixels((_encoded(reader) for reader in readers), clip.preprocess):
            images.append(image)
            decoded += 1  # of several threads; that one may be lost does not matter
        good = [torch.from_numpy(image) for image in images if not isinstance(image, ImageError)]
        if good and clip.device.type == "cpu":
            good = list(clip.prefix(torch.stack(good)))
        done = iter(good)
        return [image if isinstance(image, ImageError) else next(done) for image in images]

    def result(waiting: Future[list[Tensor | ImageError]]) -> list[Tensor | ImageError]:
        seen = decoded
        while not wait([waiting], _TICK_S).done:
            if decoded != seen:
                tick()
            seen = decoded
        return waiting.result()

    # Chosen by hand: for a GPU threads only wait for decoders, and larger chunks make fewer calls. 8 threads at most,
    # and 2 * threads chunks ahead of the consumer, bound the memory of images in flight; more helps with more cores.
    size = CHUNK if clip.device.type == "cpu" else 4 * CHUNK
    cores = torch.get_num_threads()
    threads = min(8, cores if clip.device.type == "cpu" else os.cpu_count() or 1)
    pending: deque[Future[list[Tensor | ImageError]]] = deque()
    # the setting is per calling thread, so training in the main thread keeps all cores
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for start in range(0, len(read), size):
            pending.append(pool.submit(chunk, read[start : start + size]))
            if len(pending) > 2 * threads:
                yield result(pending.popleft())
        while pending:
            yield result(pending.popleft())
    torch.set_num_threads(cores)  # what libraries read back must be the main thread's


def _encoded(reader: Callable[[], bytes]) -> bytes | ImageError:
    try:
        return reader()
    except ImageError as error:
        return error


def _allocate(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, cache_bytes: int, scratch: Path
) -> Tensor:
    count = int(np.prod(shape))
    if count * dtype.itemsize <= cache_bytes:
        return torch.empty(shape, dtype=dtype, device=device)
    scratch.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix="tokens-", dir=scratch)
    try:
        # reserves the space: a disk that is full says so here, and not by a signal in the middle of a copy
        os.posix_fallocate(handle, 0, count * dtype.itemsize)
        return torch.from_file(name, shared=True, size=count, dtype=dtype).reshape(shape)
    finally:
        os.close(handle)
        Path(name).unlink()
