"""Sums over positions, whose entries are uncertain through the same weights and so do not average out.

A LoRA layer multiplies every position by the same A and B: the weighted sum of its outputs is its output for the
weighted sum of its inputs, sum_s a_s B A x_s = B A (sum_s a_s x_s), and that share of the variance is exact. What was
uncertain before the layer came from shared weights as well, which correlate positions as far as these are alike: the
correlation of two is taken to be the cosine of the layer's inputs there, averaged over the pairs that are mixed. Where
no layer's inputs are known, in pooling for example, it is 1: (sum_s a_s sqrt(v_s))^2, the most that it can be.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .covariances import FactorCovariance, LoraMoments
from .moments import BLOCK, linear_variance, variance_dtype
from .tensor import MomentTensor, mean_of, variance_of


MIXED = 2**18  # entries of mixed inputs that are held at once, or as many as the layer's inputs if these are more


@dataclass(frozen=True)
class LoraWeights:
    """What the variance of a LoRA layer's result rests on; see `lora_variance`."""

    factors: tuple[Tensor, Tensor]
    covariances: tuple[FactorCovariance, FactorCovariance]
    scaling: float
    weight: Callable[[], Tensor]  # W, (d_out, d_in); for uncertain inputs only, since it may have to be dequantised


@dataclass(frozen=True)
class Origin:
    """The LoRA layer whose result a tensor holds, and how its entries were moved since.

    Args:
        weights (`Callable[[], LoraWeights]`): Of the layer.
        x (`Tensor`): Its input, uncertain or not.
        steps (`tuple[Callable, ...]`, *optional*): The rules of the functions that moved its result.
    """

    weights: Callable[[], LoraWeights]
    x: Any
    steps: tuple[Callable[[Any], Tensor], ...] = ()

    def moved(self, step: Callable[[Any], Tensor]) -> "Origin":
        """The same, after another function that only moves entries."""
        return replace(self, steps=(*self.steps, step))

    def channels(self, width: int) -> Tensor | None:
        """Which of the layer's outputs each head holds, found by moving the numbers of the entries.

        Args:
            width (`int`): Outputs of the layer, d_out.

        Returns:
            `Tensor`: (heads, e), integers below `width`; `None` if the tensor is not (batch, heads, positions, e).
        """
        if mean_of(self.x).dim() != 3:
            return None
        batch, length, _ = mean_of(self.x).shape
        device = mean_of(self.x).device
        ids = torch.arange(batch * length * width, device=device).view(batch, length, width)
        for step in self.steps:
            ids = step(SimpleNamespace(moment_variance=ids))
        if ids.dim() != 4 or ids.shape[0] != batch or ids.shape[2] != length:
            return None
        rows = ids[0, :, 0]
        starts = width * torch.arange(batch * length, device=device).view(batch, 1, length, 1)
        return rows if torch.equal(ids, starts + rows[:, None] % width) else None


def position_mixer(values: MomentTensor, groups: int = 1) -> Callable[[Tensor], Tensor]:
    """How the variance of sum_s a_ts v_s follows from the weights a.

    Args:
        values (`MomentTensor`): v, (..., S, e): positions in the last dimension but one.
        groups (`int`, *optional*, defaults to 1): Heads of a that share one head of v.

    Returns:
        `Callable`: From a (..., t, s), the weights of the first s positions, to the variance (..., t, e).
    """
    origin = values._origin
    if origin is not None:
        weights = origin.weights()
        rows = origin.channels(weights.factors[1].shape[0])
        if rows is not None:
            return _through_layer(weights, origin.x, rows, groups, variance_dtype(mean_of(values)))
    spread = root(_grouped(values.moment_variance, groups))
    return lambda a: _mixed(a, spread).square()


