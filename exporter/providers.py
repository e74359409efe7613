"""Opens a release's model on an execution provider of onnxruntime that was asked for by name: TensorRT or OpenVINO.

Whether its answers are right is for the release's own test to say (exporter.runtime), which every session passes
before it answers. CUDA and the CPU, which follow where none of these can be used, are in exporter.session.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import onnxruntime

from exporter.files import cache_folder
from exporter.precision import PRECISIONS
from exporter.release import Release
from exporter.session import CUDA, cuda_usable, options_for

log = logging.getLogger(__name__)

KEPT_ENGINES = 4
"""Models of which TensorRT's engines are kept, those used last. Chosen by hand: an engine has about the size of its
model, and a server that goes back a release or compares two forms has both within reach."""

USUAL_BATCH = 16
"""Images for which TensorRT chooses its kernels; from one up to the largest batch others are answered too, as right and
a little slower. The batch that many clients make (exporter.fastest.LARGER_BATCH)."""

GOLDEN_BATCH = 4
"""Images of the largest batch of a release's own test (exporter.onnx.GOLDEN_IMAGES). A batch beyond an engine's bounds
would make TensorRT build it anew."""


class ProviderError(Exception):
    """A provider that was asked for cannot be used; the message says why."""


Tested = TypeVar("Tested")
"""What a test makes of an opened model."""


class Providers:
    """The providers that were asked for, in the order in which they are tried."""

    def __init__(self, names: Sequence[str], max_batch: int, threads: int) -> None:
        """`names`: `tensorrt`, or `openvino` with or without one of its devices (`openvino:GPU`). `max_batch`: images
        that will go through a model at once, at most; `threads`: CPU threads of one call, 0 for all cores."""
        self._names = tuple(names)
        self._max_batch = max_batch
        self._threads = threads

    def first(
        self, release: Release, precision: str, test: Callable[[onnxruntime.InferenceSession], Tested]
    ) -> tuple[Tested | None, tuple[str, ...]]:
        """Give what `test` makes of a form of `release` opened on the first provider where nothing is raised, and why
        those before it do not answer, which is logged too; None where there is no such provider."""
        passed_over: list[str] = []
        for name in self._names:
            try:
                with _opened(name, release, precision, self._max_batch, self._threads) as session:
                    return test(session), tuple(passed_over)
            except Exception as error:  # onnxruntime's share no base class; whatever it is, the next one is there
                passed_over.append(f"{name} does not answer release {release.id} in {precision}: {error}")
                log.warning("%s", passed_over[-1])
        return None, tuple(passed_over)


@contextlib.contextmanager
def _opened(
    provider: str, release: Release, precision: str, max_batch: int, threads: int
) -> Iterator[onnxruntime.InferenceSession]:
    """Open a form of `release` on `provider`, to be tested in the block. What TensorRT has built is kept for the next
    process, unless the block fails. Raises ProviderError, and what onnxruntime raises."""
    if precision in PRECISIONS and PRECISIONS[precision].cpu_only:
        raise ProviderError(f"{precision} is made for onnxruntime's own CPU kernels")
    name, _, device = provider.partition(":")
    if name == "tensorrt":
        with _engines(release, precision, max_batch) as folder:
            largest = max(max_batch, GOLDEN_BATCH)
            tensorrt = _tensorrt(folder, release.preprocess.size, largest, precision == "fp16")
            wanted = [("TensorrtExecutionProvider", tensorrt), ("CUDAExecutionProvider", CUDA)]
            yield _session(release.model_in(precision), wanted, threads)
    elif name == "openvino":
        openvino = _openvino(device, threads)
        yield _session(release.model_in(precision), [("OpenVINOExecutionProvider", openvino)], threads)
    else:
        raise ProviderError("it is not known; expected tensorrt, openvino or, say, openvino:GPU")


def _session(model: Path, wanted: list[tuple[str, dict[str, Any]]], threads: int) -> onnxruntime.InferenceSession:
    """Open `model` on the first of `wanted`; what that cannot compute goes to the others and the CPU."""
    first = wanted[0][0]
    available = onnxruntime.get_available_providers()
    if first not in available:
        raise ProviderError(f"the onnxruntime installed here has no {first}, only {', '.join(available)}")
    if first == "TensorrtExecutionProvider":
        if not cuda_usable():
            raise ProviderError("no NVIDIA device can be used")
        with contextlib.suppress(ImportError):  # its wheel's libraries are found by loading them first
            importlib.import_module("tensorrt")
    # Without the last, onnxruntime would print what went wrong and open the model on the CPU.
    session = onnxruntime.InferenceSession(
        model, options_for(threads), providers=[*wanted, "CPUExecutionProvider"], enable_fallback=0
    )
    if (got := session.get_providers()[0]) != first:
        raise ProviderError(f"onnxruntime could not load {first} and would answer on {got}")
    return session


def _tensorrt(engines: Path | None, size: int, largest: int, half: bool) -> dict[str, Any]:
    """Options of TensorRT. The bounds of a batch are said first: it would build a new engine, for minutes, whenever a
    batch comes that is larger than all before."""
    shapes = {"min": 1, "opt": min(USUAL_BATCH, largest), "max": largest}
    options: dict[str, Any] = {
        "device_id": 0,
        "trt_fp16_enable": half,
        **{f"trt_profile_{bound}_shapes": f"images:{batch}x3x{size}x{size}" for bound, batch in shapes.items()},
    }
    if engines is not None:
        options |= {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(engines)}
        # Kernels' times, which hold for other models too, so that the engine of the next release is built faster.
        options |= {"trt_timing_cache_enable": True, "trt_timing_cache_path": str(engines.parent)}
    return options


def _openvino(device: str, threads: int) -> dict[str, Any]:
    """Options of OpenVINO. By itself it would compute in less than float32 where a device is faster then."""
    options: dict[str, Any] = {"device_type": device or "CPU", "precision": "ACCURACY"}
    return options | ({"num_of_threads": threads} if threads else {})


@contextlib.contextmanager
def _engines(release: Release, precision: str, max_batch: int) -> Iterator[Path | None]:
    """Give the folder of the engines built for this very model, None where there is no cache. It is removed when the
    block fails, since it may be why.

    TensorRT takes an engine it finds for the model at hand if the graphs are alike, whatever the weights: those of the
    release before would answer.
    """
    above = cache_folder("engines")
    model = release.model_in(precision).name
    hashes = {name: digest for name, (_, digest) in release.files.items() if name in (model, f"{model}.data")}
    asked = json.dumps([hashes, max_batch, onnxruntime.__version__], sort_keys=True)
    folder = None if above is None else above / hashlib.sha256(asked.encode()).hexdigest()
    if folder is not None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.touch()
            _sweep(folder.parent)
        except OSError as error:
            log.warning("TensorRT's engines are not kept in %s, the next process builds them again: %s", folder, error)
            folder = None
    try:
        yield folder
    except Exception:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _sweep(folder: Path) -> None:
    """Delete the engines beyond KEPT_ENGINES that were used longest ago."""
    kept = sorted((path for path in folder.iterdir() if re.fullmatch("[0-9a-f]{64}", path.name)), key=_used)
    for path in kept[:-KEPT_ENGINES]:
        shutil.rmtree(path, ignore_errors=True)


def _used(path: Path) -> float:
    return path.stat().st_mtime
