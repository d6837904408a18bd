"""Sums over data from which each structure is built. All are linear in the data, so that processes may add them."""

import zlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..adapters import AdapterState
from ..precision import (
    DeltaDiagonalPrecision,
    DeltaKroneckerPrecision,
    DiagonalPrecision,
    EigenFactor,
    KroneckerPrecision,
    Precision,
)
from ..precision.kronecker import KroneckerBlocks
from .taps import Side


class Accumulator(ABC):
    """Running sums of one structure of curvature.

    Args:
        state (`AdapterState`): The adapter.
        weight (`float`): Factor on every contribution, 1 / number of draws.
    """

    def __init__(self, state: AdapterState, weight: float = 1.0):
        self.state, self.weight = state, weight
        self.dtype = torch.promote_types(state.pairs[0].a.dtype, torch.float32)
        self.batch_size = 0
        self.mask: Tensor | None = None

    def start_batch(self, batch_size: int, mask: Tensor | None) -> None:
        """Announce a batch: number of sequences, and which positions can carry a gradient, (batch, time)."""
        self.batch_size, self.mask = batch_size, mask

    @abstractmethod
    def handle(self, index: int, side: Side, inputs: Tensor, grads: Tensor) -> None:
        """Take one tap (see `tapped`): inputs (batch, time, d_in), grads (batch, time, d_out)."""

    @abstractmethod
    def sums(self) -> list[Tensor]:
        """The tensors to be added over processes."""

    @abstractmethod
    def finalize(self, num_tokens: float) -> Precision:
        """The precision per observed token."""

    def per_sequence(self, x: Tensor, name: str) -> Tensor:
        """Shape a tap to (batch, time, d), or refuse a layer whose rows are not the batch's sequences."""
        if x.shape[0] != self.batch_size:
            raise ValueError(
                f"{name} sees {x.shape[0]} rows for a batch of {self.batch_size} sequences; the exact Fisher per "
                "sequence needs the batch as first dimension. Use structure='kronecker'."
            )
        return x.reshape(self.batch_size, -1, x.shape[-1]).to(self.dtype)


class DiagonalAccumulator(Accumulator):
    """sum_b (sum_t g_t x_t^T)^2 per factor: the exact gradient of each sequence, squared."""

    def __init__(self, state: AdapterState, weight: float = 1.0):
        super().__init__(state, weight)
        self.entries = {
            k: torch.zeros(p.shape, dtype=self.dtype, device=p.device) for k, p in state.parameters().items()
        }

    def handle(self, index: int, side: Side, inputs: Tensor, grads: Tensor) -> None:
        """See `Accumulator.handle`."""
        pair = self.state.pairs[index]
        key = pair.key_a if side == "a" else pair.key_b
        scores = self.per_sequence(grads, key).mT @ self.per_sequence(inputs, key)  # (batch, d_out, d_in)
        self.entries[key].add_(scores.square_().sum(0), alpha=self.weight)

    def sums(self) -> list[Tensor]:
        """See `Accumulator.sums`."""
        return list(self.entries.values())

    def finalize(self, num_tokens: float) -> DiagonalPrecision:
        """See `Accumulator.finalize`."""
        return DiagonalPrecision({key: f / num_tokens for key, f in self.entries.items()})


class DeltaDiagonalAccumulator(Accumulator):
    """sum_b (sum_t g_t x_t^T)^2 for the merged weight, from g at B and x at A."""

    def __init__(self, state: AdapterState, weight: float = 1.0):
        super().__init__(state, weight)
        self.entries = {
            pair.name: torch.zeros(pair.b.shape[0], pair.a.shape[1], dtype=self.dtype, device=pair.a.device)
            for pair in state
        }
        self._grads: dict[int, Tensor] = {}

    def handle(self, index: int, side: Side, inputs: Tensor, grads: Tensor) -> None:
        """See `Accumulator.handle`."""
        pair = self.state.pairs[index]
        if side == "b":  # always reached first; A's input is still to come
            self._grads[index] = self.per_sequence(grads, pair.name) / pair.scaling
            return
        x, g = self.per_sequence(inputs, pair.name), self._grads.pop(index)
        for sequence_x, sequence_g in zip(x, g, strict=True):  # one d_out x d_in score at a time
            self.entries[pair.name].add_((sequence_g.mT @ sequence_x).square_(), alpha=self.weight)

    def sums(self) -> list[Tensor]:
        """See `Accumulator.sums`."""
        return list(self.entries.values())

    def finalize(self, num_tokens: float) -> DeltaDiagonalPrecision:
        """See `Accumulator.finalize`."""
        return DeltaDiagonalPrecision(
            {name: f / num_tokens for name, f in self.entries.items()},
            {pair.name: pair.scaling for pair in self.state},
        )


