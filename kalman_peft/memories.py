"""What a LoKO filter remembers of the data: a precision per stack of equally shaped matrices, in information form.

Each memory is a set of pure tensor functions over a dictionary of stacked float32 tensors (first dimension n: the
matrices of one shape), so that one step touches few, large tensors. Matrices come in as (n, o, i) with o <= i.
"""

import torch
from torch import Tensor


Memory = dict[str, Tensor]
_TINY = 1e-30


class DiagonalMemory:
    """Precision pi per weight: pi <- pi + c^2 for a column c of scores ("precision memory": never negative).

    The mean step P g uses the updated precision.
    """

    @staticmethod
    def create(shape: torch.Size, like: Tensor) -> Memory:
        """Empty memory for stacked weights of `shape` (n, ...); the prior is still to be set."""
        return {"precision": like.new_zeros(shape), "prior": like.new_zeros(shape[0])}

    @staticmethod
    def set_prior(memory: Memory, prior: Tensor) -> None:
        """Isotropic prior precision, shape (n,); replaces all that was remembered."""
        memory["prior"].copy_(prior)
        memory["precision"].copy_(_expand(prior, memory["precision"]).expand_as(memory["precision"]))

    @staticmethod
    def predict(memory: Memory, forgetting: float, process_noise: float) -> None:
        """pi <- gamma pi + (1 - gamma) prior, then 1/pi <- 1/pi + q."""
        precision = memory["precision"]
        if forgetting < 1:
            precision.mul_(forgetting).add_(_expand(memory["prior"], precision) * (1 - forgetting))
        if process_noise > 0:
            precision.div_(1 + process_noise * precision)

    @staticmethod
    def update(memory: Memory, draws: Tensor, weight: float) -> None:
        """Add the information of K draws, shape (K, n, ...): weight * mean of squares."""
        memory["precision"].add_(draws.square().mean(0), alpha=weight)

    @staticmethod
    def add_diagonal(memory: Memory, diagonal: Tensor) -> None:
        """Add information that is diagonal in the weights, shape (n, ...)."""
        memory["precision"].add_(diagonal)

    @staticmethod
    def gain(memory: Memory, score: Tensor) -> tuple[Tensor, Tensor]:
        """P g, and the quadratic form of the information gathered since the prior, g^T P (P^-1 - P_0^-1) P g."""
        precision = memory["precision"]
        step = score / precision.clamp_min(_TINY)
        gathered = (precision - _expand(memory["prior"], precision)).clamp_min(0)
        return step, (gathered * step.square()).sum()

    @staticmethod
    def trace(memory: Memory) -> Tensor:
        """Trace of the covariance."""
        return memory["precision"].clamp_min(_TINY).reciprocal().sum()


