"""Answers from a release with onnxruntime alone, and follows newer ones; imports neither torch nor open_clip."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from exporter import golden as golden_set
from exporter import release as releases
from exporter.fastest import Chooser
from exporter.precision import AUTO, FP32
from exporter.preprocess import Preprocess, planes, upright_rgb
from exporter.providers import Providers
from exporter.release import Release, ReleaseError
from exporter.session import Device, open_session
from exporter.text import NameEmbeddings

log = logging.getLogger(__name__)

OUTPUTS = ("embedding", "logits", "probabilities")
"""Names of a released graph's outputs, in their order; the fields of `Answers` and the arrays of golden.npz."""


RETRY_S = 60.0
"""Longest pause, in seconds, before a release that could not be used is tried again. Chosen by hand: reading all of a
large model anew costs seconds of disk, and what mends itself (a disk, a copy that goes on) takes a minute or so."""


class Answers(NamedTuple):
    """What a model says about B images; float32."""

    embedding: NDArray[np.float32]
    """The images' embeddings [B, D], L2-normalised."""
    logits: NDArray[np.float32]
    """Scaled similarities to the C classes [B, C]."""
    probabilities: NDArray[np.float32]
    """Probabilities of the classes [B, C]; every row sums to 1."""


class Session:
    """A session is a model file opened by onnxruntime. `run` may be called from several threads at once."""

    def __init__(
        self,
        model: Path,
        *,
        device: Device = "auto",
        threads: int = 0,
        opened: onnxruntime.InferenceSession | None = None,
    ) -> None:
        """`device`: `auto` is CUDA when it is usable; `cuda` where it is not falls back to the CPU with a warning.
        `threads`: CPU threads of one call, 0 for all cores. `opened`: the model opened before (exporter.providers),
        which is then taken. Raises what onnxruntime raises."""
        self._session = open_session(model, device, threads) if opened is None else opened
        self.provider: str = self._session.get_providers()[0]
        """The execution provider that answers."""
        self.passed_over: tuple[str, ...] = ()
        """Providers that were asked for before this one and do not answer, each with the reason."""
        # onnxruntime itself says nothing when it cannot load CUDA's libraries, and answers on the CPU.
        if opened is None and device == "cuda" and self.provider != "CUDAExecutionProvider":
            log.warning("CUDA was asked for and cannot be used, %s answers", self.provider)

    def run(self, images: NDArray[np.float32]) -> Answers:
        """Answer `images`, float32 [B, 3, H, W], preprocessed."""
        return Answers(*self._session.run(OUTPUTS, {"images": images}))

    @property
    def metadata(self) -> dict[str, str]:
        """What the model file says about itself; a converter may have left things out."""
        return self._session.get_modelmeta().custom_metadata_map


class NamesError(ValueError):
    """Extra names that cannot be scored; the message says what is expected."""


@dataclass(frozen=True)
class Prediction:
    """What a release says about one image."""

    labels: tuple[str, ...]
    """Class names and extra names, the most probable first."""
    scores: tuple[float, ...]
    """Their probabilities in the same order; they sum to 1 when all names are listed."""
    release: str
    """Id of the release that answered."""


@dataclass(frozen=True)
class Prepared:
    """An image as the network takes it, made of what exporter.decoders gives."""

    pixels: NDArray[np.float32]
    """The model's input [3, H, W]."""
    preprocess: Preprocess
    """The preprocessing that produced `pixels`."""
    extra: tuple[str, ...] = ()
    """Names to score for this image beside the learned classes."""


@dataclass(frozen=True)
class _OpenRelease:
    """A release with what was opened of it, swapped together so that no answer mixes two releases."""

    release: Release
    precision: str
    """The form that `session` is of."""
    session: Session
    names: NameEmbeddings | None
    """Its text part; None when it has none."""


@dataclass(frozen=True)
class _Trouble:
    """What could not be taken up, and until when it is not tried again."""

    what: str = ""
    """Id of the release, or what was wrong where not even that could be read."""
    why: str = ""
    """What was wrong."""
    tries: int = 0
    until: float = 0.0
    """A time of time.monotonic()."""

    def waits(self, what: str) -> bool:
        """Tell whether `what` is the same as before, and not to be tried yet."""
        return what == self.what and time.monotonic() < self.until

    def again(self, what: str, why: str) -> _Trouble:
        """Give the state after `what` has failed, once more or for the first time."""
        tries = self.tries + 1 if what == self.what else 1
        wait_s = min(2.0 ** min(tries - 1, 10), RETRY_S)  # 2 to a power of thousands is no float
        return _Trouble(what, why, tries, time.monotonic() + wait_s)


