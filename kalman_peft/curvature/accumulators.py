"""Sums over data from which each structure is built. All are linear in the data, so that processes may add them."""

import zlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..adapters import AdapterState
from ..precision import (
    DeltaDiagonalPrecision,
    DensePrecision,
    DiagonalPrecision,
    LowRankPrecision,
    Precision,
)
from .moments import sketch_columns
from .sequences import Sequences
from .taps import Side


class Accumulator(ABC):
    """Running sums of one structure of curvature.

    Several sources are pooled by their weights: `close_source` turns the sums of the source that ends into means.

    Args:
        state (`AdapterState`): The adapter.
        offload (`bool`, *optional*, defaults to `False`): Keep large sums on the CPU.
    """

    def __init__(self, state: AdapterState, *, offload: bool = False):
        self.state = state
        self.dtype = torch.promote_types(state.pairs[0].a.dtype, torch.float32)
        self.device = torch.device("cpu") if offload else state.pairs[0].a.device
        self.weight = 1.0  # of the backward passes to come
        self.first = True  # whether they are the first through their batch
        self.skipping = False  # whether they only keep other processes company
        self.sequences: Sequences
        self._seen: set[tuple[int, Side]] = set()
        self._pooled: list[Tensor] | None = None

    @abstractmethod
    def handle(self, index: int, side: Side, inputs: Tensor, grads: Tensor) -> None:
        """Take one tap (see `tapped`): inputs (batch, time, d_in), grads (batch, time, d_out)."""

    def begin_backward(self, number: int) -> None:
        """A backward pass starts, the `number`-th through its batch."""
        self.first = number == 0
        self._seen.clear()

    def end_backward(self) -> None:  # noqa: B027 -- most structures need nothing here
        """All taps of one backward pass have been handled."""

    @abstractmethod
    def sums(self) -> list[Tensor]:
        """The tensors to be added over processes."""

    def counts(self) -> list[Tensor]:
        """Small tensors that must be known over all processes before a source is closed."""
        return []

    def close_source(self, share: float, num_tokens: float, last: bool) -> None:
        """Turn the sums of a source into `share` times their mean, and pool them with the sources before it.

        Args:
            share (`float`): The source's weight, all weights adding up to 1.
            num_tokens (`float`): Labels observed in it, over all processes.
            last (`bool`): Whether no further source comes.
        """
        sums = self.sums()
        for tensor, count in zip(sums, self._normalisers(num_tokens), strict=True):
            tensor.mul_(share / count)
        if last and self._pooled is None:
            return
        if self._pooled is None:
            self._pooled = [torch.zeros_like(t) for t in sums]
        for pooled, tensor in zip(self._pooled, sums, strict=True):
            pooled.add_(tensor)
            tensor.copy_(pooled) if last else tensor.zero_()

    def _normalisers(self, num_tokens: float) -> list[float]:
        return [num_tokens] * len(self.sums())

    @abstractmethod
    def finalize(self) -> Precision:
        """The precision per observed token, after all sources are closed and all processes have been added."""

    def take_once(self, index: int, side: Side) -> None:
        """Refuse a layer that is called twice in one forward pass where squares of its whole score are needed."""
        if (index, side) in self._seen:
            raise ValueError(
                f"{self.state.pairs[index].name} is called several times in one forward pass (a shared module), so "
                "that its score is complete only after all of them; use structure='low_rank' or 'dense', or "
                "'kronecker' (which takes the calls for independent)."
            )
        self._seen.add((index, side))

    def zeros(self, *shape: int) -> Tensor:
        """Zero sums."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def scores(self, key: str, inputs: Tensor, grads: Tensor) -> Tensor:
        """Gradient of every sequence's loss in one factor, (sequences, rows, columns)."""
        split = self.sequences.split
        return split(grads, key).to(self.dtype).mT @ split(inputs, key).to(self.dtype)


