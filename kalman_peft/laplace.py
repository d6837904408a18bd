"""LaLoRA's second stage: the Laplace penalty strength * R on an adapter that is being trained, and its strength.

L(theta) = L_target(theta) + strength * R(theta), R the energy of a [`Belief`]. With strength 1 a source token weighs
as much as a target token: R estimates the rise of the source loss in nats per token.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters import AdapterState
from .belief import Belief
from .distributed import shard_like, whole


FORMS = ("gradient", "proximal")
SCHEDULES = ("constant", "linear", "cosine", "warmup")


@torch.no_grad()
def add_penalty_gradient(belief: Belief, state: AdapterState, strength: float, prior_precision: float = 0.0) -> Tensor:
    """Add the gradient of strength * R + prior_precision / 2 * |theta - mean|^2 to `.grad`, once per optimizer step.

    Added analytically and after accumulation and reduction over processes, it depends on neither, and leaves the
    logged loss alone. Parameters may be sharded (FSDP2); all processes must then call.

    Args:
        belief (`Belief`): On any device; it is evaluated there.
        state (`AdapterState`): The adapter being trained.
        strength (`float`): lambda >= 0.
        prior_precision (`float`, *optional*, defaults to 0.0): Isotropic pull towards the mean, per target label.

    Returns:
        `Tensor`: R at the present weights, a float32 scalar.
    """
    parameters = state.parameters()
    weights = {key: whole(p.detach()) for key, p in parameters.items()}
    energy, gradient = belief.energy_and_gradient(weights)
    for key, g in gradient.items():
        p = parameters[key]
        pull = strength * g
        if prior_precision:
            pull.add_(weights[key].to(g) - belief.mean[key].to(g), alpha=prior_precision)
        pull = shard_like(pull.to(weights[key]), p)
        if p.grad is None:
            p.grad = pull
        else:
            p.grad.add_(pull.to(p.grad.dtype))
    return energy


@torch.no_grad()
def proximal_step(belief: Belief, state: AdapterState, step: float, pull: float = 0.0) -> None:
    """theta <- argmin step * R(theta) + pull / 2 |theta - mean|^2 + 1/2 |theta - theta~|^2, theta~ the optimizer's.

    Decoupled from the optimizer, as weight decay is in AdamW: not rescaled by it, and stable for any strength. The two
    squares are one, (1 + pull) / 2 |theta - (theta~ + pull * mean) / (1 + pull)|^2, up to a constant.

    Args:
        belief (`Belief`): On any device; it is evaluated there.
        state (`AdapterState`): The adapter being trained.
        step (`float`): Strength times learning rate.
        pull (`float`, *optional*, defaults to 0.0): Prior precision per target label times learning rate.
    """
    parameters = state.parameters()
    centre = {key: whole(p.detach()) for key, p in parameters.items()}
    if pull:
        centre = {key: (centre[key].to(mean) + pull * mean) / (1 + pull) for key, mean in belief.mean.items()}
    for key, value in belief.proximal(centre, step / (1 + pull)).items():
        p = parameters[key]
        p.copy_(shard_like(value.to(device=p.device, dtype=p.dtype), p))


@torch.no_grad()
def squared_distance(belief: Belief, state: AdapterState) -> Tensor:
    """|theta - mean|^2 over all factors, a float32 scalar on the belief's device."""
    parameters = state.parameters()
    return torch.stack(
        [(whole(parameters[k].detach()).to(mean) - mean).square().sum() for k, mean in belief.mean.items()]
    ).sum()


def schedule_factor(schedule: str, progress: float) -> float:
    """Factor on the strength at a point of the training.

    Args:
        schedule (`str`):
            "constant": 1. "linear": falls to 0 at the end. "cosine": falls to 0 along half a cosine. "warmup": rises
            from 0 to 1 over the first tenth.
        progress (`float`): Part of the steps that is done, in [0, 1].

    Returns:
        `float`: In [0, 1].

    Raises:
        ValueError: The schedule is unknown.
    """
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return (1.0 + math.cos(math.pi * progress)) / 2
    if schedule == "warmup":
        return min(progress / 0.1, 1.0)
    raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}.")


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
