"""The formulas behind every score: pure functions of the accuracy matrix.

An agent's report keeps only the newest rows of the matrix, so it computes forgetting and backward transfer by
`mean_change` from the best and the first accuracy of each task; tests hold that equal to the whole formulas here.

The accuracy matrix: `matrix[t][i]` is the accuracy (0 to 1) on the test images of task i's classes after the update of
task t (both from 0 here, from 1 in the formulas); None or NaN where task i had no test images or was not there yet. A
class belongs to the task that brought it first. T is the number of tasks.

Where a value is undefined it is left out and the divisor is the number of values that are there: with a full matrix
this is exactly the published formula. A metric without any value is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

Matrix = Sequence[Sequence[float | None]]
"""The accuracy matrix by rows; rows may be shorter than T, or empty."""


def average_incremental_accuracy(
    accuracies: Sequence[float | None], earlier: int = 0, earlier_sum: float = 0.0
) -> float | None:
    """Compute Avg = (1/T) sum_t A_t; A_t is the sample-weighted accuracy over all classes seen after task t.

    earlier: number of tasks before these that have an accuracy, with their sum.
    """
    values = _row(accuracies)
    there = values[~np.isnan(values)]
    count = there.size + earlier
    return (float(there.sum()) + earlier_sum) / count if count else None


def last_accuracy(accuracies: Sequence[float | None]) -> float | None:
    """Compute Last = A_T, the accuracy over all classes after the last task."""
    return _mean(_row(accuracies[-1:]))


def forgetting(matrix: Matrix) -> float | None:
    """Compute the forgetting of Chaudhry et al.: F = 1/(T-1) sum_{i<T} ( max_{i<=t<T} a[t][i] - a[T][i] ). None when T
    is 1.

    Negative where the last task helped the earlier ones.
    """
    a = _square(matrix)
    drops = []
    for i in range(len(a) - 1):
        earlier = a[i:-1, i]
        if not np.isnan(earlier).all():
            drops.append(np.nanmax(earlier) - a[-1, i])
    return _mean(np.array(drops))


def backward_transfer(matrix: Matrix) -> float | None:
    """Compute the backward transfer: BWT = 1/(T-1) sum_{i<T} ( a[T][i] - a[i][i] ). None when T is 1."""
    a = _square(matrix)
    return _mean(a[-1:, :-1].ravel() - np.diagonal(a)[:-1]) if len(a) else None


def retention(pairs: Iterable[tuple[float | None, float | None]]) -> float | None:
    """Compute the zero-shot retention: the mean, over sets of never learned classes, of accuracy now / the untouched
    model's.

    pairs: (now, untouched) of each set. A set on which the untouched model is never right is left out. None without
    one.
    """
    return _mean(np.array([now / then for now, then in pairs if now is not None and then]))


def mean_change(before: Sequence[float | None], now: Sequence[float | None]) -> float | None:
    """Give the mean of now - before over the tasks that both have a value for; None when there is none."""
    length = min(len(before), len(now))
    return _mean(_row(now[:length]) - _row(before[:length]))


def extended(matrix: Matrix, row: Sequence[float | None], keep: int) -> tuple[tuple[float | None, ...], ...]:
    """Extend the matrix after one more task: `row` below it, and None in the new column of the rows above.

    Only the newest `keep` rows have entries, the others are empty.
    """
    longer = [(*old, *[None] * (len(row) - len(old))) if old else () for old in matrix]
    dropped = max(0, len(longer) + 1 - keep)
    return (*[()] * dropped, *longer[dropped:], tuple(row))


def _row(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _square(matrix: Matrix) -> np.ndarray:
    """Make it float [T, T]; rows shorter than T are continued with NaN."""
    a = np.full((len(matrix), len(matrix)), np.nan)
    for t, row in enumerate(matrix):
        if len(row) > len(matrix):
            raise ValueError(
                f"row {t} of the matrix has {len(row)} entries, expected at most {len(matrix)}, one per task"
            )
        a[t, : len(row)] = _row(row)
    return a


def _mean(values: np.ndarray) -> float | None:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else None
