"""Cost of a prediction with uncertainty, as ratios to one deterministic forward pass; `measuring` says how.

One batch through the same model: one streamlined pass, the linearised network (exactly, by one backward pass per
logit, with the belief's variances and with its full structure, and from Monte Carlo by forward-mode passes), and plain
Monte Carlo over adapters, one pass each and stacked. The belief is a prior with a random curvature added: what is
measured does not depend on its values.

A text encoder or ViT as a classifier, or a causal language model, of which a pass gives all tokens and the linearised
network `classes` vocabulary entries of the last one only. No variant keeps a cache of keys and values.

    python recipes/benchmarks/prediction_cost.py --model minilm --batch 16 --tokens 32
    python recipes/benchmarks/prediction_cost.py --model vit --batch 32
    python recipes/benchmarks/prediction_cost.py --model smollm2 --batch 1 --tokens 64 --dtype float32
    python recipes/benchmarks/prediction_cost.py --model minilm --profile
"""

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from sequence_cost import random_curvature
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    HfArgumentParser,
    ViTConfig,
    ViTForImageClassification,
)

from kalman_peft import AdapterState, Belief, initial_belief, update
from kalman_peft.predictive import linearized, sampled, streamlined
from recipe_tools.offline import minilm_checkpoint

from measuring import Options, Samples, load_base, measure


MAP = "deterministic forward"
STREAMLINED = "streamlined"
TARGETS = ["query", "value", "q_proj", "v_proj", "classifier"]
LIMITS = {"time": 3.0, "memory": 3.0, "monte_carlo": 5.0}


