"""One call for every method of prediction from one belief."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..adapters import AdapterState
from ..belief import Belief
from .linearized import linearized
from .posterior import at, check_active, check_predicts
from .result import Positions, Predictive, select, without_labels
from .sampled import sampled
from .streamlined import streamlined


METHODS = ("map", "streamlined", "linearized", "sampled")


def posterior_predictive(
    model: nn.Module,
    belief: Belief,
    inputs: Mapping[str, Any],
    method: str = "streamlined",
    *,
    positions: Positions = None,
    entries: Any = None,
    **options: Any,
) -> Predictive:
    """What a model whose adapter is a belief predicts for a batch.

    Args:
        model (`PeftModel`): In evaluation mode; unchanged afterwards.
        belief (`Belief`): Over its adapter.
        inputs (`Mapping`): A batch; `labels` are not used.
        method (`str`, *optional*, defaults to `"streamlined"`):
            "map" (the belief's mean alone), "streamlined" (one pass, [`streamlined`]), "linearized" (Jacobians,
            [`linearized`]) or "sampled" (Monte Carlo, [`sampled`]).
        positions (`str` or `Tensor`, *optional*): Of a language model, see [`select`].
        entries (`Sequence[int]`, *optional*): Classes or vocabulary entries, see [`select`].
        **options: Of the method; `num_labels` and `prior_precision` of all but "map".

    Returns:
        `Predictive`: Logits, variances and probabilities.

    Raises:
        ValueError: An unknown method, or see the method.
    """
    chosen: dict[str, Any] = {"positions": positions, "entries": entries}
    functions: dict[str, Callable[..., Predictive]] = {
        "map": _map, "streamlined": _streamlined, "linearized": linearized, "sampled": sampled,
    }  # fmt: skip
    if method not in functions:
        raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}.")
    return functions[method](model, belief, inputs, **chosen, **options)


@torch.no_grad()
def _map(
    model: nn.Module,
    belief: Belief,
    inputs: Mapping[str, Any],
    *,
    positions: Positions,
    entries: Any,
    adapter_name: str | None = None,
) -> Predictive:
    check_predicts(model, "posterior_predictive")
    state: AdapterState = belief.check(model, adapter_name)
    check_active(state)
    inputs = without_labels(inputs)
    with at(state, belief.mean):
        return Predictive.from_moments(select(model(**inputs).logits, inputs, positions, entries))


@torch.no_grad()
def _streamlined(
    model: nn.Module, belief: Belief, inputs: Mapping[str, Any], *, positions: Positions, entries: Any, **options: Any
) -> Predictive:
    inputs = without_labels(inputs)
    with streamlined(model, belief, **options):
        out: Any = model(**inputs)
    chosen = (select(t, inputs, positions, entries) for t in (out.logits, out.logits_variance))
    return Predictive.from_moments(*chosen)