class DiagonalAccumulator(Accumulator):
    """sum_b (sum_t g_t x_t^T)^2 per factor: the exact gradient of each sequence, squared."""

    def __init__(self, state: AdapterState, *, offload: bool = False):
        super().__init__(state, offload=offload)
        self.entries = {key: self.zeros(*p.shape) for key, p in state.parameters().items()}

    def handle(self, index: int, side: Side, inputs: Tensor, grads: Tensor) -> None:
        """See `Accumulator.handle`."""
        self.take_once(index, side)
        key = self.state.pairs[index].key(side)
        squares = self.scores(key, inputs, grads).square_().sum(0)
        self.entries[key].add_(squares.to(self.device), alpha=self.weight)

    def sums(self) -> list[Tensor]:
        """See `Accumulator.sums`."""
        return list(self.entries.values())

    def finalize(self) -> DiagonalPrecision:
        """See `Accumulator.finalize`."""
        return DiagonalPrecision(self.entries)


class DeltaDiagonalAccumulator(Accumulator):
    """sum_b (sum_t g_t x_t^T)^2 for the merged weight, from g at B and x at A."""

    def __init__(self, state: AdapterState, *, offload: bool = False):
        super().__init__(state, offload=offload)
        self.entries = {pair.name: self.zeros(pair.b.shape[0], pair.a.shape[1]) for pair in state}
        self._grads: dict[int, Tensor] = {}

    def handle(self, index: int, side: Side, inputs: Tensor, grads: Tensor) -> None:
        """See `Accumulator.handle`."""
        self.take_once(index, side)
        pair = self.state.pairs[index]
        if side == "b":  # always reached first; A's input is still to come
            self._grads[index] = self.sequences.split(grads, pair.name).to(self.dtype) / pair.scaling
            return
        x, g = self.sequences.split(inputs, pair.name).to(self.dtype), self._grads.pop(index)
        for sequence_x, sequence_g in zip(x, g, strict=True):  # one d_out x d_in score at a time
            squares = (sequence_g.mT @ sequence_x).square_()
            self.entries[pair.name].add_(squares.to(self.device), alpha=self.weight)

    def sums(self) -> list[Tensor]:
        """See `Accumulator.sums`."""
        return list(self.entries.values())

    def finalize(self) -> DeltaDiagonalPrecision:
        """See `Accumulator.finalize`."""
        return DeltaDiagonalPrecision(self.entries, {pair.name: pair.scaling for pair in self.state})


class ScoreAccumulator(Accumulator):
    """Sums that need the score of a sequence over the whole adapter: held for one backward pass."""

    def __init__(self, state: AdapterState, *, offload: bool = False):
        super().__init__(state, offload=offload)
        self.shapes = {key: p.shape for key, p in state.parameters().items()}
        self._scores: dict[str, Tensor] = {}

    def handle(self, index: int, side: Side, inputs: Tensor, grads: Tensor) -> None:
        """See `Accumulator.handle`."""
        key = self.state.pairs[index].key(side)
        score = self.scores(key, inputs, grads).to(self.device)  # (sequences, rows, columns)
        self._scores[key] = self._scores[key] + score if key in self._scores else score

    def end_backward(self) -> None:
        """See `Accumulator.end_backward`."""
        if self._scores:
            count = self.sequences.count
            for key, shape in self.shapes.items():
                if key not in self._scores:  # an expert that was not chosen
                    self._scores[key] = self.zeros(count, *shape)
            self.add(self._scores)
        self._scores = {}

    @abstractmethod
    def add(self, scores: dict[str, Tensor]) -> None:
        """Take the scores of all sequences, (sequences, rows, columns) per key."""


