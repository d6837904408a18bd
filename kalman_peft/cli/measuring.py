"""`kalman-peft evaluate`: what an adapter learned and what it moved, on any data."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from .loading import (
    ModelOptions,
    TextOptions,
    collator,
    load_adapter,
    load_base,
    load_named,
    load_tokenizer,
    tokenized,
)
from .parsing import Command
from .reporting import table


@dataclass
class EvaluateOptions:
    """What is measured."""

    adapter: str = field(metadata={"help": "Folder or name of the adapter."})
    dataset: list[str] = field(metadata={"help": "Data, each perhaps as name=place; see `train --help`."})
    split: str = field(default="train", metadata={"help": "Of the data."})
    samples: int | None = field(default=None, metadata={"help": "Rows of each, from the first; all by default."})
    batch_size: int = field(default=4, metadata={"help": "Sequences at a time."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.samples is not None and self.samples < 1):
            raise ValueError(f"batch_size and samples must be >= 1, got {self.batch_size} and {self.samples}.")


def evaluate(model: ModelOptions, options: EvaluateOptions, text: TextOptions) -> None:
    """Print a table of loss and divergence, one row per dataset.

    Args:
        model (`ModelOptions`): The base model.
        options (`EvaluateOptions`): The adapter and the data.
        text (`TextOptions`): How raw data become tokens.
    """
    from accelerate import PartialState
    from torch.utils.data import DataLoader

    from ..losses import divergence_from_base

    device = PartialState().device
    tokenizer = load_tokenizer(model.model)
    peft_model = load_adapter(load_base(model), options.adapter).to(device)
    found = {}
    for name, raw in load_named(options.dataset, options.split).items():
        rows = tokenized(raw, tokenizer, text.max_length)
        rows = rows if options.samples is None else rows.select(range(min(options.samples, len(rows))))
        columns = [c for c in ("input_ids", "attention_mask", "labels") if c in rows.column_names]
        loader = DataLoader(rows.select_columns(columns), options.batch_size, collate_fn=collator(tokenizer))
        found[name] = divergence_from_base(peft_model, loader, lambda batch: batch.to(device))
    figures = ("loss", "base_loss", "rise", "kl")
    rows = [[name, *(f"{seen[key]:.4f}" for key in figures), str(seen["labels"])] for name, seen in found.items()]
    print(table(["nats per token", "loss", "base model", "rise", "KL from base", "tokens"], rows))
    if options.output is not None:
        Path(options.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


COMMANDS = {
    "evaluate": Command(
        evaluate,
        (ModelOptions, EvaluateOptions, TextOptions),
        """Loss of an adapter on data, that of the base model, and the divergence between the two.

examples:
  kalman-peft evaluate --model HuggingFaceTB/SmolLM2-135M --adapter out --dataset target=maths.jsonl kept=keep.jsonl
  kalman-peft evaluate --config eval.yaml --output figures.json
""",
    )
}
