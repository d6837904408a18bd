"""A belief as a posterior to predict with, and a model that holds its mean meanwhile; shared by all methods."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import AdapterState
from ..belief import Belief, BeliefError
from ..filtering.algebra import as_double
from ..filtering.state import INFO, absolute, initial_belief, update
from ..precision import DensePrecision


Prior = float | Mapping[str, float] | None
STRUCTURES = ("full", "diagonal")  # how much of the covariance counts


def posterior(belief: Belief, num_labels: float | None = None, prior_precision: Prior = None) -> Belief:
    """A belief with the precision of its posterior, positive definite, as a state of a filter.

    Args:
        belief (`Belief`): See [`weight_variances`].
        num_labels (`float`, *optional*): See [`weight_variances`].
        prior_precision (`float` or `Mapping[str, float]`, *optional*): See [`weight_variances`].

    Returns:
        `Belief`: The same mean.

    Raises:
        BeliefError: The belief is over DW, of a structure that cannot hold a posterior, or lacks a number.
        ValueError: A number is out of range, or given to a belief that does not take it.
    """
    if belief.precision.space != "adapter":
        raise BeliefError(
            f"A belief over {belief.precision.space} gives no variances of the factors A and B; fit it with "
            "space='adapter'."
        )
    if INFO in belief.info:
        if num_labels is not None or prior_precision is not None:
            raise ValueError(
                "num_labels and prior_precision are for beliefs counted per label; this one is a state of a filter, "
                "which holds both. Leave them out."
            )
        return belief
    if "curvature" not in belief.info and "num_labels" in belief.info:
        if prior_precision is not None:
            raise ValueError("prior_precision is for a curvature; a LoKO belief holds its prior. Leave it out.")
        return absolute(belief, num_labels)
    if num_labels is None or prior_precision is None:
        raise BeliefError(
            "The belief is a curvature per label, without a prior. Pass `num_labels`, the labels behind the "
            "posterior, and `prior_precision`, for the variances of (num_labels * curvature + prior_precision)^-1."
        )
    prior = initial_belief(belief.mean, prior_precision, belief.precision.structure, dtype=belief.precision.dtype)
    return update(prior, prior.mean, belief.precision, num_labels)


def solvable(state: Belief) -> Belief:
    """The same, in float64 where the structure's own check would call a condition number of float32 singular."""
    if not isinstance(state.precision, DensePrecision):
        return state
    return Belief(state.mean, as_double(state.precision), state.info, state.source)


@contextmanager
def at(state: AdapterState, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context the adapter has these weights, afterwards its own again, bit for bit.

    Args:
        state (`AdapterState`): The adapter.
        weights (`Mapping[str, Tensor]`): By key.

    Yields:
        None: The model may be run.
    """
    # Weights that are there already are not written: autograd would take them for others.
    moved = any(not torch.equal(p, weights[key].to(p)) for key, p in state.tensors().items())
    kept = {key: p.clone() for key, p in state.tensors().items()} if moved else {}
    try:
        if moved:
            state.load(weights)
        yield
    finally:
        if moved:
            state.load(kept)


def check_active(state: AdapterState) -> None:
    """Raise ValueError unless the adapter alone is active, whole, and neither merged nor disabled."""
    active = state.model.active_adapters
    if list(active) != [state.adapter_name]:  # type: ignore[call-overload]
        raise ValueError(f"Adapters {active} are active; activate {state.adapter_name!r} alone with set_adapter().")
    for pair in state:
        if hasattr(pair.a, "full_tensor"):
            raise ValueError(f"{pair.name} is sharded over processes; predict with the whole model in each.")
        layer: Any = state.model.get_submodule(pair.name)
        if layer.merged or layer.disable_adapters:
            raise ValueError(
                f"{pair.name} is merged or disabled; call model.unmerge_adapter(), or enable the adapter."
            )


def check_predicts(model: nn.Module, method: str) -> None:
    """Raise ValueError in training mode."""
    if model.training:
        raise ValueError(f"{method}() predicts; call model.eval() first.")
