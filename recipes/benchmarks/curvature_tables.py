"""The figures of `curvature_cost.py` as tables on the console.

Not run by itself: part of `curvature_cost.py`.
"""

from typing import Any

from rich.console import Console
from rich.table import Column, Table

from curvature_runs import PASS


def show(result: dict[str, Any], console: Console) -> None:
    """Print what `benchmark` has returned."""
    options = result["options"]
    for row in result["checks"]:
        verdict = "OK" if row["equal"] else "DID NOT RUN" if "error" in row else "DIFFERENT"
        how_far = row.get("error") or f"largest relative difference {row['difference']:.1e}"
        console.print(f"{verdict}: ours = {row['peer']}, in float32 ({how_far})", markup=False, highlight=False)
    for name, why in result["skipped"].items():
        console.print(f"skipped: {name}: {why}", markup=False)
    title = (
        f"{options['model']}, {options['dtype']}, r={options['r']}, {options['batch']} x {options['tokens']} tokens, "
        f"{options['threads']} thread(s), median of {options['rounds']} rounds"
    )
    table = Table(
        *_names("curvature"), "seconds per batch", "per batch / fwd+bwd", "once per pass, s",
        f"{PASS} batches / {PASS} fwd+bwd", "peak MiB", "estimated MiB", title=title,
    )  # fmt: skip
    for name, row in result["figures"].items():
        table.add_row(
            name, _number(row["seconds_per_batch"]), _number(row["per_batch"]), _number(row["once_seconds"], 2),
            _number(row["whole_pass"]), _number(row["peak_mib"], 0), _mebibytes(row["curvature_bytes"]),
        )  # fmt: skip
    console.print(table)
    for row in result["targets"]:
        verdict = {True: "PASS", False: "FAIL", None: "NOT MEASURED"}[row["passed"]]
        beside = f"; {PASS} batches: {row['whole_pass']:.3f}" if row.get("whole_pass") else ""
        value = f" {row['value']:.3f}" if row["value"] is not None else ""
        console.print(
            f"{verdict}: {row['what']} / {row['over']} per batch{value} (target <= {row['limit']:.2f}{beside})",
            markup=False,
            highlight=False,
        )
    if "scaling" in result:
        _show_scaling(result["scaling"], console)


def _show_scaling(scaling: dict[str, list[dict[str, Any]]], console: Console) -> None:
    table = Table(
        *_names("model, rank, batch", "curvature"), "ratio", "foretold", "once, s", f"{PASS} batches", "peak MiB",
        "fwd+bwd", "estimated", "flops", "counted", title="over ranks and model sizes",
    )  # fmt: skip
    before = None
    for row in (*scaling["ranks"], *scaling["sizes"]):
        if "skipped" in row:
            console.print(f"skipped: {row['model']}, r={row['r']}, {row['variant']}: {row['skipped']}", markup=False)
            continue
        where = f"{row['model']}, r={row['r']}, {row['batch']}x{row['tokens']}"
        if before not in (None, where):
            table.add_section()
        table.add_row(
            where if where != before else "", row["variant"], _number(row["per_batch"]),
            _number(row.get("foretold_per_batch")), _number(row["once_seconds"], 2), _number(row["whole_pass"]),
            _number(row["peak_mib"], 0), _number(row["plain_peak_mib"], 0), _mebibytes(row["curvature_bytes"]),
            _number(row["flops"], 4), _number(row["counted_flops"], 4),
        )  # fmt: skip
        before = where
    console.print(table)
    table = Table(
        *_names("curvature"), "sums MiB", "scores MiB", "result MiB", "total MiB", "flops", "price", "ratio",
        title="Llama-3.1-8B, r=16 on all linear layers",
    )  # fmt: skip
    for row in scaling["llama_8b"]:
        table.add_row(
            row["variant"], *(_mebibytes(row[f"{part}_bytes"]) for part in ("sums", "scores", "result", "total")),
            _number(row["flops"], 4), _number(row.get("price"), 2), _number(row.get("per_batch")),
        )  # fmt: skip
    console.print(table)
    console.print(
        "ratio: per batch / fwd+bwd. flops: of the structure's products over those of forward and backward. price: "
        "(ratio - 1) / flops, measured on the first model at the same rank; foretold, and for 8B: 1 + price * flops."
    )


def _names(*columns: str) -> list[Column]:
    return [Column(column, no_wrap=True) for column in columns]


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f}"
