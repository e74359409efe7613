"""Learners that learned apart become one: exactly where what they keep adds up, else by averages of what they trained.

*Adding up* (gapstream, ncm, ranpac). Learner k counted n_kc images of class c, with mean m_kc and scatter S_k around
the class means. Then n_c = sum_k n_kc, m_c = sum_k n_kc m_kc / n_c and S = sum_k S_k + sum_kc n_kc (m_kc - m_c)(m_kc -
m_c)^T are those of all images at once (Chan, Golub and LeVeque 1979; for learners apart, AFL, arXiv 2405.16240). It is
exact, and neither order nor grouping of the learners changes it, but for the rounding.

What does not add up has a rule that neither order nor grouping changes: the fusion's two numbers are geometric means
weighted by images, RanPAC's ridge is the largest, and adapters stay where all learners have the same ones; else the
towers are the untouched ones, which the statistics are of in any case.

*Averages* (mgclip, finetune, vrlwf; FedAvg, arXiv 1602.05629, in a single round). A trained tensor becomes the mean of
the learners', weighted by the images that each has learned; a class's visual row that of the learners that have the
class, weighted by their images of it. Weights add up, so neither order nor grouping matters here either. But it is an
average, not what one learner of both streams would be. Adapters are averaged factor by factor: B A of the means is the
mean of the B A where the factors A are the same, as they are when learners begin with one seed. Trained, they differ by
little: on four sites dealt by class the towers' change was off by 5 % with mgclip, by 26 % with finetune. The mean of
the products itself has a higher rank; its best approximation of the same rank had up to 0.8 points more, but hangs on
the grouping.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from agent.methods.base import LearnerState
from agent.methods.training import packed

ALIKE = 1e-4
"""Random projections that differ by no more are the same. Their entries are of size 1: another seed's differ by that,
and those that another kind of processor drew from the same seed by the last digits."""

LEAST_COSINE = 0.25
"""First factors of adapters are averaged where the cosine between two learners' is at least this. Those of one seed had
0.96 or more after a task of ten classes dealt over four sites (0.999 with mgclip, 0.96 with finetune), those of six
seeds before any training at most 0.011: chosen by hand far from both."""

Learners = Mapping[str, LearnerState]
"""What messages call a learner -> its state."""


class MergeError(Exception):
    """Learners that cannot become one; the message says why."""


def merge(method: str, learners: Learners) -> LearnerState:
    """Give the state of the learner of this method that saw what all of `learners` saw, for `Method.load_state`; for
    the methods of AVERAGED, an average of them.

    Its classes are sorted by name. Names that differ only in case are one class, as they are in a stream; it has the
    spelling that sorts first. Raises MergeError where learners do not add up exactly, or have nothing to average.
    """
    if method not in _MERGED:
        raise MergeError(
            f"learners of {method} cannot be merged, since {_REFUSED[method]}; those of {', '.join(_MERGED)} can"
        )
    return _MERGED[method](learners)


def spellings(learners: Learners) -> dict[str, str]:
    """Give the classes of all learners together, sorted by name: name without case -> its spelling."""
    found: dict[str, str] = {}
    for name in sorted(name for learner in learners.values() for name in learner.values["classes"]):
        found.setdefault(name.casefold(), name)
    return found


def images(learner: LearnerState) -> dict[str, int | None]:
    """Give the images that a learner has learned by class name; None where its method does not count them, or did not
    in an earlier version."""
    classes = learner.values["classes"]
    counts = learner.values.get("counts", learner.tensors.get("counts"))
    if counts is None:
        return dict.fromkeys(classes)
    return {name: None if count is None else int(count) for name, count in zip(classes, counts, strict=True)}


def adapted(learner: LearnerState) -> bool:
    """Tell whether a learner's towers differ from the untouched ones: adapters whose second factor is 0 add nothing.
    Towers that are trained whole are taken to differ."""
    return any(
        ".values." in name or (".up." in name and bool(tensor.any())) for name, tensor in learner.tensors.items()
    )


def _gapstream(learners: Learners) -> LearnerState:
    _check_projections(learners, "random.tokens", "random.embedding")
    _check_depth(learners)
    learners = {name: _with_embeddings(state) for name, state in learners.items()}
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


def _with_embeddings(state: LearnerState) -> LearnerState:
    """Give a state with class means of embeddings: NaN, as not known, where an earlier version made it."""
    unknown = torch.full((len(state.values["classes"]), len(state.tensors["random.embedding"])), torch.nan)
    return LearnerState({"embeddings": unknown, **state.tensors}, state.values)


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


def _average(learners: Learners) -> LearnerState:
    """Average what is trained of the towers, weighted by all images of each learner."""
    _check_said(learners, "fusion", "preset")
    counts = _known_counts(learners)
    _check_trained(learners)
    states = list(learners.values())
    images = torch.stack([count.sum() for count in counts])
    tensors = {
        name: _sum(share * state.tensors[name] for share, state in zip(images / images.sum(), states, strict=True))
        for name in states[0].tensors
        if name != "rows"
    }
    totals = torch.zeros(len(spellings(learners)), dtype=torch.float64).index_add_(
        0, _rows(learners), torch.cat(counts)
    )
    said = {key: value for state in states for key, value in state.values.items() if key in ("fusion", "preset")}
    values = {"classes": list(spellings(learners).values()), "counts": [int(count) for count in totals], **said}
    return LearnerState({name: tensor.to(states[0].tensors[name].dtype) for name, tensor in tensors.items()}, values)


def _mgclip(learners: Learners) -> LearnerState:
    state = _average(learners)
    _, rows, _ = _joined(learners, _known_counts(learners), "rows")
    # What a dry run allowed on the stream whose gap drifts the fastest.
    epochs = [one.values["epochs_fixed"] for one in learners.values() if one.values["epochs_fixed"] is not None]
    return LearnerState(
        {**state.tensors, "rows": rows.float()}, {**state.values, "epochs_fixed": min(epochs, default=None)}
    )


_MERGED: Mapping[str, Callable[[Learners], LearnerState]] = {
    "gapstream": _gapstream,
    "ncm": _ncm,
    "ranpac": _ranpac,
    "mgclip": _mgclip,
    "finetune": _average,
    "vrlwf": _average,
}
"""The value of method.name -> what merges its learners."""

MERGED = tuple(_MERGED)
"""The methods whose learners can be merged."""

AVERAGED = ("mgclip", "finetune", "vrlwf")
"""Those of them that train: their merge is an average, not what one learner of all streams would be."""

_REFUSED: Mapping[str, str] = {
    "seca": "each has a pool of the adapters of its own tasks, which a net trained on that very pool weighs",
    "bofa": "each moved its projection where its own earlier tasks allowed it, which those of the others do not",
    "zeroshot": "they keep nothing but names of classes",
}
"""The value of method.name -> why its learners cannot be merged."""


def _rows(learners: Learners) -> Tensor:
    """Give the merged learner's row for each class of each learner in turn, int64 [sum of C_k]."""
    place = {name: row for row, name in enumerate(spellings(learners))}
    return torch.tensor([place[name.casefold()] for one in learners.values() for name in one.values["classes"]])


