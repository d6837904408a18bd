"""Numbers to log for a filter over tasks: how much it knows, how much a transition keeps and frees."""

import torch

from ..belief import Belief
from .algebra import variances
from .state import check_state


def belief_figures(belief: Belief) -> dict[str, float]:
    """How sure the filter is of the weights.

    Args:
        belief (`Belief`): State of the filter.

    Returns:
        `dict[str, float]`: "covariance_trace", "mean_variance" and "least_variance" (squared units of the weights),
        "precision_trace" (nats per squared unit), and "num_labels" behind it.
    """
    check_state(belief)
    found = torch.cat([v.double().reshape(-1) for v in variances(belief.precision).values()])
    return {
        "covariance_trace": float(found.sum()),
        "mean_variance": float(found.mean()),
        "least_variance": float(found.min()),
        "precision_trace": _precision_trace(belief),
        "num_labels": float(belief.info["filtering"]["num_labels"]),
    }


def transition_figures(before: Belief, predicted: Belief) -> dict[str, float]:
    """What a transition does to a state.

    Args:
        before (`Belief`): State after a task.
        predicted (`Belief`): The same after [`predict`].

    Returns:
        `dict[str, float]`: "stability", the share of the precision's trace that is kept, 1 without noise; and
        "plasticity", the variance that a weight gains on average (negative where a decay takes more than noise gives).
    """
    check_state(before)
    check_state(predicted)
    return {
        "stability": _precision_trace(predicted) / _precision_trace(before),
        "plasticity": belief_figures(predicted)["mean_variance"] - belief_figures(before)["mean_variance"],
    }


def _precision_trace(belief: Belief) -> float:
    return sum(float(d.double().sum()) for d in belief.precision.diagonal(belief.mean).values())
