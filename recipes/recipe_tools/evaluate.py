"""Losses, multiple choice and divergence from the base model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase

from .encoding import IGNORE_INDEX, encode_pair
from .scoring import LOGIT_ROWS, Rows, evaluating, next_token_logits, padded_batches, score_rows


def text_loss(
    model: nn.Module, rows: Rows, *, max_tokens: int = 2048, description: str = "text loss"
) -> dict[str, float]:
    """Compute the mean negative log-likelihood per labelled token, each token with the same weight.

    Args:
        model (`nn.Module`): Causal language model.
        rows (`Rows`): Columns `input_ids` and `labels` (-100: not scored).
        max_tokens (`int`, *optional*, defaults to 2048): Padded tokens per batch.
        description (`str`, *optional*): Label of the progress bar.

    Returns:
        `dict[str, float]`: `loss` in nats per token and `tokens`.

    Raises:
        ValueError: If no token carries a label.
    """
    scores = score_rows(model, rows, max_tokens=max_tokens, description=description)
    nll = torch.cat(scores.nll)
    if not len(nll):
        raise ValueError("No token carries a label: `rows` is empty or every label is -100.")
    return {"loss": float(nll.mean()), "tokens": len(nll)}


def choice_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Rows,
    *,
    max_tokens: int = 2048,
    description: str = "choices",
) -> dict[str, Any]:
    """Rank the choices of each item by log-likelihood.

    Args:
        model (`nn.Module`): Causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        items (`Rows`): Columns `contexts`, `continuations`, `label` of [`load_choices`].
        max_tokens (`int`, *optional*, defaults to 2048): Padded tokens per batch.
        description (`str`, *optional*): Label of the progress bar.

    Returns:
        `dict[str, Any]`: `accuracy` (summed log-likelihood); `accuracy_norm` (divided by the continuation's
        characters); `loss` (mean over items of the negative log of the right choice's share of the choices'
        likelihood, a graded signal); `items`; and the lists `correct` and `correct_norm` for counting flips.
    """
    encoded, owners, characters = [], [], []
    for owner in range(len(items)):
        for context, continuation in zip(items[owner]["contexts"], items[owner]["continuations"], strict=True):
            encoded.append(encode_pair(tokenizer, context, continuation))
            owners.append(owner)
            characters.append(len(continuation))
    scores = score_rows(model, encoded, max_tokens=max_tokens, description=description)
    likelihood = -torch.stack([nll.sum() for nll in scores.nll])  # (choices of all items,)
    normalised = likelihood / torch.tensor(characters)
    owner_of = torch.tensor(owners)
    correct, correct_norm, loss = [], [], 0.0
    for owner in range(len(items)):
        mine, label = owner_of == owner, int(items[owner]["label"])
        correct.append(int(likelihood[mine].argmax()) == label)
        correct_norm.append(int(normalised[mine].argmax()) == label)
        loss -= float(likelihood[mine].log_softmax(0)[label])
    return {
        "accuracy": sum(correct) / len(items),
        "accuracy_norm": sum(correct_norm) / len(items),
        "loss": loss / len(items),
        "items": len(items),
        "correct": correct,
        "correct_norm": correct_norm,
    }


def kl_from_base(
    model: nn.Module,
    rows: Rows,
    *,
    base: nn.Module | None = None,
    max_tokens: int = 2048,
    description: str = "KL from base",
) -> dict[str, float]:
    """Compute the mean KL(base || tuned) per labelled token, and both losses from the same forward passes.

    Whole distributions are compared in float32, one batch at a time.

    Args:
        model (`nn.Module`): The tuned model; without `base` a `PeftModel` with an active adapter.
        rows (`Rows`): Columns `input_ids` and `labels` (-100: not compared).
        base (`nn.Module`, *optional*): The base model, on the same device; by default `model` with its adapter
            disabled, which is no base where a method has changed the weights below the adapter.
        max_tokens (`int`, *optional*, defaults to 2048): Padded tokens per batch.
        description (`str`, *optional*): Label of the progress bar.

    Returns:
        `dict[str, float]`: `kl`, `loss` and `base_loss` in nats per token, and `tokens`.

    Raises:
        TypeError: If there is no `base`, and the model has no adapter to disable.
    """
    disable_adapter = getattr(model, "disable_adapter", None) if base is None else nullcontext
    if disable_adapter is None:
        raise TypeError(
            f"`model` must be a PeftModel whose adapter can be disabled, got {type(model).__name__}; or give `base`."
        )
    reference = model if base is None else base
    sums, tokens = torch.zeros(3, dtype=torch.float64), 0  # KL, loss, base loss
    with evaluating(model), evaluating(reference):
        for _, inputs, labels in padded_batches(model, rows, max_tokens, description):
            scored = labels != IGNORE_INDEX
            tuned = next_token_logits(model, inputs)[scored]  # (tokens, vocabulary)
            with disable_adapter():
                given = next_token_logits(reference, inputs)[scored]
            for p, q, y in zip(*(x.split(LOGIT_ROWS) for x in (given, tuned, labels[scored])), strict=True):
                p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
                kl = F.kl_div(q, p, reduction="sum", log_target=True)
                sums += torch.stack([kl, F.nll_loss(q, y, reduction="sum"), F.nll_loss(p, y, reduction="sum")]).cpu()
            tokens += int(scored.sum())
    kl, loss, base_loss = (sums / tokens).tolist()
    return {"kl": kl, "loss": loss, "base_loss": base_loss, "tokens": tokens}
