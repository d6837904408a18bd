"""Rows that a base model writes itself, at temperature 1: written once, and kept in the cache."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from kalman_peft.self_source import rows_from_tensors, sample_source, tensors_from_rows

from .models import load_base, load_tokenizer, model_mark
from .offline import build_once, default_cache_dir


# One seed per part, apart from those of runs: what is held out is never what a method has seen.
SEEDS = {"fit": 1, "heldout": 2}
STORIES = {"fit": 96, "heldout": 48}
STORY_TOKENS = 256
_BATCH = 32


def self_written(
    model: str, dtype: torch.dtype, part: str, rows: int, length: int, cache_dir: Path | None = None
) -> tuple[Dataset, float]:
    """Rows that a model writes, from the cache if they are there.

    Args:
        model (`str`): As for `recipe_tools.models`.
        dtype (`torch.dtype`): Of its weights.
        part (`str`): "fit" or "heldout"; no row is in both.
        rows (`int`): How many.
        length (`int`): Tokens per row, with the one that it starts from.
        cache_dir (`Path`, *optional*): By default [`default_cache_dir`].

    Returns:
        `tuple[Dataset, float]`: Columns `input_ids`, `attention_mask` and `labels`, and the seconds that their writing
        took, now or when they were written.
    """
    cache = cache_dir or default_cache_dir()
    name = f"self-{model_mark(model)}-{str(dtype).rpartition('.')[2]}-{part}-{rows}x{length}"
    folder = build_once(cache / name, lambda scratch: _write(scratch, model, dtype, part, rows, length))
    seconds = json.loads((folder / "info.json").read_text())["seconds"]
    return Dataset.from_list(rows_from_tensors(load_file(folder / "rows.safetensors"))), seconds


def _write(folder: Path, model: str, dtype: torch.dtype, part: str, rows: int, length: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load_base(model, dtype).to(device), load_tokenizer(model)
    began = time.perf_counter()
    written = sample_source(base, tokenizer, rows, length, seed=SEEDS[part], batch_size=_BATCH)
    seconds = time.perf_counter() - began
    save_file(tensors_from_rows(written), folder / "rows.safetensors")
    (folder / "info.json").write_text(json.dumps({"seconds": seconds}))


def written_stories() -> tuple[list[str], list[str]]:
    """Stories by stories15M as text.

    Returns:
        `tuple[list[str], list[str]]`: To fit and held out; no story is in both.
    """
    tokenizer = load_tokenizer("stories15m")
    parts: dict[str, list[str]] = {}
    for part, count in STORIES.items():
        rows, _ = self_written("stories15m", torch.float32, part, count, STORY_TOKENS)
        parts[part] = list(dict.fromkeys(_first_story(tokenizer, ids) for ids in rows["input_ids"]))
    return parts["fit"], [text for text in parts["heldout"] if text not in set(parts["fit"])]


def _first_story(tokenizer: Any, ids: list[int]) -> str:
    """The text up to the mark at which the next story begins."""
    bos = tokenizer.bos_token_id
    end = ids.index(bos, 1) if bos in ids[1:] else len(ids)
    return tokenizer.decode(ids[1:end]).strip()
