"""The bounds on a step: factors that keep it where the quadratic model of the log-likelihood can be believed.

With the step s = P t of the score t, n labels seen so far and a likelihood to the power beta:
    decrease  t^T s / (beta * labels of the batch), what the step promises to take off the loss, nats per label
    kl        s^T (P^-1 - prior) s / (2 n), how far it goes under the information gathered so far, nats per label
"""

import torch
from torch import Tensor

from .memories.base import TINY


def decrease_factor(
    decrease: Tensor,
    *,
    max_decrease: float | None,
    loss: float | None,
    trust_decay: float,
    prior_tokens: float,
    tokens: float,
    misfit: float,
) -> Tensor:
    """Factor on the step that bounds the predicted decrease of the loss by a share of it.

    An iterated step is measured from the weights before it, and so is the loss.

    Args:
        decrease (`Tensor`): Predicted, nats per label.
        max_decrease (`float`, *optional*): Largest share of the loss; `None` for no bound.
        loss (`float`, *optional*):
            Mean before the step, nats per label; `None` for a likelihood known up to a constant, which has no such
            share: there the bound itself is in nats.
        trust_decay (`float`): Power with which the bound shrinks as n_0 / (n_0 + n).
        prior_tokens (`float`): n_0.
        tokens (`float`): n, labels seen so far.
        misfit (`float`): By which the bound is divided where it exceeds 1.

    Returns:
        `Tensor`: At most 1.
    """
    if max_decrease is None:
        return torch.ones_like(decrease)
    gained = prior_tokens / (prior_tokens + tokens)
    most = max_decrease * gained**trust_decay / max(1.0, misfit)
    if loss is not None:
        most *= loss
    return (most / decrease.clamp_min(TINY)).clamp_max(1.0)


def divergence(gathered: Tensor, tokens: float) -> Tensor:
    """KL divergence of a step, nats per label.

    Args:
        gathered (`Tensor`): s^T (P^-1 - prior) s.
        tokens (`float`): Labels seen so far.

    Returns:
        `Tensor`: Of the same shape.
    """
    return gathered / (2 * max(tokens, 1.0))


def kl_factor(kl: Tensor, max_kl: float) -> Tensor:
    """Factor on the step at which its KL divergence is `max_kl`; above 1 where it is smaller."""
    return (max_kl / kl.clamp_min(TINY)).sqrt()
