"""Fronts in the plane of two losses, the area that they dominate, and bootstrap intervals over seeds.

Both coordinates are losses: less is better. A point dominates another if it is no worse in both and better in one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

import numpy as np


RESAMPLES = 10_000
Point = tuple[float, float]
Interval = dict[str, float | None]


def front(points: Sequence[Point]) -> list[int]:
    """Places of the points that no other dominates, by their first coordinate.

    Args:
        points (`Sequence[tuple[float, float]]`): Those that are not finite are left out; of equal ones the first
            stays.

    Returns:
        `list[int]`: Ascending in the first coordinate, and so descending in the second.
    """
    found: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if all(map(math.isfinite, points[index])) and (not found or points[index][1] < points[found[-1]][1]):
            found.append(index)
    return found


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Area between a front and a reference point: what some point of the front is better than, in both coordinates.

    Args:
        points (`Sequence[tuple[float, float]]`): Dominated ones change nothing.
        reference (`tuple[float, float]`): Points that are not better in both add nothing.

    Returns:
        `float`: In squared units; 0 if no point counts.
    """
    inside = [point for point in points if point[0] < reference[0] and point[1] < reference[1]]
    area, height = 0.0, reference[1]
    for index in front(inside):
        x, y = inside[index]
        area += (reference[0] - x) * (height - y)
        height = y
    return area


def second_at(points: Sequence[Point], start: Point, level: float) -> float | None:
    """The second coordinate where a front reaches a level of the first, on straight lines between its points.

    Args:
        points (`Sequence[tuple[float, float]]`): Of one method.
        start (`tuple[float, float]`): Where every method begins, the base model: the front's other end.
        level (`float`): At most the first coordinate of `start`.

    Returns:
        `float` or `None`: `None` where no point goes so far. Nothing is extrapolated.
    """
    better = [point for point in points if point[0] < start[0]]
    path = [start, *(better[index] for index in reversed(front(better)))]  # descending in the first coordinate
    for (x, y), (next_x, next_y) in pairwise(path):
        if next_x <= level <= x:
            return y + (next_y - y) * (x - level) / (x - next_x)
    return None


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean and 95 % percentile bootstrap interval.

    Args:
        values (`Sequence[float]`): One per seed.
        seed (`int`, *optional*, defaults to 0): Of the resampling; the same values give the same interval.

    Returns:
        `dict[str, float | None]`: `mean`, `low` and `high`; all `None` if a value is not finite or there is none, the
        last two for one value.
    """
    if not values or not all(map(math.isfinite, values)):
        return {"mean": None, "low": None, "high": None}
    if len(values) == 1:
        return {"mean": values[0], "low": None, "high": None}
    means = np.asarray(values)[_draws(len(values), seed)].mean(1)
    low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return {"mean": fmean(values), "low": low, "high": high}


def ratio_interval(values: Sequence[float], others: Sequence[float], seed: int = 0) -> Interval:
    """Ratio of two means with its 95 % percentile bootstrap interval, seeds resampled in pairs.

    Args:
        values (`Sequence[float]`): One per seed.
        others (`Sequence[float]`): Of the same seeds, below the line.
        seed (`int`, *optional*, defaults to 0): Of the resampling.

    Returns:
        `dict[str, float | None]`: As from [`interval`]; without bounds where a mean below the line may be 0 or less,
        and all `None` where it is.
    """
    pairs = np.array(list(zip(values, others, strict=True))).reshape(-1, 2)
    if not len(pairs) or not np.isfinite(pairs).all() or pairs[:, 1].mean() <= 0:
        return {"mean": None, "low": None, "high": None}
    ratio = float(pairs[:, 0].mean() / pairs[:, 1].mean())
    means = pairs[_draws(len(pairs), seed)].mean(1)  # (resamples, 2)
    if len(pairs) == 1 or (means[:, 1] <= 0).any():
        return {"mean": ratio, "low": None, "high": None}
    low, high = np.quantile(means[:, 0] / means[:, 1], (0.025, 0.975)).tolist()
    return {"mean": ratio, "low": low, "high": high}


def show(cell: Interval, spec: str) -> str:
    """An interval as text, its numbers in the format `spec`."""
    if cell["mean"] is None:
        return "–"
    text = format(cell["mean"], spec)
    if cell["low"] is None or cell["high"] is None:
        return text
    return f"{text} [{cell['low']:{spec}}, {cell['high']:{spec}}]"


def _draws(count: int, seed: int) -> np.ndarray:
    """Places of the values in every resample, shape (resamples, count)."""
    return np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
