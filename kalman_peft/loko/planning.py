"""Which columns of information a step takes, when, and how they enter the gain."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..observations import CategoricalObservation, Observation
from .harvest import Plan
from .memories import Memory


_EXACT_UP_TO = 3  # outputs for which "auto" takes exact columns


def draws_columns(group: Mapping[str, Any]) -> bool:
    """Whether the coming step takes columns."""
    return not group["settled"] or group["draw_due"] or _is_drawing(group, group["steps"])


def _is_drawing(group: Mapping[str, Any], step: int) -> bool:
    return step < group["first_draws"] or step % group["curvature_every"] == 0


def interval(group: Mapping[str, Any]) -> int:
    """Steps that columns at the step just counted stand for: until the next ones."""
    step, every = group["steps"] - 1, group["curvature_every"]
    return 1 if step + 1 < group["first_draws"] else every - step % every


def plan_step(group: Mapping[str, Any], observation: Observation, logits: Tensor) -> Plan:
    """What to take from the batches of the coming step.

    Args:
        group (`Mapping[str, Any]`): Options and progress of the filter.
        observation (`Observation`): What it observes.
        logits (`Tensor`): Of the first of the batches, (B, ..., V).

    Returns:
        `Plan`: The same in all processes.
    """
    kind, per_sequence = plan_columns(group, observation, logits.shape[-1], logits.dim() == 2)
    if not draws_columns(group):
        kind, per_sequence = "none", False
    seed = group["seed"] * 1_000_003 + group["steps"]
    return Plan(kind, per_sequence, group["num_columns"], group["top_k"], seed)


def plan_columns(
    options: Mapping[str, Any], observation: Observation, outputs: int, one_each: bool
) -> tuple[str, bool]:
    """Kind of columns, and whether there is one for each sequence.

    Args:
        options (`Mapping[str, Any]`): Of the filter.
        observation (`Observation`): What it observes.
        outputs (`int`): V.
        one_each (`bool`): Whether every sequence has one label.

    Returns:
        `tuple[str, bool]`: As in [`Plan`].
    """
    kind, per_sequence = options["columns"], options["per_sequence"]
    if kind == "auto":
        drawn = "sampled" if isinstance(observation, CategoricalObservation) else "rademacher"
        exact = options["top_k"] is not None or (one_each and outputs <= _EXACT_UP_TO and per_sequence is not False)
        kind = "exact" if exact else drawn
    if per_sequence is None:
        per_sequence = one_each or kind in ("exact", "empirical")
    return kind, per_sequence


def is_joint(gain: str, plan: Plan, memories: list[Memory]) -> bool:
    """Whether the gain is the exact one for the columns on top of the memories.

    Args:
        gain (`str`): "joint", "memory" or "auto".
        plan (`Plan`): Of the step.
        memories (`list[Memory]`): Of the filter.

    Returns:
        `bool`: Never at a step without columns.
    """
    if plan.kind == "none":
        return False
    return any(m.needs_joint for m in memories) or gain == "joint" or (gain == "auto" and plan.per_sequence)