def _joined(learners: Learners, counts: Sequence[Tensor], name: str = "means") -> tuple[Tensor, Tensor, Tensor]:
    """Join class means, the tensors `name`, with the counts [C_k] of each learner.

    Gives counts [C] and means [C, M], and for every mean that moved by it sqrt(n_kc) (m_kc - m_c), [n, M]; float64, in
    which counts, and the mean of a class that only one has, are exact.
    """
    rows, weights = _rows(learners), torch.cat(list(counts)).double()
    means = torch.cat([state.tensors[name] for state in learners.values()]).double()
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


def _known_counts(learners: Learners) -> list[Tensor]:
    """Give how many images of each of its classes each learner has learned, float64 [C_k]. Raises MergeError."""
    found = []
    for whose, state in learners.items():
        counts = images(state)
        unknown = [name for name, count in counts.items() if count is None]
        if unknown:
            raise MergeError(
                f"{whose} cannot be merged: it does not know how many images of {unknown[0]} it has learned, as it "
                "began in an earlier version, so nothing says how much it weighs. Only learners that began in this "
                "version, or a later one, can be averaged"
            )
        found.append(torch.tensor(list(counts.values()), dtype=torch.float64))
    return found


def _check_said(learners: Learners, *keys: str) -> None:
    """Raise MergeError where two learners say otherwise; what an earlier version did not say is not compared."""
    for key in keys:
        said = [(whose, state.values[key]) for whose, state in learners.items() if key in state.values]
        for other, value in said[1:]:
            whose, first = said[0]
            if value != first:
                raise MergeError(
                    f"{whose} and {other} cannot be merged: the one was trained with {key} {first!r} below [method], "
                    f"the other with {value!r}. Only learners with the same can be averaged"
                )


def _check_trained(learners: Learners) -> None:
    """Raise MergeError unless all learners train tensors of the same names and shapes, from the same beginning."""
    trained = {
        whose: {name: tensor for name, tensor in state.tensors.items() if name != "rows"}
        for whose, state in learners.items()
    }
    for (whose, first), (other, second) in itertools.combinations(trained.items(), 2):
        shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (first, second)]
        if shapes[0] != shapes[1]:
            name = min(name for name in first | second if shapes[0].get(name) != shapes[1].get(name))
            sizes = [str(list(one[name])) if name in one else "missing" for one in shapes]
            raise MergeError(
                f"{whose} and {other} cannot be merged: they trained other tensors ({name} is {sizes[0]} in the one, "
                f"{sizes[1]} in the other). Only learners with the same keys below [method] can be averaged"
            )
        down = [name for name in first if ".down." in name]
        if not down:  # towers trained whole begin as the CLIP itself
            continue
        one, two = (torch.cat([tensors[name].flatten().double() for name in down]) for tensors in (first, second))
        if (cosine := float(F.cosine_similarity(one, two, dim=0))) < LEAST_COSINE:
            raise MergeError(
                f"{whose} and {other} cannot be merged: the first factors of their adapters have a cosine of "
                f"{cosine:.2f}, so they began with another method.seed, or have moved too far apart to be averaged "
                f"(from {LEAST_COSINE} on they are)"
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
