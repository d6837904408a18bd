"""Tables and figures of methods that learn task after task, over seeds and orders.

Intervals are Student's t, 95 %; differences are taken pair by pair, on the same seed and order.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kalman_peft.metrics import backward_transfer, continual_metrics
from kalman_peft.plots import plot_accuracy_matrix

from .comparison.measures import hypervolume
from .online_report import interval, show_interval
from .plots import plot_plane


# Columns of the table: figure, heading, format.
COLUMNS = (
    ("average_loss", "last adapter on all tasks", ".3f"),
    ("minus_first", "minus {first}", "+.3f"),
    ("learning_loss", "own adapter on its task", ".3f"),
    ("forgetting", "forgetting", "+.3f"),
    ("hypervolume", "hypervolume", ".3f"),
    ("forward_transfer", "forward transfer", "+.3f"),
    ("text_rise", "rise of {text} loss", "+.3f"),
    ("text_kl", "KL from base", ".3f"),
    ("seconds", "seconds", ".0f"),
)
CAPTION = (
    "Held-out loss in nats per token, ± 95 % over runs (Student's t); differences are paired by seed and order. "
    "Hypervolume: (loss before any task - own adapter on its task) x (1 - later rise of it), both means over tasks. "
    "Seconds are of the runs that were not interrupted."
)

WORST_RISE = 1.0  # nats per token: forgetting at the reference point of the hypervolume
Run = Mapping[str, Any]


def run_figures(run: Run) -> dict[str, dict[str, float]]:
    """Figures of one run, for the method and for what is derived from it.

    Args:
        run (`Mapping[str, Any]`): As stored: `scores` (R, of losses, None where not measured), `own` (losses of every
            task with an adapter found afterwards, by name), `text` and `seconds` (None where not timed as a whole).

    Returns:
        `dict[str, dict[str, float]]`: "" for the method, and "smoothed" and so on; figures that make no sense for it
        are missing.
    """
    scores, found = as_matrix(run["scores"]), {}
    figures: dict[str, float] = {} if run["seconds"] is None else {"seconds": run["seconds"]}
    if run["kind"] == "joint":  # nothing is known after a single task
        figures["average_loss"] = float(np.mean(scores[-1]))
    elif run["kind"] == "separate":  # no adapter is for all tasks
        figures["learning_loss"] = continual_metrics(scores, False)["learning_loss"]
    else:
        figures |= continual_metrics(scores, False)
        point = figures["learning_loss"], -figures["backward_transfer"]
        figures["hypervolume"] = hypervolume([point], (float(np.mean(scores[0])), WORST_RISE))
    if run["text"]["after"] is not None:
        figures["text_rise"] = run["text"]["after"]["loss"] - run["text"]["before"]
        figures["text_kl"] = run["text"]["after"]["kl"]
    found[""] = {name: value for name, value in figures.items() if value == value}
    for name, losses in run["own"].items():
        found[name] = {"learning_loss": statistics.fmean(losses)}
    return found


def summarise_sequences(runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Means and intervals over the runs of every method.

    Args:
        runs (`Mapping[str, Sequence[Mapping]]`): By method one run per seed and order, in the same order for all.

    Returns:
        `dict`: By method (and "method, smoothed" and so on) and figure `mean` and `ci95`; "minus_first" is the average
        loss minus that of the first method.
    """
    result: dict[str, Any] = {}
    reference: list[float] | None = None
    for method, found in runs.items():
        figures = [run_figures(run) for run in found]
        for part in figures[0]:
            rows = [one[part] for one in figures]
            # All runs of a method have the same figures, but for the seconds of those that were killed and went on.
            names = dict.fromkeys(name for one in rows for name in one)
            row = {name: interval([one[name] for one in rows if name in one]) for name in names}
            if "average_loss" in row:
                losses = [one["average_loss"] for one in rows]
                if reference is not None:
                    row["minus_first"] = interval([a - b for a, b in zip(losses, reference, strict=True)])
                reference = reference or losses
            result[f"{method}, {part}" if part else method] = row
    return result


def table_cells(
    result: Mapping[str, Mapping[str, Mapping[str, float | None]]], text: str
) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, blank where a figure makes no sense.

    Args:
        result (`Mapping`): Of [`summarise_sequences`].
        text (`str`): Name of the general text.

    Returns:
        `tuple[list[str], list[list[str]]]`: For `recipe_tools.tables`.
    """
    first = next((name for name, row in result.items() if "average_loss" in row), "")
    headings = ["method", *(heading.format(first=first, text=text) for _, heading, _ in COLUMNS)]
    rows = [
        [method, *(show_interval(row[name], spec) if name in row else "" for name, _, spec in COLUMNS)]
        for method, row in result.items()
    ]
    return headings, rows


def as_matrix(scores: Sequence[Sequence[float | None]]) -> np.ndarray:
    """R from JSON, with NaN for what was not measured; shape (T + 1, T)."""
    return np.array(scores, dtype=np.float64)


def plot_sequences(
    runs: Mapping[str, Sequence[Run]], names: Sequence[str], folder: Path, labels: Mapping[str, str], title: str
) -> None:
    """Heat maps of the losses, one per method that learns in sequence, and the plane of learning and forgetting.

    Args:
        runs (`Mapping[str, Sequence[Mapping]]`): By method, all of one order of the tasks; means over them are drawn.
        names (`Sequence[str]`): Of the tasks in that order.
        folder (`Path`): Gets `learning_forgetting.png` and `matrix-METHOD.png`.
        labels (`Mapping[str, str]`): File names of the methods.
        title (`str`): Heading.
    """
    folder.mkdir(parents=True, exist_ok=True)
    points, start = {}, 0.0
    for method, found in runs.items():
        if found[0]["kind"] in ("joint", "separate"):
            continue
        matrix = np.mean([as_matrix(run["scores"]) for run in found], axis=0)
        plot_accuracy_matrix(
            matrix, names, folder / f"matrix-{labels[method]}.png", label="loss (nats/token)", higher_is_better=False
        )
        rise = -backward_transfer(matrix, False)
        points[method] = [(continual_metrics(matrix, False)["learning_loss"], rise)]
        start = float(np.mean(matrix[0]))
    if points:
        plot_plane(points, folder / "learning_forgetting.png", base=(start, 0.0), source="earlier tasks'", title=title)
