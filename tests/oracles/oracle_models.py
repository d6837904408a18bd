"""The models and data on which peers are asked, and what they see of them.

Peers know no masks, so that everything a peer sees is observed: sequences of one length, without padding. Ours reads
labels shifted by one; a peer is given the inputs before the last token and the targets that follow them.
"""

import torch
from conftest import make_lora_llama
from torch import nn

from kalman_peft import AdapterState, estimate_curvature


TARGETS = ["q_proj", "v_proj", "down_proj"]
PREFIX = "model."  # of the peers' names, from the wrapper below


class Logits(nn.Module):
    """ids (batch, time) -> logits (batch, classes, time), or (batch, classes) of the last position only."""

    def __init__(self, model, last_only=False):
        super().__init__()
        self.model, self.last_only = model, last_only

    def forward(self, ids):
        logits = self.model(input_ids=ids, use_cache=False).logits
        return logits[:, -1] if self.last_only else logits.mT


def make_model(**lora):
    # Eager attention: peers that use torch.func cannot look into the fused kernel. Curvature of A needs B != 0.
    model = make_lora_llama(target_modules=TARGETS, **lora).eval()
    for p in model.parameters():  # some peers ask for the gradient of all, and only the adapter is wanted
        p.requires_grad_(False)
    for p in AdapterState(model).parameters().values():
        p.requires_grad_(True)
    return model


def make_data(sequences=3, length=5, last_only=False, seed=3):
    """(batch for estimate_curvature, inputs and targets for a peer)."""
    ids = torch.randint(3, 17, (sequences, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    if last_only:  # one observed token per sequence, its prompt still carries gradient
        labels[:, :-1] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return batch, ids[:, :-1], ids[:, -1] if last_only else ids[:, 1:]


def empirical(model, batch, structure, **options):
    """Ours, from the true labels: (precision, number of observed tokens)."""
    options = {"space": "adapter", "dense_limit": 10_000, "progress_bar": False} | options
    precision, record = estimate_curvature(model, [batch], structure, "empirical", **options)
    return precision, record["num_tokens"]


def over_all_labels(probabilities, ours):
    """Sum over data and labels of p * ours(row, label): the exact Fisher, from the empirical one of single data.

    Args:
        probabilities: The model's, shape (data, classes).
        ours: Function (row, label) -> named tensors of the curvature of that datum with that label.
    """
    total = {}
    for row, p in enumerate(probabilities.detach()):
        for label, weight in enumerate(p):
            for name, value in ours(row, label).items():
                total[name] = total.get(name, 0) + weight * value
    return total


def peer_name(key):
    """Name that `Logits(model).named_modules()` gives to the factor of a state key."""
    return PREFIX + key.removesuffix(".weight") + ".default"
