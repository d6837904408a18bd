"""Which curvature keeps most, at equal learning? Every structure and every remedy for the blind spot, on a real model.

The model learns problems that are far from what it knows while LaLoRA holds on to Wikipedia; measured are the target's
held-out loss, and how far the model moved (KL from the base model, rise of the loss) on held-out Wikipedia and on two
skills of which the source data say nothing. All runs start from the same adapter and see the same batches.

A run is named "plain" or "STRUCTURE/SPACE[:OPTION=VALUE,...]", options being KalmanConfig fields without "laplace_":
strength, warmup_steps, refit_steps, fisher, rank, ... Runs that are in the output already are not repeated.

    python recipes/benchmarks/curvatures_compared.py --runs plain kronecker/delta_w kronecker/adapter:warmup_steps=8
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import DataCollatorForSeq2Seq, HfArgumentParser, set_seed


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kalman_peft import KalmanConfig, KalmanTrainer
from recipe_tools.encoding import tokenize, tokenize_supervised
from recipe_tools.evaluate import kl_from_base, text_loss
from recipe_tools.offline import load_smollm2
from recipe_tools.report import write_json
from recipe_tools.sources import load_sources
from recipe_tools.spelling import parse_options
from recipe_tools.targets import load_target


BLIND, WARM = ("diagonal", "kronecker", "ekfac"), ("diagonal", "kronecker", "ekfac", "block_tridiagonal", "low_rank")
RUNS = [
    "plain",
    *(f"{s}/delta_w" for s in BLIND),
    *(f"{s}/adapter" for s in BLIND),
    *(f"{s}/adapter:warmup_steps=5" for s in WARM),
    *(f"{s}/adapter:refit_steps=5" for s in ("diagonal", "kronecker", "block_tridiagonal")),
]


@dataclass
class Options:
    """What is compared, and for how long."""

    runs: list[str] = field(default_factory=lambda: list(RUNS), metadata={"help": "Runs, see above."})
    strengths: list[float] = field(default_factory=lambda: [100.0], metadata={"help": "Strengths of each run."})
    dataset: str = field(default="far-domains", metadata={"help": "Target, as in llama_math.py."})
    steps: int = field(default=25, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=4, metadata={"help": "Sequences per step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Of AdamW, constant."})
    source_samples: int = field(default=24, metadata={"help": "Wikipedia paragraphs for the curvature."})
    eval_items: int = field(default=32, metadata={"help": "Held-out items of the target."})
    kept_items: int = field(default=16, metadata={"help": "Held-out items of every source and skill."})
    max_length: int = field(default=256, metadata={"help": "Tokens per sequence."})
    r: int = field(default=8, metadata={"help": "LoRA rank, all linear layers."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    seed: int = field(default=0, metadata={"help": "Of data order, adapter and draws."})
    output_dir: str = field(default="outputs/curvatures_compared", metadata={"help": "Folder for the JSON."})


def config_options(name: str) -> dict[str, Any]:
    """Fields of KalmanConfig that a run's name stands for."""
    if name == "plain":
        return {}
    head, _, rest = name.partition(":")
    structure, _, space = head.partition("/")
    return {"laplace_structure": structure, "laplace_space": space} | {
        f"laplace_{key}": value for key, value in parse_options(rest).items()
    }


class Bench:
    """Data, shared by all runs."""

    def __init__(self, options: Options):
        self.options = options
        _, self.tokenizer = load_smollm2()
        target = load_target(options.dataset, limit_train=None, limit_eval=options.eval_items, seed=options.seed)
        maths = load_target("gsm8k-offline", limit_train=1, limit_eval=options.kept_items, seed=options.seed)
        sources = load_sources("offline", limit_fit=options.source_samples, limit_heldout=options.kept_items)
        self.train = tokenize_supervised(target.train, self.tokenizer, options.max_length)
        self.heldout = tokenize_supervised(target.heldout, self.tokenizer, options.max_length)
        self.source = tokenize(sources["wikipedia"].fit, self.tokenizer, options.max_length)
        self.kept: dict[str, Dataset] = {
            "wikipedia": tokenize(sources["wikipedia"].heldout, self.tokenizer, options.max_length),
            "books": tokenize(sources["books"].heldout, self.tokenizer, options.max_length),
            "gsm8k": tokenize_supervised(maths.heldout, self.tokenizer, options.max_length),
        }

    def run(self, name: str, strength: float) -> dict[str, Any]:
        """Train once and measure."""
        o = self.options
        base, _ = load_smollm2()
        set_seed(o.seed)
        model = get_peft_model(
            base, LoraConfig(r=o.r, lora_alpha=2 * o.r, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        fields = config_options(name)
        laplace: dict[str, Any] = {"laplace_strength": strength, **fields} if fields else {}
        config = KalmanConfig(
            str(Path(o.output_dir) / "run"), optimizer="adamw_torch", learning_rate=o.learning_rate,
            lr_scheduler_type="constant", max_steps=o.steps, per_device_train_batch_size=o.batch_size,
            per_device_eval_batch_size=4, save_strategy="no", report_to=[], logging_steps=max(o.steps // 5, 1),
            seed=o.seed, use_cpu=not torch.cuda.is_available(), source_samples=o.source_samples, source_heldout=0,
            **laplace,
        )  # fmt: skip
        trainer = KalmanTrainer(
            model=model, args=config, train_dataset=self.train, source_dataset=self.source if fields else None,
            processing_class=self.tokenizer,
            data_collator=DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=-100),
        )  # fmt: skip
        began = time.perf_counter()
        trainer.train()
        result: dict[str, Any] = {"seconds": time.perf_counter() - began}
        result["target"] = text_loss(model, self.heldout, description="target")["loss"]
        for kept, rows in self.kept.items():
            measured = kl_from_base(model, rows, description=kept)
            result[kept] = {"kl": measured["kl"], "rise": measured["loss"] - measured["base_loss"]}
        return result


def show(record: dict[str, Any]) -> None:
    """A table of all runs, by target loss."""
    names = ("wikipedia", "books", "gsm8k")
    table = Table("run", "target loss", *(f"KL {n}" for n in names), *(f"rise {n}" for n in names), "seconds")
    for name, row in sorted(record["runs"].items(), key=lambda item: item[1]["target"]):
        kept = [f"{row[n]['kl']:.3f}" for n in names] + [f"{row[n]['rise']:+.3f}" for n in names]
        table.add_row(name, f"{row['target']:.3f}", *kept, f"{row['seconds']:.0f}")
    Console(width=150).print(table)


def main() -> None:
    """Run what is missing, then print the table."""
    (options,) = HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses()  # type: ignore[arg-type]
    torch.set_num_threads(options.threads)
    file = Path(options.output_dir) / "curvatures_compared.json"
    passing = ("runs", "strengths", "output_dir", "threads")
    settings = {key: value for key, value in asdict(options).items() if key not in passing}
    record: dict[str, Any] = {"settings": settings, "runs": {}}
    if file.exists():
        record = json.loads(file.read_text())
        if record["settings"] != settings:
            raise ValueError(
                f"{file} holds runs with other settings ({record['settings']}); choose another output_dir."
            )
    bench = Bench(options)
    for strength in options.strengths:
        for name in options.runs:
            label = name if name == "plain" else f"{name} @{strength:g}"
            if label not in record["runs"]:
                record["runs"][label] = bench.run(name, strength)
                write_json(record, file)
                show(record)
    show(record)


if __name__ == "__main__":
    main()
