"""Every knob: frozen, validated pydantic models read once from a TOML file and GAPSTREAM_* variables; no torch.

A key `[task] samples` is `task.samples` in messages and GAPSTREAM_TASK__SAMPLES in the environment, which wins over
the file. Relative paths in a file are relative to that file.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo

ENV_PREFIX = "GAPSTREAM_"


class ConfigError(Exception):
    """The configuration cannot be used; the message lists every mistake with the key's full name."""


Unset = BeforeValidator(lambda value: None if value == "" else value)
"""For keys whose default is None, which TOML cannot say: the empty string does."""

MAYBE_PATH = "a path when it ends like a file"
"""Metadata of a text key that may name a file, which is then relative to the configuration's folder."""


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
    pretrained: Annotated[str, MAYBE_PATH] = ""
    """open_clip tag (`openai`, `laion400m_e32`), path of a local checkpoint (.safetensors, .pt, .bin), or `random` for
    random weights (benchmarks). Empty only for tinyclip."""
    prompt: Annotated[str, AfterValidator(_one_slot)] = "a good photo of a {}."
    """Sentence a class name is put into before the text tower reads it."""
    device: str = "auto"
    """`auto` (CUDA when there is one), `cpu`, `cuda`, `cuda:1`."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of training: `auto` is bf16 autocast on CUDA that has it, `fp32` elsewhere (bitwise reproducible on a
    CPU); `bf16` and `fp16` force autocast."""
    threads: int = Field(0, ge=0)
    """CPU threads of the trainer; 0 is all cores."""


class Archive(_Section):
    """The embedded stream: a folder or zip of `[split/]class name/image`."""

    path: Literal["bundled"] | Path = "bundled"
    """Folder or zip; `bundled` is the CIFAR-10 sample that comes with gapstream."""
    split: str = ""
    """Only paths below this first folder are the stream; empty: no split folder (or `train` when there is one)."""
    order: Literal["classes", "shuffled", "blurry"] = "classes"
    """`classes`: class after class; `shuffled`: all mixed; `blurry`: class-incremental with `blur` of the records moved
    to other tasks."""
    classes_per_task: int = Field(2, ge=1)
    """With `classes` and `blurry`: so many classes are interleaved before the next ones begin; a boundary mark follows
    each group."""
    class_order: tuple[str, ...] = ()
    """Class names in the order they appear; empty: drawn with `seed`."""
    class_order_file: Annotated[Path | None, Unset] = None
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


def _a_start(start: str) -> str:
    if start not in ("earliest", "latest", "group"):
        try:
            datetime.fromisoformat(start)
        except ValueError:
            text = f"got {start!r}, expected earliest, latest, group or a time like 2026-11-21T10:00:00Z"
            raise ValueError(text) from None
    return start


def _places(prefixes: tuple[str, ...]) -> tuple[str, ...]:
    for prefix in prefixes:
        scheme, separator, rest = prefix.partition("://")
        if scheme not in ("https", "http", "s3", "file") or not separator or len(rest) < 2 or not rest.endswith("/"):
            raise ValueError(f"got {prefix!r}, expected https://host/, http://host/, s3://bucket/ or file:///folder/")
    return prefixes


def _dead_letter_topic(name: str, info: ValidationInfo) -> str:
    rest = name.replace("{topic}", "")
    if not re.fullmatch(r"[\w.-]+", rest, re.ASCII):
        text = "letters, digits, `.`, `_` and `-`, and {topic} for the topic the records came from"
        raise ValueError(f"got {name!r}, expected a topic's name of its own: {text}")
    topics = info.data.get("topics", ())
    if both := [topic for topic in topics if name.replace("{topic}", topic) in topics]:
        read = name.replace("{topic}", both[0])
        raise ValueError(f"got {name!r}, so the rejected of {both[0]} would go to {read}, which is read itself")
    return name


