"""How far onnxruntime's answers are from torch's, and whether that is near enough to release."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.precision import Tolerance
from exporter.release import Parity, ParityError
from exporter.runtime import Answers, Session

TIE = 1e-3
"""Two classes whose probabilities differ by less than this share are equally first: rounding alone may swap them.
Chosen by hand, of the size of the differences that are allowed (release.parity_atol)."""

_UNFUSED_IMAGES = 3
"""Images whose reference answers are computed without the fused attention kernel too. Chosen by hand: a kernel that
differs does so for any image, and each image more is computed twice."""

_REFERENCE_BATCH = 16
"""Images that go through torch at once. Activations of a whole check batch (64) would be the largest piece of memory of
an update; smaller parts would only take longer."""


def reference_answers(module: Any, images: NDArray[np.float32]) -> list[Answers]:
    """Give the module's own answers: to all images with the fused attention kernel that evaluation uses, then to the
    first few without it. `images`: float32 [n, 3, H, W], preprocessed."""
    device = next(chain(module.parameters(), module.buffers())).device
    fused = torch.backends.mha.get_fastpath_enabled()
    answers = []
    try:
        # The tracer takes the slow path through nn.MultiheadAttention whatever is set here; the graph is held to both.
        for fast, whole in ((True, images), (False, images[:_UNFUSED_IMAGES])):
            torch.backends.mha.set_fastpath_enabled(fast)
            # cuDNN's TF32 would cost three digits, and onnxruntime is told not to use it either (exporter.session).
            with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
                parts = [module(part.to(device)) for part in torch.from_numpy(whole).split(_REFERENCE_BATCH)]
            answers.append(Answers(*(torch.cat(outputs).float().cpu().numpy() for outputs in zip(*parts, strict=True))))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return answers


def compare(
    session: Session, images: NDArray[np.float32], expected: Sequence[Answers], batches: Sequence[int]
) -> Parity:
    """Measure how far the session's answers to the first images are from each of `expected`: the worst over all
    `batches`.

    `batches`: numbers of images given at once, each at most len(images). Several are needed: a graph that was traced
    with a fixed batch answers right for that one alone. `expected`: answers to the first images, all or some of them.
    """
    embedding = logits = probabilities = 0.0
    cosine = top1 = 1.0
    for size in batches:
        answers = session.run(images[:size])
        for whole in expected:
            want = Answers(*(values[:size] for values in whole))
            got = Answers(*(values[: len(want.embedding)] for values in answers))
            # np.maximum and np.minimum, unlike max and min, let a NaN through, which `judge` then refuses.
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
    """Compare what was measured with what is allowed.

    Raises ParityError that lists every number out of bounds; NaN always is.
    """
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
