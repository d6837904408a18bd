"""The linearised Laplace predictive: logits of the network linearised at the belief's mean, with covariance J S J^T.

S is the belief's covariance over the adapter's weights, J the Jacobian of the logits in them (Immer, Korzepa and
Bauer, 2021). Exactly by one backward pass per logit over the whole batch; or, for many logits, by Monte Carlo: J d for
draws d from N(0, S) in forward mode, whose second moment is J S J^T without bias. No (D, D) matrix is formed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..adapters import AdapterState
from ..belief import Belief
from ..curvature.fisher import scoring
from ..curvature.taps import Side, tapped
from ..filtering.algebra import least_damping, variances
from ..precision import DiagonalPrecision
from .moments import variance_dtype
from .posterior import STRUCTURES, Prior, at, check_active, check_predicts, posterior, solvable
from .result import Positions, Predictive, batch_size, row_chunks, select, without_labels


BUDGET = 2**26  # entries of a Jacobian that are held at once
EXACT_LIMIT = 128  # logits per row, each of which takes a backward pass


def linearized(
    model: nn.Module,
    belief: Belief,
    inputs: Mapping[str, Any],
    *,
    structure: str = "full",
    samples: int | None = None,
    positions: Positions = None,
    entries: Any = None,
    num_labels: float | None = None,
    prior_precision: Prior = None,
    adapter_name: str | None = None,
    generator: torch.Generator | None = None,
) -> Predictive:
    """Logits at the belief's mean, and their covariance under the linearised network.

    Exact by default: C backward passes for C logits per row, and memory for a Jacobian of some rows (their number is
    chosen so that it stays below 2^26 entries). With `samples` the covariance is estimated from so many forward-mode
    passes, each some three to five forward passes, for as many logits as there are; its relative error is about
    sqrt(2 / samples).

    Args:
        model (`PeftModel`): In evaluation mode; unchanged afterwards.
        belief (`Belief`): Over its adapter.
        inputs (`Mapping`): A batch; `labels` are not used.
        structure (`str`, *optional*, defaults to `"full"`):
            "full" for the belief's covariance as its structure holds it, "diagonal" for its marginal variances alone,
            which is what [`streamlined`] uses.
        samples (`int`, *optional*): Draws of the Monte Carlo estimate; exact by default.
        positions (`str` or `Tensor`, *optional*): See [`select`]. All tokens need `samples`.
        entries (`Sequence[int]`, *optional*): Classes or vocabulary entries, see [`select`].
        num_labels (`float`, *optional*): See [`weight_variances`].
        prior_precision (`float` or `Mapping[str, float]`, *optional*): See [`weight_variances`].
        adapter_name (`str`, *optional*): Defaults to the active adapter.
        generator (`torch.Generator`, *optional*): Of the draws, on the precision's device.

    Returns:
        `Predictive`: With a covariance (n, C, C), for all tokens or more than 128 logits with variances only.

    Raises:
        BeliefError: The belief is over another adapter, or is no posterior.
        ValueError: An option is out of range, there are too many logits for exact passes, or the model or the adapter
            is in a state that is not supported (training, merged, DoRA).
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure must be one of {list(STRUCTURES)}, got {structure!r}.")
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}.")
    check_predicts(model, "linearized")
    state = belief.check(model, adapter_name)
    check_active(state)
    for pair in state:
        if not pair.merges_linearly:
            raise ValueError(f"{pair.name} is a DoRA layer (or another variant of LoRA); use sampled().")
    found = solvable(posterior(belief, num_labels, prior_precision))
    if structure == "diagonal" and not isinstance(found.precision, DiagonalPrecision):
        entrywise = {key: 1 / v for key, v in variances(found.precision).items()}
        found = Belief(found.mean, DiagonalPrecision(entrywise), found.info)
    inputs = without_labels(inputs)
    with at(state, belief.mean):
        if samples is None:
            return _exact(state, found, inputs, positions, entries)
        return _estimated(state, found, inputs, positions, entries, samples, generator)


