"""The protocol that all structures of a precision share.

A precision is a symmetric positive semi-definite matrix Lambda over named coordinates: the adapter's factors (space
"adapter"), or the merged updates DW = scaling * B A of the adapted layers (space "delta_w"). It defines one energy
over adapter states, R(theta) = 1/2 (x - x_0)^T Lambda (x - x_0) with x the coordinates of theta, x_0 those of the
belief's mean. Per token, R is the second-order estimate of the rise of the source loss in nats.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor


State = Mapping[str, Tensor]  # adapter key -> tensor of the factor's shape
_DENSE_LIMIT = 20_000


class Precision(ABC):
    """A positive semi-definite precision over the adapter's weights, in units of nats per observed token.

    All tensors are float32 (float64 in tests); states of any float dtype are cast at the boundary. `matvec`, `solve`,
    `sample` and `to_dense` speak of the precision's own coordinates, see `coordinates`; the energy and what follows
    from it speak of the adapter's factors in either space.

    A curvature is singular in general: 0 where no gradient arrived, and along the gauge (B M, M^-1 A) of the two
    factors. `damping` adds damping * I, an isotropic prior.
    """

    structure: ClassVar[str]
    space: ClassVar[str]
    supports_proximal: ClassVar[bool] = True

    # -- energy over adapter states --------------------------------------------------------------------------------

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

    def energy(self, state: State, mean: State) -> Tensor:
        """The energy R, a scalar tensor."""
        return self.energy_and_gradient(state, mean)[0]

    # -- linear algebra over the coordinates -----------------------------------------------------------------------

    @abstractmethod
    def coordinates(self) -> dict[str, torch.Size]:
        """Name and shape of every coordinate block, in the order of `to_dense`."""

    @abstractmethod
    def matvec(self, x: State) -> dict[str, Tensor]:
        """Lambda x, block by block."""

    @abstractmethod
    def solve(self, x: State, damping: float = 0.0, scale: float = 1.0) -> dict[str, Tensor]:
        """(scale * Lambda + damping * I)^-1 x.

        Args:
            x (`State`): One tensor per coordinate block.
            damping (`float`, *optional*, defaults to 0.0): >= 0; positive where the precision is singular.
            scale (`float`, *optional*, defaults to 1.0): >= 0.

        Raises:
            ValueError: The matrix is singular.
        """

    @abstractmethod
    def logdet(self, damping: float = 0.0, scale: float = 1.0) -> Tensor:
        """log det(scale * Lambda + damping * I), a scalar; -inf where that is singular."""

    @abstractmethod
    def sample(self, damping: float = 0.0, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One draw from N(0, (Lambda + damping * I)^-1), one tensor per coordinate block.

        Args:
            damping (`float`, *optional*, defaults to 0.0): >= 0; positive where the precision is singular.
            generator (`torch.Generator`, *optional*): Source of the draw, on the precision's device.

        Raises:
            ValueError: The matrix is singular.
        """

    @abstractmethod
    def scale(self, factor: float) -> Self:
        """factor * Lambda, for a factor >= 0."""

    @abstractmethod
    def merge(self, other: "Precision", weight: float = 1.0, other_weight: float = 1.0) -> "Precision":
        """weight * Lambda + other_weight * other, kept in this structure.

        Exact for matrices that form a linear space (diagonal, dense); where that is not so the class says what is
        kept. Raises ValueError for another structure or other coordinates.
        """

    @abstractmethod
    def predict(self, process_noise: float) -> "Precision":
        """Precision after a step of random walk with covariance process_noise * I: (Lambda^-1 + q I)^-1.

        Free of divisions by Lambda: q = 0 is the identity, and directions of zero precision stay at zero.
        """

    def quadratic(self, x: State) -> Tensor:
        """x^T Lambda x, a scalar."""
        return dot(x, self.matvec(x))

    def to_dense(self) -> Tensor:
        """Lambda as a (D, D) matrix over the flattened coordinates; for tests and tiny adapters.

        Raises:
            ValueError: D is above 20,000.
        """
        shapes = self.coordinates()
        size = sum(shape.numel() for shape in shapes.values())
        if size > _DENSE_LIMIT:
            raise ValueError(f"to_dense() of {size} coordinates would take {8 * size**2 / 2**30:.0f} GiB.")
        layout = Layout(shapes)
        eye = torch.eye(size, dtype=self.dtype, device=self.like.device)
        return torch.stack([layout.flatten(self.matvec(layout.unflatten(row))) for row in eye])

    # -- files and devices -----------------------------------------------------------------------------------------

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

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """Some tensor of this precision; tells dtype and device."""

    @property
    def dtype(self) -> torch.dtype:
        """In which the precision is held and evaluated."""
        return self.like.dtype

    def _check_mergeable(self, other: "Precision", weight: float, other_weight: float) -> None:
        check_factor(weight)
        check_factor(other_weight)
        if weight + other_weight == 0:
            raise ValueError("Cannot merge precisions with weights 0 and 0.")
        if type(other) is not type(self):
            raise ValueError(
                f"Cannot merge a {self.structure} precision in {self.space} space with a {other.structure} one in "
                f"{other.space} space; estimate both with the same `structure` and `space`."
            )
        mine, theirs = self.coordinates(), other.coordinates()
        if mine != theirs:
            differing = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
            raise ValueError(f"Cannot merge precisions over different coordinates; they differ at {differing[:3]}.")


