"""What report.json says: the scores after an update, with their history, as frozen values.

    Report
    ├── history: TaskReport...        one entry for each task, of old ones only where a score needs it
    ├── earlier: Earlier              what is left of the others
    ├── gap: Gap                      GapChange for positive, negative and centroid; Drift
    ├── old_classes: OldClasses
    ├── probe: Probe
    ├── examples: Example...
    ├── merged: Merged                with Origin, where the learner was made of others
    ├── fleet: Fleet                  with Site, where it answers with what other sites learned
    ├── learner: LearnerIdentity      with ModelIdentity
    └── release: ReleaseSummary       with Parity and Variant of exporter.release

The classes are the file format: a field is a key of the same name, in the same order, and a tuple is a list. What is
undefined is None, and null in the file. A new field with a default is all that a new key needs: files without it are
still read, and so are files with keys that are not known here.

All accuracies are fractions from 0 to 1, and all times are wall seconds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from exporter.release import Parity, Variant

T = TypeVar("T")

HISTORY = 200
"""Newest tasks that a report tells all of: chosen by hand, as many as its charts can show. Each takes about 1.5 kB of
every commit, and 100 numbers of the matrix; all of them would make a report of a year larger than its model."""

LEFT_OUT = {"left out when None": True}
"""Marks a field whose key is not in the file while it is None; any other field is then written as null."""

Row = tuple[float | None, ...]
"""Accuracies of the model at one time on the test images of each task; None where a task had none."""

Answer = tuple[tuple[str, float], ...]
"""The three class names that the model holds most likely, with their probabilities, most likely first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GapChange:
    """It is one number of the modality gap (see agent.values.GapStatistics), on the task's training images."""

    before: float | None = None
    """None when the task had nothing to learn, as are the next two."""
    after: float | None = None
    untouched: float | None = None
    """The untouched model's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """It is the relative change of the negative similarity against the untouched model, from 0 on.

    None when the task had nothing to learn, or has only one name.
    """

    before: float | None = None
    after: float | None = None
    budget: float | None = None
    """The drift at which the update is rolled back; None where there is no budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """It has the modality gap before and after the update, beside the untouched model's."""

    positive: GapChange = GapChange()
    """Mean cosine with the right class name."""
    negative: GapChange = GapChange()
    """Mean cosine with the other names; None where the task has no other name."""
    centroid: GapChange = GapChange()
    """Distance between the mean image feature and the mean text feature."""
    drift: Drift = Drift()


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """It says what was decided about a task's new adapters, by images of the task that they were not trained on."""

    kept: bool
    """False when they crossed the gap budget at once, were not finite, or did not pay: the towers are
    as before."""
    epochs: int
    """Epochs of training inside the gap budget."""
    drift: float | None
    """The drift of the gap that the training came to, kept or not; None where it was not finite."""
    budget: float
    """The drift that was allowed."""
    images: int
    """Images that judged."""
    gain: float | None = None
    """By how much the new adapters lower the mean cross entropy of the prediction on these, in nats; None when they
    were not judged."""
    error: float | None = None
    """The standard error of that mean."""

    @property
    def decision(self) -> str:
        """`kept`, `refused` by the evidence, or `undone` as it crossed the budget (or its loss was not finite)."""
        return "kept" if self.kept else "refused" if self.epochs else "undone"

    def words(self) -> str:
        """Say it in a line, for the log and the terminal."""
        epochs = "no epoch" if not self.epochs else "1 epoch" if self.epochs == 1 else f"{self.epochs} epochs"
        used = "" if self.drift is None else f", {100 * self.drift / self.budget:.0f} % of the gap budget"
        judged = (
            "" if self.gain is None else f", gain {self.gain:+.4f} +- {self.error:.4f} nats on {self.images} images"
        )
        return f"adapted: {self.decision}, {epochs}{used}{judged}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OldClasses:
    """Accuracy on the classes of the newest release, as far as it was made before this task; None without one."""

    before: float | None = None
    """What that release had when it was made."""
    after: float | None = None
    """What the updated model has on the same classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Zero-shot accuracy on classes that were never learned, among the names of these classes."""

    of: str
    """`probe`: the probe archive. `not learned yet`: the classes of the test archive that no task has brought yet."""
    images: int
    classes: int
    """Number of these classes, at least 2."""
    untouched: float
    """Accuracy of the untouched model."""
    now: float
    """Accuracy of the updated model's towers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A test image with what three models say of it."""

    image: str
    """Data URL of a small JPEG."""
    label: str
    """Its class name."""
    task: int
    """Number of the task that brought this class first."""
    before: Answer
    """The model's answer before the update, among the classes seen so far and the task's new names."""
    after: Answer
    """The updated model's answer, among all learned classes."""
    untouched: Answer
    """The untouched model's answer, among all learned classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """It says which CLIP the learner began with."""

    name: str
    """Architecture, as open_clip names it, or `tinyclip`."""
    pretrained: str = ""
    """Tag or file of the weights, or `bundled`."""
    sha256: str = ""
    """Digest of the weights."""
    prompt: str = ""
    """What class names are put into, in the place of `{}`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerIdentity:
    """Whose numbers these are: model, method, seed, device and versions. Every reported number is stored with it."""

    model: ModelIdentity
    method: str
    """The value of method.name."""
    fusion: str
    """Which form of prediction the released model has (see agent.methods.base.Method.fusion)."""
    seed: int = 0
    device: str = ""
    """`cpu`, `cuda:0`, ..."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package name -> installed version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseSummary:
    """It says what became of the update's release. Without one all but `refused` are None and not in the file."""

    refused: str | None = None
    """Why there is no new release; None when there is one."""
    id: str | None = field(default=None, metadata=LEFT_OUT)
    """Twelve hex digits, see exporter.release.Release.id."""
    parity: Parity | None = field(default=None, metadata=LEFT_OUT)
    seconds: Mapping[str, float] | None = field(default=None, metadata=LEFT_OUT)
    """Seconds of each step of making it, see exporter.release.Release.seconds."""
    variants: Mapping[str, Variant] | None = field(default=None, metadata=LEFT_OUT)
    """Precision -> what was measured of the smaller model, in the release or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """It is a learner that a merged one was made of."""

    state: str
    """Its state folder, as `gapstream merge` was given it."""
    commit: int
    """The number of its commit."""
    sha256: str
    """Digest of its tensors."""
    began: str
    """Its report's `began`."""
    adapted: bool
    """Whether its towers were adapted."""
    images: Mapping[str, int | None]
    """Class name, as it spelled it -> the images it had learned; None where its method does not count them."""
    merged: Merged | None = field(default=None, metadata=LEFT_OUT)
    """Where it was itself made of others: what of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """It says which learners a merged one was made of, before its first own task."""

    of: tuple[Origin, ...]
    """In the order in which `gapstream merge` was given them."""
    adapted: bool
    """Whether its towers are adapted: averaged, or those that all had alike. Else it began with untouched ones."""
    averaged: bool = False
    """Whether what they trained was averaged: not what one learner of all streams would be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """It is another site of a fleet, as it was known when this was scored."""

    site: str
    sequence: int
    """Tells its states apart, see streams.blobs.Blob."""
    version: int
    """The number of its commit."""
    sha256: str
    classes: int = 0
    images: int = 0
    refused: str | None = field(default=None, metadata=LEFT_OUT)
    """Why its learner cannot be added to this one; None where it is in what this report scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """It says with whose learning the learner answers, beside its own."""

    site: str
    sites: tuple[Site, ...] = ()
    """The others, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores:
    """What a report says of its task and its history says of every task alike."""

    task: int
    """Number of the task, from 1."""
    samples: int = 0
    """Images that were trained on."""
    test_images: int = 0
    """Images that were scored."""
    accuracy: float | None = None
    """Over all classes learned so far; None when no class has a test image, as are the next two."""
    zero_shot: float | None = None
    """The untouched model's accuracy on the same images among the same names."""
    predict_before_learn: float | None = None
    """Accuracy on the task's training images before they were learned; None when there were none."""
    forgetting: float | None = None
    """Mean drop of the earlier tasks from their best accuracy; None for the first task (agent.scoring.formulas)."""
    retention: float | None = None
    """The probe's accuracy now over the untouched model's; None without a probe."""
    gap: Gap = Gap()
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Phase -> seconds: those of the update (`train`, `compensate`), `evaluate`, `decode` and `export`."""

    def shared(self) -> dict[str, Any]:
        """Give the fields above by name, for another value that has them too."""
        return {one.name: getattr(self, one.name) for one in fields(TaskScores)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReport(TaskScores):
    """It is one task in the history of a report."""

    classes: tuple[str, ...] = ()
    """Class names of the images that were trained on, in order of first appearance."""
    new_classes: tuple[str, ...] = ()
    """Those that no task before had brought: the task's column of the accuracy matrix."""
    loss: float | None = None
    """Mean training loss of the last epoch kept; None when nothing was trained by a loss, or it was not finite."""
    epochs: int = 0
    """Epochs whose effect is in the model."""
    rolled_back: bool = False
    """True when the update crossed its drift budget, or its loss was not finite, and its last state was given up."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able values particular to the method."""
    adaptation: Adaptation | None = field(default=None, metadata=LEFT_OUT)
    """None where nothing was to be decided."""
    released: bool | None = field(default=None, metadata=LEFT_OUT)
    """Whether a release was made after this task; None until that is decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """What is left of tasks that are not in the history any more."""

    tasks: int = 0
    scored: int = 0
    """How many of them had an accuracy over all classes learned so far."""
    accuracy: float = 0.0
    """The sum of these accuracies, for the mean over all tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report(TaskScores):
    """It is the content of report.json: the scores after the update of `task`, and all that came before."""

    classes: tuple[str, ...] = ()
    """All learned class names, in order of first appearance."""
    held_out: int = 0
    """Images held out of all tasks so far."""
    old_classes: OldClasses = OldClasses()
    matrix: tuple[Row, ...] = ()
    """[T][T], see agent.scoring.formulas; None above the diagonal, and rows before the newest 100 are empty."""
    avg: float | None = None
    """Mean over tasks of the accuracy after each."""
    last: float | None = None
    """Accuracy after this task."""
    first: Row = ()
    """[T]: the accuracy of each task right after it was learned, the diagonal of the whole matrix."""
    best: Row = ()
    """[T]: the largest accuracy each task ever had, the maximum of its column of the whole matrix."""
    backward_transfer: float | None = None
    """Mean change of the earlier tasks since they were learned; None for the first task."""
    probe: Probe | None = None
    """None where neither a probe archive nor two classes still to come are there."""
    history: tuple[TaskReport, ...] = ()
    """One entry for each task so far, this one included; see `shortened` for old ones. T is their number."""
    earlier: Earlier | None = field(default=None, metadata=LEFT_OUT)
    """None while all tasks are in the history."""
    examples: tuple[Example, ...] = ()
    """At most 12."""
    merged: Merged | None = field(default=None, metadata=LEFT_OUT)
    """None where the learner was not made of others. Then the first task is their merge: its classes and samples are
    those of all of them."""
    fleet: Fleet | None = field(default=None, metadata=LEFT_OUT)
    """None outside of a fleet. In one, classes and scores are those of what this site and the others learned."""
    learner: LearnerIdentity | None = None
    """None until `completed`. Its fields are keys of the report itself in the file."""
    release: ReleaseSummary | None = field(default=None, metadata=LEFT_OUT)
    """None until `completed`."""

    @property
    def began(self) -> str:
        """Tell apart where learners began: a digest of the wall times of the first update, which no other repeats, and
        which everything that goes on from it has too. Empty where these are not known."""
        seconds = dict(self.history[0].seconds) if self.history else {}
        return hashlib.sha256(json.dumps(seconds, sort_keys=True).encode()).hexdigest() if seconds else ""

    @property
    def roots(self) -> set[str]:
        """Give what no two learners have in common that began apart: where it, and all it was merged of, began."""
        found, inner = {self.began}, [self.merged]
        while inner:
            merged = inner.pop()
            for origin in merged.of if merged else ():
                found |= {origin.sha256, origin.began}
                inner.append(origin.merged)
        return found - {""}

    def completed(self, learner: LearnerIdentity, release: ReleaseSummary, seconds: Mapping[str, float]) -> Report:
        """Give this report with what is known only after the scoring; `seconds` are those of further phases."""
        all_seconds = {**self.seconds, **seconds}
        taken = {**all_seconds, **self.history[-1].seconds}  # a task that is scored anew keeps what its learning took
        this = replace(self.history[-1], seconds=taken, released=release.refused is None)
        history = (*self.history[:-1], this)
        return replace(self, seconds=all_seconds, history=history, learner=learner, release=release)

    def shortened(self, newest: int) -> Report:
        """Leave out of the history, and of all that has an entry for each of its tasks, what is older than the `newest`
        tasks: no score of a later task depends on it.

        Tasks that first brought a class stay, with their scores and these classes, as their accuracy goes on; so does
        the one of the newest release. So there are never more than newest + classes + 1.
        """
        released = [i for i, entry in enumerate(self.history) if entry.released is not False][-1:]
        old = max(0, len(self.history) - newest)
        kept = [i for i, entry in enumerate(self.history) if i >= old or entry.new_classes or i in released]
        history = [self.history[i] if i >= old else _brief(self.history[i]) for i in kept]
        if len(kept) == len(self.history):
            return replace(self, history=tuple(history))
        past, stay = self.earlier or Earlier(), set(kept)
        accuracies = [entry.accuracy for i, entry in enumerate(self.history) if i not in stay]
        scored = [accuracy for accuracy in accuracies if accuracy is not None]

        def of_kept(row: Row) -> Row:
            return tuple(row[i] for i in kept if i < len(row))

        return replace(
            self,
            history=tuple(history),
            matrix=tuple(of_kept(self.matrix[i]) for i in kept if i < len(self.matrix)),
            first=of_kept(self.first),
            best=of_kept(self.best),
            earlier=Earlier(
                tasks=past.tasks + len(accuracies),
                scored=past.scored + len(scored),
                accuracy=past.accuracy + sum(scored),
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """Give the content of report.json as dicts and lists; None for a number that JSON lacks (a diverged loss)."""
        content = _to_json(self)
        learner = content.pop("learner") or {}
        release = {"release": content.pop("release")} if self.release else {}
        return content | learner | release

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Report:
        """Read the report with this content, also when another version wrote it. Raises ValueError when it is none."""
        try:
            learner = _from_json(LearnerIdentity, content) if content.get("model") else None
            return replace(_from_json(cls, content), learner=learner)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"this is not a report: {error}") from error

    def write(self, path: Path) -> None:
        """Write the file `path`. Raises OSError."""
        path.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read the report in the file `path`. Raises OSError, and ValueError when it holds none."""
        return cls.from_json(json.loads(path.read_text(encoding="utf-8")))


def _brief(entry: TaskReport) -> TaskReport:
    """Give an old entry without what may be long: names of classes that came again, and a method's own values."""
    return replace(entry, classes=entry.new_classes, details={})


def _to_json(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value):
        items = ((one, getattr(value, one.name)) for one in fields(value))
        return {one.name: _to_json(item) for one, item in items if item is not None or not one.metadata}
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return value


def _from_json(kind: type[T], content: Mapping[str, Any]) -> T:
    """Make a dataclass from the keys it has fields for."""
    hints = _hints(kind)  # type: ignore[arg-type]  # mypy takes no class for hashable
    return kind(**{name: _read(hint, content[name]) for name, hint in hints.items() if name in content})


def _read(hint: Any, value: Any) -> Any:
    """Read `value` as the type hint says: a list becomes a tuple, and a dict a dataclass where one is asked for."""
    if value is None:
        return None
    if get_origin(hint) is UnionType:  # X | None is all there is
        hint = get_args(hint)[0]
    if is_dataclass(hint):
        return _from_json(hint, value)  # type: ignore[arg-type]
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is tuple:
        hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_read(one, item) for one, item in zip(hints, value, strict=True))
    if kind is not None and issubclass(kind, Mapping):
        return {key: _read(arguments[1], item) for key, item in value.items()}
    return value


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    """Give field -> type, looked up once a class: evaluating the annotations costs more than reading the values."""
    return get_type_hints(kind)
