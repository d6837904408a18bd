"""Curvature against the adapter's rank and the model's size, and what the figures come to for Llama-3.1-8B.

The extrapolation. A position costs forward and backward 4 flops per frozen weight (its own gradient is not needed),
6 per adapter weight and 12 * positions * width per attention layer. To this a curvature adds matrix products, counted
by `extra_flops`. What a measured pass takes beyond forward and backward, over what these products would take at the
speed of forward and backward, is the price of a product: above 1 for skinny products in float32 beside large ones in
bfloat16, and for all that is no product (hooks, squares). With the price of the options' model at the same rank, the
ratio of other models is foretold, and held against the measured one; then that of the large model. Memory needs no
extrapolation: it is read off the large model's shapes, on the meta device.

Not run by itself: part of `curvature_cost.py`.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kalman_peft import AdapterState
from kalman_peft.curvature.memory import DEFAULT_RANK, curvature_memory
from kalman_peft.curvature.moments import is_dense, sketch_columns
from kalman_peft.curvature.sharing import SharedInputs

from curvature_runs import PASS, PLAIN, Variant, bytes_of, count_flops, measure_curvatures, misfits, randomise_b
from measuring import add_adapter, load_base, make_batch


RANKS = (4, 8, 16, 32, 64)
SCALED = (
    Variant("diagonal"),
    Variant("kronecker"),
    Variant("kronecker", space="delta_w"),
    Variant("block_tridiagonal"),
    Variant("low_rank"),
)
LARGE = 5e8  # weights above which a model gets fewer tokens


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate, vocab_size=vocab, max_position_embeddings=8192, tie_word_embeddings=False,
        use_cache=False,
    )  # fmt: skip


SIZES = {
    "Llama 24M, random": _llama(288, 6, 6, 6, 768, 32000),
    "Llama 134M, random": _llama(768, 12, 12, 12, 2048, 32000),
    "Llama 1.1B, random": _llama(2048, 22, 32, 4, 5632, 32000),
}
LLAMA_8B = _llama(4096, 32, 32, 8, 14336, 128256)  # the shape of Llama-3.1-8B
LLAMA_8B_RANK = 16


def forward_backward_flops(model: Any, sequences: int, tokens: int) -> float:
    """Flops of the matrix products of forward and backward, without gradients of the frozen weights."""
    state = AdapterState(model, warn_excluded=False)
    ours = {id(p) for p in state.parameters().values()}
    linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    frozen = sum(w.numel() for w in linear if id(w) not in ours)
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_hidden_layers * config.num_attention_heads * head
    return sequences * tokens * (4.0 * frozen + 6.0 * state.num_parameters + 12.0 * width * tokens)


def extra_flops(model: Any, variant: Variant, sequences: int, tokens: int) -> float:
    """Flops of the matrix products that a structure adds to forward and backward, for one batch.

    With N positions, scores of a factor (o, i) take 2 N o i; a second moment of side n takes 2 N n^2, or as a sketch
    of m columns 4 N n m; low rank turns every score, of D weights, into the sketch's directions and back, 4 D m.

    Args:
        model (`PeftModel`): Also on the meta device.
        variant (`Variant`): "diagonal", "kronecker", "block_tridiagonal" or "low_rank"; one draw, or none.
        sequences (`int`): In the batch.
        tokens (`int`): Per sequence, all of them observed.

    Returns:
        `float`: The count.

    Raises:
        ValueError: Another structure.
    """
    state = AdapterState(model, warn_excluded=False)
    positions, size, rank = sequences * tokens, state.num_parameters, DEFAULT_RANK
    merged = sum(pair.b.shape[0] * pair.a.shape[1] for pair in state)
    if variant.structure == "diagonal":
        return 2.0 * positions * (size if variant.space == "adapter" else merged)
    if variant.structure == "low_rank":
        return 2.0 * positions * size + 4.0 * sequences * size * sketch_columns(rank)
    if variant.structure not in ("kronecker", "block_tridiagonal"):
        raise ValueError(f"No count of flops for structure={variant.structure!r}.")
    sides = [pair.b.shape[0] for pair in state]
    sides += [state.pairs[leader].a.shape[1] for leader in set(shared_inputs(model, state).leaders)]
    if variant.space == "adapter" and variant.structure == "kronecker":
        sides += [pair.rank for pair in state for _ in "ab"]
    limit = variant.options.get("dense_limit", 256)
    return sum(
        2.0 * positions * n * n if is_dense(n, rank, limit) else 4.0 * positions * n * sketch_columns(min(rank, n))
        for n in sides
    )


def shared_inputs(model: Any, state: AdapterState) -> SharedInputs:
    """Which layers read one input, found by a forward pass of one token; shapes suffice."""
    inputs, device = SharedInputs(state), state.pairs[0].a.device
    # A mask in four dimensions is taken as it is: making one looks at values, which the meta device has none of.
    mask = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=device)
    with torch.no_grad(), inputs.watching():
        model(input_ids=torch.ones(1, 1, dtype=torch.long, device=device), attention_mask=mask)
    return inputs


def large_model() -> Any:
    """Llama-3.1-8B with an adapter on all linear layers: shapes only, no weights."""
    with torch.device("meta"):
        return add_adapter(AutoModelForCausalLM.from_config(LLAMA_8B, dtype=torch.bfloat16), LLAMA_8B_RANK)


def _rows(base: Any, label: str, r: int, options: Any, tokens: int, batches: int) -> list[dict[str, Any]]:
    model = add_adapter(base, r)
    model.config.use_cache = False
    randomise_b(model)
    batch = make_batch(model, options.batch, tokens)
    left_out = misfits(model, SCALED)
    variants = [variant for variant in SCALED if variant.name not in left_out]
    samples = measure_curvatures(model, [batch] * batches, variants, options.scaling_rounds)
    plain, own = samples[PLAIN], forward_backward_flops(model, options.batch, tokens)
    rows = []
    for variant in variants:
        sample, extra = samples[variant.name], extra_flops(model, variant, options.batch, tokens)
        rows.append({
            "model": label,
            "r": r,
            "batch": options.batch,
            "tokens": tokens,
            "batches": batches,
            "variant": variant.name,
            "adapter_weights": AdapterState(model, warn_excluded=False).num_parameters,
            "seconds_per_batch": statistics.median(sample.repeated) / batches,
            "per_batch": sample.over(plain),
            "once_seconds": statistics.median(sample.once),
            "whole_pass": sample.over(plain, PASS / batches),
            "peak_mib": statistics.median(sample.mebibytes),
            "plain_peak_mib": statistics.median(plain.mebibytes),
            "curvature_bytes": bytes_of(model, variant),
            "flops": extra / own,
            "counted_flops": count_flops(model, batch, variant) / own,
        })  # fmt: skip
    model.unload()
    return rows + [{"model": label, "r": r, "variant": name, "skipped": why} for name, why in left_out.items()]


def scale_ranks(options: Any) -> list[dict[str, Any]]:
    """One row per rank and structure, on the model of the options."""
    base = load_base(options.model, options.dtype)
    label = Path(options.model).name
    return [row for r in RANKS for row in _rows(base, label, r, options, options.tokens, options.batches)]


def scale_sizes(options: Any) -> list[dict[str, Any]]:
    """One row per model and structure, at the options' rank; the largest with a quarter of the tokens, one batch."""
    rows = []
    for label, config in SIZES.items():
        with torch.device("meta"):
            weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        dtype = getattr(torch, options.dtype)
        free = psutil.virtual_memory().available
        if 3 * weights * dtype.itemsize > free:
            why = f"{weights * dtype.itemsize / 2**30:.1f} GiB of weights, {free / 2**30:.1f} GiB of memory free"
            rows.append({"model": label, "r": options.r, "variant": "all", "skipped": why})
            continue
        base: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        base.to("cuda" if torch.cuda.is_available() else "cpu")
        large = weights > LARGE
        tokens = max(options.tokens // 4, 8) if large else options.tokens
        rows += _rows(base, label, options.r, options, tokens, 1 if large else options.batches)
    return rows


def prices(measured: list[dict[str, Any]], r: int) -> dict[str, float]:
    """Price of a product by variant, from the rows of one rank."""
    rows = [row for row in measured if "skipped" not in row and row["r"] == r]
    return {row["variant"]: (row["per_batch"] - 1) / row["flops"] for row in rows}


def extrapolate(measured: list[dict[str, Any]], sequences: int, tokens: int) -> list[dict[str, Any]]:
    """Bytes and time of every structure for Llama-3.1-8B.

    Args:
        measured (`list[dict]`): Rows of `scale_ranks`; those of rank 16 give the price of a product.
        sequences (`int`): In a batch.
        tokens (`int`): Per sequence.

    Returns:
        `list[dict]`: One row per structure.
    """
    model = large_model()
    state = AdapterState(model, warn_excluded=False)
    own = forward_backward_flops(model, sequences, tokens)
    here = prices(measured, LLAMA_8B_RANK)
    rows = []
    for variant in (*SCALED, Variant("diagonal", space="delta_w"), Variant("kronecker", dense=True)):
        memory = curvature_memory(state, variant.structure, variant.space, **variant.options)
        flops = extra_flops(model, variant, sequences, tokens) / own
        row: dict[str, Any] = {
            "variant": variant.name,
            "sums_bytes": memory.sums,
            "scores_bytes": memory.scores,
            "result_bytes": memory.result,
            "total_bytes": memory.total,
            "flops": flops,
        }
        if variant.name in here:
            row["price"] = here[variant.name]
            row["per_batch"] = 1 + row["price"] * flops
        rows.append(row)
    return rows


def scale(options: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """All three tables.

    Args:
        options (`CurvatureOptions`): Of `curvature_cost`.
        say (`Callable`): Told what is under way.

    Returns:
        `dict`: "ranks", "sizes" and "llama_8b", lists of rows.
    """
    say(f"scaling: ranks {RANKS}")
    ranks = scale_ranks(options)
    say(f"scaling: {', '.join(SIZES)}")
    sizes = scale_sizes(options)
    known = prices(ranks, options.r)
    for row in sizes:
        if row["variant"] in known and "flops" in row:
            row["foretold_per_batch"] = 1 + known[row["variant"]] * row["flops"]
    return {"ranks": ranks, "sizes": sizes, "llama_8b": extrapolate(ranks, options.batch, options.tokens)}
