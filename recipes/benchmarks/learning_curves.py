"""Held-out loss against steps and seconds: LoKO beside AdamW with its learning rate swept, on the main job's task.

A run is named "adamw:RATE" or "loko:OPTION=VALUE,..." (options of `create_loko_optimizer`). All runs start from the
same adapter and see the same batches; the clock stops while the held-out loss is measured. Results are written after
every run, and runs that are there already are not repeated.

    python recipes/benchmarks/learning_curves.py --runs loko adamw:5e-4 adamw:1e-3 adamw:2e-3 adamw:4e-3
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollatorForSeq2Seq, HfArgumentParser, set_seed


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kalman_peft import create_loko_optimizer
from recipe_tools.encoding import tokenize_supervised
from recipe_tools.evaluate import text_loss
from recipe_tools.offline import load_smollm2
from recipe_tools.plots import Curve, plot_curves
from recipe_tools.report import write_json
from recipe_tools.spelling import parse_options
from recipe_tools.targets import load_target


@dataclass
class Options:
    """What is compared, and for how long."""

    runs: list[str] = field(
        default_factory=lambda: ["loko", "adamw:5e-4", "adamw:1e-3", "adamw:2e-3", "adamw:4e-3"],
        metadata={"help": "Runs, see above."},
    )
    dataset: str = field(default="gsm8k-offline", metadata={"help": "Target, as in llama_math.py."})
    steps: int = field(default=40, metadata={"help": "Optimizer steps."})
    every: int = field(default=10, metadata={"help": "Steps between measurements."})
    batch_size: int = field(default=4, metadata={"help": "Sequences per step."})
    eval_items: int = field(default=32, metadata={"help": "Held-out problems."})
    max_length: int = field(default=384, metadata={"help": "Tokens per sequence."})
    r: int = field(default=8, metadata={"help": "LoRA rank, all linear layers."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    seed: int = field(default=0, metadata={"help": "Of data order, adapter and draws."})
    output_dir: str = field(default="outputs/learning_curves", metadata={"help": "Folder for JSON and PNG."})


def make_optimizer(name: str, model: Any, seed: int) -> torch.optim.Optimizer:
    """The optimizer that a run's name stands for."""
    kind, _, rest = name.partition(":")
    if kind == "adamw":
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=float(rest), weight_decay=0.0)
    if kind == "loko":
        return create_loko_optimizer(model, seed=seed, **parse_options(rest))
    raise ValueError(f"Run {name!r} is neither 'adamw:RATE' nor 'loko:OPTION=VALUE,...'.")


def run(name: str, options: Options) -> dict[str, list[float]]:
    """Train once and return steps, seconds and held-out losses."""
    base, tokenizer = load_smollm2()
    set_seed(options.seed)
    config = LoraConfig(r=options.r, lora_alpha=2 * options.r, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    target = load_target(options.dataset, limit_train=None, limit_eval=options.eval_items, seed=options.seed)
    heldout = tokenize_supervised(target.heldout, tokenizer, options.max_length)
    loader = DataLoader(
        tokenize_supervised(target.train, tokenizer, options.max_length),  # type: ignore[arg-type]
        batch_size=options.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(options.seed),
        collate_fn=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    optimizer: Any = make_optimizer(name, model, options.seed)
    curve: dict[str, list[float]] = {"steps": [], "seconds": [], "losses": []}
    spent = 0.0

    def measure(step: int) -> None:
        curve["steps"].append(step)
        curve["seconds"].append(spent)
        curve["losses"].append(text_loss(model, heldout, description="held-out")["loss"])
        model.train()

    measure(0)
    for step, batch in enumerate(tqdm(loader, total=options.steps, desc=name), 1):
        if step > options.steps:
            break
        began = time.perf_counter()
        if name.startswith("loko"):
            labels = batch.pop("labels")
            optimizer.observe(model(**batch, use_cache=False).logits, labels)
        else:
            model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        spent += time.perf_counter() - began
        if step % options.every == 0:
            measure(step)
            tqdm.write(f"{name}: step {step}, {spent:.0f} s, held-out loss {curve['losses'][-1]:.4f}")
    return curve


def main() -> None:
    """Run what is missing, then draw everything."""
    (options,) = HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses()  # type: ignore[arg-type]
    torch.set_num_threads(options.threads)
    folder = Path(options.output_dir)
    file = folder / "learning_curves.json"
    settings = {key: value for key, value in asdict(options).items() if key not in ("runs", "output_dir", "threads")}
    record: dict[str, Any] = {"settings": settings, "threads": options.threads, "curves": {}}
    if file.exists():
        record = json.loads(file.read_text())
        if record["settings"] != settings:
            raise ValueError(
                f"{file} holds runs with other settings ({record['settings']}); choose another output_dir."
            )
    for name in options.runs:
        if name not in record["curves"]:
            record["curves"][name] = run(name, options)
            write_json(record, file)
    curves = {name: Curve(**record["curves"][name]) for name in options.runs}
    plot_curves(curves, folder / "learning_curves.png", title=f"SmolLM2-135M on {options.dataset}")


if __name__ == "__main__":
    main()
