"""What a filter remembers of the data: the protocol of all memories.

A memory holds the precision P^-1 (or the covariance P) of the weights of one `View`, as tensors changed in place. It
is to the filter what a `Precision` is to a belief, with the same structures and the same arithmetic, which both take
from `kalman_peft.precision`: `absorb` takes a belief in, `export` (in the package) gives one back.

With the isotropic prior delta_j of each parameter j, a step is
    relax    P^-1 <- gamma P^-1 + (1 - gamma) delta
    diffuse  P <- P + q
    update   P^-1 <- P^-1 + sum_k c_k c_k^T for columns c_k, kept in the memory's structure
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ...precision import Precision
from ..views import View


TINY = 1e-30


class Memory(ABC):
    """Gaussian memory over one view.

    Args:
        view (`View`): The weights.
        tensors (`dict[str, Tensor]`): The state, beside "prior" (n,), which is still to be set.
    """

    needs_joint: ClassVar[bool] = False  # whether `update` must know how the columns couple all weights

    def __init__(self, view: View, **tensors: Tensor):
        self.view = view
        self.tensors = {**tensors, "prior": view.like.new_zeros(len(view.params))}

    @property
    def prior(self) -> Tensor:
        """Isotropic prior precision of each parameter, (n,); 0 where it is not settled yet."""
        return self.tensors["prior"]

    def set_prior(self, prior: Tensor) -> None:
        """Replace all that was remembered by an isotropic prior precision, one value per parameter (n,)."""
        self.prior.copy_(prior)
        self._reset(self.view.expand(prior))

    @abstractmethod
    def _reset(self, prior: Tensor) -> None:
        """Forget everything but a prior precision that broadcasts against the view's shape."""

    @abstractmethod
    def relax(self, forgetting: float) -> None:
        """P^-1 <- gamma P^-1 + (1 - gamma) prior."""

    @abstractmethod
    def diffuse(self, noise: Tensor) -> None:
        """P <- P + q, with a variance q >= 0 per parameter (n,)."""

    @abstractmethod
    def update(self, columns: Tensor, explained: Tensor | None = None) -> None:
        """Take in the information sum_k c_k c_k^T of columns (m, *shape).

        Args:
            columns (`Tensor`): Shape (m, *shape).
            explained (`Tensor`, *optional*): See [`Joint.explained`]; only where `needs_joint`.
        """

    @abstractmethod
    def add_diagonal(self, diagonal: Tensor) -> None:
        """Add information that is diagonal in the weights, of the view's shape."""

    @abstractmethod
    def gain(self, x: Tensor) -> Tensor:
        """P x, for x (..., *shape)."""

    def gram(self, columns: Tensor) -> Tensor:
        """C^T P C of columns (m, *shape): (m, m), float64."""
        return (columns.flatten(1) @ self.gain(columns).flatten(1).mT).double()

    @abstractmethod
    def variances(self) -> Tensor:
        """Diagonal of P, of the view's shape."""

    def traces(self) -> Tensor:
        """Sum of the variances of each parameter, (n,)."""
        return self.view.per_parameter(self.variances())

    @abstractmethod
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw from N(0, P), of the view's shape."""

    @abstractmethod
    def absorb(self, precision: Precision, weight: float) -> bool:
        """Add weight * precision over the view's parameters.

        Returns:
            `bool`: Whether all of it was kept; else what the structure cannot hold was added as a diagonal.
        """

    def _absorb_diagonal(self, precision: Precision, weight: float) -> None:
        diagonal = precision.diagonal({})
        self.add_diagonal(weight * self.view.gather([diagonal.get(name) for name in self.view.names]))


class Joint:
    """How columns of all views couple: S = I + sum over views of C^T P C, and the gain through it.

    P_+ = P - P C S^-1 C^T P for the posterior of the prior P and the columns C, over all weights at once.

    Args:
        columns (`list[Tensor]`): (m, *shape) per view.
        memories (`list[Memory]`): Of the same views, before the update.
    """

    def __init__(self, columns: list[Tensor], memories: list[Memory]):
        self.columns, self.memories = columns, memories
        inner = torch.stack([memory.gram(c) for memory, c in zip(memories, columns, strict=True)]).sum(0)
        self.energy = inner.diagonal().sum()  # sum_k c_k^T P c_k
        capacitance = torch.eye(len(inner), dtype=torch.float64, device=inner.device) + (inner + inner.mT) / 2
        self.root = cholesky(capacitance, least=1.0)  # S = root root^T

    def gain(self, x: list[Tensor], prior_gain: list[Tensor]) -> list[Tensor]:
        """P_+ x = P (x - C S^-1 C^T P x), from P x; so that P C need not be kept."""
        inner = torch.cholesky_solve(self.project(prior_gain)[:, None], self.root)[:, 0]
        return [memory.gain(v) for memory, v in zip(self.memories, self.add(x, -inner), strict=True)]

    def add(self, x: list[Tensor], weights: Tensor) -> list[Tensor]:
        """x + C w per view, for weights w (m,)."""
        return [
            torch.addmv(v.reshape(-1), c.flatten(1).mT, weights.to(c)).view_as(v)
            for v, c in zip(x, self.columns, strict=True)
        ]

    def project(self, x: list[Tensor]) -> Tensor:
        """C^T x over all views, (m,), float64."""
        return (
            torch.stack([c.flatten(1) @ v.reshape(-1) for c, v in zip(self.columns, x, strict=True)]).double().sum(0)
        )

    def explained(self, index: int) -> Tensor:
        """Diagonal of P - P_+ in one view, of its shape: what the columns explain."""
        gained = self.memories[index].gain(self.columns[index])  # P C
        eye = torch.eye(len(self.root)).to(self.root)
        inverse = torch.linalg.solve_triangular(self.root, eye, upper=False)
        whitened = inverse.to(gained) @ gained.flatten(1)
        return whitened.square_().sum(0).view(gained.shape[1:])


def cholesky(matrix: Tensor, least: float = 0.0) -> Tensor:
    """Cholesky factor, in float64, of symmetric matrices (..., d, d) that rounding alone can make indefinite.

    Args:
        matrix (`Tensor`): Positive definite but for rounding; near-collinear columns and a loose prior can undo that.
        least (`float`, *optional*, defaults to 0.0): Eigenvalues are known to be at least this.

    Returns:
        `Tensor`: Lower triangular; where there is no factor, of the matrix with its smallest eigenvalues lifted.
    """
    matrix = matrix.double()
    root, failed = torch.linalg.cholesky_ex(matrix)
    if not failed.any():
        return root
    values, vectors = torch.linalg.eigh(matrix)
    lowest = (values[..., -1:] * matrix.shape[-1] * 1e-15).clamp_min(max(least, TINY))
    return torch.linalg.cholesky((vectors * torch.maximum(values, lowest)[..., None, :]) @ vectors.mT)
