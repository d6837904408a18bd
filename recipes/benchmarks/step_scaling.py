"""The optimizers' own work on LoRA-shaped parameters without a model, over the number of weights.

Gradients are given, so that a step is all that is measured; for LoKO also what `observe` does beside the backward
passes. Bytes are per weight: of the state, and at the peak of a step above parameters, gradients and state. LoKO's
peak holds a copy of the gradients; in training autograd's own are gone by then, while AdamW's stay.

Not run by itself: part of `step_cost.py`.
"""

import statistics
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from kalman_peft.loko import MEMORIES

from measuring import measure
from step_runs import ADAMW, DRAW, EVERY, NO_DRAW, adamw_on, loko_on, lora_shapes, make_params, state_bytes


WIDTHS = {1e5: 256, 1e6: 512, 1e7: 2048, 1e8: 4096}  # weights -> width of the layers
LARGE = 3e7  # weights above which low rank, of `rank` further numbers per weight, is left out
TARGETS = {"state / AdamW": 1.1, "no draw / AdamW": 2.0}  # of the Kronecker memory
FOREACH = "AdamW, foreach"  # the default on an accelerator


def applicable(weights: float) -> dict[str, str]:
    """Memories that are left out, with the reason."""
    left_out = {
        "dense": "for at most 20,000 weights",
        "block": "no parameter of at most block_limit weights: the same as kronecker",
    }
    return left_out | ({"low_rank": "takes 17 numbers per weight"} if weights > LARGE else {})


def scale_steps(sizes: list[float], ranks: list[int], rounds: int) -> list[dict[str, Any]]:
    """One row per size, LoRA rank and optimizer."""
    return [row for weights in sizes for r in ranks for row in _rows(weights, r, rounds)]


def _rows(weights: float, r: int, rounds: int) -> list[dict[str, Any]]:
    width = WIDTHS.get(weights) or min(WIDTHS.items(), key=lambda item: abs(item[0] - weights))[1]
    params, gradients = make_params(lora_shapes(weights, r, width))
    size = sum(p.numel() for p in params.values())
    adamw, step = adamw_on(params, gradients)
    optimizers: dict[str, Any] = {ADAMW: adamw}
    runs = {ADAMW: step}
    if not torch.cuda.is_available():
        optimizers[FOREACH], runs[FOREACH] = adamw_on(params, gradients, foreach=True)
    left_out = applicable(size)
    for memory in (m for m in MEMORIES if m not in left_out):
        for when in (DRAW, NO_DRAW):
            optimizers[memory], runs[f"{memory}, {when}"] = loko_on(params, gradients, when == DRAW, memory=memory)
    samples = measure(runs, rounds)
    plain = samples[ADAMW]
    rows = []
    for name, optimizer in optimizers.items():
        row: dict[str, Any] = {"optimizer": name, "weights": size, "tensors": len(params), "r": r, "width": width}
        row["state_bytes"] = state_bytes(optimizer) / size
        alone = name in runs  # one kind of step only
        for when in (None,) if alone else (DRAW, NO_DRAW):
            sample = samples[f"{name}, {when}" if when else name]
            row[when or NO_DRAW] = {
                "seconds": statistics.median(sample.repeated),
                "ns": 1e9 * statistics.median(sample.repeated) / size,
                "to_adamw": sample.over(plain),
                "peak_bytes": 2**20 * statistics.median(sample.mebibytes) / size,
            }
        if not alone:
            row["every"] = {n: _every(row, n) for n in EVERY}
        rows.append(row)
    reasons = [{"optimizer": name, "weights": size, "r": r, "skipped": why} for name, why in left_out.items()]
    return rows + reasons


def _every(row: dict[str, Any], n: int) -> float:
    return (row[DRAW]["to_adamw"] + (n - 1) * row[NO_DRAW]["to_adamw"]) / n


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The Kronecker memory against its targets; a row per size, rank and target."""
    found = {(row["optimizer"], row["weights"], row["r"]): row for row in rows if "skipped" not in row}
    judged = []
    for (name, weights, r), row in found.items():
        if name != "kronecker":
            continue
        moments = found[ADAMW, weights, r]["state_bytes"]
        values = {
            "state / AdamW": row["state_bytes"] / moments,
            "no draw / AdamW": row[NO_DRAW]["to_adamw"],
        }
        for what, limit in TARGETS.items():
            value = values[what]
            judged.append(
                {"weights": weights, "r": r, "what": what, "value": value, "limit": limit, "passed": value <= limit}
            )
    return judged


def show_scaling(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the rows of `scale_steps`, and how the targets are met."""
    kind = "foreach" if torch.cuda.is_available() else "one tensor after the other"
    table = Table(
        Column("optimizer", no_wrap=True), "weights", "r", "tensors", "s", "s, draw", "ns", "ns, draw", "/ AdamW",
        "draw / AdamW", *(f"every {n}th" for n in EVERY), "state B", "peak B", "peak B, draw",
        title=f"per step; ns and bytes per weight; AdamW by default: {kind}",
    )  # fmt: skip
    before = None
    for row in (row for row in rows if "skipped" not in row):
        if before not in (None, (row["weights"], row["r"])):
            table.add_section()
        before = row["weights"], row["r"]
        plain, draw, every = row[NO_DRAW], row.get(DRAW, {}), row.get("every", {})
        table.add_row(
            row["optimizer"], f"{row['weights']:.1e}", str(row["r"]), str(row["tensors"]),
            f"{plain['seconds']:.4f}", _number(draw.get("seconds"), 4), _number(plain["ns"]), _number(draw.get("ns")),
            _number(plain["to_adamw"], 2), _number(draw.get("to_adamw"), 2),
            *(_number(every.get(n), 2) for n in EVERY), _number(row["state_bytes"]), _number(plain["peak_bytes"]),
            _number(draw.get("peak_bytes")),
        )  # fmt: skip
    console.print(table)
    for row in (row for row in rows if "skipped" in row):
        console.print(f"left out: {row['optimizer']}, {row['weights']:.1e} weights: {row['skipped']}", markup=False)
    for row in judge(rows):
        console.print(
            f"{'PASS' if row['passed'] else 'FAIL'}: kronecker, {row['weights']:.1e} weights, r={row['r']}: "
            f"{row['what']} {row['value']:.2f} (target <= {row['limit']})",
            markup=False,
            highlight=False,
        )


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
