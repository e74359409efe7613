"""The scores are those of the published formulas, compared with computations by hand."""

import math

import pytest

from agent.scoring.formulas import (
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    last_accuracy,
    retention,
)

FULL = [
    [0.9, 0.4, 0.2],
    [0.7, 0.8, 0.5],
    [0.6, 0.9, 0.7],
]
"""Accuracies of three tasks, by hand: rows after task 1, 2, 3; columns test images of task 1, 2, 3."""

SEEN = [[0.9, None, None], [0.7, 0.8, None], [0.6, 0.9, 0.7]]


@pytest.mark.parametrize("matrix", [FULL, SEEN, [[0.9], [0.7, 0.8], [0.6, 0.9, 0.7]]])
def test_forgetting_and_backward_transfer_equal_the_hand_computation(matrix: list) -> None:
    # F = ((max(0.9, 0.7) - 0.6) + (0.8 - 0.9)) / 2: the maximum ends before the last row, the last task has no part
    assert forgetting(matrix) == pytest.approx((0.3 - 0.1) / 2)
    # BWT = ((0.6 - 0.9) + (0.9 - 0.8)) / 2
    assert backward_transfer(matrix) == pytest.approx((-0.3 + 0.1) / 2)


def test_forgetting_takes_the_best_row_not_the_diagonal() -> None:
    matrix = [[0.5, None, None], [0.8, 0.6, None], [0.4, 0.6, 0.9]]
    assert forgetting(matrix) == pytest.approx((0.4 + 0.0) / 2)
    assert backward_transfer(matrix) == pytest.approx((-0.1 + 0.0) / 2)


def test_average_and_last_equal_the_hand_computation() -> None:
    assert average_incremental_accuracy([0.9, 0.75, 0.6]) == pytest.approx(0.75)
    assert last_accuracy([0.9, 0.75, 0.6]) == 0.6


def test_retention_is_the_mean_of_the_ratios() -> None:
    assert retention([(0.6, 0.8), (0.5, 0.4)]) == pytest.approx((0.75 + 1.25) / 2)
    assert retention([(0.6, 0.8), (0.5, 0.0), (None, None)]) == pytest.approx(0.75)
    assert retention([]) is None


def test_with_one_task_what_compares_tasks_is_undefined() -> None:
    assert forgetting([[0.9]]) is None
    assert backward_transfer([[0.9]]) is None
    assert average_incremental_accuracy([0.9]) == last_accuracy([0.9]) == 0.9


def test_without_a_task_everything_is_undefined() -> None:
    assert forgetting([]) is backward_transfer([]) is None
    assert average_incremental_accuracy([]) is last_accuracy([]) is None


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_task_without_test_images_is_left_out_of_every_mean(missing: float | None) -> None:
    # given a second task that brought no test images
    matrix = [[0.9, missing, missing], [0.7, missing, missing], [0.6, missing, 0.7]]
    assert forgetting(matrix) == pytest.approx(0.3)
    assert backward_transfer(matrix) == pytest.approx(-0.3)
    assert average_incremental_accuracy([0.9, missing, 0.6]) == pytest.approx(0.75)
    assert last_accuracy([0.9, missing]) is None


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="row 0 of the matrix has 3 entries, expected at most 1"):
        forgetting([[0.1, 0.2, 0.3]])
