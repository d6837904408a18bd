"""Diagonal precision over the LoRA factors: EWC's structure, and LaLoRA's "Diag"."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from .base import (
    AdapterPrecision,
    Precision,
    State,
    check_damping,
    check_factor,
    check_invertible,
    check_noise,
    diffuse,
    normal,
)


class DiagonalAlgebra(Precision):
    """The linear algebra of a diagonal matrix over named blocks, whatever the space of its coordinates.

    Args:
        entries (`Mapping[str, Tensor]`): Precision of each coordinate, one tensor per block.
    """

    structure = "diagonal"

    def __init__(self, entries: Mapping[str, Tensor]):
        self.entries = dict(entries)

    def _with(self, entries: Mapping[str, Tensor]) -> Any:
        return type(self)(entries)

    @property
    def like(self) -> Tensor:
        """See `Precision.like`."""
        return next(iter(self.entries.values()))

    def coordinates(self) -> dict[str, torch.Size]:
        """See `Precision.coordinates`."""
        return {key: f.shape for key, f in self.entries.items()}

    def matvec(self, x: State) -> dict[str, Tensor]:
        """See `Precision.matvec`."""
        return {key: f * x[key].to(f) for key, f in self.entries.items()}

    def solve(self, x: State, damping: float = 0.0, scale: float = 1.0) -> dict[str, Tensor]:
        """See `Precision.solve`."""
        return {key: x[key].to(f) / f for key, f in self._damped(damping, scale).items()}

    def logdet(self, damping: float = 0.0, scale: float = 1.0) -> Tensor:
        """See `Precision.logdet`."""
        check_damping(damping)
        return torch.stack([(scale * f + damping).log().sum() for f in self.entries.values()]).sum()

    def sample(self, damping: float = 0.0, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """See `Precision.sample`."""
        return {key: normal(f.shape, f, generator) * f.rsqrt() for key, f in self._damped(damping, 1.0).items()}

    def scale(self, factor: float) -> Self:
        """See `Precision.scale`."""
        check_factor(factor)
        return self._with({key: factor * f for key, f in self.entries.items()})

    def merge(self, other: Precision, weight: float = 1.0, other_weight: float = 1.0) -> Self:
        """Exact, see `Precision.merge`."""
        self._check_mergeable(other, weight, other_weight)
        assert isinstance(other, DiagonalAlgebra)
        return self._with({k: weight * f + other_weight * other.entries[k].to(f) for k, f in self.entries.items()})

    def predict(self, process_noise: float | Mapping[str, float | Tensor]) -> Self:
        """f / (1 + q f), exact.

        Args:
            process_noise (`float` or `Mapping[str, float | Tensor]`):
                Variance q, for all weights or by block (a scalar, or a tensor of the block's shape).

        Returns:
            `Precision`: Of the same structure.
        """
        noise = process_noise if isinstance(process_noise, Mapping) else dict.fromkeys(self.entries, process_noise)
        if noise.keys() != self.entries.keys():
            raise ValueError(f"process_noise must name every block; differing: {noise.keys() ^ self.entries.keys()}.")
        for q in noise.values():
            check_noise(float(q.min()) if isinstance(q, Tensor) else q)
        return self._with({key: diffuse(f, noise[key]) for key, f in self.entries.items()})

    def _damped(self, damping: float, scale: float) -> dict[str, Tensor]:
        check_damping(damping)
        damped = {key: scale * f + damping for key, f in self.entries.items()}
        if damping == 0:
            check_invertible(torch.stack([f.min() for f in damped.values()]).min())
        return damped


class DiagonalPrecision(DiagonalAlgebra, AdapterPrecision):
    """R = 1/2 sum_i f_i (theta_i - mean_i)^2.

    Args:
        entries (`Mapping[str, Tensor]`): Precision of each weight, one tensor of the factor's shape per key.
    """

    def diagonal(self, state: State) -> dict[str, Tensor]:
        """The entries themselves."""
        return dict(self.entries)

    def tensors(self) -> dict[str, Tensor]:
        """See `Precision.tensors`."""
        return {f"{key}:diagonal": f for key, f in self.entries.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """See `Precision.from_tensors`."""
        return cls({name.removesuffix(":diagonal"): t for name, t in tensors.items()})

    def to(self, device: torch.device | str) -> Self:
        """See `Precision.to`."""
        return type(self)({key: f.to(device) for key, f in self.entries.items()})
