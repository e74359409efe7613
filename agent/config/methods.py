"""What can be set about the methods: one section each, and [method] over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    Field,
    model_validator,
)

from agent.config.base import Section


class Lora(Section):
    """gapstream, mgclip, vrlwf and finetune train low-rank adapters on the K and V projections of both towers. A state
    folder is continued only with the adapters it began with."""

    rank: int = Field(8, ge=1)
    """The adapters have this rank; each block of a tower gets 4 * rank * width parameters."""
    alpha: float = Field(1.0, gt=0)
    """What the adapters add is multiplied by alpha / rank."""


def _apply(presets: Mapping[str, Mapping[str, Any]], values: Any) -> Any:
    """Put the values of a section's preset in the place of defaults; called before validation, while it can still be
    seen which keys were written and which are only defaults."""
    if isinstance(values, dict):
        return {**presets.get(values.get("preset", ""), {}), **values}
    return values


_MGCLIP_PRESETS = {
    "paper": {
        "schedule": "paper",
        "epochs": 10,
        "drift_budget": 0.1,
        "drift_relative_to": "negative",
        "fusion": "faithful",
    }
}
"""They are the published code's: the rule, the epochs of its dry run and the threshold of its script epoch.py, and the
fusion of its main.py."""


class MgClip(Section):
    """MG-CLIP (arXiv 2507.09118) trains adapters while the modality gap drifts little, then the rows of a visual
    classifier."""

    preset: Literal["ours", "paper"] = "ours"
    """`ours` takes the defaults of the keys of this section. `paper` takes the published form (the paper's schedule
    with a dry run of 10 epochs and a threshold of 0.1 of the negative mean, faithful fusion); any of these keys that is
    written beside it wins over it, so delete them to use it."""
    schedule: Literal["budget", "paper"] = "budget"
    """With `budget` every task may use `epochs`, the drift is checked after each, and crossing `drift_budget` restores
    the last state inside it. With `paper` a dry run on the first task finds by the drift the number of epochs that it
    and all later ones are trained for."""
    epochs: int = Field(1, ge=1)
    """With `budget` this is the number of epochs of adapter training per task, with `paper` the largest number in the
    dry run (the paper uses 10)."""
    drift_budget: float = Field(0.25, gt=0)
    """The mean similarity of images to wrong names may drift by this share of `drift_relative_to` (the paper's alpha is
    0.1, of the negative mean)."""
    drift_relative_to: Literal["separation", "negative"] = "separation"
    """The drift is divided by the untouched model's positive minus negative mean (`separation`, which is far from zero)
    or by its negative mean (`negative`, as in the paper)."""
    lr: float = Field(1e-3, gt=0)
    """Adam trains the adapters with this learning rate."""
    batch_size: int = Field(128, ge=1)
    """A step of adapter training takes this number of samples."""
    visual_lr: float = Field(5e-4, gt=0)
    """Adam trains the rows of the visual classifier with this learning rate."""
    visual_epochs: int = Field(3, ge=0)
    """The rows of the visual classifier are trained for this number of epochs; 0 leaves them class means."""
    visual_batch_size: int = Field(64, ge=1)
    """A step of training the rows takes this number of samples."""
    fusion: Literal["calibrated", "faithful"] = "calibrated"
    """The predictions of texts and of the visual classifier are joined as in the published code (`faithful`: text
    softmaxed twice, 1:4) or as one sum of probabilities, each at its own temperature (`calibrated`)."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        return _apply(_MGCLIP_PRESETS, values)


class Gapstream(Section):
    """gapstream is our own method: both towers adapt while the modality gap drifts little, beside second-order
    statistics of the untouched model's features."""

    drift_budget: float = Field(0.25, ge=0)
    """The mean similarity of images to wrong names may drift by this share of the untouched model's separation of right
    and wrong names; adapters that cross it are rolled back. With 0 the towers stay as they are. Adapters of a state
    folder that are beyond it on a task are halved until they are inside, and with 0 taken away."""
    features: int = Field(5000, ge=16)
    """An image has this number of random features (at least 16). What is kept between tasks grows with their square
    (5000: 50 MB, and 20 MB per 1000 classes), as does what an update computes; 5000 take it 0.5 GB of memory."""
    prior_images: float = Field(300, gt=0)
    """The scatter that was measured is mixed with a sphere that weighs as much as this number of images. More is
    steadier where images are few or many labels are wrong (3000), less is sharper where they are many."""


