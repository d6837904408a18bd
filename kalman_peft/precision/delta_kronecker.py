"""Kronecker-factored precision of the merged update DW = s B A, evaluated through r x r matrices.

With the second moments G (d_out, d_out) of the layer's output gradients and S (d_in, d_in) of its inputs,
R = 1/2 tr(G DW S DW^T) = 1/2 s^2 tr[(B^T G B)(A S A^T)]. Invariant under (B M, M^-1 A), and not blind to A at B = 0 as
curvature over A and B is. Around a start DW_0 = s B_0 A_0 the same holds for the stacked factors [B, -B_0], [A; A_0].
"""

from collections.abc import Iterator, Mapping
from typing import Self

import torch
from torch import Tensor

from ..adapters import A_SUFFIX, B_SUFFIX
from .base import Precision, State, stack
from .block_tridiagonal import BlockTridiagonalPrecision
from .ekfac import DeltaEigenKroneckerPrecision
from .factor import EigenFactor, apply_cells, shrink_cells
from .kronecker import KroneckerAlgebra, KroneckerBlocks


class DeltaKroneckerPrecision(KroneckerAlgebra):
    """R = 1/2 sum over layers of s^2 tr[(B^T G B)(A S A^T)], around the start.

    Args:
        blocks (`KroneckerBlocks`): (G, S) per module name.
        scaling (`Mapping[str, float]`): s per module name.
    """

    space = "delta_w"

    def __init__(self, blocks: KroneckerBlocks, scaling: Mapping[str, float]):
        super().__init__(blocks)
        self.scaling = dict(scaling)
        self._squares = [
            torch.tensor([self.scaling[n] ** 2 for n in names]).to(gradients.values)[:, None, None]
            for names, gradients, _ in blocks.groups
        ]

    def _with(self, blocks: KroneckerBlocks) -> "DeltaKroneckerPrecision":
        return type(self)(blocks, self.scaling)

    def _corrected(self, cells: dict[str, Tensor]) -> Precision:
        return DeltaEigenKroneckerPrecision(self.blocks, cells, self.scaling)

    def energy_and_gradient(self, state: State, mean: State) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Precision.energy_and_gradient`."""
        gradients: dict[str, Tensor] = {}
        energies = []
        for names, g, s, square, a, b in self._layers(state):
            a_all, b_all = _around(a, b, mean, names)
            gb, sa = g.matmul(b_all), s.matmul(a_all.mT)  # (n, d_out, R), (n, d_in, R)
            inner_b, inner_a = b_all.mT @ gb, a_all @ sa  # (n, R, R)
            energies.append((square * inner_a * inner_b).sum() / 2)
            rank = a.shape[1]
            _scatter(gradients, names, (square * inner_b @ sa.mT)[:, :rank], (square * gb @ inner_a)[:, :, :rank])
        return torch.stack(energies).sum(), gradients

    def proximal(self, state: State, mean: State, step: float) -> dict[str, Tensor]:
        """One sweep of exact block minimisation: B given A, then A given the new B. Never increases the objective."""
        new: dict[str, Tensor] = {}
        for names, g, s, square, a, b in self._layers(state):
            a0, b0 = stack(mean, [n + A_SUFFIX for n in names], a), stack(mean, [n + B_SUFFIX for n in names], a)
            c = step * square
            # B + c G B (A S A^T) = B~ + c G B_0 (A_0 S A^T)
            sa = s.matmul(a.mT)
            inner = EigenFactor.from_dense(c * (a @ sa))
            b = apply_cells(g, inner, shrink_cells(g, inner, 1.0), b + c * g.matmul(b0 @ (a0 @ sa)))
            # A + c (B^T G B) A S = A~ + c (B^T G B_0) A_0 S
            gb = g.matmul(b)
            inner = EigenFactor.from_dense(c * (b.mT @ gb))
            a = apply_cells(inner, s, shrink_cells(inner, s, 1.0), a + c * s.matmul(((gb.mT @ b0) @ a0).mT).mT)
            _scatter(new, names, a, b)
        return new

    def _layers(self, state: State) -> Iterator[tuple[list[str], EigenFactor, EigenFactor, Tensor, Tensor, Tensor]]:
        """Walk over stacks of layers of equal shape and rank.

        Yields:
            tuple: names, G, S, s^2 as (n, 1, 1), A as (n, r, d_in), B as (n, d_out, r).
        """
        for (names, g, s), square in zip(self.blocks.groups, self._squares, strict=True):
            by_rank: dict[int, list[int]] = {}
            for j, name in enumerate(names):
                by_rank.setdefault(state[name + A_SUFFIX].shape[0], []).append(j)
            for chosen in by_rank.values():
                keys = [names[j] for j in chosen]
                a = stack(state, [n + A_SUFFIX for n in keys], g.values)
                b = stack(state, [n + B_SUFFIX for n in keys], g.values)
                if len(by_rank) == 1:
                    yield keys, g, s, square, a, b
                else:
                    yield keys, g[chosen], s[chosen], square[chosen], a, b

    def diagonal(self, state: State) -> dict[str, Tensor]:
        """A: s^2 (B^T G B)_kk S_ii; B: s^2 G_oo (A S A^T)_kk."""
        result: dict[str, Tensor] = {}
        for name, (g, s) in self.blocks.items().items():
            a, b = state[name + A_SUFFIX].detach().to(g.values), state[name + B_SUFFIX].detach().to(g.values)
            square = self.scaling[name] ** 2
            result[name + A_SUFFIX] = square * torch.outer(g.quadratic(b).diagonal(), s.diagonal())
            result[name + B_SUFFIX] = square * torch.outer(g.diagonal(), s.quadratic(a.mT).diagonal())
        return result

    def linearized(self, state: State) -> BlockTridiagonalPrecision:
        """The Gaussian over A and B with the same second-order expansion at `state`: J^T (s^2 G (x) S) J.

        Args:
            state (`State`): The adapter's factors where the merged update is linearised.

        Returns:
            `BlockTridiagonalPrecision`: In the adapter's space; blind to A where B = 0.
        """
        items = self.blocks.items()
        blocks = {name: (g.scale(self.scaling[name] ** 2), s) for name, (g, s) in items.items()}
        like = self.like
        expansion = {n + x: state[n + x].detach().to(like, copy=True) for n in items for x in (A_SUFFIX, B_SUFFIX)}
        return BlockTridiagonalPrecision(KroneckerBlocks(blocks), expansion)

    def tensors(self) -> dict[str, Tensor]:
        """See `Precision.tensors`."""
        scales = {f"{name}:scaling.value": torch.tensor(s, dtype=torch.float64) for name, s in self.scaling.items()}
        return self.blocks.tensors() | scales

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """See `Precision.from_tensors`."""
        blocks = {k: t for k, t in tensors.items() if not k.endswith(":scaling.value")}
        scaling = {
            k.removesuffix(":scaling.value"): t.item() for k, t in tensors.items() if k.endswith(":scaling.value")
        }
        return cls(KroneckerBlocks.from_tensors(blocks), scaling)

    def to(self, device: torch.device | str) -> Self:
        """See `Precision.to`."""
        return type(self)(self.blocks.to(device), self.scaling)


def _around(a: Tensor, b: Tensor, mean: State, names: list[str]) -> tuple[Tensor, Tensor]:
    """[A; A_0] and [B, -B_0], without the start where all of it is zero."""
    b0 = stack(mean, [n + B_SUFFIX for n in names], b)
    if not b0.any():
        return a, b
    a0 = stack(mean, [n + A_SUFFIX for n in names], a)
    return torch.cat([a, a0], dim=1), torch.cat([b, -b0], dim=2)


def _scatter(result: dict[str, Tensor], names: list[str], a: Tensor, b: Tensor) -> None:
    result.update((n + A_SUFFIX, x) for n, x in zip(names, a.unbind(0), strict=True))
    result.update((n + B_SUFFIX, x) for n, x in zip(names, b.unbind(0), strict=True))
