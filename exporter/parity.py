"""How far onnxruntime's answers are from torch's, and whether that is near enough to release."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.release import (
    Parity,
    ReleaseError,
)
from exporter.runtime import Answers, Session

TIE = 1e-3
"""Two classes whose probabilities differ by less than this share are equally first."""

_REFERENCE_BATCH = 16


@dataclass(frozen=True)
class Tolerance:
    """What parity is held to."""

    atol: float
    """Largest difference in embeddings and probabilities."""
    logits: float
    """Largest difference in logits, relative to the largest."""
    cosine: float
    """Smallest cosine between embeddings."""
    top1: float
    """Smallest share of images with the same first class."""


class ParityError(ReleaseError):
    """onnxruntime's answers are not the trained model's; the message has the numbers. Nothing was released."""


def reference_answers(module: Any, images: NDArray[np.float32]) -> list[Answers]:
    """The module's own answers: to all images with the fused attention kernel that evaluation uses, to the first few
    without it."""
    device = next(chain(module.parameters(), module.buffers())).device
    fused = torch.backends.mha.get_fastpath_enabled()
    answers = []
    try:
        for fast, whole in ((True, images), (False, images[:3])):
            torch.backends.mha.set_fastpath_enabled(fast)
            with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
                # In parts: as a whole, activations would be the largest piece of memory of an update.
                parts = [module(part.to(device)) for part in torch.from_numpy(whole).split(_REFERENCE_BATCH)]
            answers.append(Answers(*(torch.cat(outputs).float().cpu().numpy() for outputs in zip(*parts, strict=True))))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return answers


def compare(
    session: Session, images: NDArray[np.float32], expected: Sequence[Answers], batches: Sequence[int]
) -> Parity:
    """How far the session's answers to the first images, in batches of these sizes, are from each of `expected`
    (answers to the first images, all or some)."""
    embedding = logits = probabilities = 0.0
    cosine = top1 = 1.0
    for size in batches:
        answers = session.run(images[:size])
        for whole in expected:
            want = Answers(*(values[:size] for values in whole))
            got = Answers(*(values[: len(want.embedding)] for values in answers))
            # np.maximum and np.minimum, unlike max and min, let a NaN through.
            embedding = np.maximum(embedding, np.abs(got.embedding - want.embedding).max())
            scale = max(1.0, float(np.abs(want.logits).max()))
            logits = np.maximum(logits, np.abs(got.logits - want.logits).max() / scale)
            probabilities = np.maximum(probabilities, np.abs(got.probabilities - want.probabilities).max())
            cosine = np.minimum(cosine, (got.embedding * want.embedding).sum(axis=1).min())
            chosen = np.take_along_axis(want.probabilities, got.probabilities.argmax(axis=1)[:, None], axis=1)[:, 0]
            top1 = np.minimum(top1, (chosen >= want.probabilities.max(axis=1) * (1 - TIE)).mean())
    return Parity(
        embedding=float(embedding),
        logits=float(logits),
        probabilities=float(probabilities),
        cosine=float(cosine),
        top1=float(top1),
        images=len(images),
        batches=tuple(batches),
        provider=session.provider,
    )


def judge(parity: Parity, tolerance: Tolerance) -> None:
    """Raises ParityError with every number that is out of bounds (NaN always is)."""
    found = [
        f"{name} differ by {difference:.3g}, at most {allowed:g} is allowed"
        for name, difference, allowed in (
            ("embeddings", parity.embedding, tolerance.atol),
            ("logits (relative to the largest)", parity.logits, tolerance.logits),
            ("probabilities", parity.probabilities, tolerance.atol),
        )
        if not difference <= allowed
    ]
    if not parity.cosine >= tolerance.cosine:
        found.append(f"the smallest cosine of embeddings is {parity.cosine:.6g}, expected at least {tolerance.cosine}")
    if not parity.top1 >= tolerance.top1:
        found.append(f"the first class agrees for {parity.top1:.1%} of the images, expected {tolerance.top1:.0%}")
    if found:
        checked = f"on {parity.images} images in batches of {', '.join(map(str, parity.batches))} ({parity.provider})"
        raise ParityError(f"onnxruntime does not answer as the model does {checked}: {'; '.join(found)}; not released")