class RanPac(Section):
    """RanPAC (arXiv 2307.02251) is ridge regression on random features of the untouched model's embeddings."""

    features: int = Field(10_000, ge=16, le=20_000)
    """An image has this number of random features (16 to 20000; the paper's is 10000). What is kept between tasks grows
    with their square (10000: 200 MB on disk, and 1.2 GB of memory while it learns), and 4 kB a class for every 1000."""


class Bofa(Section):
    """BOFA (arXiv 2511.11421) trains the image tower's last projection, in directions that earlier tasks used least."""

    epochs: int = Field(15, ge=1)
    """The whole projection is trained on a task for this number of epochs."""
    lr: float = Field(0.05, gt=0)
    """SGD with momentum 0.9 begins with this learning rate and decays it along a cosine."""
    batch_size: int = Field(128, ge=1)
    """A step takes this number of samples."""
    rank: int = Field(64, ge=1)
    """What a task after the first changes is confined to this number of directions."""
    safe_epochs: int = Field(2, ge=1)
    """In these directions a task after the first is trained for this number of further epochs."""
    safe_lr: float = Field(1e-3, gt=0)
    """The further epochs have this learning rate."""


class Finetune(Section):
    """finetune trains on each task in turn, by a loss over the task's own names and with nothing that preserves; it
    predicts by text."""

    trainable: Literal["lora", "all"] = "lora"
    """`lora` trains adapters (`method.lora`); `all` trains every weight behind the frozen part of both towers, for
    which `lr` must be some hundred times smaller."""
    epochs: int = Field(3, ge=1)
    """A task is trained on for this number of epochs."""
    lr: float = Field(4e-3, gt=0)
    """Adam begins with this learning rate and decays it to a hundredth, along a cosine over the task; 4e-3 suits
    adapters on tinyclip."""
    batch_size: int = Field(128, ge=1)
    """A step takes this number of samples."""
    label_smoothing: float = Field(0, ge=0, lt=1)
    """This share (0 to below 1) of the target is spread over all names of the task."""


_VRLWF_PRESETS = {
    "paper": {"loop": "published", "trainable": "all", "epochs": 15, "lr": 1e-6, "batch_size": 100},
    "zscl": {
        "sentences": 1000,
        "words": 10,
        "redraw": "task",
        "temperature": 2.0,
        "weight": 1.0,
        "both_towers": False,
        "both_directions": True,
        "seen_names": 0,
        "label_smoothing": 0.2,
    },
}
"""`paper` is the recipe of the published code of VR-LwF, whose loss is the default. `zscl` is the form of the LwF-VR
baseline in the published code of ZSCL (arXiv 2303.06628); its learning rate and epochs suit its data and are left to
the reader."""


