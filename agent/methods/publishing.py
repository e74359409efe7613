"""What a learner gives to other sites, and what it answers with together with theirs.

*Out.* Counts, class means and scatter leave, never an image. One image of a class would give its feature away (the mean
is the feature), and so would one image more in a later state (n' m' - n m). So what leaves grows by at least `least`
images of a class or by none of it: images of a class that are fewer wait until there are enough. Their features, at
most least - 1 of a class, stay at the site; with them all that these images added is taken out again exactly, their
share of the one scatter too:

    n = n_o + p,  m_o = (n m - p f) / n_o,  S_o = S - sum (x - f)(x - f)^T - (n_o p / n) (f - m_o)(f - m_o)^T

for the p features x of mean f that wait (means of embeddings like those of features). A class of which fewer than
`least` images were counted in all stays behind.

*Together.* A site's own learner is added to those of the others by agent/methods/merging.py. The statistics are of the
untouched towers, so learners add up exactly whatever their adapters are: each keeps its own, and none are sent.

The fusion's two numbers do not add up: those that a learner fits by itself are for its own classes. So a site fits them
anew to the images of its last task, whose features it keeps, whenever it takes up what others learned. All answer with
the mean of what was fitted, weighted by images.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from agent.methods.base import NOTHING, Counted, LearnerState, Method, TaskData
from agent.methods.fusion import Fusion
from agent.methods.gapstream import START, Gapstream
from agent.methods.merging import ALIKE, MergeError, merge
from agent.methods.training import packed, unpack
from agent.values import MOST_IMAGES

RANDOM = ("random.tokens", "random.embedding")
"""Tensors that are drawn from the seed, the same at every site."""

ROUNDING = 1e-4
"""Share of the mean variance that is added before a scatter is asked whether it is one: float32 sums of millions of
images are off by less, and what nobody could have counted is off by more."""

REACH = 1.01
"""Times that a mean may be as long as one of images can be: chosen by hand, for half precision and what is subtracted
of images that are held back."""

SETTLED = 0.1
"""A fusion that was fitted anew is published where the logarithm of one of its numbers moved by this or more, since a
publication is the whole state. Weights of texts that differ by a tenth change the answer to few images: on four streams
at most 0.2 points of accuracy."""


@dataclass
class SiteLearner:
    """It is a site's learner, with what only a site of a fleet has to know of it."""

    method: Method
    least: int
    """Images of a class that leave together at least."""
    held: Counted = NOTHING
    """What the learner has counted of images that do not leave yet, on the CPU."""
    last: Counted = NOTHING
    """The images that the fusion is fitted to, on the CPU: of the last task that had some which can be left out of
    their class. Nothing for a method without a fusion."""
    task: int = 0
    """Number of that task."""
    fusion: Tensor | None = None
    """The fusion's two numbers among the classes of all sites, float64 [2]; None until they were fitted."""

    def own(self) -> LearnerState:
        """Give the learner's state on the CPU, where the others' are, with the fusion that is fitted to all sites."""
        state = self.method.state()
        state = LearnerState({name: tensor.cpu() for name, tensor in state.tensors.items()}, state.values)
        if "fusion" not in state.tensors:
            return state
        fitted = bool((state.tensors["fusion"] != torch.tensor(astuple(START), dtype=torch.float64)).any())
        fusion = state.tensors["fusion"] if self.fusion is None else self.fusion
        return LearnerState(
            {**state.tensors, "fusion": fusion}, {**state.values, "fitted": fitted or self.fusion is not None}
        )

    def learned(self, task: TaskData) -> None:
        """Keep what is needed of a task that the learner has counted."""
        counted: Callable[[TaskData, Tensor], Counted] = self.method.counted  # type: ignore[attr-defined]
        names = task.names(torch.arange(len(task)))
        images = Counter(names) + Counter(self.held.classes)
        stay = self.held.of([at for at, name in enumerate(self.held.classes) if images[name] < self.least])
        index = [at for at, name in enumerate(names) if images[name] < self.least]
        parts = [stay] if stay.classes else []
        parts += [_on_cpu(counted(task, torch.tensor(index)))] if index else []
        self.held = _concatenated(parts)
        if isinstance(self.method, Gapstream) and self.method.calibration.classes:
            self.last, self.task = _on_cpu(self.method.calibration), task.number

    def sends(self) -> tuple[dict[str, Tensor], list[str]]:
        """Give what leaves, see `outgoing`."""
        return outgoing(self.method.name, self.own(), self.held, self.least)

    def answers(self, build: Callable[[], Method], others: Mapping[str, LearnerState]) -> Method:
        """Give a method, which `build` makes, that answers with all sites; the learner itself where there is no other.

        Raises MergeError, and what torch raises of numbers that cannot be solved.
        """
        if not others:
            self.fusion = None
            return self.method
        made, own = build(), self.own()
        made.load_state(together(made.name, own, others))
        if isinstance(made, Gapstream) and isinstance(self.method, Gapstream) and self.last.classes:
            # It leans on what the learner has by itself: the same images are not to count once more with every release.
            made.weigh(self.method.weights)
            fitted = torch.tensor(astuple(made.fitted(self.last, self.task)), dtype=torch.float64)
            if self.fusion is None or (fitted / self.fusion).log().abs().max() >= SETTLED:
                self.fusion = fitted
            own = LearnerState({**own.tensors, "fusion": self.fusion}, {**own.values, "fitted": True})
            made.weigh(Fusion(*_mean_fusion([own, *others.values()]).tolist()))
        return made


