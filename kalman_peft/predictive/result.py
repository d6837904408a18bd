"""What every method of prediction returns, and which of a model's logits it is about."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .moments import pairwise_probabilities, probit_probabilities, variance_dtype


Positions = str | Tensor | None


@dataclass(frozen=True)
class Predictive:
    """Logits with their uncertainty, and class probabilities.

    Args:
        logits (`Tensor`): Means, (..., C).
        variance (`Tensor`): Of each logit, (..., C), float32 or float64; zero without uncertainty.
        probabilities (`Tensor`): (..., C).
        covariance (`Tensor`, *optional*): Of the logits of a row, (..., C, C), where the method gives it.
        gaussian (`bool`, *optional*, defaults to `True`):
            Whether the probabilities follow from the moments; those of [`sampled`] and [`ensembled`] are averages.
    """

    logits: Tensor
    variance: Tensor
    probabilities: Tensor
    covariance: Tensor | None = None
    gaussian: bool = True

    @classmethod
    def from_moments(
        cls,
        logits: Tensor,
        variance: Tensor | None = None,
        covariance: Tensor | None = None,
        *,
        scale: float = 1.0,
        temperature: float = 1.0,
    ) -> "Predictive":
        """Of Gaussian logits.

        Args:
            logits (`Tensor`): Means, (..., C).
            variance (`Tensor`, *optional*): (..., C); the diagonal of the covariance, or zero, by default.
            covariance (`Tensor`, *optional*): (..., C, C).
            scale (`float`, *optional*, defaults to 1.0): On variance and covariance, see [`fit_scale`].
            temperature (`float`, *optional*, defaults to 1.0): On the logits.

        Returns:
            `Predictive`: Probabilities by [`pairwise_probabilities`] with a covariance, by [`probit_probabilities`]
            without. Logits and moments are scaled as well.
        """
        if covariance is not None:
            variance = covariance.diagonal(dim1=-2, dim2=-1)
            probabilities = pairwise_probabilities(logits, covariance, scale, temperature)
        else:
            if variance is None:
                variance = torch.zeros(logits.shape, dtype=variance_dtype(logits), device=logits.device)
            probabilities = probit_probabilities(logits, variance, scale, temperature)
        factor = scale / temperature**2
        return cls(
            logits / temperature, factor * variance, probabilities, None if covariance is None else factor * covariance
        )

    def marginal(self) -> "Predictive":
        """Without the covariance: probabilities by the variances alone, as those of [`streamlined`] are."""
        self._check_gaussian()
        return self.from_moments(self.logits, self.variance)

    def scaled(self, scale: float = 1.0, temperature: float = 1.0) -> "Predictive":
        """With a factor on the variance and a temperature on the logits, see [`fit_scale`].

        Args:
            scale (`float`, *optional*, defaults to 1.0): > 0.
            temperature (`float`, *optional*, defaults to 1.0): > 0.

        Returns:
            `Predictive`: With other probabilities.

        Raises:
            ValueError: The probabilities are averages, or a number is out of range.
        """
        self._check_gaussian()
        return self.from_moments(self.logits, self.variance, self.covariance, scale=scale, temperature=temperature)

    def fields(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        found = {name: getattr(self, name) for name in ("logits", "variance", "probabilities", "covariance")}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Tensor], gaussian: bool = True) -> "Predictive":
        """Inverse of `fields`."""
        return cls(fields["logits"], fields["variance"], fields["probabilities"], fields.get("covariance"), gaussian)

    @classmethod
    def cat(cls, parts: Sequence["Predictive"]) -> "Predictive":
        """The rows of several batches.

        Args:
            parts (`Sequence[Predictive]`): At least one, all of one method.

        Returns:
            `Predictive`: Joined along the first dimension.
        """
        joined = {name: torch.cat([getattr(p, name) for p in parts]) for name in parts[0].fields()}
        return cls.from_fields(joined, parts[0].gaussian)

    def _check_gaussian(self) -> None:
        if not self.gaussian:
            raise ValueError(
                "These probabilities are averages over adapters, which moments of the logits do not determine; fit a "
                "scale or temperature to a 'map', 'streamlined' or 'linearized' prediction."
            )


def select(logits: Tensor, inputs: Mapping[str, Any], positions: Positions = None, entries: Any = None) -> Tensor:
    """Which logits a prediction is about; only picks, so that it applies to means and variances alike.

    Args:
        logits (`Tensor`): (n, C) of a classifier, (n, T, V) of a language model.
        inputs (`Mapping`): The batch; its `attention_mask` tells the last token.
        positions (`str` or `Tensor`, *optional*):
            Of (n, T, V): all by default, "last" for the last one that is attended, or one index per row, (n,).
        entries (`Sequence[int]` or `Tensor`, *optional*): Indices of classes or of the vocabulary, (K,).

    Returns:
        `Tensor`: (n, K), or (n, T, K) for all positions.

    Raises:
        ValueError: There are no positions to choose from, or none of that kind.
    """
    if positions is not None:
        if logits.dim() != 3:
            raise ValueError(f"positions is for logits (rows, tokens, vocabulary), here {tuple(logits.shape)}.")
        index = _last(logits, inputs) if isinstance(positions, str) and positions == "last" else positions
        if not isinstance(index, Tensor) or index.shape != logits.shape[:1]:
            raise ValueError(f"positions must be None, 'last', or one index per row (n,), got {positions!r}.")
        logits = logits[torch.arange(len(logits), device=logits.device), index.to(logits.device)]
    if entries is not None:
        logits = logits[..., torch.as_tensor(entries, device=logits.device)]
    return logits


def _last(logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return torch.full(logits.shape[:1], logits.shape[1] - 1, device=logits.device)
    places = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask.bool(), places, 0).amax(1)


def without_labels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without what only a loss needs."""
    return {key: value for key, value in inputs.items() if key != "labels"}


def row_chunks(inputs: Mapping[str, Any], rows: int) -> Iterator[dict[str, Any]]:
    """Parts of a batch.

    Args:
        inputs (`Mapping`): Tensors whose first dimension is the batch, and other values.
        rows (`int`): At most so many per part.

    Yields:
        dict: Tensors cut, other values as they are.
    """
    size = batch_size(inputs)
    for start in range(0, size, rows):
        yield {
            key: value[start : start + rows] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value
            for key, value in inputs.items()
        }


def batch_size(inputs: Mapping[str, Any]) -> int:
    """Rows, by the first tensor.

    Raises:
        ValueError: There is none.
    """
    for value in inputs.values():
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    raise ValueError("The batch holds no tensor.")
