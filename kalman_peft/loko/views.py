"""The parameters as few, large tensors, so that a Kalman step touches as few of them as there are shapes."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class View(ABC):
    """Some of the parameters seen as one tensor, in at least float32.

    Args:
        names (`list[str]`): Of the parameters.
        params (`list[Tensor]`): The parameters themselves.
    """

    shape: torch.Size

    def __init__(self, names: list[str], params: list[Tensor]):
        self.names, self.params = names, params
        dtype = torch.promote_types(params[0].dtype, torch.float32)
        self.like = torch.zeros((), dtype=dtype, device=params[0].device)

    def zeros(self, *leading: int) -> Tensor:
        """A zero tensor of the view's shape, behind leading dimensions."""
        return self.like.new_zeros(*leading, *self.shape)

    @abstractmethod
    def slices(self, x: Tensor) -> list[Tensor]:
        """The parameters' parts of x (..., *shape), each (..., *parameter's shape) and sharing its memory."""

    @abstractmethod
    def expand(self, values: Tensor) -> Tensor:
        """One value per parameter (n,), to be broadcast against the view's shape."""

    @abstractmethod
    def per_parameter(self, x: Tensor) -> Tensor:
        """Sum of x (*shape) over the weights of each parameter, (n,)."""

    @abstractmethod
    def norms(self, x: Tensor) -> Tensor:
        """Norm of x (*shape) over the weights of each parameter, (n,)."""

    @abstractmethod
    def join(self, parts: Sequence[Tensor], *leading: int) -> Tensor:
        """One new tensor (*leading, *shape) from one per parameter (*leading, *parameter's shape)."""

    def gather(self, tensors: Sequence[Tensor | None], *leading: int) -> Tensor:
        """As `join`, in the view's dtype, with zeros for what is missing."""
        zero = self.like.new_zeros(())
        parts = [
            zero.expand(*leading, *p.shape) if t is None else t for t, p in zip(tensors, self.params, strict=True)
        ]
        return self.join(parts, *leading).to(self.like.dtype)

    def read(self) -> Tensor:
        """The parameters' values, as one new tensor."""
        return self.gather([p.detach() for p in self.params])  # a copy

    def write(self, values: Tensor) -> None:
        """Set the parameters, each in its own dtype."""
        torch._foreach_copy_(self.params, self.slices(values))

    def add(self, step: Tensor, scale: float = 1.0) -> None:
        """Add scale * step to the parameters, rounded once, to each one's own dtype."""
        torch._foreach_add_(self.params, self.slices(step), alpha=scale)

    @abstractmethod
    def shared_state(self, tensors: dict[str, Tensor]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Which parts of a memory's tensors each parameter's optimizer state shows.

        Args:
            tensors (`dict[str, Tensor]`): Of the memory.

        Yields:
            tuple: A parameter and its parts, sharing memory with the tensors.
        """


class Stack(View):
    """Parameters of one shape (up to transposition), as one tensor (n, o, i) with o <= i; vectors as (n, i)."""

    def __init__(self, names: list[str], params: list[Tensor], transposed: list[bool]):
        super().__init__(names, params)
        self.transposed = transposed
        shape = params[0].shape[::-1] if transposed[0] else params[0].shape
        self.shape = torch.Size((len(params), *shape))

    def slices(self, x: Tensor) -> list[Tensor]:
        """See `View.slices`."""
        parts = x.unbind(x.dim() - len(self.shape))
        return [part.mT if turn else part for part, turn in zip(parts, self.transposed, strict=True)]

    def expand(self, values: Tensor) -> Tensor:
        """See `View.expand`."""
        return values.view(-1, *(1,) * (len(self.shape) - 1))

    def per_parameter(self, x: Tensor) -> Tensor:
        """See `View.per_parameter`."""
        return x.flatten(1).sum(1)

    def norms(self, x: Tensor) -> Tensor:
        """See `View.norms`."""
        return torch.linalg.vector_norm(x.flatten(1), dim=1)

    def join(self, parts: Sequence[Tensor], *leading: int) -> Tensor:
        """See `View.join`."""
        turned = [part.mT if turn else part for part, turn in zip(parts, self.transposed, strict=True)]
        return torch.stack(turned, dim=len(leading))

    def shared_state(self, tensors: dict[str, Tensor]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """See `View.shared_state`.

        Yields:
            tuple: The j-th parameter, and the j-th slice of all tensors.
        """
        for j, p in enumerate(self.params):
            yield p, {key: tensor[j] for key, tensor in tensors.items()}


class Flat(View):
    """All parameters as one vector (D,)."""

    def __init__(self, names: list[str], params: list[Tensor]):
        super().__init__(names, params)
        self.sizes = [p.numel() for p in params]
        self.shape = torch.Size((sum(self.sizes),))
        self._sizes = torch.tensor(self.sizes, device=params[0].device)

    def slices(self, x: Tensor) -> list[Tensor]:
        """See `View.slices`."""
        parts = x.split(self.sizes, dim=-1)
        return [
            part.unflatten(-1, p.shape) if p.dim() else part[..., 0]
            for part, p in zip(parts, self.params, strict=True)
        ]

    def expand(self, values: Tensor) -> Tensor:
        """See `View.expand`."""
        return values.repeat_interleave(self._sizes, output_size=self.shape.numel())

    def per_parameter(self, x: Tensor) -> Tensor:
        """See `View.per_parameter`."""
        return torch.stack([part.sum() for part in x.split(self.sizes)])

    def norms(self, x: Tensor) -> Tensor:
        """See `View.norms`."""
        return torch.stack(torch._foreach_norm(x.split(self.sizes)))

    def join(self, parts: Sequence[Tensor], *leading: int) -> Tensor:
        """See `View.join`."""
        flat = [part.reshape(*leading, size) for part, size in zip(parts, self.sizes, strict=True)]
        return torch.cat(flat, dim=-1)

    def shared_state(self, tensors: dict[str, Tensor]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """See `View.shared_state`.

        Yields:
            tuple: The first parameter, with all of it, as it cannot be divided.
        """
        yield self.params[0], dict(tensors)


def stack_by_shape(named: Sequence[tuple[str, Tensor]]) -> list[Stack]:
    """Group parameters by shape, dtype and device; LoRA's A (r, d) and B^T (r, d) share a stack."""
    plans: dict[tuple, list[tuple[str, Tensor, bool]]] = {}
    for name, p in named:
        turn = p.dim() == 2 and p.shape[0] > p.shape[1]
        shape = tuple(p.shape[::-1]) if turn else tuple(p.shape)
        plans.setdefault((shape, p.dtype, p.device), []).append((name, p, turn))
    return [Stack(*map(list, zip(*rows, strict=True))) for rows in plans.values()]  # type: ignore[arg-type]


def write_all(views: Sequence[View], values: Sequence[Tensor]) -> None:
    """Set the parameters of all views, from one tensor each."""
    for view, value in zip(views, values, strict=True):
        view.write(value)
