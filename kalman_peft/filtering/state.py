"""The filter over tasks: start, predict, update, compress (Low-Rank Filtering and Smoothing, arXiv:2410.06800).

The state is a [`Belief`] in space "adapter" whose precision is absolute, in nats for all data seen, and positive
definite because it starts from a prior delta * I around the adapter's start. Plain functions; nothing is changed in
place.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import AdapterState
from ..belief import Belief, BeliefError, tensors_fingerprint
from ..lineage import describe
from ..precision import Precision
from .algebra import STRUCTURES, add, compress_precision, constant, convert, diffuse, least_damping
from .transition import Transition, by_key, check_values


INFO = "filtering"  # what `Belief.info` says of a filter's state


def initial_belief(
    model: nn.Module | AdapterState | Mapping[str, Tensor],
    prior_precision: float | Mapping[str, float],
    structure: str = "low_rank",
    *,
    adapter_name: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Belief:
    """N(theta_start, I / delta): the filter before any task.

    Args:
        model (`PeftModel`, `AdapterState` or `Mapping[str, Tensor]`):
            The adapter's start. Adapter weights by key, without a model, leave the base model unrecorded.
        prior_precision (`float` or `Mapping[str, float]`):
            delta > 0 in nats per squared unit of the weights, for all or by pattern (see [`Transition`]; here every
            weight must be matched).
        structure (`str`, *optional*, defaults to `"low_rank"`):
            Of the state: "diagonal", "low_rank" (diagonal plus low rank), "ekfac" (Kronecker eigenbases with
            eigenvalues of their own, for curvature of structure "kronecker" or "ekfac") or "dense".
        adapter_name (`str`, *optional*): Defaults to the active adapter.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of mean and precision.

    Returns:
        `Belief`: Exactly that Gaussian, in every structure.

    Raises:
        BeliefError: The structure cannot be the state of a filter.
        ValueError: A prior precision is not positive, or a weight has none.
    """
    check_values("prior_precision", prior_precision, lowest_allowed=False)
    info: dict[str, Any] = {}
    if isinstance(model, Mapping):
        mean = {key: value.detach().to(dtype, copy=True) for key, value in model.items()}
    else:
        state = model if isinstance(model, AdapterState) else AdapterState(model, adapter_name)
        mean, info = state.snapshot(dtype), {"adapter": describe(state)}
    shapes = {key: m.shape for key, m in mean.items()}
    like = next(iter(mean.values()))
    values = by_key("prior_precision", prior_precision, shapes, like)
    without = [key for key, value in values.items() if not torch.as_tensor(value > 0).all()]
    if without:
        raise ValueError(f"prior_precision leaves {len(without)} keys without a prior, such as {without[0]!r}.")
    precision = constant(structure, shapes, values, like)
    origin = tensors_fingerprint(mean)[:16]  # all states of a filter keep that of its start: only these can be merged
    return Belief(mean, precision, info | {INFO: _record("prior", {"num_labels": 0.0, "tasks": 0, "origin": origin})})


def absolute(belief: Belief, num_labels: float | None = None, predicted: Belief | None = None) -> Belief:
    """A belief whose precision is per label, as a state of the filter: that of a [`LoKO`] optimizer, carried over.

    Args:
        belief (`Belief`): Such as `LoKO.belief()`, whose precision holds its prior too and so is positive definite.
        num_labels (`float`, *optional*): By which its precision was divided; by default the number that it records.
        predicted (`Belief`, *optional*): State that the optimizer started from, whose labels and tasks are counted on.

    Returns:
        `Belief`: With the precision of all labels.

    Raises:
        BeliefError: It is a state already, a bare curvature (singular: update an [`initial_belief`] with it), or does
            not say of how many labels it is.
    """
    if INFO in belief.info:
        raise BeliefError("The belief is a state of a filter already; use it as it is.")
    if "curvature" in belief.info:
        raise BeliefError(
            "The belief is a curvature, without a prior: use update(initial_belief(...), belief.mean, "
            "belief.precision, num_labels)."
        )
    count = belief.info.get("num_labels") if num_labels is None else num_labels
    if count is None:
        raise BeliefError("The belief does not record its number of labels; pass num_labels=.")
    _check_labels(count)
    before = {"num_labels": 0.0, "tasks": 0} if predicted is None else predicted.info[INFO]
    record = _record("filtered", before, count)
    precision = _structured(belief.precision.scale(count))
    return Belief(belief.mean, precision, belief.info | {INFO: record}, belief.source)


def predict(belief: Belief, transition: Transition, start: Mapping[str, Tensor] | None = None) -> Belief:
    """The state before the next task's data: theta' = start + decay (theta - start) + w, w ~ N(0, Q).

    Precision (decay^2 Lambda^-1 + Q)^-1, exact in every structure and free of divisions by Lambda. Without noise and
    decay it is the belief.

    Args:
        belief (`Belief`): State after a task.
        transition (`Transition`): Process noise and decay.
        start (`Mapping[str, Tensor]`, *optional*): Mean of the first belief; for decay < 1.

    Returns:
        `Belief`: Of the same structure.

    Raises:
        BeliefError: No state of a filter, or its structure cannot hold the result exactly.
        ValueError: decay < 1 without a start, or a pattern of the noise matches no weight.
    """
    check_state(belief)
    shapes = belief.precision.coordinates()
    noise = transition.noise(shapes, belief.precision.like)
    precision = diffuse(belief.precision, noise, transition.decay)
    record = belief.info[INFO] | {"kind": "predicted"}
    return Belief(transition.mean(belief.mean, start), precision, belief.info | {INFO: record}, belief.source)


def update(
    predicted: Belief,
    mean: Mapping[str, Tensor],
    curvature: Precision,
    num_labels: float,
    rank: int | None = None,
    keep_discarded: bool = True,
) -> Belief:
    """The state after a task: Laplace approximation around the mode found under the predicted precision.

    Lambda = Lambda_predicted + num_labels * curvature, cut to `rank`.

    Args:
        predicted (`Belief`): State before the task's data.
        mean (`Mapping[str, Tensor]`):
            Minimiser of the summed loss + 1/2 (theta - m)^T Lambda_predicted (theta - m), by key.
        curvature (`Precision`): At that mode, per label, as from [`estimate_curvature`] with `space="adapter"`.
        num_labels (`float`): Labels of the task, > 0.
        rank (`int`, *optional*): For structure "low_rank"; by default nothing is cut, and the rank grows.
        keep_discarded (`bool`, *optional*, defaults to `True`): See [`compress`].

    Returns:
        `Belief`: Of the same structure.

    Raises:
        BeliefError: No state of a filter, a curvature that its structure cannot take, or another adapter's mean.
        ValueError: `num_labels` or `rank` is out of range.
    """
    check_state(predicted)
    mean = _same_weights(mean, predicted)
    increment = increment_of(predicted, curvature, num_labels)
    precision = add(_structured(predicted.precision), increment, rank, keep_discarded)
    if rank is not None and precision.structure != "low_rank":
        compress_precision(precision, rank)  # says why there is nothing to cut
    record = _record("filtered", predicted.info[INFO], num_labels)
    return Belief(mean, precision, predicted.info | {INFO: record}, predicted.source)


def increment_of(belief: Belief, curvature: Precision, num_labels: float) -> Precision:
    """What a task's labels say, num_labels * curvature, in the structure of the state; kept for the smoother.

    Args:
        belief (`Belief`): State of the filter.
        curvature (`Precision`): Per label.
        num_labels (`float`): > 0.

    Returns:
        `Precision`: In nats for all labels of the task; singular in general.

    Raises:
        BeliefError: The state's structure cannot take that curvature.
    """
    _check_labels(num_labels)
    structure = belief.precision.structure
    if structure == "block_tridiagonal":
        raise BeliefError(
            "A block_tridiagonal precision can be predicted but not updated: its sum with another is none. Start the "
            f"filter in one of {list(STRUCTURES)}."
        )
    converted = convert(curvature, {"kronecker": "ekfac"}.get(structure, structure))
    if converted.coordinates() != belief.precision.coordinates():
        raise BeliefError("The curvature is over other weights than the belief; take it on the same adapter.")
    return converted.scale(float(num_labels))


def compress(belief: Belief, rank: int, keep_discarded: bool = True) -> Belief:
    """Cut the columns of a state of structure "low_rank" to the `rank` largest directions.

    Args:
        belief (`Belief`): State of the filter.
        rank (`int`): >= 0.
        keep_discarded (`bool`, *optional*, defaults to `True`):
            Add the diagonal of what is cut to the diagonal, so that the precision's diagonal stays exact. Without it
            the precision only shrinks, and no variance is ever below that of the uncut filter.

    Returns:
        `Belief`: Itself if it has no larger rank.
    """
    check_state(belief)
    return Belief(belief.mean, compress_precision(belief.precision, rank, keep_discarded), belief.info, belief.source)


def draw(belief: Belief, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Adapter weights drawn from the state, mean + Lambda^-1/2 noise.

    Args:
        belief (`Belief`): State of the filter, predicted, updated or smoothed.
        generator (`torch.Generator`, *optional*): Source of the draw, on the precision's device.

    Returns:
        `dict[str, Tensor]`: By key.
    """
    check_state(belief)
    noise = belief.precision.sample(least_damping(belief.precision), generator)
    return {key: m + noise[key].to(m) for key, m in belief.mean.items()}


