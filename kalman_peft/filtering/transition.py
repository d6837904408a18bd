"""How the adapter's weights move from task to task: random walk, or Ornstein-Uhlenbeck drift towards the start.

theta' = start + decay * (theta - start) + w, w ~ N(0, diag Q): Low-Rank Filtering and Smoothing (arXiv:2410.06800) has
decay = 1. Q says where a shift between tasks lives.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..adapters import A_SUFFIX, B_SUFFIX


ByPattern = Mapping[str, float | Tensor]


@dataclass(frozen=True, eq=False)
class Transition:
    """One step of the state-space model, from a task to the next.

    Args:
        process_noise (`float` or `Mapping[str, float | Tensor]`, *optional*, defaults to 0.0):
            Variance q >= 0 that each weight gains, in squared units of the weights. A mapping goes by pattern, see
            [`by_key`]; weights that no pattern matches gain none. A range of layers is a pattern such as
            `r"layers\\.(2[0-9])\\."`.
        decay (`float`, *optional*, defaults to 1.0):
            Share of the distance to the start that is kept, in [0, 1]; below 1 a soft parameter reset.

    Raises:
        ValueError: A value is negative, NaN or infinite, or a pattern is no regular expression.
    """

    process_noise: float | ByPattern = 0.0
    decay: float = 1.0

    def __post_init__(self):
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {self.decay}; 1 is a random walk, 0 a full reset.")
        check_values("process_noise", self.process_noise, lowest_allowed=True)

    @classmethod
    def stationary(cls, decay: float, prior_precision: float | Mapping[str, float]) -> Self:
        """Ornstein-Uhlenbeck drift whose stationary distribution is the prior N(start, I / delta).

        Args:
            decay (`float`): In [0, 1].
            prior_precision (`float` or `Mapping[str, float]`): delta > 0, as given to [`initial_belief`].

        Returns:
            `Transition`: With Q = (1 - decay^2) / delta.
        """
        check_values("prior_precision", prior_precision, lowest_allowed=False)
        share = 1 - decay**2
        if isinstance(prior_precision, Mapping):
            return cls({pattern: share / delta for pattern, delta in prior_precision.items()}, decay)
        return cls(share / prior_precision, decay)

    def part(self, fraction: float) -> "Transition":
        """The same motion over a fraction u of a step (or over several steps, u > 1).

        decay^u and Q (1 - decay^2u) / (1 - decay^2), which is u Q at decay 1: parts that add up to a step compose to
        it.

        Args:
            fraction (`float`): u >= 0.

        Returns:
            `Transition`: With the noise of that part.

        Raises:
            ValueError: u is negative, NaN or infinite.
        """
        if not 0 <= fraction < float("inf"):
            raise ValueError(f"fraction must be >= 0 and finite, got {fraction}.")
        if fraction == 1:
            return self
        decay = self.decay**fraction
        share = fraction if self.decay == 1 else (1 - decay**2) / (1 - self.decay**2)
        if isinstance(self.process_noise, Mapping):
            return Transition({pattern: share * q for pattern, q in self.process_noise.items()}, decay)
        return Transition(share * self.process_noise, decay)

    def noise(self, shapes: Mapping[str, torch.Size], like: Tensor) -> dict[str, float | Tensor]:
        """q of every adapter key: a number, or a tensor of the factor's shape.

        Args:
            shapes (`Mapping[str, torch.Size]`): Shape of each adapter key.
            like (`Tensor`): Tells dtype and device.

        Returns:
            `dict[str, float | Tensor]`: In the order of `shapes`.
        """
        return by_key("process_noise", self.process_noise, shapes, like)

    def mean(self, mean: Mapping[str, Tensor], start: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """start + decay * (mean - start), by key; the mean itself at decay 1, which needs no start.

        Args:
            mean (`Mapping[str, Tensor]`): Before the step.
            start (`Mapping[str, Tensor]`, *optional*): What the weights drift to.

        Returns:
            `dict[str, Tensor]`: After it, without noise.

        Raises:
            ValueError: decay < 1 without a start, or the start has other keys or shapes.
        """
        if self.decay == 1:
            return dict(mean)
        if start is None:
            raise ValueError(
                f"decay={self.decay} drifts towards the start: pass start=, the mean of initial_belief()."
            )
        if {k: m.shape for k, m in start.items()} != {k: m.shape for k, m in mean.items()}:
            raise ValueError("`start` has other keys or shapes than the belief's mean; pass initial_belief().mean.")
        return {key: start[key].to(m) + self.decay * (m - start[key].to(m)) for key, m in mean.items()}

    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file holds: a JSON-serialisable part, and the noise that is given as tensors."""
        if not isinstance(self.process_noise, Mapping):
            return {"process_noise": float(self.process_noise), "decay": float(self.decay)}, {}
        tensors = {k: q for k, q in self.process_noise.items() if isinstance(q, Tensor)}
        # Order counts (the last match wins), and JSON objects may be sorted: a list of pairs.
        pairs = [[k, None if isinstance(q, Tensor) else float(q)] for k, q in self.process_noise.items()]
        return {"process_noise": pairs, "decay": float(self.decay)}, tensors

    @classmethod
    def from_description(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Inverse of `describe`; raises KeyError where a tensor is missing."""
        noise = record["process_noise"]
        if isinstance(noise, list):
            noise = {k: tensors[k] if q is None else q for k, q in noise}
        return cls(noise, record["decay"])


def by_key(
    name: str, values: float | ByPattern, shapes: Mapping[str, torch.Size], like: Tensor
) -> dict[str, float | Tensor]:
    """Values by adapter key, from one value or from patterns.

    An entry that is an adapter key is for that key, and may be a tensor of its shape. Any other is a regular
    expression, searched for in the adapter key and in the name of its module. The last match counts; keys without a
    match get 0.

    Args:
        name (`str`): Of the argument, for errors.
        values (`float` or `Mapping[str, float | Tensor]`): What is given.
        shapes (`Mapping[str, torch.Size]`): Shape of each adapter key.
        like (`Tensor`): Tells dtype and device of tensors.

    Returns:
        `dict[str, float | Tensor]`: In the order of `shapes`.

    Raises:
        ValueError: A pattern matches no key, or a tensor is not of its key's shape.
    """
    if not isinstance(values, Mapping):
        return dict.fromkeys(shapes, values)
    found: dict[str, float | Tensor] = dict.fromkeys(shapes, 0.0)
    unmatched = []
    for pattern, value in values.items():
        if pattern in shapes:
            if isinstance(value, Tensor):
                if value.dim() and value.shape != shapes[pattern]:
                    raise ValueError(
                        f"{name}[{pattern!r}] has shape {tuple(value.shape)}, the factor {tuple(shapes[pattern])}."
                    )
                value = value.to(like)
            found[pattern] = value
            continue
        if isinstance(value, Tensor) and value.dim():
            raise ValueError(f"{name}[{pattern!r}] is a tensor, but that is no adapter key: give a number.")
        keys = [key for key in shapes if re.search(pattern, key) or re.search(pattern, _module(key))]
        found |= dict.fromkeys(keys, float(value))
        if not keys:
            unmatched.append(pattern)
    if unmatched:
        raise ValueError(f"{name}: no adapter key matches {unmatched}; keys look like {next(iter(shapes))!r}.")
    return found


def check_values(name: str, values: float | ByPattern, lowest_allowed: bool) -> None:
    """Raise ValueError unless all values are finite and >= 0 (> 0 unless `lowest_allowed`), and all patterns parse."""
    bound = ">= 0" if lowest_allowed else "> 0"
    for pattern, value in values.items() if isinstance(values, Mapping) else [("", values)]:
        tensor = torch.as_tensor(value, dtype=torch.float64)
        right = (tensor >= 0) if lowest_allowed else (tensor > 0)
        if not (right & tensor.isfinite()).all():
            where = f"{name}[{pattern!r}]" if isinstance(values, Mapping) else name
            seen = float(tensor) if tensor.numel() == 1 else f"a tensor from {tensor.min():g} to {tensor.max():g}"
            raise ValueError(f"{where} must be {bound} and finite, got {seen}.")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}: {pattern!r} is no regular expression ({error}).") from error


def _module(key: str) -> str:
    return key.removesuffix(A_SUFFIX).removesuffix(B_SUFFIX)
