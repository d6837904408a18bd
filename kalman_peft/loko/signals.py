"""What a filter reports of its last step: fit, size of the step, gains, and how much it knows."""

from typing import Any

import torch
from torch import Tensor

from .memories import Memory
from .memories.base import TINY
from .views import View


class Signals:
    """Of the last step.

    Attributes:
        values (`dict[str, Any]`): By name; empty after a step that was skipped.
        loss (`float`): Mean negative log-likelihood at the weights before the step.
        fit (`tuple[float, float]`): Score energy g^T P g and its expectation, at the weights before the step.
        gains (`list[Tensor]`): Norm of the step over norm of its score for each parameter, (n,) per view.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.loss = 0.0
        self.fit = 0.0, 0.0
        self.gains: list[Tensor] = []

    @property
    def innovation(self) -> float | None:
        """Score energy over its expectation; `None` if the last step had none."""
        found = self.values.get("innovation")
        return None if found is None else float(found)

    def report_fit(self, energy: Tensor, expected: float) -> None:
        """How well the data fit, at the weights before the step.

        Args:
            energy (`Tensor`): g^T P g.
            expected (`float`): The same as the model expects it; 0 where it is not known.
        """
        self.fit = float(energy), expected
        self.values["loss"] = self.loss
        if expected > 0:
            self.values["innovation"] = energy / expected

    def report_step(self, scale: Tensor, kl: Tensor, decrease: Tensor, lengths: list[Tensor], scores: list[Tensor]):
        """How far the step went.

        Args:
            scale (`Tensor`): Factor of the trust region on it.
            kl (`Tensor`): Divergence of the full step, nats per label.
            decrease (`Tensor`): Predicted for the full step, nats per label.
            lengths (`list[Tensor]`): Norm of the full step for each parameter, (n,) per view.
            scores (`list[Tensor]`): Norm of its score, the same way.
        """
        self.gains = [s / t.clamp_min(TINY) for s, t in zip(lengths, scores, strict=True)]
        self.values |= {
            "kl": kl * scale.square(),
            "gain_norm": _norm(lengths) / _norm(scores).clamp_min(TINY),
            "trust": scale,
            "decrease": decrease * scale,
        }

    def all(self, group: dict[str, Any], memories: list[Memory]) -> dict[str, float]:
        """The values, and what the filter knows; see [`LoKO.diagnostics`].

        Args:
            group (`dict[str, Any]`): Options and progress of the filter.
            memories (`list[Memory]`): Of the filter.

        Returns:
            `dict[str, float]`: Empty after a step that was skipped.
        """
        if not self.values:
            return {}
        traces = [m.traces() for m in memories]
        left = sum(float((t * m.prior).sum()) for t, m in zip(traces, memories, strict=True))
        return {name: float(value) for name, value in self.values.items()} | {
            "trace_p": sum(float(t.sum()) for t in traces),
            "effective_observations": group["tokens"] * group["tempering"] / max(1.0, group["misfit"]),
            # Process noise can make a variance larger than the prior's.
            "effective_parameters": max(0.0, sum(p.numel() for m in memories for p in m.view.params) - left),
        }

    def gains_by_name(self, views: list[View]) -> dict[str, float]:
        """See [`LoKO.gains`]."""
        return {
            name: float(value)
            for view, gain in zip(views, self.gains, strict=False)  # none before the first step
            for name, value in zip(view.names, gain, strict=True)
        }


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()
