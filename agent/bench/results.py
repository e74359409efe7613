"""What came out of a run: the content of its JSON file, which tables and charts are made from.

All accuracies and ratios are fractions, where 1 is 100 %, times are seconds, and what is undefined is None. T is the
number of tasks. The keys of the file are the names of the fields here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class GapResult:
    """The modality gap on all test images of the learned classes (see agent.values.GapStatistics)."""

    positive: float
    negative: float | None
    centroid: float
    drift: float | None
    """Drift of the negative similarity, relative to the untouched model's separation."""


@dataclass(frozen=True)
class TaskResult:
    """It says what learning one task did, and the scores after it."""

    task: int
    """Number of the task after which it was scored, from 1; for `joint` that is the last one."""
    classes: Sequence[str]
    """Names that were learned with it."""
    samples: int
    """Images it was trained on."""
    accuracy: float
    """Accuracy over all classes so far."""
    zero_shot: float
    """Accuracy of the untouched model on the same images and names."""
    retention: float | None
    """Zero-shot accuracy on classes never learned over the untouched model's; None with fewer than two such classes."""
    gap: GapResult
    seconds: float
    """Seconds of learning."""
    scoring_seconds: float
    loss: float | None
    epochs: int
    """Epochs whose effect is in the model."""
    rolled_back: bool
    phases: Mapping[str, float]
    """Seconds of learning by phase, as the method counts them."""
    drift_on_training_images: float | None
    """The drift the method itself measured, and held to its budget where it has one."""
    details: Mapping[str, Any]
    """What is particular to the method."""


@dataclass(frozen=True)
class Result:
    """What one method with one seed came to. The fields up to `versions`, but for `method`, are the run's inputs."""

    spec: str
    """The method with its settings, as it was asked for."""
    method: str
    """The same: rows of the table are told apart by it."""
    model: Mapping[str, str]
    """Name, weights (sha256) and prompt of the CLIP model."""
    precision: str
    threads: int
    device: str
    """Kind of device: `cpu` or `cuda`."""
    data: str
    """Digest of the listing: names, sizes and checksums of all images."""
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    """Every key of the method's sections that its result depends on."""
    seed: int
    fusion: str
    """The form of its prediction."""
    device_name: str
    tasks: Sequence[Sequence[str]]
    """[T] class names of every task."""
    images: Mapping[str, int]
    """Number of `train` and `test` images."""
    accuracies: Sequence[float | None]
    """[T] accuracy over all classes so far, after each task."""
    matrix: Sequence[Sequence[float | None]]
    """[T][T] accuracy on each task (column) after each task (row), see agent.scoring.formulas."""
    avg: float | None
    """Mean of `accuracies`; None for `joint`, which is scored once."""
    last: float | None
    forgetting: float | None
    backward_transfer: float | None
    retention: float | None
    """The last retention that was measured."""
    retention_of: str
    """What retention was measured on: `probe`, or `not learned yet` (the stream's later classes)."""
    gap_drift: float | None
    """The drift after the last task."""
    seconds: float
    """Seconds of learning, over all tasks."""
    peak_memory_bytes: int
    """Most memory that learning a task took, beyond the model and the images, which all methods share."""
    trainable_parameters: int
    """Most numbers that an optimiser stepped in a task."""
    stored_parameters: int
    """Numbers kept after the last task, to go on from."""
    stored_bytes: int
    history: Sequence[TaskResult]
    """One entry for each task that was learned."""
    config: Mapping[str, Any]
    """Every key of the configuration, by section."""

    def to_json(self) -> dict[str, Any]:
        """Give the content of the run's file, as `json.dumps` takes it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Result:
        """Read what `to_json` gave. Raises TypeError for other keys than those."""
        history = [TaskResult(**entry | {"gap": GapResult(**entry["gap"])}) for entry in content["history"]]
        return cls(**{**content, "history": history})


Compared = Sequence[Sequence[Result]]
"""The results of each method spec, one for each of its seeds."""
