"""What a filter does to a precision, structure by structure: diffuse, add, compress, and what it starts from.

The structures are those of `kalman_peft.precision` in space "adapter". All of this is exact but for two steps, which
say so: cutting columns to a rank, and adding Kronecker eigenbases that differ (`eigenbasis`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..belief import BeliefError
from ..precision import (
    BlockTridiagonalPrecision,
    DensePrecision,
    DiagonalPrecision,
    EigenFactor,
    EigenKroneckerPrecision,
    KroneckerBlocks,
    KroneckerPrecision,
    LowRankPrecision,
    Precision,
    precision_from_tensors,
)
from .eigenbasis import pool, variances_in_basis


Noise = Mapping[str, float | Tensor]
STRUCTURES = ("diagonal", "low_rank", "ekfac", "dense")
_ALIASES = {"kronecker": "ekfac"}


def constant(structure: str, shapes: Mapping[str, torch.Size], values: Noise, like: Tensor) -> Precision:
    """The diagonal precision with one value per adapter key (or per weight), held in a structure that can grow.

    Args:
        structure (`str`): "diagonal", "low_rank" (no columns yet), "ekfac" (or "kronecker"; no basis yet: a constant
            is diagonal in every one) or "dense".
        shapes (`Mapping[str, torch.Size]`): Shape of each adapter key.
        values (`Mapping[str, float | Tensor]`): Value >= 0 per key; a tensor only where the structure can hold it.
        like (`Tensor`): Tells dtype and device.

    Returns:
        `Precision`: Equal to diag(values).

    Raises:
        BeliefError: The structure is none of these, or cannot hold the values.
    """
    structure = _ALIASES.get(structure, structure)
    full = {
        key: torch.as_tensor(values[key], dtype=like.dtype, device=like.device).expand(shape).clone()
        for key, shape in shapes.items()
    }
    if structure == "diagonal":
        return DiagonalPrecision(full)
    flat = torch.cat([value.reshape(-1) for value in full.values()])
    if structure == "low_rank":
        return LowRankPrecision(flat, flat.new_zeros(len(flat), 0), shapes)
    if structure == "dense":
        return DensePrecision(flat.diag(), shapes)
    if structure != "ekfac":
        raise BeliefError(
            f"A filter cannot start from structure {structure!r}, which cannot hold an isotropic prior; use one of "
            f"{list(STRUCTURES)}."
        )
    for key, value in full.items():
        if value.min() != value.max():
            raise BeliefError(f"Structure 'ekfac' holds one value per matrix before any curvature, {key} has several.")
    sides = {n: _empty(n, like) for shape in shapes.values() for n in shape}
    blocks = KroneckerBlocks({key: (sides[shape[0]], sides[shape[1]]) for key, shape in shapes.items()})
    return EigenKroneckerPrecision(blocks, {key: value[:1, :1] for key, value in full.items()})


def diffuse(precision: Precision, noise: Noise, decay: float = 1.0) -> Precision:
    """(decay^2 Lambda^-1 + Q)^-1, free of divisions by Lambda; Q^-1 at decay 0.

    Args:
        precision (`Precision`): Lambda.
        noise (`Mapping[str, float | Tensor]`): Diagonal of Q, by key.
        decay (`float`, *optional*, defaults to 1.0): In [0, 1].

    Returns:
        `Precision`: Of the same structure, exactly; Lambda itself without noise and decay.

    Raises:
        BeliefError: The structure cannot hold the result exactly, or it is infinite.
    """
    if decay == 0:
        return _inverse_noise(precision, noise)
    if decay == 1 and all(_largest(q) == 0 for q in noise.values()):
        return precision
    moved = _predict(precision, {key: q / decay**2 for key, q in noise.items()})
    return moved if decay == 1 else moved.scale(decay**-2)


def diffuse_back(information: Precision, noise: Noise, decay: float = 1.0) -> Precision | None:
    """What the information J on the state after a step says of the state before it: decay^2 (J^-1 + Q)^-1.

    Args:
        information (`Precision`): J, singular in general.
        noise (`Mapping[str, float | Tensor]`): Diagonal of Q, by key.
        decay (`float`, *optional*, defaults to 1.0): In [0, 1].

    Returns:
        `Precision` or `None`: Of the same structure; nothing at decay 0.
    """
    if decay == 0:
        return None
    moved = diffuse(information, noise)
    return moved if decay == 1 else moved.scale(decay**2)


def add(a: Precision, b: Precision, rank: int | None = None, keep_discarded: bool = True) -> Precision:
    """a + b.

    Exact for "diagonal" and "dense"; for "low_rank" if `rank` suffices; for "ekfac" where the bases agree, else the
    closest of the matrices that are diagonal in a common basis, see [`pool`].

    Args:
        a (`Precision`): One summand; its structure is kept.
        b (`Precision`): The other, of the same structure.
        rank (`int`, *optional*): Of the sum, for "low_rank"; that of both together by default.
        keep_discarded (`bool`, *optional*, defaults to `True`): See [`compress_precision`].

    Returns:
        `Precision`: The sum.
    """
    if isinstance(a, EigenKroneckerPrecision):
        a._check_mergeable(b, 1.0, 1.0)
        assert isinstance(b, EigenKroneckerPrecision)
        return pool(a, b)
    if isinstance(a, LowRankPrecision):
        a._check_mergeable(b, 1.0, 1.0)
        assert isinstance(b, LowRankPrecision)
        b = b.to(a.like.device)
        columns = torch.cat([a.columns, b.columns.to(a.columns)], dim=1)
        joined = LowRankPrecision(a.entries + b.entries.to(a.entries), columns, a.layout.shapes)
        return joined if rank is None else compress_precision(joined, rank, keep_discarded)
    return a.merge(b)


def compress_precision(precision: Precision, rank: int, keep_discarded: bool = True) -> LowRankPrecision:
    """Cut diag(pi) + U U^T to the `rank` largest directions of U U^T.

    Args:
        precision (`Precision`): Of structure "low_rank".
        rank (`int`): >= 0.
        keep_discarded (`bool`, *optional*, defaults to `True`):
            Add the diagonal of what is cut to pi, so that the diagonal of the precision stays exact. Without it the
            precision only shrinks: no variance is ever below the exact one's.

    Returns:
        `LowRankPrecision`: Itself if it has no larger rank.

    Raises:
        ValueError: The structure has no rank to cut, or the rank is negative.
    """
    if not isinstance(precision, LowRankPrecision):
        raise ValueError(
            f"rank= is for structure 'low_rank'; a {precision.structure} precision has no columns to cut. "
            "Leave it out."
        )
    if rank < 0:
        raise ValueError(f"rank must be >= 0, got {rank}.")
    return LowRankPrecision.compress(
        precision.entries, precision.columns, precision.layout.shapes, rank, keep_discarded
    )


def convert(curvature: Precision, structure: str) -> Precision:
    """A curvature in the structure of the filter's state, exactly.

    Args:
        curvature (`Precision`): In space "adapter".
        structure (`str`): Of the state.

    Returns:
        `Precision`: The same matrix.

    Raises:
        BeliefError: Not possible without an approximation.
    """
    if curvature.space != "adapter":
        raise BeliefError(
            f"The curvature is over {curvature.space}, not Gaussian in the adapter's factors, which is what a filter "
            "moves; estimate it with space='adapter'."
        )
    if curvature.structure == structure:
        return curvature
    if structure == "ekfac" and isinstance(curvature, KroneckerPrecision):
        return curvature.predict(0.0)
    if structure == "low_rank" and isinstance(curvature, DiagonalPrecision):
        return constant("low_rank", curvature.coordinates(), curvature.entries, curvature.like)
    if structure == "dense":
        shapes = curvature.coordinates()
        return DensePrecision(curvature.to_dense(), shapes)
    remedy = {"ekfac": "kronecker' or 'ekfac", "low_rank": "low_rank' or 'diagonal"}.get(structure, structure)
    raise BeliefError(
        f"A curvature of structure {curvature.structure!r} cannot be added to a state of structure {structure!r} as "
        f"it is; estimate it with structure='{remedy}', or start the filter in another structure."
    )


def variances(precision: Precision) -> dict[str, Tensor]:
    """Diagonal of Lambda^-1, one tensor per key.

    Raises:
        ValueError: Not known for this structure.
    """
    if isinstance(precision, DiagonalPrecision):
        return {key: 1 / f for key, f in precision.entries.items()}
    if isinstance(precision, LowRankPrecision):
        return precision.layout.unflatten(precision.variances())
    if isinstance(precision, EigenKroneckerPrecision):
        return variances_in_basis(precision)
    if isinstance(precision, DensePrecision):
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(precision.matrix.double()))
        return precision.layout.unflatten(inverse.diagonal().to(precision.matrix))
    raise ValueError(f"The variances of a {precision.structure} precision have no closed form here.")


def as_double(precision: Precision) -> Precision:
    """The same precision in float64, for solves whose error would grow with its condition number."""
    if precision.dtype == torch.float64:
        return precision
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in precision.tensors().items()}
    return precision_from_tensors(precision.structure, precision.space, tensors)


def least_damping(precision: Precision) -> float:
    """With what to solve and sample where a state is positive definite by construction.

    Eigenvalues that are held one by one are accurate however far apart they are; the structure's own check, made for
    curvature, would call a state in float32 singular beyond a condition number of about 1e6.
    """
    return torch.finfo(precision.dtype).tiny if isinstance(precision, EigenKroneckerPrecision) else 0.0


def _predict(precision: Precision, noise: Noise) -> Precision:
    if not isinstance(precision, BlockTridiagonalPrecision):
        if isinstance(precision, DiagonalPrecision | LowRankPrecision | DensePrecision):
            return precision.predict(noise)
        if isinstance(precision, EigenKroneckerPrecision | KroneckerPrecision):
            return precision.predict(noise)
        raise BeliefError(f"A filter knows no structure {precision.structure!r}; use one of {list(STRUCTURES)}.")
    found = {_largest(q) for q in noise.values()} | {_smallest(q) for q in noise.values()}
    if len(found) > 1:
        raise BeliefError(
            "A block_tridiagonal precision stays exact only under one process noise for all weights; give one number, "
            "or use structure='low_rank' or 'diagonal'."
        )
    return precision.predict(found.pop())


def _inverse_noise(precision: Precision, noise: Noise) -> Precision:
    if any(_smallest(q) <= 0 for q in noise.values()):
        raise BeliefError(
            "decay=0 without process noise fixes a weight at the start with infinite precision; give every weight "
            "process noise > 0, as Transition.stationary() does."
        )
    values = {key: 1 / q for key, q in noise.items()}
    return constant(precision.structure, precision.coordinates(), values, precision.like)


def _largest(value: float | Tensor) -> float:
    return float(value.max()) if isinstance(value, Tensor) else float(value)


def _smallest(value: float | Tensor) -> float:
    return float(value.min()) if isinstance(value, Tensor) else float(value)


def _empty(size: int, like: Tensor) -> EigenFactor:
    """A basis of no directions: all of the space is complement."""
    return EigenFactor(like.new_zeros(size, 0), like.new_zeros(0), like.new_zeros(()))
