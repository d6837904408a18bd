"""Scenarios of the comparison, from YAML: what is learnt, what is to be kept, by which methods and settings."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import yaml

from ..spelling import spelt


SELF = "self"
# What a run does not depend on: it can be changed without running anything again.
FREE = (
    "name", "methods", "seeds", "tune_seeds", "trials", "points", "forgetting", "reference", "worst_rise", "matched",
)  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """One scenario; every field but `name` is a key of the YAML file.

    Attributes:
        name (`str`): The key above.
        target (`str`): What is learnt: DATA of `recipe_tools.domains`; generated problems can be mixed with "+".
        methods (`list`): Entries KIND, KIND:OPTION=VALUE,... or `{KIND: {OPTION: VALUE or [VALUES]}}`. Each entry is a
            family: a curve in the figure and a row of the tables. A list of values is tried in full, several lists in
            all combinations. An option `label` names the family; by default it is the kind with those options that
            have one value.
        model (`str`): As `--model` elsewhere.
        source (`list[str]`): What methods may see of what is to be kept, for curvature and replay: texts as in
            `recipe_tools.sources`, or "self" (the model writes it). Several in equal parts.
        sources (`list[str]`): On which forgetting is measured, on rows that nothing has seen.
        choices (`dict[str, int]`): Multiple-choice tasks with their number of items.
        forgetting (`list[str]`): Those of `sources` whose mean loss is the axis of forgetting; all by default.
        seeds (`list[int]`): Of the report.
        tune_seeds (`list[int]`): On which each family's setting is chosen; none of `seeds`.
        trials (`int`, *optional*): Settings per family; of families with more, this many are drawn. With `tune_seeds`
            all families must have equally many settings.
        points (`int`, *optional*): Settings per family that run on `seeds`: the chosen one, and those that add most to
            its hypervolume on `tune_seeds`; by default all.
        steps (`int`): Optimizer steps.
        batch_size (`int`): Sequences per step.
        rows (`int`, *optional*): Training rows; by default as many as the steps take, once.
        learning_rate (`float`): Of methods that name none (`lr`); linear to 0.
        r (`int`): Rank of the adapter, on all linear layers.
        lora_alpha (`int`): Scale of the adapter times r.
        max_length (`int`): Tokens per target sequence; longer ones are cut.
        source_length (`int`): Tokens per source sequence.
        source_rows (`int`): Rows of the source that methods may see; how many are for curvature, their own option
            `samples` says.
        validation_rows (`int`): Rows of the target for early stopping, which nothing is trained on.
        eval_items (`int`): Held-out rows of the target.
        source_items (`int`): Held-out rows per source.
        generate_items (`int`): Held-out problems answered by generation; 0 for none.
        dtype (`str`): Of the base model.
        reference (`str`): Family that the others are compared with.
        worst_rise (`float`): Forgetting at the reference point of the hypervolume, nats per token.
        matched (`list[float]`): Shares of the reference's best learning at which forgetting is compared.
    """

    name: str
    target: str
    methods: list
    model: str = "smollm2"
    source: list[str] = field(default_factory=lambda: ["wikipedia"])
    sources: list[str] = field(default_factory=lambda: ["wikipedia", "books", "math", "gsm8k"])
    choices: dict[str, int] = field(default_factory=dict)
    forgetting: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    tune_seeds: list[int] = field(default_factory=list)
    trials: int | None = None
    points: int | None = None
    steps: int = 50
    batch_size: int = 8
    rows: int | None = None
    learning_rate: float = 2e-3
    r: int = 8
    lora_alpha: int = 16
    max_length: int = 128
    source_length: int = 128
    source_rows: int = 128
    validation_rows: int = 16
    eval_items: int = 48
    source_items: int = 16
    generate_items: int = 0
    dtype: str = "bfloat16"
    reference: str = "lora"
    worst_rise: float = 0.5
    matched: list[float] = field(default_factory=lambda: [0.5, 0.75, 0.9])

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "r", "lora_alpha", "source_rows", "eval_items", "source_items")
        low = [key for key in counts if getattr(self, key) < 1]
        short = [key for key in ("max_length", "source_length") if getattr(self, key) < 2]
        strange = sorted(set(self.forgetting) - set(self.sources))
        refusals = {
            f"{', '.join(low)} must be at least 1": bool(low),
            f"{', '.join(short)} must be at least 2": bool(short),
            "rows must be at least 1": self.rows is not None and self.rows < 1,
            "trials must be at least 1": self.trials is not None and self.trials < 1,
            "points must be at least 1": self.points is not None and self.points < 1,
            "points chooses settings on tune_seeds, of which there are none": self.points is not None
            and not self.tune_seeds,
            "validation_rows and generate_items must not be negative": min(self.validation_rows, self.generate_items)
            < 0,
            "methods, seeds, source and sources need at least one entry": not (
                self.methods and self.seeds and self.source and self.sources
            ),
            "seeds, tune_seeds, source and sources must not name anything twice": any(
                len(set(given)) < len(given) for given in (self.seeds, self.tune_seeds, self.source, self.sources)
            ),
            "two sources have one short name": len(set(map(short_source, self.sources))) < len(self.sources),
            f"tune_seeds and seeds share {sorted(set(self.seeds) & set(self.tune_seeds))}": bool(
                set(self.seeds) & set(self.tune_seeds)
            ),
            f"forgetting names {strange}, which are not among the sources": bool(strange),
            f"dtype {self.dtype!r} is neither bfloat16 nor float32": self.dtype
            not in ("bfloat16", "float32"),
            "learning_rate and worst_rise must be above 0": min(self.learning_rate, self.worst_rise) <= 0,
            "matched must be shares in (0, 1]": not all(0 < share <= 1 for share in self.matched),
            f"choices need at least 1 item: {self.choices}": any(items < 1 for items in self.choices.values()),
        }  # fmt: skip
        for message, refused in refusals.items():
            if refused:
                raise ValueError(f"{self.name}: {message}.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the base model."""
        return getattr(torch, self.dtype)

    @property
    def plane(self) -> list[str]:
        """Sources on the axis of forgetting, by their short names."""
        return [short_source(name) for name in self.forgetting or self.sources]

    def families(self) -> dict[str, dict[str, str]]:
        """Settings of every family, in one spelling each.

        Returns:
            `dict[str, dict[str, str]]`: By family, and by setting the method that makes it: one training may make
            several ("wise:alpha=0.25/0.5"). A setting counts as a trial.

        Raises:
            ValueError: An entry or a method cannot be read, two families have one name, the reference is none of them,
                or their settings are not equally many where they must be.
        """
        from recipe_tools.methods import canonical, points  # late: here only

        found: dict[str, dict[str, str]] = {}
        for entry in self.methods:
            name, settings = expand(entry, self.name)
            if name in found:
                raise ValueError(f"{self.name}: two entries of methods are named {name!r}; put them into one.")
            try:
                found[name] = {point: canonical(method) for method in settings for point in points(method)}
            except ValueError as error:
                raise ValueError(f"{self.name}: methods: {error}") from error
        if self.reference not in found:
            raise ValueError(f"{self.name}: reference {self.reference!r} is none of the methods {list(found)}.")
        counts = {name: len(settings) for name, settings in found.items()}
        if self.trials is not None:
            few = {name: count for name, count in counts.items() if count < self.trials}
            if few:
                raise ValueError(f"{self.name}: fewer settings than trials={self.trials}: {few}; add some.")
            found = {name: _draw(name, settings, self.trials) for name, settings in found.items()}
        elif self.tune_seeds and len(set(counts.values())) > 1:
            raise ValueError(
                f"{self.name}: with tune_seeds every method gets as many settings; these have {counts}. Add some, or "
                "set trials to draw as many from each."
            )
        return found


