"""How good predicted probabilities are: likelihood, Brier score, calibration, detection by an uncertainty score."""

import math
from typing import Any

import numpy as np


BINS = 15
Array = Any  # what np.asarray takes; tensors too


def negative_log_likelihood(probabilities: Array, labels: Array) -> float:
    """Mean of -log p of the true class, nats.

    Args:
        probabilities (`np.ndarray`): (n, C), rows that sum to one.
        labels (`np.ndarray`): (n,), whole numbers below C.

    Returns:
        `float`: Infinite where a true class has probability zero.
    """
    p, y = _checked(probabilities, labels)
    with np.errstate(divide="ignore"):
        return float(-np.log(p[np.arange(len(y)), y]).mean())


def brier_score(probabilities: Array, labels: Array) -> float:
    """Mean over rows of sum_c (p_c - 1[c is true])^2, between 0 and 2 (Brier, 1950).

    Args:
        probabilities (`np.ndarray`): (n, C).
        labels (`np.ndarray`): (n,).

    Returns:
        `float`: The score; less is better.
    """
    p, y = _checked(probabilities, labels)
    return float(np.square(p - np.eye(p.shape[1])[y]).sum(1).mean())


def accuracy(probabilities: Array, labels: Array) -> float:
    """Share of rows whose most probable class (the first of several) is the true one.

    Args:
        probabilities (`np.ndarray`): (n, C).
        labels (`np.ndarray`): (n,).

    Returns:
        `float`: Between 0 and 1.
    """
    p, y = _checked(probabilities, labels)
    return float((p.argmax(1) == y).mean())


