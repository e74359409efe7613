"""What a release is on disk: an ONNX model, golden answers to test it with, and release.json, which is written last.

release/
  model.onnx        images [N,3,H,W] -> embedding [N,D], logits [N,C], probabilities [N,C], all float32
  model.onnx.data   its weights, only where the model is too large for one file
  model.fp16.onnx, model.int8.onnx   the same model in a smaller precision, where it was asked for and close enough
  text.onnx         token ids [N,L] int64 -> embedding [N,D] float32 of class names, where it could be made
  text.onnx.data    its weights that never change, linked from release to release
  text.npy          embedding [C,D] of the learned class names
  tokenizer.json    class name, put into the prompt -> token ids (library `tokenizers`)
  golden.npz        a few preprocessed images with the answers of the trained model, and two encoded ones with theirs
  release.json      everything else: class names, preprocessing, hashes, parity, versions, and a hash of itself
"""

from __future__ import annotations

import errno
import hashlib
import json
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from exporter.preprocess import Preprocess

FORMAT = 1
"""Version of release.json, raised when a key changes its meaning: readers refuse any other. A key that `Release` gains
with a default lets older releases be read, but readers from before it refuse the new ones."""
MANIFEST = "release.json"
"""File of everything that is not an array or a graph. It is written last: a folder without it is no release."""
MODEL = "model.onnx"
"""File of the model in fp32. Readers outside this project open it by this name, so it stays."""
MAX_MANIFEST_BYTES = 64 * 2**20
"""Largest release.json that is read, chosen by hand: a hundred thousand classes with names of the longest take half of
it. What is larger is none of ours, and reading it would take the memory of who answers."""
GOLDEN = "golden.npz"
"""File of a few images and the trained model's answers, with which every reader tests itself."""
TEXT = "text.onnx"
"""File of the text tower. Every file whose name begins with `text.` belongs to the text part (`Release.text_files`)."""
TEXT_ROWS = "text.npy"
"""File of the learned classes' text embeddings, which readers then need not compute for every request."""
TOKENIZER = "tokenizer.json"
"""File of the tokenizer, under the name that the library `tokenizers` and its relatives expect."""
RELEASE_FOLDER = "release"
"""Name of a release's folder inside a commit. Commits on disk have it, so it stays."""
CURRENT = "CURRENT"
"""Symlink in a state folder to the current commit. State folders on disk have it, so it stays."""
RELEASE = "RELEASE"
"""Symlink in a state folder to the release readers follow: the current commit's, or an older one that is pinned."""


class ReleaseError(Exception):
    """A release cannot be read, trusted or made.

    ReleaseError
    ├── ParityError     onnxruntime's answers are not the trained model's
    └── NoRelease       there is none, or not yet
    """


class ParityError(ReleaseError):
    """onnxruntime's answers are not the trained model's; the message has the numbers. Nothing was released."""


class NoRelease(ReleaseError):
    """There is no release here, or not yet."""


@dataclass(frozen=True)
class Parity:
    """How far onnxruntime's answers are from torch's on the same images; the worst over all batch sizes."""

    embedding: float
    """Largest absolute difference of a component."""
    logits: float
    """Largest difference of a logit, relative to the largest absolute logit."""
    probabilities: float
    """Largest absolute difference of a probability."""
    cosine: float
    """Smallest cosine between the two embeddings of an image."""
    top1: float
    """Share of images, 0 to 1, for which both give the same class first."""
    images: int
    """Number of different images compared, at least 1."""
    batches: tuple[int, ...]
    """Sizes of the batches they were given in."""
    provider: str
    """The onnxruntime execution provider that answered."""


@dataclass(frozen=True)
class Variant:
    """A variant is the model in a smaller precision: what was measured, and whether it is in the release."""

    parity: Parity | None
    """How far its answers are from the trained model's; None when the variant could not even be made."""
    atol: float
    """Largest difference of embeddings and probabilities that was allowed."""
    accuracy: float | None
    """Share of the held-out images it answered right, 0 to 1; None when there were no such images."""
    accuracy_fp32: float | None
    """Share of the same images that model.onnx answered right."""
    refused: str | None
    """Why the variant is not in the release; None when it is."""


