"""Diagonal plus low rank: Lambda = diag(pi) + U U^T, for the directions of largest curvature across all layers.

The structure of Low-Rank Filtering and Smoothing (arXiv:2410.06800) and of diagonal-plus-low-rank Kalman filters. Cut
to rank k, what is dropped stays as its diagonal, so that the diagonal of Lambda is always exact.
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from .base import (
    AdapterPrecision,
    Layout,
    Precision,
    State,
    check_damping,
    check_factor,
    check_invertible,
    normal,
)
from .dense import shapes_from_tensors


class LowRankPrecision(AdapterPrecision):
    """R = 1/2 (theta - mean)^T (diag(pi) + U U^T) (theta - mean).

    Args:
        entries (`Tensor`): pi >= 0, shape (D,).
        columns (`Tensor`): U, shape (D, k).
        shapes (`Mapping[str, torch.Size]`): Shape of each adapter key, in the vectors' order.
    """

    structure = "low_rank"

    def __init__(self, entries: Tensor, columns: Tensor, shapes: Mapping[str, torch.Size]):
        self.entries, self.columns, self.layout = entries, columns, Layout(shapes)

    @property
    def like(self) -> Tensor:
        """See `Precision.like`."""
        return self.entries

    @property
    def rank(self) -> int:
        """k."""
        return self.columns.shape[1]

    def coordinates(self) -> dict[str, torch.Size]:
        """See `Precision.coordinates`."""
        return self.layout.shapes

    def matvec(self, x: State) -> dict[str, Tensor]:
        """See `Precision.matvec`."""
        flat = self.layout.flatten(x, self.entries)
        return self.layout.unflatten(self.entries * flat + self.columns @ (self.columns.mT @ flat))

    def solve(self, x: State, damping: float = 0.0, scale: float = 1.0) -> dict[str, Tensor]:
        """By the Woodbury identity, see `Precision.solve`."""
        return self.layout.unflatten(self.solve_vectors(self.layout.flatten(x, self.entries), damping, scale))

    def logdet(self, damping: float = 0.0, scale: float = 1.0) -> Tensor:
        """By the matrix determinant lemma, see `Precision.logdet`."""
        check_damping(damping)
        diagonal = scale * self.entries + damping
        if not diagonal.min() > 0:
            return diagonal.new_tensor(-torch.inf)
        capacitance = self._capacitance(diagonal, scale)
        return diagonal.log().sum() + torch.linalg.slogdet(capacitance).logabsdet.to(diagonal)

    def sample(self, damping: float = 0.0, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """A draw from N(0, Lambda + damping I), solved for: its covariance is then the inverse."""
        check_damping(damping)
        noise = normal(self.entries.shape, self.entries, generator) * (self.entries + damping).sqrt()
        noise = noise + self.columns @ normal(self.columns.shape[1:], self.entries, generator)
        return self.layout.unflatten(self.solve_vectors(noise, damping))

    def scale(self, factor: float) -> Self:
        """See `Precision.scale`."""
        check_factor(factor)
        return type(self)(factor * self.entries, factor**0.5 * self.columns, self.layout.shapes)

    def merge(self, other: Precision, weight: float = 1.0, other_weight: float = 1.0) -> Self:
        """Join the columns and cut to the larger rank; exact where the ranks suffice, the diagonal always."""
        self._check_mergeable(other, weight, other_weight)
        assert isinstance(other, LowRankPrecision)
        theirs = other.to(self.entries.device)
        columns = torch.cat([weight**0.5 * self.columns, other_weight**0.5 * theirs.columns], dim=1)
        entries = weight * self.entries + other_weight * theirs.entries
        return self.compress(entries, columns, self.layout.shapes, max(self.rank, other.rank))

    def predict(self, process_noise: float | Mapping[str, float | Tensor]) -> Self:
        """w = 1 / (1 + q pi): diag(pi w) + (w U) (I + U^T diag(q w) U)^-1 (w U)^T, exact.

        Args:
            process_noise (`float` or `Mapping[str, float | Tensor]`):
                Variance q, for all weights or by adapter key (a scalar, or a tensor of the factor's shape).

        Returns:
            `Precision`: Of the same structure and rank.
        """
        noise = self.layout.noise(process_noise, self.entries)
        shrink = 1 / (1 + noise * self.entries)
        inner = (self.columns.mT * (noise * shrink)) @ self.columns
        root = torch.linalg.cholesky(torch.eye(self.rank).to(inner).double() + inner)  # (k, k)
        columns = torch.linalg.solve_triangular(root.to(inner), (shrink[:, None] * self.columns).mT, upper=False).mT
        return type(self)(self.entries * shrink, columns.contiguous(), self.layout.shapes)

    @classmethod
    def compress(
        cls,
        entries: Tensor,
        columns: Tensor,
        shapes: Mapping[str, torch.Size],
        rank: int,
        keep_discarded: bool = True,
    ) -> Self:
        """Keep the `rank` largest directions of U U^T, and of the others the diagonal.

        Args:
            entries (`Tensor`): pi, shape (D,).
            columns (`Tensor`): U, shape (D, m), through whose (m, m) Gram matrix the directions are found.
            shapes (`Mapping[str, torch.Size]`): Shape of each adapter key.
            rank (`int`): k.
            keep_discarded (`bool`, *optional*, defaults to `True`):
                Whether the others leave their diagonal in pi; without it the result is never above the original.

        Returns:
            `LowRankPrecision`: Equal if U has rank <= k.
        """
        if columns.shape[1] <= rank:
            return cls(entries, columns, shapes)
        _, mixing = torch.linalg.eigh((columns.mT @ columns).double())  # ascending
        kept = columns @ mixing[:, mixing.shape[1] - rank :].to(columns)
        if not keep_discarded:
            return cls(entries, kept, shapes)
        dropped = torch.einsum("dk,dk->d", columns, columns) - torch.einsum("dk,dk->d", kept, kept)
        return cls(entries + dropped.clamp(min=0), kept, shapes)

    def diagonal(self, state: State) -> dict[str, Tensor]:
        """See `Precision.diagonal`."""
        return self.layout.unflatten(self.entries + self.columns.square().sum(1))

    def tensors(self) -> dict[str, Tensor]:
        """See `Precision.tensors`."""
        sizes = {f"{i:06d}/{key}:shape": torch.tensor(s) for i, (key, s) in enumerate(self.layout.shapes.items())}
        return {"entries": self.entries, "columns": self.columns} | sizes

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """See `Precision.from_tensors`."""
        return cls(tensors["entries"], tensors["columns"], shapes_from_tensors(tensors))

    def to(self, device: torch.device | str) -> Self:
        """See `Precision.to`."""
        return type(self)(self.entries.to(device), self.columns.to(device), self.layout.shapes)

    def _capacitance(self, diagonal: Tensor, scale: float) -> Tensor:
        """I + scale U^T diagonal^-1 U, in float64."""
        inner = (self.columns.mT / diagonal) @ self.columns
        return torch.eye(self.rank, dtype=torch.float64, device=inner.device) + scale * inner.double()

    def solve_vectors(self, x: Tensor, damping: float = 0.0, scale: float = 1.0) -> Tensor:
        """`solve` for flattened vectors x (..., D)."""
        check_damping(damping)
        diagonal = scale * self.entries + damping
        check_invertible(diagonal.min())
        y = x / diagonal
        inner = torch.linalg.solve(self._capacitance(diagonal, scale), (y @ self.columns)[..., None].double())
        return y - scale * (inner[..., 0].to(y) @ self.columns.mT) / diagonal

    def variances(self) -> Tensor:
        """Diagonal of Lambda^-1, shape (D,)."""
        root = torch.linalg.cholesky(self._capacitance(self.entries, 1.0))
        whitened = torch.linalg.solve_triangular(root, (self.columns.mT / self.entries).double(), upper=False)
        return (1 / self.entries - whitened.square().sum(0).to(self.entries)).clamp_min(0)