def _exact(
    state: AdapterState, belief: Belief, inputs: dict[str, Any], positions: Positions, entries: Any
) -> Predictive:
    with torch.no_grad():
        first = next(row_chunks(inputs, 1))
        one = positions[:1] if isinstance(positions, Tensor) else positions
        shape = select(state.model(**first).logits, first, one, entries).shape
    if len(shape) != 2 or shape[1] > EXACT_LIMIT:
        raise ValueError(
            f"{tuple(shape[1:])} logits per row would take as many backward passes; choose positions='last' and "
            f"entries= (at most {EXACT_LIMIT} logits), or pass samples= for a Monte Carlo estimate."
        )
    rows = max(1, BUDGET // (shape[1] * state.num_parameters))
    starts = range(0, batch_size(inputs), rows)
    parts = []
    for start, chunk in zip(starts, row_chunks(inputs, rows), strict=True):
        places = positions[start : start + rows] if isinstance(positions, Tensor) else positions
        logits, jacobian = _jacobian(state, chunk, places, entries)
        covariance = _covariance(jacobian, belief).to(variance_dtype(logits))
        parts.append(Predictive.from_moments(logits, covariance=covariance))
    return Predictive.cat(parts)


def _jacobian(
    state: AdapterState, inputs: dict[str, Any], positions: Positions, entries: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (n, C), and by key their derivatives (n, C, *shape), by one backward pass per column."""
    found: dict[str, Tensor] = {}
    column = 0

    def handle(index: int, side: Side, x: Tensor, gradient: Tensor) -> None:
        pair = state.pairs[index]
        if x.shape[0] != rows or x.dim() < 2:
            raise ValueError(
                f"{pair.name} sees {tuple(x.shape)}, not {rows} rows: their gradients cannot be told apart. Pass "
                "samples= for a Monte Carlo estimate."
            )
        x, gradient = (t.reshape(rows, -1, t.shape[-1]).to(dtype) for t in (x, gradient))  # (n, T, d)
        found[pair.key(side)][:, column] += gradient.mT @ x

    with scoring(state), tapped(state, handle):
        logits = select(state.model(**inputs).logits, inputs, positions, entries)
        rows, count = logits.shape
        dtype = variance_dtype(logits)
        for key, p in state.tensors().items():
            found[key] = torch.zeros(rows, count, *p.shape, dtype=dtype, device=p.device)
        if not logits.requires_grad:
            raise ValueError(f"No gradient reaches adapter {state.adapter_name!r}; is it disabled?")
        with torch.autocast(logits.device.type, enabled=False):
            for column in range(count):
                cotangent = torch.zeros_like(logits)
                cotangent[:, column] = 1
                logits.backward(cotangent, retain_graph=column < count - 1)
    return logits.detach(), found


def _covariance(jacobian: dict[str, Tensor], belief: Belief) -> Tensor:
    """J Lambda^-1 J^T per row, (n, C, C)."""
    precision = belief.precision
    damping = least_damping(precision)
    if isinstance(precision, DiagonalPrecision):  # block by block, so that no second Jacobian exists
        flat = ((j.flatten(2), 1 / precision.entries[key].flatten()) for key, j in jacobian.items())
        return torch.stack([(j * v.to(j)) @ j.mT for j, v in flat]).sum(0)
    rows, count = next(iter(jacobian.values())).shape[:2]
    stacked = {key: j.flatten(0, 1) for key, j in jacobian.items()}
    solved = vmap(lambda x: precision.solve(x, damping))(stacked)
    blocks = [j.flatten(2) @ solved[key].to(j).view(rows, count, -1).mT for key, j in jacobian.items()]
    covariance = torch.stack(blocks).sum(0)
    return (covariance + covariance.mT) / 2


def _estimated(
    state: AdapterState, belief: Belief, inputs: dict[str, Any], positions: Positions, entries: Any,
    samples: int, generator: torch.Generator | None,
) -> Predictive:  # fmt: skip
    """The same from draws, by forward-mode differentiation."""
    model, damping = state.model, least_damping(belief.precision)
    names = {id(p): name for name, p in model.named_parameters()}
    weights = {key: (names[id(p)], p.detach()) for key, p in state.parameters().items()}
    # Fused attention has no forward mode.
    with scoring(state), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        logits = select(model(**inputs).logits, inputs, positions, entries)
        dtype = variance_dtype(logits)
        jointly = logits.dim() == 2 and logits.shape[1] <= EXACT_LIMIT
        total = torch.zeros((*logits.shape, logits.shape[1]) if jointly else logits.shape, dtype=dtype)
        total = total.to(logits.device)
        for _ in range(samples):
            offset = belief.precision.sample(damping, generator)
            with forward_ad.dual_level():
                dual = {name: forward_ad.make_dual(p, offset[key].to(p)) for key, (name, p) in weights.items()}
                out = select(functional_call(model, dual, (), inputs).logits, inputs, positions, entries)
                slope = forward_ad.unpack_dual(out).tangent
            if slope is None:
                raise ValueError(f"The logits do not depend on adapter {state.adapter_name!r}; is it disabled?")
            slope = slope.to(dtype)
            total += slope[..., :, None] * slope[..., None, :] if jointly else slope.square()
    total /= samples
    return Predictive.from_moments(logits, covariance=total) if jointly else Predictive.from_moments(logits, total)
