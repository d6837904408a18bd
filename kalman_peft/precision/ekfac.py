"""Eigenvalue-corrected Kronecker precision (EKFAC): Kronecker eigenvectors, with eigenvalues of their own.

In the eigenbasis Q_L, Q_R of a block's Kronecker factors the precision is the diagonal E, the second moment of the
scores along each pair of directions (George, Laurent, Bouthillier, Ballas and Vincent, 2018, eq. 8): of all matrices
diagonal in that basis the closest to the exact one in Frobenius norm. Directions left out of a long side share one row
or column of E.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from ..adapters import A_SUFFIX, B_SUFFIX
from .base import AdapterPrecision, Precision, State, check_factor, diffuse, noise_by_block
from .factor import EigenFactor
from .kronecker import EigenbasisAlgebra, Group, KroneckerBlocks, squares


class EigenKroneckerAlgebra(EigenbasisAlgebra):
    """Blocks (Q_L (x) Q_R) diag(E) (Q_L (x) Q_R)^T.

    Args:
        blocks (`KroneckerBlocks`): The bases, with the eigenvalues of the Kronecker factors they came from.
        cells (`Mapping[str, Tensor]`): E, shape (k_left + 1, k_right + 1), per name; complements last.
    """

    structure = "ekfac"

    def __init__(self, blocks: KroneckerBlocks, cells: Mapping[str, Tensor]):
        self.blocks = blocks
        self.cells = {name: cells[name] for name in blocks.order}
        self._stacked = [torch.stack([self.cells[n] for n in group.names]) for group in blocks.groups]

    def _with(self, blocks: KroneckerBlocks, cells: Mapping[str, Tensor]) -> Any:
        return type(self)(blocks, cells)

    def _cells(self) -> Iterator[tuple[Group, Tensor]]:
        yield from zip(self.blocks.groups, self._stacked, strict=True)

    def scale(self, factor: float) -> Self:
        """See `Precision.scale`."""
        check_factor(factor)
        return self._with(self.blocks.scale(factor), {name: factor * c for name, c in self.cells.items()})

    def merge(self, other: Precision, weight: float = 1.0, other_weight: float = 1.0) -> Self:
        """Pool the bases, and carry both E over as the diagonal in the pooled one; keeps the trace."""
        self._check_mergeable(other, weight, other_weight)
        assert isinstance(other, EigenKroneckerAlgebra)
        blocks = self.blocks.merge(other.blocks, weight, other_weight)
        mine, theirs = self.blocks.items(), other.blocks.items()
        cells = {
            name: weight * turn_cells(mine[name], self.cells[name], basis)
            + other_weight * turn_cells(theirs[name], other.cells[name].to(self.cells[name]), basis)
            for name, basis in blocks.items().items()
        }
        return self._with(blocks, cells)

    def predict(self, process_noise: float | Mapping[str, float | Tensor]) -> Self:
        """E / (1 + q E), exact.

        Args:
            process_noise (`float` or `Mapping[str, float | Tensor]`): Variance q, for all weights or by block.

        Returns:
            `Precision`: In the same bases.
        """
        noise = noise_by_block(process_noise, self.cells)
        return self._with(self.blocks, {name: diffuse(c, noise[name]) for name, c in self.cells.items()})

    def _cell_tensors(self) -> dict[str, Tensor]:
        return self.blocks.tensors() | {f"{name}:cells": c for name, c in self.cells.items()}

    @staticmethod
    def _split(tensors: Mapping[str, Tensor]) -> tuple[KroneckerBlocks, dict[str, Tensor]]:
        cells = {k.removesuffix(":cells"): t for k, t in tensors.items() if k.endswith(":cells")}
        blocks = KroneckerBlocks.from_tensors({k: t for k, t in tensors.items() if ":left." in k or ":right." in k})
        return blocks, cells


class EigenKroneckerPrecision(EigenKroneckerAlgebra, AdapterPrecision):
    """R = 1/2 sum_M sum_ab E_ab (Q_L^T (M - M_0) Q_R)_ab^2."""

    def diagonal(self, state: State) -> dict[str, Tensor]:
        """See `Precision.diagonal`."""
        return self._cell_diagonals()

    def tensors(self) -> dict[str, Tensor]:
        """See `Precision.tensors`."""
        return self._cell_tensors()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """See `Precision.from_tensors`."""
        return cls(*cls._split(tensors))

    def to(self, device: torch.device | str) -> Self:
        """See `Precision.to`."""
        return type(self)(self.blocks.to(device), {name: c.to(device) for name, c in self.cells.items()})


class DeltaEigenKroneckerPrecision(EigenKroneckerAlgebra):
    """The same for the merged updates, evaluated through the bases' products with A and B; DW is never formed.

    Args:
        blocks (`KroneckerBlocks`): See `EigenKroneckerAlgebra`; one per module name.
        cells (`Mapping[str, Tensor]`): See `EigenKroneckerAlgebra`.
        scaling (`Mapping[str, float]`): s per module name.
    """

    space = "delta_w"
    supports_proximal = False

    def __init__(self, blocks: KroneckerBlocks, cells: Mapping[str, Tensor], scaling: Mapping[str, float]):
        super().__init__(blocks, cells)
        self.scaling = dict(scaling)

    def _with(self, blocks: KroneckerBlocks, cells: Mapping[str, Tensor]) -> Any:
        return type(self)(blocks, cells, self.scaling)

    def energy_and_gradient(self, state: State, mean: State) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Precision.energy_and_gradient`; with DW - DW_0 = s [B, -B_0] [A; A_0]."""
        gradient: dict[str, Tensor] = {}
        energies = []
        items = self.blocks.items()
        for name, (left, right) in items.items():
            square, cells = self.scaling[name] ** 2, self.cells[name]
            a, b = (state[name + suffix].detach().to(cells) for suffix in (A_SUFFIX, B_SUFFIX))
            a0, b0 = (mean[name + suffix].to(cells) for suffix in (A_SUFFIX, B_SUFFIX))
            rows, columns = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)  # (2r, i), (o, 2r)
            from_right, from_left = _apply_product(left, right, cells, columns, rows, a, b)
            gradient[name + B_SUFFIX] = square * from_right
            gradient[name + A_SUFFIX] = square * from_left
            whole, _ = _apply_product(left, right, cells, columns, rows, rows, b)
            energies.append(square * (whole * columns).sum() / 2)
        return torch.stack(energies).sum(), gradient

    def proximal(self, state: State, mean: State, step: float) -> dict[str, Tensor]:
        """Not offered.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "The proximal form is not supported for structure='ekfac', space='delta_w'; use form='gradient', or "
            "structure='kronecker'."
        )

    def diagonal(self, state: State) -> dict[str, Tensor]:
        """A_ki: s^2 sum_o,o' B_ok (Y_ii)_oo' B_o'k for DW's block Y; B likewise."""
        result: dict[str, Tensor] = {}
        for name, (left, right) in self.blocks.items().items():
            square, cells = self.scaling[name] ** 2, self.cells[name]
            a, b = (state[name + suffix].detach().to(cells) for suffix in (A_SUFFIX, B_SUFFIX))
            result[name + A_SUFFIX] = square * _energies(left, b).mT @ cells @ squares(right).mT
            result[name + B_SUFFIX] = square * squares(left) @ cells @ _energies(right, a.mT)
        return result

    def tensors(self) -> dict[str, Tensor]:
        """See `Precision.tensors`."""
        scales = {f"{name}:scaling": torch.tensor(s, dtype=torch.float64) for name, s in self.scaling.items()}
        return self._cell_tensors() | scales

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """See `Precision.from_tensors`."""
        blocks, cells = cls._split(tensors)
        return cls(blocks, cells, {name: tensors[f"{name}:scaling"].item() for name in cells})

    def to(self, device: torch.device | str) -> Self:
        """See `Precision.to`."""
        return type(self)(self.blocks.to(device), {n: c.to(device) for n, c in self.cells.items()}, self.scaling)


def _apply_product(
    left: EigenFactor, right: EigenFactor, cells: Tensor, b: Tensor, a: Tensor, by_a: Tensor, by_b: Tensor
) -> tuple[Tensor, Tensor]:
    """(Y by_a^T, by_b^T Y) for Y the precision's block applied to b a, without forming b a or Y.

    Y = Q_L F Q_R^T + b (a Q_R) diag(e_b) Q_R^T + Q_L diag(e_a) (Q_L^T b) a + e b a, with e the cell of both
    complements, e_a and e_b what a row or column of the complements has beyond it, F what a cell has beyond all that.
    """
    corner, beyond_left, beyond_right = cells[-1, -1], cells[:-1, -1] - cells[-1, -1], cells[-1, :-1] - cells[-1, -1]
    m, n = left.vectors.mT @ b, a @ right.vectors  # (k_left, r), (r, k_right)
    f = (cells[:-1, :-1] - beyond_left[:, None] - beyond_right - corner) * (m @ n)  # (k_left, k_right)
    by_n, by_m = by_a @ right.vectors, left.vectors.mT @ by_b
    gram = a @ by_a.mT  # (r, r')
    from_right = left.vectors @ (f @ by_n.mT + beyond_left[:, None] * (m @ gram))
    from_right = from_right + b @ ((n * beyond_right) @ by_n.mT + corner * gram)
    inner = by_b.mT @ b  # (r', r)
    from_left = (by_m.mT @ f + inner @ (n * beyond_right)) @ right.vectors.mT
    from_left = from_left + ((by_m * beyond_left[:, None]).mT @ m + corner * inner) @ a
    return from_right, from_left


def _energies(factor: EigenFactor, x: Tensor) -> Tensor:
    """Squared length of each column of x along each direction and, last, in the complement; (k + 1, m)."""
    inside = (factor.vectors.mT @ x).square()
    return torch.cat([inside, (x.square().sum(0, keepdim=True) - inside.sum(0, keepdim=True)).clamp(min=0)])


def turn_cells(old: tuple[EigenFactor, EigenFactor], cells: Tensor, new: tuple[EigenFactor, EigenFactor]) -> Tensor:
    """Mean diagonal of a block in another basis, cell by cell."""
    return _overlap(old[0], new[0]) @ cells @ _overlap(old[1], new[1]).mT


def _overlap(old: EigenFactor, new: EigenFactor) -> Tensor:
    """Mean squared share of each old direction (or complement) in each new one, (k_new + 1, k_old + 1)."""
    n = old.size
    k_new = new.signature[1]
    if old.signature == new.signature and torch.equal(old.vectors, new.vectors):
        return torch.eye(k_new + 1, dtype=old.vectors.dtype, device=old.vectors.device)
    across = (new.vectors.mT @ old.vectors).square()  # (k_new, k_old)
    inside = torch.cat([across, (1 - across.sum(1, keepdim=True)).clamp(min=0)], dim=1)
    spread = (1 - across.sum(0)).clamp(min=0)  # of each old direction in the new complement
    both = (n - k_new - spread.sum()).clamp(min=0)
    last = torch.cat([spread, both[None]])[None] / max(n - k_new, 1)
    return torch.cat([inside, last])
