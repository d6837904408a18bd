"""Sums for the Kronecker structures: second moments of inputs and output gradients, and EKFAC's eigenvalues."""

import torch
from torch import Tensor

from ..adapters import AdapterState
from ..precision import (
    BlockTridiagonalPrecision,
    DeltaEigenKroneckerPrecision,
    DeltaKroneckerPrecision,
    EigenFactor,
    EigenKroneckerPrecision,
    KroneckerBlocks,
    KroneckerPrecision,
    Precision,
)
from .accumulators import Accumulator
from .moments import SecondMoment
from .sequences import encoder_inputs
from .sharing import SharedInputs
from .taps import Side


class KroneckerAccumulator(Accumulator):
    """Second moments of inputs x and output gradients g, those of one input tensor taken once.

    "kronecker" in "adapter" space takes four per layer, at both factors; in "delta_w" space, and for
    "block_tridiagonal", the layer's own two suffice.

    Args:
        state (`AdapterState`): The adapter.
        structure (`str`): "kronecker" (also for EKFAC's basis) or "block_tridiagonal".
        space (`str`): "adapter" or "delta_w".
        rank (`int`): Eigenpairs kept of long sides.
        dense_limit (`int`): Sides up to this size are kept in full.
        inputs (`SharedInputs`): Which layers share an input.
        offload (`bool`, *optional*, defaults to `False`): Keep the sums on the CPU.
    """

    def __init__(
        self,
        state: AdapterState,
        *,
        structure: str,
        space: str,
        rank: int,
        dense_limit: int,
        inputs: SharedInputs,
        offload: bool = False,
    ):
        super().__init__(state, offload=offload)
        self.structure, self.space, self.rank, self.dense_limit = structure, space, rank, dense_limit
        self.shared = inputs
        self.inner = space == "adapter" and structure != "block_tridiagonal"  # moments of size r at A and B
        self.encoder = encoder_inputs(state)
        self.inputs: dict[tuple[int, Side], SecondMoment] = {}
        self.grads: dict[tuple[int, Side], SecondMoment] = {}
        for index, pair in enumerate(state):
            self.grads[index, "b"] = self._moment(pair.b.shape[0], f"{pair.name}:g")
            if self.inner:
                self.grads[index, "a"] = self._moment(pair.rank, f"{pair.name}:ga")
                self.inputs[index, "b"] = self._moment(pair.rank, f"{pair.name}:u")
        self.positions = self.zeros(len(state))

    def handle(self, index: int, side: Side, inputs: Tensor, grads: Tensor) -> None:
        """See `Accumulator.handle`."""
        if self.first:  # inputs are the same in every backward pass through a batch
            if side == "a" and self.shared.leader(index) == index:
                rows = self._real(index, inputs)
                self._input(index).add(rows, 1.0)
                self.positions[index] += len(rows)
            elif side == "b" and self.inner:
                self.inputs[index, "b"].add(self._real(index, inputs), 1.0)
        if (index, side) in self.grads:  # positions that carry no gradient add nothing
            self.grads[index, side].add(grads.reshape(-1, grads.shape[-1]).to(self.dtype), self.weight)

    def counts(self) -> list[Tensor]:
        """See `Accumulator.counts`: positions per layer, and a moment for every input that some process saw."""
        self.shared.settle(self.state.pairs[0].a.device)
        for index in sorted(set(self.shared.leaders)):
            self._input(index)
        self.inputs = {key: self.inputs[key] for key in sorted(self.inputs)}
        return [self.positions]

    def sums(self) -> list[Tensor]:
        """See `Accumulator.sums`."""
        moments = (*self.inputs.values(), *self.grads.values())
        return [tensor for moment in moments for tensor in moment.sums()]

    def close_source(self, share: float, num_tokens: float, last: bool) -> None:
        """See `Accumulator.close_source`."""
        super().close_source(share, num_tokens, last)
        self.positions.zero_()

    def _normalisers(self, num_tokens: float) -> list[float]:
        positions = self.positions.clamp(min=1).tolist()
        inputs = [positions[self.shared.leader(i)] for (i, _), m in self.inputs.items() for _ in m.sums()]
        return inputs + [num_tokens for m in self.grads.values() for _ in m.sums()]

    def blocks(self) -> KroneckerBlocks:
        """sum_t g g^T / tokens (x) mean of x x^T over positions, per factor or per layer."""
        shared = {index: self._input(index).finalize() for index in sorted(set(self.shared.leaders))}
        blocks = {}
        for index, pair in enumerate(self.state):
            gradient, x = self.grads[index, "b"].finalize(), shared[self.shared.leader(index)]
            if self.inner:
                blocks[pair.key_a] = (self.grads[index, "a"].finalize(), x)
                blocks[pair.key_b] = (gradient, self.inputs[index, "b"].finalize())
            elif self.space == "delta_w":  # taps contain the scaling, the gradient of DW does not
                blocks[pair.name] = (gradient.scale(1 / pair.scaling**2), x)
            else:
                blocks[pair.name] = (gradient, x)
        return KroneckerBlocks(blocks)

    def finalize(self) -> Precision:
        """See `Accumulator.finalize`."""
        if self.structure == "block_tridiagonal":
            expansion = {key: value.to(self.dtype) for key, value in self.state.snapshot(self.dtype).items()}
            return BlockTridiagonalPrecision(self.blocks(), {k: v.to(self.device) for k, v in expansion.items()})
        if self.space == "adapter":
            return KroneckerPrecision(self.blocks())
        return DeltaKroneckerPrecision(self.blocks(), {pair.name: pair.scaling for pair in self.state})

    def _moment(self, size: int, name: str) -> SecondMoment:
        return SecondMoment(size, self.rank, self.dense_limit, name, self.zeros())

    def _input(self, index: int) -> SecondMoment:
        if (index, "a") not in self.inputs:
            pair = self.state.pairs[index]
            self.inputs[index, "a"] = self._moment(pair.a.shape[1], f"{pair.name}:x")
        return self.inputs[index, "a"]

    def _real(self, index: int, x: Tensor) -> Tensor:
        return self.sequences.real(x, encoder=self.encoder[index]).to(self.dtype)


