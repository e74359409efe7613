"""Modality-gap statistics and the drift rule: pure functions of features.

Similarities are raw cosines. The published code uses logits scaled by exp(logit_scale); every ratio below is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agent.values import GapStatistics


def statistics(images: Tensor, names: Tensor, labels: Tensor) -> GapStatistics:
    """Measure the gap: MG-CLIP equations 1-2 and the centroid gap of Liang et al. 2022, exact and sample-weighted.

    images: float [N, D], names: float [C, D], both L2-normalised; labels: int64 [N] in 0..C-1. The negative mean is
    over all other names of each image (None when C is 1). The centroid of the names is weighted by class frequency.
    """
    cosines = images @ names.T
    positive = cosines.gather(1, labels[:, None]).squeeze(1)
    others = names.shape[0] - 1
    negative = ((cosines.sum(1) - positive) / others).mean().item() if others else None
    frequency = torch.bincount(labels, minlength=len(names)).to(names.dtype) / len(labels)
    centroid = torch.linalg.vector_norm(images.mean(0) - frequency @ names).item()
    return GapStatistics(positive=positive.mean().item(), negative=negative, centroid=centroid)


def drift(now: GapStatistics, untouched: GapStatistics, relative_to: str) -> float | None:
    """Compute the drift: the change of the negative mean from the untouched model to now, as a share (>= 0).

    It is |negative now - negative untouched| over |negative untouched| (`negative`, the paper) or over the untouched
    model's positive minus negative mean (`separation`), which stays well-conditioned where the negative mean is near 0.

    None when there is no other name.
    """
    if now.negative is None or untouched.negative is None:
        return None
    change = abs(now.negative - untouched.negative)
    scale = abs(untouched.negative) if relative_to == "negative" else abs(untouched.positive - untouched.negative)
    return change / max(scale, 1e-12)


def within_budget(now: float | None, before: float | None, budget: float) -> bool:
    """Apply the run-time rule: tell whether the drift after an epoch is inside the budget, so that the epoch may be
    kept.

    now, before: drift after the epoch and before the update (see `drift`). Where the budget was used up before the
    update, an update that drifts no further is inside it, or the agent would never learn again. None, where there is no
    other name to drift from, is inside.
    """
    return now is None or now <= max(budget, before or 0)


def paper_epochs(drifts: Sequence[float | None], threshold: float) -> int | None:
    """Apply the published rule on the first task: give the number of epochs to use from now on, or None while
    undecided.

    `drifts[i]` was measured after epoch i (0-based). The first violation at i fixes max(1, i): the epochs before it.
    """
    for i, value in enumerate(drifts):
        if value is not None and value > threshold:
            return max(1, i)
    return None
