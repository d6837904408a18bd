"""Metrics of probabilities against brute force, with ties and edges of bins, and what they refuse."""

import math

import numpy as np
import pytest
import torch

from kalman_peft.uncertainty_metrics import (
    accuracy,
    auroc,
    brier_score,
    error_auroc,
    expected_calibration_error,
    negative_log_likelihood,
    ood_auroc,
    uncertainty,
    uncertainty_metrics,
)


def make(n=200, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), n)
    return p, rng.integers(0, classes, n)


def brute_force_auroc(positive, negative):
    pairs = [(a > b) + 0.5 * (a == b) for a in positive for b in negative]
    return sum(pairs) / len(pairs)


def brute_force_ece(p, y, bins):
    total = 0.0
    for b in range(1, bins + 1):
        rows = [i for i in range(len(y)) if (b - 1) / bins < max(p[i]) <= b / bins]
        if rows:
            right = sum(int(np.argmax(p[i])) == y[i] for i in rows) / len(rows)
            sure = sum(max(p[i]) for i in rows) / len(rows)
            total += len(rows) / len(y) * abs(right - sure)
    return total


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_brute_force(seed):
    p, y = make(seed=seed)
    n = len(y)
    assert negative_log_likelihood(p, y) == pytest.approx(sum(-math.log(p[i, y[i]]) for i in range(n)) / n)
    expected = sum((p[i, c] - (c == y[i])) ** 2 for i in range(n) for c in range(4)) / n
    assert brier_score(p, y) == pytest.approx(expected)
    assert accuracy(p, y) == sum(int(np.argmax(p[i])) == y[i] for i in range(n)) / n
    for bins in (1, 2, 15):
        assert expected_calibration_error(p, y, bins) == pytest.approx(brute_force_ece(p, y, bins))
    right = [int(np.argmax(p[i])) == y[i] for i in range(n)]
    scores = [1 - max(row) for row in p]
    wrong, good = ([s for s, r in zip(scores, right, strict=True) if r == kind] for kind in (False, True))
    assert error_auroc(p, y) == pytest.approx(brute_force_auroc(wrong, good))
    other, _ = make(50, seed=seed + 10)
    entropy = [[-sum(v * math.log(v) for v in row) for row in table] for table in (other, p)]
    assert ood_auroc(p, other) == pytest.approx(brute_force_auroc(*entropy))
    found = uncertainty_metrics(torch.tensor(p), torch.tensor(y), torch.tensor(other))
    assert found == pytest.approx(
        {
            "nll": negative_log_likelihood(p, y), "ece": expected_calibration_error(p, y), "brier": brier_score(p, y),
            "accuracy": accuracy(p, y), "auroc_errors": error_auroc(p, y), "auroc_ood": ood_auroc(p, other),
        }
    )  # fmt: skip
    assert "auroc_ood" not in uncertainty_metrics(p, y)


def test_ties_count_half():
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 5, 40), rng.integers(0, 4, 60)
    assert auroc(positive, negative) == pytest.approx(brute_force_auroc(positive, negative))
    assert auroc([1.0, 1.0], [1.0]) == 0.5
    assert auroc([2.0, 3.0], [0.0, 1.0]) == 1.0 and auroc([0.0], [1.0, math.inf]) == 0.0
    assert math.isnan(auroc([], [1.0]))


def test_confidences_at_the_edge_of_a_bin_are_in_the_lower_one():
    p = np.array([[0.6, 0.4], [0.6, 0.4], [0.8, 0.2], [1.0, 0.0]])
    y = np.array([0, 1, 0, 1])
    assert expected_calibration_error(p, y, 5) == pytest.approx(brute_force_ece(p, y, 5))
    assert expected_calibration_error(p, y, 5) == pytest.approx(0.5 * 0.1 + 0.25 * 0.2 + 0.25 * 1.0)


def test_values_known_by_hand():
    p, y = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([0, 1])
    assert negative_log_likelihood(p, y) == pytest.approx(math.log(2) / 2)
    assert brier_score(p, y) == pytest.approx(0.25)
    assert accuracy(p, y) == 0.5  # of several largest ones the first counts
    assert negative_log_likelihood(p, np.array([1, 1])) == math.inf
    assert uncertainty(p).tolist() == pytest.approx([0.0, math.log(2)])
    assert uncertainty(p, "confidence").tolist() == pytest.approx([0.0, 0.5])
    assert math.isnan(error_auroc(np.array([[0.9, 0.1]]), np.array([0])))


def test_raises_when_probabilities_or_labels_are_none():
    p, y = make(5)
    bad = p.copy()
    bad[0, 0] = math.nan
    for given, labels, match in (
        (p[:0], y[:0], "shape"),
        (p[:, :1], y, "shape"),
        (bad, y, "NaN"),
        (p - 0.5, y, "negative"),
        (2 * p, y, "sum to one"),
        (p, y[:3], "5 whole numbers"),
        (p, y.astype(float), "whole numbers"),
        (p, y + 3, "4 classes"),
        (p, y - 4, "4 classes"),
    ):
        with pytest.raises(ValueError, match=match):
            negative_log_likelihood(given, labels)
    with pytest.raises(ValueError, match="bins"):
        expected_calibration_error(p, y, 0)
    with pytest.raises(ValueError, match="positive must be"):
        auroc([math.nan], [1.0])
    with pytest.raises(ValueError, match="kind must be"):
        uncertainty(p, "variance")
