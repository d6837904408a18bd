"""Tables and the figure of a scenario, from what `summary` returns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ..plots import PlanePoint, plot_plane
from ..report import write_json
from ..tables import console_table, markdown
from .measures import show
from .scenario import Scenario


Table = tuple[str, list[str], list[list[str]]]  # title, headings, rows


def tuned_table(scenario: Scenario, result: Mapping[str, Any]) -> Table:
    """Each family at its tuned setting, and its whole front.

    Args:
        scenario (`Scenario`): See there.
        result (`Mapping[str, Any]`): Of `summarise`.

    Returns:
        `tuple[str, list[str], list[list[str]]]`: Title, headings and rows.
    """
    reference = scenario.reference
    rows = []
    for name, family in result["families"].items():
        point = result["settings"].get(family["tuned"], {})
        cells = [_cell(point, key, spec) for key, spec in (("target_loss", ".3f"), ("forgetting", "+.3f"))]
        cells += [_cell(family, f"{key}_minus_reference", "+.3f") for key in ("target_loss", "forgetting")]
        cells += [_cell(point, key, ".3f") for key in ("kl", "target_kl")]
        cells += [_cell(family, "hypervolume", ".3f"), _cell(family, "hypervolume_minus_reference", "+.3f")]
        cells += [_matched(matched) for matched in family["matched"].values()]
        rows.append([name, family["tuned"] or "none", *cells])
    how = "in hindsight, on these seeds" if result["in_hindsight"] else f"on seeds {scenario.tune_seeds}"
    headings = [
        "method", f"setting chosen {how}", "target loss", "forgetting", f"target loss minus {reference}",
        f"forgetting minus {reference}", "KL, source", "KL, target", "hypervolume", f"hypervolume minus {reference}",
        *(f"forgetting / {reference}'s at {float(share):.0%} of its learning" for share in scenario.matched),
    ]  # fmt: skip
    return "Tuned settings and fronts", headings, rows


def kept_table(scenario: Scenario, result: Mapping[str, Any]) -> Table:
    """What happened to every source and task at the tuned settings; see [`tuned_table`]."""
    names = result["base"]["sources"]
    headings = ["method", *(f"{name}: rise (from {loss:.3f})" for name, loss in names.items())]
    headings += [f"{name}: KL" for name in names]
    for name, task in result["base"]["choices"].items():
        headings += [f"{name}: accuracy (from {task['accuracy']:.3f})", f"{name}: lost / won of {task['items']}"]
    rows = []
    for name, family in result["families"].items():
        point = result["settings"].get(family["tuned"], {})
        cells = [_cell(point, f"rise/{source}", "+.3f") for source in names]
        cells += [_cell(point, f"kl/{source}", ".3f") for source in names]
        for task in result["base"]["choices"]:
            flips = " / ".join(_cell(point, f"{key}/{task}", ".1f") for key in ("lost", "won"))
            cells += [_cell(point, f"accuracy/{task}", "+.3f"), flips]
        rows.append([name, *cells])
    return "What was to be kept, at the tuned settings", headings, rows


def settings_table(scenario: Scenario, result: Mapping[str, Any]) -> Table:
    """Every setting with its costs; see [`tuned_table`]."""
    columns = {
        "target_loss": ("target loss", ".3f"), "accuracy": ("accuracy", ".3f"), "forgetting": ("forgetting", "+.3f"),
        "kl": ("KL, source", ".3f"), "target_kl": ("KL, target", ".3f"), "rank": ("rank used", ".2f"),
        "seconds": ("seconds", ".1f"), "setup_seconds": ("set-up, s", ".1f"), "peak_mib": ("peak, MiB", ".0f"),
        "extra_mib": ("kept, MiB", ".2f"),
    }  # fmt: skip
    found = result["settings"]
    shown = {key: how for key, how in columns.items() if any(key in row for row in found.values())}
    rows = [[name, *(_cell(row, key, spec) for key, (_, spec) in shown.items())] for name, row in found.items()]
    return "All settings", ["setting", *(heading for heading, _ in shown.values())], rows


def caption(scenario: Scenario, result: Mapping[str, Any]) -> str:
    """How the figures are to be read, in a few sentences."""
    seeds, base = scenario.seeds, result["base"]
    return (
        f"Held-out loss and KL(base || tuned) in nats per token; base model {base['target_loss']:.3f} on the target. "
        f"Mean over {len(seeds)} seed{'s' if len(seeds) > 1 else ''} with 95 % bootstrap interval over seeds. "
        f"Forgetting: rise of the loss, mean over {', '.join(scenario.plane)}. Chosen is the least target loss + "
        "forgetting. Hypervolume: area between a front and the point (base model's target loss, a rise of "
        f"{scenario.worst_rise:g}), seed by seed, from as many settings as are listed for the method. Ratios: where "
        f"the fronts, drawn in straight lines from the base model, reach that share of {scenario.reference}'s best "
        "learning; – where they do not on every seed, or the reference forgets nothing there."
    )


def write_report(scenario: Scenario, result: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Print the tables, and write report.md, summary.json and learning_forgetting.png.

    Args:
        scenario (`Scenario`): See there.
        result (`Mapping[str, Any]`): Of `summarise`.
        folder (`Path`): Of the scenario.
        console (`Console`): To print to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(dict(result), folder / "summary.json")
    text = f"## {scenario.name}\n\n"
    if result["families"]:
        note = caption(scenario, result)
        for make in (tuned_table, kept_table, settings_table):
            title, headings, rows = make(scenario, result)
            console.print(console_table(headings, rows, f"{scenario.name}: {title.lower()}", ""))
            text += f"### {title}\n\n{markdown(headings, rows)}\n"
        console.print(note)
        text += f"{note}\n"
        plot(scenario, result, folder / "learning_forgetting.png")
    if result["missing"]:
        lines = "\n".join(f"- {name}: seeds {', '.join(map(str, s))}" for name, s in result["missing"].items())
        text += f"\nNot there yet, and left out above:\n{lines}\n"
        console.print(f"{scenario.name}: {len(result['missing'])} settings lack runs and are left out.")
    (folder / "report.md").write_text(text, encoding="utf-8")


def plot(scenario: Scenario, result: Mapping[str, Any], path: Path) -> None:
    """The plane of learning and forgetting: each family's front, its other settings faintly, intervals over seeds.

    Args:
        scenario (`Scenario`): See there.
        result (`Mapping[str, Any]`): Of `summarise`.
        path (`Path`): The PNG to write.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    details: dict[str, list[PlanePoint]] = {}
    for name, family in result["families"].items():
        order = [*reversed(family["front"])]  # from the base model on
        order += [setting for setting in family["settings"] if setting not in order]
        points = [result["settings"][setting] for setting in order]
        finite = [
            i
            for i, p in enumerate(points)
            if p["target_loss"]["mean"] is not None and p["forgetting"]["mean"] is not None
        ]
        curves[name] = [(points[i]["target_loss"]["mean"], points[i]["forgetting"]["mean"]) for i in finite]
        details[name] = [
            PlanePoint(
                joined=order[i] in family["front"], chosen=order[i] == family["tuned"],
                target=_bounds(points[i]["target_loss"]), source=_bounds(points[i]["forgetting"]),
            )
            for i in finite
        ]  # fmt: skip
    plot_plane(
        curves, path, base=(result["base"]["target_loss"], 0.0), details=details,
        source=scenario.plane[0] if len(scenario.plane) == 1 else "mean source",
        title=f"{scenario.name}: {scenario.steps} steps, {len(scenario.seeds)} seeds",
        worst=1.25 * scenario.worst_rise,
    )  # fmt: skip


def _bounds(cell: Mapping[str, float | None]) -> tuple[float, float] | None:
    low, high = cell["low"], cell["high"]
    return None if low is None or high is None else (low, high)


def _cell(row: Mapping[str, Any], key: str, spec: str) -> str:
    return show(row[key], spec) if key in row else ""


def _matched(cell: Mapping[str, Any]) -> str:
    return show(cell["ratio"], ".2f")
