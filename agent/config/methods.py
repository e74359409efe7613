"""What can be set about the methods: one section each, and [method] over them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    model_validator,
)

from agent.config.base import Section


class Lora(Section):
    """Low-rank adapters on the K and V projections of both towers (MG-CLIP section 1.1)."""

    rank: int = Field(8, ge=1)
    """Of the adapters; they have 4 * rank * width parameters per block."""
    alpha: float = Field(1.0, gt=0)
    """Scale of the adapters is alpha / rank."""


class MgClip(Section):
    """MG-CLIP (arXiv 2507.09118)."""

    schedule: Literal["budget", "paper"] = "budget"
    """`paper`: the first task fixes the number of epochs of all later ones. `budget`: every task may use `epochs`, and
    the drift is checked after each; crossing `drift_budget` restores the last state inside it."""
    epochs: int = Field(1, ge=1)
    """Epochs of adapter training per task (`budget`), or at most so many on the first task (`paper`, where the paper
    uses 10)."""
    drift_budget: float = Field(0.25, gt=0)
    """Largest relative drift of the negative similarity (the paper's alpha is 0.1, relative to the negative mean)."""
    drift_relative_to: Literal["separation", "negative"] = "separation"
    """Divisor of the drift: `separation` is the untouched model's positive minus negative mean (well-conditioned),
    `negative` its negative mean (paper)."""
    lr: float = Field(1e-3, gt=0)
    """Adam, of the adapters."""
    batch_size: int = Field(128, ge=1)
    """Samples in a step of adapter training."""
    visual_lr: float = Field(5e-4, gt=0)
    """Adam, of the visual classifier rows."""
    visual_epochs: int = Field(3, ge=0)
    """Epochs of training the visual classifier rows; 0 leaves the class means."""
    visual_batch_size: int = Field(64, ge=1)
    """Samples in a step of it."""
    fusion: Literal["calibrated", "faithful"] = "calibrated"
    """How text and visual predictions are joined: `faithful` is the published code (text softmaxed twice, 1:4);
    `calibrated` sums temperature-scaled probabilities once."""


class Gapstream(Section):
    """The method of our own: second-order statistics of the untouched model's features."""

    features: int = Field(5000, ge=16)
    """Random features of an image. What is kept between tasks grows with their square (5000: 50 MB, and 20 MB per 1000
    classes), what an update computes too; 5000 take it 0.5 GB of memory."""
    prior_images: float = Field(1000, gt=0)
    """So many images' worth of a spherical scatter is added to the one measured: more is steadier where images are few,
    less is sharper where they are many."""


class Finetune(Section):
    """Sequential fine-tuning: the local loss over the task's classes and nothing that preserves. Text prediction."""

    trainable: Literal["lora", "all"] = "lora"
    """`lora`: adapters (`method.lora`); `all`: every weight behind the frozen part of both towers, for which `lr` must
    be some hundred times smaller."""
    epochs: int = Field(3, ge=1)
    """Epochs per task."""
    lr: float = Field(4e-3, gt=0)
    """Adam, decaying to a hundredth along a cosine over the task. (4e-3 suits adapters on tinyclip.)"""
    batch_size: int = Field(128, ge=1)
    """Samples in a step."""
    label_smoothing: float = Field(0, ge=0, lt=1)
    """Share of the target spread over the other names."""


_ZSCL = {
    "sentences": 1000,
    "words": 10,
    "redraw": "task",
    "temperature": 2.0,
    "weight": 1.0,
    "both_towers": False,
    "both_directions": True,
    "seen_names": 0,
    "label_smoothing": 0.2,
}


class VrLwf(Finetune):
    """VR-LwF (arXiv 2207.09248): fine-tuning, held in place by distillation over sentences of random words."""

    preset: Literal["paper", "zscl"] = "paper"
    """`paper`: the defaults of the keys of this section. `zscl`: the form of ZSCL's baseline (1000 sentences of 10
    words drawn once per task, temperature 2, weight 1, image tower only, both directions, no seen names, label
    smoothing 0.2); any of these keys that is written beside it wins over it, so delete them to use it."""
    weight: float = Field(0.5, ge=0)
    """Of the distillation; at 0 this is `finetune` exactly."""
    sentences: int = Field(100, ge=1)
    """Random sentences in a step (or a task, see `redraw`)."""
    words: int = Field(8, ge=1)
    """Random tokens in a sentence."""
    redraw: Literal["step", "task"] = "step"
    """New sentences in every step, or once per task."""
    temperature: float = Field(1.0, gt=0)
    """Of the distillation's probabilities."""
    both_towers: bool = True
    """The student reads the sentences with its own text tower; otherwise with the teacher's, and only its image tower
    is held in place."""
    both_directions: bool = False
    """Also distil which of a batch's images belongs to a sentence."""
    seen_names: int = Field(100, ge=0)
    """LwF beside it, over the task's names and so many earlier ones (drawn in every step when there are more); 0: no
    LwF."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "zscl":
            return {**_ZSCL, **values}
        return values


class Seca(Section):
    """SECA (arXiv 2508.01579): semantic-guided distillation from earlier adapters, prototypes refined by text."""

    form: Literal["code", "paper"] = "code"
    """Where they differ: `code` averages the relevance after the softmax, drops the least used adapter of a full pool
    and regularises by cosine; `paper` averages before it, drops the most used and regularises by squared distance."""
    sg_akt: bool = True
    """Distil from the pool of earlier adapters."""
    se_vpr: bool = True
    """Learn visual prototypes and predict with them; otherwise the prediction is by text alone."""
    epochs: int = Field(3, ge=1)
    """Epochs per task."""
    milestones: tuple[int, ...] = (2,)
    """Epochs after which the learning rates fall to a tenth."""
    lr: float = Field(1e-3, gt=0)
    """Adam, of the adapter, the aggregation and the prototypes' refinement."""
    prompt_lr: float = Field(5e-4, gt=0)
    """Adam, of the task's prompt."""
    weight_decay: float = Field(5e-4, ge=0)
    """Adam, of everything."""
    batch_size: int = Field(100, ge=1)
    """Samples in a step."""
    bottleneck: int = Field(16, ge=1)
    """Width of the adapter beside every MLP of the image tower."""
    adapter_scale: float = Field(0.1, gt=0)
    """What the adapter's output is multiplied with."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """In the adapter, while it trains."""
    context: int = Field(8, ge=1)
    """Learned vectors before the class name."""
    prompts: int = Field(10, ge=1)
    """Prompts kept, one of each task; beyond it the oldest goes."""
    pool: int = Field(5, ge=1)
    """Adapters kept."""
    softness: float = Field(0.2, gt=0)
    """Share of CLIP's scale that multiplies cosines in the distillation and the prediction (published: 20 of 100)."""


class Method(Section):
    """How the model learns."""

    name: str = "gapstream"
    """The algorithm; an unknown name is answered with the known ones."""
    seed: int = 0
    """All randomness of training comes from this, the task's number and nothing else."""
    cache_bytes: int = Field(2**30, ge=0)
    """Memory for the frozen part's output of a task's images (what does not fit waits in a file on
    disk), and as much again for that of test images (what does not fit is decoded again)."""
    lora: Lora = Lora()
    gapstream: Gapstream = Gapstream()
    mgclip: MgClip = MgClip()
    finetune: Finetune = Finetune()
    vrlwf: VrLwf = VrLwf()
    seca: Seca = Seca()