def outgoing(method: str, state: LearnerState, held: Counted, least: int) -> tuple[dict[str, Tensor], list[str]]:
    """Give the tensors that leave, as agent.fleet_states.SCHEMAS has them, and the names of their classes; none is left
    where every class stays behind. For the methods of that table."""
    names = list(state.values["classes"])
    counts = torch.as_tensor(state.values.get("counts", state.tensors.get("counts"))).double().cpu()
    means = state.tensors["means"].double().cpu()
    embeddings = state.tensors["embeddings"].double().cpu() if method == "gapstream" else means[:, :0]
    removed = []
    for name in dict.fromkeys(held.classes):
        row = names.index(name)
        images = held.of([at for at, one in enumerate(held.classes) if one == name])
        waiting = images.features.double()
        mean, total, left = waiting.mean(0), counts[row].item(), counts[row].item() - len(waiting)
        removed.append(waiting - mean)
        if left > 0:
            means[row] = (total * means[row] - len(waiting) * mean) / left
            embeddings[row] = (total * embeddings[row] - images.embeddings.double().sum(0)) / left
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
        tensors["embeddings"] = embeddings[kept].nan_to_num(0).float()
        tensors["fusion"] = state.tensors["fusion"].double().cpu()
        tensors |= {name: state.tensors[name][:1].cpu() for name in RANDOM}
    return tensors, [names[row] for row in kept.tolist()]


def incoming(
    own: LearnerState, tensors: Mapping[str, Tensor], classes: list[str], depth: int, fitted: bool
) -> LearnerState:
    """Give the state of another site's learner, with what it did not send because it is the same here.

    Raises MergeError, in words that go on after "NAME and NAME cannot be merged: ", where it is not the same, or where
    what it sent cannot have been counted.
    """
    widths = [state["means"].shape[1] for state in (own.tensors, tensors)]
    if widths[0] != widths[1]:
        raise MergeError(f"class means of {widths[0]} and {widths[1]} features cannot be added")
    counts = tensors["counts"].long().tolist()
    if "scatter" not in tensors:
        _check_reach("means", tensors["means"], 1)
        return LearnerState({"means": tensors["means"]}, {"classes": classes, "counts": counts})
    if depth != own.values.get("depth", 0):
        raise MergeError(f"random features of the blocks {own.values.get('depth', 0)} and {depth} cannot be added")
    for name in RANDOM:
        mine, theirs = own.tensors[name], tensors[name]
        if mine.shape[1] != theirs.shape[1]:
            numbers = f"{name} of {mine.shape[1]} and {theirs.shape[1]} features"
            raise MergeError(f"{numbers} cannot be added; an earlier version began with other numbers of each")
        if not torch.allclose(mine[:1].cpu(), theirs, rtol=0, atol=ALIKE):
            raise MergeError("their random features are not the same; only sites with one method.seed can be added")
    # Directions have the length 1, so that random features are no longer than all projections together.
    reach = math.sqrt(sum(own.tensors[name].double().square().sum().item() for name in RANDOM))
    _check_reach("means", tensors["means"], reach)
    _check_scatter(tensors["scatter"], widths[1], reach)
    embed_dim = own.tensors["embeddings"].shape[1]
    # Sent as 0, which no mean is, where they were not counted; by an earlier version not at all.
    embeddings = tensors.get("embeddings", torch.zeros(len(counts), embed_dim))
    if embeddings.shape != (len(counts), embed_dim):
        raise MergeError("its class means of embeddings are not those of its classes, or of another width")
    _check_reach("means of embeddings", embeddings, 1)
    embeddings = embeddings.masked_fill(~embeddings.any(1, keepdim=True), float("nan"))
    tensors = {**tensors, "embeddings": embeddings}
    same = {name: own.tensors[name] for name in (*RANDOM, "names")}
    values = {"classes": classes, "fitted": fitted, **({"depth": depth} if depth else {})}
    return LearnerState({**tensors, **same}, values)


