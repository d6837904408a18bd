"""What a filter remembers of the data, one file per structure."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...precision import DensePrecision, DiagonalPrecision, LowRankPrecision, Precision
from ..views import Flat, Stack, stack_by_shape
from .base import Joint, Memory
from .dense import DenseMemory
from .diagonal import CovarianceMemory, DiagonalMemory
from .kronecker import KroneckerMemory, export_blocks
from .low_rank import LowRankMemory


__all__ = [
    "MEMORIES",
    "CovarianceMemory",
    "DenseMemory",
    "DiagonalMemory",
    "Joint",
    "KroneckerMemory",
    "LowRankMemory",
    "Memory",
    "create_memories",
    "export",
]

MEMORIES = ("kronecker", "diagonal", "diagonal_covariance", "block", "low_rank", "dense")
_DENSE_LIMIT = 20_000  # weights; 3.2 GB in float64


def create_memories(
    named: Sequence[tuple[str, Tensor]], memory: str, *, rank: int, dense_limit: int, block_limit: int
) -> list[Memory]:
    """Lay out memories over parameters.

    Args:
        named (`Sequence[tuple[str, Tensor]]`): The parameters.
        memory (`str`): One of `MEMORIES`.
        rank (`int`): Eigenpairs on long sides ("kronecker"), or directions ("low_rank").
        dense_limit (`int`): Longest short side of a matrix with a Kronecker memory; others have a diagonal one.
        block_limit (`int`): Most weights of a parameter with a block of its own; others have a Kronecker memory.

    Returns:
        `list[Memory]`: One per view.

    Raises:
        ValueError: A dense memory over too many weights.
    """
    if memory in ("low_rank", "dense"):
        flat = Flat([name for name, _ in named], [p for _, p in named])
        size = flat.shape.numel()
        if memory == "low_rank":
            return [LowRankMemory(flat, rank)]
        if size > _DENSE_LIMIT:
            raise ValueError(
                f"memory='dense' over {size} weights would take {size**2 * 4 / 2**30:.0f} GiB; it is for at most "
                f"{_DENSE_LIMIT}. Use memory='block', 'low_rank' or 'kronecker'."
            )
        return [DenseMemory(flat)]
    return [_of_stack(stack, memory, rank, dense_limit, block_limit) for stack in stack_by_shape(named)]


def _of_stack(stack: Stack, memory: str, rank: int, dense_limit: int, block_limit: int) -> Memory:
    if memory == "diagonal":
        return DiagonalMemory(stack)
    if memory == "diagonal_covariance":
        return CovarianceMemory(stack)
    if memory == "block" and stack.shape[1:].numel() <= block_limit:
        return DenseMemory(stack)
    if len(stack.shape) == 3 and stack.shape[1] <= dense_limit:
        return KroneckerMemory(stack, rank)
    return DiagonalMemory(stack)


def export(memories: Sequence[Memory], keys: Sequence[str]) -> Precision:
    """The filter's precision over some of its parameters, given all others.

    Args:
        memories (`Sequence[Memory]`): Of one filter.
        keys (`Sequence[str]`): Names of the parameters.

    Returns:
        `Precision`: "diagonal", "ekfac", "low_rank" or "dense", as the memory is.

    Raises:
        ValueError: The keys' memories are of several structures, which no one precision holds.
    """
    found = [m for m in memories if set(m.view.names) & set(keys)]
    kinds = {type(m) for m in found}
    if kinds <= {DiagonalMemory, CovarianceMemory}:
        entries = {
            name: part.reciprocal()
            for m in found
            for name, part in zip(m.view.names, m.view.slices(m.variances()), strict=True)
        }
        return DiagonalPrecision({key: entries[key].clone() for key in keys})
    if kinds == {KroneckerMemory}:
        return export_blocks(found, list(keys))  # type: ignore[arg-type]
    (first, *others) = found
    if others or not isinstance(first.view, Flat):
        raise ValueError(
            "A block memory, or one of several structures, cannot be given as one precision; use memory='kronecker' "
            "with dense_limit above the adapter's rank, 'diagonal', 'low_rank' or 'dense'."
        )
    own = dict(zip(first.view.names, first.view.slices(torch.arange(first.view.shape.numel())), strict=True))
    shapes = {key: own[key].shape for key in keys}
    places = torch.cat([own[key].reshape(-1) for key in keys]).to(first.prior.device)
    if isinstance(first, LowRankMemory):
        precision = first.precision
        return LowRankPrecision(precision.entries[places], precision.columns[places], shapes)
    assert isinstance(first, DenseMemory)
    return DensePrecision(first.precision[0][places[:, None], places].to(first.view.like), shapes)
