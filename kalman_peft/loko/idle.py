"""Options that are given and have no effect with what the filter observes."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..observations import Observation
from .options import LoKODefaults
from .planning import plan_columns


def warn_at_start(options: Mapping[str, Any], estimate_noise: bool) -> None:
    """Warn of what is known before anything is observed.

    Args:
        options (`Mapping[str, Any]`): From [`LoKOOptions.resolve`].
        estimate_noise (`bool`): Whether the variance of Gaussian labels is estimated.
    """
    if options["mode"] == "paper":
        return  # other options are refused
    if _given(options, "first_draws") and options["curvature_every"] == 1:
        _warn("first_draws", options, "with curvature_every=1, where every step takes columns")
    if _given(options, "noise_decay") and not estimate_noise:
        _warn(
            "noise_decay", options, "where no noise is estimated (Gaussian labels of unknown variance, mode='paper')"
        )
    if options["per_sequence"] is False and _given(options, "max_columns"):
        _warn("max_columns", options, "with per_sequence=False, where columns are not of sequences")
    if options["num_columns"] > 1 and options["columns"] == "auto" and options["top_k"] is not None:
        _warn("num_columns", options, "with top_k, where columns are exact")


def warn_at_first(options: Mapping[str, Any], observation: Observation, logits: Tensor) -> None:
    """Warn of what the first batch tells.

    Args:
        options (`Mapping[str, Any]`): Of the filter.
        observation (`Observation`): What it observes.
        logits (`Tensor`): Shape (B, ..., V).
    """
    if options["mode"] == "paper":
        return
    one_each = logits.dim() == 2
    kind, per_sequence = plan_columns(options, observation, logits.shape[-1], one_each)
    if one_each and _given(options, "correlation"):
        _warn("correlation", options, "where each sequence has one label")
    if not per_sequence and options["per_sequence"] is None and _given(options, "max_columns"):
        _warn("max_columns", options, "where columns are not of sequences; set per_sequence=True")
    if kind == "exact" and options["num_columns"] > 1 and options["top_k"] is None:
        _warn("num_columns", options, f"with {logits.shape[-1]} outputs, where columns='auto' is exact")


def _given(options: Mapping[str, Any], name: str) -> bool:
    return options[name] != LoKODefaults[name]


def _warn(name: str, options: Mapping[str, Any], why: str) -> None:
    warnings.warn(f"{name}={options[name]!r}: no effect {why}.", stacklevel=4)
