"""SECA (arXiv 2508.01579): semantic-guided distillation from earlier adapters, prototypes refined by text. No replay.

What is trained: a bottleneck beside every MLP of the image tower, carried on from task to task; context vectors before
the class name, new in each task; a relevance net; the prototypes' refinement. Per task: (1) Cross entropy over the
task's own names under its prompt. (2) SG-AKT: a copy of the bottlenecks after each task joins a pool. For every image
the pool's features are weighted by their relevance to its class's text under all prompts; the aggregate, taken through
the tower's last norm and projection, learns the task too, and the student's answers are held to the aggregate's.
(3) SE-VPR: a prototype is the untouched model's class mean, averaged with those of classes whose names are close;
refined prototypes classify the task's images, and those of earlier classes are kept still. A prediction joins the
names' answer (over the kept prompts) and the prototypes' answer.

Where this differs from the publication is said in agent/methods/README.md. A class that comes back is refined again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agent import config
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
from agent.methods.seca_modules import (
    BesideTower,
    PromptedText,
    PromptsAndPrototypes,
    PublishedPrediction,
    Refinement,
    Relevance,
    Tensors,
)
from agent.methods.training import (
    ClassMeans,
    GapWatch,
    Training,
    divergence,
    local_loss,
    untouched_features,
    untrained,
)
from agent.model import ranks
from agent.model.clip import Clip
from agent.model.lora import merged
from agent.values import Update

MAX_DISTILLATION = 9
"""The largest weight of the distillation. As published it is the number of tasks learned before, over ten tasks;
without a bound a stream of hundreds of tasks would end by distilling alone."""
PEAK_IMAGES = 128
"""Images of a task that stand for a batch of test images in the published prediction: the published batch size."""
STATE = 2
"""What a state's tensors mean. In the first one (without a number) the bottlenecks read a block after its norm."""


