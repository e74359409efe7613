"""Answers from a release with onnxruntime alone; imports neither torch nor open_clip."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from exporter import release as releases
from exporter.preprocess import Preprocess, decode, upright_rgb
from exporter.release import Release, ReleaseError

log = logging.getLogger(__name__)

OUTPUTS = ("embedding", "logits", "probabilities")

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "fp16", "int8"]


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


@dataclass(frozen=True)
class Prepared:
    """An image as the network takes it, see `Classifier.prepare`."""

    pixels: NDArray[np.float32]
    """[3, H, W]"""
    preprocess: Preprocess
    """That made it."""


@dataclass(frozen=True)
class _Served:
    """A release and its session, swapped together so that no answer mixes two releases."""

    release: Release
    session: Session


class Classifier:
    """Answers from a release folder, or from the current release of a state folder, which `refresh` or `follow` take up
    while older calls finish on what they began with. Every method may be called from any thread."""

    def __init__(
        self,
        path: Path,
        threads: int = 0,
        *,
        device: Device = "auto",
        precision: Precision = "fp32",
        max_batch: int = 64,
        max_pixels: int = 50_000_000,
    ) -> None:
        """`threads`: of onnxruntime for one batch, 0 for all cores. A release without `precision` is served in fp32:
        the newest model matters more. Raises ReleaseError when there is no release, it is
        damaged, or it does not pass its own test."""
        self._path = path
        self._threads = threads
        self._device: Device = device
        self._precision = precision
        self._max_batch = max_batch
        self._max_pixels = max_pixels
        self._refreshing = threading.Lock()
        self._stop = threading.Event()
        self._follower: threading.Thread | None = None
        self._seen = releases.current(path)
        self._served = self._load(releases.read(self._seen))

    @property
    def release(self) -> Release:
        """The release that answers calls made from now on."""
        return self._served.release

    @property
    def provider(self) -> str:
        """The onnxruntime execution provider that answers, such as `CPUExecutionProvider`."""
        return self._served.session.provider

    def prepare(self, image: bytes | Image.Image) -> Prepared:
        """All of `classify` that needs only this image, to be done where and when it suits. Raises ImageError."""
        preprocess = self.release.preprocess
        return Prepared(self._pixels(image, preprocess), preprocess)

    def classify(self, images: Sequence[bytes | Image.Image | Prepared], top: int = 5) -> list[Prediction]:
        """Encoded, Pillow or prepared images -> the `top` classes of each (0: all), all by one release.

        Raises ImageError for the first unusable image, ReleaseError for one that was prepared for a release with
        another preprocessing.
        """
        served = self._served
        classes, preprocess = served.release.classes, served.release.preprocess
        predictions: list[Prediction] = []
        for start in range(0, len(images), self._max_batch):
            part = images[start : start + self._max_batch]
            batch = np.stack([self._pixels(image, preprocess) for image in part])
            for scores in served.session.run(batch).probabilities:
                order = np.argsort(-scores, kind="stable")[: top or None]
                labels = tuple(classes[index] for index in order)
                predictions.append(Prediction(labels, tuple(scores[order].tolist()), served.release.id))
        return predictions

    def refresh(self) -> bool:
        """Take up the current release if it is another one: open and test it beside the old one, then swap.

        Returns whether it did. Raises ReleaseError when the new one cannot be used: the old one goes on answering, and
        the bad one is not tried again.
        """
        with self._refreshing:
            folder = releases.current(self._path)
            if folder == self._seen:
                return False
            self._seen = folder
            release = releases.read(folder)
            if release.id == self.release.id:  # a commit that kept its predecessor's release
                return False
            self._served = self._load(release)
        log.info("release %s answers now: %d classes, %s", release.id, len(release.classes), folder)
        return True

    def follow(self, interval_s: float = 1.0) -> None:
        """Call `refresh` every so often on a thread of its own, until `close`; what goes wrong is logged."""

        def loop() -> None:
            while not self._stop.wait(interval_s):
                try:
                    self.refresh()
                except ReleaseError as error:
                    log.error("release %s goes on answering: %s", self.release.id, error)

        self._follower = threading.Thread(target=loop, name="release-follower", daemon=True)
        self._follower.start()

    def close(self) -> None:
        """End `follow`."""
        self._stop.set()
        if self._follower is not None:
            self._follower.join()

    def _pixels(self, image: bytes | Image.Image | Prepared, preprocess: Preprocess) -> NDArray[np.float32]:
        if not isinstance(image, Prepared):
            rgb = decode(image, self._max_pixels) if isinstance(image, bytes) else upright_rgb(image)
            return preprocess(rgb)
        if image.preprocess != preprocess:
            raise ReleaseError("the image was prepared for a release with another preprocessing; prepare it again")
        return image.pixels

    def _load(self, release: Release) -> _Served:
        release.verify()
        try:
            precision = self._precision if release.offers(self._precision) else release.precision
            if precision != self._precision:
                log.warning("release %s has no %s form, it is served in %s", release.id, self._precision, precision)
            session = Session(release.model_in(precision), device=self._device, threads=self._threads)
            _self_test(release, precision, session)
        except ReleaseError:
            raise
        except Exception as error:  # onnxruntime's errors share no public base class
            raise ReleaseError(f"release {release.path} cannot be run: {type(error).__name__}: {error}") from error
        return _Served(release, session)


def _self_test(release: Release, precision: str, session: Session) -> None:
    """Compare with the trained model's answers shipped in the release, at batch 1 and all at once (which also warms the
    session up). Raises ReleaseError with numbers."""
    atol = release.atol if precision == release.precision else release.variants[precision].atol
    with np.load(release.golden, allow_pickle=False) as golden:
        images, want = golden["images"], Answers(*(golden[name] for name in OUTPUTS))
    for size in {1, len(images)}:
        got = session.run(images[:size])
        difference = max(
            float(np.abs(got.embedding - want.embedding[:size]).max()),
            float(np.abs(got.probabilities - want.probabilities[:size]).max()),
        )
        if not difference <= atol:
            raise ReleaseError(
                f"release {release.path} fails its own test on {session.provider}: golden answers differ by "
                f"{difference:.3g} at batch {size}, at most {atol:g} is allowed; it is not used"
            )


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
