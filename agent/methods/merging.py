"""Learners become the one that saw all their streams, for methods whose statistics add up.

Learner k counted n_kc images of class c, with mean m_kc and scatter S_k around the class means. Then n_c = sum_k n_kc,
m_c = sum_k n_kc m_kc / n_c and S = sum_k S_k + sum_kc n_kc (m_kc - m_c)(m_kc - m_c)^T are those of all images at once
(Chan, Golub and LeVeque 1979; for learners apart, AFL, arXiv 2405.16240). It is exact, and neither order nor grouping
of the learners changes it, but for the rounding.

What does not add up has a rule that neither order nor grouping changes: the fusion's two numbers are geometric means
weighted by images, RanPAC's ridge is the largest, and adapters stay where all learners have the same ones; else the
towers are the untouched ones, which the statistics are of in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from agent.methods.base import LearnerState
from agent.methods.training import packed

ALIKE = 1e-4
"""Random projections that differ by no more are the same. Their entries are of size 1: another seed's differ by that,
and those that another kind of processor drew from the same seed by the last digits."""

Learners = Mapping[str, LearnerState]
"""What messages call a learner -> its state."""


class MergeError(Exception):
    """Learners whose statistics cannot be added exactly; the message says why."""


def merge(method: str, learners: Learners) -> LearnerState:
    """Give the state of the learner of this method that saw what all of `learners` saw, for `Method.load_state`.

    Its classes are sorted by name. Names that differ only in case are one class, as they are in a stream; it has the
    spelling that sorts first. Raises MergeError where it would not be exact.
    """
    if method not in _MERGED:
        raise MergeError(
            f"learners of {method} cannot be merged, since what they keep does not add up; those of "
            f"{', '.join(_MERGED)} can"
        )
    return _MERGED[method](learners)


def spellings(learners: Learners) -> dict[str, str]:
    """Give the classes of all learners together, sorted by name: name without case -> its spelling."""
    found: dict[str, str] = {}
    for name in sorted(name for learner in learners.values() for name in learner.values["classes"]):
        found.setdefault(name.casefold(), name)
    return found


def images(learner: LearnerState) -> dict[str, int | None]:
    """Give the images that a learner has learned by class name; None for each where its method does not count them."""
    classes = learner.values["classes"]
    counts = learner.values.get("counts", learner.tensors.get("counts"))
    return dict.fromkeys(classes) if counts is None else dict(zip(classes, map(int, counts), strict=True))


def adapted(learner: LearnerState) -> bool:
    """Tell whether a learner's towers differ from the untouched ones: adapters whose second factor is 0 add nothing."""
    return any(bool(tensor.any()) for name, tensor in learner.tensors.items() if ".up." in name)


def _gapstream(learners: Learners) -> LearnerState:
    _check_projections(learners, "random.tokens", "random.embedding")
    _check_depth(learners)
    states = list(learners.values())
    first = states[0]
    counts, means, shifts = _joined(learners, [state.tensors["counts"] for state in states])
    embeddings = _joined(learners, [state.tensors["counts"] for state in states], "embeddings")[1]
    scatter = _sum(state.tensors["scatter"] for state in states) + packed(shifts.T @ shifts)
    # Weighted by what adds up itself, or a merge of merged learners would weigh anew.
    shares = torch.stack([state.tensors["counts"].double().sum() for state in states]) / counts.sum()
    fusions = torch.stack([state.tensors["fusion"] for state in states])
    tensors = {
        **{name: first.tensors[name].clone() for name in ("random.tokens", "random.embedding")},
        "counts": counts.float(),
        "means": means.float(),
        "embeddings": embeddings.float(),
        "scatter": scatter.float(),
        # None of them: the method encodes the names it lacks, by the towers as they are now.
        "names": first.tensors["names"][:0].clone(),
        "fusion": (shares @ fusions.log()).exp(),
    }
    depth = {"depth": first.values["depth"]} if "depth" in first.values else {}
    return LearnerState(tensors | _common_adapters(states), {"classes": list(spellings(learners).values()), **depth})


def _ncm(learners: Learners) -> LearnerState:
    counts, means, _ = _joined(learners, [torch.tensor(state.values["counts"]) for state in learners.values()])
    values = {"classes": list(spellings(learners).values()), "counts": [int(count) for count in counts]}
    return LearnerState({"means": means.float()}, values)


