"""The discriminant where classes have few images among others of many: what is noise in a mean does not count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agent.methods.discriminant import Solved, Statistics

WIDTH = 60
MEANS = 0.6 * torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(100))
DEVIATIONS = torch.linspace(0.2, 2, WIDTH)
"""Of the scatter within every class, in each direction."""


def drawn(counts: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian classes of these numbers of images: features [N, WIDTH], labels [N]."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    noise = torch.randn(len(labels), WIDTH, generator=torch.Generator().manual_seed(seed))
    return MEANS[labels] + DEVIATIONS * noise, labels


def solved(counts: list[int], seed: int) -> Solved:
    points, labels = drawn(counts, seed)
    statistics = Statistics(WIDTH, 2, torch.device("cpu"))
    statistics.widen(len(counts))
    statistics.count(points, torch.zeros(len(points), 2), labels)
    return statistics.solve(7)


def lengths(points: Tensor, by: Solved) -> Tensor:
    """Squared, by the inverse of scatter plus prior: [n, WIDTH] -> [n]."""
    return torch.linalg.solve_triangular(by.factor, points.T, upper=False).square().sum(0)


@pytest.mark.parametrize("counts", [[8] * 6, [40] * 6, [200, 100, 50, 20, 3, 1]])
def test_the_noise_is_what_new_images_differ_by_from_their_class(counts):
    expected, found = [], []
    for seed in range(40):
        one = solved(counts, seed)
        points, labels = drawn([50] * 6, seed + 1000)
        found.append(one.noise)
        expected.append(lengths(points - MEANS[labels], one).mean())
    assert torch.stack(found).mean() == pytest.approx(float(torch.stack(expected).mean()), rel=0.15)


@pytest.mark.parametrize("counts", [[1, 1], [2, 1], [2, 2], [3, 1, 1], [5, 5]])
def test_of_a_handful_of_images_the_noise_is_no_more_than_can_be_known(counts):
    noise = torch.stack([solved(counts, seed).noise for seed in range(200)])
    assert noise.isfinite().all() and noise.min() >= 0 and noise.max() < 60
    assert (noise > 0).all() == (max(counts) > 1)


@pytest.mark.parametrize("images", [1, 3, 20])
def test_a_mean_of_few_images_is_in_the_mean_as_long_as_the_true_one(images):
    counts, found, true = [100, 100, 100, 100, 100, images], [], []
    for seed in range(200):
        one = solved(counts, seed)
        found.append(one.norms[5] / one.weights[5].square())
        true.append(lengths(MEANS[5:] - one.centre, one)[0])
    assert torch.stack(found).mean() == pytest.approx(float(torch.stack(true).mean()), rel=0.2)


def test_a_class_of_one_image_moves_the_centre_by_no_more_than_one_image_of_all():
    counts = [100, 100, 100, 100, 100, 1]
    assert torch.allclose(solved(counts, 1).centre, drawn(counts, 1)[0].mean(0), atol=1e-5)
