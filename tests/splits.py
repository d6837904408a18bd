"""The same filter steps from a batch in one piece, in micro-batches, and in shares of several processes."""

import torch
from conftest import make_batch, make_lora_bert, make_lora_llama

from kalman_peft import create_loko_optimizer
from kalman_peft.loko import MEMORIES


COLUMNS = {
    "sampled": ("language", {"columns": "sampled", "curvature_every": 1}),
    "sampled_each": ("language", {"columns": "sampled", "per_sequence": True, "num_columns": 2, "max_columns": 3}),
    "empirical": ("language", {"columns": "empirical"}),
    "exact": ("classification", {"columns": "exact", "max_columns": 4}),
    "rademacher": ("classification", {"columns": "rademacher", "per_sequence": False, "damping": 0.1}),
    "rademacher_each": ("classification", {"columns": "rademacher", "damping": 0.1, "gain": "memory"}),
}
# Every structure of memory, every kind of column, and the published filter.
CASES = {
    f"{memory}-{name}": (task, options | {"memory": memory})
    for memory in MEMORIES
    for name, (task, options) in COLUMNS.items()
    if not (memory == "diagonal_covariance" and options.get("gain") == "memory")
} | {"paper": ("classification", {"mode": "paper"})}


def make(task):
    torch.manual_seed(0)
    if task == "language":
        return make_lora_llama(target_modules=["q_proj", "down_proj"])
    return make_lora_bert(target_modules=["value"]).eval()


def batches(task, steps=2):
    found = []
    for seed in range(steps):
        batch = make_batch(lengths=(4, 7, 3, 6, 5), seed=seed, prompt=2 if task == "language" else 0)
        if task == "language":
            batch["labels"][2] = -100  # a sequence without labels
        else:
            batch["labels"] = torch.tensor([2, 0, 1, -100, 2])
        found.append(batch)
    return found


def pieces(batch, accumulation=1, processes=1, rank=0):
    """Micro-batches of one process: the joined batch is those of all, by micro-batch first; padding is cut off."""
    chunks = torch.arange(len(batch["input_ids"])).tensor_split(accumulation)
    for chunk in chunks:
        own = chunk.tensor_split(processes)[rank]
        part = {key: value[own] for key, value in batch.items()}
        width = int(part["attention_mask"].sum(1).max())
        yield {key: value[:, :width] if value.dim() == 2 else value for key, value in part.items()}


def observe(optimizer, model, part, factor=1.0):
    logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
    optimizer.observe(logits * factor, part["labels"])


def state_of(optimizer):
    """Weights, and what the memories say: their gains on fixed vectors, and their traces."""
    result = {}
    for j, memory in enumerate(optimizer._memories):
        view = memory.view
        probe = torch.randn(view.shape, generator=torch.Generator().manual_seed(j), dtype=torch.float64)
        result |= {f"{j}-weights": view.read(), f"{j}-gain": memory.gain(probe), f"{j}-traces": memory.traces()}
    seen = {key: float(value) for key, value in optimizer.diagnostics.items()}
    return result | {key: torch.tensor(seen[key]) for key in ("innovation", "trust", "loss") if key in seen}


def filtered(case, accumulation=1, processes=1, rank=0):
    task, options = CASES[case]
    model = make(task)
    optimizer = create_loko_optimizer(model, **options)
    for batch in batches(task):
        for part in pieces(batch, accumulation, processes, rank):
            observe(optimizer, model, part)
        optimizer.step()
    return state_of(optimizer)
