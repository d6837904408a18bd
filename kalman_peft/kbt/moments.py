"""Means and variances through single layers, for independent Gaussian entries.

ReLU: the exact moments of max(x, 0), as in Kalman Bayesian neural networks (Wagner, Wu, Huber, 2022). Softmax: second
order Taylor, as in the Kalman Bayesian Transformer (arXiv:2509.10695; its text was not at hand, the formulas are
derived here). Other activations: Gauss-Hermite quadrature.

Gradients flow through means only, with variances held fixed. The derivative of E f(x) in the mean of x is E f'(x) =
Cov(x, f(x)) / Var x (Stein), so that backpropagation through these functions passes on exactly the gains by which a
Kalman smoother goes from a layer's outputs to its inputs. Where a variance is 0, means are the layer's own, bit for
bit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor
from torch.nn import functional as F

from ..predictive.moments import layer_norm_variance


NODES = 32  # of the quadrature
LARGEST_CORRECTION = 0.9  # second-order corrections take at most this share of a probability away


@dataclass(frozen=True)
class Moments:
    """A Gaussian vector with independent entries.

    Attributes:
        mean (`Tensor`): Of any shape.
        variance (`Tensor`): Of the same shape, >= 0, without a graph.
    """

    mean: Tensor
    variance: Tensor

    def __add__(self, other: "Moments") -> "Moments":
        """Of the sum; the two count as independent."""
        return Moments(self.mean + other.mean, self.variance + other.variance)

    def map(self, move: Callable[[Tensor], Tensor]) -> "Moments":
        """Both, after a function that only moves entries."""
        return Moments(move(self.mean), move(self.variance))


def known(x: Tensor) -> Moments:
    """A vector without uncertainty."""
    return Moments(x, torch.zeros_like(x))


def relu_moments(x: Moments) -> Moments:
    """Of max(x, 0), exact: mean mu Phi(t) + sigma phi(t), t = mu / sigma; its slope is Phi(t)."""
    mu, uncertain = x.mean, x.variance > 0
    sigma = torch.where(uncertain, x.variance, 1.0).sqrt()
    t = mu / sigma
    below, density = torch.special.ndtr(t), (-t.square() / 2).exp() / math.sqrt(2 * math.pi)
    mean = torch.where(uncertain, mu * below + sigma * density, F.relu(mu))
    with torch.no_grad():
        second = (mu.square() + x.variance) * below + mu * sigma * density
        variance = torch.where(uncertain, (second - mean.square()).clamp(min=0), 0.0)
    return Moments(mean, variance)


@lru_cache
def _quadrature() -> tuple[list[float], list[float]]:
    nodes, weights = hermegauss(NODES)
    return nodes.tolist(), (weights / weights.sum()).tolist()


def activation_moments(x: Moments, function: Callable[[Tensor], Tensor]) -> Moments:
    """Of a smooth function of every entry, by Gauss-Hermite quadrature with 32 nodes.

    Args:
        x (`Moments`): The inputs.
        function (`Callable`): Elementwise and differentiable, such as `torch.tanh`.

    Returns:
        `Moments`: Of the results.
    """
    nodes, weights = (torch.tensor(part, dtype=x.mean.dtype, device=x.mean.device) for part in _quadrature())
    uncertain = x.variance > 0
    values = function(x.mean[..., None] + x.variance.sqrt()[..., None] * nodes)  # (..., nodes)
    average = values @ weights
    with torch.no_grad():
        spread = (values - average[..., None]).square() @ weights
        variance = torch.where(uncertain, spread, 0.0)
    return Moments(torch.where(uncertain, average, function(x.mean)), variance)


def softmax_moments(x: Moments) -> Moments:
    """Of softmax over the last dimension, to second order in the standard deviations.

    E p_i = p_i + 1/2 sum_j v_j p_i [(d_ij - p_j)^2 - p_j (1 - p_j)],  Var p_i = sum_j v_j p_i^2 (d_ij - p_j)^2; both
    in O(n). The means sum to one. Where variances are so large that a mean would come near 0 or below, all corrections
    of that row are scaled down by one factor.
    """
    p, v = x.mean.softmax(-1), x.variance
    spread = v * (1 - 2 * p) + (v * p.square()).sum(-1, keepdim=True)  # sum_j v_j (d_ij - p_j)^2
    correction = (spread - (v * p * (1 - p)).sum(-1, keepdim=True)) / 2
    with torch.no_grad():
        lowest = -correction.min(-1, keepdim=True).values
        factor = LARGEST_CORRECTION / lowest.clamp(min=LARGEST_CORRECTION)
        variance = (p.square() * spread).clamp(min=0)
    return Moments(p + p * correction * factor, variance)


def layer_norm_moments(x: Moments, width: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Moments:
    """Of layer normalisation with known gain and bias: linear around the mean (delta method)."""
    mean = F.layer_norm(x.mean, x.mean.shape[-width:], weight, bias, eps)
    with torch.no_grad():
        variance = layer_norm_variance(x.mean.detach(), x.variance, width, weight, eps)
    return Moments(mean, variance)


def attention_moments(
    query: Moments, key: Moments, value: Moments, scaling: float, mask: Tensor | None = None
) -> Moments:
    """Of softmax(q k^T scaling + mask) v, all three uncertain.

    Scores count as independent of each other and of the values; their variances are those of products. With p, v_s the
    attention weights' and scores' moments, the result's variance is
    sum_j p_j^2 Var v_j + sum_j p_j^2 (v_j - o)^2 v_s,j + sum_j Var p_j Var v_j: in the second term, which is that of
    the scores, the weights' covariance counts (they sum to one, so that a shift of all values adds no variance).

    Args:
        query (`Moments`): (..., T, d).
        key (`Moments`): (..., S, d).
        value (`Moments`): (..., S, e).
        scaling (`float`): Of the scores.
        mask (`Tensor`, *optional*): Added to the scores; hardly finite where nothing is attended.

    Returns:
        `Moments`: (..., T, e).
    """
    scores = torch.matmul(query.mean, key.mean.transpose(-1, -2)) * scaling
    if mask is not None:
        scores = scores + mask
    with torch.no_grad():
        spread = query.variance @ (key.mean.square() + key.variance).mT + query.mean.square() @ key.variance.mT
        spread = spread * scaling**2  # (..., T, S)
    weights = softmax_moments(Moments(scores, spread))
    mean = torch.matmul(weights.mean, value.mean)
    with torch.no_grad():
        v, p = value.mean, weights.mean.square()
        tilt = p * spread
        by_scores = tilt @ v.square() - 2 * mean * (tilt @ v) + mean.square() * tilt.sum(-1, keepdim=True)
        variance = (p + weights.variance) @ value.variance + by_scores.clamp(min=0)
    return Moments(mean, variance)
