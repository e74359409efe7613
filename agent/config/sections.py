"""Every setting but those of the methods, as frozen and validated pydantic models; no torch."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from agent.config.base import MAYBE_PATH, Section, Unset
from agent.config.methods import Method
from exporter.precision import FP32, PRECISIONS


def _one_slot(prompt: str) -> str:
    if prompt.count("{}") != 1:
        raise ValueError(f"got {prompt!r}, expected exactly one {{}} where the class name goes")
    return prompt


def _one_of(*names: str) -> BeforeValidator:
    """Accept these names alone, refusing others in pydantic's words for a Literal, which cannot be made of a table."""
    *others, last = map(repr, names)

    def check(value: object) -> object:
        if value not in names:
            raise ValueError(f"got {value!r}, expected: {', '.join(others)} or {last}")
        return value

    return BeforeValidator(check)


class Model(Section):
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


class SourceSection(Section):
    """A section below [source], whose name is a value of source.kind."""

    def missing(self) -> str:
        """What must be set before this kind of source can be used, as `key is ...; expected ...`; empty: nothing."""
        return ""


class Archive(SourceSection):
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


class KafkaSecurity(Section):
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


class KafkaImages(Section):
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


class Kafka(SourceSection):
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

    def missing(self) -> str:
        return "" if self.topics else 'topics is empty; expected the topics to read, like ["images"]'


class Source(Section):
    """Where records come from."""

    kind: str = "archive"
    """`archive` reads [source.archive] and ends with it; `kafka` follows [source.kafka] until it is stopped."""
    archive: Archive = Archive()
    kafka: Kafka = Kafka()
    max_image_bytes: int = Field(16 * 2**20, ge=1)
    """A larger encoded image is rejected."""
    max_image_pixels: int = Field(50_000_000, ge=1)
    """An image with more pixels (read from its header) is rejected before it is decoded."""
    max_label_chars: int = Field(200, ge=1)
    """A longer class name is rejected."""

    @field_validator("kind")
    @classmethod
    def _has_a_section(cls, kind: str) -> str:
        kinds = [name for name, field in cls.model_fields.items() if isinstance(field.default, SourceSection)]
        if kind not in kinds:
            raise ValueError(f"got {kind!r}, expected: {' or '.join(map(repr, kinds))}")
        return kind

    @model_validator(mode="after")
    def _complete(self) -> Source:
        if mistake := getattr(self, self.kind).missing():
            raise ValueError(f"{self.kind}.{mistake}")
        return self


class Task(Section):
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


class Spool(Section):
    """The samples of unfinished tasks, on disk as encoded bytes."""

    max_bytes: int = Field(2 * 2**30, ge=2**20)
    """When full, fetching pauses until a task is committed. Must hold at least one task."""


class Evaluation(Section):
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


class Triton(Section):
    """A model repository of the Triton server, with `layout = "triton"`."""

    repository: Annotated[Path | None, Unset] = None
    """The folder that holds its models; best on the disk of `state.path`, where files are shared instead of copied."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] = "gapstream"
    """The model's name there."""
    versions: int = Field(3, ge=1)
    """Newest versions kept; a version has the number of its commit."""


class Release(Section):
    """The ONNX model that comes out."""

    precisions: tuple[Annotated[str, _one_of(*PRECISIONS)], ...] = Field(
        (),
        description="Smaller forms beside fp32: "
        + ", ".join(f"`{name}` for {form.suits}" for name, form in PRECISIONS.items())
        + ". One that strays too far from fp32, or answers more\n"
        "than a point fewer of the hold-out right, is left out, and the release says why.",
    )
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


class State(Section):
    """Where the agent keeps what it knows."""

    path: Path = Path("state")
    """A folder of its own, on a disk of its own where many images pass. One agent at a time works on it."""
    keep_commits: int = Field(3, ge=2)
    """Newest commits kept; older ones are deleted."""
    dead_letter_bytes: int = Field(256 * 2**20, ge=2**20)
    """Rejected records of an archive are kept in the folder `dead_letters`, about the newest so many bytes."""


class Agent(Section):
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


class Http(Section):
    """/metrics, /livez, /readyz and the status page."""

    host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` is open to the network, without a login."""
    port: int = Field(9187, ge=0, le=65535)
    """0 picks a free one (logged)."""
    enabled: bool = True
    """Whether it listens at all."""


class ServeKafka(Section):
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


class Serve(Section):
    """`gapstream serve`: classification over HTTP, a process of its own beside the agent."""

    host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` is open to the network, without a login."""
    port: int = Field(9188, ge=0, le=65535)
    """0 picks a free one (logged)."""
    precision: Annotated[str, _one_of(FP32, *PRECISIONS)] = Field(
        FP32,
        description="Form of the release that answers, see release.precisions; a release without it is served in "
        f"fp32.\nOne of: {', '.join((FP32, *PRECISIONS))}",
    )
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


class Config(Section):
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
