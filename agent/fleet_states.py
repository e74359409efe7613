"""What a site of a fleet publishes of its learner: a safetensors file, checked before anything of it is used.

The file has the tensors of SCHEMAS and, as metadata, one JSON text: the method, the model, whose past it shares, the
class names. No image and no feature of an image is in it but as the table in deploy/README.md#what-leaves-a-site says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from agent.values import MOST_IMAGES
from streams.record import Unusable, canonical_label

FORMAT = 2
"""Format of the file that is written. Of format 1, which had no means of embeddings, files are read too; one of another
number is refused."""

FACTS = "gapstream"
"""The only key of the file's metadata: of several, safetensors writes now one and now another first."""

NAME_CHARS = 1000
"""Characters of a class name at most: chosen by hand, well above the default of source.max_label_chars."""

FUSION = (1e-9, 1e9)
"""Between these are the two numbers of a fusion: chosen by hand, six powers of ten and more from those that a learner
begins with, and close enough to 1 that the answers of all sites are finite."""

_BLOCK = 2**20
"""Numbers of a tensor that are in memory at once while it is looked at, 4 MB: chosen by hand, so that the agent process
stays as small as it is whatever comes."""

SCHEMAS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "gapstream": {
        "counts": ("C",),
        "means": ("C", "M"),
        "embeddings": ("C", "D"),
        "scatter": ("M(M+1)/2",),
        "fusion": ("2",),
        "random.tokens": ("1", "T"),
        "random.embedding": ("1", "E"),
    },
    "ncm": {"counts": ("C",), "means": ("C", "M")},
}
"""Method -> tensor -> its shape; of what is random and the same at every site only the first row is there."""


class SharedRefused(Exception):
    """What a site published cannot be used; the message says why."""


@dataclass(frozen=True)
class Shared:
    """It is what a file says beside its tensors."""

    path: Path
    method: str
    model: Mapping[str, str]
    """`name`, `sha256` and `prompt` of the CLIP."""
    task: int
    """Number of the last task that was learned."""
    roots: frozenset[str]
    """What no two learners have in common that began apart (agent.scoring.report.Report.roots)."""
    depth: int
    fitted: bool
    """Whether its fusion was fitted to anything."""
    classes: tuple[str, ...]
    images: tuple[int, ...]
    """Images of each class."""
    features: int
    """Numbers of a class mean."""


def facts(
    method: str,
    model: Mapping[str, Any],
    task: int,
    roots: Sequence[str],
    values: Mapping[str, Any],
    classes: Sequence[str],
) -> dict[str, str]:
    """Give the metadata of a file; the same facts give the same text. values: those of the learner's state."""
    said = {
        "format": FORMAT,
        "method": method,
        "model": {key: model[key] for key in ("name", "sha256", "prompt")},
        "task": task,
        "roots": sorted(roots),
        "depth": values.get("depth", 0),
        "fitted": bool(values.get("fitted")),
        "classes": list(classes),
    }
    return {FACTS: json.dumps(said, sort_keys=True, ensure_ascii=False)}


def check(path: Path) -> Shared:
    """Read a file that anybody may have made. Raises SharedRefused unless every number in it can be used."""
    try:
        with safe_open(path, "numpy") as file:
            said = json.loads((file.metadata() or {}).get(FACTS, "null"))
            return _checked(path, said, file)
    # what comes of a broken file, of text that is no JSON or nested too deeply, of another type than expected
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SharedRefused(f"it cannot be read ({type(error).__name__}: {str(error)[:200]})") from error


def _checked(path: Path, said: Any, file: Any) -> Shared:
    if not isinstance(said, dict) or said.get("format") not in (1, FORMAT):
        raise SharedRefused(f"it is not of format {FORMAT}; another version of gapstream made it, or none")
    schema = SCHEMAS.get(said["method"])
    if schema is not None and said["format"] == 1:
        schema = {name: shape for name, shape in schema.items() if name != "embeddings"}
    if schema is None or set(file.keys()) != set(schema):
        raise SharedRefused(f"it has not the tensors of a learner of {' or '.join(SCHEMAS)}")
    shapes = {name: _shape(name, file.get_slice(name), asked) for name, asked in schema.items()}
    classes, [number, width] = said["classes"], shapes["means"]
    _check_names(classes, number)
    if shapes["counts"] != [number]:
        raise SharedRefused("its counts are not those of its class means")
    counts = file.get_tensor("counts")
    if not ((counts >= 1) & (counts <= MOST_IMAGES) & (counts == np.floor(counts))).all():
        raise SharedRefused("its counts are no numbers of images")
    if said["method"] == "gapstream":
        random = sum(shapes[f"random.{name}"][1] for name in ("tokens", "embedding"))
        if shapes["scatter"] != [width * (width + 1) // 2] or random != width:
            raise SharedRefused(f"its scatter and its random features are not of {width} features, as its means are")
        fusion = file.get_tensor("fusion") if shapes["fusion"] == [2] else np.zeros(2)
        if not ((fusion >= FUSION[0]) & (fusion <= FUSION[1])).all():
            raise SharedRefused(f"its fusion is not two numbers from {FUSION[0]:g} to {FUSION[1]:g}")
    for name in schema:
        _check_finite(name, file.get_slice(name))
    model = {key: said["model"][key] for key in ("name", "sha256", "prompt")}
    task, depth, roots = said["task"], said["depth"], said["roots"]
    if not all(isinstance(text, str) for text in (*model.values(), *roots)):
        raise SharedRefused("its model or its roots are no texts")
    if not all(type(number) is int and number >= 0 for number in (task, depth)):
        raise SharedRefused("its task or its depth is no whole number")
    images, fitted = tuple(map(int, counts)), said["fitted"] is True
    return Shared(path, said["method"], model, task, frozenset(roots), depth, fitted, tuple(classes), images, width)


def _shape(name: str, stored: Any, shape: tuple[str, ...]) -> list[int]:
    """Give a tensor's shape: as many dimensions as `shape` names, float32 (the fusion float64), a row at least."""
    kind = "F64" if name == "fusion" else "F32"
    dimensions: list[int] = stored.get_shape()
    fits = len(dimensions) == len(shape) and all(
        size == 1 if asked == "1" else size >= 1 for size, asked in zip(dimensions, shape, strict=True)
    )
    if stored.get_dtype() != kind or not fits:
        raise SharedRefused(f"its {name} is {stored.get_dtype()} {dimensions}, expected {kind} [{', '.join(shape)}]")
    return dimensions


def _check_finite(name: str, stored: Any) -> None:
    rows, *others = stored.get_shape()
    step = max(1, _BLOCK // math.prod(others))
    for start in range(0, rows, step):
        if not np.isfinite(stored[start : min(start + step, rows)]).all():
            raise SharedRefused(f"its {name} has numbers that are not finite")


def _check_names(classes: Any, count: int) -> None:
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise SharedRefused("its classes are no names")
    for name in classes:
        try:
            canonical = canonical_label(name, NAME_CHARS)
        except Unusable as error:
            raise SharedRefused(f"a class name of it is none: {error}") from error
        if canonical != name:
            raise SharedRefused(f"its class name {name!r} is none that a stream can bring, as {canonical!r} would be")
    if len({name.casefold() for name in classes}) != len(classes) or len(classes) != count:
        raise SharedRefused("its class names are not as many as its counts, or one is there twice")
