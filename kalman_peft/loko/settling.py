"""Prior precisions: given, settled by the first columns, or drawn as in the published filter."""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from .harvest import Evidence
from .memories import Memory


logger = logging.getLogger(__name__)


def set_priors(group: dict[str, Any], memories: list[Memory], prior_precision: Mapping[str, float | None]) -> None:
    """Prior precisions that are known; 0 stands for one that the first columns will settle.

    Args:
        group (`dict[str, Any]`): Options and progress of the filter.
        memories (`list[Memory]`): Of the filter.
        prior_precision (`Mapping[str, float | None]`): By parameter name.
    """
    for memory in memories:
        own = torch.tensor([prior_precision.get(name) or 0.0 for name in memory.view.names], dtype=torch.float64)
        memory.set_prior(own.to(memory.prior))
    group["settled"] = all(bool((memory.prior > 0).all()) for memory in memories)


def draw_variances(group: dict[str, Any], memories: list[Memory]) -> None:
    """With `mode="paper"`: initial variances, uniform in [0, `initial_bound`].

    Args:
        group (`dict[str, Any]`): Options and progress of the filter.
        memories (`list[Memory]`): Diagonal covariances.
    """
    generator = torch.Generator().manual_seed(group["seed"])
    bound = group["initial_bound"]
    for memory in memories:
        memory.set_prior(torch.full_like(memory.prior, 2 / bound))
        drawn = torch.rand(memory.view.shape, generator=generator) * bound
        memory.tensors["variance"].copy_(drawn.clamp_min(bound * 1e-6))
    group["settled"] = True


def settle_priors(group: dict[str, Any], memories: list[Memory], evidence: Evidence) -> None:
    """Priors from the first columns: prior_tokens * mean Fisher per label, of all weights or of the parameter's.

    A parameter that (almost) no gradient reached yet gets that of one with a thousandth of the average Fisher.

    Args:
        group (`dict[str, Any]`): Options and progress of the filter; nothing is done if its priors are settled.
        memories (`list[Memory]`): Of the filter.
        evidence (`Evidence`): Of a step; without columns nothing is done. Damping is no information of the labels.
    """
    if group["settled"] or evidence.columns is None:
        return
    count = evidence.count / evidence.undamped
    views = [memory.view for memory in memories]
    sums = [view.per_parameter(c.square().sum(0)) / count for view, c in zip(views, evidence.columns, strict=True)]
    sizes = [torch.tensor([p.numel() for p in view.params]).to(f) for view, f in zip(views, sums, strict=True)]
    fisher = [f / size for f, size in zip(sums, sizes, strict=True)]
    floor = 1e-3 * torch.cat([f.to(fisher[0]) for f in fisher]).mean()
    if floor == 0:
        logger.warning(
            "The first columns hold no information at all: no gradient, or a likelihood without positive "
            "curvature (for which there is columns='empirical'). The prior is settled at a later step."
        )
        return
    if group["prior"] == "pooled":
        floor = sum(float(f.sum()) for f in sums) / sum(float(size.sum()) for size in sizes)
        fisher = [torch.full_like(f, floor) for f in fisher]
    for memory, own in zip(memories, fisher, strict=True):
        known = memory.prior > 0
        unit = group["prior_tokens"] * own.clamp_min(float(floor))
        memory.set_prior(torch.where(known, memory.prior, unit))
    group["settled"] = True
