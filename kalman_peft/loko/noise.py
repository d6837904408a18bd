"""Noise: of the weights from step to step (process noise), and of Gaussian labels (estimated)."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .harvest import Evidence
from .options import check
from .views import View


def process_noise(view: View, noise: float | Mapping[str, float]) -> Tensor | None:
    """Variance added to the weights per step.

    Args:
        view (`View`): The weights.
        noise (`float` or `Mapping[str, float]`): One for all; or by regular expression, where the last match counts.

    Returns:
        `Tensor`: One per parameter (n,), or `None` if there is none.
    """
    if isinstance(noise, Mapping):
        found = [[q for pattern, q in noise.items() if re.search(pattern, name)] for name in view.names]
        values = [matches[-1] if matches else 0.0 for matches in found]
    else:
        values = [noise] * len(view.names)
    return torch.tensor(values, dtype=torch.float64).to(view.like) if any(values) else None


def check_patterns(noise: float | Mapping[str, float], names: list[str]) -> None:
    """Raise ValueError for patterns of the process noise that match no name."""
    if isinstance(noise, Mapping):
        unused = [pattern for pattern in noise if not any(re.search(pattern, name) for name in names)]
        check(not unused, f"process_noise: patterns {unused} match no parameter; there are {names[:3]} and others")


def estimate_variance(group: dict[str, Any], evidence: Evidence) -> None:
    """Running mean of squared residuals, those of this step too.

    They are those before the step, so that the estimate errs on the side of too much noise.

    Args:
        group (`dict[str, Any]`): Options and progress of the filter.
        evidence (`Evidence`): Of the step.
    """
    decay, weight = group["noise_decay"], group["variance_weight"]
    fresh = evidence.squares / evidence.count
    group["variance_weight"] = decay * weight + 1 - decay
    held = decay * weight * (group["variance"] or 0.0)
    group["variance"] = max((held + (1 - decay) * fresh) / group["variance_weight"], 1e-12)


def in_units_of(evidence: Evidence, variance: float) -> Evidence:
    """Evidence of Gaussian labels with this variance, from that with variance 1, which is overwritten."""
    columns = evidence.columns and [c.div_(variance**0.5) for c in evidence.columns]
    scores = [s.div_(variance) for s in evidence.scores]
    return replace(evidence, scores=scores, columns=columns, loss=evidence.loss / variance)