def short_source(name: str) -> str:
    """A source's name in records and tables: of a file without its folder and its ending."""
    return Path(name).name.split(".")[0] if name.endswith((".txt", ".jsonl", ".jsonl.gz")) else name


def _draw(name: str, settings: dict[str, str], trials: int) -> dict[str, str]:
    """So many of the settings, in their order; which ones depends on the family's name and their number alone."""
    chosen = set(random.Random(name).sample(range(len(settings)), trials))
    return {setting: method for place, (setting, method) in enumerate(settings.items()) if place in chosen}


def expand(entry: Any, where: str) -> tuple[str, list[str]]:
    """Read an entry of `methods`.

    Args:
        entry (`str` or `dict`): See [`Scenario`].
        where (`str`): For messages.

    Returns:
        `tuple[str, list[str]]`: The family's name, and all its settings.

    Raises:
        ValueError: The entry is something else.
    """
    if isinstance(entry, str):
        return entry, [entry]
    kind, options = next(iter(entry.items())) if isinstance(entry, Mapping) and len(entry) == 1 else (None, None)
    if not isinstance(kind, str) or not isinstance(options, Mapping) or not options:
        raise ValueError(f"{where}: methods: {entry!r} is neither a name nor {{KIND: {{OPTION: VALUE or [VALUES]}}}}.")
    options = dict(options)
    label = options.pop("label", None)
    if not isinstance(label, str | None):
        raise ValueError(f"{where}: methods: {kind}: label must be text, got {label!r}.")
    lists = {key: value if isinstance(value, list) else [value] for key, value in options.items()}
    empty = [key for key, values in lists.items() if not values]
    if empty:
        raise ValueError(f"{where}: methods: {kind}: {', '.join(empty)} has no values.")
    # "0.25/0.5" is several points of one training.
    fixed = {key: value for key, value in options.items() if not isinstance(value, list) and "/" not in str(value)}
    settings = [_spell(kind, dict(zip(lists, values, strict=True))) for values in itertools.product(*lists.values())]
    return label or _spell(kind, fixed), settings


