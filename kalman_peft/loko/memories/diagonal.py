"""Diagonal memories: a precision per weight, or a covariance per weight (the published one)."""

import torch
from torch import Tensor

from ...precision import Precision
from ...precision.base import diffuse, normal
from ..views import View
from .base import TINY, Memory


class DiagonalMemory(Memory):
    """Precision pi per weight: pi <- pi + sum_k c_k^2. Never negative, whatever the columns."""

    def __init__(self, view: View):
        super().__init__(view, precision=view.zeros())

    @property
    def precision(self) -> Tensor:
        """pi, of the view's shape."""
        return self.tensors["precision"]

    def _reset(self, prior: Tensor) -> None:
        self.precision.copy_(prior.expand_as(self.precision))

    def relax(self, forgetting: float) -> None:
        """See `Memory.relax`."""
        self.precision.mul_(forgetting).add_(self.view.expand(self.prior) * (1 - forgetting))

    def diffuse(self, noise: Tensor) -> None:
        """See `Memory.diffuse`."""
        self.precision.copy_(diffuse(self.precision, self.view.expand(noise)))

    def update(self, columns: Tensor, explained: Tensor | None = None) -> None:
        """See `Memory.update`."""
        for column in columns:
            self.precision.addcmul_(column, column)

    def add_diagonal(self, diagonal: Tensor) -> None:
        """See `Memory.add_diagonal`."""
        self.precision.add_(diagonal)

    def gain(self, x: Tensor) -> Tensor:
        """See `Memory.gain`."""
        return self.variances().mul_(x) if x.shape == self.view.shape else x * self.variances()

    def variances(self) -> Tensor:
        """See `Memory.variances`."""
        return self.precision.clamp_min(TINY).reciprocal_()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """See `Memory.sample`."""
        return normal(self.view.shape, self.view.like, generator) * self.variances().sqrt()

    def absorb(self, precision: Precision, weight: float) -> bool:
        """See `Memory.absorb`."""
        self._absorb_diagonal(precision, weight)
        return precision.structure == "diagonal"


class CovarianceMemory(Memory):
    """Variance p per weight: p <- diag(P_+) of the posterior that couples all weights through the columns.

    LoKO's own, p <- diag((I - K H) diag p). Rounding cannot make it negative: an entry of the diagonal of an inverse
    is at least the inverse of the entry, so that p_+ >= 1 / (1/p + sum_k c_k^2).
    """

    needs_joint = True

    def __init__(self, view: View):
        super().__init__(view, variance=view.zeros())

    @property
    def variance(self) -> Tensor:
        """P, of the view's shape."""
        return self.tensors["variance"]

    def _reset(self, prior: Tensor) -> None:
        self.variance.copy_(prior.clamp_min(TINY).reciprocal().expand_as(self.variance))

    def relax(self, forgetting: float) -> None:
        """See `Memory.relax`."""
        prior = self.view.expand(self.prior)
        self.variance.copy_(1 / (forgetting / self.variance + (1 - forgetting) * prior))

    def diffuse(self, noise: Tensor) -> None:
        """See `Memory.diffuse`."""
        self.variance.add_(self.view.expand(noise))

    def update(self, columns: Tensor, explained: Tensor | None = None) -> None:
        """See `Memory.update`; `explained` is the diagonal of P - P_+."""
        if explained is None:
            raise ValueError("A covariance memory needs to know what the columns explain; use gain='joint'.")
        least = self.variance.reciprocal()
        for column in columns:
            least.addcmul_(column, column)
        torch.maximum(self.variance.sub_(explained), least.reciprocal_(), out=self.variance)

    def add_diagonal(self, diagonal: Tensor) -> None:
        """See `Memory.add_diagonal`."""
        self.variance.copy_(diffuse(self.variance, diagonal))  # the same formula, with the two in each other's place

    def gain(self, x: Tensor) -> Tensor:
        """See `Memory.gain`."""
        return self.variance * x

    def variances(self) -> Tensor:
        """See `Memory.variances`."""
        return self.variance

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """See `Memory.sample`."""
        return normal(self.view.shape, self.view.like, generator) * self.variance.sqrt()

    def absorb(self, precision: Precision, weight: float) -> bool:
        """See `Memory.absorb`."""
        self._absorb_diagonal(precision, weight)
        return precision.structure == "diagonal"