class EigenvalueAccumulator(Accumulator):
    """Second moments of the scores along each pair of directions of a given basis: EKFAC's second pass.

    Args:
        state (`AdapterState`): The adapter.
        blocks (`KroneckerBlocks`): The bases.
        space (`str`): "adapter" or "delta_w".
    """

    def __init__(self, state: AdapterState, blocks: KroneckerBlocks, space: str):
        super().__init__(state)
        self.blocks, self.space, self.bases = blocks, space, blocks.items()
        self.device = blocks.items()[blocks.order[0]][0].values.device
        self.cells = {
            name: self.zeros(left.values.shape[0] + 1, right.values.shape[0] + 1)
            for name, (left, right) in self.bases.items()
        }
        self._grads: dict[int, Tensor] = {}

    def handle(self, index: int, side: Side, inputs: Tensor, grads: Tensor) -> None:
        """See `Accumulator.handle`."""
        self.take_once(index, side)
        pair = self.state.pairs[index]
        if self.space == "adapter":
            key = pair.key(side)
            left, right = (f.to(inputs.device) for f in self.bases[key])
            cells = cells_of_scores(self.scores(key, inputs, grads), left, right)
        elif side == "b":
            self._grads[index] = self.sequences.split(grads, pair.name).to(self.dtype) / pair.scaling
            return
        else:
            key = pair.name
            left, right = (f.to(inputs.device) for f in self.bases[key])
            x = self.sequences.split(inputs, key).to(self.dtype)
            cells = cells_of_products(self._grads.pop(index), x, left, right)
        self.cells[key].add_(cells.to(self.device), alpha=self.weight)

    def sums(self) -> list[Tensor]:
        """See `Accumulator.sums`."""
        return list(self.cells.values())

    def finalize(self) -> Precision:
        """See `Accumulator.finalize`; sums over a complement become means over its dimensions."""
        cells = {
            name: self.cells[name] / (left.multiplicity[:, None] * right.multiplicity).clamp(min=1)
            for name, (left, right) in self.bases.items()
        }
        if self.space == "adapter":
            return EigenKroneckerPrecision(self.blocks, cells)
        return DeltaEigenKroneckerPrecision(self.blocks, cells, {pair.name: pair.scaling for pair in self.state})


def cells_of_scores(scores: Tensor, left: EigenFactor, right: EigenFactor) -> Tensor:
    """sum_b (Q_L^T C_b Q_R)^2 entry by entry, complements last.

    Args:
        scores (`Tensor`): C, shape (b, o, i).
        left (`EigenFactor`): Q_L.
        right (`EigenFactor`): Q_R.

    Returns:
        `Tensor`: Shape (k_left + 1, k_right + 1).
    """
    rows, columns = left.vectors.mT @ scores, scores @ right.vectors  # (b, k_left, i), (b, o, k_right)
    inside = (rows @ right.vectors).square().sum(0)
    return _with_complements(
        inside, rows.square().sum((0, 2)), columns.square().sum((0, 1)), scores.square().sum(), left, right
    )


def cells_of_products(g: Tensor, x: Tensor, left: EigenFactor, right: EigenFactor) -> Tensor:
    """The same for C_b = g_b^T x_b, which is not formed; g (b, L, o), x (b, L, i)."""
    turned_g, turned_x = g @ left.vectors, x @ right.vectors  # (b, L, k_left), (b, L, k_right)
    inside = (turned_g.mT @ turned_x).square().sum(0)
    rows = inside.sum(1) if right.is_complete else (turned_g.mT @ x).square().sum((0, 2))
    columns = inside.sum(0) if left.is_complete else (g.mT @ turned_x).square().sum((0, 1))
    if right.is_complete or left.is_complete:
        total = columns.sum() if right.is_complete else rows.sum()
    else:
        total = ((g @ g.mT) * (x @ x.mT)).sum()  # ||g^T x||^2 through (L, L) Gram matrices
    return _with_complements(inside, rows, columns, total, left, right)


def _with_complements(
    inside: Tensor, rows: Tensor, columns: Tensor, total: Tensor, left: EigenFactor, right: EigenFactor
) -> Tensor:
    """Border the inside with what each row, each column and the whole hold beyond it."""
    beyond_right = rows - inside.sum(1) if not right.is_complete else torch.zeros_like(rows)
    beyond_left = columns - inside.sum(0) if not left.is_complete else torch.zeros_like(columns)
    corner = total - rows.sum() - columns.sum() + inside.sum()
    if right.is_complete or left.is_complete:
        corner = torch.zeros_like(corner)
    top = torch.cat([inside, beyond_right[:, None]], dim=1)
    return torch.cat([top, torch.cat([beyond_left, corner[None]])[None]]).clamp(min=0)