def _spell(kind: str, options: Mapping[str, Any]) -> str:
    parts = ",".join(f"{k}={spelt(v)}" for k, v in options.items())
    return kind + ("," if ":" in kind else ":") * bool(parts) + parts


def load_scenarios(files: Sequence[Path]) -> dict[str, Scenario]:
    """Read YAML files that hold scenarios by name.

    Args:
        files (`Sequence[Path]`): Each a mapping from names to the fields of [`Scenario`].

    Returns:
        `dict[str, Scenario]`: By name, in order.

    Raises:
        ValueError: A key is unknown, a value is of the wrong kind or makes no sense, or a name comes twice.
    """
    found: dict[str, Scenario] = {}
    for file in files:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not all(isinstance(part, dict) for part in content.values()):
            raise ValueError(f"{file} must be a mapping from names of scenarios to their fields.")
        for name, values in content.items():
            if name in found:
                raise ValueError(f"{file}: there are two scenarios named {name!r}.")
            found[name] = _read(str(name), values, file)
    return found


def _read(name: str, values: dict[str, Any], file: Path) -> Scenario:
    hints = {key: hint for key, hint in get_type_hints(Scenario).items() if key != "name"}
    if unknown := sorted(set(map(str, values)) - hints.keys()):
        raise ValueError(f"{file}: {name}: unknown key {', '.join(unknown)}; known are {', '.join(hints)}.")
    needed = [f.name for f in fields(Scenario) if f.name in ("target", "methods") and f.name not in values]
    if needed:
        raise ValueError(f"{file}: {name}: {' and '.join(needed)} must be given.")
    read = {key: _convert(value, hints[key], f"{file}: {name}: {key}") for key, value in values.items()}
    try:
        return Scenario(name=name, **read)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _convert(value: Any, hint: Any, where: str) -> Any:
    """A value of YAML as the type of its field; YAML takes 1e-3 for text."""
    kinds = {
        int: "a whole number", float: "a number", str: "text", list: "a list", list[str]: "a list of names",
        list[int]: "a list of whole numbers", list[float]: "a list of numbers",
        dict[str, int]: "names with numbers of items",
    }  # fmt: skip
    if hint == int | None:
        return None if value is None else _convert(value, int, where)
    try:
        if hint is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if hint is float and not isinstance(value, bool):
            return float(value)
        if hint is str and isinstance(value, str):
            return value
        if hint is list and isinstance(value, list):
            return value
        if hint == dict[str, int] and isinstance(value, dict):
            return {_convert(k, str, where): _convert(v, int, where) for k, v in value.items()}
        if hint in (list[str], list[int], list[float]):
            (item,) = get_args(hint)
            return [_convert(part, item, where) for part in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError) as error:
        if where in str(error):
            raise
    raise ValueError(f"{where} must be {kinds[hint]}, got {value!r}.")
