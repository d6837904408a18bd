"""Files of a KalmanNetwork: tensors with a fingerprint, and a configuration beside them, written as a belief's are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..belief import tensors_fingerprint, write_atomically


WEIGHTS, CONFIG = "kbt.safetensors", "kbt_config.json"
_FORMAT = 1


def write_state(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write both files, each atomically; the tensors carry the configuration too.

    Args:
        folder (`Path`): Created if missing.
        tensors (`Mapping[str, Tensor]`): By name.
        config (`Mapping[str, Any]`): For JSON.

    Raises:
        ValueError: A tensor holds NaN or Inf.
    """
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    bad = [name for name, t in plain.items() if not torch.isfinite(t).all()]
    if bad:
        raise ValueError(f"{bad[0]} contains NaN or Inf; nothing is written.")
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"format": _FORMAT, "fingerprint": tensors_fingerprint(plain), **config}
    text = json.dumps(whole, indent=2, sort_keys=True)
    # Whatever interrupts the two writes, the tensors can be read.
    write_atomically(folder / WEIGHTS, lambda p: save_file(plain, p, {"config": text}))
    write_atomically(folder / CONFIG, lambda p: p.write_text(text + "\n"))


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_state` wrote.

    Args:
        folder (`Path`): With the files; the tensors' own configuration counts.

    Returns:
        `tuple[dict[str, Tensor], dict[str, Any]]`: Tensors on the CPU, and the configuration.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, altered, or of another format.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            config = json.loads((file.metadata() or {}).get("config", "null"))
            # Copies: a file's tensors may be aligned otherwise than new memory, and products then round otherwise.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read; it is truncated or no safetensors file ({error}).") from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise ValueError(f"{path} is not of format {_FORMAT}, which this version reads.")
    if config["fingerprint"] != tensors_fingerprint(tensors):
        raise ValueError(f"{path} was altered: its tensors do not have the fingerprint it states.")
    return tensors, config
