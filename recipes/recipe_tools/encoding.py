"""Text to token ids and labels; padding and its labels are left to the collator."""

from __future__ import annotations

import re
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging


logger = logging.get_logger(__name__)

IGNORE_INDEX = -100
PROMPT = "Question: {question}\nAnswer:"


def tokenize_supervised(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 512,
    *,
    prompt: str = PROMPT,
    strip_calculator: bool = False,
) -> Dataset:
    """Encode problems with answers; only the answer and its end-of-sequence token carry labels.

    Prompt and answer are encoded apart, the answer with its leading space, so that the boundary of the mask is exact
    and generation from the prompt continues with the tokens seen in training. Rows are cut at `max_length` on the
    right; rows whose prompt leaves no room for an answer are dropped.

    Args:
        dataset (`Dataset`): Columns `question` and `answer`.
        tokenizer (`PreTrainedTokenizerBase`): Must have an end-of-sequence token.
        max_length (`int`, *optional*, defaults to 512): Longest sequence in tokens.
        prompt (`str`, *optional*): Template with the field `{question}`.
        strip_calculator (`bool`, *optional*, defaults to `False`): Remove GSM8K's `<<3*4=12>>` marks.

    Returns:
        `Dataset`: Columns `input_ids`, `attention_mask` and `labels` (lists of one length per row; -100 on the
        prompt).

    Raises:
        ValueError: If the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer` has no end-of-sequence token; set `tokenizer.eos_token`.")
    rows: list[dict[str, list[int]]] = []
    eos: Any = tokenizer.eos_token_id
    for row in dataset.to_list():
        answer = strip_calculator_marks(row["answer"]) if strip_calculator else row["answer"]
        encoded = encode_pair(tokenizer, prompt.format(question=row["question"]), f" {answer.strip()}")
        encoded["input_ids"].append(eos)
        encoded["labels"].append(eos)
        rows.append({key: values[:max_length] for key, values in encoded.items()})
    kept = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows if row["labels"][-1] != IGNORE_INDEX]
    if len(kept) < len(rows):
        logger.warning(f"Dropped {len(rows) - len(kept)} of {len(rows)} rows with prompts over {max_length} tokens.")
    return Dataset.from_list(kept)


def tokenize_text(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 256) -> Dataset:
    """Encode plain text; every token is a label. Texts are cut at `max_length`.

    Args:
        dataset (`Dataset`): Column `text`.
        tokenizer (`PreTrainedTokenizerBase`): Adds its own special tokens, if any.
        max_length (`int`, *optional*, defaults to 256): Longest sequence in tokens.

    Returns:
        `Dataset`: Columns `input_ids`, `attention_mask` and `labels`.
    """
    input_ids = tokenizer(list(dataset["text"]), truncation=True, max_length=max_length)["input_ids"]
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in input_ids if len(ids) > 1]
    return Dataset.from_list(rows)


def tokenize(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 512, **supervised: Any
) -> Dataset:
    """Encode problems or text, whichever the columns say.

    Args:
        dataset (`Dataset`): Column `text`, or `question` and `answer`.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        max_length (`int`, *optional*, defaults to 512): Longest sequence in tokens.
        **supervised (`Any`): Further options of [`tokenize_supervised`].

    Returns:
        `Dataset`: Columns `input_ids`, `attention_mask` and `labels`.
    """
    if "text" in dataset.column_names:
        return tokenize_text(dataset, tokenizer, max_length)
    return tokenize_supervised(dataset, tokenizer, max_length, **supervised)


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> dict[str, list[int]]:
    """Encode a context without labels followed by a continuation with labels.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Special tokens are added to the context only.
        context (`str`): What is given.
        continuation (`str`): What is scored.

    Returns:
        `dict[str, list[int]]`: `input_ids` and `labels`.
    """
    given = list(tokenizer(context)["input_ids"])
    scored = list(tokenizer(continuation, add_special_tokens=False)["input_ids"])
    return {"input_ids": given + scored, "labels": [IGNORE_INDEX] * len(given) + scored}


def strip_calculator_marks(answer: str) -> str:
    """Remove GSM8K's calculator marks: `"9*60=<<9*60=540>>540"` becomes `"9*60=540"`."""
    return re.sub(r"<<[^<>]*>>", "", answer)
