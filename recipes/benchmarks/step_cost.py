"""Cost of one training step, as ratios to one plain forward and backward; `measuring` says how.

The first third of each sequence carries no label. "every 10th" is (one step with a draw + nine without) / 10. For
curvature passes see `curvature_cost.py`.

    python recipes/benchmarks/step_cost.py --threads 1 --rounds 9
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import HfArgumentParser

from kalman_peft import AdapterState, Belief, create_loko_optimizer
from kalman_peft.laplace import add_penalty_gradient

from measuring import Options, Samples, add_adapter, load_base, make_batch, measure


def variants(model: Any, batch: dict[str, Tensor]) -> dict[str, Callable[[], None]]:
    """Name -> one step. Every variant owns its optimizer; all share the model."""
    state = AdapterState(model)
    start = state.snapshot()
    params = list(state.parameters().values())
    belief = Belief.fit(model, [batch], progress_bar=False)
    adamw, penalised = torch.optim.AdamW(params, lr=1e-5), torch.optim.AdamW(params, lr=1e-5)
    inputs = {key: value for key, value in batch.items() if key != "labels"}

    def plain() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    def step(optimizer: torch.optim.Optimizer, penalty: bool) -> None:
        model(**batch).loss.backward()
        if penalty:
            add_penalty_gradient(belief, state, 1.0)
        optimizer.step()
        model.zero_grad()

    def kalman(memory: str, draw: bool) -> Callable[[], None]:
        optimizer = create_loko_optimizer(model, memory=memory)
        for stack in optimizer._stacks:  # a prior, so that steps without a draw can come first
            stack.set_prior(stack.memory, torch.full((stack.shape[0],), 1e6, device=stack.like.device))

        def run() -> None:
            schedule = {"steps": 0, "curvature_every": 1} if draw else {"steps": 1, "curvature_every": 10**9}
            optimizer.param_groups[0].update(schedule, first_draws=0, settled=True)
            optimizer.observe(model(**inputs).logits, batch["labels"])
            optimizer.step()
            state.load(start)

        return run

    runs: dict[str, Callable[[], None]] = {
        "forward + backward": plain,
        "AdamW": lambda: step(adamw, False),
        "AdamW + LaLoRA": lambda: step(penalised, True),
    }
    for memory in ("kronecker", "diagonal"):
        runs[f"LoKO {memory}, with draw"] = kalman(memory, True)
        runs[f"LoKO {memory}, no draw"] = kalman(memory, False)
    return runs


def summarise(samples: dict[str, Samples]) -> dict[str, dict[str, float]]:
    """Seconds, ratios and peak memory of every variant."""
    for kind in ("kronecker", "diagonal"):
        with_draw, without = samples[f"LoKO {kind}, with draw"], samples[f"LoKO {kind}, no draw"]
        samples[f"LoKO {kind}, every 10th"] = Samples(
            [(a + 9 * b) / 10 for a, b in zip(with_draw.repeated, without.repeated, strict=True)],
            with_draw.once,
            with_draw.mebibytes,
        )
    return {
        name: {
            "seconds": statistics.median(sample.repeated),
            "to_forward_backward": sample.over(samples["forward + backward"]),
            "to_adamw": sample.over(samples["AdamW"]),
            "peak_mib": statistics.median(sample.mebibytes),
        }
        for name, sample in samples.items()
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()  # type: ignore[arg-type]
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = add_adapter(load_base(options.model, options.dtype), options.r)
    batch = make_batch(model, options.batch, options.tokens, prompt=options.tokens // 3)
    figures = summarise(measure(variants(model, batch), options.rounds))
    table = Table("variant", "seconds", "/ fwd+bwd", "/ AdamW", "peak MiB", title=f"median of {options.rounds} rounds")
    for name, row in figures.items():
        table.add_row(
            name, f"{row['seconds']:.3f}", f"{row['to_forward_backward']:.3f}", f"{row['to_adamw']:.3f}",
            f"{row['peak_mib']:.0f}",
        )  # fmt: skip
    Console(width=110).print(table)
    if options.output:
        Path(options.output).write_text(json.dumps({"options": asdict(options), "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
