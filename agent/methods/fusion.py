"""How much the discriminant and the texts count: two numbers, fitted to images of one task for all learned classes.

A task has images of its own classes alone. Numbers that are best for these need not be for the others, whose texts may
say less or more: CIFAR-10 of two classes at a time ended at 68.5 % of images that were not learned with numbers fitted
to the last task's images, where the best numbers give 75.4 %. No images of the other classes are there any more, but
their means are, and scatter within classes is shared by all, as the discriminant supposes. So what an image differs by
from its own class's mean is put on the mean of another class, in features and embedding alike: *moved*, it stands for
an image of that class. Each image is left out of what it is scored by, here too.

Moved images fit the discriminant's own idea of them, real ones need not. So only the ratio of the two numbers is fitted
to both, and their size to the real ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from agent.methods.discriminant import MEAN_PRIOR_IMAGES, Solved, noise_of_mean


@dataclass(frozen=True)
class LeftOut:
    """It scores n learned images as the discriminant would had each of them alone not been learned.

    The scatter loses a matrix of rank one, so that its inverse follows from the whole one's (Sherman and Morrison);
    centre, prior, noise and the count of images that scales it stay.
    """

    solved: Solved
    features: Tensor
    """float32 [n, M]."""
    labels: Tensor
    """int64 [n]."""
    counts: Tensor
    """Images of each class, float32 [C], at least 2 in those of `labels`."""

    @cached_property
    def residual(self) -> Tensor:
        """What each image differs by from the mean of its class, [n, M]."""
        return self.features - self.solved.centre - self._means(self.labels)

    @cached_property
    def _inverse(self) -> Tensor:
        """The whole scatter's inverse times the residuals, [n, M]."""
        return torch.cholesky_solve(self.residual.T, self.solved.factor).T

    @cached_property
    def _gone(self) -> tuple[Tensor, Tensor]:
        """The squared length of each image's residual by the whole scatter, and the factor that takes the image out of
        the inverse; [n] each."""
        lost, own = self.counts[self.labels] / (self.counts[self.labels] - 1), (self.residual * self._inverse).sum(1)
        return own, lost / (1 - lost * own)

    def _means(self, labels: Tensor) -> Tensor:
        """Class means minus the centre, not shrunk."""
        return self.solved.means[labels] / self.solved.weights[labels][:, None]

    def scores(self) -> Tensor:
        """Score the images: [n, C], up to a constant per row."""
        solved, labels = self.solved, self.labels
        at = torch.arange(len(labels), device=labels.device)
        count, mean, residual, inverse = self.counts[labels], self._means(labels), self.residual, self._inverse
        row, centred = solved.rows[labels] / solved.weights[labels][:, None], mean + residual
        own, gone = self._gone
        # squared distances to all means, by the whole scatter and then by the one left; up to a constant per row
        distance = solved.norms - 2 * centred @ solved.rows.T + (centred * (inverse + row)).sum(1)[:, None]
        along = (inverse * centred).sum(1)[:, None] - inverse @ solved.means.T
        distance = distance + gone[:, None] * along.square()
        # The own class's mean moves away as well, and is drawn more to the centre: the image is then at a * residual +
        # b * mean from it.
        left = (count - 1) / (count - 1 + MEAN_PRIOR_IMAGES)
        a, b, across = 1 + left / (count - 1), 1 - left, (inverse * mean).sum(1)
        direct = a.square() * own + 2 * a * b * across + b.square() * (mean * row).sum(1)
        direct = direct + gone * (a * own + b * across).square()
        distance[at, labels] = direct - noise_of_mean(count - 1, solved.noise)
        return -solved.images / 2 * distance

    def moved(self, index: Tensor, to: Tensor) -> Tensor:
        """Score some of the images moved to other classes: int64 [m] each -> [m, C], up to a constant per row."""
        solved, inverse = self.solved, self._inverse[index]
        centred = self._means(to) + self.stretch(index, to)[:, None] * self.residual[index]
        distance = solved.norms - 2 * centred @ solved.rows.T
        along = (inverse * centred).sum(1)[:, None] - (self._inverse @ solved.means.T)[index]
        return -solved.images / 2 * (distance + self._gone[1][index][:, None] * along.square())

    def stretch(self, index: Tensor, to: Tensor) -> Tensor:
        """Give what residuals are multiplied by as they are moved, [m]: one from a mean of n images that has this image
        in it varies less, by (n - 1) / n, than one of a new image from the mean of the class `to`, by 1 + 1 / n."""
        own, other = self.counts[self.labels[index]], self.counts[to]
        return ((1 + 1 / other) * own / (own - 1)).sqrt()


@dataclass(frozen=True)
class Scored:
    """It has what n images are scored by, apart."""

    visual: Tensor
    """The discriminant's scores, float32 [n, C]."""
    text: Tensor
    """Similarities to the texts, float32 [n, C]."""
    labels: Tensor
    """int64 [n]."""


@dataclass(frozen=True)
class Fusion:
    """It is the two numbers of a prediction: softmax of temperature * discriminant + text_weight * similarities."""

    temperature: float
    text_weight: float

    def losses(self, visual: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        """Compute the cross entropy of each image: scores float32 [n, C], labels int64 [n] -> float64 [n], in nats."""
        return F.cross_entropy((self.temperature * visual + self.text_weight * text).double(), labels, reduction="none")

    def fitted(self, real: Scored, moved: Scored) -> Fusion:
        """Fit both by cross entropy on images none of which may have been learned by what scored it.

        real: images of the task. moved: what stands for the classes that have none in the task, perhaps nothing. Each
        of the two counts by the number of classes that it stands for. The numbers lean on the ones they were with the
        strength of a log-normal prior of deviation 1, so that a few images cannot throw them far.
        """
        last = math.log(self.temperature), math.log(self.text_weight)
        # logarithms of the temperature, the text weight, and the temperature of moved images
        before = torch.tensor([*last, last[0]], dtype=torch.float64)
        now = before.clone().requires_grad_()
        images, classes = len(real.labels), real.visual.shape[1]
        here = len(real.labels.unique()) / classes if len(moved.labels) else 1.0
        parts = [
            (share * images, torch.stack([part.visual, part.text]).double().cpu(), part.labels.cpu(), at)
            for share, part, at in ((here, real, 0), (1 - here, moved, 2))
            if len(part.labels)
        ]
        # 50 is chosen by hand: a bound on the time where two numbers do not settle; LBFGS ends earlier when they do.
        optimizer = torch.optim.LBFGS([now], max_iter=50, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            with torch.enable_grad():
                value = (now - before).square().sum() / 2
                for weight, scores, truth, at in parts:
                    factors = torch.stack([now[at], now[at] + now[1] - now[0]]).exp()
                    value = value + weight * F.cross_entropy(torch.einsum("s,snc->nc", factors, scores), truth)
                value.backward()
            return value

        optimizer.step(loss)
        return Fusion(*now[:2].detach().exp().tolist()) if now.isfinite().all() else self
