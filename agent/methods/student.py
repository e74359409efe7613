"""A CLIP whose towers are trained, by K/V adapters or whole, and a teacher that stays as it was. No loop lives here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from agent.config import Finetune, Lora, Method
from agent.methods.base import (
    InferenceModule,
    LearnerState,
    OnProgress,
    TaskData,
    TextModule,
    Tokens,
    check_learned,
    task_generator,
)
from agent.methods.classifiers import TextHead
from agent.methods.training import GapWatch, Training, admit, cosine
from agent.model import ranks
from agent.model.clip import Clip
from agent.model.lora import Adapters, merged

Weights = Mapping[str, Tensor]
"""Tensors by parameter name, as `functional_call` takes them: they stand in for the tower's own."""

_FROZEN_PART = tuple(
    f"visual.{name}"
    for name in (
        *("conv1.", "class_embedding", "positional_embedding", "ln_pre."),
        *("trunk.patch_embed.", "trunk.cls_token", "trunk.reg_token", "trunk.pos_embed", "trunk.norm_pre."),
    )
)
"""Weights of an image tower's `prefix`: they made the tokens and cannot be trained."""


class AllWeights(nn.Module):
    """It is a trainable copy of every weight that a tower's `forward` uses: full fine-tuning in place of adapters."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        trained = {name: p for name, p in tower.named_parameters() if not name.startswith(_FROZEN_PART)}
        self._names = tuple(trained)
        self.values = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in trained.values())

    def weights(self) -> dict[str, Tensor]:
        """Give the trained weights by parameter name, differentiable, as `functional_call` takes them."""
        return dict(zip(self._names, self.values, strict=True))


class Student:
    """It encodes with trained weights over the frozen towers of `clip`."""

    def __init__(self, clip: Clip, lora: Lora, seed: int, trainable: Literal["lora", "all"] = "lora") -> None:
        self.clip = clip
        self.image: Adapters | AllWeights
        self.text: Adapters | AllWeights
        if trainable == "all":
            self.image, self.text = AllWeights(clip.image), AllWeights(clip.text)
        else:
            generator = task_generator(seed, 0, "adapters")
            self.image = Adapters(clip.image, lora.rank, lora.alpha, generator)
            self.text = Adapters(clip.text, lora.rank, lora.alpha, generator)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield everything that is trained, of both towers."""
        yield from self.image.parameters()
        yield from self.text.parameters()

    def encode_tokens(self, tokens: Tensor, weights: Weights | None = None) -> Tensor:
        """Encode [B, tokens, width] to float32 [B, D], L2-normalised and differentiable.

        `weights` reuses what `image.weights()` gave, which costs a matrix product per block.
        """
        with self.clip.autocast():
            out = functional_call(self.clip.image, dict(weights or self.image.weights()), (tokens,))
        return F.normalize(out.float(), dim=-1)

    def encode_ids(self, ids: Tensor) -> Tensor:
        """Encode token ids int64 [n, L] to float32 [n, D], L2-normalised and differentiable."""
        with self.clip.autocast():
            out = functional_call(self.clip.text, self.text.weights(), (ids,))
        return F.normalize(out.float(), dim=-1)

    @torch.no_grad()
    def encode_names(self, names: Sequence[str], batch: int = 256) -> Tensor:
        """Encode class names, put into the prompt: float32 [n, D], L2-normalised."""
        parts = [self.encode_ids(self.clip.tokenize(names[i : i + batch])) for i in range(0, len(names), batch)]
        return torch.cat(parts) if parts else torch.zeros(0, self.clip.embed_dim, device=self.clip.device)

    @torch.no_grad()
    def features(self, tokens: Tokens, tick: Callable[[], None], batch: int = 128) -> Tensor:
        """Encode a task's images in order: float32 [N, D], L2-normalised. `tick` is called for every batch."""
        weights = self.image.weights()

        def encode(part: Tensor) -> Tensor:
            tick()
            return self.encode_tokens(part, weights)

        return ranks.encoded(tokens, torch.arange(len(tokens)), encode, batch)

    @torch.no_grad()
    def merged_image_tower(self) -> nn.Module:
        """Build the adapted image tower as plain weights, sharing nothing that training writes."""
        return merged(self.clip.image, self.image.weights())

    @torch.no_grad()
    def text_module(self) -> TextModule:
        """Build the adapted text tower, sharing nothing that training writes."""
        return TextModule(self.clip, merged(self.clip.text, self.text.weights()))

    @torch.no_grad()
    def weaken(self, factor: float) -> None:
        """Multiply by `factor` what the adapters add to the towers; 0 gives the untouched towers back."""
        for tower in (self.image, self.text):
            assert isinstance(tower, Adapters)
            for up in tower.up:
                up.mul_(factor)

    def tensors(self) -> dict[str, Tensor]:
        """Copy all trainable tensors, by name."""
        named = [("image." + k, v) for k, v in self.image.named_parameters()]
        named += [("text." + k, v) for k, v in self.text.named_parameters()]
        return {name: tensor.detach().clone() for name, tensor in named}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` copied. Raises KeyError or RuntimeError when names or shapes differ."""
        for prefix, adapters in (("image.", self.image), ("text.", self.text)):
            adapters.load_state_dict({k: tensors[prefix + k] for k, _ in adapters.named_parameters()})


class StudentMethod:
    """The base of methods that train a `Student`: it encodes by the student, and releases its text tower."""

    _student: Student

    def encode_names(self, names: Sequence[str]) -> Tensor:
        return self._student.encode_names(names)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self._student.encode_tokens(tokens)

    def text_module(self) -> TextModule:
        return self._student.text_module()


class FineTuning(StudentMethod):
    """What methods have in common that train a `Student` by a loss over names and predict by text alone.

    A subclass has the loop, in `update`, and may add to the loss.
    """

    fusion = "text"

    def __init__(self, clip: Clip, method: Method, section: Finetune) -> None:
        self._clip = clip
        self._seed = method.seed
        self._student = Student(clip, method.lora, method.seed, section.trainable)
        self._section = section
        self._classes: list[str] = []
        self._counts: list[int | None] = []
        """Images learned of each class, for who merges learners; None where the learner is of a version that did not
        count them."""

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._classes)

    def _training(
        self,
        task: TaskData,
        on_progress: OnProgress,
        decay: Callable[[int, float], float] = cosine,
        **options: Any,
    ) -> Training:
        """Set up the update of a task: Adam, by default decaying along a cosine over all steps; see `Training`."""
        return Training(
            task,
            self._student,
            torch.optim.Adam(list(self._student.parameters()), lr=self._section.lr),
            epochs=self._section.epochs,
            batch_size=self._section.batch_size,
            decay=decay,
            watch=GapWatch(self, self._clip, task, self._seed),
            seed=self._seed,
            on_progress=on_progress,
            **options,
        )

    def _count(self, task: TaskData) -> None:
        """Admit a task's names that are new, and count its images."""
        admit(self._classes, task)
        self._counts += [0] * (len(self._classes) - len(self._counts))
        for name, images in zip(task.classes, task.labels.bincount(minlength=len(task.classes)).tolist(), strict=True):
            at = self._classes.index(name)
            before = self._counts[at]
            self._counts[at] = None if before is None else before + images

    def inference_module(self) -> InferenceModule:
        check_learned(self._classes)
        names = self.encode_names(self._classes)
        return TextHead(self._student.merged_image_tower(), self.classes, names, self._clip.logit_scale)

    def state(self) -> LearnerState:
        return LearnerState(self._student.tensors(), {"classes": list(self._classes), "counts": list(self._counts)})

    def load_state(self, state: LearnerState) -> None:
        self._student.load_tensors(state.tensors)
        self._classes = list(state.values["classes"])
        self._counts = list(state.values.get("counts", [None] * len(self._classes)))


class Teacher:
    """A student frozen as it is now, without gradient and sharing nothing that training writes."""

    @torch.no_grad()
    def __init__(self, student: Student) -> None:
        self._clip = student.clip
        self._image = {name: weight.clone() for name, weight in student.image.weights().items()}
        self._text = {name: weight.clone() for name, weight in student.text.weights().items()}

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Encode tokens: [B, tokens, width] -> float32 [B, D], L2-normalised."""
        with self._clip.autocast():
            return F.normalize(functional_call(self._clip.image, self._image, (tokens,)).float(), dim=-1)

    @torch.no_grad()
    def encode_ids(self, ids: Tensor, batch: int = 256) -> Tensor:
        """Encode token ids: int64 [n, L] -> float32 [n, D], L2-normalised."""
        with self._clip.autocast():
            parts = [functional_call(self._clip.text, self._text, (part,)).float() for part in ids.split(batch)]
        return F.normalize(torch.cat(parts), dim=-1)

    def features(self, tokens: Tokens, batch: int = 256) -> Tensor:
        """Compute normalised image features float32 [N, D] of all images of a task, in order."""
        return ranks.encoded(tokens, torch.arange(len(tokens)), self.encode_tokens, batch)
