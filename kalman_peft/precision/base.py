"""The protocol that all structures of a precision share.

A precision defines one energy over adapter states, R(theta) = 1/2 (theta - mean)^T Lambda (theta - mean), or, in the
space of merged updates ("delta_w"), 1/2 vec(DW - DW_0)^T F vec(DW - DW_0) with DW = scaling * B A. Per token, R is the
second-order estimate of the rise of the source loss in nats.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor


State = Mapping[str, Tensor]  # adapter key -> tensor of the factor's shape


class Precision(ABC):
    """A positive semi-definite precision over the adapter's weights, in units of nats per observed token.

    All tensors are float32 (float64 in tests); states of any float dtype are cast at the boundary.
    """

    structure: ClassVar[str]
    space: ClassVar[str]
    supports_proximal: ClassVar[bool] = True

    @abstractmethod
    def energy_and_gradient(self, state: State, mean: State) -> tuple[Tensor, dict[str, Tensor]]:
        """The energy R, a scalar, and dR/dstate for every key this precision covers."""

    @abstractmethod
    def proximal(self, state: State, mean: State, step: float) -> dict[str, Tensor]:
        """Minimise step * R(x) + 1/2 ||x - state||^2 over x (block by block where R is not quadratic).

        Args:
            state (`State`): The point the minimiser stays close to.
            mean (`State`): The belief's mean.
            step (`float`): Strength times learning rate, >= 0.
        """

    @abstractmethod
    def diagonal(self, state: State) -> dict[str, Tensor]:
        """Diagonal of the Gauss-Newton matrix of R in the adapter's weights, at `state`; float32, one per key."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that defines this precision, as named tensors for a safetensors file."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Inverse of `tensors`.

        Raises:
            KeyError: A tensor is missing.
        """

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """A copy on `device` (itself if it is there already)."""

    def energy(self, state: State, mean: State) -> Tensor:
        """The energy R, a scalar tensor."""
        return self.energy_and_gradient(state, mean)[0]


def precision_from_tensors(structure: str, space: str, tensors: Mapping[str, Tensor]) -> Precision:
    """Rebuild a precision from its named tensors.

    Args:
        structure (`str`): "diagonal" or "kronecker".
        space (`str`): "adapter" or "delta_w".
        tensors (`Mapping[str, Tensor]`): As returned by `Precision.tensors`.

    Returns:
        `Precision`: Of the class that the two names stand for.

    Raises:
        ValueError: The structure is unknown.
    """
    classes = {(c.structure, c.space): c for c in Precision.__subclasses__()}
    if (structure, space) not in classes:
        known = sorted(f"{s} in {p} space" for s, p in classes)
        raise ValueError(f"Unknown precision structure {structure!r} in space {space!r}; known are {known}.")
    return classes[structure, space].from_tensors(tensors)


def stack(state: State, keys: list[str], like: Tensor) -> Tensor:
    """Stack equally shaped tensors of a state to (n, rows, columns) in the dtype and on the device of `like`."""
    return torch.stack([state[key].detach() for key in keys]).to(device=like.device, dtype=like.dtype)
