"""estimate_curvature: one pass over a little data, out comes the precision of the adapter's weights."""

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import B_SUFFIX, AdapterState
from ..distributed import is_sharded
from ..observations import Observation, infer_observation
from ..precision import Precision
from ..precision.kronecker import KroneckerAlgebra
from ..quantized import keep_differentiable
from .accumulators import (
    Accumulator,
    DeltaDiagonalAccumulator,
    DenseAccumulator,
    DiagonalAccumulator,
    LowRankAccumulator,
)
from .fisher import default_forward, kinds_for, resolve_reduction
from .kronecker_sums import EigenvalueAccumulator, KroneckerAccumulator
from .memory import DEFAULT_RANK, check_memory, check_structure
from .passes import NOT_REACHED, Kept, Scorer, Source
from .sharing import SharedInputs


logger = logging.getLogger(__name__)

_WARN_BYTES = 2**30


def estimate_curvature(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Tensor]] | Mapping[str, Iterable[Mapping[str, Tensor]]],
    structure: str = "kronecker",
    fisher: str = "sampled",
    *,
    space: str = "delta_w",
    reduction: str | None = None,
    num_samples: int = 1,
    rank: int = DEFAULT_RANK,
    dense_limit: int = 256,
    weights: Mapping[str, float] | None = None,
    max_batches: int | None = None,
    max_samples: int | None = None,
    share_inputs: bool = True,
    offload: bool = False,
    memory_limit: int | None = None,
    adapter_name: str | None = None,
    observation: Observation | None = None,
    forward_fn: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] = default_forward,
    seed: int = 0,
    progress_bar: bool = True,
) -> tuple[Precision, dict[str, Any]]:
    """Curvature of the loss over the adapter's weights, per observed token (Laplace approximation, stage I of LaLoRA).

    Scores are exact per sequence, summed in float32, taken in evaluation mode. Padding and labels of -100 count
    nothing. In a process group every process takes each W-th batch, and one reduction at the end gives the
    single-process answer; a dataloader that accelerate has prepared is already split and is taken as it is (prepare it
    with `even_batches=False`, or repeated samples count twice). Sharded models (FSDP2, `fully_shard`) are supported.

    Args:
        model (`PeftModel`): Model with a LoRA adapter; a DistributedDataParallel wrapper is looked through.
        dataloader (`Iterable`, or `Mapping[str, Iterable]`):
            Batches (mappings) of tensors with `labels`; or several sources by name. A stream is read only as far as
            `max_batches` or `max_samples`. Packed sequences need `position_ids` that restart at each of them and no
            `attention_mask`, as from `DataCollatorWithFlattening`.
        structure (`str`, *optional*, defaults to `"kronecker"`):
            "diagonal"; "kronecker" (K-FAC, a block per factor); "ekfac" (its eigenvalues measured in a second pass
            over the same batches); "block_tridiagonal" (K-FAC with A and B of an adapter coupled); "low_rank" (the
            exact diagonal plus the largest directions over all layers); "dense" (tiny adapters).
        fisher (`str`, *optional*, defaults to `"sampled"`):
            "sampled" draws labels from the model, "rademacher" random signs: both unbiased for the Gauss-Newton
            matrix. "exact" enumerates the outputs, for small heads. "empirical" uses the true labels, which saves the
            draw.
        space (`str`, *optional*, defaults to `"delta_w"`):
            "delta_w": curvature of the merged update scaling * B A ("diagonal", "kronecker", "ekfac"). "adapter": of A
            and B themselves; there, curvature of A is zero while B = 0, PEFT's default start, and a warning says so.
        reduction (`str`, *optional*):
            "token" or "sequence", over which the empirical Fisher squares its scores; see `resolve_reduction`.
        num_samples (`int`, *optional*, defaults to 1): Draws per label, where any are made; one backward each.
        rank (`int`, *optional*, defaults to 16):
            Eigenpairs kept of Kronecker sides longer than `dense_limit`; the rest of the trace becomes an isotropic
            tail. Directions of "low_rank".
        dense_limit (`int`, *optional*, defaults to 256): Longest Kronecker side summed and kept in full.
        weights (`Mapping[str, float]`, *optional*): Of several sources, by name; equal by default, scaled to sum 1.
        max_batches (`int`, *optional*): Stop after so many batches of each source.
        max_samples (`int`, *optional*): Stop after so many rows of each source.
        share_inputs (`bool`, *optional*, defaults to `True`):
            Take the second moment of an input that several layers read (q, k, v; gate, up) once.
        offload (`bool`, *optional*, defaults to `False`): Keep sums and result on the CPU.
        memory_limit (`int`, *optional*): Bytes the curvature may take; nine tenths of the free memory by default.
        adapter_name (`str`, *optional*): Defaults to the active adapter.
        observation (`Observation`, *optional*): Inferred from the model's class by default.
        forward_fn (`Callable`, *optional*): (model, batch) -> logits.
        seed (`int`, *optional*, defaults to 0): Of the draws, together with the batch's index.
        progress_bar (`bool`, *optional*, defaults to `True`): On the first process.

    Returns:
        `tuple[Precision, dict]`: The precision, and a record of how it came about: structure, space, fisher,
        reduction, num_samples, num_tokens (labels observed), num_sequences, num_batches, seed, rank, dense_limit, and
        `sources` where there were several.

    Raises:
        TypeError: The model has no PEFT adapter, or a batch is no mapping.
        ValueError: An unknown option or a combination that is not supported, an empty or label-free dataloader, too
            little memory, NaN or Inf in logits or curvature.
    """
    check_structure(structure, space)
    reduction = resolve_reduction(fisher, reduction)
    kinds, weight = kinds_for(fisher, reduction, num_samples)
    _check_whole(0, dense_limit=dense_limit, seed=seed, memory_limit=_given(memory_limit, 0))
    _check_whole(1, rank=rank, max_batches=_given(max_batches, 1), max_samples=_given(max_samples, 1))
    keep_differentiable(model)
    state = AdapterState(model, adapter_name, warn_excluded=False)
    if space == "delta_w" or structure == "block_tridiagonal":
        refuse_nonlinear_merge(state, structure, space)
    sharded = any(is_sharded(p) for p in state.model.parameters())
    if sharded and fisher == "exact":
        raise ValueError(
            "fisher='exact' is not supported for sharded models, whose processes must take equally many passes; use "
            "fisher='sampled'."
        )
    memory = check_memory(
        state, structure, space, rank=rank, dense_limit=dense_limit, limit=memory_limit, offload=offload
    )
    log = logger.warning if memory.total > _WARN_BYTES else logger.info
    log("Curvature (%s, %s) takes up to %.0f MiB.", structure, space, memory.total / 2**20)

    inputs = SharedInputs(state, share_inputs)
    scorer = Scorer(
        state,
        observation or infer_observation(state.model),
        kinds,
        weight,
        forward_fn,
        max_batches=max_batches,
        max_samples=max_samples,
        seed=seed,
        progress_bar=progress_bar,
        description=f"curvature ({structure}, {fisher})",
        inputs=inputs,
        in_step=sharded,
    )
    sources = _sources(dataloader, weights)
    accumulator = make_accumulator(
        state, structure, space, rank=rank, dense_limit=dense_limit, inputs=inputs, offload=offload
    )
    kept: list[list] | None = [] if structure == "ekfac" else None
    fired = scorer.run(sources, accumulator, kept)
    _check_taps(state, fired)
    with torch.autocast(state.pairs[0].a.device.type, enabled=False):
        precision = accumulator.finalize()
    if kept is not None:
        assert isinstance(precision, KroneckerAlgebra)
        again = [Source(s.name, Kept(batches), s.share) for s, batches in zip(sources, kept, strict=True)]
        second = EigenvalueAccumulator(state, precision.blocks, space)
        scorer.description = "curvature (eigenvalues)"
        scorer.run(again, second)
        precision = second.finalize()
    if space == "adapter" and all(not b.any() for k, b in state.snapshot().items() if k.endswith(B_SUFFIX)):
        warnings.warn(
            "The curvature of every lora_A is exactly zero, because every lora_B is zero (PEFT's default start): A "
            "would be left unprotected. Use space='delta_w', which has no such blind spot, or train a few steps on "
            "source data first.",
            stacklevel=2,
        )
    counts = torch.stack([source.counts for source in sources]).sum(0).long().tolist()
    record: dict[str, Any] = {
        "structure": structure,
        "space": space,
        "fisher": fisher,
        "reduction": reduction,
        "num_samples": num_samples,
        "num_tokens": counts[0],
        "num_sequences": counts[1],
        "num_batches": counts[2],
        "seed": seed,
    }
    if structure not in ("diagonal", "dense"):
        record["rank"] = rank
    if structure in ("kronecker", "ekfac", "block_tridiagonal"):
        record["dense_limit"] = dense_limit
    if isinstance(dataloader, Mapping):
        record["sources"] = {
            s.name: {"weight": s.share, "num_tokens": int(s.counts[0]), "num_sequences": int(s.counts[1])}
            for s in sources
        }
    return precision, record


