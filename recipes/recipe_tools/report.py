"""Results as JSON in the shape of PEFT's MetaMathQA benchmark.

An evaluation is a mapping with three groups: `target` (one mapping of metrics), `sources` and `choices` (one mapping
of metrics per name). The metrics are those returned by `recipe_tools.evaluate` and `recipe_tools.answers`.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftConfig


PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")

# Lists of right and wrong items, and the names of their flips.
FLIP_KEYS = {"correct": "flips", "correct_norm": "flips_norm", "forced_correct": "forced_flips"}
# Numbers whose difference says nothing.
COUNTS = ("tokens", "items", "forced_items", "seconds")


def results_json(
    *,
    experiment_name: str,
    created_at: str,
    total_time: float,
    train_time: float,
    train_config: Mapping[str, Any],
    peft_config: PeftConfig | None,
    metrics: Sequence[Mapping[str, Any]],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    curve: Sequence[Mapping[str, Any]],
    num_trainable_params: int,
    num_total_params: int,
    train_samples: int,
    train_total_tokens: int,
    provenance: Mapping[str, str],
    forgetting_source: str | Sequence[str] = "wikipedia",
    file_size: int = 0,
    memory_reserved: Sequence[int] = (),
    method: Mapping[str, Any] | None = None,
    further: Mapping[str, Any] | None = None,
    error_msg: str = "",
) -> dict[str, Any]:
    """Build the record of one run, readable by PEFT's `method_comparison/processing.py`.

    The last entry of `train_info.metrics` holds the test accuracy and `forgetting`, the rise of the source loss. PEFT
    measures it on its own Wikipedia sample in its own way: the figures are of one kind, but not comparable.

    Args:
        experiment_name (`str`): Such as `"lalora/smollm2-135m-r8"`.
        created_at (`str`): Start of the run, ISO 8601.
        total_time (`float`): Seconds of the whole run.
        train_time (`float`): Seconds of training without evaluation.
        train_config (`Mapping[str, Any]`): Arguments of the run; `model_id` is required.
        peft_config (`PeftConfig`, *optional*): Configuration of the adapter.
        metrics (`Sequence[Mapping[str, Any]]`): One row per logged step with PEFT's keys (`"step"`, `"train loss"`,
            `"train samples"`, `"train time"`, ...); the last row gives the final step and train loss.
        before (`Mapping[str, Any]`): Evaluation of the base model.
        after (`Mapping[str, Any]`): Evaluation of the tuned model.
        curve (`Sequence[Mapping[str, Any]]`): Intermediate points (step, seconds, losses).
        num_trainable_params (`int`): Trainable parameters.
        num_total_params (`int`): All parameters.
        train_samples (`int`): Samples seen.
        train_total_tokens (`int`): Tokens seen.
        provenance (`Mapping[str, str]`): What the data are, by name.
        forgetting_source (`str` or `Sequence[str]`, *optional*, defaults to `"wikipedia"`): Source of the `forgetting`
            figure; of several the mean of their losses.
        file_size (`int`, *optional*, defaults to 0): Bytes of the saved adapter.
        memory_reserved (`Sequence[int]`, *optional*): Accelerator bytes reserved at each step; empty on CPU.
        method (`Mapping[str, Any]`, *optional*): Settings of the method beyond the adapter's.
        further (`Mapping[str, Any]`, *optional*): Figures of a recipe's own, which go under `kalman_peft`.
        error_msg (`str`, *optional*, defaults to `""`): Why the run failed; empty on success.

    Returns:
        `dict[str, Any]`: Plain values only, ready for [`write_json`].

    Raises:
        ValueError: If `train_config` has no `model_id`, `metrics` is empty or `forgetting_source` was not evaluated.
    """
    if "model_id" not in train_config or not metrics:
        raise ValueError("`train_config` needs a `model_id` and `metrics` at least one row.")
    names = [forgetting_source] if isinstance(forgetting_source, str) else list(forgetting_source)
    if not names or not before["sources"].keys() & after["sources"].keys() >= set(names):
        raise ValueError(
            f"`forgetting_source` {forgetting_source!r} is not among the sources {list(after['sources'])}."
        )
    source_loss = [fmean(evaluation["sources"][name]["loss"] for name in names) for evaluation in (before, after)]
    final = {
        "step": metrics[-1]["step"],
        "test accuracy": after["target"].get("accuracy"),
        "train loss": metrics[-1]["train loss"],
        "train samples": train_samples,
        "train total tokens": train_total_tokens,
        "forgetting": source_loss[1] - source_loss[0],
    }
    reserved = torch.tensor(memory_reserved or [0], dtype=torch.float64)
    record = {
        "run_info": {
            "created_at": created_at,
            "total_time": total_time,
            "experiment_name": experiment_name,
            "peft_branch": None,
            "train_config": train_config,
            "peft_config": peft_config.to_dict() if peft_config else None,
            "error_msg": error_msg,
        },
        "train_info": {
            "accelerator_memory_reserved_avg": int(reserved.mean()),
            "accelerator_memory_max": int(reserved.max()),
            "accelerator_memory_reserved_99th": int(reserved.quantile(0.99)),
            "train_time": train_time,
            "file_size": file_size,
            "num_trainable_params": num_trainable_params,
            "num_total_params": num_total_params,
            "status": "failed" if error_msg else "success",
            "metrics": [*metrics, final],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {name: {"sha": None, "created_at": None} for name in provenance},
            "package_info": _package_info(),
            "system_info": {
                "system": platform.system(),
                "release": platform.release(),
                "version": platform.version(),
                "machine": platform.machine(),
                "processor": platform.processor(),
                "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
            },
            "pytorch_info": torch.__config__.show(),
        },
        "kalman_peft": {
            "version": _version("kalman_peft"),
            "method": dict(method or {}),
            "data": dict(provenance),
            "before": before,
            "after": after,
            "change": _changes(before, after),
            "curve": list(curve),
            **(further or {}),
        },
    }
    return _plain(record)


def write_json(record: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file whole or not at all.

    Args:
        record (`Mapping[str, Any]`): Plain values.
        path (`Path`): Target; its folder is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    scratch.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def flips(before: Sequence[bool], after: Sequence[bool]) -> dict[str, int]:
    """Count the items that were lost and won: `{"lost": right to wrong, "won": wrong to right}`."""
    pairs = list(zip(before, after, strict=True))
    return {"lost": sum(b and not a for b, a in pairs), "won": sum(a and not b for b, a in pairs)}


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Subtract numbers of equal names, and count flips where both sides list `correct`."""
    changes: dict[str, Any] = {}
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        if isinstance(old, Mapping):
            changes[key] = _changes(old, new)
        elif key in FLIP_KEYS:
            changes[FLIP_KEYS[key]] = flips(old, new)
        elif isinstance(old, int | float) and key not in COUNTS:
            changes[key] = new - old
    return dict(sorted(changes.items()))


def _plain(value: Any) -> Any:
    """Convert to JSON's types; generated texts (`per_item`) are left out."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if key != "per_item"}
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _package_info() -> dict[str, str | None]:
    info: dict[str, str | None] = {}
    for name in PACKAGES:
        info[f"{name}-version"], info[f"{name}-commit-hash"] = _version(name), None
    return info


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