class KafkaSecurity(_Section):
    """Who may read, and who we are. A secret comes from the environment, say from
    GAPSTREAM_SOURCE__KAFKA__SECURITY__PASSWORD, from the file named instead, or from here; it is never printed."""

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """With or without TLS, with or without a login."""
    cafile: Annotated[Path | None, Unset] = None
    """PEM certificates the brokers' are checked against; empty: the system's."""
    certfile: Annotated[Path | None, Unset] = None
    """Our own certificate (PEM), where brokers ask for one."""
    keyfile: Annotated[Path | None, Unset] = None
    """Its private key (PEM)."""
    key_password: Annotated[SecretStr | None, Unset] = None
    """Of an encrypted private key."""
    key_password_file: Annotated[Path | None, Unset] = None
    """File that holds it."""
    check_hostname: bool = True
    """The brokers' certificates must name the host connected to."""
    mechanism: Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = ""
    """With SASL_PLAINTEXT and SASL_SSL."""
    username: str = ""
    """With PLAIN and SCRAM."""
    password: Annotated[SecretStr | None, Unset] = None
    """With PLAIN and SCRAM."""
    password_file: Annotated[Path | None, Unset] = None
    """File that holds it."""
    token_file: Annotated[Path | None, Unset] = None
    """OAUTHBEARER: file with the current token, read at every login. Or, instead:"""
    token_url: str = ""
    """OAUTHBEARER: where tokens are given for client credentials."""
    client_id: str = ""
    """Sent to `token_url`."""
    client_secret: Annotated[SecretStr | None, Unset] = None
    """Sent to `token_url`."""
    client_secret_file: Annotated[Path | None, Unset] = None
    """File that holds it."""
    scope: str = ""
    """Asked for at `token_url`; empty: its default."""

    @model_validator(mode="after")
    def _complete(self) -> KafkaSecurity:
        missing: list[str] = []
        for name in ("key_password", "password", "client_secret"):
            if getattr(self, name) is not None and getattr(self, f"{name}_file") is not None:
                missing.append(f"only one of {name} and {name}_file")
        if self.protocol.startswith("SASL") != bool(self.mechanism):
            missing.append("mechanism exactly with the protocols SASL_PLAINTEXT and SASL_SSL")
        if self.mechanism == "OAUTHBEARER":
            if bool(self.token_file) == bool(self.token_url):
                missing.append("with OAUTHBEARER one of token_file and token_url")
        elif self.mechanism and not (self.username and (self.password or self.password_file)):
            missing.append(f"with {self.mechanism} username and password (or password_file)")
        if missing:
            raise ValueError(f"expected {'; '.join(missing)}")
        return self


class KafkaImages(_Section):
    """Images that records only point at."""

    allowed: Annotated[tuple[str, ...], AfterValidator(_places)] = ()
    """Where they may be: `https://images.example.com/`, `s3://bucket/path/`, `file:///data/`; empty: nowhere."""
    timeout_s: float = Field(10, gt=0, le=30)
    """Of one attempt; there are three."""
    cafile: Annotated[Path | None, Unset] = None
    """PEM certificates for https; empty: the system's."""
    s3_endpoint: str = "https://s3.amazonaws.com"
    """Where s3:// is; any service that speaks S3."""
    s3_region: str = "us-east-1"
    """Requests are signed for it."""
    s3_access_key: str = ""
    """Empty: anonymous requests."""
    s3_secret_key: Annotated[SecretStr | None, Unset] = None
    """Belongs to `s3_access_key`."""
    s3_secret_key_file: Annotated[Path | None, Unset] = None
    """File that holds it."""


class Kafka(_Section):
    """Topics of a Kafka cluster, all their partitions. One agent reads them; its position is in its commits."""

    bootstrap_servers: tuple[str, ...] = ("localhost:9092",)
    """Some of the brokers, `host:port`."""
    topics: tuple[str, ...] = ()
    """The topics to read, all their partitions."""
    group: str = "gapstream"
    """Consumer group the offsets of commits are copied to, for lag tools; empty: none. Never read back."""
    start: Annotated[str, AfterValidator(_a_start)] = "earliest"
    """Where reading begins without a commit: `earliest`, `latest`, `group` (the group's offsets, else earliest) or a
    time (ISO 8601). It counts until the first commit."""
    on_lost: Literal["stop", "skip"] = "stop"
    """When retention deleted what follows the last commit, or the log was truncated or created again: stop, or go on
    with what there is and count the rest as skipped."""
    merge_wait_s: float = Field(2, ge=0)
    """With several partitions, a record waits until no earlier one can come; this long for a producer that is late."""
    discover_s: float = Field(10, gt=0)
    """How often new partitions are looked for."""
    fetch_bytes: int = Field(16 * 2**20, ge=2**16)
    """Memory for what was fetched and is not on the spool yet, about."""
    stall_s: float = Field(120, ge=60)
    """The agent stops when the Kafka client does not come back for so long."""
    dead_letter_topic: Annotated[str, AfterValidator(_dead_letter_topic)] = Field("{topic}.dlq", validate_default=True)
    """Where rejected records go; `{topic}` is the topic they came from."""
    dead_letter_create: bool = True
    """Create it where it does not exist (one partition, the cluster's defaults)."""
    breaker_share: float = Field(0.9, gt=0, le=1)
    """When more than this share of the last 1000 records was rejected, reading pauses and says so; 1: never."""
    breaker_pause_s: float = Field(60, gt=0)
    """So long."""
    security: KafkaSecurity = KafkaSecurity()
    images: KafkaImages = KafkaImages()


