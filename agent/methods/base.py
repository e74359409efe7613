"""The contract of a continual-learning method, and what it is given and gives back."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agent.model.clip import Clip
from agent.model.ranks import Part
from agent.values import OnProgress, Update


class Tokens(Protocol):
    """The output of the image tower's frozen part for every image of a task, computed once and kept.

    It is in memory, or in a file without a name where it exceeds method.cache_bytes. Where several processes share an
    update, each has the tokens of some images (agent.model.ranks).
    """

    @property
    def owners(self) -> Tensor | None:
        """The rank that has each image's tokens, int64 [N] on the CPU; None where this process has all of them."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> Tensor:
        """Fetch the tokens of some images: index int64 [B] on any device -> float [B, tokens, width] on the model's."""


class Cropped(Protocol):
    """The images of a task, cropped and mirrored at random: what augments them cannot use tokens computed once."""

    def batch(self, index: Tensor, generator: torch.Generator, part: Part | None = None) -> Tensor:
        """Decode, crop, mirror and encode some images anew, like Tokens.batch; all that is random is drawn from
        `generator`, which is on the CPU. Where `index` is `part` of a batch, it is drawn for the whole batch."""


@dataclass(frozen=True)
class TaskData:
    """It is a task as a method sees it: class names, labels, and images as tokens. Never changed by a method."""

    number: int
    """From 1; with the configured seed it determines all randomness of the update."""
    classes: tuple[str, ...]
    """The task's class names in order of first appearance; some may have been learned before."""
    labels: Tensor
    """int64 [N] on the CPU, index into `classes`."""
    tokens: Tokens
    cropped: Cropped | None = None
    """The same images, in the same order, for a method that augments them; None where only tokens are to be had."""

    def __len__(self) -> int:
        return len(self.labels)

    def names(self, index: Tensor) -> tuple[str, ...]:
        """Give the class names of some images: index int64 [n] on the CPU."""
        return tuple(self.classes[label] for label in self.labels[index].tolist())


@dataclass(frozen=True)
class Counted:
    """It is what a method counts of some images."""

    features: Tensor
    """float32 [n, M], as in the method's class means."""
    embeddings: Tensor
    """float32 [n, D], the untouched model's; [n, 0] where a method does not count them apart."""
    classes: tuple[str, ...]
    """The class name of each image."""

    def of(self, index: Sequence[int]) -> Counted:
        """Give some of the images."""
        at = torch.tensor(index, dtype=torch.int64, device=self.features.device)
        return Counted(self.features[at], self.embeddings[at], tuple(self.classes[one] for one in index))


NOTHING = Counted(torch.zeros(0, 0), torch.zeros(0, 0), ())
"""Of no image."""


@dataclass(frozen=True)
class LearnerState:
    """What a method keeps between tasks."""

    tensors: Mapping[str, Tensor]
    """Saved as safetensors."""
    values: Mapping[str, Any]
    """JSON-able: class names, counts and settings found while learning."""


