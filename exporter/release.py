"""What a release is on disk: an ONNX model, golden answers to test it with, and release.json, which is written last.

release/
  model.onnx        images [N,3,H,W] -> embedding [N,D], logits [N,C], probabilities [N,C], all float32
  model.onnx.data   only beside a model too large for one file
  model.fp16.onnx, model.int8.onnx   the same in less, where asked for and close enough
  text.onnx         token ids [N,L] int64 -> embedding [N,D] float32 of class names, where it could be made
  text.onnx.data    its weights that never change, linked from release to release
  text.npy          embedding [C,D] of the learned class names
  tokenizer.json    class name, put into the prompt -> token ids (library `tokenizers`)
  golden.npz        a few preprocessed images with the answers of the trained model
  release.json      everything else: class names, preprocessing, hashes, parity, versions
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from exporter.preprocess import Preprocess

FORMAT = 1
MANIFEST = "release.json"
MODEL = "model.onnx"
GOLDEN = "golden.npz"
TEXT = "text.onnx"
TEXT_ROWS = "text.npy"
TOKENIZER = "tokenizer.json"
RELEASE_FOLDER = "release"
"""The folder of a release inside a commit."""
CURRENT = "CURRENT"
"""Symlink in a state folder to the current commit."""
RELEASE = "RELEASE"
"""Symlink in a state folder to the release readers follow: the current commit's, or an older one that is pinned."""


class ReleaseError(Exception):
    """A release cannot be read, trusted or made.

    ReleaseError
    └── ParityError     onnxruntime's answers are not the trained model's (exporter.onnx)
    """


@dataclass(frozen=True)
class Parity:
    """How far onnxruntime's answers are from torch's on the same images; the worst over all batch sizes."""

    embedding: float
    """Largest absolute difference of a component."""
    logits: float
    """Largest difference relative to the largest absolute logit."""
    probabilities: float
    """Largest absolute difference."""
    cosine: float
    """Smallest cosine between the two embeddings of an image."""
    top1: float
    """Share of images, 0 to 1, for which both give the same class first."""
    images: int
    batches: tuple[int, ...]
    provider: str
    """Execution provider that answered."""


@dataclass(frozen=True)
class Variant:
    """The model in another precision: what was measured, and whether it is in the release."""

    parity: Parity | None
    """None when it could not even be made."""
    atol: float
    """Tolerance the parity was held to."""
    accuracy: float | None
    """Share of held-out images answered right, 0 to 1; None when none were at hand."""
    accuracy_fp32: float | None
    """The same of model.onnx."""
    refused: str | None
    """Why it is not in the release; None when it is."""


@dataclass(frozen=True)
class TextPart:
    """How names that were never learned are scored: softmax(scale * image embedding @ name embeddings)."""

    prompt: str
    """A name takes the place of `{}`."""
    clean: str
    """What is done to the text before the tokenizer; a name in exporter.text.CLEANUPS."""
    scale: float
    """Multiplier of cosines."""
    difference: float | None
    """Largest absolute difference of a component between onnxruntime's embeddings of names and torch's; None when the
    part could not even be made."""
    cosine: float | None
    """Smallest cosine between the two."""
    atol: float
    """Tolerance `difference` was held to."""
    refused: str | None
    """Why it is not in the release; None when it is."""


