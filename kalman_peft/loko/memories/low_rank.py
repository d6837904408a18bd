"""Diagonal plus low rank over all weights (LO-FI): what is cut off stays as its diagonal."""

import torch
from torch import Tensor

from ...precision import LowRankPrecision, Precision
from ..views import Flat
from .base import Memory


class LowRankMemory(Memory):
    """Precision diag(entries) + U U^T with U (D, rank).

    Columns are appended to U, which is cut to its `rank` largest directions again; the diagonal of what is dropped
    goes to the entries (Chang et al., 2023, arXiv:2305.19535), as in [`LowRankPrecision`], whose arithmetic this is.

    Args:
        view (`Flat`): The weights.
        rank (`int`): Directions kept.
    """

    def __init__(self, view: Flat, rank: int):
        size = view.shape.numel()
        super().__init__(view, entries=view.zeros(), columns=view.like.new_zeros(size, min(rank, size)))

    @property
    def precision(self) -> LowRankPrecision:
        """The present precision, sharing memory."""
        return LowRankPrecision(self.tensors["entries"], self.tensors["columns"], {"": self.view.shape})

    def _keep(self, precision: LowRankPrecision) -> None:
        self.tensors["entries"].copy_(precision.entries)
        self.tensors["columns"].copy_(precision.columns)

    def _reset(self, prior: Tensor) -> None:
        self.tensors["entries"].copy_(prior)
        self.tensors["columns"].zero_()

    def relax(self, forgetting: float) -> None:
        """See `Memory.relax`."""
        self._keep(self.precision.scale(forgetting))
        self.tensors["entries"].add_(self.view.expand(self.prior), alpha=1 - forgetting)

    def diffuse(self, noise: Tensor) -> None:
        """See `Memory.diffuse`."""
        self._keep(self.precision.predict({"": self.view.expand(noise)}))

    def update(self, columns: Tensor, explained: Tensor | None = None) -> None:
        """See `Memory.update`."""
        kept = self.tensors["columns"]
        joined = torch.cat([kept, columns.mT], dim=1)
        self._keep(LowRankPrecision.compress(self.tensors["entries"], joined, {"": self.view.shape}, kept.shape[1]))

    def add_diagonal(self, diagonal: Tensor) -> None:
        """See `Memory.add_diagonal`."""
        self.tensors["entries"].add_(diagonal)

    def gain(self, x: Tensor) -> Tensor:
        """See `Memory.gain`."""
        return self.precision.solve_vectors(x)

    def variances(self) -> Tensor:
        """See `Memory.variances`."""
        return self.precision.variances()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """See `Memory.sample`."""
        return self.precision.sample(generator=generator)[""]

    def absorb(self, precision: Precision, weight: float) -> bool:
        """See `Memory.absorb`."""
        if not isinstance(precision, LowRankPrecision):
            self._absorb_diagonal(precision, weight)
            return precision.structure == "diagonal"
        assert isinstance(self.view, Flat)
        flat = precision.scale(weight)
        entries, columns = flat.layout.unflatten(flat.entries), flat.columns.mT
        names = self.view.names
        self.add_diagonal(self.view.gather([entries.get(name) for name in names]))
        parts = dict(zip(flat.layout.shapes, columns.split(flat.layout.sizes, dim=1), strict=True))
        shaped = [
            parts[name].unflatten(1, p.shape) if name in parts else None
            for name, p in zip(names, self.view.params, strict=True)
        ]
        self.update(self.view.gather(shaped, len(columns)))
        return len(columns) <= self.tensors["columns"].shape[1]
