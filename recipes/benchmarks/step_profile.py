"""Which operators a LoKO step consists of, how often each is called, and where the host waits for the device.

Not run by itself: part of `step_cost.py`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch.profiler import ProfilerActivity, profile

from step_runs import ADAMW, DRAW, NO_DRAW, Run, adamw_on, loko_on, make_params


WAITS = "aten::_local_scalar_dense"  # a number read by the host: on an accelerator it waits for all work before
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC")


def profile_steps(shapes: Iterable[tuple[int, ...]], memory: str = "kronecker", top: int = 12) -> list[dict[str, Any]]:
    """One row per step over parameters of these shapes: of AdamW, and of LoKO with and without a draw."""
    params, gradients = make_params(shapes)
    size = {"weights": sum(p.numel() for p in params.values()), "tensors": len(params)}
    rows = [{"step": ADAMW} | size | _profiled(adamw_on(params, gradients)[1], top)]
    for when in (NO_DRAW, DRAW):
        _, run = loko_on(params, gradients, when == DRAW, memory=memory)
        rows.append({"step": f"{memory}, {when}"} | size | _profiled(run, top))
    return rows


def _profiled(run: Run, top: int) -> dict[str, Any]:
    run()  # what only a first step does
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiled:
        run()
    found = profiled.key_averages()
    calls = {event.key: event.count for event in found}
    busy = sorted(found, key=lambda e: e.self_device_time_total if cuda else e.self_cpu_time_total, reverse=True)
    return {
        "operators": sum(count for key, count in calls.items() if key.startswith("aten::")),
        "launches": sum(calls.get(key, 0) for key in _LAUNCHES) if cuda else None,
        "waits": calls.get(WAITS, 0),
        "top": [
            {
                "operator": e.key,
                "calls": e.count,
                "milliseconds": (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3,
            }
            for e in busy[:top]
        ],
    }


def show_profile(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the rows of `profile_steps`."""
    for row in rows:
        launches = "" if row["launches"] is None else f", {row['launches']} kernel launches"
        table = Table(
            Column("operator", no_wrap=True), "calls", "ms, self",
            title=f"{row['step']}: {row['weights']:.1e} weights in {row['tensors']} tensors; "
            f"{row['operators']} operator calls{launches}, {row['waits']} waits",
        )  # fmt: skip
        for entry in row["top"]:
            table.add_row(entry["operator"], str(entry["calls"]), f"{entry['milliseconds']:.3f}")
        console.print(table)