def make_accumulator(
    state: AdapterState,
    structure: str,
    space: str,
    *,
    rank: int,
    dense_limit: int,
    inputs: SharedInputs,
    offload: bool = False,
) -> Accumulator:
    """The sums for a structure in a space (for "ekfac" those of its basis); names are checked by the caller."""
    if structure == "diagonal":
        return (DiagonalAccumulator if space == "adapter" else DeltaDiagonalAccumulator)(state, offload=offload)
    if structure == "dense":
        return DenseAccumulator(state, offload=offload)
    if structure == "low_rank":
        return LowRankAccumulator(state, rank=rank, offload=offload)
    return KroneckerAccumulator(
        state,
        structure=structure,
        space=space,
        rank=rank,
        dense_limit=dense_limit,
        inputs=inputs,
        offload=offload,
    )


def refuse_nonlinear_merge(state: AdapterState, structure: str = "kronecker", space: str = "delta_w") -> None:
    """Raise ValueError if some layer's update is not scaling * B A (DoRA), which some curvatures are built on."""
    unmergeable = [pair.name for pair in state if not pair.merges_linearly]
    if unmergeable:
        what = f"space={space!r}" if space == "delta_w" else f"structure={structure!r}"
        raise ValueError(
            f"{what} needs updates of the form scaling * B A, which {unmergeable[0]} is not (a LoRA variant such as "
            "DoRA). Use space='adapter' (laplace_space='adapter' in KalmanConfig) with another structure."
        )


