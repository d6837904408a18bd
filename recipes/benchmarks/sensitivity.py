"""How much each option of LoKO matters: one option moved at a time, all others at their defaults.

Every numeric option is tried at 0.1, 0.3, 1, 3 and 10 times a middle value: its default, or, where the default is
"off", a value at which it acts; a few have values of their own. Some options act only beside others, which are then
given to every run of that panel and to the one that it is compared with (the dashed line). What is shown is

- for a text task, the prequential log loss over a stream (predicted before learned; see `online_classification.py`),
  and for `noise_decay:regression` the squared error with the same labels as numbers;
- for `--task lm`, the held-out loss of a language model after a few steps on short problems with solutions.

Runs that are there already are not repeated.

    python recipes/benchmarks/sensitivity.py                                        # SST-2, batches of 16
    python recipes/benchmarks/sensitivity.py --task lm --knobs max_decrease rank    # SmolLM2-135M, GSM8K
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sensitivity_plot import plot_sensitivity
from sensitivity_runs import LanguageRuns, RegressionRuns, Setting, TextRuns

from recipe_tools.arguments import parsed
from recipe_tools.labelled import TEXT_TASKS
from recipe_tools.report import write_json


FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
RANK = 8


@dataclass(frozen=True)
class Knob:
    """An option and what is tried.

    Args:
        middle (`float`): Value at factor 1; the default, unless `off`.
        kind (`str`, *optional*, defaults to `"float"`):
            "int" for whole numbers, at least 1; "complement" where 1 - value is what is scaled.
        off (`bool`, *optional*, defaults to `False`): Whether the default is "off" rather than the middle.
        base (`str`, *optional*): Other options that the knob needs, as in a method's name.
        values (`tuple[float, ...]`, *optional*): What is tried, where factors make no sense.
        r (`int`, *optional*, defaults to 8): Rank of the adapter.
    """

    middle: float
    kind: str = "float"
    off: bool = False
    base: str = ""
    values: tuple[float, ...] | None = None
    r: int = RANK

    def tried(self) -> list[float]:
        """Values in order, none twice."""
        return list(dict.fromkeys(self.values or [self.value(factor) for factor in FACTORS]))

    def value(self, factor: float) -> float:
        """The value at a factor."""
        if self.kind == "complement":
            return 1 - min((1 - self.middle) * factor, 0.999)
        scaled = self.middle * factor
        return max(1, round(scaled)) if self.kind == "int" else float(f"{scaled:.6g}")

    def run(self, name: str, value: float | None = None) -> str:
        """Name of a run; without a value, and at a default, the one that the knob is compared with."""
        parts = [self.base] if self.base else []
        if value is not None and (self.off or value != self.middle):
            parts.append(f"{option_of(name)}={value}")
        return "loko:" + ",".join(parts) if parts else "loko"

    def conditions(self) -> str:
        """What else is changed, for a title."""
        return ", ".join(filter(None, (self.base, f"r={self.r}" if self.r != RANK else "")))


TEXT_KNOBS = {
    "prior_tokens": Knob(1e3),
    "max_decrease": Knob(0.5),
    "rank": Knob(16, "int"),
    "curvature_every": Knob(4, "int", off=True, base="first_draws=0"),
    "max_columns": Knob(16, "int", off=True),
    "num_columns": Knob(1, "int", base="columns=sampled"),
    "tempering": Knob(1.0),
    "trust_decay": Knob(0.3, off=True),
    "max_kl": Knob(0.01, off=True),
    "adaptive_noise": Knob(0.99, "complement", off=True),
    "forgetting": Knob(0.99, "complement", off=True),
    "process_noise": Knob(1e-5, off=True),
    "damping": Knob(0.1),
    "outlier_threshold": Knob(4.0, off=True),
    "first_draws": Knob(6, "int", base="curvature_every=4"),
    # At rank 2 all matrices have 768 weights in MiniLM: below the default in blocks, below a smaller limit not.
    "block_limit": Knob(1024, "int", base="memory=block", r=2),
    # Short sides are 8 (adapter) and 2 (head): 1 leaves all of them diagonal, 2 the adapter's.
    "dense_limit": Knob(128, values=(1, 2, 4, 8, 128)),
    "initial_bound": Knob(1.0, base="mode=paper"),
    "noise_decay": Knob(0.99, "complement", base="mode=paper"),
    "noise_decay:regression": Knob(0.99, "complement"),
}
# A run takes a minute on one core: few values, both ends of the range among them.
LANGUAGE_KNOBS = {
    "max_decrease": Knob(0.5),
    "prior_tokens": Knob(1e4, values=(1e3, 1e4, 1e5)),
    "curvature_every": Knob(4, base="first_draws=0", values=(1, 4, 8)),
    "rank": Knob(16, values=(2, 16, 160)),
    "tempering": Knob(1.0, values=(0.1, 1.0, 10.0)),
    "num_columns": Knob(1, values=(1, 4)),
    "correlation": Knob(0.0, values=(0.0, 0.5, 1.0)),
}


@dataclass
class Options:
    """The task and what is tried."""

    task: str = field(default="sst2", metadata={"help": f"A language model, 'lm', or of {', '.join(TEXT_TASKS)}."})
    model: str | None = field(
        default=None, metadata={"help": "By default 'minilm', for a language model 'smollm2'; a Hub id or a path."}
    )
    data: str = field(
        default="offline",
        metadata={
            "help": "As --data of online_classification.py, for a language model as --dataset of llama_math.py."
        },
    )
    samples: int | None = field(
        default=None, metadata={"help": "Length of the stream (default 256), or sequences to learn from (20)."}
    )
    batch_size: int | None = field(default=None, metadata={"help": "Samples per step: 16, or 2 sequences."})
    max_length: int = field(default=128, metadata={"help": "Language model: longest problem with solution, tokens."})
    eval_items: int = field(default=24, metadata={"help": "Language model: held-out problems."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds; losses are averaged."})
    knobs: list[str] = field(default_factory=list, metadata={"help": "Options to try; all of them by default."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    output_dir: str = field(default="outputs/sensitivity", metadata={"help": "Folder for runs, JSON and PNG."})


def parse(arguments: list[str]) -> tuple[Options, dict[str, Knob]]:
    """Read and check options.

    Args:
        arguments (`list[str]`): Without the program's name.

    Returns:
        `tuple[Options, dict[str, Knob]]`: With defaults that depend on the task filled in; and the knobs by name.
    """
    parser, o = parsed(Options, __doc__, arguments)
    if o.task not in (*TEXT_TASKS, "lm"):
        parser.error(f"--task {o.task}: expected one of {[*TEXT_TASKS, 'lm']}")
    language = o.task == "lm"
    known = LANGUAGE_KNOBS if language else TEXT_KNOBS
    unknown = sorted(set(o.knobs) - known.keys())
    if unknown:
        parser.error(f"--knobs: unknown {unknown}; known for {o.task} are {list(known)}")
    if not o.seeds:
        parser.error("--seeds needs at least one entry")
    if min(value for value in (o.samples, o.batch_size, o.max_length, o.eval_items, 1) if value is not None) < 1:
        parser.error("--samples, --batch_size, --max_length and --eval_items must be positive")
    o.model = o.model or ("smollm2" if language else "minilm")
    o.samples = (20 if language else 256) if o.samples is None else o.samples
    o.batch_size = (2 if language else 16) if o.batch_size is None else o.batch_size
    return o, {name: known[name] for name in o.knobs or known}


def option_of(name: str) -> str:
    """The option that a knob moves: "noise_decay" for "noise_decay:regression"."""
    return name.partition(":")[0]


class Bench:
    """The runs of a task, by what a knob needs."""

    def __init__(self, o: Options):
        self.options, self.folder = o, Path(o.output_dir)
        self.setting = Setting(
            o.task, str(o.model), o.data, int(o.samples or 0), int(o.batch_size or 0), o.max_length, o.eval_items
        )
        self._made: dict[tuple[type[TextRuns | LanguageRuns], int], TextRuns | LanguageRuns] = {}

    def runs(self, name: str, knob: Knob) -> TextRuns | LanguageRuns:
        """Those that measure a knob."""
        kind: type[TextRuns | LanguageRuns] = TextRuns
        if self.options.task == "lm":
            kind = LanguageRuns
        elif name.endswith(":regression"):
            kind = RegressionRuns
        key = (kind, knob.r)
        if key not in self._made:
            self._made[key] = kind(self.setting, self.options.seeds, knob.r, self.folder)
        return self._made[key]

    def measure(self, knobs: dict[str, Knob]) -> dict[str, Any]:
        """Loss by knob: at each value, and with the default. Knobs that were measured before stay in the record."""
        file = self.folder / ("sensitivity_lm.json" if self.options.task == "lm" else "sensitivity.json")
        settings = {"task": self.options.task, "samples": self.options.samples, "seeds": self.options.seeds}
        record: dict[str, Any] = {**settings, "knobs": {}}
        if file.exists():
            before = json.loads(file.read_text())
            if all(before.get(key) == value for key, value in settings.items()):
                record = before
        if self.options.task == "lm" and knobs:
            record["start"] = self.runs("", next(iter(knobs.values()))).loss("start")
        for name, knob in knobs.items():
            runs = self.runs(name, knob)
            record["knobs"][name] = {
                "conditions": knob.conditions(),
                "unit": runs.unit,
                "default": runs.loss(knob.run(name)),
                "values": knob.tried(),
                "losses": [runs.loss(knob.run(name, value)) for value in knob.tried()],
                "off_by_default": knob.off,
            }
            write_json(record, file)
        return record


def show(record: dict[str, Any], console: Console) -> None:
    """A table: each knob's losses, and how far they are apart."""
    table = Table(
        "option", "loss (at value)", "default", "range", title=f"{record['task']}, {record['samples']} samples"
    )
    for name, r in record["knobs"].items():
        cells = "  ".join(f"{loss:.3f} ({x:.4g})" for loss, x in zip(r["losses"], r["values"], strict=True))
        spread = max(r["losses"]) - min(r["losses"])
        title = f"{name} ({r['conditions']})" if r["conditions"] else name
        table.add_row(title, cells, f"{r['default']:.3f}", f"{spread:.3f}")
    console.print(table)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, write JSON and PNG.

    Args:
        arguments (`list[str]`, *optional*): Defaults to the command line.

    Returns:
        `dict[str, Any]`: What the JSON file holds.
    """
    o, knobs = parse(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(o.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    record = Bench(o).measure(knobs)
    show(record, Console(width=150))
    plot_sensitivity(record, Path(o.output_dir) / ("sensitivity_lm.png" if o.task == "lm" else "sensitivity.png"))
    return record


if __name__ == "__main__":
    main()
