"""Our own method: both towers stay untouched, second-order statistics of their features learn. No replay.

What preserves is that no weight of either tower changes: the gap does not drift, names never learned are recognised as
before, and statistics of earlier tasks stay true. What compensates, per task: (1) Images become random features
(ReLU of random projections, as in RanPAC, arXiv 2307.02251) of two depths, as earlier layers often tell classes apart
that the embedding merges (LayUP, arXiv 2312.08888): of every token where the tower's trainable part would begin,
averaged over the tokens, and of the embedding. (2) A class mean, and one within-class scatter shared by all classes,
are updated exactly; a linear discriminant follows in closed form, its scatter shrunk toward a sphere as if by a fixed
number of images. (3) A prediction is the softmax of temperature * discriminant + weight * similarity to the class
names; both numbers minimise the cross entropy on some of the task's images, each scored as if it had not been learned
(leave one out, exact and in closed form). So texts lead where images are few, and images where they are many.

The result does not depend on how a stream is cut into tasks, but for the rounding and those two numbers.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agent import config
from agent.methods.base import InferenceModule, LearnerState, OnProgress, TaskData, check_learned, task_generator
from agent.methods.classifiers import TowerWithHead
from agent.methods.training import GapWatch, UntouchedMethod, admit, packed, unpack, untrained
from agent.model.clip import Clip
from agent.model.lora import ADAPTED, merged
from agent.values import Progress, Update

TOKENS_SHARE = 0.6
"""The share of the random features that are of the tokens where training would begin; the others are the embedding's.
Chosen on the 201st to 250th training image of every Tiny-ImageNet class, where the embedding alone was right on 58.2 %
of the images and both depths together on 63.8 %."""
BATCH = 64
"""Images whose random features of every token are in memory at once: 64 x 196 tokens x 3,000 features are 150 MB."""
CALIBRATION_IMAGES = 256
"""Images of a task that the fusion's two numbers are fitted to. Two numbers need no more; each further image costs a
solve with the scatter's Cholesky factor."""
START = (0.002, 0.5)
"""Temperature and weight of the texts before any are measured: chosen by hand. Measured ones lean on
the last with the strength of a log-normal prior of deviation 1, so that a small task cannot throw them far."""


