"""Cost of the filter over tasks: predict, update and smooth, against the number of weights D and the rank k.

Curvature is given and random: what is measured is the filter's own work. Then a smoothing pass over a whole sequence
of tasks on an adapter shaped as that of SmolLM2-135M (all linear layers); no model is loaded. k counts columns of
"low_rank", or eigenpairs kept of each long side for "ekfac". Seconds and memory as `measuring` takes them.

    python recipes/benchmarks/sequence_cost.py --rounds 3 --output sequence_cost.json
"""

import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import HfArgumentParser

from kalman_peft import Belief, TaskRecord, Transition, initial_belief, predict, smooth, update
from kalman_peft.filtering import belief_figures, increment_of
from kalman_peft.precision import (
    DiagonalPrecision,
    EigenFactor,
    EigenKroneckerPrecision,
    KroneckerBlocks,
    LowRankPrecision,
    Precision,
)

from measuring import Peak, measure
from step_runs import lora_shapes


Shapes = Mapping[str, torch.Size]
VERBS = ("predict", "update", "smooth")
STRUCTURES = ("diagonal", "low_rank", "ekfac")
LABELS, PRIOR = 1000.0, 100.0  # labels per task; prior precision
STEP = Transition({"lora_A": 1e-5, "lora_B": 1e-4})
# (inputs, outputs) of the adapted layers of SmolLM2-135M: q, k, v, o, gate, up, down; 30 times.
SMOLLM2 = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
SMOLLM2_LAYERS = 30


