"""Table and figure of decision transformers that adapt to shifting dynamics."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .online_report import interval, show_interval
from .plots import COLOURS, STYLE
from .prequential import smooth


Runs = Mapping[str, Sequence[Mapping[str, Any]]]  # by method, one result per seed
RATES = ("arrived", "adapted")


def summarise(runs: Runs) -> dict[str, Any]:
    """Means over seeds with their intervals.

    Args:
        runs (`Mapping[str, Sequence[Mapping[str, Any]]]`): By method, one result per seed.

    Returns:
        `dict[str, Any]`: By method `phases` (by name `error`, `arrived`, `adapted`), the same over `all` phases, and
        `seconds` per sample.
    """
    result: dict[str, Any] = {}
    for method, found in runs.items():
        names = list(found[0]["phases"])
        phases = {name: _phase([run["phases"][name] for run in found]) for name in names}
        means = [
            {
                "errors": [e for phase in run["phases"].values() for e in phase["errors"]],
                **{rate: statistics.fmean(phase[rate] for phase in run["phases"].values()) for rate in RATES},
            }
            for run in found
        ]
        seconds = statistics.median(phase["seconds"] for run in found for phase in run["phases"].values())
        result[method] = {"phases": phases, "all": _phase(means), "seconds": seconds}
    return result


def _phase(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"error": interval([statistics.fmean(one["errors"]) for one in found])} | {
        rate: interval([one[rate] for one in found]) for rate in RATES
    }


def cells(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table, as text.

    Args:
        result (`Mapping[str, Any]`): From [`summarise`].

    Returns:
        `tuple[list[str], list[list[str]]]`: One row per method.
    """
    first = next(iter(result.values()))
    headings = ["method", "error", "arrived", "adapted", *(f"adapted: {name}" for name in first["phases"])]
    headings += ["ms per sample"]
    rows = []
    for method, row in result.items():
        whole = [show_interval(row["all"]["error"], ".4f"), *(show_interval(row["all"][r], ".2f") for r in RATES)]
        each = [show_interval(phase["adapted"], ".2f") for phase in row["phases"].values()]
        rows.append([method, *whole, *each, f"{1e3 * row['seconds']:.1f}"])
    return headings, rows


def plot_phases(runs: Runs, path: Path, *, window: int) -> None:
    """Draw the error along the stream (log scale, mean over seeds), and success on arrival and after adapting.

    Args:
        runs (`Mapping[str, Sequence[Mapping[str, Any]]]`): As for [`summarise`].
        path (`Path`): The PNG to write.
        window (`int`): Samples over which the error is averaged.
    """
    first = next(iter(runs.values()))[0]["phases"]
    lengths = [len(phase["errors"]) for phase in first.values()]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 6.6), dpi=160, layout="constrained")
        above, below = FigureCanvasAgg(figure).figure.subplots(2, 1)
        for index, (method, found) in enumerate(runs.items()):
            colour, start = COLOURS[index % len(COLOURS)], 0
            for part, (name, length) in enumerate(zip(first, lengths, strict=True)):
                curves = [smooth(run["phases"][name]["errors"], window) for run in found]
                mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
                label = method if part == 0 else None
                above.plot(range(start + 1, start + length + 1), mean, color=colour, label=label, linewidth=1.8)
                start += length
            heights = [
                statistics.fmean(run["phases"][name][rate] for run in found) for name in first for rate in RATES
            ]
            width = 0.8 / len(runs)
            places = [k + (index + 0.5) * width - 0.4 for k in range(len(heights))]
            below.bar(places, heights, width=width, color=colour)
        for edge in (sum(lengths[:k]) for k in range(1, len(lengths))):
            above.axvline(edge, color="#666666", linewidth=1.2, linestyle="--", zorder=1)
        above.set_yscale("log")
        above.set_ylabel("squared error of actions")
        above.set_xlabel("samples seen (shifts at the dashed lines)")
        above.set_title("Predicted, then learned")
        below.set_xticks(range(2 * len(lengths)), [f"{name},\n{rate}" for name in first for rate in RATES], fontsize=9)
        below.set_ylabel("success rate")
        below.set_ylim(0, 1)
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