class Gapstream(UntouchedMethod):
    """It is the default method: second-order statistics beside the texts. See the module's first lines."""

    name = "gapstream"
    fusion = "text+discriminant"

    def __init__(self, clip: Clip, settings: config.Method) -> None:
        self._clip = clip
        self._seed = settings.seed
        self._prior = settings.gapstream.prior_images
        features = settings.gapstream.features
        self._random = RandomFeatures(clip, features, task_generator(settings.seed, 0, "random features"))
        self._classes: list[str] = []
        self._counts = torch.zeros(0, device=clip.device)
        self._means = torch.zeros(0, features, device=clip.device)
        self._scatter = torch.zeros(features, features, device=clip.device)
        """The scatter within classes, float32 [M, M]; only its lower triangle is read, and saved."""
        self._temperature, self._text_weight = START
        self._names = torch.zeros(0, clip.embed_dim, device=clip.device)
        self._solved: Solved | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._classes)

    @torch.no_grad()
    def update(self, task: TaskData, on_progress: OnProgress) -> Update:
        started = time.perf_counter()
        watch = GapWatch(self, self._clip, task, self._seed)
        admit(self._classes, task)
        new = len(self._classes) - len(self._means)
        self._counts = F.pad(self._counts, (0, new))
        self._means = F.pad(self._means, (0, 0, 0, new))
        where = torch.tensor([self._classes.index(name) for name in task.classes])
        labels = where[task.labels].to(self._clip.device)
        sample = torch.randperm(len(task), generator=task_generator(self._seed, task.number, "calibration"))
        chosen = torch.zeros(len(task), dtype=torch.bool)
        chosen[sample[:CALIBRATION_IMAGES]] = True
        kept, embeddings = [], []
        # 16 batches at once, chosen by hand: each call of `_learn` updates the whole scatter [M, M], which costs less
        # for many images together; fewer at once only take longer, more need more memory.
        for index in torch.arange(len(task)).split(16 * BATCH):
            features, embedding = self._features(task, index, on_progress)
            self._learn(features, labels[index.to(labels.device)])
            kept.append(features[chosen[index].to(features.device)])
            embeddings.append(embedding[chosen[index].to(features.device)])
        self._solved = self._solve()
        self._calibrate(torch.cat(kept), torch.cat(embeddings), labels[chosen.to(labels.device)])
        details = {"temperature": self._temperature, "text_weight": self._text_weight}
        return replace(untrained(task, watch, started, on_progress), details=details)

    def _features(self, task: TaskData, index: Tensor, on_progress: OnProgress) -> tuple[Tensor, Tensor]:
        """Compute random features float32 [n, M] and embeddings [n, D] of some images, in batches of few
        activations."""
        both = []
        for part in index.split(BATCH):
            tokens = task.tokens.batch(part)
            embedding = self._clip.encode_tokens(tokens)
            both.append((self._random(tokens, embedding), embedding))
            done = int(part[-1]) + 1
            place = {"step": math.ceil(done / BATCH), "steps": math.ceil(len(task) / BATCH), "samples": done}
            on_progress(Progress("train", task.number, **place))
        features, embeddings = zip(*both, strict=True)
        return torch.cat(features), torch.cat(embeddings)

    def _learn(self, features: Tensor, labels: Tensor) -> None:
        """Count images in [n, M], labels [n] into the learned classes: means and scatter as if of all images at once.

        A class that was there before moves its mean, which adds to the scatter (Chan, Golub and LeVeque 1979)."""
        present, place, counts = labels.unique(return_inverse=True, return_counts=True)
        means = features.new_zeros(len(present), features.shape[1]).index_add_(0, place, features) / counts[:, None]
        before = self._counts[present]
        total = before + counts
        shift = means - self._means[present]
        moved = (before * counts / total).sqrt()[:, None] * shift
        spread = torch.cat([features - means[place], moved])
        self._scatter.addmm_(spread.T, spread)
        self._means[present] += (counts / total)[:, None] * shift
        self._counts[present] = total

    def _solve(self) -> Solved:
        """Solve for the discriminant: (scatter + prior)^-1 of the centred means, by one Cholesky factor."""
        images, width = self._counts.sum(), self._means.shape[1]
        centre = self._means.mean(0)
        between = (self._counts[:, None] * (self._means - self._counts @ self._means / images).square()).sum()
        variance = (self._scatter.trace() + between) / (images * width)
        shrunk = self._scatter.clone()
        # The variance is 0 while all features are equal; the Cholesky factor needs a positive diagonal also then.
        shrunk.diagonal().add_(self._prior * variance.clamp_min(1e-12))
        factor = torch.linalg.cholesky(shrunk)
        centred = self._means - centre
        return Solved(images + self._prior, centre, centred, factor, torch.cholesky_solve(centred.T, factor).T)

    def _calibrate(self, features: Tensor, embeddings: Tensor, labels: Tensor) -> None:
        """Fit temperature and weight of the texts by cross entropy on learned images [n, M], each left out in its
        turn."""
        assert self._solved is not None
        able = self._counts[labels] > 1
        if len(self._classes) < 2 or not able.any():
            return
        visual = leave_one_out(self._solved, features[able], labels[able], self._counts)
        text = self._clip.logit_scale * embeddings[able] @ self._class_names().T
        scores, truth = torch.stack([visual, text]).double().cpu(), labels[able].cpu()
        last = torch.tensor([self._temperature, self._text_weight], dtype=torch.float64).log()
        now = last.clone().requires_grad_()
        # 50 is chosen by hand: a bound on the time where two numbers do not settle; LBFGS ends earlier when they do.
        optimizer = torch.optim.LBFGS([now], max_iter=50, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            with torch.enable_grad():
                fused = torch.einsum("s,snc->nc", now.exp(), scores)
                value = F.cross_entropy(fused, truth, reduction="sum") + (now - last).square().sum() / 2
                value.backward()
            return value

        optimizer.step(loss)
        if now.isfinite().all():
            self._temperature, self._text_weight = now.detach().exp().tolist()

    def _class_names(self) -> Tensor:
        """Give the features of the learned names, float32 [C, D]; every name is encoded once in the life of a state
        folder."""
        missing = self._classes[len(self._names) :]
        if missing:
            self._names = torch.cat([self._names, self._clip.encode_names(missing)])
        return self._names

    @torch.no_grad()
    def inference_module(self) -> InferenceModule:
        check_learned(self.classes)
        if self._solved is None:
            self._solved = self._solve()
        scale, rows = self._temperature * self._solved.images, self._solved.rows
        bias = -scale / 2 * (self._solved.centred * rows).sum(1)
        names = self._text_weight * self._clip.logit_scale * self._class_names()
        tower = merged(self._clip.image, {})
        return Discriminant(tower, self.classes, names, scale * rows, bias, self._solved.centre, self._random)

    def state(self) -> LearnerState:
        tensors = {
            "random.tokens": self._random.tokens.clone(),
            "random.embedding": self._random.embedding.clone(),
            "counts": self._counts.clone(),
            "means": self._means.clone(),
            "scatter": packed(self._scatter),
            "names": self._class_names().clone(),
            "fusion": torch.tensor([self._temperature, self._text_weight], dtype=torch.float64),
        }
        return LearnerState(tensors, {"classes": list(self._classes)})

    def load_state(self, state: LearnerState) -> None:
        tensors = {name: tensor.to(self._clip.device) for name, tensor in state.tensors.items()}
        self._random.tokens.copy_(tensors["random.tokens"])
        self._random.embedding.copy_(tensors["random.embedding"])
        self._counts, self._means = tensors["counts"].clone(), tensors["means"].clone()
        unpack(tensors["scatter"], self._scatter)
        self._names = tensors["names"].clone()
        self._temperature, self._text_weight = state.tensors["fusion"].tolist()
        self._classes = list(state.values["classes"])
        self._solved = None


class RandomFeatures(nn.Module):
    """It computes fixed random projections of an image at two depths, under ReLU: [B, tokens, width] and [B, D] ->
    float32 [B, M]."""

    tokens: Tensor
    embedding: Tensor

    def __init__(self, clip: Clip, features: int, generator: torch.Generator) -> None:
        super().__init__()
        of_tokens = round(TOKENS_SHARE * features)
        width = next(weight.shape[1] for name, weight in clip.image.named_parameters() if name.endswith(ADAPTED))
        tokens = torch.randn(width, of_tokens, generator=generator)
        embedding = torch.randn(clip.embed_dim, features - of_tokens, generator=generator)
        self.register_buffer("tokens", tokens.to(clip.device))
        self.register_buffer("embedding", embedding.to(clip.device))

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
    centred: Tensor
    """The class means minus the centre, [C, M]."""
    factor: Tensor
    """The lower Cholesky factor of scatter plus prior, [M, M]."""
    rows: Tensor
    """(scatter + prior)^-1 of the centred means, [C, M]."""


def leave_one_out(solved: Solved, features: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Score learned images as the discriminant would had each of them alone not been learned.

    features float32 [n, M], labels int64 [n], counts [C] of images per class, at least 2 in those of `labels` ->
    [n, C], up to a constant per row. The scatter loses a matrix of rank one, so that its inverse follows from the
    whole one's (Sherman and Morrison); centre and prior stay.
    """
    at = torch.arange(len(labels), device=labels.device)
    centred = features - solved.centre
    residual = centred - solved.centred[labels]
    lost = counts[labels] / (counts[labels] - 1)
    inverse = torch.cholesky_solve(residual.T, solved.factor).T
    grown = 1 - lost * (residual * inverse).sum(1)
    # squared distances to all means, by the whole scatter; up to a constant per row
    own = inverse + solved.rows[labels]
    distance = (solved.centred * solved.rows).sum(1) - 2 * centred @ solved.rows.T + (centred * own).sum(1)[:, None]
    along = (inverse * centred).sum(1)[:, None] - inverse @ solved.centred.T
    distance = distance + (lost / grown)[:, None] * along.square()
    # the own class's mean moves away as well
    distance[at, labels] = lost.square() * (residual * inverse).sum(1) / grown
    return -solved.images / 2 * distance


class Discriminant(TowerWithHead):
    """Predicts softmax(random features @ rows + bias + embedding @ names); the scales are in the rows and names."""

    rows: Tensor
    names: Tensor
    bias: Tensor
    centre: Tensor

    def __init__(
        self,
        tower: nn.Module,
        classes: tuple[str, ...],
        names: Tensor,
        rows: Tensor,
        bias: Tensor,
        centre: Tensor,
        random: RandomFeatures,
    ) -> None:
        """Take names [C, D], rows [C, M], bias [C] and centre [M]."""
        super().__init__(tower, classes)
        self._rows("names", names)
        self._rows("rows", rows)
        self._rows("bias", bias)
        self.register_buffer("centre", centre.clone())
        self.random = random

    def from_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        embedding = F.normalize(self.tower(tokens).float(), dim=-1)
        features = self.random(tokens, embedding) - self.centre
        scores = features @ self.rows.T + self.bias + embedding @ self.names.T
        logits = torch.log_softmax(scores, dim=-1)
        return embedding, logits, logits.exp()
