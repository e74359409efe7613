"""Every setting but those of methods, Kafka and a fleet, as frozen and validated pydantic models; no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from agent.config.base import MAYBE_PATH, Section, SourceSection, Unset
from agent.config.fleet import FLEET_METHODS, Fleet
from agent.config.kafka import Kafka, ServeKafka
from agent.config.methods import Method
from agent.config.training import Training
from exporter.precision import AUTO, FP32, MIN_GAIN, PRECISIONS


def _one_slot(prompt: str) -> str:
    """Accept a prompt with one place for the class name."""
    if prompt.count("{}") != 1:
        raise ValueError(f"got {prompt!r}, expected exactly one {{}} where the class name goes")
    return prompt


def _provider(value: str) -> str:
    """Accept a provider of exporter.providers, with the device that OpenVINO's may have."""
    if not re.fullmatch(r"tensorrt|openvino(:[A-Z][A-Z0-9_.,:]*)?", value):
        expected = "'tensorrt', 'openvino' or, say, 'openvino:GPU'; CUDA and the CPU are serve.device"
        raise ValueError(f"got {value!r}, expected: {expected}")
    return value


def _one_of(*names: str) -> BeforeValidator:
    """Accept these names alone, refusing others in pydantic's words for a Literal, which cannot be made of a table."""
    *others, last = map(repr, names)

    def check(value: object) -> object:
        if value not in names:
            raise ValueError(f"got {value!r}, expected: {', '.join(others)} or {last}")
        return value

    return BeforeValidator(check)


class Model(Section):
    """This section chooses the CLIP model that learns."""

    name: str = "tinyclip"
    """The architecture is `tinyclip` (bundled, works without a network) or any of open_clip with transformer towers,
    such as `ViT-B-16`."""
    pretrained: Annotated[str, MAYBE_PATH] = ""
    """The weights are named by a tag of open_clip (`openai`, `laion400m_e32`), by the path of a local checkpoint
    (.safetensors, .pt, .bin), or by `random` (random weights, for benchmarks). Only tinyclip needs none."""
    prompt: Annotated[str, AfterValidator(_one_slot)] = "a good photo of a {}."
    """The text tower reads every class name inside this sentence, in which one `{}` stands for the name. A state folder
    is continued only with the prompt it began with."""
    device: str = "auto"
    """The trainer computes on this device: `auto` (CUDA when there is one, else the CPU), `cpu`, `cuda` or, of several,
    say `cuda:1`. Where torch has no CUDA device, asking for one stops the start."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """The trainer computes in this arithmetic: `auto` is bf16 (autocast) on a CUDA device that supports it and fp32
    elsewhere; `fp32` and `bf16` are used wherever it runs. With fp32 on a CPU the same seed and number of threads give
    the same bits."""
    threads: int = Field(0, ge=0)
    """The trainer computes with this number of CPU threads; 0 takes all cores."""


class Archive(SourceSection):
    """This source is a folder or zip of `[split/]class name/image`, a stream that needs no broker and has an end."""

    path: Literal["bundled"] | Path = "bundled"
    """This folder or zip is read; `bundled` is the sample of CIFAR-10 that comes with gapstream."""
    split: str = ""
    """Only images below the top folder of this name are the stream; empty takes the folder `train` where there is one,
    and otherwise the class folders at the top."""
    order: Literal["classes", "shuffled", "blurry"] = "classes"
    """`classes` brings one group of classes after another, `blurry` does so with a share `blur` of every class's
    records moved to other groups, and `shuffled` mixes all records."""
    classes_per_task: int = Field(2, ge=1)
    """With `classes` and `blurry` this number of classes is a group: their records are interleaved, and a boundary mark
    follows them. The last group has the classes that remain."""
    class_order: tuple[str, ...] = ()
    """The stream brings the classes in this order, in which every class stands once; empty draws the order with
    `seed`."""
    class_order_file: Annotated[Path | None, Unset] = None
    """This file holds the order instead of `class_order`: text with one class name a line, or a JSON list; empty names
    none."""
    per_class: int = Field(0, ge=0)
    """At most this number of images of each class is read, the first by file name sorted as text; 0 reads all."""
    blur: float = Field(0.1, ge=0, le=1)
    """With `blurry`, this share (0 to 1) of every class's records comes in the groups of other classes."""
    seed: int = 0
    """The order of classes and records is drawn with this number; the same number gives the same stream."""
    rate: float = Field(0, ge=0)
    """At most this number of records a second is read; 0 reads as fast as they are taken."""
    on_end: Literal["learn", "keep"] = "learn"
    """At the end of the archive the agent learns the unfinished task (`learn`) or leaves its records for a later run
    (`keep`)."""