class VrLwf(Finetune):
    """VR-LwF (arXiv 2207.09248) is finetune, held in place by distillation over sentences of random words."""

    preset: Literal["ours", "paper", "zscl"] = "ours"
    """`ours` takes the defaults of the keys of this section: the paper's loss, on adapters. `paper` takes the paper's
    recipe too (published loop, all weights, 15 epochs, learning rate 1e-6, batches of 100). `zscl` takes the form of
    ZSCL's baseline (1000 sentences of 10 words drawn once per task, temperature 2, weight 1, image tower only, both
    directions, no seen names, label smoothing 0.2). Any of these keys that is written beside a preset wins over it, so
    delete them to use it."""
    loop: Literal["ours", "published"] = "ours"
    """With `ours` the learning rate decays along a cosine, over images as they are. With `published` it is constant,
    the scale of similarities is trained too, images are cropped and mirrored at random anew in every epoch (each is
    decoded again), batches that are not full are left out, and gradients are clipped to a norm of 1."""
    weight: float = Field(0.5, ge=0)
    """The distillation has this weight in the loss; at 0 this is `finetune` exactly."""
    sentences: int = Field(100, ge=1)
    """This number of random sentences is drawn at a time (see `redraw`)."""
    words: int = Field(8, ge=1)
    """A sentence has this number of random tokens; more than the text tower reads stop the start."""
    redraw: Literal["step", "task"] = "step"
    """New sentences are drawn for every `step` or once per `task`."""
    temperature: float = Field(1.0, gt=0)
    """The distillation's probabilities have this temperature."""
    both_towers: bool = True
    """The student reads the sentences with its own text tower, so that both towers are held in place; false gives it
    the teacher's, which holds the image tower alone."""
    both_directions: bool = False
    """It is also distilled which of a batch's images belongs to a sentence."""
    seen_names: int = Field(100, ge=0)
    """From the second task on the names of the task and this number of earlier ones, drawn anew in every step, are
    distilled as well (LwF); 0 leaves that out."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        return _apply(_VRLWF_PRESETS, values)


class Seca(Section):
    """SECA (arXiv 2508.01579) distils from earlier adapters as the texts say, and refines prototypes by text."""

    form: Literal["code", "paper"] = "code"
    """Where the two differ, `code` averages the relevance after the softmax, drops the least used adapter of a full
    pool, regularises by cosine and compares names under the prompt that is trained; `paper` averages before it, drops
    the most used, regularises by squared distance and compares names as the untouched model reads them."""
    sg_akt: bool = True
    """The adapter is held to the aggregate of a pool of earlier ones (SG-AKT); false distils nothing."""
    se_vpr: bool = True
    """Visual prototypes are learned and predict too (SE-VPR); false predicts by text alone."""
    epochs: int = Field(3, ge=1)
    """A task is trained on for this number of epochs."""
    milestones: tuple[int, ...] = (2,)
    """After each of these epochs the learning rates fall to a tenth."""
    lr: float = Field(1e-3, gt=0)
    """Adam trains the adapter, the aggregation and the prototypes' refinement with this learning rate."""
    prompt_lr: float = Field(5e-4, gt=0)
    """Adam trains the task's prompt with this learning rate."""
    weight_decay: float = Field(5e-4, ge=0)
    """Adam has this weight decay (L2) for all that it trains."""
    batch_size: int = Field(100, ge=1)
    """A step takes this number of samples."""
    bottleneck: int = Field(16, ge=1)
    """The adapter beside every MLP of the image tower has this width."""
    adapter_scale: float = Field(0.1, gt=0)
    """The adapter's output is multiplied by this."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """In training, this share (0 to below 1) of the adapter's width is dropped."""
    context: int = Field(8, ge=1)
    """A prompt has this number of learned vectors before the class name."""
    prompts: int = Field(10, ge=1)
    """At most this number of prompts is kept, one of each task; beyond it the oldest goes."""
    pool: int = Field(5, ge=1)
    """At most this number of adapters is kept in the pool; `form` says which one goes beyond it."""
    logit_scale: float = Field(20, gt=0)
    """In the distillation and the prediction, cosines are multiplied by this (the published code's temperature)."""
    fusion: Literal["calibrated", "faithful"] = "calibrated"
    """The answers of texts and of prototypes are joined as in the published code (`faithful`: exponentials over the
    highest to be expected, so that the surer answer weighs more) or as the mean of a softmax each (`calibrated`)."""


class Method(Section):
    """This section says how the model learns."""

    name: str = "gapstream"
    """The model is updated by this method; an unknown name is answered with the known ones."""
    seed: int = 0
    """All randomness of training follows from this number and the task's, and from nothing else."""
    cache_bytes: int = Field(2**30, ge=0)
    """Of a task's images the frozen part's output takes at most this number of bytes of memory; where it is larger it
    goes to a file on disk. Test images may take as many again, and those beyond are decoded anew. Each rank that shares
    an update has both bounds for its share; of test images beyond, it is sent its share anew."""
    lora: Lora = Lora()
    gapstream: Gapstream = Gapstream()
    mgclip: MgClip = MgClip()
    ranpac: RanPac = RanPac()
    bofa: Bofa = Bofa()
    finetune: Finetune = Finetune()
    vrlwf: VrLwf = VrLwf()
    seca: Seca = Seca()