@dataclass(frozen=True)
class Release:
    """A release in `path`; immutable once made."""

    path: Path
    created: str
    """UTC, ISO 8601."""
    classes: tuple[str, ...]
    """Class name of every column of logits and probabilities."""
    preprocess: Preprocess
    facts: Mapping[str, Any]
    """Model identity, method, fusion form, prompt, task: what the caller says about the model. JSON-able."""
    opset: int
    ir_version: int
    precision: str
    parity: Parity
    atol: float
    """Tolerance the parity was held to."""
    files: Mapping[str, tuple[int, str]]
    """Name -> (size in bytes, sha256) of every file beside release.json."""
    versions: Mapping[str, str]
    seconds: Mapping[str, float]
    """Wall seconds of making it: `trace` (0 when an earlier trace was used again), `write`, `check`, `variants`,
    `text`."""
    variants: Mapping[str, Variant] = field(default_factory=dict)
    """`fp16` and `int8`, as far as they were asked for."""
    text: TextPart | None = None
    """None when it was not asked for."""

    @property
    def model(self) -> Path:
        return self.path / MODEL

    @property
    def text_files(self) -> list[str]:
        """Names of the files of the text part; none where there is none."""
        return [name for name in self.files if name.startswith("text.") or name == TOKENIZER]

    def offers(self, precision: str) -> bool:
        """Whether `model_in(precision)` is there."""
        return precision == self.precision or (precision in self.variants and self.variants[precision].refused is None)

    def model_in(self, precision: str) -> Path:
        """The model file in `fp32`, `fp16` or `int8`."""
        return self.model if precision == self.precision else self.path / variant_name(precision)

    @property
    def golden(self) -> Path:
        return self.path / GOLDEN

    @property
    def id(self) -> str:
        """Twelve hex digits that name what answers (model and text part): equal content has equal ids."""
        names = sorted([*(name for name in self.files if name.startswith(MODEL)), *self.text_files])
        digests = [f"{name} {self.files[name][1]}" for name in names]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:12]

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compare every file, or those of these names, with its hash. Raises ReleaseError naming the first that differs
        or is missing."""
        for name in self.files if names is None else names:
            expected = self.files[name]
            try:
                found = digest(self.path / name)
            except OSError as error:
                raise ReleaseError(f"release {self.path}: {name} cannot be read ({error}); it is not used") from error
            if found != expected:
                raise ReleaseError(
                    f"release {self.path}: {name} has {found[0]} bytes, sha256 {found[1][:12]}, expected {expected[0]} "
                    f"bytes, {expected[1][:12]}; it is damaged and not used"
                )


def write(release: Release) -> None:
    """Write release.json into the release's folder, where the other files already are."""
    values = {"format": FORMAT, "id": release.id}
    values |= {part.name: getattr(release, part.name) for part in fields(release) if part.name != "path"}
    values |= {"preprocess": release.preprocess.to_dict(), "parity": asdict(release.parity)}
    values |= {"variants": {name: asdict(variant) for name, variant in release.variants.items()}}
    values |= {"text": release.text and asdict(release.text)}
    (release.path / MANIFEST).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(folder: Path) -> Release:
    """The release in `folder`. Raises ReleaseError when there is none or it has another format."""
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ReleaseError(f"no release in {folder}: {MANIFEST} is missing") from error
    except (OSError, ValueError) as error:
        raise ReleaseError(f"release {folder}: {MANIFEST} cannot be read ({error}); it is not used") from error
    try:
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        del values["id"]
        text = values.get("text")
        variants = {
            name: Variant(**{**variant, "parity": variant["parity"] and _parity(variant["parity"])})
            for name, variant in values["variants"].items()
        }
        return Release(
            **{
                **values,
                "path": folder,
                "classes": tuple(values["classes"]),
                "preprocess": Preprocess.from_dict(values["preprocess"]),
                "parity": _parity(values["parity"]),
                "variants": variants,
                "text": text and TextPart(**text),
                "files": {name: (size, sha256) for name, (size, sha256) in values["files"].items()},
            }
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ReleaseError(f"release {folder}: {MANIFEST} is not a release of format {FORMAT} ({found})") from error


def current(path: Path) -> Path:
    """The release folder to serve from `path`: itself when it is one, or the one behind a state folder's RELEASE (or
    CURRENT, where a copy lacks that).

    The answer stays the same release when these move on. Raises ReleaseError when nothing has been released yet, or
    `path` cannot be read.
    """
    try:
        return _current(path)
    except OSError as error:
        raise ReleaseError(f"no release in {path}: it cannot be read ({error})") from error


def _current(path: Path) -> Path:
    if (path / MANIFEST).exists():
        return path.resolve()
    pointer = path / RELEASE
    if pointer.is_symlink() and pointer.exists():
        return pointer.resolve()
    link = path / CURRENT
    if not link.exists():
        raise ReleaseError(f"no release in {path}: neither {MANIFEST} nor {CURRENT} is there; was a task learned yet?")
    folder = link.resolve() / RELEASE_FOLDER
    if not folder.exists():
        raise ReleaseError(f"no release in {path}: the current commit {folder.parent.name} has none")
    return folder.resolve()


def variant_name(precision: str) -> str:
    """File name of the model in `fp16` or `int8`."""
    return f"model.{precision}.onnx"


def _parity(values: Mapping[str, Any]) -> Parity:
    return Parity(**{**values, "batches": tuple(values["batches"])})


def digest(path: Path) -> tuple[int, str]:
    """(size in bytes, sha256 in hex) of a file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), sha256
