"""Second moments of the rows that pass a layer: in full for short sides, as a single-pass sketch for long ones."""

import zlib

import torch
from torch import Tensor

from ..precision import EigenFactor


def sketch_columns(rank: int) -> int:
    """Columns of a sketch that keeps `rank` eigenpairs: some more, so that the kept ones come out well.

    In steps of 16, in which matrix products are fastest.
    """
    return -(-(rank + 8) // 16) * 16


class SecondMoment:
    """Sum over rows of x x^T.

    Both forms are linear in the data, so that processes may add them: the sketch is Y = (sum x x^T) Omega with a fixed
    Gaussian Omega, and the trace.

    Args:
        size (`int`): n.
        rank (`int`): Eigenpairs kept of a long side.
        dense_limit (`int`): Sides up to this size are summed in full.
        name (`str`): Seeds Omega, so that all processes and all runs share it.
        like (`Tensor`): Gives dtype and device of the sums; rows on another device are multiplied there.
    """

    def __init__(self, size: int, rank: int, dense_limit: int, name: str, like: Tensor):
        self.size, self.rank = size, min(rank, size)
        self.dense = is_dense(size, rank, dense_limit)
        self.trace = like.new_zeros(())
        if self.dense:
            self.total = like.new_zeros(size, size)
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            self.omega = torch.randn(size, sketch_columns(self.rank), generator=generator).to(like)
            self.total = like.new_zeros(self.omega.shape[::-1])  # Y^T, which is faster to add to

    def add(self, rows: Tensor, weight: float) -> None:
        """Add rows (N, n)."""
        left = rows if self.dense else rows @ self.omega.to(rows.device)
        if rows.device == self.total.device:
            self.total.addmm_(left.mT, rows, alpha=weight)
        else:  # sums offloaded to the CPU
            self.total.add_((left.mT @ rows).to(self.total.device), alpha=weight)
        if not self.dense:
            self.trace.add_(torch.linalg.vector_norm(rows).square().to(self.trace.device), alpha=weight)

    def sums(self) -> list[Tensor]:
        """The linear statistics."""
        return [self.total] if self.dense else [self.total, self.trace]

    def finalize(self) -> EigenFactor:
        """The (normalised) second moment as a factor."""
        if self.dense:
            return EigenFactor.from_dense(self.total)
        return EigenFactor.from_sketch(self.total.mT, self.omega, self.trace, self.rank)


def is_dense(size: int, rank: int, dense_limit: int) -> bool:
    """Whether a side is summed in full: short, or no longer than its sketch would be."""
    return size <= max(dense_limit, sketch_columns(min(rank, size)))
