"""Gap statistics and the drift rules, against the definitions written as loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from agent.model import gap
from agent.values import GapStatistics


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_statistics_are_the_definitions_spelled_out():
    images, names, labels = unit(7, 5), unit(3, 5, seed=1), torch.tensor([0, 0, 0, 0, 1, 1, 2])
    positive = sum(float(images[i] @ names[labels[i]]) for i in range(7)) / 7
    negative = sum(sum(float(images[i] @ names[c]) for c in range(3) if c != labels[i]) / 2 for i in range(7)) / 7
    paired = torch.stack([names[label] for label in labels]).mean(0)
    got = gap.statistics(images, names, labels)
    assert got.positive == pytest.approx(positive, abs=1e-6)
    assert got.negative == pytest.approx(negative, abs=1e-6)
    assert got.centroid == pytest.approx(float((images.mean(0) - paired).norm()), abs=1e-6)


def test_one_name_has_no_negative_and_no_drift():
    got = gap.statistics(unit(4, 5), unit(1, 5), torch.zeros(4, dtype=torch.int64))
    assert got.negative is None
    assert gap.drift(got, got, "negative") is None


def test_drift_is_relative_to_what_was_asked_for():
    untouched = GapStatistics(positive=0.30, negative=-0.02, centroid=0.7)
    now = GapStatistics(positive=0.35, negative=0.02, centroid=0.6)
    assert gap.drift(now, untouched, "negative") == pytest.approx(2.0)  # ill-conditioned near zero, as the paper has it
    assert gap.drift(now, untouched, "separation") == pytest.approx(0.04 / 0.32)


@pytest.mark.parametrize(
    ("drifts", "epochs"),
    [
        ([0.2], 1),  # the first epoch already violates: one epoch all the same
        ([0.05, 0.2], 1),
        ([0.01, 0.05, 0.11], 2),
        ([0.01, 0.05], None),
        ([None, None], None),
        ([0.05, math.inf], 1),
    ],
)
def test_the_papers_rule_counts_the_epochs_before_the_violating_one(drifts, epochs):
    assert gap.paper_epochs(drifts, 0.1) == epochs