class Source(_Section):
    """Where records come from."""

    kind: Literal["archive", "kafka"] = "archive"
    """`archive` reads [source.archive] and ends with it; `kafka` follows [source.kafka] until it is stopped."""
    archive: Archive = Archive()
    kafka: Kafka = Kafka()
    max_image_bytes: int = Field(16 * 2**20, ge=1)
    """A larger encoded image is rejected."""
    max_image_pixels: int = Field(50_000_000, ge=1)
    """An image with more pixels (read from its header) is rejected before it is decoded."""
    max_label_chars: int = Field(200, ge=1)
    """A longer class name is rejected."""

    @model_validator(mode="after")
    def _topics(self) -> Source:
        if self.kind == "kafka" and not self.kafka.topics:
            raise ValueError('kafka.topics is empty; expected the topics to read, like ["images"]')
        return self


class Task(_Section):
    """When a task is cut: at the first of these that holds. 0 switches one off."""

    new_classes: int = Field(0, ge=0)
    """So many classes not learned before are complete: the record that would begin one more starts the next task."""
    samples: int = Field(5000, ge=0)
    """So many samples."""
    bytes: int = Field(512 * 2**20, ge=0)
    """So many bytes of encoded images."""
    idle_s: float = Field(0, ge=0)
    """So long nothing arrived (a task with at least one sample). Depends on the clock: off where runs must repeat
    exactly."""
    boundaries: bool = True
    """Boundary marks in the stream cut."""
    on_stop: Literal["keep", "learn"] = "keep"
    """At a clean stop: leave an unfinished task for the next start, or learn it first."""

    @model_validator(mode="after")
    def _some_rule(self) -> Task:
        if not (self.new_classes or self.samples or self.bytes or self.idle_s or self.boundaries):
            raise ValueError("no rule would ever cut; set one of new_classes, samples, bytes, idle_s, boundaries")
        return self


class Spool(_Section):
    """The samples of unfinished tasks, on disk as encoded bytes."""

    max_bytes: int = Field(2 * 2**30, ge=2**20)
    """When full, fetching pauses until a task is committed. Must hold at least one task."""


class Lora(_Section):
    """Low-rank adapters on the K and V projections of both towers (MG-CLIP section 1.1)."""

    rank: int = Field(8, ge=1)
    """Of the adapters; they have 4 * rank * width parameters per block."""
    alpha: float = Field(1.0, gt=0)
    """Scale of the adapters is alpha / rank."""


class MgClip(_Section):
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


class Gapstream(_Section):
    """The method of our own: second-order statistics of the untouched model's features."""

    features: int = Field(5000, ge=16)
    """Random features of an image. What is kept between tasks grows with their square (5000: 50 MB, and 20 MB per 1000
    classes), what an update computes too; 5000 take it 0.5 GB of memory."""
    prior_images: float = Field(1000, gt=0)
    """So many images' worth of a spherical scatter is added to the one measured: more is steadier where images are few,
    less is sharper where they are many."""


class Finetune(_Section):
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


class Seca(_Section):
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


class Method(_Section):
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


class Evaluation(_Section):
    """What is scored after every update."""

    holdout_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the stream's samples kept from training to measure accuracy, chosen by hash of the image; 0: none."""
    holdout_per_class: int = Field(50, ge=0)
    """At most so many held-out samples of one class."""
    test_archive: Annotated[Literal["bundled"] | Path | None, Unset] = None
    """Folder or zip with test images of the stream's classes, scored beside the hold-out."""
    test_split: str = ""
    """Split folder inside `test_archive`; empty: none (or `test`, then `val`, when there is one)."""
    test_per_class: int = Field(0, ge=0)
    """Only the first so many test images of a class; 0 is all."""
    probe_archive: Annotated[Path | None, Unset] = None
    """Folder or zip of classes that are never learned: zero-shot retention is measured on it."""
    probe_split: str = ""
    """Split folder inside `probe_archive`; empty: none (or `test`, then `val`, when there is one)."""
    probe_per_class: int = Field(20, ge=0)
    """Only the first so many probe images of a class; 0 is all."""
    batch_size: int = Field(256, ge=1)
    """Images scored at once."""


