"""A linear discriminant in random features of two depths: exact statistics, and what is released."""

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
PROBES = 16
"""Random signs that a trace is estimated by: that of 1,000 images in 5,000 features within 1 %. It costs as much as
to solve for eight class means."""
MOST_COUNTED = 0.95
"""What is left of a counted image's distance is taken for 1 minus this at least. Of a handful of images the probes say
too little, and might say that nothing is left; of 100 in 5,000 features it is 0.1."""


def noise_of_mean(counts: Tensor, noise: Tensor) -> Tensor:
    """Give what noise adds to the squared length of shrunk means of this many images, [n]: a mean of k images is off by
    a k-th of the `noise` of one, which its weight k / (k + MEAN_PRIOR_IMAGES) shrinks twice.

    A discriminant takes half of each mean's squared length from the scores of its class; noise is not to count there,
    or classes of few images among those of many are hardly ever answered. On training images that no comparison uses,
    right on which were, in %, of CIFAR-10 with 500, 250, 125, ... 1 images a class in three orders: 47.4, 45.3 and 48.9
    with the mean of the class means as the centre; 49.5, 49.3 and 54.3 with that of all images; 53.0, 53.5 and 60.1
    without the noise, too. CIFAR-100 with 1 to 60 images a class: 46.0, 45.8, 45.6."""
    return noise * counts / (counts + MEAN_PRIOR_IMAGES).square()


class Statistics:
    """It counts images of C classes: class means and one within-class scatter of M features, as if of all at once, and
    class means of embeddings."""

    def __init__(self, features: int, embed_dim: int, device: torch.device) -> None:
        self.counts = torch.zeros(0, device=device)
        """Images of each class, float32 [C]."""
        self.means = torch.zeros(0, features, device=device)
        """float32 [C, M]."""
        self.embeddings = torch.zeros(0, embed_dim, device=device)
        """Class means of the embeddings, float32 [C, D]; NaN for a class of a state that an earlier version made."""
        self.scatter = torch.zeros(features, features, device=device)
        """The scatter within classes, float32 [M, M]; only its lower triangle is read, and saved."""

    def widen(self, classes: int) -> None:
        """Make room for this number of classes."""
        new = classes - len(self.means)
        self.counts = F.pad(self.counts, (0, new))
        self.means = F.pad(self.means, (0, 0, 0, new))
        self.embeddings = F.pad(self.embeddings, (0, 0, 0, new))

    def count(self, features: Tensor, embeddings: Tensor, labels: Tensor) -> None:
        """Count images in: float32 [n, M] and [n, D], labels int64 [n].

        A class that was there before moves its mean, which adds to the scatter (Chan, Golub and LeVeque 1979)."""
        present, place, counts = labels.unique(return_inverse=True, return_counts=True)
        means, embedded = (
            rows.new_zeros(len(present), rows.shape[1]).index_add_(0, place, rows) / counts[:, None]
            for rows in (features, embeddings)
        )
        before = self.counts[present]
        total = before + counts
        shift = means - self.means[present]
        moved = (before * counts / total).sqrt()[:, None] * shift
        spread = torch.cat([features - means[place], moved])
        self.scatter.addmm_(spread.T, spread)
        self.means[present] += (counts / total)[:, None] * shift
        self.embeddings[present] += (counts / total)[:, None] * (embedded - self.embeddings[present])
        self.counts[present] = total

    def clear(self) -> None:
        """Count from zero again, with room for as many classes."""
        for tensor in (self.counts, self.means, self.embeddings, self.scatter):
            tensor.zero_()

    def sum(self) -> None:
        """Become what all ranks have counted together, as if one had counted all (see `count`); nothing alone."""
        if ranks.size() == 1:
            return
        counts = ranks.summed(self.counts.clone())
        # in float64 the mean of a class that one rank alone has comes out as it went in
        means, embeddings = (
            (ranks.summed(self.counts.double()[:, None] * mine) / counts.clamp_min(1)[:, None]).float()
            for mine in (self.means, self.embeddings)
        )
        moved = self.counts.sqrt()[:, None] * (self.means - means)
        self.scatter.addmm_(moved.T, moved)
        self.counts, self.means, self.embeddings = counts, means, embeddings
        ranks.summed(self.scatter)

    def solve(self, prior: float) -> Solved:
        """Solve for the discriminant: (scatter + prior)^-1 of the centred and shrunk means, by one Cholesky factor. The
        prior of the scatter weighs as much as this number of images.

        The centre is the mean of all images. The mean of the class means would be thrown far by a class of one image
        among others of hundreds, and with it all small classes, which are drawn toward the centre."""
        images, width = self.counts.sum(), self.means.shape[1]
        centre = self.counts @ self.means / images
        between = (self.counts[:, None] * (self.means - centre).square()).sum()
        variance = (self.scatter.trace() + between) / (images * width)
        shrunk = self.scatter.clone()
        # The variance is 0 while all features are equal; the Cholesky factor needs a positive diagonal also then.
        sphere = prior * variance.clamp_min(1e-12)
        shrunk.diagonal().add_(sphere)
        factor = torch.linalg.cholesky(shrunk)
        weights = self.counts / (self.counts + MEAN_PRIOR_IMAGES)
        shrunk_means = weights[:, None] * (self.means - centre)
        rows = torch.cholesky_solve(shrunk_means.T, factor).T
        noise = self._noise(factor, sphere)
        norms = (shrunk_means * rows).sum(1) - noise_of_mean(self.counts, noise)
        return Solved(images + prior, centre, weights, shrunk_means, factor, rows, norms, noise)

    def _noise(self, factor: Tensor, sphere: Tensor) -> Tensor:
        """Estimate how far a new image is from the mean of its class, squared, by the inverse of scatter plus sphere.

        The images that were counted are nearer, since means and scatter are theirs: they are so by the trace of inverse
        times scatter over degrees of freedom, here by random probes (Hutchinson). Leaving each out in its turn makes of
        that, all taken as alike, what stands below (as generalised cross-validation does)."""
        signs = torch.randint(2, (len(factor), PROBES), generator=torch.Generator().manual_seed(0)) * 2 - 1
        probed = torch.linalg.solve_triangular(factor, signs.to(factor), upper=False)
        trace = (len(factor) - sphere * probed.double().square().sum(0)).mean().clamp_min(0)
        counted = trace.to(factor.dtype) / (self.counts.sum() - len(self.counts)).clamp_min(1)
        return counted / (1 - counted.clamp_max(MOST_COUNTED))


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
    """The mean of all images, [M]."""
    weights: Tensor
    """What is left of each class mean's distance from the centre, [C] from 0 to 1."""
    means: Tensor
    """The class means minus the centre, times their weights, [C, M]."""
    factor: Tensor
    """The lower Cholesky factor of scatter plus prior, [M, M]."""
    rows: Tensor
    """(scatter + prior)^-1 of these means, [C, M]."""
    norms: Tensor
    """Squared lengths of these means by the same inverse, without what noise adds to them, [C]."""
    noise: Tensor
    """The squared distance that a new image is expected to have from the mean of its class, by the same inverse; a
    scalar."""


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
