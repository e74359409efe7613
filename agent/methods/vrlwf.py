"""VR-LwF (Ding et al., arXiv 2207.09248): fine-tuning held in place by distillation over sentences of random words.

Per step, beside the local cross entropy: student and teacher (the model as it was before the task) say how similar the
batch's images are to random sentences, and the student's answers are held to the teacher's; from the second task on,
the same over the names of the classes seen (LwF). Neither needs earlier images. The preset `zscl` is the form of the
baseline in ZSCL (arXiv 2303.06628).

By default it learns as `finetune` does, so that both can be compared. `loop = "published"`, which the preset `paper`
chooses, learns as the published code does. Not as published then: a model's frozen part stays as it is, crops are of
an image's central square, and the prompt is `model.prompt`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from agent import config
from agent.methods.base import (
    InferenceModule,
    LearnerState,
    OnProgress,
    TaskData,
    TextModule,
    check_learned,
    task_generator,
)
from agent.methods.classifiers import TextHead
from agent.methods.student import FineTuning, Student, Teacher
from agent.methods.training import divergence, local_loss
from agent.model.clip import Clip, ModelError
from agent.model.ranks import Part
from agent.values import Update

MAX_NORM = 1.0
"""The published loop shortens gradients to this norm."""


class VrLwf(FineTuning):
    """Learns by the local loss, while the model before the task teaches it on sentences of random words."""

    name = "vrlwf"

    def __init__(self, clip: Clip, settings: config.Method) -> None:
        super().__init__(clip, settings, settings.vrlwf)
        self._settings = settings.vrlwf
        self._vocabulary = clip.vocabulary
        words, longest = self._settings.words, clip.tokenize(["thing"]).shape[1] - 2
        if words > longest:
            raise ModelError(f"method.vrlwf.words is {words}, but this model reads at most {longest}; lower it")
        self._published = self._settings.loop == "published"
        if self._published:
            self._student = ScaledStudent(clip, settings.lora, settings.seed, self._settings.trainable)

    def update(self, task: TaskData, on_progress: OnProgress) -> Update:
        settings = self._settings
        labels = task.labels.to(self._clip.device)
        ids = self._clip.tokenize(task.classes)
        read = None
        if self._published:
            if task.cropped is None:
                raise ValueError("method.vrlwf.loop is 'published', which crops images, but the task has tokens alone")
            read = partial(task.cropped.batch, generator=task_generator(self._seed, task.number, "crops"))
            training = self._training(
                task, on_progress, decay=lambda epoch, done: 1.0, drop_last=True, max_norm=MAX_NORM
            )
        else:
            training = self._training(task, on_progress)
        held = self._held_to_teacher(task, ids) if settings.weight and training.epochs else None
        for epoch in range(training.epochs):
            for index in training.batches(epoch):
                tokens = read(index, part=training.part) if read else task.tokens.batch(index)
                images = self._scale * self._student.encode_tokens(tokens)
                names = self._student.encode_ids(ids)
                loss = local_loss(images, names, labels[index.to(labels.device)], 1.0, settings.label_smoothing)
                if held is not None:
                    loss = loss + settings.weight * held(training.part, index, tokens, images, names)
                training.descend(loss)
            if not training.keep():
                break
        self._count(task)
        return training.update({"preset": settings.preset})

    @property
    def _scale(self) -> Tensor | float:
        """The multiplier of cosines, differentiable where it is trained."""
        return self._student.log_scale.exp() if isinstance(self._student, ScaledStudent) else self._clip.logit_scale

    @torch.no_grad()
    def _scale_now(self) -> float:
        return float(self._scale)

    def state(self) -> LearnerState:
        state = super().state()
        return LearnerState(state.tensors, {**state.values, "preset": self._settings.preset})  # for who merges it

    def inference_module(self) -> InferenceModule:
        check_learned(self._classes)
        # A scale that is trained is in the rows: all else of a release's graph stays as it is from task to task.
        names = self._scale_now() / self._clip.logit_scale * self.encode_names(self._classes)
        return TextHead(self._student.merged_image_tower(), self.classes, names, self._clip.logit_scale)

    def text_module(self) -> TextModule:
        module = super().text_module()
        module.scale = self._scale_now()
        return module

    def _held_to_teacher(self, task: TaskData, ids: Tensor) -> Callable[[Part, Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Build the distillation of a task, a function that gives a scalar.

        It takes which part of a batch its images are, their index int64 [B] and tokens [B, tokens, width], the
        student's images [B, D] times its scale, and its names [K, D].
        """
        settings, scale, device = self._settings, self._scale_now(), self._clip.device
        teacher = Teacher(self._student)
        # Images that are cropped anew in every epoch have no features that could be computed once.
        taught_images = None if self._published else teacher.features(task.tokens)
        generator = task_generator(self._seed, task.number, "sentences")

        def draw() -> tuple[Tensor, Tensor]:
            drawn = random_sentences(settings.sentences, settings.words, self._vocabulary, generator).to(device)
            return drawn, teacher.encode_ids(drawn)

        sentences, taught_sentences = draw()
        lwf = bool(settings.seen_names and self._classes)
        earlier = [name for name in self._classes if name not in task.classes] if lwf else []
        if lwf:
            taught_names = teacher.encode_ids(ids)
        if earlier:
            earlier_ids = self._clip.tokenize(earlier)
            taught_earlier = teacher.encode_ids(earlier_ids)

        def held(part: Part, index: Tensor, tokens: Tensor, given: Tensor, names: Tensor) -> Tensor:
            nonlocal sentences, taught_sentences
            known = teacher.encode_tokens(tokens) if taught_images is None else taught_images[index.to(device)]
            taught = scale * known
            rows = self._student.encode_ids(sentences) if settings.both_towers else taught_sentences
            old, new = taught @ taught_sentences.T, given @ rows.T
            loss = divergence(old, new, settings.temperature)
            if settings.both_directions:
                loss = loss + divergence(part.whole(old).T, part.whole(new).T, settings.temperature)
            if lwf:
                old, new = taught @ taught_names.T, given @ names.T
                if earlier:
                    some = torch.randperm(len(earlier), generator=generator)[: settings.seen_names].to(device)
                    old = torch.cat([old, taught @ taught_earlier[some].T], dim=1)
                    new = torch.cat([new, given @ self._student.encode_ids(earlier_ids[some]).T], dim=1)
                loss = loss + divergence(old, new, settings.temperature)
            if settings.redraw == "step":
                sentences, taught_sentences = draw()
            return loss

        return held


class ScaledStudent(Student):
    """It is a student that learns the scale of similarities as well, as its logarithm."""

    def __init__(self, clip: Clip, lora: config.Lora, seed: int, trainable: Literal["lora", "all"]) -> None:
        super().__init__(clip, lora, seed, trainable)
        self.log_scale = nn.Parameter(torch.tensor(math.log(clip.logit_scale), device=clip.device))

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from super().parameters()
        yield self.log_scale

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "log_scale": self.log_scale.detach().clone()}

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        self.log_scale.copy_(tensors["log_scale"])


def random_sentences(
    sentences: int, words: int, vocabulary: tuple[int, int, int], generator: torch.Generator
) -> Tensor:
    """Draw sentences of a start token, `words` ordinary tokens and an end token: int64 [sentences, words + 2].

    Ordinary tokens are drawn uniformly from `vocabulary`, see Clip.vocabulary.
    """
    ordinary, start, end = vocabulary
    drawn = torch.randint(ordinary, (sentences, words), generator=generator)
    return torch.cat([torch.full((sentences, 1), start), drawn, torch.full((sentences, 1), end)], dim=1)
