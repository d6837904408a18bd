"""Cost of one training step, as ratios to one plain forward and backward; `measuring` says how.

The first third of each sequence carries no label. "every 4th" is (one step with a draw + three without) / 4. The runs
over given gradients (`--synthetic`) measure the optimizers alone, see `step_scaling`; `--profile` lists their
operators. For curvature passes see `curvature_cost.py`.

    python recipes/benchmarks/step_cost.py --threads 1 --rounds 9
    python recipes/benchmarks/step_cost.py --synthetic --sizes 1e5 1e6 1e7 1e8 --rounds 5
    python recipes/benchmarks/step_cost.py --profile
"""

import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import HfArgumentParser

from kalman_peft import AdapterState
from kalman_peft.loko import MEMORIES

from measuring import Options, Samples, add_adapter, load_base, make_batch, measure
from step_profile import profile_steps, show_profile
from step_runs import ADAMW, DRAW, EVERY, NO_DRAW, PLAIN, Run, loko_step, plain_steps
from step_scaling import WIDTHS, judge, scale_steps, show_scaling


BLOCK_LIMIT = 1024  # the default of LoKO
PER_SEQUENCE = "kronecker, column per sequence"


@dataclass
class StepOptions(Options):
    """What is measured, and on what."""

    synthetic: bool = field(default=False, metadata={"help": "The optimizers alone, on given gradients."})
    sizes: list[float] = field(default_factory=lambda: list(WIDTHS), metadata={"help": "Weights of --synthetic."})
    ranks: list[int] = field(default_factory=lambda: [8, 16], metadata={"help": "LoRA ranks of --synthetic."})
    profile: bool = field(default=False, metadata={"help": "List the operators of one step, without the model."})


def variants(model: Any, batch: dict[str, Tensor]) -> tuple[dict[str, Run], dict[str, str]]:
    """Name -> one step, and what is left out and why. Every variant owns its optimizer; all share the model."""
    runs, left_out = plain_steps(model, batch), {}
    if all(p.numel() > BLOCK_LIMIT for p in AdapterState(model).parameters().values()):
        left_out["block"] = f"no parameter has at most {BLOCK_LIMIT} weights: the same as kronecker"
    options: dict[str, dict[str, Any]] = {memory: {"memory": memory} for memory in MEMORIES if memory not in left_out}
    options[PER_SEQUENCE] = {"per_sequence": True}
    for name, chosen in options.items():
        try:
            steps = {
                f"LoKO {name}, {when}": loko_step(model, batch, when == DRAW, **chosen) for when in (DRAW, NO_DRAW)
            }
        except ValueError as error:  # "dense" has a limit of its own
            left_out[name] = str(error)
        else:
            runs |= steps
    runs["LoKO kronecker, empirical"] = loko_step(model, batch, True, columns="empirical")
    return runs, left_out


def add_schedules(samples: dict[str, Samples]) -> dict[str, Samples]:
    """With the means over steps of which one in n draws, beside each pair with and without a draw."""
    result = {}
    for name, sample in samples.items():
        result[name] = sample
        if not name.endswith(NO_DRAW):
            continue
        draw = samples[name.removesuffix(NO_DRAW) + DRAW]
        for n in EVERY:
            mean = [(a + (n - 1) * b) / n for a, b in zip(draw.repeated, sample.repeated, strict=True)]
            result[name.removesuffix(NO_DRAW) + f"every {n}th"] = Samples(mean, draw.once, draw.mebibytes)
    return result


def summarise(samples: dict[str, Samples]) -> dict[str, dict[str, float]]:
    """Seconds, ratios and peak memory of every variant."""
    return {
        name: {
            "seconds": statistics.median(sample.repeated),
            "to_forward_backward": sample.over(samples[PLAIN]),
            "to_adamw": sample.over(samples[ADAMW]),
            "peak_mib": statistics.median(sample.mebibytes),
        }
        for name, sample in add_schedules(samples).items()
    }


def measure_model(options: StepOptions) -> dict[str, Any]:
    """Steps on the model of the options: "figures" by variant, and what was left out."""
    model = add_adapter(load_base(options.model, options.dtype), options.r)
    batch = make_batch(model, options.batch, options.tokens, prompt=options.tokens // 3)
    runs, left_out = variants(model, batch)
    return {"figures": summarise(measure(runs, options.rounds)), "left_out": left_out}


def profile_model(options: StepOptions) -> dict[str, Any]:
    """Operators of a step over parameters as the model's adapter has them."""
    model = add_adapter(load_base(options.model, options.dtype), options.r)
    return {"profile": profile_steps([tuple(p.shape) for p in AdapterState(model).parameters().values()])}


def benchmark(options: StepOptions, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure what the options ask for.

    Args:
        options (`StepOptions`): What is measured, and on what.
        say (`Callable`, *optional*): Told what is under way.

    Returns:
        `dict`: "options", "load" (of the machine before and after, runnable processes) and the tables.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result: dict[str, Any] = {"options": asdict(options), "load": [os.getloadavg()[0]]}
    if options.synthetic:
        say(f"optimizers alone: {options.sizes} weights")
        rows = scale_steps(options.sizes, options.ranks, options.rounds)
        result |= {"scaling": rows, "targets": judge(rows)}
    if options.profile:
        say("operators of a step")
        result |= profile_model(options)
    if not (options.synthetic or options.profile):
        say(f"steps on {options.model}")
        result |= measure_model(options)
    result["load"].append(os.getloadavg()[0])
    return result


def show(result: dict[str, Any], console: Console) -> None:
    """Print what `benchmark` has returned."""
    if "figures" in result:
        table = Table("variant", "seconds", "/ fwd+bwd", "/ AdamW", "peak MiB")
        table.title = f"median of {result['options']['rounds']} rounds"
        for name, row in result["figures"].items():
            table.add_row(
                name, f"{row['seconds']:.3f}", f"{row['to_forward_backward']:.3f}", f"{row['to_adamw']:.3f}",
                f"{row['peak_mib']:.0f}",
            )  # fmt: skip
        console.print(table)
        for name, why in result["left_out"].items():
            console.print(f"left out: {name}: {why}", markup=False)
    if "scaling" in result:
        show_scaling(result["scaling"], console)
    if "profile" in result:
        show_profile(result["profile"], console)
    console.print("load of the machine before and after: {:.1f}, {:.1f}".format(*result["load"]))


def main() -> None:
    """Measure, print tables, write JSON."""
    (options,) = HfArgumentParser(StepOptions, description=__doc__).parse_args_into_dataclasses()  # type: ignore[arg-type]
    result = benchmark(options, lambda line: print(line, file=sys.stderr, flush=True))
    show(result, Console(width=165))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
