"""Independent-mechanism contrast of LoRA factors: keeps the columns of B, and the rows of A, apart.

After independent mechanism analysis (Gresele et al., 2021, arXiv:2106.05200), whose contrast of a linear map B is
c(B) = 1/2 [sum_i log (B^T B)_ii - log det B^T B] >= 0, zero exactly where the columns are orthogonal. For A it is that
of the columns of A^T. Its use on adapters, the guard at B = 0 and the gradient are this project's.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from .adapters import AdapterState, unwrap
from .callbacks import refuse_scaled_or_sharded
from .distributed import shard_like, whole
from .loko import LoKO


FACTORS = ("both", "a", "b")
# Share of its own power that is added to every column: where columns are parallel, it keeps the determinant from 0 and
# the contrast finite, (r - 1) / 2 * log(1e6) at most, about.
_SHRINK = 1e-6


def contrast_and_gradient(columns: Tensor, epsilon: float = 0.0) -> tuple[Tensor, Tensor]:
    """c of every matrix of a stack, and its gradient, with one factorisation of all the Gram matrices.

    With G = B^T B, D = (1 + h) diag(G) + epsilon I and M = G + h diag(G) + epsilon I (h = 1e-6):
    c = 1/2 [log det D - log det M],  dc/dB = B [(1 + h) D^-1 - M^-1 - h diag(M^-1)].
    Zero columns count as orthogonal to all others; for `epsilon=0` they are refused by the factorisation.

    Args:
        columns (`Tensor`): B, (n, d, r), in float32 or float64.
        epsilon (`float`, *optional*, defaults to 0.0):
            Columns much shorter than its square root are left alone; with 0, c does not depend on their lengths.

    Returns:
        `tuple[Tensor, Tensor]`: c, (n,), in nats; and the gradient of their sum, (n, d, r).
    """
    gram = columns.mT @ columns  # (n, r, r)
    power = gram.diagonal(dim1=-2, dim2=-1)  # (n, r)
    lengths = (1 + _SHRINK) * power + epsilon
    root = torch.linalg.cholesky(gram + torch.diag_embed(_SHRINK * power + epsilon))
    contrast = lengths.log().sum(-1) / 2 - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    inverse = torch.cholesky_inverse(root)
    own = (1 + _SHRINK) / lengths - _SHRINK * inverse.diagonal(dim1=-2, dim2=-1)
    return contrast, columns * own[:, None, :] - columns @ inverse


@torch.no_grad()
def add_ima_gradient(
    state: AdapterState, weight: float, factors: str = "both", epsilon: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Add the gradient of weight * (sum of c over the trainable factors) to `.grad`, once per optimizer step.

    Factors of one shape are stacked, so that the work is that of a few batched products. Like the Laplace penalty it
    comes after accumulation and reduction over processes, and depends on neither. Parameters may be sharded; all
    processes must then call.

    Args:
        state (`AdapterState`): The adapter being trained.
        weight (`float`): >= 0.
        factors (`str`, *optional*, defaults to `"both"`): "b": columns of B. "a": rows of A. "both".
        epsilon (`float`, *optional*, defaults to 1e-3): See [`contrast_and_gradient`]; > 0 where B starts at 0.

    Returns:
        `tuple[Tensor, Tensor]`: Sum and mean of c over these factors, scalars.
    """
    found: list[Tensor] = []
    for transposed, group in _groups(state, factors):
        stack = torch.stack([_wide(p) for p in group])
        contrast, gradient = contrast_and_gradient(stack.mT if transposed else stack, epsilon)
        found.append(contrast.float())
        for p, g in zip(group, gradient.mT if transposed else gradient, strict=True):
            pull = shard_like((weight * g).to(p.dtype), p)
            if p.grad is None:
                p.grad = pull.contiguous()
            else:
                p.grad.add_(pull.to(p.grad.dtype))
    all_of_them = torch.cat([c.to(found[0].device) for c in found])
    return all_of_them.sum(), all_of_them.mean()


def _groups(state: AdapterState, factors: str) -> Iterable[tuple[bool, list[Any]]]:
    """Trainable factors of one shape, dtype and device; true for A, whose rows are meant."""
    groups: dict[Any, list[Any]] = {}
    for pair in state:
        for side, p in (("a", pair.a), ("b", pair.b)):
            if factors in (side, "both") and p.requires_grad and pair.rank > 1:
                groups.setdefault((side == "a", p.shape, p.dtype, p.device), []).append(p)
    return [(key[0], group) for key, group in groups.items()]


def _wide(p: Tensor) -> Tensor:
    """In float64: Gram matrices of nearly parallel columns would not survive rounding (nor TF32)."""
    full = whole(p.detach())
    return full.to(torch.float32 if full.device.type == "mps" else torch.float64)


