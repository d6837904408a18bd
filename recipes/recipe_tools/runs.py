"""Runs that are kept as files, one each, so that none is repeated and a recipe that was killed goes on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def read_run(file: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a run, if it is there.

    Args:
        file (`Path`): Of the run.
        identity (`Mapping[str, Any]`): What the run depends on, as plain values; stored as `run`.

    Returns:
        `dict[str, Any]` or `None`: What the file holds.

    Raises:
        ValueError: The file is of other settings.
    """
    if not file.exists():
        return None
    record = json.loads(file.read_text())
    if record["run"] != identity:
        raise ValueError(f"{file} is a run with other settings: {record['run']}. Choose another --output_dir.")
    return record


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
