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

FORMAT = 2
"""Format of the file that is written. Of format 1, which had no means of embeddings, files are read too; one of another
number is refused."""

FACTS = "gapstream"
"""The only key of the file's metadata: of several, safetensors writes now one and now another first."""

NAME_CHARS = 1000
"""Characters of a class name at most: chosen by hand, well above the default of source.max_label_chars."""

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
    tensors = {name: _finite(name, file.get_slice(name), schema[name], file) for name in schema}
    classes, counts, width = said["classes"], tensors["counts"], tensors["means"].shape[1]
    _check_names(classes, len(counts))
    if (counts < 1).any() or (counts != np.floor(counts)).any() or tensors["means"].shape[0] != len(counts):
        raise SharedRefused("its counts are no numbers of images, or not those of its class means")
    if said["method"] == "gapstream":
        random = sum(tensors[f"random.{name}"].shape[1] for name in ("tokens", "embedding"))
        if tensors["scatter"].shape[0] != width * (width + 1) // 2 or random != width:
            raise SharedRefused(f"its scatter and its random features are not of {width} features, as its means are")
        if tensors["fusion"].shape != (2,) or (tensors["fusion"] <= 0).any():
            raise SharedRefused("its fusion is not two numbers above 0")
    model = {key: said["model"][key] for key in ("name", "sha256", "prompt")}
    task, depth, roots = said["task"], said["depth"], said["roots"]
    if not all(isinstance(text, str) for text in (*model.values(), *roots)):
        raise SharedRefused("its model or its roots are no texts")
    if not all(type(number) is int and number >= 0 for number in (task, depth)):
        raise SharedRefused("its task or its depth is no whole number")
    images, fitted = tuple(map(int, counts)), said["fitted"] is True
    return Shared(path, said["method"], model, task, frozenset(roots), depth, fitted, tuple(classes), images, width)


def _finite(name: str, stored: Any, shape: tuple[str, ...], file: Any) -> np.ndarray:
    """Read a tensor of as many dimensions as `shape` names, float32 (the fusion float64), finite, a row at least."""
    kind = "F64" if name == "fusion" else "F32"
    dimensions = stored.get_shape()
    fits = len(dimensions) == len(shape) and all(
        size == 1 if asked == "1" else size >= 1 for size, asked in zip(dimensions, shape, strict=True)
    )
    if stored.get_dtype() != kind or not fits:
        raise SharedRefused(f"its {name} is {stored.get_dtype()} {dimensions}, expected {kind} [{', '.join(shape)}]")
    tensor: np.ndarray = file.get_tensor(name)
    # A sum is finite only where all its parts are; it needs no copy of the tensor.
    if not math.isfinite(float(tensor.sum(dtype=np.float64))):
        raise SharedRefused(f"its {name} has numbers that are not finite")
    return tensor


def _check_names(classes: Any, count: int) -> None:
    if not isinstance(classes, list) or not all(isinstance(name, str) and name for name in classes):
        raise SharedRefused("its classes are no names")
    if any(len(name) > NAME_CHARS for name in classes):
        raise SharedRefused(f"a class name of it is longer than {NAME_CHARS} characters")
    if len({name.casefold() for name in classes}) != len(classes) or len(classes) != count:
        raise SharedRefused("its class names are not as many as its counts, or one is there twice")
