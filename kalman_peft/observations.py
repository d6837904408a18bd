"""What a batch observes: categorical labels on rows of logits, and the scores that are back-propagated for them.

Notation of the Fisher literature: for a row of logits z with p = softmax(z), the cotangent of -log p(y) is
p - onehot(y). With y drawn from p its mean is zero and its covariance is diag(p) - p p^T, the output curvature.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


IGNORE_INDEX = -100  # transformers' mark for labels that do not count


@dataclass(frozen=True)
class CategoricalObservation:
    """Labels that a softmax over the last dimension of the logits explains.

    Args:
        shift (`bool`): `True` for causal language models: the logits at position t explain the label at t + 1.
    """

    shift: bool

    def targets(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Labels aligned with the rows of the logits.

        Args:
            logits (`Tensor`): Shape (..., V).
            labels (`Tensor`): Integer labels, shape (...); -100 does not count.

        Returns:
            `Tensor`: Shape (number of rows,), dtype int64, on the logits' device.

        Raises:
            ValueError: The shapes do not fit, or a label is outside the vocabulary.
        """
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}; expected "
                f"{tuple(logits.shape[:-1])}."
            )
        if labels.is_floating_point():
            raise ValueError(f"labels must be class indices, got dtype {labels.dtype} (regression is not supported).")
        labels = labels.to(logits.device)
        if self.shift:
            labels = torch.cat([labels[..., 1:], labels.new_full((*labels.shape[:-1], 1), IGNORE_INDEX)], dim=-1)
        targets = labels.reshape(-1).long()
        seen = targets[targets.ne(IGNORE_INDEX)]
        if len(seen) and (seen.min() < 0 or seen.max() >= logits.shape[-1]):
            raise ValueError(
                f"Labels range over [{seen.min().item()}, {seen.max().item()}], outside the {logits.shape[-1]} "
                "classes of the logits; mark labels that do not count with -100."
            )
        return targets

    def positions(self, labels: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """Positions whose activations can carry a gradient: real tokens, and for causal models before the last label.

        Args:
            labels (`Tensor`): Shape (batch, time) or (batch,).
            attention_mask (`Tensor`, *optional*): Shape (batch, time), 1 at real tokens.

        Returns:
            `Tensor` or `None`: Boolean of shape (batch, time); `None` if every position counts.
        """
        mask = None if attention_mask is None or attention_mask.dim() != 2 else attention_mask.bool()
        if not self.shift:
            return mask
        valid = labels.ne(IGNORE_INDEX)
        before_last = valid.flip(-1).cumsum(-1).flip(-1).roll(-1, dims=-1)  # labels at positions > t
        before_last[..., -1] = 0
        before = before_last > 0
        return before if mask is None else before & mask.to(before.device)


def infer_observation(model: nn.Module) -> CategoricalObservation:
    """Choose the observation from the model's task.

    Args:
        model (`nn.Module`): A transformers model, possibly wrapped by PEFT.

    Returns:
        `CategoricalObservation`: Shifted for causal language models, unshifted for sequence classification.

    Raises:
        ValueError: The task is neither, or the classification head is a regression.
    """
    wrapped: Any = model
    base = wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped
    name = type(base).__name__
    config = getattr(base, "config", None)
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return CategoricalObservation(shift=True)
    if name.endswith("ForSequenceClassification"):
        problem = getattr(config, "problem_type", None)
        if getattr(config, "num_labels", 2) == 1 or problem in ("regression", "multi_label_classification"):
            raise ValueError(
                f"{name} with problem_type={problem!r}, num_labels={getattr(config, 'num_labels', None)} is no "
                "categorical observation; only single-label classification is supported."
            )
        return CategoricalObservation(shift=False)
    raise ValueError(
        f"Cannot tell what {name} observes; supported are causal language models and sequence classification. "
        "Pass `observation=CategoricalObservation(shift=...)` if its logits explain integer labels."
    )


def invert_cdf(probabilities: Tensor, generator: torch.Generator | None = None, block: int = 256) -> Tensor:
    """Draw one index per row of probabilities, by inversion of a two-level cumulative sum.

    `torch.multinomial` needs a random number per entry of the vocabulary, this one per row.

    Args:
        probabilities (`Tensor`): Float32 rows that sum to one, shape (N, V).
        generator (`torch.Generator`, *optional*): On the CPU or the device of the probabilities.
        block (`int`, *optional*, defaults to 256): Width of the lower level.

    Returns:
        `Tensor`: Indices, shape (N,), int64; none without probability.
    """
    rows, width = probabilities.shape
    device = generator.device if generator is not None else probabilities.device
    u = torch.rand(rows, generator=generator, device=device, dtype=probabilities.dtype).to(probabilities.device)
    padded = nn.functional.pad(probabilities, (0, -width % block)) if width % block else probabilities
    blocks = padded.view(rows, -1, block)
    mass = blocks.sum(-1)  # (N, V / block)
    chosen, left = _invert(mass, u * mass.sum(-1))
    inner = blocks[torch.arange(rows, device=blocks.device), chosen]  # (N, block)
    offset, _ = _invert(inner, left)
    return (chosen * block + offset).clamp_(max=width - 1)


def _invert(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First index at which the cumulative mass exceeds `target`, and what is left of the target inside it."""
    cumulative = mass.cumsum(-1)  # (N, n)
    # Rounding may leave the target at or above the total: stay below, so that no entry without mass is drawn.
    target = torch.minimum(target, torch.nextafter(cumulative[:, -1], torch.zeros_like(target)))
    index = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1).clamp_(max=mass.shape[-1] - 1)
    start = cumulative.gather(1, index[:, None]).squeeze(1) - mass.gather(1, index[:, None]).squeeze(1)
    return index, (target - start).clamp_(min=0)


def negative_log_likelihood(
    logits: Tensor, labels: Tensor, observation: CategoricalObservation
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood and number of labels that count.

    Args:
        logits (`Tensor`): Shape (..., V).
        labels (`Tensor`): Shape (...), -100 where nothing is observed.
        observation (`CategoricalObservation`): How labels meet logits.

    Returns:
        `tuple[Tensor, Tensor]`: Scalars.
    """
    targets = observation.targets(logits, labels)
    rows = logits.reshape(-1, logits.shape[-1])
    total = nn.functional.cross_entropy(rows.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total, targets.ne(IGNORE_INDEX).sum()
