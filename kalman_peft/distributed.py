"""Sums over processes: information adds, so one reduction of sums and counts gives the single-process answer."""

from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_sum_(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over all processes, in place; nothing without a process group."""
    if world()[1] == 1:
        return
    for tensor in tensors:
        # Sums offloaded to the CPU travel by way of the GPU where the process group knows no other.
        by_gpu = tensor.device.type == "cpu" and dist.get_backend() == "nccl"
        there = tensor.cuda() if by_gpu else tensor
        dist.all_reduce(there, op=dist.ReduceOp.SUM)
        if by_gpu:
            tensor.copy_(there)


def all_counts(number: int, device: torch.device | str = "cpu") -> list[int]:
    """The number of every process, in their order."""
    size = world()[1]
    if size == 1:
        return [number]
    counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(size)]
    dist.all_gather(counts, torch.tensor([number], device=device))
    return torch.cat(counts).tolist()


def all_rows(tensor: Tensor) -> Tensor:
    """The rows of all processes, (sum of their numbers, ...), in the order of the processes."""
    if world()[1] == 1:
        return tensor
    counts = all_counts(len(tensor), tensor.device)
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


def max_(tensors: Iterable[Tensor]) -> None:
    """Largest value over all processes, in place; nothing without a process group."""
    if world()[1] == 1:
        return
    for tensor in tensors:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes (FSDP2)."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered from all processes if it is sharded (all of them must call)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Spread a tensor that all processes hold as `like` is spread."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements)


def any_process(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether `flag` holds on at least one process, known to all: keeps errors from hanging the others."""
    if world()[1] == 1:
        return flag
    seen = torch.tensor([float(flag)], device=device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return bool(seen.item())


def raise_together(failure: Exception | None) -> NoReturn:
    """Raise what failed on at least one process; all of them must call.

    Args:
        failure (`Exception`, *optional*): Of this process.

    Raises:
        Exception: That of this process.
        RuntimeError: Another one failed; it says which, and why.
    """
    found: list[str | None] = [None] * world()[1]
    dist.all_gather_object(found, None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    raise RuntimeError("; ".join(f"process {rank} failed with {text}" for rank, text in enumerate(found) if text))


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Give the first process's values to all, in place; sharded tensors are one tensor already."""
    if world()[1] == 1:
        return
    for tensor in tensors:
        if not is_sharded(tensor):
            dist.broadcast(tensor, src=0)


def from_first(function: Callable[[], T]) -> T:
    """What a function gives on the first process, for all: a decision that no process may take for itself.

    All wait for each other before it, so that none is still busy with files that it may remove.

    Args:
        function (`Callable[[], T]`): Called on the first process only; what it gives is pickled.

    Returns:
        `T`: The same on all processes.

    Raises:
        Exception: What the function raises, on the first process.
        RuntimeError: On the others; it says which, and why.
    """
    if world()[1] == 1:
        return function()
    dist.barrier()
    found: list[Any] = [None, None]
    failure: Exception | None = None
    if world()[0] == 0:
        try:
            found[0] = function()
        except Exception as error:
            failure, found[1] = error, f"process 0 failed with {type(error).__name__}: {error}"
    dist.broadcast_object_list(found, src=0)
    if failure is not None:
        raise failure
    if found[1] is not None:
        raise RuntimeError(found[1])
    return found[0]
