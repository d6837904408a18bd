"""Kronecker-factored precision, one block per LoRA factor (LaLoRA's "B-KFAC").

For a factor M of shape (o, i) the block is L (x) R in row-major vec order: vec(X)^T (L (x) R) vec(X) = tr(X^T L X R).
L is the second moment of the factor's output gradients, R of its inputs (Martens and Grosse, 2015, eq. 5).
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from .base import Precision, State, stack
from .factor import EigenFactor, divide_in_eigenbasis


class KroneckerBlocks:
    """Named pairs of factors, stored stacked by signature so that a step makes few, large products.

    Args:
        blocks (`Mapping[str, tuple[EigenFactor, EigenFactor]]`): (left, right) per name.
    """

    def __init__(self, blocks: Mapping[str, tuple[EigenFactor, EigenFactor]]):
        names: dict[tuple, list[str]] = {}
        for name, (left, right) in blocks.items():
            names.setdefault(left.signature + right.signature, []).append(name)
        self.order = list(blocks)
        self.groups = [
            (group, EigenFactor.stack([blocks[n][0] for n in group]), EigenFactor.stack([blocks[n][1] for n in group]))
            for group in names.values()
        ]

    def items(self) -> dict[str, tuple[EigenFactor, EigenFactor]]:
        """The blocks as views, in the order they were given."""
        found = {n: (left[i], right[i]) for group, left, right in self.groups for i, n in enumerate(group)}
        return {name: found[name] for name in self.order}

    def tensors(self) -> dict[str, Tensor]:
        """Named tensors for a file."""
        return {
            key: tensor
            for name, (left, right) in self.items().items()
            for key, tensor in (left.tensors(f"{name}:left") | right.tensors(f"{name}:right")).items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Inverse of `tensors`; raises KeyError where one is missing."""
        names = dict.fromkeys(key.rsplit(":", 1)[0] for key in tensors)
        return cls(
            {
                name: (
                    EigenFactor.from_tensors(tensors, f"{name}:left"),
                    EigenFactor.from_tensors(tensors, f"{name}:right"),
                )
                for name in names
            }
        )

    def to(self, device: torch.device | str) -> Self:
        """The blocks on `device`."""
        return type(self)({name: (left.to(device), right.to(device)) for name, (left, right) in self.items().items()})


class KroneckerPrecision(Precision):
    """R = 1/2 sum_M tr[(M - M_0)^T L (M - M_0) R].

    Args:
        blocks (`KroneckerBlocks`): One block per adapter key.
    """

    structure, space = "kronecker", "adapter"

    def __init__(self, blocks: KroneckerBlocks):
        self.blocks = blocks

    def energy_and_gradient(self, state: State, mean: State) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Precision.energy_and_gradient`."""
        gradients: dict[str, Tensor] = {}
        energies = []
        for keys, left, right in self.blocks.groups:
            offset = stack(state, keys, left.values) - stack(mean, keys, left.values)  # (n, o, i)
            gradient = right.matmul(left.matmul(offset).mT).mT
            energies.append((gradient * offset).sum() / 2)
            gradients.update(zip(keys, gradient.unbind(0), strict=True))
        return torch.stack(energies).sum(), gradients

    def proximal(self, state: State, mean: State, step: float) -> dict[str, Tensor]:
        """Exact: division by 1 + step * l_a r_b in the joint eigenbasis."""
        new: dict[str, Tensor] = {}
        for keys, left, right in self.blocks.groups:
            centre = stack(mean, keys, left.values)
            offset = divide_in_eigenbasis(left, right, stack(state, keys, left.values) - centre, step)
            new.update(zip(keys, (centre + offset).unbind(0), strict=True))
        return new

    def diagonal(self, state: State) -> dict[str, Tensor]:
        """diag(L) diag(R)^T per factor."""
        return {
            key: torch.outer(left.diagonal(), right.diagonal()) for key, (left, right) in self.blocks.items().items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """See `Precision.tensors`."""
        return self.blocks.tensors()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """See `Precision.from_tensors`."""
        return cls(KroneckerBlocks.from_tensors(tensors))

    def to(self, device: torch.device | str) -> Self:
        """See `Precision.to`."""
        return type(self)(self.blocks.to(device))
