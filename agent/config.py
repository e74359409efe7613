"""Every knob: frozen, validated pydantic models read once from a TOML file and GAPSTREAM_* variables; no torch.

A key `[task] samples` is `task.samples` in messages and GAPSTREAM_TASK__SAMPLES in the environment, which wins over
the file. Relative paths in a file are relative to that file.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

ENV_PREFIX = "GAPSTREAM_"


class ConfigError(Exception):
    """The configuration cannot be used; the message lists every mistake with the key's full name."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


def _one_slot(prompt: str) -> str:
    if prompt.count("{}") != 1:
        raise ValueError(f"got {prompt!r}, expected exactly one {{}} where the class name goes")
    return prompt


class Model(_Section):
    """Which CLIP is updated."""

    name: str = "tinyclip"
    """`tinyclip` (bundled, offline) or any open_clip architecture with transformer towers, e.g. `ViT-B-16`."""
    pretrained: str = ""
    """open_clip tag (`openai`, `laion400m_e32`), or path of a local checkpoint (.safetensors, .pt, .bin). Empty only for tinyclip,
    or `random` for random weights (benchmarks)."""
    prompt: Annotated[str, AfterValidator(_one_slot)] = "a good photo of a {}."
    """Sentence a class name is put into before the text tower reads it."""
    device: str = "auto"
    """`auto` (CUDA when there is one), `cpu`, `cuda`, `cuda:1`."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of training: `auto` is bf16 autocast on CUDA that has it, fp32 elsewhere (bitwise reproducible on CPU)."""
    threads: int = Field(0, ge=0)
    """CPU threads of the trainer; 0 is all cores."""


class Archive(_Section):
    """The embedded stream: a folder or zip of `[split/]class name/image`."""

    path: Path | Literal["bundled"] = "bundled"
    """Folder or zip; `bundled` is the CIFAR-10 sample that comes with gapstream."""
    split: str = ""
    """Only paths below this first folder are the stream; empty: no split folder (or `train` when there is one)."""
    order: Literal["classes", "shuffled", "blurry"] = "classes"
    """`classes`: class after class; `shuffled`: all mixed; `blurry`: class-incremental with `blur` of the records moved to other tasks."""
    classes_per_task: int = Field(2, ge=1)
    """With `classes` and `blurry`: so many classes are interleaved before the next ones begin; a boundary mark follows each group."""
    class_order: tuple[str, ...] = ()
    """Class names in the order they appear; empty: drawn with `seed`."""
    class_order_file: Path | None = None
    """Text file with one class name a line, or JSON list; instead of `class_order`."""
    per_class: int = Field(0, ge=0)
    """Only the first so many images of a class (names sorted as text); 0 is all."""
    blur: float = Field(0.1, ge=0, le=1)
    """With `blurry`: share of the records that come outside their class's task."""
    seed: int = 0
    """Draws the class order and the mixing."""
    rate: float = Field(0, ge=0)
    """Records a second; 0 is as fast as they are taken."""
    on_end: Literal["learn", "keep"] = "learn"
    """At the end of the archive: learn the unfinished task, or leave its records for a later run."""


class Source(_Section):
    """Where records come from."""

    kind: Literal["archive", "kafka"] = "archive"
    archive: Archive = Archive()
    max_image_bytes: int = Field(16 * 2**20, ge=1)
    """A larger encoded image is rejected."""
    max_image_pixels: int = Field(50_000_000, ge=1)
    """An image with more pixels (read from its header) is rejected before it is decoded."""
    max_label_chars: int = Field(200, ge=1)
    """A longer class name is rejected."""


class Task(_Section):
    """When a task is cut: at the first of these that holds. 0 switches one off."""

    new_classes: int = Field(0, ge=0)
    """So many classes not learned before are complete: the record that would begin one more starts the next task."""
    samples: int = Field(5000, ge=0)
    """So many samples."""
    bytes: int = Field(512 * 2**20, ge=0)
    """So many bytes of encoded images."""
    idle_s: float = Field(0, ge=0)
    """So long nothing arrived (a task with at least one sample). Depends on the clock: off where runs must repeat exactly."""
    boundaries: bool = True
    """Boundary marks in the stream cut."""
    on_stop: Literal["keep", "learn"] = "keep"
    """At a clean stop: leave an unfinished task for the next start, or learn it first."""

    @model_validator(mode="after")
    def _some_rule(self) -> Task:
        if not (self.new_classes or self.samples or self.bytes or self.idle_s or self.boundaries):
            raise ValueError("no rule would ever cut a task; set one of new_classes, samples, bytes, idle_s, boundaries")
        return self


class Spool(_Section):
    """The samples of unfinished tasks, on disk as encoded bytes."""

    max_bytes: int = Field(2 * 2**30, ge=2**20)
    """When full, fetching pauses until a task is committed. Must hold at least one task."""