def _ranpac(learners: Learners) -> LearnerState:
    _check_projections(learners, "projection")
    states, classes = list(learners.values()), spellings(learners)
    sums = torch.zeros(len(classes), states[0].tensors["sums"].shape[1], dtype=torch.float64)
    sums.index_add_(0, _rows(learners), torch.cat([state.tensors["sums"] for state in states]).double())
    tensors = {
        "projection": states[0].tensors["projection"].clone(),
        "gram": _sum(state.tensors["gram"] for state in states).float(),
        "sums": sums.float(),
        "ridge": torch.stack([state.tensors["ridge"] for state in states]).max(),
    }
    return LearnerState(tensors, {"classes": list(classes.values())})


_MERGED: Mapping[str, Callable[[Learners], LearnerState]] = {"gapstream": _gapstream, "ncm": _ncm, "ranpac": _ranpac}
"""The value of method.name -> what merges its learners."""


def _rows(learners: Learners) -> Tensor:
    """Give the merged learner's row for each class of each learner in turn, int64 [sum of C_k]."""
    place = {name: row for row, name in enumerate(spellings(learners))}
    return torch.tensor([place[name.casefold()] for one in learners.values() for name in one.values["classes"]])


def _joined(learners: Learners, counts: Sequence[Tensor], which: str = "means") -> tuple[Tensor, Tensor, Tensor]:
    """Join class means (the tensor `which`) with the counts [C_k] of each learner.

    Gives counts [C] and means [C, M], and for every mean that moved by it sqrt(n_kc) (m_kc - m_c), [n, M]; float64, in
    which counts, and the mean of a class that only one has, are exact.
    """
    rows, weights = _rows(learners), torch.cat(list(counts)).double()
    means = torch.cat([state.tensors[which] for state in learners.values()]).double()
    total = torch.zeros(len(spellings(learners)), dtype=torch.float64).index_add_(0, rows, weights)
    joined = means.new_zeros(len(total), means.shape[1]).index_add_(0, rows, weights[:, None] * means)
    joined /= total[:, None]
    shared = rows.bincount()[rows] > 1
    return total, joined, weights[shared].sqrt()[:, None] * (means[shared] - joined[rows[shared]])


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    """Add tensors of one shape in float64."""
    first, *others = tensors
    total = first.to(torch.float64, copy=True)
    for tensor in others:
        total += tensor
    return total


def _common_adapters(states: Sequence[LearnerState]) -> dict[str, Tensor]:
    """Give the adapters that all learners have; none where they differ, or change nothing."""
    first, *others = [
        {name: tensor for name, tensor in state.tensors.items() if name.startswith(("image.", "text."))}
        for state in states
    ]
    same = all(
        other.keys() == first.keys() and all(torch.equal(other[name], tensor) for name, tensor in first.items())
        for other in others
    )
    return {name: tensor.clone() for name, tensor in first.items()} if same and adapted(states[0]) else {}


def _check_projections(learners: Learners, *names: str) -> None:
    """Raise MergeError unless all learners have the same random features."""
    (whose, first), *others = learners.items()
    for other, state in others:
        for name in names:
            mine, theirs = first.tensors[name], state.tensors[name]
            if mine.shape != theirs.shape:
                raise MergeError(
                    f"{whose} and {other} cannot be merged: {_sizes(first, names)} random features and "
                    f"{_sizes(state, names)} cannot be added. Only learners that began with the same numbers of "
                    "features can"
                )
            if not torch.allclose(mine, theirs, rtol=0, atol=ALIKE):
                raise MergeError(
                    f"{whose} and {other} cannot be merged: their random features are not the same, since they began "
                    "with another method.seed (or another version of torch). Only learners that began with the same "
                    "seed can"
                )


def _check_depth(learners: Learners) -> None:
    (whose, first), *others = learners.items()
    depth = first.values.get("depth", 0)
    for other, state in others:
        if state.values.get("depth", 0) != depth:
            raise MergeError(
                f"{whose} and {other} cannot be merged: their random features are of the tokens before block {depth} "
                f"and before block {state.values.get('depth', 0)}. The later version of gapstream that began one of "
                "them takes other features"
            )


def _sizes(learner: LearnerState, names: Sequence[str]) -> str:
    """Say how wide a learner's features are, of each depth: learners may share their sum and not the parts."""
    return " + ".join(str(learner.tensors[name].shape[1]) for name in names)
