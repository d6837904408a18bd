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
MANY = 16  # methods beside the axes at the full size of letters
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


@dataclass(frozen=True)
class PlanePoint:
    """How a point of the plane is drawn.

    Attributes:
        joined (`bool`): On the curve; others are drawn faintly, and the axes need not reach them.
        chosen (`bool`): Marked.
        target (`tuple[float, float]`, *optional*): Bounds of the target loss, as a bar.
        source (`tuple[float, float]`, *optional*): Bounds of the source loss.
    """

    joined: bool = True
    chosen: bool = False
    target: tuple[float, float] | None = None
    source: tuple[float, float] | None = None


def plot_plane(
    runs: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    *,
    base: tuple[float, float],
    title: str = "Learning and forgetting",
    source: str = "source",
    details: Mapping[str, Sequence[PlanePoint]] | None = None,
    worst: float | None = None,
) -> None:
    """Draw one curve per method from the base model at the origin: right is learning, up is forgetting.

    Args:
        runs (`Mapping[str, Sequence[tuple[float, float]]]`): By method, (target loss, source loss) along the run or
            over its strength, in nats per token; a single point will do.
        path (`Path`): The PNG to write.
        base (`tuple[float, float]`): Target loss and source loss of the base model.
        title (`str`, *optional*): Heading.
        source (`str`, *optional*): Name of the source in the axis label.
        details (`Mapping[str, Sequence[PlanePoint]]`, *optional*): One per point; by default all are joined.
        worst (`float`, *optional*): The axis of forgetting ends here, if points lie beyond.
    """
    details = details or {label: [PlanePoint()] * len(points) for label, points in runs.items()}
    with mpl.rc_context(STYLE):
        beside = len(runs) > FEW
        figure = Figure(figsize=(12.4 if beside else 7.2, 4.6), dpi=200, layout="constrained")
        axes = FigureCanvasAgg(figure).figure.subplots()
        axes.axhline(0, color="#999999", linewidth=1, zorder=1)
        for index, (label, points) in enumerate(runs.items()):
            drawn = [how.joined for how in details[label]]
            learning = [0.0, *(base[0] - target for (target, _), on in zip(points, drawn, strict=True) if on)]
            forgetting = [0.0, *(kept - base[1] for (_, kept), on in zip(points, drawn, strict=True) if on)]
            colour, marker = look(index)
            axes.plot(learning, forgetting, color=colour, marker=marker, markevery=slice(1, None), label=label)
        limits = axes.get_xlim(), axes.get_ylim()
        for index, (label, points) in enumerate(runs.items()):
            for point, how in zip(points, details[label], strict=True):
                _draw_detail(axes, point, how, base, index)
        if any(how != PlanePoint() for found in details.values() for how in found):
            axes.set(xlim=_wider(*limits[0], 0.05), ylim=_wider(*limits[1], 0.1))
        else:
            axes.margins(x=0.08, y=0.18)
        if worst is not None and axes.get_ylim()[1] > worst:
            lowest = min([0.0, *(kept - base[1] for points in runs.values() for _, kept in points)])
            axes.set_ylim(lowest - 0.1 * worst, worst)
        axes.plot(0, 0, marker="*", markersize=15, color="black", linestyle="none", zorder=3, label="base model")
        axes.set_xlabel("learning: fall of target loss (nats/token) →")
        axes.set_ylabel(f"forgetting: rise of {source} loss\n(nats/token) →")
        axes.set_title(title)
        if beside:
            # Of the figure's height, a name takes less where there are many.
            size = STYLE["font.size"] * min(1.0, MANY / (len(runs) + 1))
            figure.legend(loc="outside right upper", fontsize=size)
        else:
            axes.legend(loc="best")
        _save(figure, path)


def _draw_detail(
    axes: Axes, point: tuple[float, float], how: PlanePoint, base: tuple[float, float], index: int
) -> None:
    """What there is to a point beyond its place on the curve."""
    colour, marker = look(index)
    x, y = base[0] - point[0], point[1] - base[1]
    if not how.joined:
        axes.plot(x, y, color=colour, marker=marker, linestyle="none", alpha=0.3)
    if how.chosen:
        axes.plot(x, y, color=colour, marker=marker, markersize=11, markeredgecolor="black", zorder=4)
    faint = {"color": colour, "linewidth": 1.1, "alpha": 0.6 if how.joined else 0.2}
    if how.target:
        axes.plot([base[0] - bound for bound in how.target], [y, y], **faint)
    if how.source:
        axes.plot([x, x], [bound - base[1] for bound in how.source], **faint)


def _wider(low: float, high: float, share: float) -> tuple[float, float]:
    """An axis with so much more at either end."""
    return low - share * (high - low), high + share * (high - low)


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
