"""Table and pictures of methods that learn image tasks in sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kalman_peft.metrics import continual_metrics
from kalman_peft.plots import plot_accuracy_matrix

from .online_report import interval, show_interval
from .plots import STYLE, look


# What the picture shows, and by which of its figures the best filter is chosen.
LINES = {
    "learnt": "as learnt", "averaged": "mean of three neighbours", "smoothed": "smoothed",
    "before": "unseen: adapter before", "both": "unseen: mean of both", "interpolated": "unseen: interpolated",
}  # fmt: skip
RANKED = ("average_accuracy", "smoothed")
CAPTION = "Accuracy, ± 95 % over runs (Student's t)."
COLUMNS = {
    "average_accuracy": "average accuracy", "learning_accuracy": "just after learning", "forgetting": "forgetting",
    "forward_transfer": "forward transfer", "smoothed": "own adapter, smoothed", "averaged": "own, averaged",
    "before": "half-way on: adapter before", "both": "mean of both", "interpolated": "interpolated", "seconds": "s",
}  # fmt: skip


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Means and intervals of one method's runs, for the columns of the table that it has.

    Args:
        runs (`Sequence[Mapping[str, Any]]`): One per seed.

    Returns:
        `dict[str, dict[str, float | None]]`: `mean` and `ci95` by column.
    """
    rows = [
        continual_metrics(np.array(one["scores"], dtype=float))
        | {name: sum(values) / len(values) for name, values in (one["own"] | one["between"]).items()}
        | {"seconds": one["seconds"]}
        for one in runs
    ]
    kept = [name for name in COLUMNS if name in rows[0] and not any(math.isnan(row[name]) for row in rows)]
    if "average_accuracy" in kept and not runs[0]["own"] and "forgetting" not in kept:
        kept.remove("learning_accuracy")  # of one model for all tasks there is none
    return {name: interval([row[name] for row in rows]) for name in kept}


def table_cells(results: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, blank where a method has no such number, without columns that none has.

    Args:
        results (`Mapping`): By method what [`summarise`] returns.

    Returns:
        `tuple[list[str], list[list[str]]]`: For `recipe_tools.tables`.
    """
    shown = [name for name in COLUMNS if any(name in result for result in results.values())]
    rows = [[method, *(_cell(name, result) for name in shown)] for method, result in results.items()]
    return ["method", *(COLUMNS[name] for name in shown)], rows


def _cell(name: str, result: Mapping[str, Mapping[str, float | None]]) -> str:
    if name not in result:
        return ""
    return f"{result[name]['mean']:.1f}" if name == "seconds" else show_interval(result[name], ".3f")


def plot_all(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    results: Mapping[str, Mapping[str, Mapping[str, float | None]]],
    folder: Path,
    tasks: int,
) -> None:
    """Traces of all filters; the accuracies of the best of them, or else of the best method.

    Args:
        runs (`Mapping[str, Sequence]`): By method, one per seed and order.
        results (`Mapping`): By method what [`summarise`] returns.
        folder (`Path`): Gets `traces.png`, `matrix.png` and `places.png`.
        tasks (`int`): Their number.
    """
    filters = {method: every for method, every in runs.items() if every[0]["figures"]}
    if filters:
        traces = {name: _mean([[f["covariance_trace"] for f in one["figures"]] for one in every])
                  for name, every in filters.items()}  # fmt: skip
        places = list(range(1, tasks + 1))
        plot_lines({name: (places, trace) for name, trace in traces.items()}, folder / "traces.png",
                   "tasks learnt", "trace of the covariance", "How sure the filter is", log=True)  # fmt: skip
    sequences = list(filters) or [m for m in runs if runs[m][0]["own"]]
    if not sequences:
        return
    best = max(sequences, key=lambda m: max(results[m].get(key, {}).get("mean") or 0.0 for key in RANKED))
    mean = _mean([one["scores"] for one in runs[best]])
    names = [str(t + 1) for t in range(tasks)]
    plot_accuracy_matrix(mean, names, folder / "matrix.png", label=f"accuracy, {best}")
    lines: dict[str, tuple[Any, Any]] = {"last adapter": (list(range(1, tasks + 1)), mean[-1])}
    for kind in ("own", "between"):
        for name in runs[best][0][kind]:
            found = _mean([one[kind][name] for one in runs[best]])
            lines[LINES[name]] = [t + (1.0 if kind == "own" else 1.5) for t in range(len(found))], found
    plot_lines(lines, folder / "places.png", "task", "accuracy", best)


def plot_lines(
    lines: Mapping[str, tuple[Any, Any]],
    path: Path,
    xlabel: str,
    ylabel: str,
    title: str,
    log: bool = False,
) -> None:
    """Draw lines over tasks.

    Args:
        lines (`Mapping[str, tuple]`): x and y by name, sequences or arrays.
        path (`Path`): The PNG to write.
        xlabel (`str`): Of the axis.
        ylabel (`str`): Of the axis.
        title (`str`): Heading.
        log (`bool`, *optional*, defaults to `False`): Of y.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.4), dpi=150, layout="constrained")
        axes = FigureCanvasAgg(figure).figure.subplots()
        for index, (name, (x, y)) in enumerate(lines.items()):
            colour, marker = look(index)
            axes.plot(x, y, label=name, markersize=4, color=colour, marker=marker)
        axes.set_yscale("log" if log else "linear")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.set_title(title)
        figure.legend(loc="outside right upper", fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _mean(runs: Sequence[Any]) -> np.ndarray:
    return np.array(runs, dtype=float).mean(0)
