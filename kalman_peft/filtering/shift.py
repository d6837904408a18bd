"""Process noise from data: how far the shift between two source sets moves each matrix of the adapter."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..belief import Belief, BeliefError
from ..losses import mean_loss_gradient
from .algebra import least_damping
from .state import INFO, check_state


def noise_from_gradients(
    belief: Belief,
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    *,
    num_labels: float | None = None,
    damping: float = 0.0,
) -> dict[str, float]:
    """q of every adapter key: the mean square of the difference of one damped Newton step on each of two sets.

    d_i = -(Lambda / N + damping I)^-1 g_i, the step on the mean loss under the belief's precision per label;
    q_key = mean over the key's weights of (d_2 - d_1)^2.

    Args:
        belief (`Belief`): State of a filter, at whose mean the gradients were taken.
        first (`Mapping[str, Tensor]`): Gradient of the mean loss on one set, nats per label, by key.
        second (`Mapping[str, Tensor]`): On the other.
        num_labels (`float`, *optional*): N, labels behind the belief; by default what it records.
        damping (`float`, *optional*, defaults to 0.0): >= 0, in nats per label.

    Returns:
        `dict[str, float]`: Variances by adapter key, as [`Transition`] takes them.

    Raises:
        BeliefError: No state of a filter, one that has seen no labels (pass num_labels), or other weights' gradients.
    """
    check_state(belief)
    count = belief.info[INFO]["num_labels"] if num_labels is None else num_labels
    if not 0 < count < float("inf"):
        raise BeliefError(
            f"num_labels is {count}: a belief that has seen no labels says nothing of curvature per label. Pass "
            "num_labels=, the number of labels for which its prior should count."
        )
    shapes = belief.precision.coordinates()
    for name, gradient in (("first", first), ("second", second)):
        if {key: g.shape for key, g in gradient.items()} != shapes:
            raise BeliefError(f"Gradient `{name}` is over other weights than the belief.")
    like = belief.precision.like
    difference = {key: second[key].to(like) - first[key].to(like) for key in shapes}
    damping = damping or least_damping(belief.precision)
    step = belief.precision.solve(difference, damping=damping, scale=1 / count)  # linear: one solve for both
    return {key: float(x.double().square().mean()) for key, x in step.items()}


def noise_from_shift(
    model: nn.Module,
    belief: Belief,
    first: Iterable[Mapping[str, Tensor]],
    second: Iterable[Mapping[str, Tensor]],
    *,
    adapter_name: str | None = None,
    num_labels: float | None = None,
    damping: float = 0.0,
) -> dict[str, float]:
    """[`noise_from_gradients`] from the data of two source sets, at the belief's mean.

    Args:
        model (`PeftModel`): Whose adapter the belief is over; its weights are as before afterwards.
        belief (`Belief`): State of a filter.
        first (`Iterable`): Batches of one set, with `labels`.
        second (`Iterable`): Of the other.
        adapter_name (`str`, *optional*): Defaults to the active adapter.
        num_labels (`float`, *optional*): See [`noise_from_gradients`].
        damping (`float`, *optional*, defaults to 0.0): See [`noise_from_gradients`].

    Returns:
        `dict[str, float]`: Variances by adapter key, as [`Transition`] takes them.
    """
    check_state(belief)
    state = belief.check(model, adapter_name)
    kept = {key: p.clone() for key, p in state.tensors().items()}
    try:
        state.load(belief.mean)
        gradients = [mean_loss_gradient(state, batches)[1] for batches in (first, second)]
    finally:
        state.load(kept)
    return noise_from_gradients(belief, *gradients, num_labels=num_labels, damping=damping)


def noise_by_module(noise: Mapping[str, float], sizes: Mapping[str, Tensor | torch.Size]) -> dict[str, float]:
    """One variance per adapted module: the mean over the weights of its two factors.

    Args:
        noise (`Mapping[str, float]`): By adapter key.
        sizes (`Mapping[str, Tensor]`): Tensors by key whose sizes count, such as `belief.mean`.

    Returns:
        `dict[str, float]`: By adapter key, A and B of a module alike.
    """
    totals: dict[str, list[float]] = {}
    for key, q in noise.items():
        size = sizes[key].numel()
        total = totals.setdefault(key.rsplit(".lora_", 1)[0], [0.0, 0.0])
        total[0] += q * size
        total[1] += size
    return {key: totals[key.rsplit(".lora_", 1)[0]][0] / totals[key.rsplit(".lora_", 1)[0]][1] for key in noise}