def together(method: str, own: LearnerState, others: Mapping[str, LearnerState]) -> LearnerState:
    """Give the state of a learner that saw what this one and the others saw, with this one's adapters. Class names that
    differ only in case are spelled as here.

    Raises MergeError where they do not add up.
    """
    merged = merge(method, {"this site": own, **others})
    mine = {name.casefold(): name for name in own.values["classes"]}
    classes = [mine.get(name.casefold(), name) for name in merged.values["classes"]]
    adapters = {name: tensor for name, tensor in own.tensors.items() if name.startswith(("image.", "text."))}
    fusion = {"fusion": _mean_fusion([own, *others.values()])} if "fusion" in merged.tensors else {}
    return LearnerState({**merged.tensors, **adapters, **fusion}, {**merged.values, "classes": classes})


def _mean_fusion(states: Sequence[LearnerState]) -> Tensor:
    """Give the geometric mean of the fusions that were fitted, weighted by images: float64 [2]. Where none was, what a
    learner begins with."""
    fitted = [state for state in states if state.values["fitted"] and state.tensors["counts"].sum() > 0]
    if not fitted:
        return torch.tensor(astuple(START), dtype=torch.float64)
    images = torch.stack([state.tensors["counts"].double().cpu().sum() for state in fitted])
    return (images / images.sum() @ torch.stack([state.tensors["fusion"].cpu() for state in fitted]).log()).exp()


def _check_reach(name: str, means: Tensor, reach: float) -> None:
    """Raise MergeError where a mean is longer than what it can be the mean of."""
    longest = means.double().norm(dim=1).max().item()
    if longest > REACH * reach:
        raise MergeError(f"one of the {name} that it sent has the length {longest:.3g}, where {reach:.3g} is the most")


def _check_scatter(triangle: Tensor, width: int, reach: float) -> None:
    """Raise MergeError unless a scatter is one: no direction varies by less than nothing, and all of them together by
    no more than so many images can."""
    scatter = torch.zeros(width, width)
    unpack(triangle, scatter)
    total = scatter.diagonal().double().sum().item()
    if total > MOST_IMAGES * reach**2:
        raise MergeError(f"the scatter that it sent has a variance of {total:.3g}, which no images have")
    mean = scatter.trace() / width
    scatter.diagonal().add_(ROUNDING * mean.clamp_min(1e-12))
    if torch.linalg.cholesky_ex(scatter).info:
        raise MergeError("the scatter that it sent is none: it has directions of less than no variance")


def _on_cpu(images: Counted) -> Counted:
    return Counted(images.features.cpu(), images.embeddings.cpu(), images.classes)


def _concatenated(parts: Sequence[Counted]) -> Counted:
    if not parts:
        return NOTHING
    features, embeddings = (torch.cat(rows) for rows in zip(*((p.features, p.embeddings) for p in parts), strict=True))
    return Counted(features, embeddings, tuple(name for part in parts for name in part.classes))
