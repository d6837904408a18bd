"""Sums over processes: information adds, so one reduction of sums and counts gives the single-process answer."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


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
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)


def any_process(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether `flag` holds on at least one process, known to all: keeps errors from hanging the others."""
    if world()[1] == 1:
        return flag
    seen = torch.tensor([float(flag)], device=device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return bool(seen.item())


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Give the first process's values to all, in place."""
    if world()[1] == 1:
        return
    for tensor in tensors:
        dist.broadcast(tensor, src=0)
