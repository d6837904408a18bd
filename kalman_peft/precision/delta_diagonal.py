"""Diagonal precision of the merged update DW = s B A: R = 1/2 sum_oi F_oi (DW_oi - DW0_oi)^2.

Not blind to A at B = 0, but as large as the adapted weights themselves: for small models only.
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from ..adapters import A_SUFFIX, B_SUFFIX
from .base import State
from .diagonal import DiagonalAlgebra


class DeltaDiagonalPrecision(DiagonalAlgebra):
    """R = 1/2 sum_oi F_oi (DW - DW_0)_oi^2 over all adapted layers.

    Args:
        entries (`Mapping[str, Tensor]`): F, shape (d_out, d_in), per module name.
        scaling (`Mapping[str, float]`): s per module name.
    """

    space = "delta_w"
    supports_proximal = False

    def __init__(self, entries: Mapping[str, Tensor], scaling: Mapping[str, float]):
        super().__init__(entries)
        self.scaling = dict(scaling)

    def _with(self, entries: Mapping[str, Tensor]) -> "DeltaDiagonalPrecision":
        return type(self)(entries, self.scaling)

    def energy_and_gradient(self, state: State, mean: State) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Precision.energy_and_gradient`; forms DW layer by layer, never all of it at once."""
        gradient: dict[str, Tensor] = {}
        energies = []
        for name, f in self.entries.items():
            s = self.scaling[name]
            a, b = (state[name + suffix].detach().to(f) for suffix in (A_SUFFIX, B_SUFFIX))
            a0, b0 = (mean[name + suffix].to(f) for suffix in (A_SUFFIX, B_SUFFIX))
            offset = s * (b @ a)
            if b0.any():
                offset -= s * (b0 @ a0)
            slope = f * offset  # (d_out, d_in)
            energies.append((slope * offset).sum() / 2)
            gradient[name + A_SUFFIX] = s * (b.mT @ slope)
            gradient[name + B_SUFFIX] = s * (slope @ a.mT)
        return torch.stack(energies).sum(), gradient

    def proximal(self, state: State, mean: State, step: float) -> dict[str, Tensor]:
        """Not offered.

        Raises:
            ValueError: Always; its block problems are one r x r solve per row, as costly as the base model's forward.
        """
        raise ValueError(
            "The proximal form is not supported for structure='diagonal', space='delta_w'; use form='gradient', or "
            "structure='kronecker'."
        )

    def diagonal(self, state: State) -> dict[str, Tensor]:
        """A_ki: s^2 sum_o B_ok^2 F_oi; B_ok: s^2 sum_i F_oi A_ki^2."""
        result: dict[str, Tensor] = {}
        for name, f in self.entries.items():
            a, b = (state[name + suffix].detach().to(f).square() for suffix in (A_SUFFIX, B_SUFFIX))
            result[name + A_SUFFIX] = self.scaling[name] ** 2 * (b.mT @ f)
            result[name + B_SUFFIX] = self.scaling[name] ** 2 * (f @ a.mT)
        return result

    def tensors(self) -> dict[str, Tensor]:
        """See `Precision.tensors`."""
        scales = {f"{name}:scaling": torch.tensor(s, dtype=torch.float64) for name, s in self.scaling.items()}
        return {f"{name}:diagonal": f for name, f in self.entries.items()} | scales

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """See `Precision.from_tensors`."""
        names = [k.removesuffix(":diagonal") for k in tensors if k.endswith(":diagonal")]
        return cls({n: tensors[f"{n}:diagonal"] for n in names}, {n: tensors[f"{n}:scaling"].item() for n in names})

    def to(self, device: torch.device | str) -> Self:
        """See `Precision.to`."""
        return type(self)({name: f.to(device) for name, f in self.entries.items()}, self.scaling)
