"""Traced graphs on disk, without weights, so that a machine traces each architecture once and not in every process.

What is here is only ever a shortcut: a graph that cannot be read, or fits no more, is traced anew, and a folder that
cannot be written costs nothing but the time.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporter.files import cache_folder

log = logging.getLogger(__name__)

MAX_ENTRIES = 64
"""Graphs that are kept, those used last. Chosen by hand: an architecture has two for each method that it is used with,
some 90 kB and 30 kB of the bundled model, so that two or three architectures with all methods fit."""

MAX_BYTES = 4 * 2**20
"""Bytes of the largest graph that is kept or read. Those of CLIP have some 300 bytes for a node and 60 nodes for a
layer: a tower of 48 layers takes 1 MB."""

MAX_CONSTANT_BYTES = 64 * 1024
"""Bytes of the numbers that may be in a graph: shapes, bounds and masks (77 x 77 float32: 24 kB). More of them would be
weights, which belong to a state and not to an architecture."""

STALE_S = 3600.0
"""Seconds after which an unfinished file was left by a process that died: writing one takes milliseconds."""

_PACKAGES = ("gapstream", "torch", "onnx", "onnxscript", "onnx_ir")
"""Packages that make a graph. Those with the modules' own classes count by their files."""

_SUFFIX = ".trace"
"""Ending of a file with a graph: the sha256 of its key and its bytes in hex, a line end, and the bytes of the ONNX
model."""

_DIGEST_CHARS = 64
"""Characters of a sha256 in hex."""


class _Unknowable(Exception):
    """Nothing names what would be traced, so that it cannot be kept."""


def user_cache(env: Mapping[str, str] = os.environ) -> TraceCache | None:
    """Give the cache of this user: `gapstream/traces` in XDG_CACHE_HOME, or else in ~/.cache; None without a home."""
    folder = cache_folder("traces", env)
    return None if folder is None else TraceCache(folder)


