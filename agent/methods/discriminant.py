"""A linear discriminant in random features of two depths: exact statistics, leaving one out, fusion with the texts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agent.methods.classifiers import TowerWithHead, tensors_of
from agent.model import ranks
from agent.model.clip import Clip
from agent.model.lora import ADAPTED

EMBEDDING_FEATURES = 2
"""Random features of the embedding for each of its dimensions, at most: ReLU drops half of a projection, so that two
keep what the embedding says; all others are of the tokens. Of 3,000 features, on training images that no comparison
uses, the discriminant was right on these with 4.7 for each dimension and with 2.3, in %: CIFAR-10 71.1 and 72.4,
TrashNet 77.3 and 79.8, CIFAR-100 59.5 and 59.9, Tiny-ImageNet 61.2 and 61.4; CIFAR-10 with a small plain ViT 43.0 and
44.9. Fewer are better still there, but a large CLIP says more by its embedding than these small ones do."""
TOKENS_SHARE = 0.6
"""At least this share of the random features are of the tokens of the first depth. Chosen on the 201st to 250th
training image of every Tiny-ImageNet class, where the embedding alone was right on 58.2 % of the images and both depths
together on 63.8 %."""

MEAN_PRIOR_IMAGES = 8
"""A class mean is drawn toward the mean of all classes as if by this many images of it, which takes from a mean of few
images what is noise. Chosen on training images that no comparison uses, right on which were, with 0, 6 and 12, in %:
100 classes of 1 to 100 images 35.9, 46.5, 45.8; 16 classes of 300 and 100 of 20 images 54.2, 57.2, 57.8; 100 classes of
5 images 45.4, 46.3, 45.9, of 20 53.4, 54.1, 54.4, of 100 59.9, 60.1, 60.3; 10 of 300 71.7, 71.8, 71.8."""


class Statistics:
    """It counts images of C classes: class means and one within-class scatter of M features, as if of all at once."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.counts = torch.zeros(0, device=device)
        """Images of each class, float32 [C]."""
        self.means = torch.zeros(0, features, device=device)
        """float32 [C, M]."""
        self.scatter = torch.zeros(features, features, device=device)
        """The scatter within classes, float32 [M, M]; only its lower triangle is read, and saved."""

    def widen(self, classes: int) -> None:
        """Make room for this number of classes."""
        new = classes - len(self.means)
        self.counts = F.pad(self.counts, (0, new))
        self.means = F.pad(self.means, (0, 0, 0, new))

    def count(self, features: Tensor, labels: Tensor) -> None:
        """Count images in: float32 [n, M], labels int64 [n].

        A class that was there before moves its mean, which adds to the scatter (Chan, Golub and LeVeque 1979)."""
        present, place, counts = labels.unique(return_inverse=True, return_counts=True)
        means = features.new_zeros(len(present), features.shape[1]).index_add_(0, place, features) / counts[:, None]
        before = self.counts[present]
        total = before + counts
        shift = means - self.means[present]
        moved = (before * counts / total).sqrt()[:, None] * shift
        spread = torch.cat([features - means[place], moved])
        self.scatter.addmm_(spread.T, spread)
        self.means[present] += (counts / total)[:, None] * shift
        self.counts[present] = total

    def clear(self) -> None:
        """Count from zero again, with room for as many classes."""
        for tensor in (self.counts, self.means, self.scatter):
            tensor.zero_()

    def sum(self) -> None:
        """Become what all ranks have counted together, as if one had counted all (see `count`); nothing alone."""
        if ranks.size() == 1:
            return
        counts = ranks.summed(self.counts.clone())
        # in float64 the mean of a class that one rank alone has comes out as it went in
        sums = ranks.summed(self.counts.double()[:, None] * self.means)
        means = (sums / counts.clamp_min(1)[:, None]).float()
        moved = self.counts.sqrt()[:, None] * (self.means - means)
        self.scatter.addmm_(moved.T, moved)
        self.counts, self.means = counts, means
        ranks.summed(self.scatter)

    def solve(self, prior: float) -> Solved:
        """Solve for the discriminant: (scatter + prior)^-1 of the centred and shrunk means, by one Cholesky factor. The
        prior of the scatter weighs as much as this number of images."""
        images, width = self.counts.sum(), self.means.shape[1]
        centre = self.means.mean(0)
        between = (self.counts[:, None] * (self.means - self.counts @ self.means / images).square()).sum()
        variance = (self.scatter.trace() + between) / (images * width)
        shrunk = self.scatter.clone()
        # The variance is 0 while all features are equal; the Cholesky factor needs a positive diagonal also then.
        shrunk.diagonal().add_(prior * variance.clamp_min(1e-12))
        factor = torch.linalg.cholesky(shrunk)
        weights = self.counts / (self.counts + MEAN_PRIOR_IMAGES)
        shrunk_means = weights[:, None] * (self.means - centre)
        rows = torch.cholesky_solve(shrunk_means.T, factor).T
        return Solved(images + prior, centre, weights, shrunk_means, factor, rows)


