"""Causal language models of the recipes by name: those that packages bring, or any other of a hub or a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .offline import SMOLLM2_HUB_ID, smollm2_checkpoint
from .stories import STORIES_HUB_ID, stories_checkpoint


# What makes the checkpoint, and the model's name on the Hub.
BUNDLED = {
    "smollm2": (smollm2_checkpoint, SMOLLM2_HUB_ID),
    "stories15m": (stories_checkpoint, STORIES_HUB_ID),
}
MODEL_HELP = f"{', '.join(map(repr, BUNDLED))} (from packages, no hub), a Hub id or a path."


def model_path(name: str) -> str:
    """What `from_pretrained` takes; a bundled model is made ready first.

    Args:
        name (`str`): See `MODEL_HELP`.

    Returns:
        `str`: A folder or a Hub id.
    """
    return str(BUNDLED[name][0]()) if name in BUNDLED else name


def load_base(name: str, dtype: torch.dtype) -> Any:
    """A model without adapter.

    Args:
        name (`str`): See `MODEL_HELP`.
        dtype (`torch.dtype`): Of the weights.

    Returns:
        `PreTrainedModel`: A bundled one goes by its name on the Hub, so that adapters and cards do not name a folder
        of this machine.
    """
    base: Any = AutoModelForCausalLM.from_pretrained(model_path(name), dtype=dtype)
    if name in BUNDLED:
        base.name_or_path = base.config._name_or_path = BUNDLED[name][1]
    return base


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer, with a pad token (if need be that of the end of sequences)."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model_path(name))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_mark(name: str) -> str:
    """A short name for files of a cache, another one for other weights.

    Args:
        name (`str`): See `MODEL_HELP`.

    Returns:
        `str`: The name of a bundled model, of others with a digest of the weights' files or of the hub's revision.
    """
    if name in BUNDLED:
        return name
    folder = Path(name)
    if folder.is_dir():
        files = [file for file in sorted(folder.iterdir()) if file.is_file()]
        mark = repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    else:
        mark = str(getattr(AutoConfig.from_pretrained(name), "_commit_hash", None))
    return f"{folder.name}-{hashlib.sha256(f'{name} {mark}'.encode()).hexdigest()[:12]}"
