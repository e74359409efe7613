"""What the trainer and its ranks do together with a task before they learn it, both sides side by side.

Everything goes by tensors of torch.distributed: JSON as bytes, encoded images as bytes, the learner's own tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata

import torch

from agent.config import Config
from agent.methods.base import LearnerState, TaskData
from agent.model import ranks
from agent.model.clip import Clip
from agent.model.images import CroppedImages, LoadedImages, StoredTokens, TokensAt, TokensOfRank, failed_anywhere
from exporter.decoders import Decoders
from exporter.image_header import ImageError

_PACKAGES = ("gapstream", "torch", "open_clip_torch", "timm", "pillow")
"""Packages of which ranks must have the same versions, since they compute, or decode, with them."""

CHUNK_BYTES = 32 * 2**20
"""Encoded images go out about this many bytes at a time: chosen by hand, what both sides need of memory beside the
images themselves."""

_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.int64)}
"""Types of tensors in a learner's state by name."""


def terms(config: Config, clip: Clip) -> dict[str, str]:
    """Tell what all ranks of an update must have in common: versions, model, arithmetic, method and its settings."""
    method = config.method
    section = getattr(method, method.name, None)
    settings = {"name": method.name, "seed": method.seed, **{f"lora.{k}": v for k, v in method.lora}}
    settings |= {f"{method.name}.{key}": value for key, value in section or ()}
    return {
        **{name: metadata.version(name) for name in _PACKAGES},
        **{f"model.{key}": clip.identity[key] for key in ("name", "sha256", "prompt")},
        "model.precision": config.model.precision,
        "kind of device": clip.device.type,
        "source.max_image_pixels": str(config.source.max_image_pixels),
        **{f"method.{key}": str(value) for key, value in settings.items()},
    }


def give(number: int, state: LearnerState, read: Sequence[Callable[[], bytes]]) -> None:
    """Give all ranks the learner as it is and the number of the task, and each its share of the encoded images.

    read: what gives each image of the task. One that cannot be read (ImageError) is an empty one to its rank.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    head = {
        "task": number,
        "images": len(read),
        "values": dict(state.values),
        "tensors": {name: (str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()},
    }
    ranks.told(json.dumps(head).encode())
    for tensor in tensors.values():
        ranks.from_first(tensor)
    for rank in range(1, ranks.size()):
        send_images(rank, [read[at] for at in share(len(read), rank)])


def take(device: torch.device) -> tuple[int, LearnerState, list[bytes | None]]:
    """Take what `give` gives: the task's number, the learner, and the encoded images; None for those of others."""
    head = json.loads(ranks.told())
    tensors = {}
    for name, (dtype, shape) in head["tensors"].items():
        tensors[name] = ranks.from_first(torch.empty(shape, dtype=_DTYPES[dtype])).to(device)
    images: list[bytes | None] = [None] * head["images"]
    for at, image in zip(share(len(images), ranks.rank()), received_images(), strict=True):
        images[at] = image
    return head["task"], LearnerState(tensors, head["values"]), images


def send_images(rank: int, read: Iterable[Callable[[], bytes]]) -> None:
    """Send encoded images to a rank, which has to take all of them from `received_images` now. One that cannot be read
    (ImageError) is an empty one to it."""
    chunk: list[bytes] = []
    for one in read:
        chunk.append(_read(one))
        if sum(map(len, chunk)) >= CHUNK_BYTES:
            _send(rank, chunk)
            chunk = []
    if chunk:
        _send(rank, chunk)
    _send(rank, [])  # that was all


def received_images() -> Iterator[bytes]:
    """Receive what rank 0 sends to this one by `send_images`, image after image."""
    while lengths := json.loads(ranks.receive()):
        data, start = ranks.receive(), 0
        for length in lengths:
            yield data[start : start + length]
            start += length


@dataclass(frozen=True)
class Rows:
    """They are the images of a task that are learned: all that ranks must know of it beside the images themselves."""

    classes: tuple[str, ...]
    """Class names among them, in order of first appearance."""
    labels: tuple[int, ...]
    """The class of each, an index into `classes`."""
    kept: tuple[int, ...]
    """Where each is among the images that could be decoded."""

    @classmethod
    def of(cls, classes: Sequence[str], labels: Sequence[str], kept: Sequence[int]) -> Rows:
        """classes: those of the task, in order of first appearance; labels: of the images that could be decoded; kept:
        which of these are learned."""
        present = {labels[i] for i in kept}
        names = tuple(name for name in classes if name in present)
        number = {name: i for i, name in enumerate(names)}
        return cls(names, tuple(number[labels[i]] for i in kept), tuple(kept))

    def data(
        self, number: int, loaded: LoadedImages, read: Sequence[Callable[[], bytes]], clip: Clip, decoders: Decoders
    ) -> TaskData:
        """Give them as a method sees them. read: what gives each encoded image of the task, also those that could not
        be decoded."""
        tokens = TokensAt(loaded.tokens, torch.tensor(self.kept, dtype=torch.int64))
        cropped = CroppedImages([read[loaded.kept[row]] for row in self.kept], clip, decoders)
        return TaskData(number, self.classes, torch.tensor(self.labels, dtype=torch.int64), tokens, cropped)

    def to_json(self) -> bytes:
        """Write it for other ranks."""
        return json.dumps([self.classes, self.labels, self.kept]).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Rows:
        """Read what `to_json` wrote."""
        return cls(*map(tuple, json.loads(data)))


def share(count: int, rank: int) -> range:
    """Give the images, of `count`, that are a rank's."""
    return range(rank, count, ranks.size())


def joined(own: LoadedImages, count: int, clip: Clip) -> LoadedImages:
    """Make of what this rank has decoded of its share what all have decoded of `count` images."""
    here = share(count, ranks.rank())
    failed = failed_anywhere({here[at]: error for at, error in own.failed})
    kept = tuple(at for at in range(count) if at not in failed)
    owners = torch.tensor(kept, dtype=torch.int64) % ranks.size()
    assert isinstance(own.tokens, StoredTokens)
    tokens = TokensOfRank(own.tokens, owners, ranks.rank(), clip)
    return LoadedImages(tokens, kept, tuple(failed.items()))


def _read(read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except ImageError:
        return b""


def _send(rank: int, chunk: Sequence[bytes]) -> None:
    ranks.send(rank, json.dumps([len(image) for image in chunk]).encode())
    if chunk:
        ranks.send(rank, b"".join(chunk))
