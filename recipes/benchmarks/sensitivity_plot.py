"""Small panels, one per option: loss against the option's value."""

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


COLUMNS = {"log loss": 5, "held-out loss": 4}
LABELS = {"log loss": "prequential log loss (nats)", "held-out loss": "held-out loss (nats per token)"}


def plot_sensitivity(record: dict[str, Any], path: Path) -> None:
    """One panel per knob, values evenly spaced; the default is a dashed line.

    Args:
        record (`dict[str, Any]`): `knobs`: by name the `values`, `losses`, `default`, `unit`, `conditions` and
            `off_by_default`; optionally `start`, the loss before any step, which is a dotted line.
        path (`Path`): PNG file; its folder is created.
    """
    knobs = record["knobs"]
    (main, *others) = sorted({r["unit"] for r in knobs.values()}, key=lambda unit: unit not in LABELS)
    columns = COLUMNS.get(main, 5)
    rows = math.ceil(len(knobs) / columns)
    figure = Figure(figsize=(2.5 * columns, 1.9 * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    start = record.get("start", 0.0)
    limits = {unit: _limits([r for r in knobs.values() if r["unit"] == unit], start) for unit in (main, *others)}
    for place, (name, r) in enumerate(knobs.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        _panel(axes, name, r, limits[r["unit"]])
        if r["unit"] != main:
            axes.set_ylabel(r["unit"], fontsize=7)
        if "start" in record:
            axes.axhline(record["start"], color="0.7", linestyle=":", linewidth=1)
    said = "blue: around the default; red: off by default; dashed: the default; arrow: above the panel"
    figure.supylabel(str(LABELS.get(main, main)), fontsize=8)
    figure.supxlabel(said + ("; dotted: untrained" if "start" in record else ""), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _limits(rows: list[dict[str, Any]], start: float) -> tuple[float, float]:
    """Bounds that leave out what is far above the defaults and the start, so that the rest can be told apart."""
    values = [v for r in rows for v in (*r["losses"], r["default"]) if math.isfinite(v)]
    highest = max(r["default"] for r in rows if math.isfinite(r["default"]))
    low, high = min(values), max(min(max(values), 1.3 * highest), start)
    # Differences of a few per cent shall look as small as they are.
    margin = max(0.05 * (high - low), 0.1 * highest - (high - low) / 2)
    return low - margin, high + margin


def _panel(axes: Axes, name: str, r: dict[str, Any], limits: tuple[float, float]) -> None:
    colour = "C3" if r["off_by_default"] else "C0"
    places = range(len(r["values"]))
    above = [k for k in places if not r["losses"][k] <= limits[1]]
    shown = [loss if math.isfinite(loss) else 1e9 for loss in r["losses"]]
    axes.axhline(r["default"], color="0.5", linestyle="--", linewidth=1)
    axes.plot(places, shown, marker="o", markersize=3, color=colour)
    for k in above:  # and how far
        axes.plot(k, limits[1], marker="^", markersize=5, color=colour, clip_on=False)
        axes.annotate(
            f"{r['losses'][k]:.2f}", (k, limits[1]), (0, -11), textcoords="offset points", fontsize=6, ha="center"
        )
    axes.set_xticks(places, [_number(v) for v in r["values"]], fontsize=6.5)
    axes.margins(x=0.1)
    axes.set_ylim(*limits)
    axes.tick_params(axis="y", labelsize=6.5)
    axes.grid(axis="y", color="0.92")
    option, _, kind = name.partition(":")
    told = ", ".join(filter(None, (kind, r["conditions"])))
    axes.set_title(f"{option} ({told})" if told else option, fontsize=7.5)


def _number(value: float) -> str:
    """As short as it can be: 1e-05, 1000, 0.997."""
    text = f"{value:.4g}"
    text = text if len(text) <= 5 else f"{value:.0e}"
    return text.replace("e-0", "e-").replace("e+0", "e")
