"""VR-LwF (Ding et al., arXiv 2207.09248): fine-tuning held in place by distillation over sentences of random words.

Per step, beside the local cross entropy: student and teacher (the model as it was before the task) say how similar the
batch's images are to random sentences, and the student's answers are held to the teacher's; from the second task on,
the same over the names of the classes seen (LwF). Neither needs earlier images. The preset `zscl` is the form of the
baseline in ZSCL (arXiv 2303.06628).

Not as published: the learning rate decays along a cosine and gradients are not clipped, as in `finetune`; the teacher's
image features are computed once per task, which changes nothing without augmentation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from agent import config
from agent.methods.base import OnProgress, TaskData, task_generator
from agent.methods.student import FineTuning, Teacher
from agent.methods.training import admit, divergence, local_loss
from agent.model.clip import Clip, ModelError
from agent.values import Update


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

    def update(self, task: TaskData, on_progress: OnProgress) -> Update:
        settings, scale = self._settings, self._clip.logit_scale
        labels = task.labels.to(self._clip.device)
        ids = self._clip.tokenize(task.classes)
        training = self._training(task, on_progress)
        held = self._held_to_teacher(task, ids) if settings.weight and training.epochs else None
        for epoch in range(training.epochs):
            for index in training.batches(epoch):
                images = self._student.encode_tokens(task.tokens.batch(index))
                names = self._student.encode_ids(ids)
                loss = local_loss(images, names, labels[index.to(labels.device)], scale, settings.label_smoothing)
                if held is not None:
                    loss = loss + settings.weight * held(index, images, names)
                training.descend(loss, len(index))
            if not training.keep():
                break
        admit(self._classes, task)
        return training.update({"preset": settings.preset})

    def _held_to_teacher(self, task: TaskData, ids: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Build the distillation of a task, a function that gives a scalar.

        It takes the batch's index int64 [B], the student's images [B, D] and its names [K, D].
        """
        settings, scale, device = self._settings, self._clip.logit_scale, self._clip.device
        teacher = Teacher(self._student)
        taught_images = teacher.features(task.tokens)
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

        def held(index: Tensor, images: Tensor, names: Tensor) -> Tensor:
            nonlocal sentences, taught_sentences
            taught, given = scale * taught_images[index.to(device)], scale * images
            rows = self._student.encode_ids(sentences) if settings.both_towers else taught_sentences
            old, new = taught @ taught_sentences.T, given @ rows.T
            loss = divergence(old, new, settings.temperature)
            if settings.both_directions:
                loss = loss + divergence(old.T, new.T, settings.temperature)
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


def random_sentences(
    sentences: int, words: int, vocabulary: tuple[int, int, int], generator: torch.Generator
) -> Tensor:
    """Draw sentences of a start token, `words` ordinary tokens and an end token: int64 [sentences, words + 2].

    Ordinary tokens are drawn uniformly from `vocabulary`, see Clip.vocabulary.
    """
    ordinary, start, end = vocabulary
    drawn = torch.randint(ordinary, (sentences, words), generator=generator)
    return torch.cat([torch.full((sentences, 1), start), drawn, torch.full((sentences, 1), end)], dim=1)