class KroneckerMemory:
    """Precision that is diagonal in a Kronecker-factored eigenbasis, one per matrix M (o, i) with o <= i.

    Left and right second moments of the draws, L = sum C C^T and R = sum C^T C, give the basis: L in full, R by its
    `rank` largest eigenpairs, to which each draw is merged. In that basis the precision is the diagonal
    E (o, rank + 1), whose last column is the mean over the complement of R's basis. A draw C adds
    (diag of C C^T) (diag of C^T C)^T / ||C||^2, read in the basis; when the basis turns, E is carried over as the
    diagonal of the turned matrix, so that nothing remembered is counted twice or lost.
    """

    @staticmethod
    def create(shape: torch.Size, like: Tensor, rank: int) -> Memory:
        """Empty memory for stacked matrices of shape (n, o, i), o <= i; the prior is still to be set."""
        n, o, i = shape
        k = min(rank, i)
        return {
            "left_moment": like.new_zeros(n, o, o),
            "left": torch.eye(o, dtype=like.dtype, device=like.device).repeat(n, 1, 1),
            "right": like.new_zeros(n, i, k),
            "right_values": like.new_zeros(n, k),
            "precision": like.new_zeros(n, o, k + 1),
            "prior": like.new_zeros(n),
        }

    @staticmethod
    def set_prior(memory: Memory, prior: Tensor) -> None:
        """Isotropic prior precision, shape (n,); replaces all that was remembered."""
        memory["prior"].copy_(prior)
        memory["precision"].copy_(prior[:, None, None].expand_as(memory["precision"]))

    @staticmethod
    def predict(memory: Memory, forgetting: float, process_noise: float) -> None:
        """E <- gamma E + (1 - gamma) prior, then 1/E <- 1/E + q: both are diagonal in any basis."""
        DiagonalMemory.predict(memory, forgetting, process_noise)
        if forgetting < 1:
            memory["left_moment"].mul_(forgetting)
            memory["right_values"].mul_(forgetting)

    @staticmethod
    def update(memory: Memory, draws: Tensor, weight: float) -> None:
        """Merge K draws, shape (K, n, o, i), into the basis and add their mean information times `weight`."""
        count = len(draws)
        moment = memory["left_moment"]
        moment.add_((draws @ draws.mT).sum(0), alpha=weight / count)
        left = torch.linalg.eigh(moment.double())[1].to(moment.dtype)  # (n, o, o)
        right, values = _merge(memory["right"], memory["right_values"], draws, weight / count)
        _turn(memory, left, right)
        memory["left"].copy_(left)
        memory["right"].copy_(right)
        memory["right_values"].copy_(values)

        projected = draws @ right  # (K, n, o, k)
        rows = (left.mT @ draws).square().sum(-1)  # (K, n, o): diag of Q_L^T C C^T Q_L
        inside = projected.square().sum(-2)  # (K, n, k)
        total = rows.sum(-1)  # (K, n): ||C||^2
        rest = (total - inside.sum(-1)).clamp_min(0) / _complement(right)[:, 0, 0]
        columns = torch.cat([inside, rest[..., None]], dim=-1)  # (K, n, k + 1)
        memory["precision"].add_(
            torch.einsum("kno,knj->noj", rows / total.clamp_min(_TINY)[..., None], columns), alpha=weight / count
        )

    @staticmethod
    def add_diagonal(memory: Memory, diagonal: Tensor) -> None:
        """Add information that is diagonal in the weights, shape (n, o, i), as its diagonal in the basis."""
        left = memory["left"].square().mT @ diagonal  # (n, o, i)
        inside = left @ memory["right"].square()  # (n, o, k)
        rest = (left.sum(-1) - inside.sum(-1)).clamp_min(0) / _complement(memory["right"])[..., 0]
        memory["precision"].add_(torch.cat([inside, rest[..., None]], dim=-1))

    @staticmethod
    def gain(memory: Memory, score: Tensor) -> tuple[Tensor, Tensor]:
        """P g, and the quadratic form of the information gathered since the prior, g^T P (P^-1 - P_0^-1) P g."""
        left, right, precision = memory["left"], memory["right"], memory["precision"].clamp_min(_TINY)
        turned = left.mT @ score  # (n, o, i)
        inside = turned @ right  # (n, o, k)
        outside = turned - inside @ right.mT
        inside = inside / precision[..., :-1]
        outside = outside / precision[..., -1:]
        gathered = (precision - memory["prior"][:, None, None]).clamp_min(0)
        energy = (gathered[..., :-1] * inside.square()).sum() + (gathered[..., -1:] * outside.square()).sum()
        return left @ (outside + inside @ right.mT), energy

    @staticmethod
    def trace(memory: Memory) -> Tensor:
        """Trace of the covariance."""
        covariance = memory["precision"].clamp_min(_TINY).reciprocal()
        held = _held(memory["right"])  # (n, k)
        multiplicity = torch.cat([held, memory["right"].shape[-2] - held.sum(-1, keepdim=True)], dim=-1)
        return (covariance * multiplicity[:, None, :]).sum()


def _held(right: Tensor) -> Tensor:
    """1 for each basis vector that is one, 0 for a place not filled yet; (n, k)."""
    return right.square().sum(-2).round()


def _complement(right: Tensor) -> Tensor:
    """Dimension of the complement of each right basis, (n, 1, 1); at least 1, to divide by."""
    return (right.shape[-2] - _held(right).sum(-1)).clamp_min(1)[:, None, None]


def _merge(right: Tensor, values: Tensor, draws: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Top eigenpairs of Q diag(values) Q^T + weight * sum of C^T C, through the Gram matrix of the joined columns."""
    k = right.shape[-1]
    new = draws.permute(1, 3, 0, 2).flatten(2)  # (n, i, K o)
    columns = torch.cat([right * values.sqrt()[:, None, :], new * weight**0.5], dim=-1).double()
    spectrum, mixing = torch.linalg.eigh(columns.mT @ columns)  # ascending
    spectrum, mixing = spectrum[:, -k:].clamp_min(0), mixing[:, :, -k:]
    # Directions below rounding are dropped: a zero vector stands for "no direction yet".
    real = spectrum > spectrum[:, -1:] * 1e-10
    scale = torch.where(real, spectrum.clamp_min(_TINY).rsqrt(), torch.zeros_like(spectrum))
    basis = (columns @ mixing) * scale[:, None, :]
    return basis.to(right.dtype), torch.where(real, spectrum, torch.zeros_like(spectrum)).to(values.dtype)


def _turn(memory: Memory, left: Tensor, right: Tensor) -> None:
    """Carry E into a new basis: the diagonal of the turned precision, exact for what is diagonal in the old one."""
    precision = memory["precision"]
    across_left = (left.mT @ memory["left"]).square()  # (n, o, o): new x old, doubly stochastic
    across = (right.mT @ memory["right"]).square()  # (n, k, k): new x old
    inside, tail = precision[..., :-1], precision[..., -1:]
    kept = inside @ across.mT + tail * (1 - across.sum(-1))[:, None, :].clamp_min(0)
    # (n, k): share of each old direction in each direction of the new complement
    to_tail = (_held(memory["right"]) - across.sum(-2)).clamp_min(0) / _complement(right)[..., 0]
    rest = (inside * to_tail[:, None, :]).sum(-1, keepdim=True)
    rest = rest + tail * (1 - to_tail.sum(-1))[:, None, None].clamp_min(0)
    memory["precision"].copy_(across_left @ torch.cat([kept, rest], dim=-1))


def _expand(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.dim() - 1))
