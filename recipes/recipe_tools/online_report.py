"""Tables and curves of prequential runs, over seeds.

Intervals are Student's t, 95 %, over seeds; differences between methods are taken seed by seed, on the same stream.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from .plots import COLOURS, STYLE
from .prequential import Trace, smooth, summarise
from .tables import console_table, markdown


# 97.5 % points of Student's t for 1 to 30 degrees of freedom; the last one serves, a little wide, beyond.
T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
METRICS = {"log_loss": "log loss (nats)", "accuracy": "accuracy"}


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and half-width of its 95 % interval by Student's t.

    Args:
        values (`Sequence[float]`): One per seed.

    Returns:
        `dict[str, float | None]`: `mean` and `ci95`; both `None` if a value is infinite, the latter for one value.
    """
    if not all(map(math.isfinite, values)):
        return {"mean": None, "ci95": None}
    n = len(values)
    if n == 1:
        return {"mean": values[0], "ci95": None}
    wide = T975[min(n - 2, len(T975) - 1)] * statistics.stdev(values) / n**0.5
    return {"mean": statistics.fmean(values), "ci95": wide}


def summarise_runs(runs: Mapping[str, Sequence[Trace]], windows: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Metrics of methods over seeds, and their differences to the first method.

    Args:
        runs (`Mapping[str, Sequence[Trace]]`): One trace per seed, the seeds in the same order for every method.
        windows (`Mapping[str, tuple[int, int]]`): Parts of the stream; the first one is compared.

    Returns:
        `dict[str, Any]`: By method: per window and metric `mean` and `ci95`; `minus_first` (of the log loss over the
        first window, paired by seed; absent for the first method), `seconds_per_step` and `diverged` (runs).
    """
    seeds = {method: [summarise(trace, windows) for trace in traces] for method, traces in runs.items()}
    head, overall = next(iter(runs)), next(iter(windows))
    result: dict[str, Any] = {}
    for method, found in seeds.items():
        row: dict[str, Any] = {
            window: {metric: interval([one[window][metric] for one in found]) for metric in METRICS}
            for window in windows
        }
        if method != head:
            pairs = zip(found, seeds[head], strict=True)
            row["minus_first"] = interval([a[overall]["log_loss"] - b[overall]["log_loss"] for a, b in pairs])
        row["seconds_per_step"] = statistics.fmean(one["seconds_per_step"] for one in found)
        row["diverged"] = sum(trace.diverged for trace in runs[method])
        result[method] = row
    return result


def _cells(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table, as text."""
    first = next(iter(result))
    windows = [
        key for key in result[first] if isinstance(result[first][key], Mapping) and "log_loss" in result[first][key]
    ]
    headings = ["method", *(f"{METRICS[m]}, {w}" for w in windows for m in METRICS)]
    headings += [f"log loss minus {first}", "ms per step"]
    rows = []
    for method, row in result.items():
        name = f"{method} (diverged: {row['diverged']})" if row["diverged"] else method
        cells = [show_interval(row[w][m], ".3f") for w in windows for m in METRICS]
        cells += [show_interval(row["minus_first"], "+.3f") if "minus_first" in row else ""]
        rows.append([name, *cells, f"{1e3 * row['seconds_per_step']:.0f}"])
    return headings, rows


def show_interval(cell: Mapping[str, float | None], spec: str) -> str:
    """What [`interval`] returns as text; the mean in the format `spec`."""
    if cell["mean"] is None:
        return "infinite"
    text = format(cell["mean"], spec)
    return text if cell["ci95"] is None else f"{text} ± {cell['ci95']:.3f}"


def online_table(result: Mapping[str, Any], title: str) -> Table:
    """Lay out what [`summarise_runs`] returns for the console.

    Args:
        result (`Mapping[str, Any]`): By method.
        title (`str`): Heading.

    Returns:
        `Table`: For `rich.print`.
    """
    headings, rows = _cells(result)
    caption = "± 95 % interval over seeds, Student's t; differences are paired by seed"
    return console_table(headings, rows, title, caption)


def online_markdown(result: Mapping[str, Any]) -> str:
    """Lay out the same cells as [`online_table`] in GitHub's Markdown, ending with the caption and a newline."""
    headings, rows = _cells(result)
    return f"{markdown(headings, rows)}\n± 95 % interval over seeds (Student's t); differences are paired by seed.\n"


def plot_online(
    runs: Mapping[str, Mapping[str, Sequence[Trace]]],
    path: Path,
    *,
    window: int = 100,
    shift_at: int | None = None,
    title: str = "Online classification",
) -> None:
    """Draw log loss and accuracy along the stream, averaged over the last `window` samples; one column per batch size.

    Lines are means over seeds, bands one standard error; runs that diverged are left out. No average reaches over the
    shift, and averages of less than a fifth of the window are not drawn.

    Args:
        runs (`Mapping[str, Mapping[str, Sequence[Trace]]]`): Traces by batch size and method, one per seed.
        path (`Path`): The PNG to write.
        window (`int`, *optional*, defaults to 100): Samples to average over.
        shift_at (`int`, *optional*): Where to draw the shift of the stream.
        title (`str`, *optional*): Heading.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 4.6 * len(runs), 6.6), dpi=160, layout="constrained")
        panels = FigureCanvasAgg(figure).figure.subplots(2, len(runs), sharex=True, sharey="row", squeeze=False)
        for column, (size, methods) in enumerate(runs.items()):
            for row, metric in enumerate(METRICS):
                axes = panels[row][column]
                for index, (method, traces) in enumerate(methods.items()):
                    whole = [trace for trace in traces if not trace.diverged]
                    values = [trace.loss if metric == "log_loss" else trace.correct for trace in whole]
                    if values:
                        _draw_band(axes, values, window, shift_at, label=method, color=COLOURS[index % len(COLOURS)])
                if shift_at is not None:
                    axes.axvline(shift_at, color="#666666", linewidth=1.2, linestyle="--", zorder=1)
            # One legend per column: rates are tuned per batch size.
            panels[-1][column].legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=10)
            panels[0][column].set_title(f"batches of {size}", fontweight="normal")
            panels[-1][column].set_xlabel("samples seen" + (" (shift at the dashed line)" if shift_at else ""))
        for row, name in enumerate(METRICS.values()):
            panels[row][0].set_ylabel(name)
        figure.suptitle(f"{title} (means of {window} samples)", x=0.01, ha="left", fontsize=13, fontweight="bold")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _draw_band(
    axes: Any, values: Sequence[Sequence[float]], window: int, shift_at: int | None, *, label: str, color: str
) -> None:
    """Mean and standard error over runs of one length, as one line before the shift and one after it."""
    total = len(values[0])
    cuts = [0, total] if shift_at is None else [0, shift_at, total]
    for start, end in pairwise(cuts):
        curves = [smooth(run[start:end], window) for run in values]
        places = range(min(max(window // 5 - 1, 0), end - start - 1), end - start)
        seen = [start + k + 1 for k in places]
        columns = [[curve[k] for curve in curves] for k in places]
        mean = [statistics.fmean(column) for column in columns]
        axes.plot(seen, mean, color=color, label=label if start == 0 else None, linewidth=1.8)
        if len(curves) > 1:
            error = [statistics.stdev(column) / len(column) ** 0.5 for column in columns]
            low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
            axes.fill_between(seen, low, high, color=color, alpha=0.15, linewidth=0)