@dataclass(frozen=True)
class TextPart:
    """How names that were never learned are scored: softmax(scale * image embedding @ name embeddings)."""

    prompt: str
    """Text around a name, which takes the place of `{}`."""
    clean: str
    """What is done to the text before the tokenizer reads it; a name in exporter.text.CLEANUPS."""
    scale: float
    """Number that cosines are multiplied with before the softmax."""
    difference: float | None
    """Largest absolute difference of a component between onnxruntime's embeddings of names and torch's; None when the
    part could not even be made."""
    cosine: float | None
    """Smallest cosine between onnxruntime's embedding of a name and torch's; None where `difference` is."""
    atol: float
    """Largest `difference` that was allowed."""
    refused: str | None
    """Why the text part is not in the release; None when it is."""


@dataclass(frozen=True)
class Release:
    """This is a release on disk. Its files never change once it is made."""

    path: Path
    """Folder of the release."""
    created: str
    """When it was made, in UTC, ISO 8601."""
    classes: tuple[str, ...]
    """Class name of every column of logits and probabilities."""
    preprocess: Preprocess
    """What turns an image into the model's input."""
    facts: Mapping[str, Any]
    """What the caller says about the model: its identity, method, fusion form, prompt, task. JSON-able."""
    opset: int
    """ONNX operator set of the graphs."""
    ir_version: int
    """Version of the ONNX file format."""
    precision: str
    """Precision of model.onnx: always `fp32`."""
    parity: Parity
    """How far model.onnx is from the trained model."""
    atol: float
    """Largest difference of embeddings and probabilities that was allowed."""
    files: Mapping[str, tuple[int, str]]
    """Name -> (size in bytes, sha256) of every file but release.json."""
    versions: Mapping[str, str]
    """Name -> version of each library that had a part in making it."""
    seconds: Mapping[str, float]
    """Wall seconds of making it: `write`, `check`, `trace` (about 0 when an earlier trace was used again), `variants`,
    `text`."""
    variants: Mapping[str, Variant] = field(default_factory=dict)
    """Precision -> what came of it, for every name in exporter.precision.PRECISIONS that was asked for."""
    text: TextPart | None = None
    """What came of the text part; None when it was not asked for."""
    hashed: bool = True
    """Whether release.json is hashed and `id` names what it says too; False for a release of an older version."""

    @property
    def model(self) -> Path:
        """The model file in fp32."""
        return self.path / MODEL

    @property
    def text_files(self) -> list[str]:
        """Names of the text part's files; empty where the release has no text part."""
        return [name for name in self.files if name.startswith("text.") or name == TOKENIZER]

    def offers(self, precision: str) -> bool:
        """Tell whether the file `model_in(precision)` is in the release."""
        return precision == self.precision or (precision in self.variants and self.variants[precision].refused is None)

    def model_in(self, precision: str) -> Path:
        """Give the model file in this precision, `fp32` or a name in exporter.precision.PRECISIONS; see `offers`."""
        return self.model if precision == self.precision else self.path / variant_name(precision)

    @property
    def golden(self) -> Path:
        """The file of golden inputs and answers, float32 arrays `images`, `embedding`, `logits`, `probabilities`."""
        return self.path / GOLDEN

    @property
    def id(self) -> str:
        """Twelve hex digits that name what answers: the model in fp32, class names, preprocessing and the text part.

        Equal content, equal id, wherever and whenever it was made.
        """
        # Without the smaller precisions and the golden answers, which follow from the model.
        names = sorted([*(name for name in self.files if name.startswith(MODEL)), *self.text_files])
        parts = [f"{name} {self.files[name][1]}" for name in names]
        if self.hashed:
            text = [self.text.prompt, self.text.clean, self.text.scale] if self.text and self.text_files else None
            parts.append(json.dumps([self.classes, self.preprocess.to_dict(), text], sort_keys=True))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compare every file, or only the files of these names, with its size and hash.

        Raises ReleaseError naming the first file that differs or cannot be read.
        """
        for name in self.files if names is None else names:
            expected = self.files[name]
            # Sizes and hashes, not times: a copy by rsync or into a container is still the same release.
            try:
                _check_regular(self.path / name)
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
    kept = [part.name for part in fields(release) if part.name not in ("path", "hashed")]
    values |= {name: getattr(release, name) for name in kept}
    values |= {"preprocess": release.preprocess.to_dict(), "parity": asdict(release.parity)}
    values |= {"variants": {name: asdict(variant) for name, variant in release.variants.items()}}
    values |= {"text": release.text and asdict(release.text)}
    if release.hashed:
        values["sha256"] = _own_digest(values)
    (release.path / MANIFEST).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(folder: Path) -> Release:
    """Read the release in `folder`; its files are not looked at (see `Release.verify`).

    Raises ReleaseError when there is no release, or release.json is damaged or of another format.
    """
    path = folder / MANIFEST
    try:
        if _check_regular(path) > MAX_MANIFEST_BYTES:
            raise ValueError(f"more than {MAX_MANIFEST_BYTES} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NoRelease(f"no release in {folder}: {MANIFEST} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ReleaseError(f"release {folder}: {MANIFEST} cannot be read ({error}); it is not used") from error
    try:
        if values["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        sha256 = values.pop("sha256", None)
        if sha256 is not None and sha256 != _own_digest(values):
            raise ValueError("it is damaged: its hash is not that of its content")
        # The id is for people who look into the file; here it is computed from the hashes.
        values = {key: value for key, value in values.items() if key not in ("format", "id")}
        _check_names(values["classes"], list(values["files"]))
        datetime.fromisoformat(values["created"])
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
                "files": {name: (size, digest) for name, (size, digest) in values["files"].items()},
                "hashed": sha256 is not None,
            }
        )
    # What JSON of any other shape leads to.
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, OverflowError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ReleaseError(f"release {folder}: {MANIFEST} is not a release of format {FORMAT} ({found})") from error


def current(path: Path) -> Path:
    """Find the release folder to serve from `path`: itself when it is one, or the one behind a state folder's RELEASE
    (or CURRENT, where a copy lacks that).

    The answer stays the same release when these move on. Raises ReleaseError when nothing has been released yet, or
    `path` cannot be read.
    """
    try:
        return _current(path)
    except OSError as error:
        raise ReleaseError(f"no release in {path}: it cannot be read ({error})") from error


def _current(path: Path) -> Path:
    # Links are resolved at once: the caller reads many files, and all must be of one release.
    if (path / MANIFEST).exists():
        return path.resolve()
    # A pinned release may be older than the current commit, so this link goes first.
    pointer = path / RELEASE
    if pointer.is_symlink() and pointer.exists():
        return pointer.resolve()
    link = path / CURRENT
    if not link.exists():
        raise NoRelease(f"no release in {path}: neither {MANIFEST} nor {CURRENT} is there; was a task learned yet?")
    folder = link.resolve() / RELEASE_FOLDER
    if not folder.exists():
        raise NoRelease(f"no release in {path}: the current commit {folder.parent.name} has none")
    return folder.resolve()


def variant_name(precision: str) -> str:
    """Name the file of the model in one of exporter.precision.PRECISIONS."""
    return f"model.{precision}.onnx"


def _parity(values: Mapping[str, Any]) -> Parity:
    return Parity(**{**values, "batches": tuple(values["batches"])})


def _own_digest(values: Mapping[str, Any]) -> str:
    """Hash what release.json says, whatever its keys' order and its white space."""
    read_back = json.loads(json.dumps(values))  # tuples become lists and keys text, as a reader will find them
    return hashlib.sha256(json.dumps(read_back, sort_keys=True).encode()).hexdigest()


def _check_names(classes: Any, files: Iterable[str]) -> None:
    """Refuse class names that are no texts, and files that would be read outside of the release. Raises ValueError."""
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"got classes {str(classes)[:100]}, expected a list of names")
    for name in files:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"got the file {name[:100]!r}, expected a name without a folder")


def _check_regular(path: Path) -> int:
    """Give the size of a file in bytes. Raises OSError, also for what is no file: a pipe would be waited for."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return found.st_size


def digest(path: Path) -> tuple[int, str]:
    """Give the size in bytes and the sha256 in hex of a file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), sha256