class Seca:
    """It is the method of SECA, in the form of the published code or of the paper (method.seca.form)."""

    name = "seca"

    def __init__(self, clip: Clip, settings: config.Method) -> None:
        self._clip = clip
        self._seed = settings.seed
        self._settings = settings.seca
        generator = task_generator(settings.seed, 0, "seca")
        self._image = BesideTower(clip.image, self._settings.adapter_scale)
        self._text = PromptedText(clip, self._settings.context)
        self._adapter = Tensors(self._image.new(self._settings.bottleneck, generator))
        widths = clip.embed_dim, clip.image.width
        self._relevance = Relevance(*widths, generator, self._settings.form).to(clip.device)
        self._refinement = Refinement(clip.embed_dim, generator).to(clip.device)
        self._means = ClassMeans(clip)
        self._prototypes = self._means.rows
        self._prompts: list[Tensor] = []
        self._pool: list[dict[str, Tensor]] = []
        self._peaks = torch.zeros(0, device=clip.device)
        """After the first task [2]: the highest cosines of a batch of images, to names under the prompts and to
        prototypes, averaged over tasks."""
        self._learned = 0
        self._names: Tensor | None = None

    @property
    def fusion(self) -> str:
        parts = "text+prototypes" if self._settings.se_vpr else "text"
        return parts if self._settings.fusion == "calibrated" else f"{parts}, faithful"

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._means.classes)

    @torch.no_grad()
    def encode_names(self, names: Sequence[str]) -> Tensor:
        """Encode names as the mean over the kept prompts, or by the untouched model before there is one."""
        return F.normalize(self._under_prompts(names).mean(1), dim=-1)

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        return self._encode(tokens, self._adapter.named)

    def update(self, task: TaskData, on_progress: OnProgress) -> Update:
        started = time.perf_counter()
        settings, device = self._settings, self._clip.device
        watch = GapWatch(self, self._clip, task, self._seed)
        self._means.add(task, untouched_features(self._clip, task))
        self._names = None
        here = torch.tensor([self.classes.index(name) for name in task.classes], device=device)
        if len(task.classes) == 1:
            self._refine(here)
            self._measure_peaks(task)
            return untrained(task, watch, started, on_progress)

        context = torch.randn(self._text.shape, generator=task_generator(self._seed, task.number, "context"))
        prompt = nn.Parameter(0.02 * context.to(device))  # the deviation that CoOp and the published code begin with
        nets = {**_parameters("relevance.", self._relevance), **_parameters("refinement.", self._refinement)}
        carried = {**_under("adapter.", self._adapter.named), **nets}
        groups = [
            {"params": list(carried.values()), "lr": settings.lr},
            {"params": [prompt], "lr": settings.prompt_lr},
        ]
        lesson = self._lesson(task, here)
        self._prompts.append(prompt)
        training = Training(
            task,
            Tensors({**carried, "prompt": prompt}),
            torch.optim.Adam(groups, weight_decay=settings.weight_decay),
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            decay=lambda epoch, done: 0.1 ** sum(epoch >= milestone for milestone in settings.milestones),
            watch=watch,
            seed=self._seed,
            on_progress=on_progress,
        )
        dropout = torch.Generator(device).manual_seed(task_generator(self._seed, task.number, "dropout").initial_seed())
        use = torch.full((len(self._pool),), 1 / max(1, len(self._pool)), device=device)
        for epoch in range(training.epochs):
            for index in training.batches(epoch):
                at = index.to(device)
                images = self._encode(task.tokens.batch(index), self._adapter.named, dropout, training.part)
                texts = self._text.encode(lesson.ids, prompt)
                loss = local_loss(images, texts[lesson.own], lesson.labels[at], self._clip.logit_scale)
                if lesson.pool is not None:
                    distilled, weights = self._distil(lesson, at, images, texts[lesson.own])
                    loss = loss + distilled
                    # A momentum of 0.5, as in the published code: batch by batch the early ones count for less.
                    use = 0.5 * use + 0.5 * training.part.mean(weights.detach())
                if settings.se_vpr:
                    words = texts if lesson.words is None else lesson.words
                    loss = loss + self._classify_by_prototypes(lesson, at, images, words)
                training.descend(loss)
            if not training.keep():
                break
        self._prompts[-1] = prompt.detach().clone()
        if training.kept:
            self._learned += 1
            self._prompts = self._prompts[-settings.prompts :]
            self._join_pool(use)
        else:
            self._prompts.pop()
        self._refine(here)
        self._measure_peaks(task)
        return training.update({"pool": len(self._pool), "prompts": len(self._prompts)})

    @torch.no_grad()
    def _lesson(self, task: TaskData, here: Tensor) -> _Lesson:
        """Put together what stays the same while a task is learned; `here` is where its classes are in `classes`."""
        back = set(here.tolist())
        old = [i for i in range(len(self._prototypes)) if i not in back]
        all_names = self._settings.form == "code"
        pool = self._pool_features(task.tokens)
        ids = self._text.tokenize(task.classes)
        earlier = [] if pool is None else [self._text.encode(ids, prompt) for prompt in self._prompts]
        return _Lesson(
            labels=task.labels.to(here.device),
            ids=self._text.tokenize(self.classes) if all_names else ids,
            own=here if all_names else torch.arange(len(here), device=here.device),
            here=here,
            old=torch.tensor(old, dtype=torch.int64, device=here.device),
            words=None if all_names else self._words(),
            pool=pool,
            earlier=torch.stack(earlier, dim=1) if earlier else None,
        )

    def _distil(self, lesson: _Lesson, at: Tensor, images: Tensor, names: Tensor) -> tuple[Tensor, Tensor]:
        """Give SG-AKT's losses (the aggregate's own and the distillation) for images [B, D] at `at` in the task, and
        the weights of the pool's members [B, pool]. `names` [K, D] are the task's under the prompt that is trained."""
        assert lesson.pool is not None
        parts = [names[:, None]] if lesson.earlier is None else [lesson.earlier, names[:, None]]
        y = lesson.labels[at]
        aggregate, weights = self._relevance(torch.cat(parts, dim=1)[y], lesson.pool[at])
        with self._clip.autocast():
            aggregate = self._clip.image.project(aggregate)
        aggregate = F.normalize(aggregate.float(), dim=-1)
        fixed, soft = names.detach(), self._settings.logit_scale
        held = divergence(soft * aggregate.detach() @ fixed.T, soft * images @ fixed.T, temperature=1.0)
        # The published weight, the number of tasks learned before, would outgrow the task in a long stream.
        distilled = min(self._learned, MAX_DISTILLATION) * held
        return local_loss(aggregate, fixed, y, self._clip.logit_scale) + distilled, weights

    def _classify_by_prototypes(self, lesson: _Lesson, at: Tensor, images: Tensor, words: Tensor) -> Tensor:
        """Give SE-VPR's losses: cross entropy of images [B, D] over the task's refined prototypes, and L_reg."""
        refined = self._refinement(words, self._means.rows)
        loss = local_loss(images, refined[lesson.here], lesson.labels[at], self._clip.logit_scale)
        if len(lesson.old):
            loss = loss + self._moved(self._prototypes[lesson.old], refined[lesson.old])
        return loss

    def _words(self) -> Tensor:
        """Encode the learned names as SE-VPR compares them after training: float32 [C, D]. In the published code
        they are under the newest prompt, before there is any and in the paper's form by the untouched model."""
        if self._settings.form == "paper" or not self._prompts:
            return self._clip.encode_names(self.classes)
        return self._text.encode(self._text.tokenize(self.classes), self._prompts[-1])

    def _encode(
        self,
        tokens: Tensor,
        adapter: Mapping[str, Tensor],
        dropout: torch.Generator | None = None,
        part: ranks.Part | None = None,
    ) -> Tensor:
        with self._clip.autocast():
            features = self._image(tokens, adapter, self._settings.dropout, dropout, part)
        return F.normalize(features.float(), dim=-1)

    def _under_prompts(self, names: Sequence[str], batch: int = 256) -> Tensor:
        """Encode names under every kept prompt, or the untouched one before there is any: float32 [n, prompts, D]."""
        if not self._prompts:
            return self._clip.encode_names(names)[:, None]
        ids = self._text.tokenize(names)
        parts = [torch.stack([self._text.encode(part, p) for p in self._prompts], dim=1) for part in ids.split(batch)]
        return torch.cat(parts)

    def _pool_features(self, tokens: Tokens) -> Tensor | None:
        """Encode a task's images by the pool's adapters, before the last norm and projection, each at unit length:
        float32 [N, pool, width]; None with nothing to distil from."""
        if not self._pool or not self._settings.sg_akt:
            return None
        towers: list[Any] = [self._image.merged(adapter) for adapter in self._pool]

        def encode(batch: Tensor) -> Tensor:
            with self._clip.autocast():
                members = torch.stack([tower.pooled(batch) for tower in towers], dim=1)
            return F.normalize(members.float(), dim=-1)

        return ranks.encoded(tokens, torch.arange(len(tokens)), encode, 256)

    def _join_pool(self, use: Tensor) -> None:
        """Put the adapter as it is now into the pool; `use` [pool] says which one leaves a full pool."""
        if self._settings.sg_akt:
            stay = use.argsort(descending=self._settings.form == "code")[: self._settings.pool - 1]
            self._pool = [*(self._pool[i] for i in sorted(stay.tolist())), self._adapter.tensors()]

    def _moved(self, before: Tensor, now: Tensor) -> Tensor:
        """Give the regulariser L_reg: how far prototypes of earlier classes [n, D] moved, a scalar."""
        cosine = (before * now).sum(-1).mean()
        return 1 - cosine if self._settings.form == "code" else 2 - 2 * cosine

    @torch.no_grad()
    def _refine(self, here: Tensor) -> None:
        """Set the prototypes of the classes at `here` and of new ones; the others stay as they were."""
        refined = self._refinement(self._words(), self._means.rows)
        rows = torch.cat([self._prototypes, refined[len(self._prototypes) :]])
        rows[here] = refined[here]
        self._prototypes = rows

    @torch.no_grad()
    def _measure_peaks(self, task: TaskData) -> None:
        """Take the highest cosines of a batch of the task's images into their mean over tasks, each weighing as much as
        it has classes: the published prediction takes those of a batch of test images, which are of all classes."""
        order = torch.randperm(len(task), generator=task_generator(self._seed, task.number, "peaks"))
        images = ranks.encoded(task.tokens, order[:PEAK_IMAGES], self.encode_tokens, PEAK_IMAGES)
        self._names = self._under_prompts(self.classes)
        now = torch.stack([(rows @ images.T).max() for rows in (self._names, self._prototypes)])
        share = len(task.classes) / len(self.classes)
        self._peaks = self._peaks + share * (now - self._peaks) if len(self._peaks) else now

    @torch.no_grad()
    def inference_module(self) -> InferenceModule:
        check_learned(self.classes)
        if self._names is None:
            self._names = self._under_prompts(self.classes)
        prompts = self._names.shape[1]
        # always the same number of slots, so that a release of a later task reuses the traced graph
        names = F.pad(self._names, (0, 0, 0, self._settings.prompts - prompts))
        weights = torch.zeros(self._settings.prompts, device=names.device)
        weights[:prompts] = 1 / prompts
        prototypes = self._prototypes if self._settings.se_vpr else None
        tower = self._image.merged(self._adapter.named)
        head = (tower, self.classes, names, weights, prototypes, self._settings.logit_scale)
        if self._settings.fusion == "faithful":
            return PublishedPrediction(*head, self._peaks)
        return PromptsAndPrototypes(*head)

    def text_module(self) -> TextModule:
        scale = self._settings.logit_scale
        if not self._prompts:
            return TextModule(self._clip, merged(self._clip.text, {}), scale=scale)
        return self._text.module(self._prompts, scale)

    def state(self) -> LearnerState:
        tensors = _under("adapter.", self._adapter.named)
        for number, adapter in enumerate(self._pool):
            tensors |= _under(f"pool.{number}.", adapter)
        tensors |= {f"prompts.{number}": prompt for number, prompt in enumerate(self._prompts)}
        tensors |= {**_parameters("relevance.", self._relevance), **_parameters("refinement.", self._refinement)}
        tensors |= {"means": self._means.rows, "prototypes": self._prototypes, "peaks": self._peaks}
        values = {
            "format": STATE,
            "classes": list(self._means.classes),
            "counts": list(self._means.counts),
            "learned": self._learned,
            "pool": len(self._pool),
            "prompts": len(self._prompts),
        }
        return LearnerState({name: tensor.detach().clone() for name, tensor in tensors.items()}, values)

    def load_state(self, state: LearnerState) -> None:
        values = state.values
        if values.get("format") != STATE:
            raise ValueError(
                f"seca's state has format {values.get('format', 1)}, but this version reads {STATE}: adapters of "
                "format 1 read each block after its second norm, these before it, so the same numbers are another model"
            )
        tensors = {name: tensor.to(self._clip.device) for name, tensor in state.tensors.items()}
        self._adapter.load_tensors(_below("adapter.", tensors))
        self._pool = [_below(f"pool.{number}.", tensors) for number in range(values["pool"])]
        prompts = [tensors[f"prompts.{number}"].clone() for number in range(values["prompts"])]
        self._prompts = prompts[-self._settings.prompts :]
        self._relevance.load_state_dict(_below("relevance.", tensors))
        self._refinement.load_state_dict(_below("refinement.", tensors))
        self._means.load(values["classes"], values["counts"], tensors["means"])
        self._prototypes, self._peaks = tensors["prototypes"].clone(), tensors["peaks"].clone()
        self._learned = values["learned"]
        self._names = None


@dataclass(frozen=True)
class _Lesson:
    """What stays the same while a task of N images and K classes is learned."""

    labels: Tensor
    """int64 [N], index into the task's classes."""
    ids: Tensor
    """Token ids of the names that are encoded under the prompt at every step: the task's, or all (form `code`)."""
    own: Tensor
    """int64 [K]: where among these the task's names are."""
    here: Tensor
    """int64 [K]: where the task's classes are among the learned ones."""
    old: Tensor
    """The learned classes that have a prototype and did not come back."""
    words: Tensor | None
    """Names as SE-VPR compares them [C, D]; None stands for those under the prompt that is trained."""
    pool: Tensor | None
    """[N, pool, width], see `_pool_features`."""
    earlier: Tensor | None
    """The task's names under earlier prompts [K, prompts, D]; None where there are none."""


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _parameters(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return _under(prefix, dict(module.named_parameters()))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor.clone() for name, tensor in tensors.items() if name.startswith(prefix)}
