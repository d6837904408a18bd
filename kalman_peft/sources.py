"""Source data: what must not be forgotten, in one or several sets, split into a part to fit and a part held out."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, Subset


SINGLE = "source"  # name of a source that the user gave none


@dataclass(frozen=True)
class Sources:
    """Named source sets, split; no sequence is in both parts.

    Args:
        fit (`dict[str, Dataset]`): Sequences for the curvature, by name; empty where none is needed.
        heldout (`dict[str, Dataset]`): Sequences to measure the source loss on, by name; empty if none is held out.
        weights (`dict[str, float]`): Share of each source, summing to 1.
    """

    fit: dict[str, Any]
    heldout: dict[str, Any]
    weights: dict[str, float]


def split_sources(
    dataset: Any,
    *,
    weights: Mapping[str, float] | Sequence[float] | None = None,
    num_samples: int = 64,
    num_heldout: int = 16,
    fit: bool = True,
) -> Sources:
    """Name, weigh and split source data.

    Of a map-style dataset the first `num_samples` sequences are for the fit and the last `num_heldout` are held out.
    Of a streaming one, whose end nobody knows, the first `num_heldout` are held out and the next `num_samples` are for
    the fit; they are read once and kept, and nothing else is consumed. In several processes all must see the same
    stream.

    Args:
        dataset (`Dataset`, `Mapping[str, Dataset]` or `Sequence[Dataset]`):
            One source or several. A sequence names them "0", "1", ...; a list of rows (mappings) is one dataset.
        weights (`Mapping[str, float]` or `Sequence[float]`, *optional*):
            Relative weight of each source, >= 0; equal by default.
        num_samples (`int`, *optional*, defaults to 64): Most sequences per source for the fit.
        num_heldout (`int`, *optional*, defaults to 16): Sequences per source that are held out.
        fit (`bool`, *optional*, defaults to `True`): Whether sequences for the fit are needed.

    Returns:
        `Sources`: The two parts by name, and weights that sum to 1.

    Raises:
        ValueError: A source is no dataset or too small, or the weights do not fit the sources.
    """
    named = _named(dataset)
    shares = _normalised(weights, named)
    parts = {name: _split(name, one, num_samples, num_heldout, fit) for name, one in named.items()}
    return Sources(
        {name: part[0] for name, part in parts.items() if fit},
        {name: part[1] for name, part in parts.items() if num_heldout},
        shares,
    )


def parse_weights(weights: Any) -> dict[str, float] | list[float] | None:
    """Read `source_weights` as given in the arguments.

    Args:
        weights (`dict`, `list` or `str`, *optional*): A string is read as JSON, as from the command line.

    Returns:
        `dict[str, float]`, `list[float]` or `None`: As given.

    Raises:
        ValueError: No JSON, another type, or a weight that is negative or not finite.
    """
    if isinstance(weights, str):
        try:
            weights = json.loads(weights)
        except ValueError as error:
            raise ValueError(
                f"source_weights={weights!r} is no JSON; give e.g. '{{\"code\": 2, \"chat\": 1}}' or '[2, 1]'."
            ) from error
    if weights is None:
        return None
    if not isinstance(weights, dict | list | tuple):
        raise ValueError(f"source_weights must be a mapping or a list of numbers, got {weights!r}.")
    values = list(weights.values()) if isinstance(weights, dict) else list(weights)
    if not all(isinstance(w, int | float) and 0 <= w < math.inf for w in values) or not sum(values) > 0:
        raise ValueError(f"source_weights must be numbers >= 0 with a positive sum, got {weights!r}.")
    return dict(weights) if isinstance(weights, dict) else values


def _named(dataset: Any) -> dict[str, Any]:
    if isinstance(dataset, Mapping):
        named = dict(dataset)
    elif isinstance(dataset, list | tuple) and len(dataset) and not isinstance(dataset[0], Mapping):
        named = {str(index): one for index, one in enumerate(dataset)}
    else:
        return {SINGLE: dataset}
    if not named or not all(isinstance(name, str) and name for name in named):
        raise ValueError(f"`source_dataset` needs at least one dataset, named by strings; got names {list(named)}.")
    return named


def _normalised(weights: Any, named: Mapping[str, Any]) -> dict[str, float]:
    if weights is None:
        return {name: 1 / len(named) for name in named}
    weights = parse_weights(weights)
    if not isinstance(weights, Mapping):
        if len(weights) != len(named):
            raise ValueError(f"source_weights has {len(weights)} entries for {len(named)} sources {list(named)}.")
        weights = dict(zip(named, weights, strict=True))
    if weights.keys() != named.keys():
        raise ValueError(f"source_weights names {sorted(weights)}, but `source_dataset` has {sorted(named)}.")
    total = sum(weights.values())
    return {name: weights[name] / total for name in named}


def _split(name: str, dataset: Any, num_samples: int, num_heldout: int, fit: bool) -> tuple[Any, Any]:
    """(sequences for the curvature, sequences held out)."""
    shown = "`source_dataset`" if name == SINGLE else f"`source_dataset` {name!r}"
    if is_streaming(dataset):
        if not hasattr(dataset, "__iter__"):
            raise ValueError(f"{shown} is no dataset, got {type(dataset).__name__}.")
        rows = list(islice(iter(dataset), num_heldout + (num_samples if fit else 0)))
        _check_size(shown, len(rows), num_heldout, fit)
        return rows[num_heldout:], rows[:num_heldout]
    size = len(dataset)
    _check_size(shown, size, num_heldout, fit)
    return (
        _select(dataset, range(min(num_samples, size - num_heldout))) if fit else None,
        _select(dataset, range(size - num_heldout, size)) if num_heldout else None,
    )


def _check_size(shown: str, size: int, num_heldout: int, fit: bool) -> None:
    if size < num_heldout or (fit and size == num_heldout):
        raise ValueError(
            f"{shown} has {size} sequences, of which source_heldout={num_heldout} are held out, so none is left for "
            "the curvature; give more data or a smaller source_heldout."
        )


def is_streaming(dataset: Any) -> bool:
    """Whether a dataset can only be read from its beginning."""
    return isinstance(dataset, IterableDataset) or not (
        hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    )


def first_rows(dataset: Any, count: int) -> Any:
    """The first `count` sequences of a dataset of either style (fewer if it has fewer)."""
    if is_streaming(dataset):
        return list(islice(iter(dataset), count))
    return _select(dataset, range(min(count, len(dataset))))


def _select(dataset: Any, indices: range) -> Any:
    return dataset.select(indices) if hasattr(dataset, "select") else Subset(dataset, indices)
