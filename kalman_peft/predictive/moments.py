"""Variances through single layers, in closed form.

After Streamlining Prediction in Bayesian Deep Learning (arXiv:2411.18425); for LoRA layers derived here.
Plain functions on tensors: entries of an input are taken as independent of each other and of the weights. Means
are not computed here: they are those of the deterministic network.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .covariances import FactorCovariance, LoraMoments


BLOCK = 2**24  # entries of a squared weight or of attention weights that are held at once


def variance_dtype(mean: Tensor) -> torch.dtype:
    """Float64 beside float64 means, else float32: squares of 16-bit numbers would lose what they add up to."""
    return torch.float64 if mean.dtype == torch.float64 else torch.float32


def linear_variance(variance: Tensor, weight: Tensor) -> Tensor:
    """Variance of W x + b for a known W.

    Args:
        variance (`Tensor`): Of x, (..., d_in).
        weight (`Tensor`): W, (d_out, d_in), in any float dtype.

    Returns:
        `Tensor`: v (W^2)^T, (..., d_out); exact for independent entries of x.
    """
    return _squared_linear(variance, weight.shape[0], lambda rows: weight[rows].to(variance))


def lora_variance(
    x: Tensor,
    variance: Tensor | None,
    weight: Tensor,
    factors: tuple[Tensor, Tensor],
    covariances: tuple[FactorCovariance, FactorCovariance],
    scaling: float,
) -> Tensor:
    """Variance of W x + s B A x for uncertain A, B and x.

    Exact, by the law of total variance, for independent entries of x: with M = W + s B A,
    Var y = v (M^2)^T + s^2 diag[E B Cov(u | x) B^T + Cov(B E[u | x])], u = A x; see [`LoraMoments`].

    Args:
        x (`Tensor`): Mean of the input, (..., d_in), in the variances' dtype.
        variance (`Tensor` or `None`): v, of the input; `None` for a known one.
        weight (`Tensor`): W, (d_out, d_in); not read for a known input.
        factors (`tuple[Tensor, Tensor]`): Means of A (r, d_in) and B (d_out, r), in the dtype of `x`.
        covariances (`tuple[FactorCovariance, FactorCovariance]`): Of A and B.
        scaling (`float`): s.

    Returns:
        `Tensor`: (..., d_out).
    """
    a, b = factors
    moments = LoraMoments(factors, covariances, scaling)
    spread, power = moments.of_mean(x)
    if variance is not None:
        more_spread, more_power = moments.of_variance(variance)
        spread, power = spread + more_spread, power + more_power
    own = nn.functional.linear(spread, moments.from_spread) + nn.functional.linear(power, moments.from_power)
    if variance is None:
        return own
    return own + _squared_linear(variance, b.shape[0], lambda rows: weight[rows].to(x) + scaling * (b[rows] @ a))


def product_variance(x: Tensor, x_variance: Tensor, y: Tensor, y_variance: Tensor) -> Tensor:
    """Variance of x y for independent x and y: y^2 v_x + x^2 v_y + v_x v_y, exact."""
    return y.square() * x_variance + (x.square() + x_variance) * y_variance


def layer_norm_variance(
    x: Tensor, variance: Tensor, width: int, weight: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Delta method: the diagonal of J diag(v) J^T, in O(n).

    With u = (x - mean x) / sigma and sigma^2 = Var x + eps it is
    gamma_i^2 / sigma^2 [v_i (1 - 2 (1 + u_i^2) / n) + sum_j (1 + u_i u_j)^2 v_j / n^2].

    Args:
        x (`Tensor`): Mean, (..., *shape).
        variance (`Tensor`): v, of the same shape.
        width (`int`): Number of trailing dimensions that are normalised.
        weight (`Tensor`, *optional*): gamma, of the shape that is normalised.
        eps (`float`, *optional*, defaults to 1e-5): Of the layer.

    Returns:
        `Tensor`: As `variance`.
    """
    dims = tuple(range(-width, 0))
    gain = 1 / (x.var(dims, correction=0, keepdim=True) + eps)
    unit = (x - x.mean(dims, keepdim=True)) * gain.sqrt()
    n = math.prod(x.shape[-width:])
    tilted = unit * variance
    others = variance.sum(dims, True) + unit * (2 * tilted.sum(dims, True) + unit * (unit * tilted).sum(dims, True))
    own = variance * (1 - 2 * (1 + unit.square()) / n)
    return _scaled((own + others / n**2).clamp(min=0) * gain, weight)


