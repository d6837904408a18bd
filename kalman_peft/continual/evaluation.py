"""Scores of a [`ContinualLearner`] on its evaluation sets, and their matrix."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


Scores = Mapping[str, Mapping[str, float]]
# Of evaluations, what tells of the machine and not of the model.
_TIMES = ("_runtime", "_per_second", "_preparation_time")


def evaluate(trainer: Any, dataset: Any) -> dict[str, float]:
    """All metrics of the Trainer but the times.

    Args:
        trainer (`Trainer`): New, with the model.
        dataset (`Dataset`): To evaluate on.

    Returns:
        `dict[str, float]`: "eval_loss" and what `compute_metrics` gives.
    """
    found = trainer.evaluate(dataset)
    return {k: float(v) for k, v in found.items() if not k.endswith(_TIMES) and isinstance(v, int | float)}


def metric_of(rows: Sequence[Scores], metric: str | None) -> str:
    """The metric that counts.

    Args:
        rows (`Sequence[Scores]`): Scores by task's name, one mapping per moment.
        metric (`str`, *optional*): That of the user.

    Returns:
        `str`: Its name.

    Raises:
        ValueError: Nothing was measured, or not that.
    """
    found = {name for row in rows for scores in row.values() for name in scores}
    if not found:
        raise ValueError("Nothing was measured; give eval_datasets=, or learn(..., eval_dataset=).")
    metric = metric or ("eval_accuracy" if "eval_accuracy" in found else "eval_loss")
    if metric not in found:
        raise ValueError(f"metric={metric!r} was not measured; there are {sorted(found)}.")
    return metric


def score_matrix(rows: Sequence[Scores], names: Sequence[str], metric: str) -> tuple[np.ndarray, list[str]]:
    """R[i, j] of one metric.

    Args:
        rows (`Sequence[Scores]`): Before any task, and after each.
        names (`Sequence[str]`): Of the tasks in order.
        metric (`str`): See `metric_of`.

    Returns:
        `tuple[np.ndarray, list[str]]`: Shape (T + 1, T), NaN where not measured; and the names.

    Raises:
        ValueError: No task was measured, as where evaluation sets have other names than the tasks.
    """
    measured = sorted({name for row in rows for name in row})
    if not set(measured) & set(names):
        raise ValueError(
            f"None of the tasks {list(names)} was measured; eval_datasets= has {measured}. Name them alike."
        )
    matrix = [[row.get(name, {}).get(metric, np.nan) for name in names] for row in rows]
    return np.array(matrix, dtype=np.float64), list(names)
