"""How much a step's labels count: the power on their likelihood."""

from typing import Any

from .harvest import Evidence


def temper(group: dict[str, Any], evidence: Evidence) -> float:
    """Power on this step's likelihood: tempering * T^-correlation / misfit, with T labels per sequence.

    Args:
        group (`dict[str, Any]`): Options and progress of the filter.
        evidence (`Evidence`): Of the step.

    Returns:
        `float`: Positive.
    """
    length = evidence.count / max(evidence.sequences, 1.0)
    return group["tempering"] * length ** -group["correlation"] / max(1.0, group["misfit"])


def track_misfit(group: dict[str, Any], energy: float, expected: float) -> None:
    """Take in how well one step's data fit.

    The misfit is a ratio of running means, from 1; a mean of ratios would be lost to one batch that expects next to
    nothing.

    Args:
        group (`dict[str, Any]`): Options and progress of the filter.
        energy (`float`): g^T P g of the score.
        expected (`float`): The same as the model expects it, positive.
    """
    decay = group["adaptive_noise"]
    if group["column_energy"] == 0:
        group["score_energy"] = group["column_energy"] = expected
    group["score_energy"] = decay * group["score_energy"] + (1 - decay) * energy
    group["column_energy"] = decay * group["column_energy"] + (1 - decay) * expected
    group["misfit"] = group["score_energy"] / group["column_energy"]