@torch.no_grad()
def effective_ranks(state: AdapterState) -> Tensor:
    """How many directions each update B A uses: exp of the entropy of its singular values (Roy and Vetterli, 2007).

    Args:
        state (`AdapterState`): Of any ranks.

    Returns:
        `Tensor`: One number per adapted layer, in [1, r]; 0 where B A = 0. Float32, on the CPU.
    """
    groups: dict[Any, list[int]] = {}
    for index, pair in enumerate(state):
        groups.setdefault((pair.a.shape, pair.b.shape, pair.a.device), []).append(index)
    ranks = torch.zeros(len(state))
    for indices in groups.values():
        a = torch.stack([_wide(state.pairs[i].a).mT for i in indices])  # (n, d_in, r)
        b = torch.stack([_wide(state.pairs[i].b) for i in indices])  # (n, d_out, r)
        core = torch.linalg.qr(b).R @ torch.linalg.qr(a).R.mT  # (n, r, r), with the singular values of B A
        ranks[indices] = _entropy_rank(torch.linalg.svdvals(core)).float().cpu()
    return ranks


def _entropy_rank(values: Tensor) -> Tensor:
    total = values.sum(-1, keepdim=True)
    shares = values / total.clamp(min=torch.finfo(values.dtype).tiny)
    return torch.where(total[..., 0] > 0, torch.special.entr(shares).sum(-1).exp(), 0.0)


class ImaCallback(TrainerCallback):
    """Adds weight * sum of c to what any Trainer minimises, with any optimizer that follows `.grad`.

    Logs `ima/contrast` (mean of c over the factors, nats) and `ima/penalty` (weight * sum). In a stock Trainer they
    reach `state.log_history` and the console; [`KalmanTrainer`] (`ima_weight=`) also sends them to its reporters. The
    penalty is a sum over factors, so that each feels the same pull in small and large models.

    Supported and refused as in [`LaplaceCallback`]; LoKO is refused, which does not read `.grad`.

    Args:
        weight (`float`): >= 0.
        factors (`str`, *optional*, defaults to `"both"`): See [`add_ima_gradient`].
        epsilon (`float`, *optional*, defaults to 1e-3): See [`contrast_and_gradient`]; > 0.
        adapter_name (`str`, *optional*): Defaults to the active adapter.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self, weight: float, factors: str = "both", epsilon: float = 1e-3, *, adapter_name: str | None = None
    ):
        check_ima(weight, factors, epsilon)
        self.weight, self.factors, self.epsilon, self.adapter_name = weight, factors, epsilon, adapter_name
        self.state: AdapterState | None = None
        self._seen: tuple[Tensor, Tensor] | None = None  # sum and mean of c before the last step

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Check that there is something to keep apart, and that the setting is supported."""
        if isinstance(getattr(optimizer, "optimizer", optimizer), LoKO):
            raise ValueError(f"ImaCallback adds to `.grad`, which LoKO does not read; {_REMEDY}.")
        refuse_scaled_or_sharded(args, "ImaCallback")
        self.state = AdapterState(unwrap(model), self.adapter_name, warn_excluded=False)
        if not _groups(self.state, self.factors):
            raise ValueError(
                f"ima_factors={self.factors!r}: no trainable factor of rank 2 or more, so that nothing can be kept "
                "apart; raise `r`, choose other factors, or leave ima_weight at 0."
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the gradient."""
        if self.weight > 0:
            assert self.state is not None
            self._seen = add_ima_gradient(self.state, self.weight, self.factors, self.epsilon)

    def metrics(self) -> dict[str, float]:
        """`ima/contrast` and `ima/penalty` as last seen (empty before the first step)."""
        if self._seen is None:
            return {}
        total, mean = self._seen
        return {"ima/contrast": float(mean), "ima/penalty": self.weight * float(total)}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Add the metrics to a training log entry, unless the trainer has done so."""
        if logs is None or "loss" not in logs or "ima/contrast" in logs:
            return
        logs.update(self.metrics())
        if state.log_history:
            state.log_history[-1].update(self.metrics())


_REMEDY = "choose another optimizer, or leave ima_weight at 0"


def check_ima(weight: float, factors: str, epsilon: float, uses_loko: bool = False) -> None:
    """Raise ValueError for the first option of the contrast that is out of range, or does not go with LoKO."""
    if not 0 <= weight < math.inf:
        raise ValueError(f"ima_weight must be >= 0 and finite, got {weight}.")
    if factors not in FACTORS:
        raise ValueError(f"ima_factors must be one of {FACTORS}, got {factors!r}.")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"ima_epsilon must be > 0 and finite (B starts at 0), got {epsilon}.")
    if weight and uses_loko:
        raise ValueError(
            f"ima_weight={weight} is not supported with optimizer='loko': the contrast is no likelihood and no "
            f"Gaussian prior, and LoKO does not read `.grad`; {_REMEDY}."
        )