class Source(Section):
    """This section says where records come from, and how large they may be."""

    kind: str = "archive"
    """`archive` reads [source.archive] and ends with it; `kafka` follows [source.kafka] until it is stopped."""
    archive: Archive = Archive()
    kafka: Kafka = Kafka()
    max_image_bytes: int = Field(16 * 2**20, ge=1)
    """A record whose encoded image has more bytes than this is rejected."""
    max_image_pixels: int = Field(50_000_000, ge=1)
    """A record whose image has more pixels than this, by its header, is rejected before it is decoded."""
    max_label_chars: int = Field(200, ge=1)
    """A record whose class name has more characters than this is rejected."""

    @field_validator("kind")
    @classmethod
    def _has_a_section(cls, kind: str) -> str:
        # Asked here instead of listed in a Literal, so that a new source is known once it has a section.
        kinds = [name for name, field in cls.model_fields.items() if isinstance(field.default, SourceSection)]
        if kind not in kinds:
            raise ValueError(f"got {kind!r}, expected: {' or '.join(map(repr, kinds))}")
        return kind

    @model_validator(mode="after")
    def _complete(self) -> Source:
        # Only of the kind that is used: [source.kafka] without topics is no mistake while an archive is read.
        if mistake := getattr(self, self.kind).missing():
            raise ValueError(f"{self.kind}.{mistake}")
        return self


class Task(Section):
    """A task is cut at the first of these limits that is reached; 0 (or false) switches one off, and at least one must
    be on."""

    new_classes: int = Field(0, ge=0)
    """The task is cut before the record that would begin one more new class than this. A class is new when no task
    before had it."""
    samples: int = Field(5000, ge=0)
    """The task is cut after this number of samples."""
    bytes: int = Field(512 * 2**20, ge=0)
    """The task is cut when its encoded images have reached this number of bytes. One that fills the spool alone is cut
    as well."""
    idle_s: float = Field(0, ge=0)
    """The task is cut when nothing has arrived for this number of seconds and it has a sample. This depends on the
    clock: leave it off where runs must repeat exactly."""
    boundaries: bool = True
    """The task is cut at a boundary mark in the stream. A mark that says `flush` cuts in any case."""
    on_stop: Literal["keep", "learn"] = "keep"
    """At a clean stop the agent leaves an unfinished task for the next start (`keep`) or learns it first (`learn`)."""

    @model_validator(mode="after")
    def _some_rule(self) -> Task:
        if not (self.new_classes or self.samples or self.bytes or self.idle_s or self.boundaries):
            raise ValueError("no rule would ever cut; set one of new_classes, samples, bytes, idle_s, boundaries")
        return self


class Spool(Section):
    """Samples of tasks that are not committed yet wait on disk, as the encoded bytes that came."""

    max_bytes: int = Field(2 * 2**30, ge=2**20)
    """When the samples have reached about this number of bytes (at least 1 MiB; each counts for 4 KiB at least, as it
    takes memory too), fetching pauses until a task is committed. It should hold a task at least, as one that fills it
    is cut early."""


class Evaluation(Section):
    """After every update the model is scored on images that it never learned from, against the untouched model."""

    holdout_fraction: float = Field(0.1, ge=0, lt=1)
    """This share (0 to below 1) of the stream's images is held out: kept from training, to measure accuracy. A hash of
    the image chooses. 0 holds out none. A state folder's share can be lowered later, but not raised."""
    holdout_per_class: int = Field(50, ge=0)
    """At most this number of images of each class is held out; what would come beyond it is trained on. Of more than
    10,000 in all, fewer of each class are scored."""
    test_archive: Annotated[Literal["bundled"] | Path | None, Unset] = None
    """This folder or zip has test images of the stream's classes, which are scored beside those held out; `bundled` has
    those of the bundled stream, and empty means that there are none."""
    test_split: str = ""
    """Only images below this top folder of `test_archive` are test images; empty takes `test`, then `val`, where there
    is one, and otherwise the class folders at the top."""
    test_per_class: int = Field(0, ge=0)
    """At most this number of test images of each class is scored, the first by file name; 0 scores all."""
    probe_archive: Annotated[Path | None, Unset] = None
    """This folder or zip has classes that are never learned: zero-shot retention is measured on its images. Empty
    measures it on classes of `test_archive` that are not learned yet, where there are any."""
    probe_split: str = ""
    """Only images below this top folder of `probe_archive` are probe images; empty takes `test`, then `val`, where
    there is one, and otherwise the class folders at the top."""
    probe_per_class: int = Field(20, ge=0)
    """At most this number of probe images of each class is scored, the first by file name; 0 scores all."""
    batch_size: int = Field(256, ge=1)
    """This number of images is scored at once; more take more memory."""


