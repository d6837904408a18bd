"""Symmetric positive semi-definite factors held by eigenvectors: V diag(values - tail) V^T + tail * I.

With all n eigenvectors kept the factor is exact and the tail is empty; with k < n of them the tail is the mean
eigenvalue of the rest, so that the trace is kept. One representation serves small dense sides and long ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class EigenFactor:
    """One factor, or a batch of equally shaped ones.

    Args:
        vectors (`Tensor`): Orthonormal columns, shape (..., n, k).
        values (`Tensor`): Eigenvalues >= 0, shape (..., k).
        tail (`Tensor`): Eigenvalue of the orthogonal complement, shape (...).
    """

    vectors: Tensor
    values: Tensor
    tail: Tensor

    @classmethod
    def from_dense(cls, matrix: Tensor, rank: int | None = None) -> Self:
        """Eigendecompose symmetric matrices (..., n, n), keeping the `rank` largest eigenpairs (all by default).

        Returns:
            `EigenFactor`: In the dtype of the matrix; negative eigenvalues (rounding) are set to zero.
        """
        n = matrix.shape[-1]
        values, vectors = torch.linalg.eigh(matrix.double())
        values = values.clamp_(min=0)
        k = n if rank is None else min(rank, n)
        tail = values[..., : n - k].mean(-1) if k < n else values.new_zeros(values.shape[:-1])
        return cls(
            vectors[..., n - k :].to(matrix.dtype).contiguous(), values[..., n - k :].to(matrix.dtype).contiguous(),
            tail.to(matrix.dtype),
        )  # fmt: skip

    @classmethod
    def from_sketch(cls, sketch: Tensor, test_matrix: Tensor, trace: Tensor, rank: int) -> Self:
        """Nystroem approximation of S from the single-pass sketch Y = S Omega.

        S ~ Y (Omega^T Y)^+ Y^T (Tropp, Yurtsever, Udell and Cevher, 2017), its `rank` largest eigenpairs, and
        the rest of the trace spread over the complement. Exact if S has rank <= the number of columns of Omega.

        Args:
            sketch (`Tensor`): Y, shape (n, m).
            test_matrix (`Tensor`): Omega, shape (n, m), m >= rank.
            trace (`Tensor`): tr S, a scalar.
            rank (`int`): Number of eigenpairs kept.

        Returns:
            `EigenFactor`: In the dtype of the sketch.
        """
        dtype, n = sketch.dtype, sketch.shape[0]
        y, omega = sketch.double(), test_matrix.double()
        core = omega.mT @ y
        core = (core + core.mT) / 2
        # The pseudo-inverse square root of the core: directions below rounding carry no information.
        d, u = torch.linalg.eigh(core)
        keep = d > d[-1].clamp(min=0) * 1e-10 * n
        root = u * torch.where(keep, d.clamp(min=torch.finfo(d.dtype).tiny).rsqrt(), torch.zeros_like(d))
        vectors, singular, _ = torch.linalg.svd(y @ root, full_matrices=False)  # S ~ (Y root)(Y root)^T
        values = singular[:rank].square()
        vectors = vectors[:, :rank]
        total = trace.double()
        values = values * torch.clamp(total / values.sum().clamp(min=torch.finfo(d.dtype).tiny), max=1.0)
        rest = (total - values.sum()).clamp(min=0) / max(n - rank, 1)
        return cls(vectors.to(dtype).contiguous(), values.to(dtype), rest.to(dtype))

    @classmethod
    def stack(cls, factors: Sequence["EigenFactor"]) -> Self:
        """Batch equally shaped factors along a new first dimension."""
        return cls(
            torch.stack([f.vectors for f in factors]),
            torch.stack([f.values for f in factors]),
            torch.stack([f.tail for f in factors]),
        )

    def __getitem__(self, index: int | list[int]) -> "EigenFactor":
        return EigenFactor(self.vectors[index], self.values[index], self.tail[index])

    @property
    def size(self) -> int:
        """n, the side of the factor."""
        return self.vectors.shape[-2]

    @property
    def signature(self) -> tuple[int, int]:
        """(n, k): factors of one signature can be stacked."""
        return self.vectors.shape[-2], self.vectors.shape[-1]

    @property
    def is_complete(self) -> bool:
        """Whether all eigenpairs are kept, so that there is no complement."""
        return self.vectors.shape[-1] == self.vectors.shape[-2]

    @property
    def extended(self) -> Tensor:
        """Eigenvalues and, last, that of the complement; shape (..., k + 1)."""
        return torch.cat([self.values, self.tail[..., None]], dim=-1)

    @property
    def multiplicity(self) -> Tensor:
        """How many dimensions each of `extended` stands for, shape (k + 1,)."""
        n, k = self.signature
        return torch.tensor([1.0] * k + [float(n - k)], dtype=self.values.dtype, device=self.values.device)

    def scale(self, factor: float) -> "EigenFactor":
        """factor * F."""
        return EigenFactor(self.vectors, factor * self.values, factor * self.tail)

    def merge(self, other: "EigenFactor", weight: float, other_weight: float) -> "EigenFactor":
        """weight * F + other_weight * other, with as many eigenpairs as the larger of the two; keeps the trace."""
        n, rank = self.size, max(self.signature[1], other.signature[1])
        parts = ((self, weight), (other.to(self.vectors.device), other_weight))
        if sum(f.signature[1] for f, _ in parts) >= n:
            return self.from_dense(sum(w * f.to_dense() for f, w in parts), rank)  # type: ignore[arg-type]
        basis = torch.linalg.qr(torch.cat([f.vectors.double() for f, _ in parts], dim=-1)).Q  # (..., n, 2k)
        core = torch.zeros((), dtype=basis.dtype, device=basis.device)
        for f, w in parts:
            inner = basis.mT @ f.vectors.double()  # (..., 2k, k)
            core = core + w * (inner * (f.values - f.tail[..., None]).double()[..., None, :]) @ inner.mT
        tail = sum(w * f.tail.double() for f, w in parts)
        values, vectors = torch.linalg.eigh(core)
        dropped = values[..., :-rank].sum(-1)
        kept = (values[..., -rank:] + tail[..., None]).clamp(min=0)  # type: ignore[index]
        dtype = self.values.dtype
        rest = (tail + dropped / (n - rank)).clamp(min=0)  # type: ignore[union-attr]
        return EigenFactor((basis @ vectors[..., -rank:]).to(dtype).contiguous(), kept.to(dtype), rest.to(dtype))

    def matmul(self, x: Tensor) -> Tensor:
        """Multiply from the left: (..., n, m) -> (..., n, m)."""
        projected = self.vectors.mT @ x  # (..., k, m)
        if self.is_complete:
            return self.vectors @ (self.values[..., None] * projected)
        excess = (self.values - self.tail[..., None])[..., None]
        return self.tail[..., None, None] * x + self.vectors @ (excess * projected)

    def quadratic(self, x: Tensor) -> Tensor:
        """x^T F x for columns x: (..., n, m) -> (..., m, m)."""
        return x.mT @ self.matmul(x)

    def trace(self) -> Tensor:
        """Trace of the factor, shape (...)."""
        return self.values.sum(-1) + self.tail * (self.size - self.values.shape[-1])

    def diagonal(self) -> Tensor:
        """Diagonal of the factor, shape (..., n)."""
        excess = (self.values - self.tail[..., None])[..., None, :]
        return self.tail[..., None] + (self.vectors.square() * excess).sum(-1)

    def to_dense(self) -> Tensor:
        """The matrix itself, shape (..., n, n); for tests and small sides."""
        eye = torch.eye(self.size, dtype=self.vectors.dtype, device=self.vectors.device)
        return self.matmul(eye.expand(*self.vectors.shape[:-2], self.size, self.size))

    def to(self, device: torch.device | str) -> "EigenFactor":
        """The factor on `device`."""
        return EigenFactor(self.vectors.to(device), self.values.to(device), self.tail.to(device))

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Named tensors for a file."""
        return {f"{prefix}.vectors": self.vectors, f"{prefix}.values": self.values, f"{prefix}.tail": self.tail}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> Self:
        """Inverse of `tensors`; raises KeyError where one is missing."""
        return cls(tensors[f"{prefix}.vectors"], tensors[f"{prefix}.values"], tensors[f"{prefix}.tail"])