class Lora(_Section):
    """Low-rank adapters on the K and V projections of both towers (MG-CLIP section 1.1)."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(1.0, gt=0)
    """Scale of the adapters is alpha / rank."""


class MgClip(_Section):
    """MG-CLIP (arXiv 2507.09118)."""

    schedule: Literal["budget", "paper"] = "budget"
    """`paper`: the first task fixes the number of epochs of all later ones. `budget`: every task may use `epochs`, and the drift is checked
    after each; crossing `drift_budget` restores the last state inside it."""
    epochs: int = Field(1, ge=1)
    """Epochs of adapter training per task (`budget`), or at most so many on the first task (`paper`, where the paper uses 10)."""
    drift_budget: float = Field(0.25, gt=0)
    """Largest relative drift of the negative similarity (the paper's alpha is 0.1, relative to the negative mean)."""
    drift_relative_to: Literal["separation", "negative"] = "separation"
    """Divisor of the drift: the untouched model's positive minus negative mean (well-conditioned), or its negative mean (paper)."""
    lr: float = Field(1e-3, gt=0)
    """Adam, of the adapters."""
    batch_size: int = Field(128, ge=1)
    visual_lr: float = Field(5e-4, gt=0)
    """Adam, of the visual classifier rows."""
    visual_epochs: int = Field(3, ge=0)
    visual_batch_size: int = Field(64, ge=1)
    fusion: Literal["calibrated", "faithful"] = "calibrated"
    """How text and visual predictions are joined: `faithful` is the published code (text softmaxed twice, 1:4); `calibrated` sums
    temperature-scaled probabilities once."""


class Method(_Section):
    """How the model learns."""

    name: str = "mgclip"
    seed: int = 0
    """All randomness of training comes from this, the task's number and nothing else."""
    cache_bytes: int = Field(2**30, ge=0)
    """Memory for the frozen part's output of a task's images; what does not fit waits in a file on disk."""
    lora: Lora = Lora()
    mgclip: MgClip = MgClip()


class Evaluation(_Section):
    """What is scored after every update."""

    holdout_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the stream's samples kept from training to measure accuracy, chosen by hash of the image; 0: none."""
    holdout_per_class: int = Field(50, ge=0)
    """At most so many held-out samples of one class."""
    test_archive: Path | Literal["bundled"] | None = None
    """Folder or zip with test images of the stream's classes, scored beside the hold-out."""
    test_split: str = ""
    """Split folder inside `test_archive`; empty: none (or `test`, then `val`, when there is one)."""
    test_per_class: int = Field(0, ge=0)
    """Only the first so many test images of a class; 0 is all."""
    probe_archive: Path | None = None
    """Folder or zip of classes that are never learned: zero-shot retention is measured on it."""
    probe_split: str = ""
    probe_per_class: int = Field(20, ge=0)
    """Only the first so many probe images of a class; 0 is all."""
    batch_size: int = Field(256, ge=1)


class Release(_Section):
    """The ONNX model that comes out."""

    opset: int = Field(20, ge=18, le=23)
    max_batch: int = Field(64, ge=4)
    """Largest batch the release is checked with."""
    parity_atol: float = Field(1e-3, gt=0)
    """Largest difference between torch and onnxruntime in embeddings and probabilities; a release beyond it is refused."""
    max_old_class_drop: float = Field(0, ge=0, le=1)
    """Gate: refuse a release whose accuracy on the classes before the task fell by more than this (0.05 is five points); 0: no gate."""


class State(_Section):
    """Where the agent keeps what it knows."""

    path: Path = Path("state")
    keep_commits: int = Field(3, ge=2)
    """Newest commits kept; older ones are deleted."""


class Agent(_Section):
    """The long-running process."""

    poll_timeout_s: float = Field(0.5, gt=0, le=5)
    stop_timeout_s: float = Field(8, gt=0)
    """After SIGTERM or SIGINT the trainer has so long before it is killed (nothing is lost: the task is read again)."""
    on_task_failure: Literal["stop", "quarantine"] = "stop"
    """A task that failed twice stops the agent with nothing committed, or is dead-lettered as a whole."""
    trainer_silent_s: float = Field(600, gt=0)
    """A trainer that says nothing for so long is killed and the task tried again."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


class Http(_Section):
    """/metrics, /livez, /readyz and the status page."""

    host: str = "127.0.0.1"
    port: int = Field(9187, ge=0, le=65535)
    """0 picks a free one (logged)."""
    enabled: bool = True


class Config(_Section):
    model: Model = Model()
    source: Source = Source()
    task: Task = Task()
    spool: Spool = Spool()
    method: Method = Method()
    evaluation: Evaluation = Evaluation()
    release: Release = Release()
    state: State = State()
    agent: Agent = Agent()
    http: Http = Http()
