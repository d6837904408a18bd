"""Parameters of one shape as one tensor, so that a Kalman step touches few, large tensors."""

from typing import Any

import torch
from torch import Tensor

from .memories import DiagonalMemory, KroneckerMemory, Memory


class Stack:
    """Parameters of one shape (up to transposition), seen as one tensor (n, o, i) with o <= i."""

    def __init__(self, names: list[str], params: list[Tensor], transposed: list[bool], kind: type):
        self.names, self.params, self.transposed, self.kind = names, params, transposed, kind
        shape = params[0].shape[::-1] if transposed[0] else params[0].shape
        self.shape = torch.Size((len(params), *shape))
        dtype = torch.promote_types(params[0].dtype, torch.float32)
        self.like = torch.zeros((), dtype=dtype, device=params[0].device)
        self.memory: Memory = {}

    def create(self, rank: int) -> Memory:
        """An empty memory for the stack."""
        if self.kind is KroneckerMemory:
            return KroneckerMemory.create(self.shape, self.like, rank)
        return DiagonalMemory.create(self.shape, self.like)

    def set_prior(self, memory: Memory, prior: Tensor) -> None:
        """Isotropic prior precision, one per matrix (n,)."""
        self.kind.set_prior(memory, prior)

    def zeros(self) -> Tensor:
        """A zero tensor of the stack's shape."""
        return self.like.new_zeros(self.shape)

    def gather(self, tensors: list[Tensor | None]) -> Tensor:
        """Stack one tensor per parameter, missing ones as zero."""
        out = self.zeros()
        for row, tensor, turn in zip(out.unbind(0), tensors, self.transposed, strict=True):
            if tensor is not None:
                row.copy_(tensor.mT if turn else tensor)
        return out

    def add_to_params(self, step: Tensor) -> None:
        """Add one slice to each parameter, in its own dtype."""
        for p, row, turn in zip(self.params, step.unbind(0), self.transposed, strict=True):
            p.add_((row.mT if turn else row).to(p.dtype))


def plan_stacks(group: dict[str, Any], memory: str, dense_limit: int) -> list[Stack]:
    """Group the parameters by shape; LoRA's A (r, d) and B^T (r, d) share a stack."""
    plans: dict[tuple, list[tuple[str, Tensor, bool]]] = {}
    for name, p in zip(group["param_names"], group["params"], strict=True):
        turn = p.dim() == 2 and p.shape[0] > p.shape[1]
        shape = tuple(p.shape[::-1]) if turn else tuple(p.shape)
        kronecker = memory == "kronecker" and p.dim() == 2 and shape[0] <= dense_limit
        plans.setdefault((kronecker, shape, p.dtype, p.device), []).append((name, p, turn))
    return [
        Stack(*map(list, zip(*rows, strict=True)), KroneckerMemory if kronecker else DiagonalMemory)  # type: ignore
        for (kronecker, *_), rows in plans.items()
    ]