def apply_cells(left: EigenFactor, right: EigenFactor, cells: Tensor, x: Tensor) -> Tensor:
    """Multiply by a matrix that is diagonal in the joint eigenbasis of two factors.

    Only the factors' vectors are used. With P, Q their projectors onto kept directions, the entries of `cells` act on
    the kept pairs of directions; its last row and column act on the complements of the left and right basis.

    Args:
        left (`EigenFactor`): Basis of the rows, side o.
        right (`EigenFactor`): Basis of the columns, side i.
        cells (`Tensor`): Shape (..., k_left + 1, k_right + 1).
        x (`Tensor`): Shape (..., o, i).

    Returns:
        `Tensor`: Shape (..., o, i).
    """
    inside = x @ right.vectors  # (..., o, k_right)
    y = _apply_left(left, cells[..., :-1], inside) @ right.vectors.mT
    if right.is_complete:
        return y
    return y + _apply_left(left, cells[..., -1:], x - inside @ right.vectors.mT)


def _apply_left(left: EigenFactor, cells: Tensor, x: Tensor) -> Tensor:
    """The same for the rows; cells (..., k_left + 1, m), or m = 1 for all columns, x (..., o, m)."""
    projected = left.vectors.mT @ x  # (..., k_left, m)
    y = left.vectors @ (cells[..., :-1, :] * projected)
    if left.is_complete:
        return y
    return y + cells[..., -1:, :] * (x - left.vectors @ projected)


def shrink_cells(left: EigenFactor, right: EigenFactor, scale: float) -> Tensor:
    """Cells of (I + scale * L (x) R)^-1, for `apply_cells`."""
    return 1 / (1 + scale * left.extended[..., :, None] * right.extended[..., None, :])
