"""Diagonal precision over the LoRA factors: EWC's structure, and LaLoRA's "Diag"."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from .base import Precision, State


class DiagonalPrecision(Precision):
    """R = 1/2 sum_i f_i (theta_i - mean_i)^2.

    Args:
        entries (`Mapping[str, Tensor]`): Precision of each weight, one tensor of the factor's shape per key.
    """

    structure, space = "diagonal", "adapter"

    def __init__(self, entries: Mapping[str, Tensor]):
        self.entries = dict(entries)

    def energy_and_gradient(self, state: State, mean: State) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Precision.energy_and_gradient`."""
        gradient, energy = {}, None
        for key, f in self.entries.items():
            offset = state[key].detach().to(f) - mean[key].to(f)
            gradient[key] = f * offset
            term = torch.dot(gradient[key].reshape(-1), offset.reshape(-1)) / 2
            energy = term if energy is None else energy + term
        return energy if energy is not None else torch.zeros(()), gradient

    def proximal(self, state: State, mean: State, step: float) -> dict[str, Tensor]:
        """mean + (state - mean) / (1 + step f), exactly."""
        return {
            key: mean[key].to(f) + (state[key].detach().to(f) - mean[key].to(f)) / (1 + step * f)
            for key, f in self.entries.items()
        }

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