class Triton(Section):
    """With `release.layout = "triton"` releases go into a model repository of the Triton server as well."""

    repository: Annotated[Path | None, Unset] = None
    """This folder is the model repository. On the disk of `state.path` files are shared with it instead of copied."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] = "gapstream"
    """The model has this name in the repository."""
    versions: int = Field(3, ge=1)
    """This number of newest versions is kept, and older ones are deleted; a version has the number of its commit."""


class Release(Section):
    """After every update the model is released as ONNX, once onnxruntime answers as torch does."""

    precisions: tuple[Annotated[str, _one_of(*PRECISIONS)], ...] = Field(
        (),
        description="A release has these smaller forms beside fp32: "
        + ", ".join(f"`{name}` for {form.suits}" for name, form in PRECISIONS.items())
        + ". One that strays too far\nfrom fp32, or answers more than a point fewer of the held-out images right, is "
        "left out, and release.json says why.",
    )
    text: bool = True
    """The text tower and its tokenizer are released too, so that names never learned can be scored beside the classes.
    They take the tower's size on disk (28 MB for the bundled model, 254 MB for ViT-B-32), most of it only once for all
    releases."""
    layout: Literal["folder", "triton"] = "folder"
    """`folder` puts a release into the state folder alone; `triton` makes it a version in [release.triton] as well."""
    triton: Triton = Triton()

    opset: int = Field(20, ge=18, le=23)
    """The graph is written in this version of ONNX's operator set (18 to 23)."""
    max_batch: int = Field(64, ge=4)
    """A release is checked with batches of 1, 3 and this number of images (at least 4); Triton is told that it takes no
    larger ones."""
    parity_atol: float = Field(1e-3, gt=0)
    """A release whose embeddings or probabilities differ between torch and onnxruntime by more than this is refused,
    and the one before serves on."""
    max_old_class_drop: float = Field(0, ge=0, le=1)
    """A release is refused when accuracy on the classes of the one that serves fell by more than this share since then
    (0.05 is five points); 0 refuses none."""

    @model_validator(mode="after")
    def _somewhere(self) -> Release:
        if self.layout == "triton" and self.triton.repository is None:
            raise ValueError('triton.repository is empty; layout = "triton" needs the folder of a model repository')
        return self


class State(Section):
    """The agent keeps all that it must not forget in a folder."""

    path: Path = Path("state")
    """This folder belongs to one agent at a time, and to nothing else. Where many images pass, give it a disk of its
    own."""
    keep_commits: int = Field(3, ge=2)
    """This number of newest commits is kept (at least 2), and older ones are deleted."""
    dead_letter_bytes: int = Field(256 * 2**20, ge=2**20)
    """Rejected records of an archive go to the folder `dead_letters`, where about this number of bytes is kept (at
    least 1 MiB), the newest ones."""


class Agent(Section):
    """This section is about the process that runs for months: how it waits, stops and fails."""

    poll_timeout_s: float = Field(0.5, gt=0, le=5)
    """One look at the stream waits at most this number of seconds for records (more than 0, at most 5); a signal is
    noticed in between."""
    stop_timeout_s: float = Field(5, gt=0)
    """After SIGTERM or SIGINT the trainer has this number of seconds to end by itself before it is killed. Nothing is
    lost then: its task is read again."""
    on_task_failure: Literal["stop", "quarantine"] = "stop"
    """A task that failed twice ends the agent with nothing of it committed (`stop`). With `quarantine`, a task that
    fails for its data is learned in halves until the guilty samples are found; these go to the dead letters, and the
    agent goes on. A disk, memory or GPU that fails ends the agent either way."""
    trainer_silent_s: float = Field(600, gt=0)
    """A trainer that has said nothing for this number of seconds, while it is set up or learns, is killed, and what it
    did is tried again."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The log on standard error has lines of this level and above."""


