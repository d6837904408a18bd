"""Figures of a recipe: the plane of learning and forgetting, and loss curves over steps and seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


# Okabe and Ito's palette: told apart by colour-blind readers; markers repeat the distinction for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FEW = 5  # methods whose legend finds a place inside the axes
STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 6.5,
}


@dataclass(frozen=True)
class Curve:
    """Losses along one run.

    Attributes:
        steps (`Sequence[float]`): Optimizer steps, one per evaluation.
        seconds (`Sequence[float]`): Training seconds, one per evaluation.
        losses (`Sequence[float]`): Losses in nats per token.
    """

    steps: Sequence[float]
    seconds: Sequence[float]
    losses: Sequence[float]


def plot_plane(
    runs: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    *,
    base: tuple[float, float],
    title: str = "Learning and forgetting",
    source: str = "source",
) -> None:
    """Draw one curve per method from the base model at the origin: right is learning, up is forgetting.

    Args:
        runs (`Mapping[str, Sequence[tuple[float, float]]]`): By method, (target loss, source loss) along the run or
            over its strength, in nats per token; a single point will do.
        path (`Path`): The PNG to write.
        base (`tuple[float, float]`): Target loss and source loss of the base model.
        title (`str`, *optional*): Heading.
        source (`str`, *optional*): Name of the source in the axis label.
    """
    with mpl.rc_context(STYLE):
        beside = len(runs) > FEW
        figure = Figure(figsize=(12.4 if beside else 7.2, 4.6), dpi=200, layout="constrained")
        axes = FigureCanvasAgg(figure).figure.subplots()
        axes.axhline(0, color="#999999", linewidth=1, zorder=1)
        for index, (label, points) in enumerate(runs.items()):
            learning = [0.0, *(base[0] - target for target, _ in points)]
            forgetting = [0.0, *(kept - base[1] for _, kept in points)]
            colour, marker = look(index)
            axes.plot(learning, forgetting, color=colour, marker=marker, markevery=slice(1, None), label=label)
        axes.plot(0, 0, marker="*", markersize=15, color="black", linestyle="none", zorder=3, label="base model")
        axes.set_xlabel("learning: fall of target loss (nats/token) →")
        axes.set_ylabel(f"forgetting: rise of {source} loss\n(nats/token) →")
        axes.set_title(title)
        axes.margins(x=0.08, y=0.18)
        if beside:
            figure.legend(loc="outside right upper")
        else:
            axes.legend(loc="best")
        _save(figure, path)


def plot_curves(
    runs: Mapping[str, Curve], path: Path, *, ylabel: str = "held-out loss (nats/token)", title: str = "Training"
) -> None:
    """Draw losses over steps and over seconds, side by side.

    Args:
        runs (`Mapping[str, Curve]`): One curve per optimizer or method.
        path (`Path`): The PNG to write.
        ylabel (`str`, *optional*): What the losses are.
        title (`str`, *optional*): Heading.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.9), dpi=200, layout="constrained")
        by_step, by_second = FigureCanvasAgg(figure).figure.subplots(1, 2, sharey=True)
        _draw_curves(by_step, {label: (run.steps, run.losses) for label, run in runs.items()}, "optimizer steps")
        _draw_curves(by_second, {label: (run.seconds, run.losses) for label, run in runs.items()}, "training seconds")
        by_step.set_ylabel(ylabel)
        by_step.set_title(title)
        by_second.legend(loc="upper right")
        _save(figure, path)


def _draw_curves(axes: Axes, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], xlabel: str) -> None:
    for index, (label, (x, y)) in enumerate(curves.items()):
        colour, marker = look(index)
        axes.plot(x, y, color=colour, marker=marker, label=label)
    axes.set_xlabel(xlabel)


def look(index: int) -> tuple[str, str]:
    """Colour and marker; past the last colour the markers move on by one, so that no pair comes twice early."""
    return COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
