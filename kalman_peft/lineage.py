"""What a belief comes from: the base model it is over, and the data of every task it remembers, each by a fingerprint.

`Belief.info["lineage"]` is a list of plain dicts, one per task and source, oldest first. No dates: the same run gives
the same lineage.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .adapters import AdapterState
from .distributed import whole
from .sources import SINGLE, first_rows, is_streaming


LINEAGE = "lineage"  # key of `Belief.info`
Entry = dict[str, Any]


def lineage_entry(
    name: str, dataset: Any, adapter: Mapping[str, Any], *, num_labels: float | None, num_sequences: int | None
) -> Entry:
    """One task, as a belief remembers it.

    Args:
        name (`str`): Of the task or source; a name that the dataset brings itself stands for "source".
        dataset (`Dataset`): What was learned or measured.
        adapter (`Mapping[str, Any]`): `Belief.info["adapter"]`, see [`describe`].
        num_labels (`float`, *optional*): Observed labels.
        num_sequences (`int`, *optional*): Observed sequences.

    Returns:
        `dict`: `name`, `data`, `num_labels`, `num_sequences`, `base_model`, `base_fingerprint`.
    """
    own = getattr(getattr(dataset, "info", None), "dataset_name", None)
    return {
        "name": own if name == SINGLE and own else name,
        "data": data_fingerprint(dataset),
        "num_labels": num_labels,
        "num_sequences": num_sequences,
        "base_model": adapter.get("base_model"),
        "base_fingerprint": adapter.get("base_fingerprint"),
    }


def fit_lineage(info: Mapping[str, Any], datasets: Mapping[str, Any]) -> list[Entry]:
    """The entries of a belief that was fitted on source data, one per source.

    Args:
        info (`Mapping[str, Any]`): `Belief.info` after [`Belief.fit`].
        datasets (`Mapping[str, Dataset]`): What it was fitted on, by the names of the sources.

    Returns:
        `list[dict]`: See [`lineage_entry`].
    """
    record = info["curvature"]
    counts = record.get("sources", dict.fromkeys(datasets, record))
    return [
        lineage_entry(
            name,
            dataset,
            info.get("adapter", {}),
            num_labels=counts[name]["num_tokens"],
            num_sequences=counts[name]["num_sequences"],
        )
        for name, dataset in datasets.items()
    ]


def join_lineages(*lineages: Any) -> list[Entry]:
    """The lineage of beliefs that are combined, or of one that learns more.

    Args:
        *lineages (`list[dict]` or `Mapping[str, Any]`): Lineages, or `Belief.info` of beliefs, in the order of time.

    Returns:
        `list[dict]`: All entries in that order; one that several share (a common past, a second fit) stands once.
    """
    joined: list[Entry] = []
    for lineage in lineages:
        for entry in lineage.get(LINEAGE, []) if isinstance(lineage, Mapping) else lineage:
            if entry not in joined:
                joined.append(dict(entry))
    return joined


# -- fingerprints ----------------------------------------------------------------------------------------------------


def data_fingerprint(dataset: Any, num_rows: int = 4096) -> str:
    """Identifies a dataset in every run.

    Args:
        dataset (`Dataset` or `Sequence`):
            With a fingerprint of its own, as those of the datasets library (it follows what was done to the data, and
            changes where a mapped function does not hash alike in every run), else rows of numbers, strings, arrays
            or tensors. A stream is read from its beginning.
        num_rows (`int`, *optional*, defaults to 4096): How many rows are looked at where it has none: all, or so many
            evenly spaced ones; of a stream the first 64 of them.

    Returns:
        `str`: "datasets:" and the dataset's own fingerprint, or "rows:" and a hash of its size and of these rows, the
        same for lists, arrays and tensors of the same values.
    """
    own = getattr(dataset, "_fingerprint", None)
    if isinstance(own, str):
        return f"datasets:{own}"
    digest = hashlib.sha256()
    if is_streaming(dataset):
        rows = first_rows(dataset, min(num_rows, 64))
        chosen = range(len(rows))
    else:
        rows, size = dataset, len(dataset)
        chosen = (index * size // min(num_rows, size) for index in range(min(num_rows, size)))
        _feed(digest, size)
    for index in chosen:
        _feed(digest, rows[index])
    return f"rows:{digest.hexdigest()[:16]}"


def _feed(digest: Any, value: Any) -> None:
    """Add a value with its kind and shape, so that no two different rows read alike."""
    if isinstance(value, Mapping):
        digest.update(f"{{{len(value)}".encode())
        for key in sorted(value, key=str):
            _feed(digest, str(key))
            _feed(digest, value[key])
        return
    if isinstance(value, str | bytes):
        data = value.encode() if isinstance(value, str) else value
        digest.update(f"{type(value).__name__}{len(data)}|".encode() + data)
        return
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # lists of different lengths, or of tensors
        array = np.empty(0, dtype=object)
    if array.dtype.kind in "biuf":
        array = array.astype("<f8" if array.dtype.kind == "f" else "<i8")
        digest.update(f"{array.dtype.kind}{array.shape}|".encode() + np.ascontiguousarray(array).tobytes())
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    else:  # of other objects, what they print may differ from run to run
        digest.update(f"<{type(value).__qualname__}>".encode())


def describe(state: AdapterState) -> dict[str, Any]:
    """What an adapter is over: base model, its fingerprint, and the scaling of every adapted layer.

    Args:
        state (`AdapterState`): The adapter.

    Returns:
        `dict[str, Any]`: JSON-serialisable.
    """
    return {
        "base_model": state.config.base_model_name_or_path,
        "base_fingerprint": base_fingerprint(state),
        "scaling": {pair.name: pair.scaling for pair in state},
    }


def base_fingerprint(state: AdapterState) -> str | None:
    """Hash of some weights of the first and last adapted layer, the same for a bf16 and a float32 copy.

    Args:
        state (`AdapterState`): The adapter on its base model.

    Returns:
        `str` or `None`: Hexadecimal; `None` for quantised weights, which cannot be compared.
    """
    digest = hashlib.sha256()
    for pair in (state.pairs[0], state.pairs[-1]):
        layer: Any = state.model.get_submodule(pair.name)
        weight = getattr(layer.get_base_layer(), "weight", None)
        if weight is None or not weight.is_floating_point() or weight.dim() != 2 or weight.device.type == "meta":
            return None
        flat = whole(weight.detach()).reshape(-1)
        sample = flat[:: max(flat.numel() // 4096, 1)][:4096].to(torch.bfloat16).float().cpu()
        digest.update(str(tuple(weight.shape)).encode() + sample.numpy().tobytes())
    return digest.hexdigest()
