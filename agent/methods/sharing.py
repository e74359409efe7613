"""What a learner gives to other sites, and what it answers with together with theirs.

*Out.* Counts, class means and scatter leave, never an image. One image of a class would give its feature away (the mean
is the feature), and so would one image more in a later state (n' m' - n m). So what leaves grows by at least `least`
images of a class or by none of it: images of a class that are fewer wait until there are enough. Their features, at
most least - 1 of a class, stay at the site; with them all that these images added is taken out again exactly, their
share of the one scatter too:

    n = n_o + p,  m_o = (n m - p f) / n_o,  S_o = S - sum (x - f)(x - f)^T - (n_o p / n) (f - m_o)(f - m_o)^T

for the p features x of mean f that wait. A class of which fewer than `least` images were counted in all stays behind.

*Together.* A site's own learner is added to those of the others by agent/methods/merging.py. The statistics are of the
untouched towers, so learners add up exactly whatever their adapters are: each keeps its own, and none are sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from agent.methods.base import LearnerState, TaskData
from agent.methods.merging import ALIKE, MergeError, merge
from agent.methods.training import packed, unpack

RANDOM = ("random.tokens", "random.embedding")
"""Tensors that are drawn from the seed, the same at every site."""

ROUNDING = 1e-4
"""Share of the mean variance that is added before a scatter is asked whether it is one: float32 sums of millions of
images are off by less, and what nobody could have counted is off by more."""


@dataclass(frozen=True)
class HeldBack:
    """It is what the learner has counted of images that do not leave yet."""

    features: Tensor
    """float32 [P, M] on the CPU."""
    classes: tuple[str, ...]
    """The class name of each."""

    def after(self, task: TaskData, least: int, features: Callable[[Tensor], Tensor]) -> HeldBack:
        """Give what waits after a task; `features` computes those that are counted of images of it, int64 [n] ->
        [n, M]."""
        names = [task.classes[label] for label in task.labels.tolist()]
        images = Counter(names) + Counter(self.classes)
        stay = [at for at, name in enumerate(self.classes) if images[name] < least]
        index = [at for at, name in enumerate(names) if images[name] < least]
        rows = [self.features[stay]] if stay else []
        rows += [features(torch.tensor(index)).cpu()] if index else []
        classes = (*(self.classes[at] for at in stay), *(names[at] for at in index))
        return HeldBack(torch.cat(rows), classes) if rows else NOTHING


NOTHING = HeldBack(torch.zeros(0, 0), ())
"""No image waits."""


def outgoing(method: str, state: LearnerState, held: HeldBack, least: int) -> tuple[dict[str, Tensor], list[str]]:
    """Give the tensors that leave, as agent.shared.SCHEMAS has them, and the names of their classes; none is left where
    every class stays behind. For the methods of that table."""
    names = list(state.values["classes"])
    counts = torch.as_tensor(state.values.get("counts", state.tensors.get("counts"))).double().cpu()
    means = state.tensors["means"].double().cpu()
    removed = []
    for name in dict.fromkeys(held.classes):
        row = names.index(name)
        waiting = held.features[[at for at, one in enumerate(held.classes) if one == name]].double()
        mean, total, left = waiting.mean(0), counts[row].item(), counts[row].item() - len(waiting)
        removed.append(waiting - mean)
        if left > 0:
            means[row] = (total * means[row] - len(waiting) * mean) / left
            removed.append((left * len(waiting) / total) ** 0.5 * (mean - means[row])[None])
        counts[row] = left
    kept = (counts >= least).nonzero().squeeze(1)
    tensors = {"counts": counts[kept].float(), "means": means[kept].float()}
    if method == "gapstream":
        scatter = state.tensors["scatter"].double().cpu()
        if removed:
            away = torch.cat(removed)
            scatter = scatter - packed(away.T @ away)
        tensors["scatter"] = scatter.float()
        tensors["fusion"] = state.tensors["fusion"].double().cpu()
        tensors |= {name: state.tensors[name][:1].cpu() for name in RANDOM}
    return tensors, [names[row] for row in kept.tolist()]


def incoming(own: LearnerState, tensors: Mapping[str, Tensor], classes: list[str], depth: int) -> LearnerState:
    """Give the state of another site's learner, with what it did not send because it is the same here.

    Raises MergeError, in words that go on after "NAME and NAME cannot be merged: ", where it is not the same, or where
    what it sent cannot have been counted.
    """
    widths = [state["means"].shape[1] for state in (own.tensors, tensors)]
    if widths[0] != widths[1]:
        raise MergeError(f"class means of {widths[0]} and {widths[1]} features cannot be added")
    counts = tensors["counts"].long().tolist()
    if "scatter" not in tensors:
        return LearnerState({"means": tensors["means"]}, {"classes": classes, "counts": counts})
    if depth != own.values.get("depth", 0):
        raise MergeError(f"random features of the blocks {own.values.get('depth', 0)} and {depth} cannot be added")
    for name in RANDOM:
        mine, theirs = own.tensors[name], tensors[name]
        if mine.shape[1] != theirs.shape[1] or not torch.allclose(mine[:1].cpu(), theirs, rtol=0, atol=ALIKE):
            raise MergeError("their random features are not the same; only sites with one method.seed can be added")
    _check_scatter(tensors["scatter"], widths[1])
    same = {name: own.tensors[name] for name in (*RANDOM, "names")}
    return LearnerState({**tensors, **same}, {"classes": classes, **({"depth": depth} if depth else {})})


def together(method: str, own: LearnerState, others: Mapping[str, LearnerState]) -> LearnerState:
    """Give the state of a learner that saw what this one and the others saw, with this one's adapters. Class names that
    differ only in case are spelled as here.

    Raises MergeError where they do not add up.
    """
    merged = merge(method, {"this site": own, **others})
    mine = {name.casefold(): name for name in own.values["classes"]}
    classes = [mine.get(name.casefold(), name) for name in merged.values["classes"]]
    adapters = {name: tensor for name, tensor in own.tensors.items() if name.startswith(("image.", "text."))}
    return LearnerState({**merged.tensors, **adapters}, {**merged.values, "classes": classes})


def _check_scatter(triangle: Tensor, width: int) -> None:
    """Raise MergeError unless a scatter is one: no direction varies by less than nothing."""
    scatter = torch.zeros(width, width)
    unpack(triangle, scatter)
    mean = scatter.trace() / width
    scatter.diagonal().add_(ROUNDING * mean.clamp_min(1e-12))
    if torch.linalg.cholesky_ex(scatter).info:
        raise MergeError("the scatter that it sent is none: it has directions of less than no variance")