class Triton(_Section):
    """A model repository of the Triton server, with `layout = "triton"`."""

    repository: Annotated[Path | None, Unset] = None
    """The folder that holds its models; best on the disk of `state.path`, where files are shared instead of copied."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] = "gapstream"
    """The model's name there."""
    versions: int = Field(3, ge=1)
    """Newest versions kept; a version has the number of its commit."""


class Release(_Section):
    """The ONNX model that comes out."""

    precisions: tuple[Literal["fp16", "int8"], ...] = ()
    """Smaller forms beside fp32: `fp16` for GPUs, `int8` for CPUs. One that strays too far from fp32, or answers more
    than a point fewer of the hold-out right, is left out, and the release says why."""
    text: bool = True
    """Also release the text tower and its tokenizer, so that names never learned can be scored beside the classes. It
    takes the tower's size on disk (28 MB for the bundled model, 254 MB for ViT-B-32), most of it only once for all
    releases."""
    layout: Literal["folder", "triton"] = "folder"
    """`folder`: only in the state folder; `triton`: also as a version in [release.triton]."""
    triton: Triton = Triton()

    opset: int = Field(20, ge=18, le=23)
    """ONNX operator set of the graph."""
    max_batch: int = Field(64, ge=4)
    """Largest batch the release is checked with."""
    parity_atol: float = Field(1e-3, gt=0)
    """Largest difference between torch and onnxruntime in embeddings and probabilities; a release beyond it is
    refused."""
    max_old_class_drop: float = Field(0, ge=0, le=1)
    """Gate: refuse a release whose accuracy on the classes before the task fell by more than this (0.05 is five
    points); 0: no gate."""

    @model_validator(mode="after")
    def _somewhere(self) -> Release:
        if self.layout == "triton" and self.triton.repository is None:
            raise ValueError('triton.repository is empty; layout = "triton" needs the folder of a model repository')
        return self


class State(_Section):
    """Where the agent keeps what it knows."""

    path: Path = Path("state")
    """A folder of its own, on a disk of its own where many images pass. One agent at a time works on it."""
    keep_commits: int = Field(3, ge=2)
    """Newest commits kept; older ones are deleted."""
    dead_letter_bytes: int = Field(256 * 2**20, ge=2**20)
    """Rejected records of an archive are kept in the folder `dead_letters`, about the newest so many bytes."""


class Agent(_Section):
    """The long-running process."""

    poll_timeout_s: float = Field(0.5, gt=0, le=5)
    """How long one look at the stream waits for records; signals are noticed in between."""
    stop_timeout_s: float = Field(5, gt=0)
    """After SIGTERM or SIGINT the trainer has so long before it is killed (nothing is lost: the task is read again)."""
    on_task_failure: Literal["stop", "quarantine"] = "stop"
    """A task that failed twice stops the agent with nothing committed, or is dead-lettered as a whole."""
    trainer_silent_s: float = Field(600, gt=0)
    """A trainer that says nothing for so long is killed and the task tried again."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Of the log on standard error."""