class InferenceModule(nn.Module):
    """What is evaluated and released: adapters merged, no state shared with training, in eval mode.

    `forward(images)` takes float32 [B, 3, H, W], preprocessed, and gives `embedding` [B, D] (L2-normalised), `logits`
    [B, C] and `probabilities` [B, C] (rows sum to 1), float32, C = learned classes in `classes`. The prediction for one
    image never depends on the others in the batch. `from_tokens` is the same from the frozen part's output on, in two
    halves: `encode` hangs on the towers, and `answer` on the classes as well, so that images need not be encoded again
    when classes come and the towers have not changed.
    """

    parts: tuple[str, ...]
    """Names of what `answer` takes of an image."""
    classes: tuple[str, ...]
    class_tensors: tuple[str, ...]
    """Names of the buffers whose first dimension is C: with other classes only these change shape."""

    def encoder(self, part: str) -> Mapping[str, Tensor]:
        """Give every tensor that one of the `parts` hangs on, by name: while these are equal, so is the part."""
        raise NotImplementedError

    def encode(self, tokens: Tensor, parts: Collection[str]) -> dict[str, Tensor]:
        """Encode the frozen part's output [B, tokens, width] to some of the `parts`, by name, each [B, some width]."""
        raise NotImplementedError

    def answer(self, encoded: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Answer from all of the `parts`: embedding, logits and probabilities."""
        raise NotImplementedError

    def from_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Answer from the frozen part's output [B, tokens, width]: embedding, logits and probabilities."""
        return self.answer(self.encode(tokens, self.parts))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Answer preprocessed images float32 [B, 3, H, W]: embedding, logits and probabilities."""
        raise NotImplementedError


class TextModule(nn.Module):
    """The text tower as it would be released: token ids int64 [n, L] -> embeddings float32 [n, D], L2-normalised, of
    the names that `Method.encode_names` encodes. Shares no state with training; in eval mode.
    """

    def __init__(self, clip: Clip, tower: nn.Module, prompt: str = "", scale: float = 0.0) -> None:
        """`tower` turns ids into features [n, D], not normalised. `prompt` is the sentence names are put into, `scale`
        the multiplier of similarities between images and names; both are those of `clip` where they are not given."""
        super().__init__()
        self.tower = tower
        self.prompt = prompt or clip.prompt
        self.scale = scale or clip.logit_scale
        self.varying: tuple[str, ...] = ()
        """Names of the tensors whose first dimension changes as learning goes on."""
        untouched = {tensor.data_ptr() for tensor in (*clip.text.parameters(), *clip.text.buffers())}
        self.frozen = frozenset(
            name for name, tensor in (*self.named_parameters(), *self.named_buffers()) if tensor.data_ptr() in untouched
        )
        """Names of the tensors that learning never changes."""
        self._clip = clip
        self.eval().requires_grad_(False)

    def tokenize(self, names: Sequence[str]) -> Tensor:
        """Put class names into the prompt and cut them into tokens: int64 [n, L] on the model's device."""
        return self._clip.tokenize(names, self.prompt)

    def forward(self, ids: Tensor) -> Tensor:
        """Encode token ids int64 [n, L]: float32 [n, D], L2-normalised."""
        return F.normalize(self.tower(ids).float(), dim=-1)


class Encoder(Protocol):
    """What puts images and class names into one space: a method as it is now, or the untouched CLIP."""

    def encode_names(self, names: Sequence[str]) -> Tensor:
        """Encode class names, put into the prompt: float32 [n, D], L2-normalised, no gradient."""

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Encode images as tokens [B, tokens, width]: float32 [B, D], L2-normalised, no gradient."""


class Method(Encoder, Protocol):
    """A method is a continual-learning algorithm. Built as `Class(clip, config.method)`; holds no data of earlier
    tasks.
    """

    name: str

    @property
    def fusion(self) -> str:
        """The form of prediction that `inference_module` has; every reported number is stored with it."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The learned class names in order of first appearance."""

    def update(self, task: TaskData, on_progress: OnProgress) -> Update:
        """Learn `task`, and tell `on_progress` at every step: the worker takes a silent learner for a hung one.

        The result is determined by state, task and seed, bitwise on a CPU with the same number of threads.
        """

    def inference_module(self) -> InferenceModule:
        """Build the model as it would be released now. Raises LookupError before the first class is learned."""

    def text_module(self) -> TextModule:
        """Build the text tower that `encode_names` encodes with, as it would be released now."""

    def state(self) -> LearnerState:
        """Give everything that learning goes on from, as tensors of its own and plain values."""

    def load_state(self, state: LearnerState) -> None:
        """Continue exactly where `state()` was taken. Raises ValueError for a state of another version whose numbers
        mean something else in this one, KeyError or RuntimeError for one of other sizes."""


def check_learned(classes: Sequence[str]) -> None:
    """Raise LookupError while no class has been learned: there is nothing to infer with yet."""
    if not classes:
        raise LookupError("no class has been learned yet; there is nothing to infer with")


def task_generator(seed: int, task: int, purpose: str) -> torch.Generator:
    """Make the CPU generator for one purpose within one task, so that adding a draw in one place moves no other."""
    digest = hashlib.sha256(f"{seed}/{task}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