class RandomFeatures(nn.Module):
    """It computes fixed random projections of an image at two depths, under ReLU: [B, tokens, width] and [B, D] ->
    float32 [B, M]."""

    tokens: Tensor
    embedding: Tensor

    def __init__(self, clip: Clip, features: int, generator: torch.Generator) -> None:
        super().__init__()
        of_tokens = max(round(TOKENS_SHARE * features), features - EMBEDDING_FEATURES * clip.embed_dim)
        width = next(weight.shape[1] for name, weight in clip.image.named_parameters() if name.endswith(ADAPTED))
        tokens = torch.randn(width, of_tokens, generator=generator)
        embedding = torch.randn(clip.embed_dim, features - of_tokens, generator=generator)
        self.register_buffer("tokens", tokens.to(clip.device))
        self.register_buffer("embedding", embedding.to(clip.device))

    def load(self, tokens: Tensor, embedding: Tensor) -> None:
        """Take the projections of a state: [width, a] and [D, M - a]. Which share of them is of the tokens is the
        state's."""
        self.tokens, self.embedding = tokens.clone(), embedding.clone()

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        directions = F.normalize(tokens.float(), dim=-1)
        return torch.cat([F.relu(directions @ self.tokens).mean(1), F.relu(embedding @ self.embedding)], dim=1)


@dataclass(frozen=True)
class Solved:
    """It is a linear discriminant of C classes in M features."""

    images: Tensor
    """The number of images that the scatter is of, with those of the prior; a scalar."""
    centre: Tensor
    """The mean of the class means, [M]."""
    weights: Tensor
    """What is left of each class mean's distance from the centre, [C] from 0 to 1."""
    means: Tensor
    """The class means minus the centre, times their weights, [C, M]."""
    factor: Tensor
    """The lower Cholesky factor of scatter plus prior, [M, M]."""
    rows: Tensor
    """(scatter + prior)^-1 of these means, [C, M]."""