class Http(_Section):
    """/metrics, /livez, /readyz and the status page."""

    host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` is open to the network, without a login."""
    port: int = Field(9187, ge=0, le=65535)
    """0 picks a free one (logged)."""
    enabled: bool = True
    """Whether it listens at all."""


class ServeKafka(_Section):
    """`gapstream serve --kafka`: images of topics in, predictions out, beside HTTP. Cluster, security, and where images
    may be that messages only point at, are those of [source.kafka]."""

    topics: tuple[str, ...] = ()
    """The topics to answer, in the format the learner reads; class names are not needed."""
    output: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,249}$")] = "predictions"
    """Where the predictions go, each under the key of its image."""
    create: bool = True
    """Create it where it does not exist, with as many partitions as the largest of `topics`."""
    group: str = Field("gapstream-serve", min_length=1)
    """Consumer group: every process of it answers a part of the partitions. Its transactions bear names that begin with
    it."""
    start: Literal["earliest", "latest"] = "earliest"
    """Where the group begins in a partition that it has no offset of. Where retention deleted its next messages, it
    goes on with the oldest there are."""
    top: int = Field(5, ge=0)
    """Classes listed in a prediction; 0 is all."""
    headers: tuple[str, ...] = ()
    """Headers of a message that its prediction carries on."""
    max_records: int = Field(256, ge=1)
    """Messages answered in one transaction."""
    fetch_bytes: int = Field(16 * 2**20, ge=2**16)
    """Memory for what was fetched and not answered yet, about."""

    @model_validator(mode="after")
    def _no_circle(self) -> ServeKafka:
        if self.output in self.topics:
            raise ValueError(f"output is {self.output}, which is one of the topics; expected a topic of its own")
        return self


class Serve(_Section):
    """`gapstream serve`: classification over HTTP, a process of its own beside the agent."""

    host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` is open to the network, without a login."""
    port: int = Field(9188, ge=0, le=65535)
    """0 picks a free one (logged)."""
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """Form of the release that answers, see release.precisions; a release without it is served in fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is CUDA when onnxruntime can use it."""
    threads: int = Field(0, ge=0)
    """CPU threads for a batch; 0 is all cores."""
    max_batch: int = Field(64, ge=1)
    """Images answered at once: those that came while the batch before was answered."""
    max_images: int = Field(64, ge=1)
    """Images in one request."""
    max_request_bytes: int = Field(32 * 2**20, ge=1)
    """A larger request is refused."""
    max_names: int = Field(64, ge=0)
    """Names never learned that one request may ask for; each may be as long as source.max_label_chars."""
    max_requests: int = Field(32, ge=1)
    """Requests at once; one more is told to come again (503)."""
    kafka: ServeKafka = ServeKafka()


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
    serve: Serve = Serve()


def load(path: Path | None, env: Mapping[str, str], overrides: Mapping[str, str] | None = None) -> Config:
    """The configuration from a TOML file, over it GAPSTREAM_* variables, over them `overrides` (full key -> text).

    Without a file every key has its default. Text from `env` and `overrides` is read as the key's type; a list is
    written as in TOML or with commas. Raises ConfigError that lists every mistake.
    """
    mistakes: list[str] = []
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if path is not None:
        values = _read_toml(path, mistakes)
        _resolve_paths(values, Config, path.absolute().parent)
    for variable, text in sorted(env.items()):
        if variable.startswith(ENV_PREFIX):
            key = variable.removeprefix(ENV_PREFIX).lower().replace("__", ".")
            _set(values, origins, key, text, variable, mistakes)
    for key, text in (overrides or {}).items():
        _set(values, origins, key, text, "--set", mistakes)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        mistakes += _explain(error, origins)
    if mistakes:
        where = f" in {path}" if path else ""
        raise ConfigError("\n  ".join([f"the configuration{where} has {len(mistakes)} mistake(s):", *mistakes]))
    return config


def resolved(config: Config) -> dict[str, Any]:
    """Every key with its value, JSON-able, secrets masked."""
    return config.model_dump(mode="json")


def to_toml(config: Config, documented: bool = False) -> str:
    """`config` as a file that `load` reads back (but for masked secrets); with `documented` each key is explained."""
    lines: list[str] = []

    def write(section: type[BaseModel], values: Mapping[str, Any], prefix: str) -> None:
        fields = section.model_fields
        if prefix:
            lines.extend(["", *(_comment(section.__doc__) if documented else []), f"[{prefix}]"])
        for name, field in fields.items():
            if not _is_section(field):
                if documented:
                    lines.extend(_comment(field.description, field))
                lines.append(f"{name} = {_toml_value(values[name])}")
        for name, field in fields.items():
            if _is_section(field):
                write(_section(field), values[name], f"{prefix}.{name}".lstrip("."))

    if documented:
        lines += _comment(_EXAMPLE_HEAD)
    write(Config, resolved(config), "")
    return "\n".join(lines).lstrip("\n") + "\n"


_EXAMPLE_HEAD = """Every key of gapstream with its default. Delete what you do not change; run with

    gapstream run --config gapstream.toml

