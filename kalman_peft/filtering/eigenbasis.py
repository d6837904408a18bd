"""Sums of precisions that are diagonal in Kronecker eigenbases: the state of a filter with structure "ekfac".

An open question of Low-Rank Filtering and Smoothing (arXiv:2410.06800) is Kronecker structure. With the eigenvalues E
of a block held cell by cell, prediction under noise that is isotropic within a matrix is E / (1 + q E) in the same
basis, and the prior delta * I is a constant in every basis. What has no exact form is a sum over two bases.
"""

import torch
from torch import Tensor

from ..precision import EigenFactor, EigenKroneckerPrecision, KroneckerBlocks
from ..precision.ekfac import turn_cells


Pair = tuple[EigenFactor, EigenFactor]


def pool(a: EigenKroneckerPrecision, b: EigenKroneckerPrecision) -> EigenKroneckerPrecision:
    """The part of a + b that is diagonal in a common Kronecker eigenbasis.

    Left and right basis are the eigenvectors of the sum's partial traces over the other side, sum_j Lambda_(ij),(kj):
    those of the Kronecker factors where a and b are Kronecker products. Partial traces of a sum are sums of partial
    traces, so that each summand counts by what it knows. In that basis the diagonal is carried over cell by cell,
    which keeps the trace. Exact if the bases agree, or one side has none (a constant).

    Args:
        a (`EigenKroneckerPrecision`): Whose order of blocks is kept.
        b (`EigenKroneckerPrecision`): Over the same coordinates.

    Returns:
        `EigenKroneckerPrecision`: With as many directions per side as the larger of the two; inputs that blocks share
        stay shared.
    """
    like = a.like
    b = b.to(like.device)
    mine, theirs = a.blocks.items(), b.blocks.items()
    cells_a, cells_b = a.cells, {name: c.to(like) for name, c in b.cells.items()}
    sharing: dict[tuple[int, int], list[str]] = {}
    for name in mine:
        sharing.setdefault((id(mine[name][1]), id(theirs[name][1])), []).append(name)
    blocks: dict[str, Pair] = {}
    for names in sharing.values():
        rights = [
            _sum([_marginal(pairs[n], cells[n].mT, side=1) for n in names])
            for pairs, cells in ((mine, cells_a), (theirs, cells_b))
        ]
        right = _joined(*rights)
        trace = right.trace().clamp(min=torch.finfo(like.dtype).tiny)
        right = right.scale(float(1 / trace))
        for n in names:
            left = _joined(_marginal(mine[n], cells_a[n], side=0), _marginal(theirs[n], cells_b[n], side=0))
            blocks[n] = (left, right)
    ordered = {n: blocks[n] for n in mine}
    cells = {
        n: turn_cells(mine[n], cells_a[n], basis) + turn_cells(theirs[n], cells_b[n], basis)
        for n, basis in ordered.items()
    }
    return EigenKroneckerPrecision(KroneckerBlocks(ordered), cells)


def variances_in_basis(precision: EigenKroneckerPrecision) -> dict[str, Tensor]:
    """Diagonal of Lambda^-1, one tensor per key.

    Args:
        precision (`EigenKroneckerPrecision`): Positive definite.

    Returns:
        `dict[str, Tensor]`: Variances.
    """
    inverse = {}
    for name, (left, right) in precision.blocks.items().items():
        real = (left.multiplicity[:, None] * right.multiplicity) > 0
        cells = precision.cells[name]
        # A complement of no dimension has no variance; its eigenvalue may be anything.
        inverse[name] = torch.where(real, 1 / torch.where(real, cells, 1.0), 0.0)
    return EigenKroneckerPrecision(precision.blocks, inverse)._cell_diagonals()


def _marginal(pair: Pair, cells: Tensor, side: int) -> EigenFactor:
    """Partial trace over the other side, with `cells` turned so that this side's directions are the rows."""
    mine, other = pair[side], pair[1 - side]
    values = cells @ other.multiplicity  # (k + 1,)
    return EigenFactor(mine.vectors, values[:-1], values[-1])


def _sum(marginals: list[EigenFactor]) -> EigenFactor:
    """Of factors in one basis."""
    values = torch.stack([m.values for m in marginals]).sum(0)
    return EigenFactor(marginals[0].vectors, values, torch.stack([m.tail for m in marginals]).sum())


def _joined(a: EigenFactor, b: EigenFactor) -> EigenFactor:
    """a + b, in the basis of one of them where that is possible: a new one would mix directions of equal weight."""
    if not a.signature[1]:
        return EigenFactor(b.vectors.to(a.vectors), b.values + a.tail, b.tail + a.tail)
    if not b.signature[1]:
        return EigenFactor(a.vectors, a.values + b.tail, a.tail + b.tail)
    if a.signature == b.signature and torch.equal(a.vectors, b.vectors):
        return EigenFactor(a.vectors, a.values + b.values, a.tail + b.tail)
    return a.merge(b, 1.0, 1.0)