class Http(Section):
    """The agent serves /metrics, /livez, /readyz and its status page over HTTP."""

    host: str = "127.0.0.1"
    """The agent listens on this address; `0.0.0.0` is open to the network, without a login."""
    port: int = Field(9187, ge=0, le=65535)
    """The agent listens on this port; 0 takes a free one, which the log names."""
    enabled: bool = True
    """With false the agent does not listen at all."""
    allowed_hosts: tuple[str, ...] = ()
    """Requests are answered whose Host header has one of these names (without port), `host`, this machine's name, a
    name that ends in `localhost`, or any address; `*` allows every name. Others are refused (403), since a web page
    could make its own name point here and read answers (DNS rebinding)."""


class Serve(Section):
    """`gapstream serve` classifies over HTTP with the newest release, in a process of its own beside the agent."""

    host: str = "127.0.0.1"
    """The server listens on this address; `0.0.0.0` is open to the network, without a login."""
    port: int = Field(9188, ge=0, le=65535)
    """The server listens on this port; 0 takes a free one, which the log names."""
    precision: Annotated[str, _one_of(FP32, *PRECISIONS, AUTO)] = Field(
        FP32,
        description="The server answers with this form of the release, see release.precisions; a release without it is "
        "served in\nfp32. `auto` times the forms at the start for a few seconds and takes the fastest: fp32, unless "
        f"one is {MIN_GAIN:g} times\nas fast. One of: {', '.join((FP32, *PRECISIONS, AUTO))}",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is CUDA when onnxruntime can use it and else the CPU; `cuda` says so in the log when it cannot."""
    providers: tuple[Annotated[str, AfterValidator(_provider)], ...] = ()
    """Images are answered on the first of these that onnxruntime has and that passes the release's own test, else on
    `device`, with a warning: `tensorrt`, or `openvino` with or without one of its devices, like `openvino:GPU`."""
    threads: int = Field(0, ge=0)
    """A batch is computed with this number of CPU threads; 0 takes all cores."""
    max_batch: int = Field(64, ge=1)
    """At most this number of images goes through the model at once: those that came while the batch before was
    computed."""
    max_images: int = Field(64, ge=1)
    """A request with more images than this is refused (400)."""
    max_request_bytes: int = Field(32 * 2**20, ge=1)
    """A request with more bytes than this is refused (413)."""
    max_bytes: int = Field(256 * 2**20, ge=1)
    """All requests under way have at most about this number of bytes in memory; beyond it the slowest of those still
    coming is told to come again (503). It is at least `max_request_bytes`."""
    max_names: int = Field(64, ge=0)
    """A request that asks for more names never learned than this is refused (400); each may have at
    most `source.max_label_chars` characters."""
    max_requests: int = Field(32, ge=1)
    """At most this number of requests is worked on at once; one more is told to come again (503). A request counts once
    all of it is there."""
    max_connections: int = Field(512, ge=1)
    """At most this number of connections is open; for one more, the connection that has waited longest for its client
    is closed. Together with 128 more that may just be accepted it must stay below the number of files that the process
    may open (`ulimit -n`)."""
    allowed_hosts: tuple[str, ...] = ()
    """The same as `http.allowed_hosts`: names by which clients, balancers and scrapers ask this server."""
    kafka: ServeKafka = ServeKafka()


class Config(Section):
    """The whole configuration: every section, each with its defaults."""

    model: Model = Model()
    source: Source = Source()
    task: Task = Task()
    spool: Spool = Spool()
    method: Method = Method()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    release: Release = Release()
    state: State = State()
    agent: Agent = Agent()
    http: Http = Http()
    serve: Serve = Serve()
    fleet: Fleet = Fleet()

    @model_validator(mode="after")
    def _fleet_fits(self) -> Config:
        topic, method = self.fleet.topic, self.method.name
        if topic and topic in self.source.kafka.topics:
            raise ValueError(
                f"fleet.topic is {topic}, which is one of source.kafka.topics; expected a topic of its own"
            )
        if topic and method not in FLEET_METHODS:
            known = " or ".join(FLEET_METHODS)
            raise ValueError(f"method.name is {method}, whose learners a fleet cannot add up; expected {known}")
        if topic and self.training.shared:
            raise ValueError(
                f"fleet.topic is {topic}, and training.processes or training.listen lets several ranks share an "
                "update, which know nothing of the other sites; expected one of the two"
            )
        return self