The environment wins over this file: GAPSTREAM_TASK__SAMPLES=100 is samples under [task]. Relative paths are relative
to this file. All mistakes are reported at once; `gapstream config` prints what is in force."""


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _section(field: FieldInfo) -> type[BaseModel]:
    assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    return field.annotation


def _leaves(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Full name and field of every key below `section`."""
    for name, field in section.model_fields.items():
        if _is_section(field):
            yield from _leaves(_section(field), f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _read_toml(path: Path, mistakes: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        mistakes.append(f"{path} cannot be read: {error.strerror or error}")
    except UnicodeDecodeError as error:
        mistakes.append(f"{path} is not UTF-8: {error}")
    except tomllib.TOMLDecodeError as error:
        mistakes.append(f"{path} is not TOML: {error}")
    return {}


def _resolve_paths(values: dict[str, Any], section: type[BaseModel], base: Path) -> None:
    for name, field in section.model_fields.items():
        value = values.get(name)
        if _is_section(field):
            if isinstance(value, dict):
                _resolve_paths(value, _section(field), base)
        elif isinstance(value, str) and value not in _literals(field.annotation) and _names_a_file(field, value):
            values[name] = str(base / value)


def _names_a_file(field: FieldInfo, value: str) -> bool:
    if MAYBE_PATH in field.metadata:
        return Path(value).suffix in (".safetensors", ".pt", ".bin")
    return bool(value) and Path in (field.annotation, *get_args(field.annotation))


def _is_secret(field: FieldInfo) -> bool:
    return SecretStr in get_args(field.annotation)


def _literals(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(value for part in get_args(annotation) for value in _literals(part))


def _set(
    values: dict[str, Any], origins: dict[str, str], key: str, text: str, origin: str, mistakes: list[str]
) -> None:
    """Put the text of one variable or override where its key is."""
    field = dict(_leaves()).get(key)
    if field is None:
        mistakes.append(f"{key} ({origin}): there is no such key{_did_you_mean(key)}")
        return
    *sections, name = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            return  # the file has a value where a section belongs, which is a mistake of its own
        values = inner
    origins[key] = origin
    values[name] = text
    if get_origin(field.annotation) is tuple:
        try:
            values[name] = tomllib.loads(f"list = {text}")["list"] if text.startswith("[") else _comma_separated(text)
        except tomllib.TOMLDecodeError:
            mistakes.append(f'{key} ({origin}): got {text}, expected a list as in TOML, like ["cat", "dog"]')
            values[name] = ()


def _comma_separated(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _explain(error: ValidationError, origins: Mapping[str, str]) -> list[str]:
    """One line for each key; a key of several types has one error for each of them."""
    found: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        key, known = _full_name(detail["loc"])
        where = f"{key} ({origins[key]})" if key in origins else key
        if detail["type"] == "extra_forbidden" and not known:
            text = f"there is no such key{_did_you_mean(key)}"
        elif detail["type"] == "value_error":
            text = str(detail["ctx"]["error"])
        else:
            field = dict(_leaves()).get(key)
            got = "a secret" if field and _is_secret(field) else repr(detail["input"])
            text = f"got {got}, expected: {detail['msg'].removeprefix('Input should be ')}"
        found.setdefault(where, []).append(text)
    lines = []
    for where, texts in found.items():
        first, *others = dict.fromkeys(texts)
        lines.append(f"{where}: {first}" + "".join(f" or {other.partition('expected: ')[2]}" for other in others))
    return lines


def _full_name(location: tuple[int | str, ...]) -> tuple[str, bool]:
    """The key a validation error is about, without pydantic's marks for parts of a union, and whether it exists."""
    names: list[str] = []
    section: type[BaseModel] = Config
    for part in location:
        field = section.model_fields.get(str(part))
        names.append(str(part))
        if field is None:
            return ".".join(names), False
        if not _is_section(field):
            break
        section = _section(field)
    return ".".join(names), True


def _did_you_mean(key: str) -> str:
    keys = [name for name, _ in _leaves()]
    last = key.rpartition(".")[2]
    same_name = [name for name in keys if name.rpartition(".")[2] == last or name.replace(".", "_") == key]
    close = same_name or difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _comment(text: str | None, field: FieldInfo | None = None) -> list[str]:
    lines = [line.strip() for line in (text or "").strip().splitlines()]
    choices = _literals(field.annotation) if field else ()
    if len(choices) > 1 and not all(f"`{choice}`" in (text or "") for choice in choices):
        lines.append("One of: " + ", ".join(map(str, choices)))
    return [f"# {line}".rstrip() for line in lines]


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    return json.dumps("" if value is None else value, ensure_ascii=False)
