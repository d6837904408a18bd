"""Two minutes on a CPU, no download: learn something new with and without a belief, and see what is forgotten.

    pip install -e .[recipes] && python recipes/quickstart.py

Or cell by cell (`# %%`) in VS Code, Jupyter or Spyder. A small Llama learns to count in steps of 1 to 5. Then LoRA
adapters teach it to count in steps of 6: once with AdamW alone, once with a belief that holds still what the old steps
need (LaLoRA), and once with a Kalman filter that takes the belief as its prior (LoKO). The figure shows what each of
them learned and forgot along the way.
"""

# %% Settings
import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from peft import LoraConfig
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging

from kalman_peft import KalmanConfig, KalmanTrainer


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pretraining_steps", type=int, default=600, help="Of the small Llama on the old steps.")
parser.add_argument("--steps", type=int, default=120, help="Of each adapter on the new ones.")
parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"), help="For the figure.")
options, _ = parser.parse_known_args()  # notebooks bring arguments of their own
logging.set_verbosity_error()
warnings.filterwarnings("ignore", category=FutureWarning)


# %% Data: numbers modulo 31, each sequence in steps of one size, with one number in ten replaced by any other
NUMBERS, LENGTH, OLD, NEW, NOISE = 31, 16, (1, 2, 3, 4, 5), (6,), 0.1


def counting(steps: tuple[int, ...], rows: int, seed: int) -> Dataset:
    """Sequences that go up by one of `steps`; the first two numbers are given, the others are to be predicted."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(NUMBERS, (rows, 1), generator=generator)
    sizes = torch.tensor(steps)[torch.randint(len(steps), (rows, 1), generator=generator)]
    ids = (starts + sizes * torch.arange(LENGTH)) % NUMBERS  # (rows, LENGTH)
    wrong = torch.rand(ids.shape, generator=generator) < NOISE
    ids = ids.where(~wrong, torch.randint(NUMBERS, ids.shape, generator=generator))
    labels = ids.clone()
    labels[:, :2] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


tests = {"old": counting(OLD, 128, seed=1), "new": counting(NEW, 128, seed=2)}


# %% A model that knows the old steps
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 32, "per_device_eval_batch_size": 128, "report_to": "none", "disable_tqdm": True,
    "save_strategy": "no", "logging_strategy": "no", "use_cpu": True, "seed": 0,
}  # fmt: skip


def pretrained() -> LlamaForCausalLM:
    """A Llama of 0.1 million weights, trained on the old steps."""
    set_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=NUMBERS + 1, max_position_embeddings=LENGTH, **size))
    args = TrainingArguments(
        str(options.output_dir / "llama"), learning_rate=3e-3, max_steps=options.pretraining_steps, **COMMON
    )
    trainer = Trainer(model, args, default_data_collator, counting(OLD, 4096, seed=0))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model


llama = pretrained()
weights = {name: w.clone() for name, w in llama.state_dict().items()}


# %% Three adapters from the same start, on the same batches
def learn(name: str, keep: bool, **chosen: Any) -> list[tuple[float, float]]:
    """Losses on old and new steps, before, during and after training; with `keep`, a belief is fitted first."""
    model = LlamaForCausalLM(llama.config)
    model.load_state_dict(weights)
    trainer = KalmanTrainer(
        model=model,
        args=KalmanConfig(
            str(options.output_dir / name), max_steps=options.steps, eval_strategy="steps", eval_on_start=True,
            eval_steps=max(options.steps // 12, 1), source_heldout=0, **COMMON, **chosen,
        ),
        train_dataset=counting(NEW, 4096, seed=3),
        eval_dataset=tests,
        source_dataset=counting(OLD, 64, seed=4) if keep else None,  # 64 sequences are all that the belief sees
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        data_collator=default_data_collator,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seen: dict[float, dict[str, float]] = {}
    for entry in trainer.state.log_history:
        seen.setdefault(entry["step"], {}).update(entry)
    curve = [(e["eval_old_loss"], e["eval_new_loss"]) for _, e in sorted(seen.items()) if "eval_old_loss" in e]
    print(
        f"{name:<22} old steps {curve[0][0]:.3f} -> {curve[-1][0]:.3f}   new {curve[0][1]:.3f} -> {curve[-1][1]:.3f}"
    )
    return curve


curves = {
    "LoRA + AdamW": learn("LoRA + AdamW", keep=False, learning_rate=3e-3),
    "with a belief (LaLoRA)": learn("with a belief (LaLoRA)", keep=True, learning_rate=3e-3),
    "LoKO with the belief": learn("LoKO with the belief", keep=True, optimizer="loko"),
}


# %% The figure: right is learning, up is forgetting; best is right and low
def draw() -> Figure:
    """One curve per method from the base model at the origin."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, curve), marker in zip(curves.items(), "os^", strict=True):
        old, new = zip(*curve, strict=True)
        axes.plot([new[0] - n for n in new], [o - old[0] for o in old], marker=marker, label=name)
    axes.set_xlabel("learning: fall of the loss on new steps (nats/token) →")
    axes.set_ylabel("forgetting: rise of the loss on old steps\n(nats/token) →")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


figure = draw()
options.output_dir.mkdir(parents=True, exist_ok=True)
figure.savefig(options.output_dir / "quickstart.png", dpi=150)
print(f"Wrote {options.output_dir / 'quickstart.png'}.")
figure  # noqa: B018  # pyright: ignore[reportUnusedExpression] (a notebook shows it)