def leave_one_out(solved: Solved, features: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Score learned images as the discriminant would had each of them alone not been learned.

    features float32 [n, M], labels int64 [n], counts [C] of images per class, at least 2 in those of `labels` ->
    [n, C], up to a constant per row. The scatter loses a matrix of rank one, so that its inverse follows from the
    whole one's (Sherman and Morrison); centre, prior and the count of images that scales it stay.
    """
    at = torch.arange(len(labels), device=labels.device)
    centred, weight, count = features - solved.centre, solved.weights[labels][:, None], counts[labels]
    mean, row = solved.means[labels] / weight, solved.rows[labels] / weight
    residual = centred - mean
    lost = count / (count - 1)
    inverse = torch.cholesky_solve(residual.T, solved.factor).T
    own = (residual * inverse).sum(1)
    grown = 1 - lost * own
    # squared distances to all means, by the whole scatter and then by the one that is left; up to a constant per row
    norms = (solved.means * solved.rows).sum(1)
    distance = norms - 2 * centred @ solved.rows.T + (centred * (inverse + row)).sum(1)[:, None]
    along = (inverse * centred).sum(1)[:, None] - inverse @ solved.means.T
    distance = distance + (lost / grown)[:, None] * along.square()
    # The own class's mean moves away as well, and is drawn more to the centre: the image is then at a * residual +
    # b * mean from it.
    left = (count - 1) / (count - 1 + MEAN_PRIOR_IMAGES)
    a, b, across = 1 + left / (count - 1), 1 - left, (inverse * mean).sum(1)
    direct = a.square() * own + 2 * a * b * across + b.square() * (mean * row).sum(1)
    distance[at, labels] = direct + lost / grown * (a * own + b * across).square()
    return -solved.images / 2 * distance


@dataclass(frozen=True)
class Fusion:
    """It is the two numbers of a prediction: softmax of temperature * discriminant + text_weight * similarities."""

    temperature: float
    text_weight: float

    def losses(self, visual: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        """Compute the cross entropy of each image: scores float32 [n, C], labels int64 [n] -> float64 [n], in nats."""
        return F.cross_entropy((self.temperature * visual + self.text_weight * text).double(), labels, reduction="none")

    def fitted(self, visual: Tensor, text: Tensor, labels: Tensor) -> Fusion:
        """Fit both by cross entropy on images none of which may have been learned by what scored it.

        visual, text float32 [n, C] and labels int64 [n]. The numbers lean on the ones they were with the strength of a
        log-normal prior of deviation 1, so that a few images cannot throw them far.
        """
        scores, truth = torch.stack([visual, text]).double().cpu(), labels.cpu()
        last = torch.tensor([self.temperature, self.text_weight], dtype=torch.float64).log()
        now = last.clone().requires_grad_()
        # 50 is chosen by hand: a bound on the time where two numbers do not settle; LBFGS ends earlier when they do.
        optimizer = torch.optim.LBFGS([now], max_iter=50, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            with torch.enable_grad():
                together = torch.einsum("s,snc->nc", now.exp(), scores)
                value = F.cross_entropy(together, truth, reduction="sum") + (now - last).square().sum() / 2
                value.backward()
            return value

        optimizer.step(loss)
        return Fusion(*now.detach().exp().tolist()) if now.isfinite().all() else self


class Discriminant(TowerWithHead):
    """Predicts softmax(random features @ rows + bias + embedding @ names); the scales are in the rows and names.

    The random features are always of the untouched tower. The embedding, which answers by the names and is given out,
    is that of the adapted tower where there is one.
    """

    parts = ("embedding", "features")

    rows: Tensor
    names: Tensor
    bias: Tensor
    centre: Tensor

    def __init__(
        self,
        tower: nn.Module,
        adapted: nn.Module | None,
        classes: tuple[str, ...],
        names: Tensor,
        rows: Tensor,
        bias: Tensor,
        centre: Tensor,
        random: RandomFeatures,
        depth: int,
    ) -> None:
        """Take the untouched tower, the adapted one or None, names [C, D], rows [C, M], bias [C], centre [M], and the
        random features with the block whose input tokens they are of."""
        super().__init__(tower, classes)
        self.depth = depth
        self.adapted = adapted
        self._rows("names", names)
        self._rows("rows", rows)
        self._rows("bias", bias)
        self.register_buffer("centre", centre.clone())
        self.random = random

    def encoder(self, part: str) -> Mapping[str, Tensor]:
        if part == "features":
            return tensors_of(self.tower, self.random)
        return tensors_of(self.tower if self.adapted is None else self.adapted)

    def encode(self, tokens: Tensor, parts: Collection[str]) -> dict[str, Tensor]:
        found = {}
        if self.adapted is None or "features" in parts:
            middle, untouched = self.tower.at_depth(tokens, self.depth)
            embedding = F.normalize(untouched.float(), dim=-1)
            if "features" in parts:
                found["features"] = self.random(middle, embedding)
        if self.adapted is not None and "embedding" in parts:
            embedding = F.normalize(self.adapted(tokens).float(), dim=-1)
        return {**found, "embedding": embedding} if "embedding" in parts else found

    def answer(self, encoded: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        embedding, features = encoded["embedding"], encoded["features"]
        scores = (features - self.centre) @ self.rows.T + self.bias + embedding @ self.names.T
        logits = torch.log_softmax(scores, dim=-1)
        return embedding, logits, logits.exp()
