"""Final answers of worked solutions: read from text, generated greedily, or predicted after a given solution."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .encoding import PROMPT, encode_pair
from .scoring import evaluating, length_sorted_batches, score_rows


MARK = "####"
# A sign counts only where no word or number precedes it: the last number of "12-3" is 3.
NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:(?<=\$)-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def final_number(text: str) -> str | None:
    """Read the number after `####`, or else the last number, in a canonical form.

    Args:
        text (`str`): A worked solution such as `"... #### $1,250.00"`. Text from the next `Question:` on is ignored: a
            model that does not stop goes on to invent problems.

    Returns:
        `str` or `None`: Digits without commas, currency signs, and trailing zeros (`"1250"`); `None` without a number.
    """
    text = text.split("\nQuestion:")[0]
    _, marked, after = text.partition(MARK)
    numbers = NUMBER.findall(after.partition("\n")[0] if marked else text)
    if not numbers:
        return None
    value = Decimal(re.sub(r"[,$]", "", numbers[0] if marked else numbers[-1]))
    plain = f"{value:f}"
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if plain == "-0" else plain


def final_text(text: str) -> str | None:
    """Read the answer after `####`, or else the first line, for answers that are not numbers."""
    text = text.split("\nQuestion:")[0]
    _, marked, after = text.partition(MARK)
    return (after if marked else text).strip().partition("\n")[0].strip() or None


def answer_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    max_new_tokens: int = 200,
    max_tokens: int = 8192,
    prompt: str = PROMPT,
    extract: Callable[[str], str | None] = final_number,
    description: str = "generated answers",
) -> dict[str, Any]:
    """Generate solutions greedily and compare the final answers.

    Args:
        model (`nn.Module`): Causal language model with `generate`.
        tokenizer (`PreTrainedTokenizerBase`): Needs a pad token (the end-of-sequence token will do).
        dataset (`Dataset`): Columns `question` and `answer`.
        max_new_tokens (`int`, *optional*, defaults to 200): Longest solution in tokens.
        max_tokens (`int`, *optional*, defaults to 8192): Bound on rows times (longest prompt + `max_new_tokens`).
        prompt (`str`, *optional*): Template with the field `{question}`, the one of training.
        extract (`Callable`, *optional*, defaults to [`final_number`]): Reads an answer from a solution.
        description (`str`, *optional*): Label of the progress bar.

    Returns:
        `dict[str, Any]`: `accuracy`, `answered` (share of solutions with a readable answer), `items`, the list
        `correct`, and `per_item` (`completion`, `prediction`, `answer`).
    """
    device = next(model.parameters()).device
    prompts = [list(tokenizer(prompt.format(question=question))["input_ids"]) for question in dataset["question"]]
    eos: Any = tokenizer.eos_token_id
    stops = {eos}
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops |= set(own) if isinstance(own, list) else {own}
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop for stop in stops if stop is not None),
        pad_token_id=tokenizer.pad_token_id,
    )
    completions = [""] * len(prompts)
    batches = length_sorted_batches([len(ids) + max_new_tokens for ids in prompts], max_tokens)
    with evaluating(model):
        for batch in logging.tqdm(batches, desc=description, leave=False):
            # Generation appends on the right, so prompts are padded on the left, whatever the tokenizer's setting.
            inputs = tokenizer.pad(
                {"input_ids": [prompts[i] for i in batch]}, padding_side="left", return_tensors="pt"
            ).to(device)
            output = model.generate(**inputs, generation_config=config)  # pyright: ignore[reportCallIssue]
            new = output[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                completions[i] = text
    answers = [extract(answer) for answer in dataset["answer"]]
    predictions = [extract(completion) for completion in completions]
    correct = [p is not None and p == a for p, a in zip(predictions, answers, strict=True)]
    return {
        "accuracy": sum(correct) / len(correct),
        "answered": sum(p is not None for p in predictions) / len(correct),
        "items": len(correct),
        "correct": correct,
        "per_item": [
            {"completion": c, "prediction": p, "answer": a}
            for c, p, a in zip(completions, predictions, answers, strict=True)
        ],
    }


def teacher_forced_answer_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    max_tokens: int = 2048,
    prompt: str = PROMPT,
    description: str = "target solutions",
) -> dict[str, Any]:
    """Score the worked solutions, and ask whether the final answers are the most likely tokens after them.

    A graded signal for models too small to solve problems by themselves, and much easier than [`answer_accuracy`]:
    the solution up to `####` is given. Where there is no `####`, all of the answer is asked for. One forward pass
    serves the loss and the accuracy.

    Args:
        model (`nn.Module`): Causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with an end-of-sequence token.
        dataset (`Dataset`): Columns `question` and `answer`.
        max_tokens (`int`, *optional*, defaults to 2048): Padded tokens per batch.
        prompt (`str`, *optional*): Template with the field `{question}`, the one of training.
        description (`str`, *optional*): Label of the progress bar.

    Returns:
        `dict[str, Any]`: `loss` (nats per token of solution, answer and end of sequence, as in training) and `tokens`;
        `forced_accuracy` (all tokens of an answer right), `forced_token_accuracy` and `answer_loss` (over answer
        tokens), `forced_items` and the list `forced_correct`. The keys differ from those of [`answer_accuracy`].
    """
    eos: Any = tokenizer.eos_token_id
    rows, spans = [], []
    for row in dataset.to_list():
        solution, mark, answer = row["answer"].strip().rpartition(MARK)
        # "#### 540" may be cut before the space without changing its tokens: pre-tokenizers cut there themselves.
        context = encode_pair(tokenizer, prompt.format(question=row["question"]), f" {solution}{mark}" if mark else "")
        tail = list(tokenizer(f" {answer.strip()}", add_special_tokens=False)["input_ids"])
        rows.append({key: values + tail + [eos] for key, values in context.items()})
        spans.append(slice(-len(tail) - 1, -1))
    scores = score_rows(model, rows, max_tokens=max_tokens, description=description)
    nll = torch.cat(scores.nll)
    hits = [row[span] for row, span in zip(scores.hits, spans, strict=True)]
    correct = [bool(row.all()) for row in hits]
    return {
        "loss": float(nll.mean()),
        "tokens": len(nll),
        "forced_accuracy": sum(correct) / len(correct),
        "forced_token_accuracy": float(torch.cat(hits).double().mean()),
        "answer_loss": float(torch.cat([row[span] for row, span in zip(scores.nll, spans, strict=True)]).mean()),
        "forced_items": len(correct),
        "forced_correct": correct,
    }