def check_state(belief: Belief) -> None:
    """Raise BeliefError unless the belief is a state of a filter: Gaussian in the factors, absolute, with a prior."""
    if belief.precision.space != "adapter":
        raise BeliefError(
            f"A belief over {belief.precision.space} is not Gaussian in the adapter's factors and cannot be filtered; "
            "fit it with space='adapter'."
        )
    if INFO not in belief.info:
        raise BeliefError(
            "The belief is no state of a filter: its precision is per label. Start from initial_belief() and update() "
            "it with the curvature, or pass a LoKO belief through absolute()."
        )


def _same_weights(mean: Mapping[str, Tensor], belief: Belief) -> dict[str, Tensor]:
    if {k: m.shape for k, m in mean.items()} != {k: m.shape for k, m in belief.mean.items()}:
        differing = sorted(mean.keys() ^ belief.mean.keys())[:2]
        raise BeliefError(f"`mean` is over other weights than the belief (differing keys: {differing or 'shapes'}).")
    return {key: mean[key].detach().to(m, copy=True) for key, m in belief.mean.items()}


def _structured(precision: Precision) -> Precision:
    """A Kronecker product is no sum: from here on eigenvalue-corrected."""
    return convert(precision, "ekfac") if precision.structure == "kronecker" else precision


def _record(kind: str, before: Mapping[str, Any], num_labels: float | None = None) -> dict[str, Any]:
    """What a state says of itself: as before, or with the labels of one more task."""
    more, task = (0.0, 0) if num_labels is None else (float(num_labels), 1)
    kept = {key: before[key] for key in ("origin",) if key in before}
    return {"kind": kind, "num_labels": before["num_labels"] + more, "tasks": before["tasks"] + task} | kept


def _check_labels(num_labels: float) -> None:
    if not 0 < num_labels < float("inf"):
        raise ValueError(f"num_labels must be > 0 and finite, got {num_labels}.")
