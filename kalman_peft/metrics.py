"""Metrics of learning task after task, from the matrix of scores R[i, j]: on task j after i tasks have been learnt.

Row 0 is before any task, row i after task i; columns are the tasks in the order of learning, so that task j (from 1)
is column j - 1 here. A score that was not measured is NaN, and the means are over the tasks for which all that is
needed was measured. With T tasks learnt R has T + 1 rows, and T columns or more (tasks to come).
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np


Matrix = Any  # what np.asarray takes


def average_accuracy(scores: Matrix) -> float:
    """ACC = 1/T sum_j R[T, j], GEM (Lopez-Paz and Ranzato, 2017); for losses the average loss.

    Args:
        scores (`np.ndarray`): R, shape (T + 1, >= T).

    Returns:
        `float`: In units of the scores; NaN if nothing was measured.
    """
    matrix = check_matrix(scores)
    learnt = len(matrix) - 1
    return _mean(matrix[learnt, :learnt])


def learning_accuracy(scores: Matrix) -> float:
    """LA = 1/T sum_j R[j, j], MER (Riemer et al., 2019): how well a task is known just after it was learnt.

    Args:
        scores (`np.ndarray`): R, shape (T + 1, >= T).

    Returns:
        `float`: In units of the scores; NaN if nothing was measured.
    """
    matrix = check_matrix(scores)
    return _mean(_after_learning(matrix))


def backward_transfer(scores: Matrix, higher_is_better: bool = True) -> float:
    """BWT = 1/(T-1) sum_{j<T} R[T, j] - R[j, j], GEM (2017): what later tasks did to earlier ones.

    Args:
        scores (`np.ndarray`): R, shape (T + 1, >= T).
        higher_is_better (`bool`, *optional*, defaults to `True`): False for losses.

    Returns:
        `float`: Positive where earlier tasks improved; NaN for fewer than two tasks.
    """
    matrix = _as_gains(scores, higher_is_better)
    learnt = len(matrix) - 1
    return _mean((matrix[learnt, :learnt] - _after_learning(matrix))[:-1])


def forward_transfer(scores: Matrix, higher_is_better: bool = True) -> float:
    """FWT = 1/(T-1) sum_{j>1} R[j-1, j] - R[0, j], GEM (2017): what earlier tasks did to one not yet learnt.

    GEM's reference is the score at random initialisation; here it is that before any task, R[0, j].

    Args:
        scores (`np.ndarray`): R, shape (T + 1, >= T).
        higher_is_better (`bool`, *optional*, defaults to `True`): False for losses.

    Returns:
        `float`: Positive where tasks were known better than at the start; NaN where that was not measured.
    """
    matrix = _as_gains(scores, higher_is_better)
    return _mean(matrix[j - 1, j - 1] - matrix[0, j - 1] for j in range(2, len(matrix)))


def forgetting(scores: Matrix, higher_is_better: bool = True) -> float:
    """F = 1/(T-1) sum_{j<T} max_{1<=l<T} R[l, j] - R[T, j], Riemannian Walk (Chaudhry et al., 2018).

    Args:
        scores (`np.ndarray`): R, shape (T + 1, >= T).
        higher_is_better (`bool`, *optional*, defaults to `True`): False for losses.

    Returns:
        `float`: Positive where the best that was ever known was lost; NaN for fewer than two tasks.
    """
    matrix = _as_gains(scores, higher_is_better)
    learnt = len(matrix) - 1
    found = []
    for task in range(learnt - 1):
        before = matrix[1:learnt, task]
        before = before[~np.isnan(before)]
        found.append(before.max() - matrix[learnt, task] if len(before) else math.nan)
    return _mean(found)


def continual_metrics(scores: Matrix, higher_is_better: bool = True) -> dict[str, float]:
    """All of the above.

    Args:
        scores (`np.ndarray`): R, shape (T + 1, >= T), T >= 1.
        higher_is_better (`bool`, *optional*, defaults to `True`): False for losses.

    Returns:
        `dict[str, float]`: "average_accuracy" and "learning_accuracy" ("average_loss" and "learning_loss" for
        losses), "forgetting", "backward_transfer", "forward_transfer"; NaN where not measured.
    """
    kind = "accuracy" if higher_is_better else "loss"
    return {
        f"average_{kind}": average_accuracy(scores),
        f"learning_{kind}": learning_accuracy(scores),
        "forgetting": forgetting(scores, higher_is_better),
        "backward_transfer": backward_transfer(scores, higher_is_better),
        "forward_transfer": forward_transfer(scores, higher_is_better),
    }


def check_matrix(scores: Matrix) -> np.ndarray:
    """R as float64.

    Args:
        scores (`np.ndarray`): R.

    Returns:
        `np.ndarray`: Shape (T + 1, >= T).

    Raises:
        ValueError: Not of that shape, infinite, or without any task learnt.
    """
    matrix = np.asarray(scores, dtype=np.float64)
    if matrix.ndim != 2 or len(matrix) < 2 or matrix.shape[1] < len(matrix) - 1:
        raise ValueError(
            f"scores has shape {matrix.shape}; expected a row before any task and one after each, and a column for "
            "each task: (T + 1, >= T) with T >= 1."
        )
    if np.isinf(matrix).any():
        raise ValueError("scores holds an infinite value; use NaN for what was not measured.")
    return matrix


def _as_gains(scores: Matrix, higher_is_better: bool) -> np.ndarray:
    return check_matrix(scores) if higher_is_better else -check_matrix(scores)


def _after_learning(matrix: np.ndarray) -> np.ndarray:
    """R[j, j] for j = 1 ... T."""
    return np.diagonal(matrix[1:]).copy()


def _mean(values: Iterable[float]) -> float:
    measured = [float(value) for value in values if not math.isnan(value)]
    return sum(measured) / len(measured) if measured else math.nan
