"""How many bytes a curvature takes, known before anything large is allocated."""

from dataclasses import dataclass

import torch

from ..adapters import AdapterState
from .moments import is_dense, sketch_columns


STRUCTURES = ("diagonal", "kronecker", "ekfac", "block_tridiagonal", "low_rank", "dense")
SPACES = ("adapter", "delta_w")
_DELTA_STRUCTURES = ("diagonal", "kronecker", "ekfac")
DEFAULT_RANK = 16


@dataclass(frozen=True)
class CurvatureMemory:
    """Bytes that one curvature takes; inputs that layers share are counted once per layer, so this is an upper bound.

    Args:
        sums (`int`): Running sums over the data, with the sketches' test matrices.
        scores (`int`): Scores held during one backward pass, per sequence of a batch.
        result (`int`): The precision itself, as held in memory and written to a file.
    """

    sums: int
    scores: int
    result: int

    @property
    def total(self) -> int:
        """Sums and result, which exist together at the end, and the scores of one sequence."""
        return self.sums + self.scores + self.result


def check_structure(structure: str, space: str) -> None:
    """Refuse an unknown structure, or one that the space does not have.

    Args:
        structure (`str`): One of `STRUCTURES`.
        space (`str`): One of `SPACES`.

    Raises:
        ValueError: With the structures that there are.
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure must be one of {STRUCTURES}, got {structure!r}.")
    if space not in SPACES:
        raise ValueError(f"space must be one of {SPACES}, got {space!r}.")
    if space == "delta_w" and structure not in _DELTA_STRUCTURES:
        raise ValueError(
            f"structure={structure!r} is over the factors A and B: use space='adapter' (laplace_space='adapter' in "
            f"KalmanConfig), or one of {_DELTA_STRUCTURES} in space='delta_w'."
        )


def curvature_memory(
    state: AdapterState, structure: str, space: str = "adapter", *, rank: int = DEFAULT_RANK, dense_limit: int = 256
) -> CurvatureMemory:
    """Bytes that `estimate_curvature` will take for an adapter.

    Args:
        state (`AdapterState`): The adapter.
        structure (`str`): One of `STRUCTURES`.
        space (`str`, *optional*, defaults to `"adapter"`): "adapter" or "delta_w".
        rank (`int`, *optional*, defaults to 16): As for `estimate_curvature`.
        dense_limit (`int`, *optional*, defaults to 256): As for `estimate_curvature`.

    Returns:
        `CurvatureMemory`: In bytes of float32 (float64 for adapters in float64).

    Raises:
        ValueError: Unknown structure or space.
    """
    check_structure(structure, space)
    width = torch.promote_types(state.pairs[0].a.dtype, torch.float32).itemsize
    size = state.num_parameters
    if structure == "diagonal":
        entries = size if space == "adapter" else sum(p.b.shape[0] * p.a.shape[1] for p in state)
        scores = max(p.b.shape[0] * p.a.shape[1] for p in state) if space == "delta_w" else 0
        scales = 8 * len(state) if space == "delta_w" else 0
        return CurvatureMemory(width * entries, width * scores, width * entries + scales)
    if structure == "dense":
        return CurvatureMemory(width * size**2, width * size, width * size**2)
    if structure == "low_rank":
        columns = sketch_columns(rank)
        omega = sum(p.rank * 2 + p.a.shape[1] + p.b.shape[0] for p in state)  # two Gaussian vectors per column
        sums = size * (columns + 1) + omega * columns
        return CurvatureMemory(width * sums, width * size, width * size * (rank + 1))
    sums = result = 0
    for pair in state:
        d_in, d_out = pair.a.shape[1], pair.b.shape[0]
        blocks = [(d_out, d_in)]  # rows and columns of every Kronecker block
        if space == "adapter" and structure != "block_tridiagonal":
            blocks = [(pair.rank, d_in), (d_out, pair.rank)]
        for sides in blocks:
            kept = [side if is_dense(side, rank, dense_limit) else min(rank, side) for side in sides]
            for side, k in zip(sides, kept, strict=True):
                sums += side * side if k == side else 2 * side * sketch_columns(k)
                result += side * k + k + 2  # vectors, values, the rest, scaling
            if structure == "ekfac":
                sums += (kept[0] + 1) * (kept[1] + 1)
                result += (kept[0] + 1) * (kept[1] + 1)
        sums += 1  # positions
    if structure == "block_tridiagonal":
        result += size + 2  # the point of expansion
    return CurvatureMemory(width * sums, 0, width * result)


def check_memory(
    state: AdapterState, structure: str, space: str, *, rank: int, dense_limit: int, limit: int | None, offload: bool
) -> CurvatureMemory:
    """Raise before anything large is allocated.

    Args:
        state (`AdapterState`): The adapter.
        structure (`str`): One of `STRUCTURES`.
        space (`str`): "adapter" or "delta_w".
        rank (`int`): As for `estimate_curvature`.
        dense_limit (`int`): As for `estimate_curvature`.
        limit (`int`, *optional*): In bytes; nine tenths of the free memory by default.
        offload (`bool`): Whether the sums are kept on the CPU.

    Returns:
        `CurvatureMemory`: What it will take.

    Raises:
        ValueError: More than the limit; names the structures that would fit.
    """
    need = curvature_memory(state, structure, space, rank=rank, dense_limit=dense_limit)
    device = torch.device("cpu") if offload else state.pairs[0].a.device
    limit = int(0.9 * _free(device)) if limit is None else limit
    if need.total <= limit:
        return need
    fitting = []
    for other in STRUCTURES if space == "adapter" else _DELTA_STRUCTURES:
        size = curvature_memory(state, other, space).total  # at its default rank and dense_limit
        if other != structure and size <= limit:
            fitting.append((size, f"structure={other!r} ({_readable(size)})"))
    remedies = [text for _, text in sorted(fitting, reverse=True)]
    if structure not in ("diagonal", "dense"):
        remedies.append(f"a smaller `rank` (now {rank}) or `dense_limit` (now {dense_limit})")
    if device.type != "cpu":
        remedies.append("offload=True")
    raise ValueError(
        f"structure={structure!r} in {space} space takes {_readable(need.total)} for this adapter of "
        f"{state.num_parameters} weights, above memory_limit={_readable(limit)}. What helps: "
        + ("; ".join(remedies) or "a smaller adapter")
        + "."
    )


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def _readable(size: float) -> str:
    unit = next((u for u in (30, 20, 10) if size >= 2**u), 0)
    return f"{size / 2**unit:.{1 if unit else 0}f} { {30: 'GiB', 20: 'MiB', 10: 'KiB', 0: 'bytes'}[unit] }"
