"""What is back-propagated for a Fisher: scores of sampled labels, or of the true ones.

With labels drawn from the model, independently per token, cross-token terms vanish in expectation, and one backward of
the summed score is unbiased for the sum of the tokens' Fishers. With the true labels it is the empirical Fisher:
biased, one random draw cheaper.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..adapters import AdapterState
from ..observations import IGNORE_INDEX, CategoricalObservation, invert_cdf


FISHERS = ("sampled", "empirical")


def score_cotangents(
    logits: Tensor,
    labels: Tensor,
    observation: CategoricalObservation,
    kinds: Sequence[str],
    generator: torch.Generator | None = None,
) -> tuple[Iterator[Tensor], int, Tensor]:
    """Cotangents of the logits for the negative log-likelihood summed over all labels that count.

    Args:
        logits (`Tensor`): Shape (..., V).
        labels (`Tensor`): Shape (...), -100 where nothing is observed.
        observation (`CategoricalObservation`): How labels meet logits.
        kinds (`Sequence[str]`): One cotangent each: "sampled" for labels drawn afresh, "empirical" for the true ones.
        generator (`torch.Generator`, *optional*): Source of the draws.

    Returns:
        `tuple[Iterator[Tensor], int, Tensor]`: Cotangents of the logits' shape and dtype, the number of labels
        observed, and the mean negative log-likelihood of the true labels.

    Raises:
        ValueError: The logits are not finite, or a label lies outside them.
    """
    targets = observation.targets(logits, labels)
    rows = targets.ne(IGNORE_INDEX).nonzero().squeeze(-1)  # (N,)
    targets = targets[rows]
    if not len(rows):
        return iter(()), 0, logits.new_zeros(())
    flat = logits.detach().reshape(-1, logits.shape[-1])
    log_p = flat[rows].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)  # (N, V)
    own = torch.arange(len(rows), device=rows.device)
    loss = -log_p[own, targets].mean()
    probabilities = log_p.exp_()
    if not torch.isfinite(probabilities.sum()):
        raise ValueError("The model's logits contain NaN or Inf; no score can be read from them.")

    def generate() -> Iterator[Tensor]:
        for kind in kinds:
            drawn = invert_cdf(probabilities, generator) if kind == "sampled" else targets
            cotangent = torch.zeros_like(flat).index_copy_(0, rows, probabilities.to(flat.dtype))  # p - onehot
            cotangent[rows, drawn] -= 1
            yield cotangent.view_as(logits)

    return generate(), len(rows), loss


def backward_scores(logits: Tensor, cotangents: Iterator[Tensor], count: int) -> None:
    """Run one backward pass per cotangent, keeping the graph until the last."""
    for k, cotangent in enumerate(cotangents):
        logits.backward(cotangent, retain_graph=k < count - 1)


@contextmanager
def scoring(state: AdapterState) -> Iterator[None]:
    """Put the model in the condition in which scores are taken, and everything back on exit.

    Evaluation mode (no dropout), gradients on for the adapter alone, `.grad` set aside. Layers that checkpoint their
    activations stay flagged as training, since they checkpoint in no other mode; their children do not.

    Args:
        state (`AdapterState`): The adapter whose scores are taken.

    Yields:
        None: The model may be run forward and backward inside.
    """
    model = state.model
    modes = {module: module.training for module in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    ours = list(state.parameters().values())
    grads = {p: p.grad for p in ours}
    cache = _switch_off_cache(model)
    try:
        model.eval()
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
        for p in model.parameters():
            p.requires_grad_(False)
        for p in ours:
            p.requires_grad_(True)
            p.grad = None
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for p, flag in flags.items():
            p.requires_grad_(flag)
        for p, grad in grads.items():
            p.grad = grad
        cache()


def _switch_off_cache(model: nn.Module):
    """Turn the generation cache off; returns the function that restores it."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if config is not None and before:
        config.use_cache = False

    def restore() -> None:
        if config is not None and before:
            config.use_cache = before

    return restore


def default_forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of a transformers model; the labels are held back, since no loss is needed."""
    output = model(**{key: value for key, value in batch.items() if key not in ("labels", "num_items_in_batch")})
    logits = output["logits"] if isinstance(output, Mapping) else output.logits
    if not isinstance(logits, Tensor):
        raise ValueError("The model returned no logits; pass `forward_fn(model, batch) -> logits`.")
    return logits
