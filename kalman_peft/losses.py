"""Mean negative log-likelihood per label over a few batches, and its gradient over the adapter, over all processes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import AdapterState
from .curvature.fisher import default_forward, scoring
from .curvature.sequences import find_segments
from .distributed import all_sum_, any_process, is_sharded, world
from .observations import CategoricalObservation, infer_observation, negative_log_likelihood


Batch = Mapping[str, Tensor]


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    prepare: Callable[[Any], dict[str, Any]] = dict,
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> float:
    """Loss per label that counts, in evaluation mode, each process taking every W-th batch.

    Args:
        model (`nn.Module`): Not wrapped by DistributedDataParallel.
        batches (`Iterable`): The same in all processes.
        prepare (`Callable`, *optional*): Moves a batch to the model's device.
        context (`Callable`, *optional*): Context of the forward pass, e.g. autocast.

    Returns:
        `float`: Nats per label.

    Raises:
        ValueError: A batch has no labels, or none of all labels counts.
    """
    rank, size = world()
    observation = infer_observation(model)
    mode = model.training
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    failure: Exception | None = None
    model.eval()
    try:
        for index, batch in enumerate(batches):
            if index % size != rank:
                continue
            batch = prepare(batch)
            _check_labels(batch)
            with context():
                logits = default_forward(model, batch)
            segments = find_segments(batch, batch["labels"], observation, model)
            total, count = negative_log_likelihood(logits, batch["labels"], observation, segments)
            sums += torch.stack([total.to(sums), count.to(sums)])
    except Exception as error:  # raised below, after the other processes know
        failure = error
    finally:
        model.train(mode)
    if any_process(failure is not None, device):
        raise failure or RuntimeError("Measuring a loss failed on another process; its error is in its output.")
    all_sum_([sums])
    total, count = sums.tolist()
    if count == 0:
        raise ValueError("The held-out part of `source_dataset` has no labels; all are -100 or it is empty.")
    return total / count


def mean_loss_gradient(state: AdapterState, batches: Iterable[Batch]) -> tuple[float, dict[str, Tensor]]:
    """Loss per label that counts and its gradient over the adapter's factors, without dropout.

    Each process takes every W-th sequence of each batch; sums and counts are added over processes, so that the result
    is that of one.

    Args:
        state (`AdapterState`): The adapter.
        batches (`Iterable`): The same in all processes.

    Returns:
        `tuple[float, dict[str, Tensor]]`: Nats per label, and one tensor per key, float32 or wider.

    Raises:
        ValueError: A batch has no labels, none of all labels counts, the loss is not finite, or the model is sharded.
    """
    rank, size = world()
    observation = infer_observation(state.model)
    parameters = state.parameters()
    if any(is_sharded(p) for p in parameters.values()):
        raise ValueError("Warm start and evidence do not support sharded models (FSDP2); do without them there.")
    device = state.pairs[0].a.device
    sums = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    gradient = {
        k: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for k, p in parameters.items()
    }
    failure: Exception | None = None
    with _differentiable(state):
        try:
            for batch in batches:
                _check_labels(batch)
                part = _share(batch, rank, size, device)
                if not len(part["labels"]):
                    continue
                logits = default_forward(state.model, part)
                segments = find_segments(part, part["labels"], observation, state.model)
                total, count = negative_log_likelihood(logits, part["labels"], observation, segments)
                sums += torch.stack([total.detach().to(sums), count.to(sums)])
                if count:
                    total.backward()  # not autograd.grad, which reentrant checkpointing does not allow
                    for key, p in parameters.items():
                        if p.grad is not None:
                            gradient[key] += p.grad
                            p.grad = None
        except Exception as error:  # raised below, after the other processes know
            failure = error
    if any_process(failure is not None, device):
        raise failure or RuntimeError("A gradient failed on another process; its error is in its output.")
    all_sum_([sums, *gradient.values()])
    total, count = sums.tolist()
    if count == 0:
        raise ValueError("The data have no labels that count; all are -100 or there are none.")
    if not torch.isfinite(sums).all():
        raise ValueError("The loss is NaN or Inf; check the data and the model's dtype.")
    return total / count, {key: g / count for key, g in gradient.items()}


@contextmanager
def _differentiable(state: AdapterState) -> Iterator[None]:
    """`scoring` with gradients for the factors, whose `.grad` is set aside."""
    grads = {p: p.grad for p in state.parameters().values()}
    with scoring(state):
        try:
            for p in grads:
                p.requires_grad_(True)
                p.grad = None
            yield
        finally:
            for p, grad in grads.items():
                p.grad = grad


def _check_labels(batch: Batch) -> None:
    if batch.get("labels") is None:
        raise ValueError(f"A batch has no `labels` (keys: {sorted(batch)}); its loss is not known.")


def _share(batch: Batch, rank: int, size: int, device: torch.device) -> dict[str, Any]:
    """Every `size`-th sequence of a batch, on `device`."""
    rows = len(batch["labels"])
    return {
        key: (value[rank::size] if len(value) == rows else value).to(device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


@torch.no_grad()
def divergence_from_base(
    model: nn.Module, batches: Iterable[Batch], prepare: Callable[[Any], dict[str, Any]] = dict
) -> dict[str, float]:
    """Loss with and without the adapter, and KL(base || adapted), per label that counts, in evaluation mode.

    One process; whole distributions are compared in float32 (or wider), one batch at a time.

    Args:
        model (`PeftModel`): With the adapter active.
        batches (`Iterable`): With `labels`.
        prepare (`Callable`, *optional*): Moves a batch to the model's device.

    Returns:
        `dict[str, float]`: `loss`, `base_loss`, `rise` (their difference) and `kl` in nats per label, and `labels`.

    Raises:
        TypeError: There is no adapter to switch off.
        ValueError: A batch has no labels, none of all labels counts, or the labels are no classes.
    """
    observation = infer_observation(model)
    switch: Any = getattr(model, "disable_adapter", None)
    if switch is None:
        raise TypeError(f"model must be a PeftModel, whose adapter can be switched off, got {type(model).__name__}.")
    if not isinstance(observation, CategoricalObservation):
        raise ValueError(f"The divergence is known for classes and tokens, not for {type(observation).__name__}.")
    sums, labels = torch.zeros(3, dtype=torch.float64), 0
    mode = model.training
    model.eval()
    try:
        for batch in batches:
            batch = prepare(batch)
            _check_labels(batch)
            segments = find_segments(batch, batch["labels"], observation, model)
            logits = default_forward(model, batch)
            with switch():
                base = default_forward(model, batch)
            targets = observation.targets(logits, batch["labels"], segments)
            index = observation.observed(targets).nonzero().squeeze(-1)
            kind = torch.promote_types(logits.dtype, torch.float32)
            q, p = (x.reshape(-1, x.shape[-1])[index].to(kind).log_softmax(-1) for x in (logits, base))  # (N, V)
            kl = nn.functional.kl_div(q, p, reduction="sum", log_target=True)
            losses = [nn.functional.nll_loss(x, targets[index], reduction="sum") for x in (q, p)]
            sums += torch.stack([*losses, kl]).cpu().double()
            labels += len(index)
    finally:
        model.train(mode)
    if not labels:
        raise ValueError("The data have no labels that count; all are -100 or there are none.")
    loss, base_loss, kl = (sums / labels).tolist()
    return {"loss": loss, "base_loss": base_loss, "rise": loss - base_loss, "kl": kl, "labels": labels}