def expected_calibration_error(probabilities: Array, labels: Array, bins: int = BINS) -> float:
    """ECE = sum_b n_b / n |accuracy_b - confidence_b| (Guo, Pleiss, Sun and Weinberger, 2017).

    The confidence of a row is its largest probability. Bins are of equal width over [0, 1], each without its lower
    end: ((b - 1) / bins, b / bins].

    Args:
        probabilities (`np.ndarray`): (n, C).
        labels (`np.ndarray`): (n,).
        bins (`int`, *optional*, defaults to 15): Number of bins.

    Returns:
        `float`: Between 0 and 1; less is better.

    Raises:
        ValueError: `bins` is below 1, or the probabilities or labels are not usable.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}.")
    p, y = _checked(probabilities, labels)
    confidence, right = p.max(1), p.argmax(1) == y
    # Edges as k / bins, so that a confidence of just that is below its edge whatever bins is.
    place = np.searchsorted(np.arange(bins + 1) / bins, confidence, side="left")
    place = np.clip(place, 1, bins) - 1
    gaps = np.bincount(place, right - confidence, minlength=bins)  # n_b times the difference of the means
    return float(np.abs(gaps).sum() / len(y))


def auroc(positive: Array, negative: Array) -> float:
    """Probability that a positive's score is above a negative's, ties counting half; by midranks.

    Args:
        positive (`np.ndarray`): Scores of what is to be detected, (n,); larger means more suspect.
        negative (`np.ndarray`): Scores of the rest, (m,).

    Returns:
        `float`: Between 0 and 1; 0.5 is chance. NaN if either is empty.

    Raises:
        ValueError: A score is NaN, or not a list of numbers.
    """
    scores = [np.asarray(given, dtype=np.float64) for given in (positive, negative)]
    for name, given in zip(("positive", "negative"), scores, strict=True):
        if given.ndim != 1 or np.isnan(given).any():
            raise ValueError(f"{name} must be scores of shape (n,) without NaN, got shape {given.shape}.")
    n, m = map(len, scores)
    if not n or not m:
        return math.nan
    _, place, counts = np.unique(np.concatenate(scores), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # from 1; the mean rank of those that tie
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def uncertainty(probabilities: Array, kind: str = "entropy") -> np.ndarray:
    """A score per row that is larger where the prediction is less certain.

    Args:
        probabilities (`np.ndarray`): (n, C).
        kind (`str`, *optional*, defaults to `"entropy"`): "entropy" (nats), or "confidence" (1 - the largest).

    Returns:
        `np.ndarray`: (n,).

    Raises:
        ValueError: An unknown kind, or probabilities that are none.
    """
    p = check_probabilities(probabilities)
    if kind == "entropy":
        return -(p * np.log(np.where(p > 0, p, 1.0))).sum(1)
    if kind == "confidence":
        return 1 - p.max(1)
    raise ValueError(f"kind must be 'entropy' or 'confidence', got {kind!r}.")


def ood_auroc(inside: Array, outside: Array, kind: str = "entropy") -> float:
    """AUROC of telling data of another kind from the task's own by the uncertainty of the prediction.

    Args:
        inside (`np.ndarray`): Probabilities of the task's own data, (n, C).
        outside (`np.ndarray`): Of the other data, (m, C).
        kind (`str`, *optional*, defaults to `"entropy"`): See [`uncertainty`].

    Returns:
        `float`: See [`auroc`].
    """
    return auroc(uncertainty(outside, kind), uncertainty(inside, kind))


def error_auroc(probabilities: Array, labels: Array, kind: str = "confidence") -> float:
    """AUROC of telling wrong predictions from right ones by their uncertainty.

    Args:
        probabilities (`np.ndarray`): (n, C).
        labels (`np.ndarray`): (n,).
        kind (`str`, *optional*, defaults to `"confidence"`): See [`uncertainty`].

    Returns:
        `float`: See [`auroc`]; NaN where all are right, or all wrong.
    """
    p, y = _checked(probabilities, labels)
    wrong, scores = p.argmax(1) != y, uncertainty(p, kind)
    return auroc(scores[wrong], scores[~wrong])


def uncertainty_metrics(
    probabilities: Array, labels: Array, outside: Array | None = None, bins: int = BINS
) -> dict[str, float]:
    """All of the above.

    Args:
        probabilities (`np.ndarray`): (n, C).
        labels (`np.ndarray`): (n,).
        outside (`np.ndarray`, *optional*): Probabilities of data of another kind, (m, C).
        bins (`int`, *optional*, defaults to 15): Of the calibration error.

    Returns:
        `dict[str, float]`: "nll", "ece", "brier", "accuracy", "auroc_errors", and with `outside` "auroc_ood".
    """
    found = {
        "nll": negative_log_likelihood(probabilities, labels),
        "ece": expected_calibration_error(probabilities, labels, bins),
        "brier": brier_score(probabilities, labels),
        "accuracy": accuracy(probabilities, labels),
        "auroc_errors": error_auroc(probabilities, labels),
    }
    if outside is not None:
        found["auroc_ood"] = ood_auroc(probabilities, outside)
    return found


def check_probabilities(probabilities: Array) -> np.ndarray:
    """As float64.

    Args:
        probabilities (`np.ndarray`): (n, C).

    Returns:
        `np.ndarray`: (n, C), n >= 1, C >= 2.

    Raises:
        ValueError: Of another shape, negative or NaN, or rows that do not sum to one (to 1e-3).
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or not len(p) or p.shape[1] < 2:
        raise ValueError(f"probabilities must be of shape (n >= 1, C >= 2), got {p.shape}.")
    if not np.isfinite(p).all() or (p < 0).any():
        raise ValueError("probabilities contain NaN, Inf or a negative number.")
    if np.abs(p.sum(1) - 1).max() > 1e-3:
        raise ValueError("Rows of probabilities must sum to one; pass them through softmax.")
    return p


def _checked(probabilities: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
    p, y = check_probabilities(probabilities), np.asarray(labels)
    if y.shape != (len(p),) or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"labels must be {len(p)} whole numbers, got {y.dtype} of shape {y.shape}.")
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(f"labels go from {y.min()} to {y.max()}, for {p.shape[1]} classes.")
    return p, y
