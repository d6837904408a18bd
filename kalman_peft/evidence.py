"""Strength of the belief and prior precision by type-II maximum likelihood of target data.

Prior N(mean, P^-1), P = lambda N Lambda + delta I, N the labels of the whole run, as the penalty weighs it. Loss of n
observed target labels, per label and to second order at the present weights theta: l + g u + 1/2 u^T H u. With
d = theta - mean and M = P + n H the Gaussian integral over the weights is
    log Z = -n l - 1/2 d^T P d + 1/2 b^T M^-1 b + 1/2 (log det P - log det M),    b = n g + P d.
At a maximum of the posterior b = 0, and this is the evidence of MacKay (1992). Away from it b tells how far the
weights would still go; without it the evidence at the start (d = 0) would ask for an infinite strength. g and H must
be of the same n labels: the noise of a gradient from few labels, taken for that of many, would look like signal.
"""

import math
import warnings
from typing import Any

import torch

from .precision.base import Precision, State, dot


STRENGTHS, PRIOR_PRECISIONS = (1e-3, 1e6), (1e-3, 1e9)
_GRID, _HALVINGS, _LIMIT = 7, 7, 100  # points per axis, refinements of the grid, evaluations in all
_KEPT = 3  # merged precisions held at once: the strengths that neighbouring points share


def log_evidence(
    prior: Precision,
    target: Precision,
    state: State,
    mean: State,
    *,
    num_labels: float,
    strength: float,
    prior_precision: float,
    gradient: State | None = None,
    num_observed: float | None = None,
) -> float:
    """Log marginal likelihood of the target data, up to a constant in strength and prior precision.

    The combined precision is formed by `Precision.merge`: the value is exact where the structure is closed under
    addition (diagonal, dense), and else of that structure's approximation.

    Args:
        prior (`Precision`): Lambda, per source token, in space "adapter".
        target (`Precision`): H, per target label, of the same structure.
        state (`State`): theta.
        mean (`State`): Of the belief.
        num_labels (`float`): N, target labels of the run, per which the strength is counted.
        strength (`float`): lambda > 0.
        prior_precision (`float`): delta > 0.
        gradient (`State`, *optional*):
            g, of the mean target loss at theta. Without it theta is taken as a maximum of the posterior.
        num_observed (`float`, *optional*): n, labels that `target` and `gradient` are of; all N by default.

    Returns:
        `float`: log Z in nats.

    Raises:
        ValueError: Another space than "adapter", two structures, or a number that is not positive.
    """
    if not (strength > 0 and prior_precision > 0):
        raise ValueError(f"strength and prior_precision must be positive, got {strength} and {prior_precision}.")
    evidence = _Evidence(prior, target, state, mean, num_labels, gradient, num_observed)
    return evidence(strength, prior_precision)


def maximise_evidence(
    prior: Precision,
    target: Precision,
    state: State,
    mean: State,
    *,
    num_labels: float,
    gradient: State | None = None,
    num_observed: float | None = None,
    strengths: tuple[float, float] = STRENGTHS,
    prior_precisions: tuple[float, float] = PRIOR_PRECISIONS,
) -> tuple[float, float, float]:
    """Strength and prior precision that maximise [`log_evidence`].

    A search without derivatives in both logarithms: a 7 x 7 grid over the ranges, then pattern search around the best
    point with a mesh that halves; about 100 evaluations, always the same.

    Args:
        prior (`Precision`): See [`log_evidence`].
        target (`Precision`): See [`log_evidence`].
        state (`State`): See [`log_evidence`].
        mean (`State`): See [`log_evidence`].
        num_labels (`float`): See [`log_evidence`].
        gradient (`State`, *optional*): See [`log_evidence`].
        num_observed (`float`, *optional*): See [`log_evidence`].
        strengths (`tuple[float, float]`, *optional*, defaults to `(1e-3, 1e6)`): Range of lambda.
        prior_precisions (`tuple[float, float]`, *optional*, defaults to `(1e-3, 1e9)`): Range of delta.

    Returns:
        `tuple[float, float, float]`: lambda, delta, and log Z there.

    Raises:
        ValueError: Another space than "adapter", two structures, an empty range, or an evidence that is not finite.
    """
    ranges = [
        _log_range("strengths", strengths),
        _log_range("prior_precisions", prior_precisions),
    ]
    evidence = _Evidence(prior, target, state, mean, num_labels, gradient, num_observed)
    best, value = _maximise(lambda x: evidence(math.exp(x[0]), math.exp(x[1])), ranges)
    if not math.isfinite(value):
        raise ValueError(
            f"The evidence is {value} in all of the range; the target curvature or gradient is not finite."
        )
    found = (math.exp(best[0]), math.exp(best[1]))
    for name, x, (low, high) in zip(("strength", "prior precision"), best, ranges, strict=True):
        if high > low and (x <= low or x >= high):
            warnings.warn(
                f"The evidence is largest at the bound {math.exp(x):.3g} of the {name}: the data do not tell it. Give "
                "more target sequences (`source_samples`), or fix the strength.",
                stacklevel=2,
            )
    return *found, value