def summed_over_positions(variance: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    """Variance of the sum of entries over `dims`: independent along the last dimension, shared along others."""
    last = variance.dim() - 1
    shared = [dim for dim in dims if dim != last]
    if shared:
        variance = root(variance).sum(shared, keepdim=True).square()
    if last in dims:
        variance = variance.sum(last, keepdim=True)
    return variance if keepdim else variance.squeeze(tuple(dims))


def root(variance: Tensor) -> Tensor:
    """Square root with slope 0 at 0."""
    tiny = torch.finfo(variance.dtype).tiny
    return torch.where(variance > 0, variance.clamp(min=tiny).sqrt(), 0.0)


def _mixed(weights: Tensor, x: Tensor) -> Tensor:
    """a x, of the first positions if there are weights for no more."""
    return weights @ x[..., : weights.shape[-1], :]


def _likeness(weights: Tensor, lengths: Tensor, mixed: Tensor) -> Tensor:
    """Mean cosine of two inputs, over the pairs s != s' that a mixes, weighted by a_s |x_s| a_s' |x_s'|.

    Args:
        weights (`Tensor`): a, (batch, n, s).
        lengths (`Tensor`): |x_s|^2, (batch, S, 1).
        mixed (`Tensor`): sum_s a_s x_s, (batch, n, d_in).

    Returns:
        `Tensor`: (batch, n, 1), between 0 and 1: what is unlike counts as independent.
    """
    alone, pairs = _alone_and_pairs(weights, lengths)
    several = pairs > torch.finfo(pairs.dtype).eps * alone  # a first token sees itself alone
    found = (mixed.square().sum(-1, keepdim=True) - alone) / torch.where(several, pairs, 1.0)
    return torch.where(several, found, 0.0).clamp(0, 1)


def _blend(weights: Tensor, variance: Tensor, correlation: Any) -> Tensor:
    """Variance of sum_s a_s x_s whose terms have this correlation."""
    alone, pairs = _alone_and_pairs(weights, variance)
    return alone + correlation * pairs


def _alone_and_pairs(weights: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over s of a_s^2 v_s, and over s != s' of a_s a_s' sqrt(v_s v_s')."""
    alone = _mixed(weights.square(), variance)
    return alone, (_mixed(weights, root(variance)).square() - alone).clamp(min=0)


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, -3)


def _through_layer(
    weights: LoraWeights, given: Any, rows: Tensor, groups: int, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """The rule of `lora_variance` for each head's mixed input, of its own outputs `rows` only."""
    (a, b), s = weights.factors, weights.scaling
    moments = LoraMoments(weights.factors, weights.covariances, s)
    x, variance = mean_of(given).to(dtype), variance_of(given)
    rows_of_a = _grouped(rows[:, None], groups)[:, 0] if groups > 1 else rows
    from_spread, from_power = moments.from_spread[rows_of_a].mT, moments.from_power[rows_of_a].mT
    lengths = x.square().sum(-1, keepdim=True)
    inputs: tuple[Tensor, Tensor, Tensor] | None = None
    if variance is not None:
        chosen = rows.flatten()
        matrix = weights.weight()[chosen].to(x) + s * (b[chosen] @ a)
        incoming = linear_variance(variance, matrix).unflatten(-1, rows.shape).transpose(1, 2)
        inputs = *moments.of_variance(variance), _grouped(incoming, groups)

    def block(mixing: Tensor) -> Tensor:  # (batch, heads, t, s)
        flat = mixing.flatten(1, 2)  # all heads mix the same inputs
        mixed = _mixed(flat, x)
        spread, power = moments.of_mean(mixed)
        likeness = None
        if inputs is not None:
            likeness = _likeness(flat, lengths, mixed)
            spread, power = spread + _blend(flat, inputs[0], likeness), power + _blend(flat, inputs[1], likeness)
            likeness = likeness.unflatten(1, mixing.shape[1:3])
        spread, power = (t.unflatten(1, mixing.shape[1:3]) for t in (spread, power))
        own = spread @ from_spread + power @ from_power
        return own if inputs is None else own + _blend(mixing, inputs[2], likeness)

    def mix(mixing: Tensor) -> Tensor:
        mixing = mixing.expand(x.shape[0], len(rows_of_a), -1, -1)
        entries = min(max(MIXED, x.numel()), BLOCK)
        size = max(1, entries // (x.shape[-1] * x.shape[0] * len(rows_of_a)))
        return torch.cat([block(part) for part in mixing.split(size, -2)], -2)

    return mix