def _given(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


def _check_whole(least: int, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}.")


def _sources(dataloader: Any, weights: Mapping[str, float] | None) -> list[Source]:
    if not isinstance(dataloader, Mapping):
        if weights is not None:
            raise ValueError("`weights` are for several sources: pass a mapping name -> dataloader.")
        return [Source("", dataloader, 1.0)]
    if not dataloader:
        raise ValueError("`dataloader` is an empty mapping; give at least one source.")
    if "input_ids" in dataloader or "labels" in dataloader:
        raise TypeError("`dataloader` is a batch; pass an iterable of batches, such as [batch].")
    if weights is not None and not isinstance(weights, Mapping):
        raise ValueError(f"`weights` must map the names {sorted(dataloader)} to numbers, got {weights!r}.")
    given = dict.fromkeys(dataloader, 1.0) if weights is None else dict(weights)
    if given.keys() != dataloader.keys():
        raise ValueError(f"`weights` must name the sources {sorted(dataloader)}, got {sorted(given)}.")
    numbers = all(isinstance(w, int | float) and math.isfinite(w) and w >= 0 for w in given.values())
    total = sum(given.values()) if numbers else 0
    if not total > 0:
        raise ValueError(f"`weights` must be >= 0 and not all 0, got {given}.")
    return [Source(str(name), batches, given[name] / total) for name, batches in dataloader.items() if given[name] > 0]


def _check_taps(state: AdapterState, fired: Tensor) -> None:
    if not fired.any():
        raise ValueError(NOT_REACHED.format(state.adapter_name))
    silent = [pair.name for pair, times in zip(state, fired.tolist(), strict=True) if not times]
    if silent:
        warnings.warn(
            f"No gradient passed through {len(silent)} adapted layers ({silent[0]}, ...): their curvature is zero and "
            "they are not protected. Give more source data if they are experts that were not chosen.",
            stacklevel=3,
        )