class _Evidence:
    """log Z as a function of strength and prior precision, with what depends on neither computed once."""

    def __init__(
        self,
        prior: Precision,
        target: Precision,
        state: State,
        mean: State,
        num_labels: float,
        gradient: State | None,
        num_observed: float | None,
    ):
        for name, precision in (("prior", prior), ("target", target)):
            if precision.space != "adapter":
                raise ValueError(
                    f"The {name} is in space {precision.space!r}, whose energy is no Gaussian in A and B, so that it "
                    "has no closed evidence; use space='adapter' (laplace_space='adapter')."
                )
        num_observed = num_labels if num_observed is None else num_observed
        for name, count in (("num_labels", num_labels), ("num_observed", num_observed)):
            if not 0 < count < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {count}.")
        # Large terms cancel: with 5 million weights the float32 evidence is off by thousands of nats.
        prior, target = _wide(prior), _wide(target)
        self.prior, self.target = prior, target
        self.count, self.observed = float(num_labels), float(num_observed)  # N, n
        energy, pull = prior.energy_and_gradient(state, mean)
        self.energy, self.pull = float(energy), pull  # R and Lambda d
        self.offset = {key: state[key].detach().to(x) - mean[key].to(x) for key, x in pull.items()}
        self.distance = float(dot(self.offset, self.offset))
        self.gradient = None if gradient is None else {key: gradient[key].to(x) for key, x in pull.items()}
        self._merged: dict[float, Any] = {}

    def __call__(self, strength: float, prior_precision: float) -> float:
        weight, delta = strength * self.count, prior_precision
        if strength not in self._merged:  # the costly part does not depend on delta
            while len(self._merged) >= _KEPT:
                self._merged.pop(next(iter(self._merged)))
            self._merged[strength] = self.prior.merge(self.target, weight, self.observed)
        merged = self._merged[strength]
        value = -weight * self.energy - delta / 2 * self.distance
        value += (float(self.prior.logdet(delta, weight)) - float(merged.logdet(delta))) / 2
        if self.gradient is not None:
            slope = {
                key: self.observed * g + weight * self.pull[key] + delta * self.offset[key]
                for key, g in self.gradient.items()
            }
            value += float(dot(slope, merged.solve(slope, delta))) / 2
        return value


def _maximise(function: Any, ranges: list[tuple[float, float]]) -> tuple[tuple[float, float], float]:
    """Coarse grid, then pattern search over the eight neighbours on a mesh that halves when none is better."""
    seen: dict[tuple[float, float], float] = {}

    def at(point: tuple[float, float]) -> float:
        if point not in seen:
            value = function(point)
            seen[point] = value if math.isfinite(value) else -math.inf
        return seen[point]

    axes = [[low + (high - low) * i / (_GRID - 1) for i in range(_GRID)] for low, high in ranges]
    best = max(((x, y) for x in axes[0] for y in axes[1]), key=at)
    mesh = [(high - low) / (_GRID - 1) for low, high in ranges]
    halvings = 0
    while halvings < _HALVINGS and len(seen) < _LIMIT:
        x, y = (
            [min(max(centre + sign * step, low), high) for sign in (0, -1, 1)]
            for centre, step, (low, high) in zip(best, mesh, ranges, strict=True)
        )
        challenger = max(((u, v) for u in x for v in y), key=at)
        if at(challenger) > at(best):
            best = challenger
        else:
            mesh, halvings = [step / 2 for step in mesh], halvings + 1
    return best, at(best)


def _wide(precision: Precision) -> Precision:
    """The precision in float64, on the CPU where the device has none."""
    device = "cpu" if precision.like.device.type == "mps" else precision.like.device
    tensors = {
        name: t.to(device, torch.float64) if t.is_floating_point() else t.to(device)
        for name, t in precision.tensors().items()
    }
    return type(precision).from_tensors(tensors)


def _log_range(name: str, bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    if not 0 < low <= high < math.inf:
        raise ValueError(f"{name} must be a range of positive numbers, got {bounds}.")
    return math.log(low), math.log(high)