class AdapterPrecision(Precision):
    """A Gaussian over the adapter's factors themselves: the energy is quadratic in A and B."""

    space = "adapter"

    def energy_and_gradient(self, state: State, mean: State) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Precision.energy_and_gradient`."""
        offset = self._offset(state, mean)
        gradient = self.matvec(offset)
        return dot(offset, gradient) / 2, gradient

    def proximal(self, state: State, mean: State, step: float) -> dict[str, Tensor]:
        """mean + (I + step * Lambda)^-1 (state - mean), exactly."""
        moved = self.solve(self._offset(state, mean), damping=1.0, scale=step)
        return {key: mean[key].to(x) + x for key, x in moved.items()}

    def _offset(self, state: State, mean: State) -> dict[str, Tensor]:
        like = self.like
        return {key: state[key].detach().to(like) - mean[key].to(like) for key in self.coordinates()}


class Layout:
    """Named tensors as one vector.

    Args:
        shapes (`Mapping[str, torch.Size]`): Shape of each block, in order.
    """

    def __init__(self, shapes: Mapping[str, torch.Size]):
        self.shapes = dict(shapes)
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.size = sum(self.sizes)

    def flatten(self, x: State, like: Tensor | None = None) -> Tensor:
        """(D,), in the dtype and on the device of `like` (of the blocks by default)."""
        flat = torch.cat([x[key].detach().reshape(-1) for key in self.shapes])
        return flat if like is None else flat.to(like)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a vector (D,), by name."""
        parts = vector.split(self.sizes)
        return {key: part.view(shape) for (key, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def noise(self, process_noise: float | Mapping[str, float | Tensor], like: Tensor) -> Tensor:
        """Process noise, one for all or by block, as a vector (D,).

        Raises:
            ValueError: It is negative or not finite, or a block is missing.
        """
        given = process_noise if isinstance(process_noise, Mapping) else dict.fromkeys(self.shapes, process_noise)
        if given.keys() != self.shapes.keys():
            raise ValueError(f"process_noise must name every block; differing: {given.keys() ^ self.shapes.keys()}.")
        blocks = {k: torch.as_tensor(given[k], dtype=like.dtype).expand(s) for k, s in self.shapes.items()}
        noise = self.flatten(blocks, like)
        check_noise(float(noise.min()))
        check_noise(float(noise.max()))
        return noise


def precision_from_tensors(structure: str, space: str, tensors: Mapping[str, Tensor]) -> Precision:
    """Rebuild a precision from its named tensors.

    Args:
        structure (`str`): As in `Precision.structure`.
        space (`str`): "adapter" or "delta_w".
        tensors (`Mapping[str, Tensor]`): As returned by `Precision.tensors`.

    Returns:
        `Precision`: Of the class that the two names stand for.

    Raises:
        ValueError: The structure is unknown.
    """
    classes = {(c.structure, c.space): c for c in _concrete(Precision)}
    if (structure, space) not in classes:
        known = sorted(f"{s} in {p} space" for s, p in classes)
        raise ValueError(f"Unknown precision structure {structure!r} in space {space!r}; known are {known}.")
    return classes[structure, space].from_tensors(tensors)


def check_damping(damping: float) -> None:
    """Raise ValueError unless damping >= 0 and finite."""
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be >= 0 and finite, got {damping}.")


def check_factor(factor: float) -> None:
    """Raise ValueError unless a factor on a precision leaves it positive semi-definite."""
    if not 0 <= factor < float("inf"):
        raise ValueError(f"Factors on a precision must be >= 0 and finite, got {factor}.")


def check_noise(process_noise: float) -> None:
    """Raise ValueError unless the process noise is a variance."""
    if not 0 <= process_noise < float("inf"):
        raise ValueError(f"process_noise is a variance: it must be >= 0 and finite, got {process_noise}.")


def noise_by_block(process_noise: float | Mapping[str, float | Tensor], names: Iterable[str]) -> dict[str, float]:
    """One variance per block, for structures whose eigenbasis survives only noise that is isotropic within a block.

    Raises:
        ValueError: A block is missing, its noise is not one number, or it is no variance.
    """
    names = list(names)
    given = process_noise if isinstance(process_noise, Mapping) else dict.fromkeys(names, process_noise)
    if given.keys() != set(names):
        raise ValueError(f"process_noise must name every block; differing: {sorted(given.keys() ^ set(names))[:4]}.")
    found = {}
    for name in names:
        value = torch.as_tensor(given[name], dtype=torch.float64, device="cpu")
        if value.numel() > 1 and value.min() != value.max():
            raise ValueError(
                f"process_noise differs within {name}: a Kronecker eigenbasis is kept only by one variance per "
                "matrix. Give one number for it, or use structure='low_rank' or 'diagonal'."
            )
        found[name] = float(value.reshape(-1)[0])
        check_noise(found[name])
    return found


def diffuse(eigenvalues: Tensor, process_noise: float | Tensor) -> Tensor:
    """Eigenvalues of (Lambda^-1 + q I)^-1 from those of Lambda: f / (1 + q f), free of divisions by f."""
    return eigenvalues / (1 + process_noise * eigenvalues)


def check_invertible(smallest: Tensor, largest: Tensor | None = None) -> None:
    """Raise ValueError unless the smallest eigenvalue is positive, and beyond the rounding of the largest if given."""
    least = 0.0 if largest is None else 10 * torch.finfo(largest.dtype).eps * float(largest)
    if not smallest > least:
        raise ValueError("The precision is singular (a curvature is, in general); pass `damping` > 0.")


def normal(shape: torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise in the dtype and on the device of `like`."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def stack(state: State, keys: list[str], like: Tensor) -> Tensor:
    """Stack equally shaped tensors of a state to (n, rows, columns) in the dtype and on the device of `like`."""
    return torch.stack([state[key].detach() for key in keys]).to(device=like.device, dtype=like.dtype)


def dot(x: State, y: State) -> Tensor:
    """Inner product over the blocks of `y`, a scalar."""
    return torch.stack([(x[key] * value).sum() for key, value in y.items()]).sum()


def _concrete(cls: type[Precision]) -> list[type[Precision]]:
    found = [c for sub in cls.__subclasses__() for c in [sub, *_concrete(sub)]]
    return [c for c in found if not getattr(c, "__abstractmethods__", None)]
