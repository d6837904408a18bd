"""Dense precision: every pair of weights. For tests and tiny adapters."""

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


class DensePrecision(AdapterPrecision):
    """R = 1/2 (theta - mean)^T Lambda (theta - mean), with Lambda held in full.

    Args:
        matrix (`Tensor`): Lambda, shape (D, D), symmetric positive semi-definite.
        shapes (`Mapping[str, torch.Size]`): Shape of each adapter key, in the matrix's order.
    """

    structure = "dense"

    def __init__(self, matrix: Tensor, shapes: Mapping[str, torch.Size]):
        self.matrix, self.layout = matrix, Layout(shapes)
        self._spectrum: tuple[Tensor, Tensor] | None = None

    @property
    def like(self) -> Tensor:
        """See `Precision.like`."""
        return self.matrix

    def coordinates(self) -> dict[str, torch.Size]:
        """See `Precision.coordinates`."""
        return self.layout.shapes

    def matvec(self, x: State) -> dict[str, Tensor]:
        """See `Precision.matvec`."""
        return self.layout.unflatten(self.matrix @ self.layout.flatten(x, self.matrix))

    def solve(self, x: State, damping: float = 0.0, scale: float = 1.0) -> dict[str, Tensor]:
        """See `Precision.solve`."""
        values, vectors = self._eigen(damping)
        inner = vectors.mT @ self.layout.flatten(x, self.matrix)
        return self.layout.unflatten(vectors @ (inner / (scale * values + damping)))

    def logdet(self, damping: float = 0.0, scale: float = 1.0) -> Tensor:
        """See `Precision.logdet`."""
        check_damping(damping)
        values, _ = self._decompose()
        return (scale * values + damping).log().sum()

    def sample(self, damping: float = 0.0, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """See `Precision.sample`."""
        values, vectors = self._eigen(damping)
        noise = normal(values.shape, values, generator)
        return self.layout.unflatten(vectors @ (noise * (values + damping).rsqrt()))

    def scale(self, factor: float) -> Self:
        """See `Precision.scale`."""
        check_factor(factor)
        return type(self)(factor * self.matrix, self.layout.shapes)

    def merge(self, other: Precision, weight: float = 1.0, other_weight: float = 1.0) -> Self:
        """Exact, see `Precision.merge`."""
        self._check_mergeable(other, weight, other_weight)
        assert isinstance(other, DensePrecision)
        return type(self)(weight * self.matrix + other_weight * other.matrix.to(self.matrix), self.layout.shapes)

    def predict(self, process_noise: float | Mapping[str, float | Tensor]) -> Self:
        """(Lambda^-1 + Q)^-1, exact; see [`diffuse_dense`].

        Args:
            process_noise (`float` or `Mapping[str, float | Tensor]`):
                Variance q, for all weights or by adapter key (a scalar, or a tensor of the factor's shape).

        Returns:
            `Precision`: Of the same structure.
        """
        noise = self.layout.noise(process_noise, self.matrix)
        return type(self)(diffuse_dense(self.matrix, noise), self.layout.shapes)

    def to_dense(self) -> Tensor:
        """The matrix itself."""
        return self.matrix

    def diagonal(self, state: State) -> dict[str, Tensor]:
        """See `Precision.diagonal`."""
        return self.layout.unflatten(self.matrix.diagonal().clone())

    def tensors(self) -> dict[str, Tensor]:
        """See `Precision.tensors`."""
        sizes = {f"{i:06d}/{key}:shape": torch.tensor(s) for i, (key, s) in enumerate(self.layout.shapes.items())}
        return {"matrix": self.matrix} | sizes

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """See `Precision.from_tensors`."""
        return cls(tensors["matrix"], shapes_from_tensors(tensors))

    def to(self, device: torch.device | str) -> Self:
        """See `Precision.to`."""
        return type(self)(self.matrix.to(device), self.layout.shapes)

    def _decompose(self) -> tuple[Tensor, Tensor]:
        if self._spectrum is None:
            values, vectors = torch.linalg.eigh(self.matrix.double())
            self._spectrum = values.clamp(min=0).to(self.matrix), vectors.to(self.matrix)
        return self._spectrum

    def _eigen(self, damping: float) -> tuple[Tensor, Tensor]:
        check_damping(damping)
        values, vectors = self._decompose()
        if damping == 0:
            check_invertible(values.min(), values.max())
        return values, vectors


def diffuse_dense(matrix: Tensor, noise: Tensor) -> Tensor:
    """(Lambda^-1 + Q)^-1 = R^T (I + R Q R^T)^-1 R with Lambda = R^T R, for singular Lambda too.

    Nothing cancels, however large Q is; Lambda - Lambda (Lambda + Q^-1)^-1 Lambda would.

    Args:
        matrix (`Tensor`): Lambda, shape (..., D, D).
        noise (`Tensor`): Diagonal of Q, shape (..., D).

    Returns:
        `Tensor`: Shape (..., D, D), symmetric.
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    root = values.clamp(min=0).sqrt()[..., :, None] * vectors.mT
    inner = (root * noise.double()[..., None, :]) @ root.mT
    inner.diagonal(dim1=-2, dim2=-1).add_(1)
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), root, upper=False)
    return (half.mT @ half).to(matrix)


def shapes_from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Shapes by key, in the order in which they were numbered."""
    found = sorted(name for name in tensors if name.endswith(":shape"))
    return {name.split("/", 1)[1].removesuffix(":shape"): torch.Size(tensors[name].tolist()) for name in found}