@dataclass
class PredictionOptions(Options):
    """What is measured, and on what."""

    model: str = field(default="minilm", metadata={"help": "'minilm', 'vit' (28 x 28), 'smollm2', or a path/id."})
    batch: int = field(default=16, metadata={"help": "Rows per batch."})
    tokens: int = field(default=32, metadata={"help": "Tokens per row; a ViT has 17."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the model."})
    classes: int = field(default=2, metadata={"help": "Of a classifier; entries of a language model's vocabulary."})
    structure: str = field(default="ekfac", metadata={"help": "Of the belief: diagonal, low_rank or ekfac."})
    draws: int = field(default=20, metadata={"help": "Of Monte Carlo."})
    repeats: int = field(default=1, metadata={"help": "Passes per run, for short ones."})
    profile: bool = field(default=False, metadata={"help": "List the operators of a streamlined pass instead."})

    def __post_init__(self):
        for name in ("batch", "tokens", "r", "rounds", "threads", "classes", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.draws < 2:
            raise ValueError(f"draws must be at least 2, got {self.draws}.")
        if self.structure not in ("diagonal", "low_rank", "ekfac"):
            raise ValueError(f"structure must be diagonal, low_rank or ekfac, got {self.structure!r}.")


def make_model(o: PredictionOptions) -> Any:
    """A model with an adapter, in evaluation mode."""
    torch.manual_seed(0)
    dtype = getattr(torch, o.dtype)
    if o.model == "vit":
        sizes: dict[str, Any] = {"num_labels": o.classes}
        config = ViTConfig(
            hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192, image_size=28,
            patch_size=7, num_channels=1, **sizes,
        )  # fmt: skip
        base: Any = ViTForImageClassification(config).to(dtype)
    elif o.model == "minilm" or not _is_causal(o.model):
        path = str(minilm_checkpoint()) if o.model == "minilm" else o.model
        base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=o.classes, dtype=dtype)
    else:
        base = load_base(o.model, o.dtype)
    base = base.to("cuda" if torch.cuda.is_available() else "cpu")
    return get_peft_model(base, LoraConfig(r=o.r, lora_alpha=2 * o.r, target_modules=TARGETS)).eval()


def _is_causal(name: str) -> bool:
    if name == "smollm2":
        return True
    kinds: Any = AutoConfig.from_pretrained(name).architectures
    return any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds or [])


def make_inputs(o: PredictionOptions, model: Any) -> dict[str, Tensor]:
    """Random rows; the cost does not depend on what they say."""
    generator = torch.Generator().manual_seed(0)
    if o.model == "vit":
        pixels = torch.randn(o.batch, 1, 28, 28, generator=generator, dtype=getattr(torch, o.dtype))
        return {"pixel_values": pixels.to(model.device)}
    ids = torch.randint(10, model.config.vocab_size, (o.batch, o.tokens), generator=generator)
    return {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}


def make_belief(o: PredictionOptions, model: Any) -> Belief:
    """A posterior of the asked structure, small enough for adapters drawn from it to be finite."""
    prior = initial_belief(model, 1e4, o.structure)
    shapes = {key: p.shape for key, p in AdapterState(model).parameters().items()}
    curvature = random_curvature(o.structure, shapes, 16, 0).to(model.device)
    return update(prior, prior.mean, curvature, 100.0)


def variants(o: PredictionOptions, model: Any) -> dict[str, Callable[[], None]]:
    """Name -> one prediction of the batch."""
    inputs, belief = make_inputs(o, model), make_belief(o, model)
    causal = o.model == "smollm2" or hasattr(model.get_base_model(), "lm_head")
    chosen: dict[str, Any] = {"positions": "last", "entries": list(range(o.classes))} if causal else {}
    plain: dict[str, Any] = {"use_cache": False} if causal else {}

    def forward() -> None:
        with torch.no_grad():
            model(**inputs, **plain)

    def one_pass() -> None:
        with torch.no_grad(), streamlined(model, belief):
            model(**inputs)

    def linear(**options: Any) -> Callable[[], None]:
        return lambda: linearized(model, belief, inputs, **options, **chosen) and None

    def draws(stacked: int) -> Callable[[], None]:
        return lambda: sampled(model, belief, inputs | plain, draws=o.draws, stacked=stacked, **chosen) and None

    runs = {
        MAP: forward,
        STREAMLINED: one_pass,
        "linearised, diagonal": linear(structure="diagonal"),
        "linearised, full": linear(),
        f"linearised, {o.draws} forward-mode draws": linear(samples=o.draws),
        f"Monte Carlo, {o.draws} draws": draws(1),
        f"Monte Carlo, {o.draws} draws stacked": draws(o.draws),
    }

    def repeated(run: Callable[[], None]) -> Callable[[], None]:
        def all_of_them() -> None:
            for _ in range(o.repeats):
                run()

        return all_of_them

    return {name: repeated(run) for name, run in runs.items()}


def benchmark(o: PredictionOptions) -> dict[str, Any]:
    """Measure every variant in turn.

    Args:
        o (`PredictionOptions`): What is measured.

    Returns:
        `dict`: "options", "load" (of the machine before and after), "results" by name: milliseconds, ratio to the
        deterministic forward and its peak memory above the start in MiB; and "targets", met or not.
    """
    torch.set_num_threads(o.threads)
    load = [os.getloadavg()[0]]
    model = make_model(o)
    samples = measure(variants(o, model), o.rounds)
    reference = samples[MAP]
    results = {name: _line(sample, reference, o.repeats) for name, sample in samples.items()}
    cost, monte_carlo = samples[STREAMLINED], samples[f"Monte Carlo, {o.draws} draws"]
    found = {
        "time": cost.over(reference),
        "memory": results[STREAMLINED]["peak_mib"] / max(results[MAP]["peak_mib"], 1e-9),
        "monte_carlo": monte_carlo.over(cost),
    }
    met = {
        "time": found["time"] <= LIMITS["time"],
        "memory": found["memory"] <= LIMITS["memory"],
        "monte_carlo": found["monte_carlo"] >= LIMITS["monte_carlo"],
    }
    load.append(os.getloadavg()[0])
    return {
        "options": asdict(o), "weights": AdapterState(model).num_parameters, "load": load, "results": results,
        "targets": {name: {"found": found[name], "limit": LIMITS[name], "met": met[name]} for name in found},
    }  # fmt: skip


def _line(sample: Samples, reference: Samples, repeats: int) -> dict[str, float]:
    return {
        "milliseconds": 1e3 * statistics.median(sample.repeated) / repeats,
        "ratio": sample.over(reference),
        "peak_mib": statistics.median(sample.mebibytes),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print what `benchmark` has returned."""
    o = result["options"]
    table = Table("prediction", "ms", "ratio", "peak MiB")
    table.title = (
        f"{o['model']}, {o['batch']} x {o['tokens']}, {o['dtype']}, {o['threads']} threads, {o['rounds']} rounds"
    )
    for name, line in result["results"].items():
        table.add_row(name, f"{line['milliseconds']:.1f}", f"{line['ratio']:.2f}", f"{line['peak_mib']:.1f}")
    console.print(table)
    says = {
        "time": "streamlined over a forward, at most",
        "memory": "peak memory over a forward's, at most",
        "monte_carlo": f"{o['draws']} draws over streamlined, at least",
    }
    for name, target in result["targets"].items():
        verdict = "met" if target["met"] else "missed"
        console.print(f"{says[name]} {target['limit']:g}: {target['found']:.2f}, {verdict}", highlight=False)
    console.print("load of the machine before and after: {:.1f}, {:.1f}".format(*result["load"]))


def profile(o: PredictionOptions) -> str:
    """Operators of a few streamlined passes, by their own time."""
    torch.set_num_threads(o.threads)
    run = variants(o, make_model(o))[STREAMLINED]
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(5):
            run()
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = HfArgumentParser(PredictionOptions, description=__doc__)  # type: ignore[arg-type]
    try:
        (o,) = parser.parse_args_into_dataclasses()
    except ValueError as error:
        parser.error(str(error))
    if o.profile:
        print(profile(o))
        return
    result = benchmark(o)
    show(result, Console(width=140))
    if o.output:
        Path(o.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