class SecondMoment:
    """Sum over rows x x^T, in full for short sides, as a single-pass sketch for long ones.

    Both are linear in the data: the sketch is Y = (sum x x^T) Omega with a fixed Gaussian Omega, and the trace.

    Args:
        size (`int`): n.
        rank (`int`): Eigenpairs kept of a long side.
        dense_limit (`int`): Sides up to this size are summed in full.
        name (`str`): Seeds Omega, so that all processes and all runs share it.
        like (`Tensor`): Gives dtype and device.
    """

    def __init__(self, size: int, rank: int, dense_limit: int, name: str, like: Tensor):
        self.size, self.rank = size, min(rank, size)
        columns = 2 * self.rank + 8
        self.dense = size <= max(dense_limit, columns)
        self.trace = like.new_zeros(())
        if self.dense:
            self.total = like.new_zeros(size, size)
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            self.omega = torch.randn(size, columns, generator=generator).to(like)
            self.total = like.new_zeros(size, columns)

    def add(self, rows: Tensor, weight: float) -> None:
        """Add rows (N, n)."""
        if self.dense:
            self.total.addmm_(rows.mT, rows, alpha=weight)
        else:
            self.total.addmm_(rows.mT, rows @ self.omega, alpha=weight)
            self.trace.add_(rows.square().sum(), alpha=weight)

    def sums(self) -> list[Tensor]:
        """The linear statistics."""
        return [self.total] if self.dense else [self.total, self.trace]

    def finalize(self, count: float) -> EigenFactor:
        """The mean second moment as a factor."""
        if self.dense:
            return EigenFactor.from_dense(self.total / count)
        return EigenFactor.from_sketch(self.total / count, self.omega, self.trace / count, self.rank)


class KroneckerAccumulator(Accumulator):
    """Second moments of inputs and output gradients, for each factor ("adapter") or each layer ("delta_w")."""

    def __init__(self, state: AdapterState, weight: float = 1.0, *, space: str, rank: int, dense_limit: int):
        super().__init__(state, weight)
        self.space = space
        like = torch.zeros((), dtype=self.dtype, device=state.pairs[0].a.device)

        def moment(size: int, name: str, parameter: Tensor) -> SecondMoment:
            return SecondMoment(size, rank, dense_limit, name, like.to(parameter.device))

        self.inputs: dict[tuple[int, Side], SecondMoment] = {}
        self.grads: dict[tuple[int, Side], SecondMoment] = {}
        for index, pair in enumerate(state):
            self.inputs[index, "a"] = moment(pair.a.shape[1], f"{pair.name}:x", pair.a)
            self.grads[index, "b"] = moment(pair.b.shape[0], f"{pair.name}:g", pair.b)
            if space == "adapter":
                self.grads[index, "a"] = moment(pair.rank, f"{pair.name}:ga", pair.a)
                self.inputs[index, "b"] = moment(pair.rank, f"{pair.name}:u", pair.b)
        self.positions = like.new_zeros(len(state))

    def handle(self, index: int, side: Side, inputs: Tensor, grads: Tensor) -> None:
        """See `Accumulator.handle`."""
        if (index, side) in self.inputs:
            rows = self._real(inputs)
            self.inputs[index, side].add(rows, self.weight)
            if side == "a":
                self.positions[index] += self.weight * len(rows)
        if (index, side) in self.grads:
            self.grads[index, side].add(self._real(grads), self.weight)

    def _real(self, x: Tensor) -> Tensor:
        # Padding has zero gradient but non-zero activations, so it must not enter the input moments.
        if self.mask is not None and x.dim() == 3 and x.shape[:2] == self.mask.shape:
            x = x[self.mask]
        return x.reshape(-1, x.shape[-1]).to(self.dtype)

    def sums(self) -> list[Tensor]:
        """See `Accumulator.sums`."""
        moments = (*self.inputs.values(), *self.grads.values())
        return [self.positions, *(tensor for moment in moments for tensor in moment.sums())]

    def finalize(self, num_tokens: float) -> Precision:
        """See `Accumulator.finalize`; sum_t g g^T / tokens (x) mean of x x^T over positions."""
        blocks = {}
        positions = self.positions.clamp(min=1).tolist()
        for index, pair in enumerate(self.state):
            sides: tuple[tuple[str, Side, Side], ...]
            if self.space == "adapter":
                sides = ((pair.key_a, "a", "a"), (pair.key_b, "b", "b"))
            else:
                sides = ((pair.name, "b", "a"),)
            for name, grad_side, input_side in sides:
                left = self.grads[index, grad_side].finalize(num_tokens)
                right = self.inputs[index, input_side].finalize(positions[index])
                if self.space == "delta_w":  # taps contain the scaling, the gradient of DW does not
                    square = pair.scaling**2
                    left = EigenFactor(left.vectors, left.values / square, left.tail / square)
                blocks[name] = (left, right)
        if self.space == "adapter":
            return KroneckerPrecision(KroneckerBlocks(blocks))
        return DeltaKroneckerPrecision(KroneckerBlocks(blocks), {pair.name: pair.scaling for pair in self.state})


def make_accumulator(
    state: AdapterState, structure: str, space: str, *, weight: float, rank: int, dense_limit: int
) -> Accumulator:
    """The accumulator for a structure in a space; names are checked by the caller."""
    if structure == "kronecker":
        return KroneckerAccumulator(state, weight, space=space, rank=rank, dense_limit=dense_limit)
    return (DiagonalAccumulator if space == "adapter" else DeltaDiagonalAccumulator)(state, weight)


def accumulator_bytes(state: AdapterState, structure: str, space: str, rank: int, dense_limit: int) -> int:
    """Bytes that the running sums of a structure take, in float32."""

    def side(size: int) -> int:
        columns = 2 * min(rank, size) + 8
        return size * size if size <= max(dense_limit, columns) else 2 * size * columns

    total = 0
    for pair in state:
        d_out, d_in = pair.b.shape[0], pair.a.shape[1]
        if structure == "diagonal":
            total += d_out * d_in if space == "delta_w" else pair.rank * (d_out + d_in)
        else:
            total += side(d_in) + side(d_out) + (2 * side(pair.rank) if space == "adapter" else 0)
    return 4 * total
