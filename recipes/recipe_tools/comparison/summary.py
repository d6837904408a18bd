"""Figures of a scenario over seeds: every setting, each family's front, and its tuned setting against the reference.

- Forgetting is the rise of the source loss over that of the base model, in nats per token, mean over the scenario's
  sources. Learning is the fall of the target loss.
- A family's tuned setting is the one with the least target loss + forgetting, mean over `tune_seeds`: a nat per token
  counts as much on either side. Without `tune_seeds` it is the best one in hindsight, on the seeds of the report.
- With `points`, the seeds of the report run only so many settings of a family: the tuned one, and step by step the one
  that adds most to the hypervolume of means over `tune_seeds`.
- The hypervolume is the area, in the plane of target loss and forgetting, between a family's front of one seed and the
  reference point (target loss of the base model, `worst_rise`).
- Forgetting at matched learning: where a family's front reaches a share of the reference family's best learning, seed
  by seed, on straight lines from the base model through the front; its ratio is to that of the reference family.
- Intervals: 95 %, percentile bootstrap over seeds. Differences to the reference are paired by seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from .measures import Interval, Point, front, hypervolume, interval, ratio_interval, second_at
from .scenario import Scenario


Record = Mapping[str, Any]
Figures = dict[str, float]
Lookup = Callable[[str, int], Record | None]  # by setting and seed
MIB = 2**20


def figures_of(record: Record, plane: Sequence[str]) -> Figures:
    """Figures of one run.

    Args:
        record (`Mapping[str, Any]`): As stored.
        plane (`Sequence[str]`): Sources on the axis of forgetting.

    Returns:
        `dict[str, float]`: `target_loss`, `target_kl`, `forgetting`, `kl` (mean over the same sources), by source
        `rise/NAME` and `kl/NAME`, by task `accuracy/NAME` (its change), `lost/NAME` and `won/NAME` (items), `accuracy`
        where answers were generated, `rank` of LoRA adapters (directions that B A uses, mean over the layers),
        `seconds`, `setup_seconds`, `peak_mib` and `extra_mib`.
    """
    own = record["kalman_peft"]
    before, after, change = own["before"], own["after"], own["change"]
    found: Figures = {"target_loss": after["target"]["loss"], "target_kl": after["target"]["kl"]}
    if "accuracy" in after["target"]:
        found["accuracy"] = after["target"]["accuracy"]
    for name, source in after["sources"].items():
        found[f"rise/{name}"] = source["loss"] - before["sources"][name]["loss"]
        found[f"kl/{name}"] = source["kl"]
    for name in after["choices"]:
        found[f"accuracy/{name}"] = change["choices"][name]["accuracy"]
        found |= {f"{key}/{name}": float(n) for key, n in change["choices"][name]["flips"].items()}
    found["forgetting"] = fmean(found[f"rise/{name}"] for name in plane)
    found["kl"] = fmean(found[f"kl/{name}"] for name in plane)
    if "rank/effective" in own.get("figures", {}):
        found["rank"] = own["figures"]["rank/effective"]
    found |= {"seconds": own["seconds"], "setup_seconds": own["setup_seconds"]}
    found |= {"peak_mib": own["peak_bytes"] / MIB, "extra_mib": own["extra_bytes"] / MIB}
    return found


def summarise(scenario: Scenario, lookup: Lookup) -> dict[str, Any]:
    """All figures of a scenario.

    Args:
        scenario (`Scenario`): See there.
        lookup (`Callable`): From setting and seed to the record, or `None` where it is not there. A setting counts
            only with all its seeds.

    Returns:
        `dict[str, Any]`: `base` (losses of the base model), `missing` (settings with their seeds), `settings` (by
        setting, figures over `seeds`), `families` (by family: `settings`, `front`, `tuned`, and figures) and
        `in_hindsight`.
    """
    families = {name: list(settings) for name, settings in scenario.families().items()}
    names = dict.fromkeys(setting for settings in families.values() for setting in settings)
    records = {name: {seed: lookup(name, seed) for seed in (*scenario.tune_seeds, *scenario.seeds)} for name in names}
    if scenario.points is not None:
        families = {
            name: report_settings(scenario, settings, lambda setting, seed: records[setting][seed]) or []
            for name, settings in families.items()
        }
    reported = dict.fromkeys(setting for settings in families.values() for setting in settings)
    missing = {
        name: [
            seed
            for seed, record in found.items()
            if record is None and (name in reported or seed in scenario.tune_seeds)
        ]
        for name, found in records.items()
    }
    runs = {
        name: {seed: figures_of(record, scenario.plane) for seed, record in found.items() if record is not None}
        for name, found in records.items()
    }
    whole = [name for name in reported if not set(scenario.seeds) & set(missing[name])]
    known = next((record for found in records.values() for record in found.values() if record is not None), None)
    base = None if known is None else known["kalman_peft"]["before"]
    result: dict[str, Any] = {
        "base": base and {
            "target_loss": base["target"]["loss"],
            "sources": {name: source["loss"] for name, source in base["sources"].items()},
            "choices": {name: {k: task[k] for k in ("accuracy", "items")} for name, task in base["choices"].items()},
        },
        "missing": {name: seeds for name, seeds in missing.items() if seeds},
        "in_hindsight": not scenario.tune_seeds,
        "settings": {name: _over_seeds([runs[name][seed] for seed in scenario.seeds]) for name in whole},
        "families": {},
    }  # fmt: skip
    if base is None:
        return result
    by_family = {
        name: _Family(scenario, settings, runs, whole, base["target"]["loss"]) for name, settings in families.items()
    }
    reference = by_family[scenario.reference]
    for name, family in by_family.items():
        if family.settings:
            result["families"][name] = family.figures(reference)
    return result


def report_settings(scenario: Scenario, settings: Sequence[str], lookup: Lookup) -> list[str] | None:
    """Settings of a family that run on the seeds of the report.

    Args:
        scenario (`Scenario`): See there.
        settings (`Sequence[str]`): All of the family.
        lookup (`Callable`): From setting and seed to the record, or `None` where it is not there.

    Returns:
        `list[str]` or `None`: In the order of `settings`; `None` where runs of tuning are still missing.
    """
    if scenario.points is None:
        return list(settings)
    records = {setting: {seed: lookup(setting, seed) for seed in scenario.tune_seeds} for setting in settings}
    runs: dict[str, dict[int, Figures]] = {}
    start = 0.0
    for setting, found in records.items():
        for seed, record in found.items():
            if record is None:
                return None
            runs.setdefault(setting, {})[seed] = figures_of(record, scenario.plane)
            start = record["kalman_peft"]["before"]["target"]["loss"]
    found = mean_points(runs, scenario.tune_seeds)
    return _together(found, scenario.points, (start, scenario.worst_rise))


def mean_points(runs: Mapping[str, Mapping[int, Figures]], seeds: Sequence[int]) -> dict[str, Point]:
    """Mean target loss and forgetting by setting, of those that ran on all seeds and did not diverge.

    Args:
        runs (`Mapping`): Figures by setting and seed.
        seeds (`Sequence[int]`): To take the mean over.

    Returns:
        `dict[str, tuple[float, float]]`: By setting.
    """
    found: dict[str, Point] = {}
    for setting, by_seed in runs.items():
        if set(seeds) <= by_seed.keys():
            point = (fmean(by_seed[s]["target_loss"] for s in seeds), fmean(by_seed[s]["forgetting"] for s in seeds))
            if all(map(math.isfinite, point)):
                found[setting] = point
    return found


def _least(points: Mapping[str, Point]) -> str | None:
    """The setting of least target loss + forgetting."""
    return min(points, key=lambda setting: sum(points[setting])) if points else None


def _together(points: Mapping[str, Point], count: int, corner: Point) -> list[str]:
    """The best setting, then step by step that which adds most to the hypervolume, or else is the next best."""
    chosen = [setting for setting in [_least(points)] if setting is not None]
    while len(chosen) < min(count, len(points)):
        front_so_far = [points[setting] for setting in chosen]
        rest = [setting for setting in points if setting not in chosen]
        chosen.append(max(rest, key=lambda s: (hypervolume([*front_so_far, points[s]], corner), -sum(points[s]))))
    return [setting for setting in points if setting in chosen]


def _over_seeds(runs: Sequence[Figures]) -> dict[str, Interval]:
    common = [key for key in runs[0] if all(key in run for run in runs)]  # records of earlier versions know fewer
    return {key: interval([run[key] for run in runs]) for key in common}


class _Family:
    """A curve in the plane: the settings of one entry of `methods`."""

    def __init__(
        self, scenario: Scenario, settings: list[str], runs: Mapping[str, Mapping[int, Figures]], whole: list[str],
        start: float,
    ):  # fmt: skip
        self.scenario, self.runs, self.start = scenario, runs, start
        self.settings = [setting for setting in settings if setting in whole]
        self.tuned = self._tuned()

    def _tuned(self) -> str | None:
        """The setting of least target loss + forgetting over the seeds of tuning; nothing that diverged."""
        seeds = self.scenario.tune_seeds or self.scenario.seeds
        return _least(mean_points({setting: self.runs[setting] for setting in self.settings}, seeds))

    def points(self, seed: int) -> list[Point]:
        """Target loss and forgetting by setting."""
        return [(self.runs[s][seed]["target_loss"], self.runs[s][seed]["forgetting"]) for s in self.settings]

    def values(self, key: str) -> list[float]:
        """A figure of the tuned setting, by seed."""
        return [self.runs[str(self.tuned)][seed][key] for seed in self.scenario.seeds]

    def volumes(self) -> list[float]:
        """Hypervolume of the front, by seed."""
        corner = self.start, self.scenario.worst_rise
        return [hypervolume(self.points(seed), corner) for seed in self.scenario.seeds]

    def best(self, seed: int) -> float:
        """The least target loss."""
        losses = [loss for loss, _ in self.points(seed) if math.isfinite(loss)]
        return min([*losses, self.start])

    def at(self, share: float, reference: _Family) -> list[float | None]:
        """Forgetting where the front reaches a share of the reference's best learning, by seed."""
        found = []
        for seed in self.scenario.seeds:
            level = self.start - share * (self.start - reference.best(seed))
            found.append(second_at(self.points(seed), (self.start, 0.0), level))
        return found

    def figures(self, reference: _Family) -> dict[str, Any]:
        """What the summary holds of a family."""
        means = [
            tuple(
                fmean(self.runs[s][seed][key] for seed in self.scenario.seeds) for key in ("target_loss", "forgetting")
            )
            for s in self.settings
        ]
        volumes = self.volumes()
        found: dict[str, Any] = {
            "settings": self.settings,
            "front": [self.settings[place] for place in front(means)],  # type: ignore[arg-type]
            "hypervolume": interval(volumes),
            "matched": {f"{share:g}": self._matched(share, reference) for share in self.scenario.matched},
            "tuned": self.tuned,
        }
        if reference is not self and reference.settings:
            minus = [a - b for a, b in zip(volumes, reference.volumes(), strict=True)]
            found["hypervolume_minus_reference"] = interval(minus)
            if self.tuned and reference.tuned:
                for key in ("target_loss", "forgetting", "kl"):
                    pairs = zip(self.values(key), reference.values(key), strict=True)
                    found[f"{key}_minus_reference"] = interval([a - b for a, b in pairs])
        return found

    def _matched(self, share: float, reference: _Family) -> dict[str, Any]:
        """Forgetting at a share of the reference's learning, on the seeds where the front goes so far."""
        if not reference.settings:
            return {"seeds": 0, "forgetting": interval([]), "ratio": interval([])}
        pairs = list(zip(self.at(share, reference), reference.at(share, reference), strict=True))
        reached = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
        mine, theirs = [pair[0] for pair in reached], [pair[1] for pair in reached]
        # Some seeds alone would be another comparison than all of them.
        whole = len(reached) == len(pairs)
        return {
            "seeds": len(reached),
            "forgetting": interval(mine if whole else []),
            "ratio": ratio_interval(mine, theirs) if whole else interval([]),
        }