def rms_norm_variance(
    x: Tensor, variance: Tensor, width: int, weight: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Delta method, see `layer_norm_variance`: with u = x / sigma and sigma^2 = mean x^2 + eps,
    gamma_i^2 / sigma^2 [v_i (1 - 2 u_i^2 / n) + u_i^2 sum_j u_j^2 v_j / n^2].
    """
    dims = tuple(range(-width, 0))
    gain = 1 / (x.square().mean(dims, keepdim=True) + eps)
    power = x.square() * gain
    n = math.prod(x.shape[-width:])
    own = variance * (1 - 2 * power / n)
    return _scaled((own + power * (power * variance).sum(dims, True) / n**2).clamp(min=0) * gain, weight)


def _scaled(variance: Tensor, weight: Tensor | None) -> Tensor:
    return variance if weight is None else variance * weight.to(variance).square()


def attention_variance(
    query: Tensor,
    key: Tensor,
    mix: Callable[[Tensor], Tensor],
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Variance of sum_s a_ts v_s for known attention weights a = softmax(q k^T scale + mask).

    A block of queries at a time, so that no more than a block of attention weights exists at once.

    Args:
        query (`Tensor`): (..., T, d), in the dtype of the variances.
        key (`Tensor`): (..., S, d), the same leading dimensions.
        mix (`Callable`):
            From weights a (..., t, s) of the first s keys to the variance (..., t, e); see `position_mixer`.
        mask (`Tensor`, *optional*): Added to the scores, or true where attended; broadcasts to (..., T, S).
        is_causal (`bool`, *optional*, defaults to `False`): Query t sees keys up to t.
        scale (`float`, *optional*): 1 / sqrt(d) by default.

    Returns:
        `Tensor`: (..., T, e). Queries that see nothing get zero.
    """
    length, width = query.shape[-2], key.shape[-2]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    rows = max(1, BLOCK // (width * math.prod(query.shape[:-2])))
    if is_causal:  # in blocks, so that later keys are not even multiplied by zero
        rows = min(rows, max(32, -(-length // 8)))
    blocks = []
    for start in range(0, length, rows):
        span = slice(start, min(start + rows, length))
        keys = slice(0, min(span.stop, width) if is_causal else width)
        scores = (query[..., span, :] @ key[..., keys, :].mT) * factor
        if is_causal:
            seen = torch.arange(width, device=key.device) <= torch.arange(length, device=key.device)[span, None]
            scores = scores.masked_fill(~seen[:, keys], -torch.inf)
        if mask is not None:
            part = mask if mask.shape[-2] == 1 else mask[..., span, :]
            part = part if part.shape[-1] == 1 else part[..., keys]
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part.to(scores)
        blocks.append(mix(scores.softmax(-1).nan_to_num(0.0)))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -2)


def relu_slope(x: Tensor) -> Tensor:
    """Derivative of max(x, 0)."""
    return (x > 0).to(x)


def gelu_slope(x: Tensor) -> Tensor:
    """Derivative of x Phi(x)."""
    return torch.special.ndtr(x) + x * (-x.square() / 2).exp() / math.sqrt(2 * math.pi)


def gelu_tanh_slope(x: Tensor) -> Tensor:
    """Derivative of x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    t = (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()
    return (1 + t) / 2 + x / 2 * (1 - t.square()) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x.square())


def silu_slope(x: Tensor, steepness: float = 1.0) -> Tensor:
    """Derivative of x sigmoid(c x), c the steepness."""
    s = (steepness * x).sigmoid()
    return s * (1 + steepness * x * (1 - s))


def probit_probabilities(logits: Tensor, variance: Tensor, scale: float = 1.0, temperature: float = 1.0) -> Tensor:
    """softmax(m / sqrt(1 + pi s v / 8)) of m = mu / T and v / T^2: class probabilities under independent Gaussian
    logits, approximately.

    Args:
        logits (`Tensor`): mu, (..., V).
        variance (`Tensor`): v >= 0, of the same shape.
        scale (`float`, *optional*, defaults to 1.0): s > 0, on the variance; see [`fit_scale`].
        temperature (`float`, *optional*, defaults to 1.0): T > 0, on the logits.

    Returns:
        `Tensor`: Probabilities in the dtype of `variance`, (..., V).
    """
    _check_positive(scale=scale, temperature=temperature)
    spread = math.pi / 8 * scale / temperature**2 * variance
    return (logits.to(variance) / temperature / (1 + spread).sqrt()).softmax(-1)


def pairwise_probabilities(logits: Tensor, covariance: Tensor, scale: float = 1.0, temperature: float = 1.0) -> Tensor:
    """Class probabilities under correlated Gaussian logits, approximately: the probit of every pair of classes.

    p_i is proportional to 1 / sum_j exp((m_j - m_i) / sqrt(1 + pi / 8 s Var(z_i - z_j))), with Var(z_i - z_j) =
    S_ii + S_jj - 2 S_ij (Lu, Ie and Sha, 2020). What all logits share does not count, as it should not; for two
    classes this is the probit of their difference.

    Args:
        logits (`Tensor`): mu, (..., C).
        covariance (`Tensor`): S, (..., C, C).
        scale (`float`, *optional*, defaults to 1.0): s > 0, on the covariance.
        temperature (`float`, *optional*, defaults to 1.0): T > 0, on the logits: m = mu / T, S / T^2.

    Returns:
        `Tensor`: Probabilities in the dtype of `covariance`, (..., C).
    """
    _check_positive(scale=scale, temperature=temperature)
    own = covariance.diagonal(dim1=-2, dim2=-1)
    spread = (own[..., :, None] + own[..., None, :] - 2 * covariance).clamp(min=0)
    mean = logits.to(covariance) / temperature
    gap = (mean[..., None, :] - mean[..., :, None]) / (1 + math.pi / 8 * scale / temperature**2 * spread).sqrt()
    return (-gap.logsumexp(-1)).softmax(-1)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}.")


def _squared_linear(variance: Tensor, d_out: int, rows_of: Callable[[slice], Tensor]) -> Tensor:
    """v (M^2)^T, for M given by rows; of the square only a block exists at once."""
    rows = max(1, BLOCK // variance.shape[-1])
    parts = [
        nn.functional.linear(variance, rows_of(slice(start, start + rows)).square()) for start in range(0, d_out, rows)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