class Classifier:
    """Answers from a release folder, or from the current release of a state folder.

    `refresh` and `follow` take up a newer release while calls that have begun finish on the older one. Every method may
    be called from any thread.
    """

    def __init__(
        self,
        path: Path,
        threads: int = 0,
        *,
        device: Device = "auto",
        providers: Sequence[str] = (),
        precision: str = FP32,
        max_batch: int = 64,
        max_pixels: int = 50_000_000,
        max_names: int = 64,
        max_name_chars: int = 200,
    ) -> None:
        """`path`: a release or a state folder. `threads`: CPU threads of onnxruntime for one batch, 0 for all cores.
        `providers`: those of onnxruntime that are tried before `device`, for the model of images (exporter.providers).
        `precision`: the one that answers; a release without it is served in fp32, since the newest model matters more.
        With `auto` it is the one that is fastest here, measured before a release with several forms answers, and not
        again for later ones of the same structure (exporter.fastest).
        `max_batch`: images that go through the model at once. `max_pixels`: an image of more is refused. `max_names`:
        extra names for an image, each of at most `max_name_chars` characters.

        Raises ReleaseError when there is no release, or it is damaged or does not pass its own test.
        """
        self._path = path
        self._threads = threads
        self._device: Device = device
        self._providers = Providers(providers, max_batch, threads)
        self._precision = precision
        self._chooser = Chooser(max_batch)
        self._max_batch = max_batch
        self._max_pixels = max_pixels
        self._max_names = max_names
        self._max_name_chars = max_name_chars
        self._refreshing = threading.Lock()
        self._stop = threading.Event()
        self._follower: threading.Thread | None = None
        self._trouble = _Trouble()
        self._served = self._load(releases.read(releases.current(path)))
        self._current_at = time.monotonic()

    @property
    def release(self) -> Release:
        """The release that answers calls made from now on."""
        return self._served.release

    @property
    def precision(self) -> str:
        """The form of the release that answers: `fp32` or a name in exporter.precision.PRECISIONS."""
        return self._served.precision

    @property
    def provider(self) -> str:
        """The onnxruntime execution provider that answers, such as `CPUExecutionProvider`."""
        return self._served.session.provider

    @property
    def passed_over(self) -> tuple[str, ...]:
        """The providers that were asked for before the one that answers and do not, each with the reason."""
        return self._served.session.passed_over

    @property
    def behind_s(self) -> float:
        """Seconds since the release that answers was last found to be the one that readers follow."""
        return time.monotonic() - self._current_at

    @property
    def why_behind(self) -> str:
        """Why the release that readers follow could not be taken up at the last attempt; empty when it could."""
        return self._trouble.why

    def why_not_alive(self) -> list[str]:
        """Give the reasons why newer releases are never taken up any more; empty where `follow` runs or never ran."""
        dead = self._follower is not None and not self._follower.is_alive() and not self._stop.is_set()
        return ["the thread that follows releases has died"] if dead else []

    def check_names(self, extra: Sequence[str]) -> tuple[str, ...]:
        """Give `extra` as a tuple, when the release that answers now can score its names beside the learned classes.

        Raises NamesError when there are too many, one is too long or blank, or the release has no text part.
        """
        if len(extra) > self._max_names:
            raise NamesError(f"got {len(extra)} extra names, expected at most {self._max_names}")
        for name in extra:
            if not name.strip() or len(name) > self._max_name_chars:
                raise NamesError(
                    f"got the extra name {name[:50]!r} of {len(name)} characters, expected 1 to "
                    f"{self._max_name_chars}, not all blank"
                )
        served = self._served
        if extra and served.names is None:
            text = served.release.text
            why = "release.text was off when it was made" if text is None else text.refused
            raise NamesError(f"release {served.release.id} scores only the classes it has learned: {why}")
        return tuple(extra)

    def encode_names(self, extra: Sequence[str]) -> None:
        """Do all of `classify` that needs only the names: their embeddings are kept for the images that come with them.

        May wait while names of other callers are encoded. Raises NamesError as `check_names` does, and ReleaseError
        when the text part cannot be used.
        """
        served = self._served
        if self.check_names(extra) and served.names is not None:
            served.names.rows(extra)

    def classify(
        self, images: Sequence[bytes | Image.Image | Prepared], top: int = 5, extra: Sequence[str] = ()
    ) -> list[Prediction]:
        """Name the `top` classes (0: all) of each encoded, Pillow or prepared image; one release answers for all of
        them.

        A Pillow image is taken with the pixels it has; of an encoded JPEG hardly more are decoded than are needed
        (Preprocess.jpeg_oversampling), so that the two differ a little where it is large.

        `extra`: names that are scored beside the learned classes by what their words mean (a prepared image has its
        own). An extra name's score is its share of softmax(scale * similarity) over all names; the learned classes
        share what is left as they would share all of it. A name that is learned is just that class.

        Raises ImageError for the first unusable image, NamesError as `check_names` does, and ReleaseError for an image
        that was prepared for a release with another preprocessing, or with names where the new one scores none.
        """
        served = self._served  # read once: `refresh` may replace it while this call runs
        extra = self.check_names(extra)
        predictions: list[Prediction] = []
        for start in range(0, len(images), self._max_batch):
            part = images[start : start + self._max_batch]
            answers = served.session.run(np.stack([self._pixels(image, served.release.preprocess) for image in part]))
            asked = [image.extra if isinstance(image, Prepared) else extra for image in part]
            # Requests of a batch often ask for the same names, which are then looked up once.
            rows = {names: _rows(served, names) for names in {*asked} if names}
            for names, embedding, probabilities in zip(asked, answers.embedding, answers.probabilities, strict=True):
                labels, scores = _scores(served.release, embedding, probabilities, rows.get(names))
                # Stable: classes of equal scores stay in their order, whatever `top` is.
                order = np.argsort(-scores, kind="stable")[: top or None]
                predictions.append(
                    Prediction(tuple(labels[i] for i in order), tuple(scores[order].tolist()), served.release.id)
                )
        return predictions

    def refresh(self) -> bool:
        """Take up the current release if it is another one: open and test it beside the old one, then swap.

        Releases are told apart by what is in them. Returns whether another one answers now. Raises ReleaseError when
        the new one cannot be used: the old one goes on answering, and calls try the bad one again after a second, then
        after twice the time each time, up to RETRY_S; until then they return False.
        """
        with self._refreshing:
            release = None
            try:
                release = releases.read(releases.current(self._path))
                if release.id == self.release.id:
                    self._current_at = time.monotonic()
                    self._trouble = _Trouble()
                    return False
                if self._trouble.waits(release.id):
                    return False
                served = self._load(release)
            except ReleaseError as error:
                what = str(error) if release is None else release.id
                if self._trouble.waits(what):
                    return False
                self._trouble = self._trouble.again(what, str(error))
                raise
            if served.names is not None and self._served.names is not None and self._served.names.opened:
                served.names.open()  # where names are asked for, no request of the new release waits for it
            self._served = served
            self._current_at = time.monotonic()
            self._trouble = _Trouble()
        _trim_memory()
        log.info(
            "release %s answers now: %d classes, %s, %s",
            release.id,
            len(release.classes),
            served.precision,
            release.path,
        )
        return True

    def follow(self, interval_s: float = 1.0) -> None:
        """Call `refresh` every `interval_s` seconds on a thread of its own, until `close`; failures are logged.

        It looks instead of waiting for a notification: inotify says nothing on NFS and on mounted ConfigMaps.
        """

        def loop() -> None:
            while not self._stop.wait(interval_s):
                try:
                    self.refresh()
                except ReleaseError as error:
                    log.error("release %s goes on answering: %s", self.release.id, error)
                except Exception as error:  # nobody would start the thread again
                    log.exception("release %s goes on answering", self.release.id)
                    self._trouble = self._trouble.again(repr(error), repr(error))

        self._follower = threading.Thread(target=loop, name="release-follower", daemon=True)
        self._follower.start()

    def close(self) -> None:
        """End the thread of `follow`, if it runs. Calls are still answered."""
        self._stop.set()
        if self._follower is not None:
            self._follower.join()

    def _pixels(self, image: bytes | Image.Image | Prepared, preprocess: Preprocess) -> NDArray[np.float32]:
        if not isinstance(image, Prepared):
            if isinstance(image, bytes):
                return preprocess.scale(planes(image, self._max_pixels, preprocess))
            return preprocess(upright_rgb(image))
        if image.preprocess != preprocess:
            raise ReleaseError("the image was prepared for a release with another preprocessing; prepare it again")
        return image.pixels

    def _load(self, release: Release) -> _OpenRelease:
        # The text part may be as large as the model, and most who serve never open it; it is verified when they do.
        release.verify(set(release.files).difference(release.text_files))
        try:
            if self._precision == AUTO:
                precision, session = self._chooser.open(release, partial(self._tested, release))
            else:
                precision = self._precision if release.offers(self._precision) else release.precision
                if precision != self._precision:
                    log.warning("release %s has no %s form, it is served in %s", release.id, self._precision, precision)
                session = self._tested(release, precision)
        except ReleaseError:
            raise
        except Exception as error:  # onnxruntime's errors share no public base class
            raise ReleaseError(f"release {release.path} cannot be run: {type(error).__name__}: {error}") from error
        names = None
        if release.text is not None and release.text_files:
            names = NameEmbeddings(release, release.text, self._device, self._threads)
        if not release.hashed:
            log.warning(
                "release %s is of an older version: its class names and preprocessing are neither hashed nor tested",
                release.id,
            )
        return _OpenRelease(release, precision, session, names)

    def _tested(self, release: Release, precision: str) -> Session:
        """Open a form of the release on the first provider that can be used and answers right, else on the device.
        Raises ReleaseError, and what onnxruntime raises."""

        def tested(opened: onnxruntime.InferenceSession | None = None) -> Session:
            session = Session(release.model_in(precision), device=self._device, threads=self._threads, opened=opened)
            _self_test(release, precision, session)
            return session

        first, passed_over = self._providers.first(release, precision, tested)
        session = first or tested()
        session.passed_over = passed_over
        return session


