"""Models, adapters and data of the commands, by name or file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from ..observations import IGNORE_INDEX


_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_DATA_HELP = (
    "A .jsonl, .json, .csv, .parquet or .txt file, a folder of `save_to_disk`, or a name on the Hub, 'owner/name' or "
    "'owner/name:configuration'."
)


@dataclass
class ModelOptions:
    """The base model."""

    model: str = field(metadata={"help": "Base model: a folder, or a name on the Hub."})
    dtype: str = field(default="auto", metadata={"help": "Of the base model's weights, such as bfloat16."})


@dataclass
class LoraOptions:
    """The adapter: an old one, or a new one."""

    adapter: str | None = field(
        default=None, metadata={"help": "Folder or name of an adapter to go on from; a new one without it."}
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of a new adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "Scaling of a new adapter, times the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of a new adapter."})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Layers of a new adapter, or 'all-linear'."}
    )

    def __post_init__(self) -> None:
        if self.adapter is None:
            return
        changed = [f.name for f in fields(LoraOptions) if f.name != "adapter" and getattr(self, f.name) != _default(f)]
        if changed:
            raise ValueError(f"{', '.join(changed)}: of a new adapter, but --adapter {self.adapter} is given.")

    def config(self) -> Any:
        """The `LoraConfig` of a new adapter."""
        from peft import LoraConfig

        modules = self.target_modules
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules="all-linear" if modules == ["all-linear"] else modules,
            task_type="CAUSAL_LM",
        )


@dataclass
class DataOptions:
    """The data."""

    dataset: str = field(metadata={"help": f"Data. {_DATA_HELP}"})
    split: str = field(default="train", metadata={"help": "Of the data; also of datasets, as in 'train[:200]'."})


@dataclass
class TextOptions:
    """How raw data become tokens."""

    max_length: int = field(default=1024, metadata={"help": "Longest sequence in tokens; longer ones are cut."})


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer, with a padding token."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_base(options: ModelOptions) -> Any:
    """The base model."""
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)


def load_adapter(base: Any, adapter: str, *, trainable: bool = False) -> Any:
    """The base model with a saved adapter."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, adapter, is_trainable=trainable)


def load_data(name: str, split: str) -> Any:
    """Rows as they are.

    Args:
        name (`str`): File, folder or name.
        split (`str`): See [`DataOptions`]; of a folder of `save_to_disk` the whole is taken unless it has splits.

    Returns:
        `Dataset`: Raw or tokenised.

    Raises:
        ImportError: datasets is missing.
        FileNotFoundError: No such file.
        ValueError: It cannot be read, or is empty.
    """
    try:
        from datasets import Dataset, load_dataset, load_from_disk
    except ImportError as error:
        raise ImportError('Reading data needs datasets: pip install "kalman_peft[cli]"') from error
    path = Path(name)
    kind = _FILES.get(path.suffix.lower())
    if path.is_dir() and any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
        found = load_from_disk(name)
        rows = found if isinstance(found, Dataset) else found[split]
    elif kind is not None:
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {name}.")
        rows = load_dataset(kind, data_files=name, split=split)
    else:
        repository, _, configuration = name.partition(":")
        rows = load_dataset(repository, configuration or None, split=split)
    if not len(rows):  # type: ignore[arg-type]
        raise ValueError(f"{name} has no rows in split {split!r}.")
    return rows


def load_named(names: Sequence[str], split: str) -> dict[str, Any]:
    """Several datasets, each `name=place` or a place alone, which is called by its last part.

    Args:
        names (`Sequence[str]`): Of the datasets.
        split (`str`): Of all.

    Returns:
        `dict[str, Dataset]`: By name.

    Raises:
        ValueError: A name comes twice.
    """
    found: dict[str, Any] = {}
    for text in names:
        name, _, place = text.rpartition("=")
        name = name or Path(place.partition(":")[0]).stem
        if name in found:
            raise ValueError(f"Two datasets are called {name!r}; name them, as in {name}2={place}.")
        found[name] = load_data(place, split)
    return found


def tokenized(rows: Any, tokenizer: Any, max_length: int) -> Any:
    """Columns `input_ids`, `attention_mask` and `labels`; labels are the completion, or all of a text.

    Args:
        rows (`Dataset`): With `input_ids` already, with `text`, or with `prompt` and `completion`.
        tokenizer (`PreTrainedTokenizerBase`): Its end of sequence goes to the end of each.
        max_length (`int`): Longest sequence in tokens.

    Returns:
        `Dataset`: Without rows that have no labels within `max_length`.

    Raises:
        ValueError: Other columns, or nothing is left.
    """
    columns = rows.column_names
    if "input_ids" in columns:
        return rows if "labels" in columns else rows.map(lambda row: {"labels": row["input_ids"]})
    if not ("text" in columns or {"prompt", "completion"} <= set(columns)):
        remedy = " `kalman-peft train --sft` takes conversations." if "messages" in columns else ""
        raise ValueError(f"Data need a column `text`, or `prompt` and `completion`; found {columns}.{remedy}")
    end = tokenizer.eos_token or ""

    def encode(row: Mapping[str, Any]) -> dict[str, list[int]]:
        given = tokenizer(row["prompt"])["input_ids"] if "text" not in columns else []
        text = row["text"] if "text" in columns else row["completion"]
        scored = tokenizer(text.removesuffix(end) + end, add_special_tokens=not given)["input_ids"]
        ids = (given + scored)[:max_length]
        labels = ([IGNORE_INDEX] * len(given) + scored)[:max_length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    encoded = rows.map(encode, remove_columns=columns)
    kept = encoded.filter(lambda row: any(label != IGNORE_INDEX for label in row["labels"][1:]))
    if not len(kept):
        raise ValueError(f"No row has anything to predict within max_length={max_length} tokens.")
    return kept


def collator(tokenizer: Any) -> Any:
    """Pads a batch."""
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE_INDEX)


def _default(f: Any) -> Any:
    return f.default_factory() if callable(f.default_factory) else f.default
