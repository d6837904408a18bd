"""Beliefs of several parties over one prior, as one: the product of their likelihoods (a federated step)."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..belief import Belief, BeliefError
from ..lineage import LINEAGE, join_lineages
from ..precision import DensePrecision, DiagonalPrecision, EigenKroneckerPrecision, LowRankPrecision, Precision
from ..precision.base import dot
from .algebra import add, as_double, compress_precision, least_damping
from .state import INFO, check_state


State = Mapping[str, Tensor]
Matvec = Callable[[State], dict[str, Tensor]]


def merge_beliefs(
    beliefs: Sequence[Belief],
    prior: Belief,
    increments: Sequence[Precision] | None = None,
    *,
    rank: int | None = None,
    keep_discarded: bool = True,
) -> Belief:
    """Product of Gaussians over a shared prior: what one party with the data of all would believe.

    Lambda = Lambda_0 + sum_i (Lambda_i - Lambda_0), m = m_0 + Lambda^-1 sum_i Lambda_i (m_i - m_0).

    The prior counts once. So equal means are returned only as far as the prior does not matter: two parties that say
    the same are twice as sure of it, and the result lies further from the prior than either. The mean is solved for
    with the sum as it stands (conjugate gradients in float64, preconditioned by the merged precision), whatever that
    precision loses in its structure.

    Args:
        beliefs (`Sequence[Belief]`): States of filters that started from `prior`, of one structure.
        prior (`Belief`): What they started from, such as an [`initial_belief`], or a filter's state.
        increments (`Sequence[Precision]`, *optional*):
            Lambda_i - Lambda_0 of each, from [`increment_of`]; needed where the structure cannot subtract (columns in
            the prior, Kronecker bases in the prior).
        rank (`int`, *optional*): Of the result, for structure "low_rank"; that of all together by default.
        keep_discarded (`bool`, *optional*, defaults to `True`): See [`compress`].

    Returns:
        `Belief`: Of the same structure.

    Raises:
        BeliefError: Other base models, adapters or structures; a belief that knows less than the prior; or increments
            that are needed and missing.
    """
    if not beliefs:
        raise BeliefError("There are no beliefs to merge.")
    if increments is not None and len(increments) != len(beliefs):
        raise BeliefError(f"There are {len(increments)} increments for {len(beliefs)} beliefs; give one each.")
    _check_family(beliefs, prior)
    base = prior.precision
    known = [_less(b.precision, base) for b in beliefs] if increments is None else list(increments)
    merged = base
    for increment in known:
        merged = add(merged, increment)
    merged = merged if rank is None else compress_precision(merged, rank, keep_discarded)
    wide, parts, preconditioner = as_double(base), [as_double(x) for x in known], as_double(merged)

    def exact(x: State) -> dict[str, Tensor]:
        return _added(wide.matvec(x), *(part.matvec(x) for part in parts))

    def pull(belief: Belief, part: Precision) -> dict[str, Tensor]:
        offset = {key: belief.mean[key].to(wide.like) - m.to(wide.like) for key, m in prior.mean.items()}
        return _added(wide.matvec(offset), part.matvec(offset))  # Lambda_i (m_i - m_0)

    right = _added(*(pull(belief, part) for belief, part in zip(beliefs, parts, strict=True)))
    step = conjugate_gradients(exact, right, lambda x: preconditioner.solve(x, least_damping(preconditioner)))
    mean = {key: m + step[key].to(m) for key, m in prior.mean.items()}
    labels, tasks = (
        prior.info[INFO][n] + sum(b.info[INFO][n] - prior.info[INFO][n] for b in beliefs)
        for n in ("num_labels", "tasks")
    )
    record = prior.info[INFO] | {"kind": "filtered", "num_labels": labels, "tasks": tasks, "merged": len(beliefs)}
    past = join_lineages(prior.info, *(belief.info for belief in beliefs))
    return Belief(mean, merged, prior.info | {INFO: record} | ({LINEAGE: past} if past else {}), prior.source)


def conjugate_gradients(matvec: Matvec, right: State, precondition: Matvec, steps: int = 100) -> dict[str, Tensor]:
    """Solve a positive definite system over named tensors, to the precision of their dtype.

    Args:
        matvec (`Callable`): The matrix.
        right (`Mapping[str, Tensor]`): Right-hand side.
        precondition (`Callable`): An approximate inverse; one step suffices if it is exact.
        steps (`int`, *optional*, defaults to 100): At most.

    Returns:
        `dict[str, Tensor]`: The solution.

    Raises:
        BeliefError: The matrix is not positive definite, or there is no convergence.
    """
    residual = dict(right)
    goal = 50 * torch.finfo(next(iter(residual.values())).dtype).eps
    x = {key: torch.zeros_like(r) for key, r in residual.items()}
    z = precondition(residual)
    energy = first = float(dot(residual, z))
    direction = z
    for _ in range(steps):
        if energy <= goal**2 * first or first == 0:
            return x
        moved = matvec(direction)
        curvature = float(dot(direction, moved))
        if not curvature > 0:
            raise BeliefError("The sum of the beliefs' precisions is not positive definite; pass their increments.")
        length = energy / curvature
        x = {key: value + length * direction[key] for key, value in x.items()}
        residual = {key: r - length * moved[key] for key, r in residual.items()}
        z = precondition(residual)
        energy, before = float(dot(residual, z)), energy
        direction = {key: value + energy / before * direction[key] for key, value in z.items()}
    if energy <= 1e-6 * first:  # rounding keeps it from the goal
        return x
    raise BeliefError(f"The merged mean did not converge in {steps} steps; merge with a larger rank.")


def _added(*terms: State) -> dict[str, Tensor]:
    first, *rest = terms
    return {key: sum((term[key] for term in rest), value) for key, value in first.items()}


def _less(precision: Precision, prior: Precision) -> Precision:
    """Lambda_i - Lambda_0, where that is a precision of the structure."""
    remedy = "Pass increments=, one per belief: increment_of(predicted, curvature, num_labels)."
    if isinstance(precision, DiagonalPrecision) and isinstance(prior, DiagonalPrecision):
        entries = {k: f - prior.entries[k].to(f) for k, f in precision.entries.items()}
        for key, difference in entries.items():
            _check_positive(difference, precision.entries[key].max())
        return DiagonalPrecision({k: f.clamp(min=0) for k, f in entries.items()})
    if isinstance(precision, DensePrecision) and isinstance(prior, DensePrecision):
        difference = precision.matrix - prior.matrix.to(precision.matrix)
        _check_positive(torch.linalg.eigvalsh(difference.double()), precision.matrix.diagonal().sum())
        return DensePrecision(difference, precision.coordinates())
    if isinstance(precision, LowRankPrecision) and isinstance(prior, LowRankPrecision) and prior.rank == 0:
        difference = precision.entries - prior.entries.to(precision.entries)
        _check_positive(difference, precision.entries.max())
        return LowRankPrecision(difference.clamp(min=0), precision.columns, precision.layout.shapes)
    if isinstance(precision, EigenKroneckerPrecision) and isinstance(prior, EigenKroneckerPrecision):
        if all(cells.numel() == 1 for cells in prior.cells.values()):
            cells = {k: c - prior.cells[k].to(c) for k, c in precision.cells.items()}
            for name, (left, right) in precision.blocks.items().items():
                real = (left.multiplicity[:, None] * right.multiplicity) > 0  # an empty complement may hold anything
                _check_positive(cells[name][real], precision.cells[name].max())
            return EigenKroneckerPrecision(precision.blocks, {k: c.clamp(min=0) for k, c in cells.items()})
    raise BeliefError(f"The prior cannot be subtracted from a {precision.structure} precision. {remedy}")


def _check_positive(difference: Tensor, largest: Tensor) -> None:
    if difference.min() < -100 * torch.finfo(largest.dtype).eps * largest:
        raise BeliefError(
            "A belief knows less than the prior that it is said to have started from. Pass the prior that it did "
            "start from; or, if the filter forgot in between (process noise, columns that were cut), its increments="
        )


def _check_family(beliefs: Sequence[Belief], prior: Belief) -> None:
    for belief in [prior, *beliefs]:
        check_state(belief)
    shapes = {key: m.shape for key, m in prior.mean.items()}
    for i, belief in enumerate(beliefs):
        if {key: m.shape for key, m in belief.mean.items()} != shapes:
            raise BeliefError(f"Belief {i} is over other weights than the prior; use the same `LoraConfig`.")
        if belief.precision.structure != prior.precision.structure:
            raise BeliefError(
                f"Belief {i} has structure {belief.precision.structure!r}, the prior {prior.precision.structure!r}."
            )
        origins = prior.info[INFO].get("origin"), belief.info[INFO].get("origin")
        if all(origins) and origins[0] != origins[1]:
            raise BeliefError(
                f"Belief {i} did not start from this prior: its filter began at other weights. Start all parties from "
                "one saved initial belief (or adapter), and pass that as `prior`."
            )
        mine, theirs = prior.info.get("adapter"), belief.info.get("adapter")
        if not mine or not theirs:
            continue
        a, b = mine["base_fingerprint"], theirs["base_fingerprint"]
        if a and b and a != b:
            raise BeliefError(
                f"Belief {i} was made on base model {theirs['base_model']!r} (fingerprint {b[:12]}), the prior on "
                f"{mine['base_model']!r} ({a[:12]}); beliefs over different base models cannot be merged."
            )
        if mine["scaling"] != theirs["scaling"]:
            raise BeliefError(f"Belief {i} has another LoRA scaling than the prior; use one `lora_alpha` and `r`.")
