"""Log-likelihoods of labelled tokens, exact whatever the batching."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from .encoding import IGNORE_INDEX


# Float32 logits are made for this many positions at a time: 256 rows of a vocabulary of 128k are 0.13 GB.
LOGIT_ROWS = 256

Rows = Dataset | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RowScores:
    """What the model makes of the labelled tokens of each row.

    Attributes:
        nll (`list[Tensor]`, each of shape `(tokens,)`, float64): Negative log-likelihoods in nats.
        hits (`list[Tensor]`, each of shape `(tokens,)`, bool): Whether the token was the most likely one.
    """

    nll: list[Tensor]
    hits: list[Tensor]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Disable gradients and dropout; every submodule's own training flag is restored afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def length_sorted_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group indices of similar lengths, the longest first, so that memory errors come early and padding is small.

    Args:
        lengths (`Sequence[int]`): Length of each row.
        max_tokens (`int`): Bound on rows times longest row; a longer single row is a batch of its own.

    Returns:
        `list[list[int]]`: Each index once.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def score_rows(model: nn.Module, rows: Rows, *, max_tokens: int = 2048, description: str = "score") -> RowScores:
    """Score the labelled tokens of each row.

    Args:
        model (`nn.Module`): Causal language model.
        rows (`Rows`): Columns `input_ids` and `labels` (-100: not scored). A first token is never scored.
        max_tokens (`int`, *optional*, defaults to 2048): Padded tokens per batch.
        description (`str`, *optional*): Label of the progress bar.

    Returns:
        `RowScores`: In the order of `rows`.
    """
    nll = [torch.empty(0, dtype=torch.float64)] * len(rows)
    hits = [torch.empty(0, dtype=torch.bool)] * len(rows)
    with evaluating(model):
        for batch, inputs, labels in padded_batches(model, rows, max_tokens, description):
            scored = labels != IGNORE_INDEX
            logits, targets = (
                next_token_logits(model, inputs)[scored],
                labels[scored],
            )  # (tokens, vocabulary), (tokens,)
            pairs = list(zip(logits.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True))
            losses = torch.cat([F.cross_entropy(part.float(), target, reduction="none") for part, target in pairs])
            greedy = torch.cat([part.argmax(-1) == target for part, target in pairs])
            counts = scored.sum(1).tolist()
            parts = zip(batch, losses.cpu().double().split(counts), greedy.cpu().split(counts), strict=True)
            for index, row_losses, row_greedy in parts:
                nll[index], hits[index] = row_losses, row_greedy
    return RowScores(nll, hits)


def padded_batches(
    model: nn.Module, rows: Rows, max_tokens: int, description: str
) -> Iterator[tuple[list[int], dict[str, Tensor], Tensor]]:
    """Pad rows of similar length together.

    Padding is always on the right, where causal attention cannot see it and position ids need no care; the pad id is
    then of no consequence and the tokenizer's padding side plays no part.

    Yields:
        tuple[list[int], dict[str, Tensor], Tensor]: Row indices, inputs `(n, T)` and next-token labels `(n, T - 1)`.
    """
    device = next(model.parameters()).device
    examples = [rows[i] for i in range(len(rows))]
    batches = length_sorted_batches([len(example["input_ids"]) for example in examples], max_tokens)
    for batch in logging.tqdm(batches, desc=description, leave=False):
        ids = [torch.tensor(examples[i]["input_ids"]) for i in batch]
        labels = [torch.tensor(examples[i]["labels"]) for i in batch]
        inputs = {
            "input_ids": pad_sequence(ids, batch_first=True).to(device),
            "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True).to(device),
        }
        yield batch, inputs, pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)[:, 1:].to(device)


def next_token_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Run the model and drop the last position, which predicts nothing that is known."""
    return model(**inputs, use_cache=False).logits[:, :-1]  # (n, T - 1, vocabulary)
