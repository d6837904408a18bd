"""LaLoRA's second stage: the Laplace penalty strength * R on an adapter that is being trained.

L(theta) = L_target(theta) + strength * R(theta), R the energy of a [`Belief`]. With strength 1 a source token weighs
as much as a target token: R estimates the rise of the source loss in nats per token.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters import AdapterState
from .belief import Belief


FORMS = ("gradient", "proximal")


@torch.no_grad()
def add_penalty_gradient(belief: Belief, state: AdapterState, strength: float) -> Tensor:
    """Add the gradient of strength * R to `.grad`, once per optimizer step.

    Added analytically and after accumulation and reduction over processes, it depends on neither, and leaves the
    logged loss alone.

    Args:
        belief (`Belief`): On the parameters' device.
        state (`AdapterState`): The adapter being trained.
        strength (`float`): lambda >= 0.

    Returns:
        `Tensor`: R at the present weights, a float32 scalar.
    """
    parameters = state.parameters()
    energy, gradient = belief.energy_and_gradient(parameters)
    for key, g in gradient.items():
        p = parameters[key]
        if p.grad is None:
            p.grad = (strength * g).to(p.dtype)
        else:
            p.grad.add_(g.to(p.grad.dtype), alpha=strength)
    return energy


@torch.no_grad()
def proximal_step(belief: Belief, state: AdapterState, step: float) -> None:
    """theta <- argmin step * R(theta) + 1/2 ||theta - theta~||^2, after the optimizer has moved to theta~.

    Decoupled from the optimizer, as weight decay is in AdamW: not rescaled by it, and stable for any strength.

    Args:
        belief (`Belief`): On the parameters' device.
        state (`AdapterState`): The adapter being trained.
        step (`float`): Strength times learning rate.
    """
    parameters = state.parameters()
    for key, value in belief.proximal(parameters, step).items():
        parameters[key].copy_(value)


@dataclass
class ForgettingBudget:
    """Chooses the strength so that the source loss rises by at most `budget`: a multiplier on a constraint.

    After each measurement log strength moves by `gain` * (rise - budget) / budget, cut to [-1, 1] times `gain`: dual
    ascent in the logarithm, since useful strengths span decades.

    Args:
        budget (`float`): Allowed rise of the source loss, in nats per token.
        strength (`float`, *optional*, defaults to 1.0): Where to start.
        gain (`float`, *optional*, defaults to 0.7): Largest change of log strength per measurement.
        lowest (`float`, *optional*, defaults to 1e-3): Smallest strength.
        highest (`float`, *optional*, defaults to 1e6): Largest strength.

    Raises:
        ValueError: The budget or the gain is not positive.
    """

    budget: float
    strength: float = 1.0
    gain: float = 0.7
    lowest: float = 1e-3
    highest: float = 1e6

    def __post_init__(self) -> None:
        if not (0 < self.budget < math.inf and 0 < self.gain < math.inf):
            raise ValueError(f"forgetting_budget and gain must be positive, got {self.budget} and {self.gain}.")

    def update(self, rise: float) -> float:
        """Take a measured rise of the source loss, in nats per token.

        Args:
            rise (`float`): Source loss now minus source loss at the start.

        Returns:
            `float`: The new strength; unchanged if the rise is not a number.
        """
        if math.isfinite(rise):
            excess = max(-1.0, min(1.0, (rise - self.budget) / self.budget))
            self.strength = min(max(self.strength * math.exp(self.gain * excess), self.lowest), self.highest)
        return self.strength
