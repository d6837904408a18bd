"""Dense memories: a full precision matrix, over each parameter by itself or over all of them."""

import torch
from torch import Tensor

from ...precision import Precision
from ...precision.base import normal
from ...precision.dense import diffuse_dense
from ..views import Flat, View
from .base import Memory, cholesky


class DenseMemory(Memory):
    """Precision matrices (blocks, d, d): one per parameter of a stack, or one for a flat view of all parameters.

    The exact filter, for heads and small adapters: a step costs d^3. Held in float64: where the data outweigh the
    prior a millionfold, a float32 matrix is not positive definite any more.
    """

    def __init__(self, view: View):
        self.blocks = 1 if isinstance(view, Flat) else len(view.params)
        size = view.shape.numel() // self.blocks
        super().__init__(view, precision=view.like.new_zeros(self.blocks, size, size, dtype=torch.float64))

    @property
    def precision(self) -> Tensor:
        """P^-1, (blocks, d, d)."""
        return self.tensors["precision"]

    def _rows(self, x: Tensor) -> Tensor:
        """(..., *shape) -> (..., blocks, d)."""
        return x.reshape(*x.shape[: x.dim() - len(self.view.shape)], self.blocks, -1)

    def _spread(self, values: Tensor) -> Tensor:
        """What broadcasts against the view's shape, as (blocks, d)."""
        return self._rows(values.expand(self.view.shape))

    def _diagonal(self) -> Tensor:
        return self.precision.diagonal(dim1=-2, dim2=-1)

    def _reset(self, prior: Tensor) -> None:
        self.precision.zero_()
        self._diagonal().copy_(self._spread(prior))

    def relax(self, forgetting: float) -> None:
        """See `Memory.relax`."""
        self.precision.mul_(forgetting)
        self._diagonal().add_(self._spread(self.view.expand(self.prior)), alpha=1 - forgetting)

    def diffuse(self, noise: Tensor) -> None:
        """See `Memory.diffuse`."""
        self.precision.copy_(diffuse_dense(self.precision, self._spread(self.view.expand(noise))))

    def update(self, columns: Tensor, explained: Tensor | None = None) -> None:
        """See `Memory.update`."""
        rows = self._rows(columns).transpose(0, 1).double()  # (blocks, m, d)
        self.precision.baddbmm_(rows.mT, rows)

    def add_diagonal(self, diagonal: Tensor) -> None:
        """See `Memory.add_diagonal`."""
        self._diagonal().add_(self._spread(diagonal))

    def gain(self, x: Tensor) -> Tensor:
        """See `Memory.gain`."""
        rows = self._rows(x)
        columns = rows.reshape(-1, *rows.shape[-2:]).permute(1, 2, 0)  # (blocks, d, leading)
        solved = torch.cholesky_solve(columns.double(), self._root()).to(x)
        return solved.permute(2, 0, 1).reshape(x.shape)

    def variances(self) -> Tensor:
        """See `Memory.variances`."""
        inverse = torch.cholesky_inverse(self._root())
        return inverse.diagonal(dim1=-2, dim2=-1).to(self.view.like).reshape(self.view.shape)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """See `Memory.sample`."""
        noise = self._rows(normal(self.view.shape, self.view.like, generator))
        # P^-1 = R R^T, so that R^-T noise has covariance P
        drawn = torch.linalg.solve_triangular(self._root().mT, noise[..., None].double(), upper=True)
        return drawn[..., 0].to(self.view.like).reshape(self.view.shape)

    def absorb(self, precision: Precision, weight: float) -> bool:
        """See `Memory.absorb`."""
        shapes = precision.coordinates()
        if not isinstance(self.view, Flat) or set(shapes) - set(self.view.names):
            self._absorb_diagonal(precision, weight)
            return precision.structure == "diagonal"
        index = torch.arange(self.view.shape.numel(), device=self.precision.device)
        own = dict(zip(self.view.names, self.view.slices(index), strict=True))
        places = torch.cat([own[name].reshape(-1) for name in shapes])
        self.precision[0][places[:, None], places] += weight * precision.to_dense().to(self.precision)
        return True

    def _root(self) -> Tensor:
        """Cholesky factor of the precision, float64."""
        return cholesky(self.precision)
