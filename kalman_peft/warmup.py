"""Warm start: a few steps on source data before the belief is fitted, so that no factor is blind.

With PEFT's default start B = 0 the curvature over A is exactly zero; after a step B is not, and both have curvature.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .adapters import AdapterState
from .distributed import broadcast_, world
from .losses import mean_loss_gradient


def warm_start(
    model: nn.Module,
    batches: Mapping[str, Iterable[Mapping[str, Tensor]]],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    weights: Mapping[str, float] | None = None,
    adapter_name: str | None = None,
    progress_bar: bool = True,
) -> list[float]:
    """Take `steps` AdamW steps on the loss of source data, without dropout, one batch per source and step, in turn.

    Deterministic, and the same in one process and in several. The steps are taken on float32 copies and cast to the
    factors' dtype, so that small steps do not vanish in bf16. Nothing but the adapter's factors is changed.

    Args:
        model (`PeftModel`): Model with a LoRA adapter, not wrapped.
        batches (`Mapping[str, Iterable]`): Batches with `labels` per source.
        steps (`int`): n >= 1.
        learning_rate (`float`, *optional*, defaults to 1e-3): Constant.
        weights (`Mapping[str, float]`, *optional*): Share of each source in the loss, summing to 1; equal by default.
        adapter_name (`str`, *optional*): Defaults to the active adapter.
        progress_bar (`bool`, *optional*, defaults to `True`): On the first process.

    Returns:
        `list[float]`: The weighted loss in nats per label before each step.

    Raises:
        ValueError: A number is out of range, a source is empty, its loss is not finite, or the model is sharded.
    """
    if steps < 1 or not 0 < learning_rate < math.inf:
        raise ValueError(f"steps must be >= 1 and learning_rate positive, got {steps} and {learning_rate}.")
    kept: dict[str, Sequence[Mapping[str, Tensor]]] = {name: list(source) for name, source in batches.items()}
    empty = [name for name, source in kept.items() if not source]
    if empty or not kept:
        raise ValueError(f"There are no batches to warm up on{f' in source {empty[0]!r}' if empty else ''}.")
    shares = dict(weights) if weights is not None else {name: 1 / len(kept) for name in kept}
    state = AdapterState(model, adapter_name, warn_excluded=False)
    broadcast_(state.tensors().values())
    masters = {
        key: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
        for key, p in state.parameters().items()
    }
    optimizer = torch.optim.AdamW(masters.values(), lr=learning_rate, weight_decay=0.0)
    losses = []
    bar = tqdm(range(steps), desc="warm start", disable=not (progress_bar and world()[0] == 0))
    for step in bar:
        total, gradient = 0.0, {key: torch.zeros_like(master) for key, master in masters.items()}
        for name, source in kept.items():
            if shares[name] == 0:
                continue
            loss, part = mean_loss_gradient(state, [source[step % len(source)]])
            total += shares[name] * loss
            for key, g in part.items():
                gradient[key].add_(g, alpha=shares[name])
        for key, master in masters.items():
            master.grad = gradient[key]
        optimizer.step()
        state.load(masters)
        losses.append(total)
        bar.set_postfix(loss=f"{total:.4f}", refresh=False)
    return losses