def key_of(module: nn.Module, asked: object, tracer: str) -> str | None:
    """Name the graph that tracing `module` would give, by all that it depends on; None where that cannot be told.

    This is the versions of the libraries, the files of the modules' classes, their numbers, texts and functions outside
    of tensors, and `asked`, which is JSON-able: the shapes of the tensors and how it is traced; and the file `tracer`,
    which does that. What the classes use from other files counts by the version of gapstream alone, which the parity
    check of every release makes up for.
    """
    try:
        parts = []
        files = {"": digest_of(tracer)}
        for name, part in module.named_modules(remove_duplicate=False):
            classes = [kind for kind in type(part).__mro__ if not _is_by_version(kind)]
            files |= {kind.__module__: digest_of(_file_of(kind)) for kind in classes}
            kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(part).__mro__]
            parts.append([name, kinds, _settings(vars(part))])
        versions = {name: metadata.version(name.replace("_", "-")) for name in _PACKAGES}
        text = json.dumps([versions, sorted(files.items()), parts, asked], sort_keys=True)
    except (_Unknowable, OSError, TypeError, metadata.PackageNotFoundError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()


class TraceCache:
    """It keeps the graphs that were used last in a folder. Several processes may use the same one at once.

    Nothing here raises: whatever goes wrong is a graph that is not there, with a warning where it should not have been.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is made when the first graph is kept; nothing else belongs there."""
        self._folder = folder

    def get(self, key: str) -> ir.Model | None:
        """Give the graph kept under `key`, or None. One that is damaged or not ours is not used."""
        path = self._path(key)
        try:
            data = _read(path)
            digest, body = data[:_DIGEST_CHARS], data[_DIGEST_CHARS + 1 :]
            if digest.decode("ascii", "replace") != _digest(key, body):
                raise ValueError("its content is not what was written")
            proto = onnx.load_model_from_string(body)
            onnx.checker.check_model(proto)
            model = ir.from_proto(proto)
            _check_constants(model)
        except FileNotFoundError:
            return None
        except Exception as error:  # protobuf, checker and onnx_ir share no base class
            log.warning("the traced graph %s cannot be used (%s), it is traced anew", path, error)
            return None
        with contextlib.suppress(OSError):  # a folder that may only be read is as good
            os.utime(path)
        return model

    def put(self, key: str, model: ir.Model) -> None:
        """Keep a graph under `key`, and of all only the newest MAX_ENTRIES."""
        name = None
        try:
            _check_constants(model)
            body = ir.to_proto(model).SerializeToString()
            if len(body) > MAX_BYTES:
                raise ValueError(f"it has {len(body)} bytes, at most {MAX_BYTES} are kept")
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Whole or not at all, also for another process that writes the same one now.
            handle, name = tempfile.mkstemp(dir=self._folder)
            with os.fdopen(handle, "wb") as file:
                file.write(_digest(key, body).encode() + b"\n" + body)
            Path(name).replace(self._path(key))
            self._sweep()
        except (OSError, ValueError) as error:
            log.warning("the traced graph is not kept in %s, the next process traces again: %s", self._folder, error)
            if name is not None:
                with contextlib.suppress(OSError):
                    Path(name).unlink(missing_ok=True)

    def drop(self, key: str) -> None:
        """Forget the graph under `key`, which fits its module no more."""
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"

    def _sweep(self) -> None:
        """Delete the graphs beyond MAX_ENTRIES that were used longest ago, and what processes that died left."""
        found = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process sweeps, too
                found.append((path.stat().st_mtime, path))
        kept = sorted((one for one in found if one[1].suffix == _SUFFIX), reverse=True)
        old = time.time() - STALE_S
        for _, path in kept[MAX_ENTRIES:] + [one for one in found if one[1].suffix != _SUFFIX and one[0] < old]:
            path.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    """Read a file of ours. Raises OSError, ValueError for another kind of file, another owner, or one too large."""
    # Not a link, and not a pipe, which would be waited for.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise ValueError("it is no file of this user")
        data = file.read(MAX_BYTES + _DIGEST_CHARS + 2)
    if len(data) > MAX_BYTES + _DIGEST_CHARS + 1:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    return data


def _digest(key: str, body: bytes) -> str:
    return hashlib.sha256(key.encode() + body).hexdigest()


def _check_constants(model: ir.Model) -> None:
    """Refuse a graph with weights in it, or with a file of weights beside it. Raises ValueError."""
    tensors: list[Any] = [value.const_value for value in model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                tensors.append(attribute.value)
            elif attribute.type == ir.AttributeType.TENSORS:
                tensors.extend(attribute.value)
    if any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors):
        raise ValueError("it names a file of weights")
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    if size > MAX_CONSTANT_BYTES:
        raise ValueError(f"it has {size} bytes of numbers in it, at most {MAX_CONSTANT_BYTES} are no weights")


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give what a module keeps outside of tensors and may be part of its graph: numbers, texts, functions, types.

    Texts in lists are class names, which change between releases and are in no graph. Raises _Unknowable for a tensor
    that is neither parameter nor buffer: its numbers would be in the graph, and in no key.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("_parameters", "_buffers", "_modules", "training"):
            continue
        if any(isinstance(one, (Tensor, np.ndarray)) for one in _within(value)):
            raise _Unknowable
        if value is None or isinstance(value, (bool, int, float, str)):
            found[name] = value
        elif isinstance(value, (list, tuple)) and all(isinstance(one, (bool, int, float)) for one in value):
            found[name] = list(value)
        elif isinstance(value, torch.dtype):
            found[name] = str(value)
        elif inspect.isroutine(value):
            found[name] = f"{value.__module__}.{value.__qualname__}"
    return found


def _within(value: Any) -> Iterable[Any]:
    """Yield a value, and what is in it where it is a collection."""
    yield value
    if isinstance(value, (list, tuple, set, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _within(one)


def _is_by_version(kind: type) -> bool:
    """Whether a class is of torch or of Python itself, whose versions stand for their files."""
    package = kind.__module__.partition(".")[0]
    return package == "torch" or package in sys.stdlib_module_names


def _file_of(kind: type) -> str:
    """Give the file in which a class is written. Raises _Unknowable where there is none."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None:
        raise _Unknowable
    return file


@lru_cache(maxsize=1024)
def digest_of(file: str) -> str:
    """Hash a file, once in a process: what Python has loaded does not change any more."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
