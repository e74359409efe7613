"""One update over several processes (ranks): what each of them computes, and how all come to the same result.

Every rank runs the same code, knows every label and draws the same random numbers; only an image's tokens are on one
rank alone, its owner. A batch is the same one that a single process draws: each rank computes with the images of it
that it owns, and gradients are added up, weighted so that they are those of the mean over the whole batch. What is
scored after it rank 0 alone decides (agent.sharing.scores). In a single process every function here gives what it was
given.

Ranks exchange tensors alone, by torch.distributed's default group: nothing that arrives is ever unpickled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class RankGone(Exception):
    """Another rank has ended, or has kept this one waiting for too long."""


class Owned(Protocol):
    """It has the tokens of images, or those of them that this rank owns."""

    @property
    def owners(self) -> Tensor | None:
        """The rank of each image, int64 [N] on the CPU; None where this process has all of them."""

    def batch(self, index: Tensor) -> Tensor:
        """Fetch the tokens of images that this rank has: int64 [B] -> [B, tokens, width]."""


def size() -> int:
    """Give the number of ranks; 1 in a single process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Give this process's number among the ranks; 0 in a single process."""
    return dist.get_rank() if size() > 1 else 0


@contextmanager
def group(store: dist.Store, rank: int, size: int, timeout_s: float, device: torch.device) -> Iterator[None]:
    """Be one of `size` ranks for as long as the block runs; they find each other by `store`.

    A collective in which another rank is missing for `timeout_s`, or has gone, raises RankGone. Tensors on `device`
    travel by NCCL where it is a CUDA device, all others by Gloo.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    backend, timeout = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(seconds=timeout_s)
    _timed(dist.init_process_group, backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


_waited_s = 0.0
"""Seconds this process has spent in collectives; see `waited_s`."""


def waited_s() -> float:
    """Give the seconds this process has spent in collectives so far: moving data, and waiting for other ranks.

    On a GPU, whose collectives return before they are done, these are only those in which the CPU waited.
    """
    return _waited_s


def _timed(collective: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    global _waited_s
    started = time.perf_counter()
    try:
        collective(*arguments, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch has no class of its own for what Gloo says of a peer
        raise RankGone(str(error)) from error
    _waited_s += time.perf_counter() - started


def summed(tensor: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place: every rank has the sum, with the same bits."""
    if size() > 1:
        _timed(dist.all_reduce, tensor)
    return tensor


def agreed(values: Sequence[float]) -> list[float]:
    """Give rank 0's values on every rank, so that what is decided by them is decided alike."""
    if size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    _timed(dist.broadcast, tensor, src=0)
    return tensor.tolist()


def from_first(tensor: Tensor) -> Tensor:
    """Fill a tensor with rank 0's, in place; all ranks give one of the same shape and dtype."""
    if size() > 1:
        _timed(dist.broadcast, tensor, src=0)
    return tensor


def told(data: bytes = b"") -> bytes:
    """Give rank 0's `data` on every rank."""
    length = from_first(torch.tensor(len(data)))
    return _as_bytes(from_first(_as_tensor(data, int(length))), int(length))


def told_by_all(data: bytes) -> list[bytes]:
    """Give every rank's `data` on every rank, in their order."""
    if size() == 1:
        return [data]
    lengths = gathered(torch.tensor([len(data)]), torch.arange(size())).tolist()
    rows = gathered(_as_tensor(data, max(lengths))[None], torch.arange(size()))
    return [_as_bytes(row, length) for row, length in zip(rows, lengths, strict=True)]


def send(to: int, data: bytes) -> None:
    """Send `data` to one rank, which has to `receive` it now."""
    _timed(dist.send, torch.tensor(len(data)), to)
    _timed(dist.send, _as_tensor(data, len(data)), to)


def receive() -> bytes:
    """Receive what rank 0 sends to this one."""
    length = torch.tensor(0)
    _timed(dist.recv, length, 0)
    data = _as_tensor(b"", int(length))
    _timed(dist.recv, data, 0)
    return _as_bytes(data, int(length))


def _as_tensor(data: bytes, length: int) -> Tensor:
    """Put bytes into a tensor of `length` and at least 1, uint8; what is missing is 0."""
    return torch.frombuffer(bytearray(data.ljust(max(1, length), b"\0")), dtype=torch.uint8)


def _as_bytes(tensor: Tensor, length: int) -> bytes:
    return tensor[:length].numpy().tobytes()


def dealt(count: int) -> Tensor | None:
    """Deal out what every rank has all of: the owner of each of `count` things, int64 [count]; None in a single
    process."""
    return torch.arange(count) % size() if size() > 1 else None


def mine(tokens: Owned, index: Tensor) -> Tensor:
    """Give those of some images, int64 [B], that this rank is to compute with, in the same order."""
    if size() == 1 or tokens.owners is None:
        return index
    return index[tokens.owners[index] == rank()]


def gathered(rows: Tensor, owners: Tensor) -> Tensor:
    """Bring together rows that ranks have computed: [n, ...] of this one, in order -> [N, ...] on every rank.

    owners: the rank that has each of the N rows, int64 [N] on the CPU. A rank that has none gives a row all the same,
    for its shape; it is not used.
    """
    padded = _padded(rows, owners)
    parts = [torch.empty_like(padded) for _ in range(size())]
    _timed(dist.all_gather, parts, padded)
    return _in_order(parts, owners)


