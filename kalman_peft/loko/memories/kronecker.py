"""Kronecker memory: a precision that is diagonal in a Kronecker-factored eigenbasis, one per matrix."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...precision import EigenFactor, EigenKroneckerPrecision, KroneckerBlocks, KroneckerPrecision, Precision
from ...precision.base import diffuse, normal
from ..views import Stack
from .base import TINY, Memory


_CHUNK_BYTES = {"cpu": 2**23, "other": 2**26}  # of temporaries; on a CPU about what its cache holds


class KroneckerMemory(Memory):
    """Per matrix M (o, i), o <= i, the precision (Q_L (x) Q_R) diag(E) (Q_L (x) Q_R)^T, as in EKFAC.

    Left and right second moments of the columns, L = sum C C^T and R = sum C^T C, give the basis: L in full, R by its
    `rank` largest eigenpairs, to which each column is merged. In that basis the precision is the diagonal
    E (o, rank + 1), whose last column is the mean over the complement of R's basis. A column C adds
    (diag of C C^T) (diag of C^T C)^T / ||C||^2, read in the basis; when the basis turns, E is carried over as the
    diagonal of the turned matrix, so that nothing remembered is counted twice or lost.

    Args:
        view (`Stack`): The weights, (n, o, i).
        rank (`int`): Eigenpairs kept on the long side.
    """

    def __init__(self, view: Stack, rank: int):
        n, o, i = view.shape
        k = min(rank, i)
        zeros = view.like.new_zeros
        super().__init__(
            view,
            left_moment=zeros(n, o, o),
            left=torch.eye(o, dtype=view.like.dtype, device=view.like.device).repeat(n, 1, 1),
            right=zeros(n, i, k),  # a zero vector stands for "no direction yet"
            right_values=zeros(n, k),
            precision=zeros(n, o, k + 1),
        )

    def _reset(self, prior: Tensor) -> None:
        self.tensors["precision"].copy_(prior.expand_as(self.tensors["precision"]))

    def relax(self, forgetting: float) -> None:
        """See `Memory.relax`; diagonal in any basis."""
        self.tensors["precision"].mul_(forgetting).add_(self.prior[:, None, None] * (1 - forgetting))
        self.tensors["left_moment"].mul_(forgetting)
        self.tensors["right_values"].mul_(forgetting)

    def diffuse(self, noise: Tensor) -> None:
        """See `Memory.diffuse`; diagonal in any basis."""
        precision = self.tensors["precision"]
        precision.copy_(diffuse(precision, noise[:, None, None]))

    def update(self, columns: Tensor, explained: Tensor | None = None) -> None:
        """See `Memory.update`; a bounded part of the stack at a time."""
        m, _, o, i = columns.shape
        rank = self.tensors["right"].shape[-1]
        for part in self._parts(16 * i * (rank + m * o)):  # two float64 copies of the joined columns
            _update({key: t[part] for key, t in self.tensors.items()}, columns[:, part])

    def add_diagonal(self, diagonal: Tensor) -> None:
        """See `Memory.add_diagonal`; as its diagonal in the basis."""
        left = self.tensors["left"].square().mT @ diagonal  # (n, o, i)
        inside = left @ self.tensors["right"].square()  # (n, o, k)
        complement = _complement(_held(self.tensors["right"]), self.view.shape[-1])
        rest = (left.sum(-1) - inside.sum(-1)).clamp_min(0) / complement[:, None]
        self.tensors["precision"].add_(torch.cat([inside, rest[..., None]], dim=-1))

    def gain(self, x: Tensor) -> Tensor:
        """See `Memory.gain`."""
        return self._apply(x, self._covariance())

    def gram(self, columns: Tensor) -> Tensor:
        """See `Memory.gram`; as sums of squares in the basis, without P C."""
        m, _, o, i = columns.shape
        covariance = self._covariance()
        tail = covariance[..., -1:]
        total = torch.zeros(m, m, dtype=torch.float64, device=columns.device)
        for part in self._parts(2 * columns.element_size() * m * o * i):
            turned = self.tensors["left"][part].mT @ columns[:, part]
            inside = turned @ self.tensors["right"][part]
            total += (turned * tail[part]).flatten(1) @ turned.flatten(1).mT
            total += ((covariance[part, :, :-1] - tail[part]) * inside).flatten(1) @ inside.flatten(1).mT
        return total

    def variances(self) -> Tensor:
        """See `Memory.variances`."""
        covariance = self._covariance()
        right = self.tensors["right"].square()  # (n, i, k)
        inside = covariance[..., :-1] @ right.mT + covariance[..., -1:] * (1 - right.sum(-1))[:, None, :].clamp_min(0)
        return self.tensors["left"].square() @ inside

    def traces(self) -> Tensor:
        """See `Memory.traces`."""
        held = _held(self.tensors["right"])  # (n, k)
        times = torch.cat([held, self.view.shape[-1] - held.sum(-1, keepdim=True)], dim=-1)
        return (self._covariance() * times[:, None, :]).sum((1, 2))

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """See `Memory.sample`."""
        return self._apply(normal(self.view.shape, self.view.like, generator), self._covariance().sqrt())

    def absorb(self, precision: Precision, weight: float) -> bool:
        """See `Memory.absorb`; the belief's eigenvectors become the basis."""
        if not isinstance(precision, KroneckerPrecision | EigenKroneckerPrecision):
            self._absorb_diagonal(precision, weight)
            return False  # in the basis, which no data have turned yet, only its means over the long side are held
        blocks, cells = precision.blocks.items(), precision.named_cells()
        k = self.tensors["right"].shape[-1]
        for j, (name, turn) in enumerate(zip(self.view.names, self.view.transposed, strict=True)):  # type: ignore
            if name not in blocks:
                continue
            left, right = blocks[name][::-1] if turn else blocks[name]
            if not left.is_complete:
                raise ValueError(
                    f"The belief keeps {left.signature[1]} of {left.size} directions on the short side of {name}; fit "
                    f"it with dense_limit >= {left.size}."
                )
            cell = weight * (cells[name].mT if turn else cells[name])[:-1].to(self.prior)  # (o, k' + 1)
            vectors, cell = _cut(right, cell, k)
            held = vectors.shape[-1]
            inside = cell[:, :-1]
            # The moments that columns of this information would have left, so that later ones weigh against them.
            spectrum = (inside.sum(-1) + (right.size - held) * cell[:, -1]) * left.vectors
            self.tensors["left"][j].copy_(left.vectors)
            self.tensors["left_moment"][j].copy_(spectrum @ left.vectors.mT)
            self.tensors["right"][j].zero_()[:, k - held :].copy_(vectors)
            self.tensors["right_values"][j].zero_()[k - held :].copy_(inside.sum(0))
            own = self.tensors["precision"][j]  # isotropic as yet, and so the prior in any basis
            own[:, k - held :].add_(cell)
        return True

    def blocks(self) -> dict[str, tuple[EigenFactor, EigenFactor, Tensor]]:
        """Left and right basis and E per parameter, in the parameter's own orientation; complements last."""
        result = {}
        t = self.tensors
        for j, (name, turn) in enumerate(zip(self.view.names, self.view.transposed, strict=True)):  # type: ignore
            held = _held(t["right"][j]).bool()
            empty = t["prior"].new_zeros(())
            left = EigenFactor(t["left"][j], t["precision"][j].mean(-1), empty)
            right = EigenFactor(t["right"][j][:, held], t["right_values"][j][held], empty)
            cells = torch.cat([t["precision"][j][:, :-1][:, held], t["precision"][j][:, -1:]], dim=1)
            cells = torch.cat([cells, cells.new_zeros(1, cells.shape[1])])  # the left basis has no complement
            result[name] = (right, left, cells.mT) if turn else (left, right, cells)
        return result

    def _covariance(self) -> Tensor:
        return self.tensors["precision"].clamp_min(TINY).reciprocal()

    def _apply(self, x: Tensor, cells: Tensor) -> Tensor:
        """Multiply x (..., n, o, i) by the matrix that is diag(cells) in the basis.

        The mean of the complement is taken everywhere, and what the directions held differ from it is added.
        """
        tail = cells[..., -1:]
        result = torch.empty_like(x)
        for part in self._parts(2 * x.element_size() * x[..., 0, :, :].numel()):
            left, right = self.tensors["left"][part], self.tensors["right"][part]
            turned = left.mT @ x[..., part, :, :]
            inside = turned @ right  # (..., n, o, k)
            turned.mul_(tail[part]).add_(((cells[part, :, :-1] - tail[part]) * inside) @ right.mT)
            torch.matmul(left, turned, out=result[..., part, :, :])
        return result

    def _parts(self, size: int) -> Iterator[slice]:
        """Slices of the stack, such that temporaries are bounded.

        Args:
            size (`int`): Bytes of them per matrix.

        Yields:
            slice: Of the stack's first dimension.
        """
        step = max(1, _CHUNK_BYTES["cpu" if self.prior.is_cpu else "other"] // size)
        for start in range(0, self.view.shape[0], step):
            yield slice(start, start + step)


def export_blocks(memories: list[KroneckerMemory], keys: list[str]) -> EigenKroneckerPrecision:
    """The memories' precision over some of their parameters."""
    found = {name: block for memory in memories for name, block in memory.blocks().items()}
    blocks = KroneckerBlocks({key: found[key][:2] for key in keys})
    return EigenKroneckerPrecision(blocks, {key: found[key][2] for key in keys})


def _cut(right: EigenFactor, cell: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest directions of a right basis; what is dropped joins the mean over the complement."""
    order = right.values.argsort()  # a factor from a sketch lists the largest first
    dropped, kept = order[: max(len(order) - k, 0)], order[max(len(order) - k, 0) :]
    weights = torch.tensor([1.0] * len(dropped) + [float(right.size - right.signature[1])]).to(cell)
    rest = torch.cat([cell[:, dropped], cell[:, -1:]], dim=1)
    tail = (rest @ weights / weights.sum().clamp_min(1))[:, None]
    return right.vectors[:, kept].to(cell), torch.cat([cell[:, kept], tail], dim=1)


def _update(t: dict[str, Tensor], columns: Tensor) -> None:
    moment = t["left_moment"]
    moment.add_((columns @ columns.mT).sum(0))
    left = torch.linalg.eigh(moment.double())[1].to(moment.dtype)  # (n, o, o)
    right, values = _merge(t["right"], t["right_values"], columns)
    complement = _complement(values > 0, right.shape[-2])
    t["precision"].copy_(_turned(t, left, right, complement))
    t["left"].copy_(left)
    t["right"].copy_(right)
    t["right_values"].copy_(values)

    rows = (left.mT @ columns).square().sum(-1)  # (m, n, o): diag of Q_L^T C C^T Q_L
    inside = (columns @ right).square().sum(-2)  # (m, n, k)
    total = rows.sum(-1)  # (m, n): ||C||^2
    rest = (total - inside.sum(-1)).clamp_min(0) / complement
    across = torch.cat([inside, rest[..., None]], dim=-1)  # (m, n, k + 1)
    t["precision"].add_(torch.einsum("mno,mnj->noj", rows / total.clamp_min(TINY)[..., None], across))


def _held(right: Tensor) -> Tensor:
    """1 for each basis vector that is one, 0 for a place not filled yet; (..., k)."""
    return right.square().sum(-2).round()


def _complement(held: Tensor, size: int) -> Tensor:
    """Dimension of the complement of each right basis (n, k) of long side `size`, (n,); at least 1, to divide by."""
    return (size - held.sum(-1)).clamp_min(1)


def _merge(right: Tensor, values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Top eigenpairs of Q diag(values) Q^T + sum of C^T C, through the Gram matrix of the joined columns."""
    (n, i, k), (m, _, o, _) = right.shape, columns.shape
    joined = torch.empty(n, i, k + m * o, dtype=torch.float64, device=right.device)
    torch.mul(right, values.sqrt()[:, None, :], out=joined[..., :k])
    joined[..., k:].unflatten(-1, (m, o)).copy_(columns.permute(1, 3, 0, 2))
    spectrum, mixing = torch.linalg.eigh(joined.mT @ joined)  # ascending
    spectrum, mixing = spectrum[:, -k:].clamp_min(0), mixing[:, :, -k:]
    # Directions below rounding are dropped.
    real = spectrum > spectrum[:, -1:] * 1e-10
    scale = torch.where(real, spectrum.clamp_min(TINY).rsqrt(), torch.zeros_like(spectrum))
    basis = joined @ (mixing * scale[:, None, :])
    return basis.to(right.dtype), torch.where(real, spectrum, torch.zeros_like(spectrum)).to(values.dtype)


def _turned(t: dict[str, Tensor], left: Tensor, right: Tensor, complement: Tensor) -> Tensor:
    """E carried into a new basis: the diagonal of the turned precision, exact for what is diagonal in the old one."""
    across_left = (left.mT @ t["left"]).square()  # (n, o, o): new x old, doubly stochastic
    across = (right.mT @ t["right"]).square()  # (n, k, k): new x old
    inside, tail = t["precision"][..., :-1], t["precision"][..., -1:]
    kept = inside @ across.mT + tail * (1 - across.sum(-1))[:, None, :].clamp_min(0)
    # (n, k): share of each old direction in each direction of the new complement
    to_tail = (_held(t["right"]) - across.sum(-2)).clamp_min(0) / complement[:, None]
    rest = (inside * to_tail[:, None, :]).sum(-1, keepdim=True)
    rest = rest + tail * (1 - to_tail.sum(-1))[:, None, None].clamp_min(0)
    return across_left @ torch.cat([kept, rest], dim=-1)