class DenseAccumulator(ScoreAccumulator):
    """sum_b c_b c_b^T over whole scores c_b (D,)."""

    def __init__(self, state: AdapterState, *, offload: bool = False):
        super().__init__(state, offload=offload)
        self.matrix = self.zeros(state.num_parameters, state.num_parameters)

    def add(self, scores: dict[str, Tensor]) -> None:
        """See `ScoreAccumulator.add`."""
        flat = torch.cat([scores[key].flatten(1) for key in self.shapes], dim=1)  # (sequences, D)
        self.matrix.addmm_(flat.mT, flat, alpha=self.weight)

    def sums(self) -> list[Tensor]:
        """See `Accumulator.sums`."""
        return [self.matrix]

    def finalize(self) -> DensePrecision:
        """See `Accumulator.finalize`."""
        return DensePrecision(self.matrix, self.shapes)


class LowRankAccumulator(ScoreAccumulator):
    """The diagonal, exactly, and a single-pass sketch Y = (sum_b c_b c_b^T) Omega of all the rest.

    Omega (D, m) is never formed: for a factor of shape (o, i) its j-th column is the outer product of two Gaussian
    vectors a_j (o,), b_j (i,).
    """

    def __init__(self, state: AdapterState, *, rank: int, offload: bool = False):
        super().__init__(state, offload=offload)
        self.rank = rank
        columns = sketch_columns(rank)
        self.entries = {key: self.zeros(*shape) for key, shape in self.shapes.items()}
        self.sketch = {key: self.zeros(shape.numel(), columns) for key, shape in self.shapes.items()}
        self.omega = {}
        for key, (rows, cols) in self.shapes.items():
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            a, b = (torch.randn(n, columns, generator=generator) for n in (rows, cols))
            self.omega[key] = a.to(self.entries[key]), b.to(self.entries[key])

    def add(self, scores: dict[str, Tensor]) -> None:
        """See `ScoreAccumulator.add`."""
        products = self.zeros(self.sequences.count, sketch_columns(self.rank))  # (sequences, m): c_b^T Omega
        for key, c in scores.items():
            a, b = self.omega[key]
            products += ((c.mT @ a) * b).sum(1) if a.shape[0] < b.shape[0] else ((c @ b) * a).sum(1)
        for key, c in scores.items():
            self.entries[key].add_(c.square().sum(0), alpha=self.weight)
            self.sketch[key].addmm_(c.flatten(1).mT, products, alpha=self.weight)

    def sums(self) -> list[Tensor]:
        """See `Accumulator.sums`."""
        return [*self.entries.values(), *self.sketch.values()]

    def finalize(self) -> LowRankPrecision:
        """See `Accumulator.finalize`: Nystroem, F ~ Y (Omega^T Y)^+ Y^T, cut to `rank`, the diagonal as measured."""
        core = torch.zeros((), dtype=torch.float64, device=self.device)
        for key, (rows, cols) in self.shapes.items():
            a, b = self.omega[key]
            y = self.sketch[key].view(rows, cols, -1)
            turned = torch.einsum("oj,oip->ijp", a, y) if rows < cols else torch.einsum("ij,oip->ojp", b, y)
            core = core + torch.einsum("nj,njp->jp", b if rows < cols else a, turned).double()
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        # Directions below rounding carry no information.
        keep = values > values[-1].clamp(min=0) * torch.finfo(self.dtype).eps * 10
        root = vectors * torch.where(keep, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
        # F ~ (Y root)(Y root)^T: its largest directions through the Gram matrix, so that no other (D, m) is formed.
        gram = torch.stack([(y.mT @ y).double() for y in self.sketch.values()]).sum(0)
        _, mixing = torch.linalg.eigh(root.mT @ gram @ root)  # ascending
        root = root @ mixing[:, -self.rank :]
        kept = self.zeros(self.state.num_parameters, root.shape[1])  # (D, k)
        parts = kept.split([y.shape[0] for y in self.sketch.values()])
        for part, y in zip(parts, self.sketch.values(), strict=True):
            torch.mm(y, root.to(y), out=part)
        entries = torch.cat([f.reshape(-1) for f in self.entries.values()])
        entries -= torch.linalg.vector_norm(kept, dim=1).square_()
        return LowRankPrecision(entries.clamp_(min=0), kept, self.shapes)
