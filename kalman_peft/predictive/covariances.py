"""Covariances of LoRA's factors, and what they make of a layer's input, without forming a product of bases.

A factor M (m, n) is E M + Q_L X Q_R^T with independent entries of X: in its own coordinates for a diagonal belief, in
the Kronecker eigenbases for an "ekfac" one. Through y = s B A x only the energies of x along A's right basis, and
those of u = A x along B's, are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn

from ..precision.factor import EigenFactor


@dataclass(frozen=True)
class FactorCovariance:
    """Covariance of a matrix M (m, n): (Q_L (x) Q_R) diag(cells) (Q_L (x) Q_R)^T.

    Args:
        cells (`Tensor`): Variances along pairs of directions; (m, n) without bases. Directions that a basis lacks
            share the last row or column, where there are any.
        left (`Tensor`, *optional*): Q_L, orthonormal columns, (m, k_left).
        right (`Tensor`, *optional*): Q_R, (n, k_right).
    """

    cells: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    @classmethod
    def from_precision(cls, left: EigenFactor, right: EigenFactor, cells: Tensor) -> Self:
        """The inverse of an EKFAC block.

        Args:
            left (`EigenFactor`): Basis of its rows.
            right (`EigenFactor`): Basis of its columns.
            cells (`Tensor`): Its eigenvalues > 0, (k_left + 1, k_right + 1), complements last.

        Returns:
            `FactorCovariance`: A complement of no dimension is left out.
        """
        rows, columns = (-1 if side.is_complete else None for side in (left, right))
        return cls(1 / cells[:rows, :columns], left.vectors, right.vectors)

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same elsewhere."""
        left, right = (None if q is None else q.to(device, dtype) for q in (self.left, self.right))
        return type(self)(self.cells.to(device, dtype), left, right)

    def energies(self, x: Tensor) -> Tensor:
        """Squares of x (..., n) along the right directions and, last, in their complement; (..., k_right + 1)."""
        if self.right is None:
            return x.square()
        inside = (x @ self.right).square()
        return self._completed(inside, lambda: x.square().sum(-1, keepdim=True))

    def spreads(self, variance: Tensor) -> Tensor:
        """As [`energies`], for independent entries of mean 0 and these variances."""
        if self.right is None:
            return variance
        inside = variance @ self.right.square()
        return self._completed(inside, lambda: variance.sum(-1, keepdim=True))

    def _completed(self, inside: Tensor, whole: Callable[[], Tensor]) -> Tensor:
        if self.cells.shape[1] == inside.shape[-1]:
            return inside
        return torch.cat([inside, (whole() - inside.sum(-1, keepdim=True)).clamp(min=0)], -1)

    @cached_property
    def by_row(self) -> Tensor:
        """Variance of M's rows along the right directions, Q_L^2 cells; (m, k_right + 1)."""
        if self.left is None:
            return self.cells
        shares = self.left.square()
        if self.cells.shape[0] > shares.shape[1]:
            shares = torch.cat([shares, (1 - shares.sum(-1, keepdim=True)).clamp(min=0)], -1)
        return shares @ self.cells

    def completed(self, side: int) -> Self:
        """The same with a full basis on one side, whose directions then need no complement.

        Args:
            side (`int`): 0 for the left one, 1 for the right one; should be short.
        """
        bases, cells = [self.left, self.right], self.cells
        basis = bases[side]
        if basis is None or cells.shape[side] == basis.shape[1]:
            return self
        bases[side] = torch.linalg.qr(basis, mode="complete").Q  # its first columns are those of the basis, up to sign
        known, last = cells.split([basis.shape[1], 1], side)
        more = last.repeat_interleave(basis.shape[0] - basis.shape[1], side)
        return type(self)(torch.cat([known, more], side), *bases)


class LoraMoments:
    """Moments of s B A x for uncertain A and B, independent of each other and of x.

    u = A x has the covariance Q_A diag(spread) Q_A^T with Q_A A's left basis, and second moments `power` + those of
    `spread` along B's right basis. Var y_o = s^2 sum (B Q_A)_oa^2 spread_a + s^2 sum_j W_oj (power_j + sum_a R_ja^2
    spread_a), with W B's variances by row and R = Q_B^T Q_A. Exact for a known x, and for independent entries of x.

    Args:
        factors (`tuple[Tensor, Tensor]`): Means of A (r, d_in) and B (d_out, r).
        covariances (`tuple[FactorCovariance, FactorCovariance]`): Of A and B, in the dtype of the factors.
        scaling (`float`): s.
    """

    def __init__(
        self,
        factors: tuple[Tensor, Tensor],
        covariances: tuple[FactorCovariance, FactorCovariance],
        scaling: float,
    ):
        (a, b), self._of_a, of_b = factors, covariances[0].completed(0), covariances[1].completed(1)
        left, right = self._of_a.left, of_b.right
        self._probe = a if right is None else right.mT @ a  # u along B's right directions, (r, d_in)
        turned = b if left is None else b @ left  # (d_out, r)
        rows = of_b.by_row  # (d_out, r)
        through = rows if left is None and right is None else rows @ _turn(left, right, rows).square()
        self.from_spread = scaling**2 * (turned.square() + through)  # (d_out, r)
        self.from_power = scaling**2 * rows  # (d_out, r)

    def of_mean(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Spread and power that x (..., d_in) makes, (..., r) each."""
        return nn.functional.linear(self._of_a.energies(x), self._of_a.cells), nn.functional.linear(
            x, self._probe
        ).square()

    def of_variance(self, variance: Tensor) -> tuple[Tensor, Tensor]:
        """What an input's variance adds to either."""
        spread = nn.functional.linear(self._of_a.spreads(variance), self._of_a.cells)
        return spread, nn.functional.linear(variance, self._probe.square())


def _turn(left: Tensor | None, right: Tensor | None, like: Tensor) -> Tensor:
    """Q_B^T Q_A, (r, r); an absent basis is the identity."""
    if right is None:
        return left if left is not None else torch.eye(like.shape[1]).to(like)
    return right.mT if left is None else right.mT @ left
