"""Opens the form of a release that is fastest on this machine, found out by timing batches of all of them in turns."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from exporter.precision import MIN_GAIN, PRECISIONS
from exporter.release import Release

log = logging.getLogger(__name__)

FORM_S = 2.0
"""Seconds of timing for each form, all batch sizes together. A round that would take longer, judged by the one before,
is not begun; only the first, of one image through each form, always is. Chosen by hand: opening a release takes about
as long anyway. On two busy cores ViT-B/32 has time for a few rounds of one image, which differ by 30 %, and for none of
the larger batch."""

LARGER_BATCH = 16
"""Images of the larger batch that is timed beside a lone one, for servers that many ask at once. Beyond it an image
takes hardly less time (bundled model: as many images a second with 64)."""

ROUNDS = 20
"""Rounds that count at one batch size, at most. Chosen by hand: a small model's ratio then moves by a few percent on
one core that others use too, and by ten on two of them."""


class Runs(Protocol):
    """This is an opened model, see exporter.runtime.Session."""

    provider: str
    """The onnxruntime execution provider that answers."""

    def run(self, images: NDArray[np.float32]) -> object:
        """Answer `images`, float32 [B, 3, H, W]."""


@dataclass(frozen=True)
class Timing:
    """This is what was measured of the forms of a release, and which of them is to answer."""

    chosen: str
    """Name of the form that is fastest, or of fp32 where none is by MIN_GAIN."""
    rates: Mapping[int, Mapping[str, float]]
    """Batch size -> form -> images a second, the median."""
    gains: Mapping[int, Mapping[str, float]]
    """Batch size -> form -> how many times as fast as fp32 it is: the median of what the rounds say, so that it may
    differ from the quotient of two rates."""

    def __str__(self) -> str:
        sizes = []
        for size, rates in self.rates.items():
            forms = (f"{form} {rate:.1f} ({self.gains[size][form]:.2f}x)" for form, rate in rates.items())
            sizes.append(f"batch {size}: " + ", ".join(forms))
        return "; ".join(sizes)


def fastest(forms: Mapping[str, Runs], full: str, images: NDArray[np.float32], max_batch: int) -> Timing:
    """Time the `forms` (by name, `full` is the one in fp32) with one image and with a batch of at most `max_batch`.

    `images`, float32 [n >= 1, 3, H, W], are repeated. It takes about FORM_S a form at most, or as long as one image
    takes in each. The forms take turns, so that a machine that is busy for a while is so for all of them.
    """
    lone, share_s = images[:1], FORM_S * len(forms)
    ends = time.monotonic() + share_s
    rounds = {1: _rounds(forms, lone, time.monotonic() + share_s / 2, 0.0)}
    size = min(LARGER_BATCH, max_batch)
    if size > 1:
        batch = np.resize(images, (size, *images.shape[1:]))
        found = _rounds(forms, batch, ends, size * sum(rounds[1][-1].values()))
        rounds |= {size: found} if found else {}
    gains = {
        size: {name: statistics.median(one[full] / one[name] for one in times) for name in forms}
        for size, times in rounds.items()
    }
    rates = {
        size: {name: size / statistics.median(one[name] for one in times) for name in forms}
        for size, times in rounds.items()
    }
    worst = {name: min(found[name] for found in gains.values()) for name in forms}
    best = max(forms, key=lambda name: worst[name])
    return Timing(best if worst[best] >= MIN_GAIN else full, rates, gains)


def _rounds(
    forms: Mapping[str, Runs], images: NDArray[np.float32], ends: float, expected_s: float
) -> list[dict[str, float]]:
    """Give the seconds of every form in each round that `ends`, a time of time.monotonic(), allows: none where even the
    first, which is expected to take `expected_s`, would end later."""
    rounds: list[dict[str, float]] = []
    while len(rounds) <= ROUNDS and time.monotonic() + expected_s <= ends:
        seconds = {}
        for name, form in forms.items():
            began = time.monotonic()
            form.run(images)
            seconds[name] = time.monotonic() - began
        rounds.append(seconds)
        expected_s = sum(seconds.values())
    # The first of a size has memory allocated; it counts only where there is no other.
    return rounds[1:] or rounds


Opened = TypeVar("Opened", bound=Runs)
"""What opens a form gives back as it is."""


class Chooser:
    """Opens the fastest form of each release, and keeps what it found for later releases of the same structure. Not
    thread-safe."""

    def __init__(self, max_batch: int) -> None:
        """`max_batch`: largest number of images that will go through a model at once."""
        self._max_batch = max_batch
        self._chosen: dict[str, str] = {}
        """Structure of a release's graphs -> the form that was the fastest of them."""

    def open(self, release: Release, opened: Callable[[str], Opened]) -> tuple[str, Opened]:
        """Give the form that is to answer, and what it was opened as. Nothing is timed where there is only fp32.

        `opened` opens and tests a form by its name. What it raises for fp32 is raised; a smaller form for which it
        raises is not taken.
        """
        full = release.precision
        offered = [name for name in PRECISIONS if release.offers(name)]
        alike = structure(release, offered)
        known = self._chosen.get(alike)
        if known is not None and known != full and (form := _usable(release, known, opened)) is not None:
            return known, form
        forms = {full: opened(full)}
        if known is not None:
            return full, forms[full]
        for name in offered:
            runs_here = forms[full].provider == "CPUExecutionProvider" or not PRECISIONS[name].cpu_only
            if runs_here and (form := _usable(release, name, opened)) is not None:
                forms[name] = form
        if len(forms) == 1:
            return full, forms[full]
        with np.load(release.golden, allow_pickle=False) as golden:
            timing = fastest(forms, full, golden["images"], self._max_batch)
        log.info(
            "release %s and later ones of its structure are served in %s; images a second with %s; fp32 answers unless "
            "another form is %g times as fast",
            release.id,
            timing.chosen,
            timing,
            MIN_GAIN,
        )
        self._chosen[alike] = timing.chosen
        return timing.chosen, forms[timing.chosen]


def _usable(release: Release, name: str, opened: Callable[[str], Opened]) -> Opened | None:
    """Open a smaller form; None, and a warning, where it cannot be used on this machine."""
    try:
        return opened(name)
    except Exception as error:  # onnxruntime's share no base class; whatever it is, fp32 is there
        log.warning("the %s form of release %s is not used: %s", name, release.id, error)
        return None


def structure(release: Release, forms: Iterable[str]) -> str:
    """Name what decides how fast the forms of a release are, as far as release.json tells: releases of which this is
    equal have graphs of the same structure, whatever they have learned since."""
    facts: dict[str, Any] = {name: release.facts.get(name) for name in ("model", "method", "fusion")}
    return json.dumps([facts, release.preprocess.size, release.opset, dict(release.versions), *forms], sort_keys=True)
