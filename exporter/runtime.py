"""Answers from a release with onnxruntime alone; imports neither torch nor open_clip."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from exporter import release as releases
from exporter.preprocess import decode, upright_rgb

log = logging.getLogger(__name__)

OUTPUTS = ("embedding", "logits", "probabilities")
MAX_PIXELS = 50_000_000

Device = Literal["auto", "cpu", "cuda"]


class Answers(NamedTuple):
    """What a model says about B images, float32."""

    embedding: NDArray[np.float32]
    """[B, D], L2-normalised."""
    logits: NDArray[np.float32]
    """[B, C]"""
    probabilities: NDArray[np.float32]
    """[B, C], rows sum to 1."""


class Session:
    """A model file opened by onnxruntime. `run` may be called from several threads at once."""

    def __init__(self, model: Path, *, device: Device = "auto", threads: int = 0) -> None:
        """`auto` is CUDA when usable; `cuda` without it falls back to the CPU with a warning; `threads` 0: all."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors; warnings tell of optimisations that were not made
        providers: list[Any] = ["CPUExecutionProvider"]
        if device != "cpu" and _cuda_usable():
            # TF32 would cost three digits; exhaustive search and doubling arenas cost start-up time and memory.
            cuda = {
                "device_id": 0,
                "use_tf32": 0,
                "cudnn_conv_algo_search": "HEURISTIC",
                "arena_extend_strategy": "kSameAsRequested",
            }
            providers.insert(0, ("CUDAExecutionProvider", cuda))
        self._session = onnxruntime.InferenceSession(model, options, providers=providers)
        self.provider: str = self._session.get_providers()[0]
        """Execution provider that answers."""
        if device == "cuda" and self.provider != "CUDAExecutionProvider":
            log.warning("CUDA was asked for and cannot be used, %s answers", self.provider)

    def run(self, images: NDArray[np.float32]) -> Answers:
        """float32 [B, 3, H, W], preprocessed."""
        return Answers(*self._session.run(OUTPUTS, {"images": images}))


@dataclass(frozen=True)
class Prediction:
    """What a release says about one image."""

    labels: tuple[str, ...]
    """Class names, the most probable first."""
    scores: tuple[float, ...]
    """Their probabilities; they sum to 1 when all classes are listed."""
    release: str
    """Id of the release that answered."""


class Classifier:
    """Answers from the release in `path`, or the current one when `path` is a state folder."""

    def __init__(self, path: Path, threads: int = 0, *, device: Device = "auto", max_batch: int = 64) -> None:
        """Raises ReleaseError when there is no release, it is damaged, or it does not pass its own test."""
        self.release = releases.read(releases.current(path))
        self.release.verify()
        self._max_batch = max_batch
        self._session = Session(self.release.model, device=device, threads=threads)
        self.provider = self._session.provider

    def classify(self, images: Sequence[bytes | Image.Image], top: int = 5) -> list[Prediction]:
        """Encoded or Pillow images -> the `top` classes of each (0: all). Raises ImageError for an unusable image."""
        release = self.release
        rgb = [decode(image, MAX_PIXELS) if isinstance(image, bytes) else upright_rgb(image) for image in images]
        predictions: list[Prediction] = []
        for start in range(0, len(rgb), self._max_batch):
            batch = release.preprocess.batch(rgb[start : start + self._max_batch])
            for scores in self._session.run(batch).probabilities:
                order = np.argsort(-scores, kind="stable")[: top or None]
                labels = tuple(release.classes[index] for index in order)
                predictions.append(Prediction(labels, tuple(float(score) for score in scores[order]), release.id))
        return predictions


def _cuda_usable() -> bool:
    """Whether onnxruntime was built for CUDA and a device answers. Asking the driver first keeps machines without one
    quiet: onnxruntime prints an error for every library it misses."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return False
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        onnxruntime.preload_dlls()
    return True
