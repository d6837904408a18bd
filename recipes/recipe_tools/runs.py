"""Runs that are kept as files, one each, so that none is repeated and a recipe that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


# Files of a model's folder: those that hold weights, and others that make the model and its tokenizer.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
TEXT_PARTS = (".json", ".txt", ".model", ".jinja")
PART = 2**20


def read_run(file: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a run, if it is there.

    Args:
        file (`Path`): Of the run.
        identity (`Mapping[str, Any]`): What the run depends on, as plain values; stored as `run`.

    Returns:
        `dict[str, Any]` or `None`: What the file holds.

    Raises:
        ValueError: The file is of other settings or of other data, or no run.
    """
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("run"), dict):
        raise ValueError(f"{file} is no whole record of a run; delete it, and the same command does that run again.")
    if record["run"] != identity:
        was, is_now = _flat(record["run"]), _flat(identity)
        changed = [
            f"{key} was {was.get(key)!r}, is {is_now.get(key)!r}"
            for key in dict.fromkeys((*is_now, *was))
            if was.get(key) != is_now.get(key)
        ]
        raise ValueError(f"{file} is a run with other settings: {'; '.join(changed)}. Choose another --output_dir.")
    return record


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Entries of nested mappings by their joined names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return found


def file_marks(names: Mapping[str, str]) -> dict[str, str]:
    """What the local files among some names hold, so that a run is not taken for one of other data or weights.

    Args:
        names (`Mapping[str, str]`): By option what it names: a file, a folder, or something else (a Hub id, a word),
            which is left out.

    Returns:
        `dict[str, str]`: By option a sha256 of the file or the folder; neither paths nor times of files are in it.
            Of a model's folder, of its configuration, its tokenizer, and parts of its weights.
    """
    return {option: _digest(Path(name)) for option, name in names.items() if name and Path(name).exists()}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    if path.is_file():
        _feed_file(digest, path)
        return digest.hexdigest()
    is_model = (path / "config.json").is_file()
    # What a training left in the folder beside the model is none of it.
    files = [f for f in (path.iterdir() if is_model else path.rglob("*")) if f.is_file()]
    for file in sorted(files, key=lambda file: file.relative_to(path).as_posix()):
        weights = file.suffix in WEIGHTS
        if is_model and not (weights or file.suffix in TEXT_PARTS):
            continue
        digest.update(repr((file.relative_to(path).as_posix(), file.stat().st_size)).encode())
        _feed_file(digest, file, parts=is_model and weights)
    return digest.hexdigest()


def _feed_file(digest: Any, file: Path, parts: bool = False) -> None:
    """A whole file, or a MiB of its beginning, middle and end: weights may be of many GiB."""
    with file.open("rb") as opened:
        if not parts:
            while block := opened.read(PART):
                digest.update(block)
            return
        size = file.stat().st_size
        for start in (0, size // 2, max(size - PART, 0)):
            opened.seek(start)
            digest.update(opened.read(PART))


def file_name(method: str) -> str:
    """A method's name without what file systems refuse."""
    return re.sub(r"[^A-Za-z0-9.=,_+-]", "_", method)


def short_name(name: str) -> str:
    """A path without its folder, anything else as it is."""
    return Path(name).name if Path(name).exists() else name


def device_name() -> str:
    """The accelerator, or where there is none the CPU with its number of threads."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"


def all_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