def collected(rows: Tensor, owners: Tensor) -> Tensor:
    """Bring together what `gathered` does on rank 0 alone, where every rank's rows cross the network once; another rank
    gets back its own."""
    if size() == 1:
        return rows
    padded = _padded(rows, owners)
    parts = [torch.empty_like(padded) for _ in range(size())] if rank() == 0 else None
    _timed(dist.gather, padded, parts)
    return rows if parts is None else _in_order(parts, owners)


def _padded(rows: Tensor, owners: Tensor) -> Tensor:
    """Give as many rows as the rank with most of them has, and at least one: those of this rank, and zeros."""
    counts = owners.bincount(minlength=size()).tolist()
    padded = rows.new_zeros(max(1, *counts), *rows.shape[1:])
    own = counts[rank()]
    padded[:own] = rows[:own]
    return padded


def _in_order(parts: Sequence[Tensor], owners: Tensor) -> Tensor:
    """Put every rank's rows to where their owner is in `owners`."""
    whole = parts[0].new_empty(len(owners), *parts[0].shape[1:])
    for number, part in enumerate(parts):
        here = owners == number
        whole[here.to(whole.device)] = part[: int(here.sum())]
    return whole


def encoded(tokens: Owned, index: Tensor, encode: Callable[[Tensor], Tensor], batch: int) -> Tensor:
    """Encode some images, int64 [N], each on the rank that owns it: `encode` of [B, tokens, width] gives [B, ...], this
    gives [N, ...] in the order of `index` on every rank."""
    if size() == 1 or tokens.owners is None:
        return torch.cat([encode(tokens.batch(part)) for part in index.split(batch)])
    here = mine(tokens, index)
    some = here if len(here) else index[:1]  # one that is elsewhere gives the shape
    return gathered(torch.cat([encode(tokens.batch(part)) for part in some.split(batch)]), tokens.owners[index])


def of_all(tokens: Owned, index: Tensor, rows: Tensor) -> Tensor:
    """Bring together what ranks computed of the images `index`, int64 [N]: rows [n, ...] of those that this rank owns,
    in order -> [N, ...] on every rank."""
    return rows if size() == 1 or tokens.owners is None else gathered(rows, tokens.owners[index])


@dataclass(frozen=True)
class Part:
    """It says which images of a batch this rank computes with.

    A rank that owns none of them goes along with one that does not count, so that all ranks take the same steps.
    """

    images: int
    """The images of the batch, over all ranks."""
    places: Tensor | None = None
    """Where this rank's images are in the batch, int64 [n]; None where it has all of them."""
    owners: Tensor | None = None
    """The rank of each of the batch's images, int64 [images]; None with `places`."""

    @property
    def share(self) -> float:
        """The share of the batch's images that this rank has, 0 to 1."""
        return 1.0 if self.places is None else len(self.places) / self.images

    def of(self, rows: Tensor) -> Tensor:
        """Choose this rank's of rows that are for the whole batch, [images, ...]: never none."""
        if self.places is None:
            return rows
        return rows[(self.places if len(self.places) else torch.zeros(1, dtype=torch.int64)).to(rows.device)]

    def mean(self, rows: Tensor) -> Tensor:
        """Give the mean over the whole batch of this rank's rows [n, ...], which have no gradient."""
        if self.places is None:
            return rows.mean(0)
        return summed(rows[: len(self.places)].sum(0)) / self.images

    def whole(self, rows: Tensor) -> Tensor:
        """Bring the rows [n, D] of all ranks together, [images, D], for a loss that compares the batch's images.

        Differentiable in this rank's own, for a loss that `backward` weighs: what every rank computes of the whole
        batch counts with its share of the images, and the gradient of its rows is as much larger.
        """
        if self.places is None or self.owners is None:
            return rows
        return _Whole.apply(rows, self)


class _Whole(torch.autograd.Function):
    """It is `Part.whole`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, part: Part) -> Tensor:
        assert part.owners is not None
        ctx.part = part
        return gathered(rows.detach(), part.owners)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.part.of(gradients[0]) / ctx.part.share, None


def part(tokens: Owned, index: Tensor) -> Part:
    """Say which images of the batch `index`, int64 [B], are this rank's."""
    if size() == 1 or tokens.owners is None:
        return Part(len(index))
    owners = tokens.owners[index]
    return Part(len(index), (owners == rank()).nonzero().squeeze(1), owners)


def backward(loss: Tensor, parameters: Sequence[Tensor], part: Part) -> Tensor:
    """Compute the gradients of the mean of `loss` over the whole batch, and give that mean, detached.

    loss: the mean over this rank's images, a scalar. Parameters on which no rank's loss depends get no gradient.
    """
    if part.places is None:
        loss.backward()
        return loss.detach()
    if part.share:
        (part.share * loss).backward()
    # One buffer for everything: a collective costs a round trip, however little it carries.
    trained = [0.0 if weight.grad is None else 1.0 for weight in parameters]
    flat = [torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in parameters]
    mean = part.share * loss.detach() if part.share else torch.zeros_like(loss)
    told = torch.tensor(trained, dtype=loss.dtype, device=loss.device)
    buffer = summed(torch.cat([mean.reshape(1), told, *flat]))
    mean, told, gradients = buffer.split([1, len(trained), len(buffer) - 1 - len(trained)])
    for weight, used, gradient in zip(
        parameters, told.tolist(), gradients.split([w.numel() for w in parameters]), strict=True
    ):
        weight.grad = gradient.view_as(weight).clone() if used else None
    return mean.squeeze(0)