@dataclass
class SequenceOptions:
    """What is measured."""

    sizes: list[float] = field(default_factory=lambda: [1e5, 1e6, 4e6], metadata={"help": "Weights D."})
    ranks: list[int] = field(default_factory=lambda: [5, 10, 20], metadata={"help": "k."})
    structures: list[str] = field(default_factory=lambda: list(STRUCTURES), metadata={"help": "Of the state."})
    r: int = field(default=8, metadata={"help": "LoRA rank."})
    tasks: int = field(default=20, metadata={"help": "Tasks of the smoothing pass; 0 leaves it out."})
    pass_rank: int = field(default=10, metadata={"help": "k of the smoothing pass."})
    pass_layers: int = field(default=SMOLLM2_LAYERS, metadata={"help": "Transformer layers of the smoothing pass."})
    rounds: int = field(default=3, metadata={"help": "Counted rounds, after one of warm-up."})
    threads: int = field(default=1, metadata={"help": "Threads of torch on a CPU."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})

    def __post_init__(self):
        if unknown := set(self.structures) - set(STRUCTURES):
            raise ValueError(f"structures must be of {list(STRUCTURES)}, got {sorted(unknown)}.")
        for name in ("sizes", "ranks", "structures"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{name} needs at least one entry, and each once, got {given}.")
        if not all(0 < size < math.inf for size in self.sizes):
            raise ValueError(f"sizes must be above 0 and finite, got {self.sizes}.")
        lowest = {"r": 1, "tasks": 0, "pass_rank": 1, "pass_layers": 1, "rounds": 1, "threads": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}.")
        if min(self.ranks) < 1:
            raise ValueError(f"ranks must be at least 1, got {self.ranks}.")


# -- given curvature -----------------------------------------------------------------------------------------------


def chain_shapes(weights: float, r: int, width: int = 576) -> Shapes:
    """Keys and shapes of an adapter of about that many weights."""
    sides = ("A", "B")
    return {
        f"layers.{j // 2}.proj.lora_{sides[j % 2]}.weight": torch.Size(shape)
        for j, shape in enumerate(lora_shapes(weights, r, width))
    }


def smollm2_shapes(r: int, layers: int = SMOLLM2_LAYERS) -> Shapes:
    """Keys and shapes of SmolLM2-135M's adapter over all linear layers."""
    shapes = {}
    for layer in range(layers):
        for j, (inputs, outputs) in enumerate(SMOLLM2):
            shapes[f"layers.{layer}.linear{j}.lora_A.weight"] = torch.Size((r, inputs))
            shapes[f"layers.{layer}.linear{j}.lora_B.weight"] = torch.Size((outputs, r))
    return shapes


def random_curvature(structure: str, shapes: Shapes, k: int, seed: int) -> Precision:
    """A random curvature per label; different seeds have different bases."""
    generator = torch.Generator().manual_seed(seed)
    if structure == "diagonal":
        return DiagonalPrecision({key: torch.rand(shape, generator=generator) for key, shape in shapes.items()})
    if structure == "low_rank":
        size = sum(shape.numel() for shape in shapes.values())
        return LowRankPrecision(torch.zeros(size), torch.randn(size, k, generator=generator), shapes)

    def side(n: int) -> EigenFactor:
        kept = n if n <= max(k, 16) else k
        vectors = torch.linalg.qr(torch.randn(n, kept, generator=generator)).Q
        return EigenFactor(vectors, torch.rand(kept, generator=generator), torch.tensor(0.01))

    rights = {n: side(n) for n in {shape[1] for shape in shapes.values()}}  # shared, as inputs of q, k and v are
    blocks = {key: (side(shape[0]), rights[shape[1]]) for key, shape in shapes.items()}
    cells = {
        key: torch.rand(left.signature[1] + 1, right.signature[1] + 1, generator=generator)
        for key, (left, right) in blocks.items()
    }
    return EigenKroneckerPrecision(KroneckerBlocks(blocks), cells)


def learn(prior: Belief, curvatures: list[Precision], tasks: int, rank: int | None) -> list[TaskRecord]:
    """Records of a sequence of tasks whose modes are random."""
    generator = torch.Generator().manual_seed(1)
    belief, records = prior, []
    for t in range(tasks):
        predicted, curvature = predict(belief, STEP), curvatures[t % len(curvatures)]
        mode = {k: m + 0.01 * torch.randn(m.shape, generator=generator) for k, m in predicted.mean.items()}
        belief = update(predicted, mode, curvature, LABELS, rank)
        records.append(TaskRecord(f"task {t}", belief, STEP, increment_of(predicted, curvature, LABELS)))
    return records


def start(shapes: Shapes, structure: str) -> Belief:
    """The belief before any task."""
    zeros: dict[str, Tensor] = {key: torch.zeros(shape) for key, shape in shapes.items()}
    return initial_belief(zeros, PRIOR, structure)


# -- what is measured ----------------------------------------------------------------------------------------------


def size_rows(options: SequenceOptions, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row per structure, k and D: seconds of each verb."""
    rows = []
    for structure in options.structures:
        for k in options.ranks if structure != "diagonal" else [0]:
            for weights in options.sizes:
                say(f"{structure}, k={k}, {weights:g} weights")
                rows.append(_row(structure, k, chain_shapes(weights, options.r), options.rounds))
    return rows


def _row(structure: str, k: int, shapes: Shapes, rounds: int) -> dict[str, Any]:
    rank = k if structure == "low_rank" else None
    curvatures = [random_curvature(structure, shapes, k, seed) for seed in (0, 1)]
    records = learn(start(shapes, structure), curvatures, 3, rank)
    belief = records[0].belief
    predicted = predict(belief, STEP)

    def run_predict() -> None:
        predict(belief, STEP)

    def run_update() -> None:
        update(predicted, predicted.mean, curvatures[1], LABELS, rank)

    def run_smooth() -> None:
        smooth(records)

    samples = measure({"predict": run_predict, "update": run_update, "smooth": run_smooth}, rounds)
    size = sum(shape.numel() for shape in shapes.values())
    row: dict[str, Any] = {"structure": structure, "k": k, "weights": size}
    for verb in VERBS:
        steps = len(records) - 1 if verb == "smooth" else 1  # per task that is smoothed
        row[verb] = statistics.median(samples[verb].repeated) / steps
        row[f"{verb}_peak_mib"] = statistics.median(samples[verb].mebibytes)
    return row


def slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exponent of D in the seconds, between the smallest and the largest D of each structure and k; 1 is linear."""
    result = []
    for structure, k in dict.fromkeys((row["structure"], row["k"]) for row in rows):
        found = sorted(
            (row for row in rows if (row["structure"], row["k"]) == (structure, k)), key=lambda row: row["weights"]
        )
        low, high = found[0], found[-1]
        if low["weights"] == high["weights"]:
            continue
        wide = math.log(high["weights"] / low["weights"])
        result.append(
            {"structure": structure, "k": k} | {verb: math.log(high[verb] / low[verb]) / wide for verb in VERBS}
        )
    return result


def sequence_rows(options: SequenceOptions, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row per structure: a whole sequence filtered and smoothed, once; and what the filter then holds."""
    shapes, rows = smollm2_shapes(options.r, options.pass_layers), []
    for structure in options.structures:
        say(f"{options.tasks} tasks, {structure}")
        k = 0 if structure == "diagonal" else options.pass_rank
        curvatures = [random_curvature(structure, shapes, k, seed) for seed in (0, 1, 2)]
        with Peak() as filtering:
            rank = k if structure == "low_rank" else None
            records = learn(start(shapes, structure), curvatures, options.tasks, rank)
        with Peak() as smoothing:
            smooth(records)
        held = [sum(t.numel() * t.element_size() for t in r.belief.precision.tensors().values()) for r in records]
        traces = [belief_figures(record.belief)["covariance_trace"] for record in records]
        rows.append(
            {
                "structure": structure, "k": k, "weights": sum(shape.numel() for shape in shapes.values()),
                "tasks": options.tasks, "filter_seconds": filtering.seconds, "smooth_seconds": smoothing.seconds,
                "smooth_peak_mib": smoothing.mebibytes, "precision_mib": [held[0] / 2**20, held[-1] / 2**20],
                "covariance_trace": traces,
            }
        )  # fmt: skip
    return rows


def benchmark(options: SequenceOptions, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure what the options ask for.

    Args:
        options (`SequenceOptions`): What is measured.
        say (`Callable`, *optional*): Told what is under way.

    Returns:
        `dict`: "options", "load" (of the machine before and after, runnable processes), "sizes", "slopes" and
        "sequences".
    """
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"options": asdict(options), "load": [os.getloadavg()[0]]}
    result["sizes"] = size_rows(options, say)
    result["slopes"] = slopes(result["sizes"])
    result["sequences"] = sequence_rows(options, say) if options.tasks else []
    result["load"].append(os.getloadavg()[0])
    return result


def show(result: dict[str, Any], console: Console) -> None:
    """Print what `benchmark` has returned."""
    table = Table("structure", "k", "D", *(f"{verb}, s" for verb in VERBS), *(f"{verb}, ns / D" for verb in VERBS))
    table.title = f"median of {result['options']['rounds']} rounds; smooth: per task"
    before = None
    for row in result["sizes"]:
        if before not in (None, (row["structure"], row["k"])):
            table.add_section()
        before = row["structure"], row["k"]
        table.add_row(
            row["structure"], str(row["k"]), f"{row['weights']:.2e}", *(f"{row[verb]:.4f}" for verb in VERBS),
            *(f"{1e9 * row[verb] / row['weights']:.1f}" for verb in VERBS),
        )  # fmt: skip
    console.print(table)
    for row in result["slopes"]:
        exponents = ", ".join(f"{verb} {row[verb]:.2f}" for verb in VERBS)
        console.print(f"exponent of D, {row['structure']}, k={row['k']}: {exponents}", markup=False, highlight=False)
    if result["sequences"]:
        table = Table("structure", "k", "D", "tasks", "filter, s", "smooth, s", "peak MiB", "precision MiB", "trace")
        table.title = "a sequence on an adapter shaped as SmolLM2-135M's; first and last task"
        for row in result["sequences"]:
            first, last = row["precision_mib"]
            trace = row["covariance_trace"]
            table.add_row(
                row["structure"], str(row["k"]), f"{row['weights']:.2e}", str(row["tasks"]),
                f"{row['filter_seconds']:.2f}", f"{row['smooth_seconds']:.2f}", f"{row['smooth_peak_mib']:.0f}",
                f"{first:.0f} -> {last:.0f}", f"{trace[0]:.3g} -> {trace[-1]:.3g}",
            )  # fmt: skip
        console.print(table)
    console.print("load of the machine before and after: {:.1f}, {:.1f}".format(*result["load"]))


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = HfArgumentParser(SequenceOptions)  # type: ignore[arg-type]
    try:
        (options,) = parser.parse_args_into_dataclasses()
    except ValueError as error:
        parser.error(str(error))
    result = benchmark(options, lambda line: print(line, file=sys.stderr, flush=True))
    show(result, Console(width=140))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