def _rows(served: _OpenRelease, names: Sequence[str]) -> tuple[list[str], NDArray[np.float32]]:
    """Give what NameEmbeddings.rows gives for `names`. Raises ReleaseError."""
    if served.names is None:
        raise ReleaseError(f"release {served.release.id}, which answers now, has no text part to score names with")
    return served.names.rows(names)


def _scores(
    release: Release,
    embedding: NDArray[np.float32],
    probabilities: NDArray[np.float32],
    extra: tuple[list[str], NDArray[np.float32]] | None,
) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Give the labels and scores of one image: the learned classes, then the `extra` names (what NameEmbeddings.rows
    gives).
    """
    if extra is None or not extra[0] or release.text is None:
        return release.classes, probabilities
    names, rows = extra
    similarity = release.text.scale * rows @ embedding
    # The largest is taken off first: exp() of a similarity of a hundred is more than float32 holds.
    shares = np.exp(similarity - similarity.max())
    shares = shares[len(probabilities) :] / shares.sum()
    return (*release.classes, *names), np.concatenate([probabilities * (1 - shares.sum()), shares])


def _trim_memory() -> None:
    """Give the memory of the release before back to the system.

    By itself glibc keeps about as much as a session takes, in the arena of every thread that ever held some of it
    (measured over 50 swaps: 107 MB with this, 213 MB without).
    """
    with contextlib.suppress(AttributeError, OSError):  # a C library without malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def _check_described(release: Release, session: Session) -> None:
    """Compare release.json with what the model file says of the same: who edits one leaves the other. Raises
    ReleaseError."""
    said = session.metadata
    for name, ours in (("classes", list(release.classes)), ("preprocess", release.preprocess.to_dict())):
        if name in said and json.loads(said[name]) != json.loads(json.dumps(ours)):
            raise ReleaseError(
                f"release {release.path}: {name} in {releases.MANIFEST} are not those that the model was made with; "
                "it is not used"
            )


def _self_test(release: Release, precision: str, session: Session) -> None:
    """Compare with the trained model's answers that the release has, one image alone and all at once.

    That finds what parity on the machine that learned cannot: another onnxruntime, another device. It also warms the
    session up, so that no request waits for it. Raises ReleaseError with the numbers.
    """
    atol = release.atol if precision == release.precision else release.variants[precision].atol
    with np.load(release.golden, allow_pickle=False) as golden:
        images, want = golden["images"], Answers(*(golden[name] for name in OUTPUTS))
        strayed = golden_set.difference(golden, release.preprocess)
    if strayed is not None and not strayed <= golden_set.PIXEL_ATOL:
        raise ReleaseError(
            f"release {release.path} fails its own test: encoded images are preprocessed otherwise than where it was "
            f"made, by {strayed:.3g} in the mean, at most {golden_set.PIXEL_ATOL:.3g} is allowed; it is not used"
        )
    _check_described(release, session)
    for size in {1, len(images)}:
        got = session.run(images[:size])
        if got.probabilities.shape[1] != len(release.classes):
            raise ReleaseError(
                f"release {release.path} names {len(release.classes)} classes, and its model answers for "
                f"{got.probabilities.shape[1]}; it is not used"
            )
        difference = max(
            float(np.abs(got.embedding - want.embedding[:size]).max()),
            float(np.abs(got.probabilities - want.probabilities[:size]).max()),
        )
        if not difference <= atol:
            raise ReleaseError(
                f"release {release.path} fails its own test on {session.provider}: golden answers differ by "
                f"{difference:.3g} at batch {size}, at most {atol:g} is allowed; it is not used"
            )
