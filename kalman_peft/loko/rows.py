"""What the labels of one micro-batch say about the outputs: scores and information, row by row.

With the residual e of a row, its covariance H and a weight w, a row adds to the filter
- form "logit":   the score -w e and the information w (H + epsilon C), which cannot vanish where the model is sure;
- form "softmax": what observing the probabilities with noise H + epsilon I says, the score -w H (H + epsilon I)^-1 e
  and the information w H (H + epsilon I)^-1 H, which bounds the score instead.
C is I, for classes I - 1 1^T / V: labels tell differences of logits apart only. epsilon is the option `damping` over
the trace of C, so that `damping` is the information added to a label, whose own has a trace below 1, for any number of
classes. Both forms are the extended Kalman filter's at 0. The weight is 1, or with an outlier threshold c that of the
weighted-likelihood filter, 1 / (1 + e^T (H + 0.05 I)^-1 e / c^2) (Duran-Martin et al., 2024, arXiv:2405.05646).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..curvature.fisher import number_labels
from ..observations import CategoricalObservation, GaussianObservation, Observation
from ..sampling import RowRandom, random_signs


POSITIONS = 2**20  # more labels than a sequence has; row keys are sequence * POSITIONS + number of the label
_WEIGHT_DAMPING = 0.05  # of the residual's covariance where an outlier is weighed


@dataclass(frozen=True, eq=False)
class Rows:
    """Observed rows of a micro-batch.

    Args:
        logits (`Tensor`): Detached, (B, ..., V).
        index (`Tensor`): Observed rows of the flattened logits, (N,).
        expected (`Tensor`): From `Observation.expect`, (N, V).
        targets (`Tensor`): Of the observed rows.
        loss (`Tensor`): Negative log-likelihoods, (N,).
        weights (`Tensor`, *optional*): Of the rows, (N,); `None` for 1.
        observation (`Observation`): How labels meet outputs.
        damping (`float`): epsilon, per direction.
        form (`str`): "logit" or "softmax".
    """

    logits: Tensor
    index: Tensor
    expected: Tensor
    targets: Tensor
    loss: Tensor
    weights: Tensor | None
    observation: Observation
    damping: float
    form: str

    def __len__(self) -> int:
        return len(self.index)

    @property
    def is_finite(self) -> bool:
        """Whether outputs and losses are."""
        return bool(torch.isfinite(self.expected.sum()) & torch.isfinite(self.loss.sum()))

    @property
    def owner(self) -> Tensor:
        """First dimension (sequence) of each row, (N,)."""
        return self.index // self.logits.shape[1:-1].numel()

    def random(self, first_sequence: int, seed: int) -> RowRandom:
        """Random numbers of the rows, the same however sequences are spread over micro-batches and processes."""
        return RowRandom((first_sequence + self.owner) * POSITIONS + self._slots(), seed)  # wherever the padding is

    def touched(self, chosen: Tensor | None = None) -> Tensor:
        """Sequences with a label (among the chosen rows, (N,) boolean), (B,) boolean."""
        found = torch.zeros(len(self.logits), dtype=torch.bool, device=self.logits.device)
        found[self.owner if chosen is None else self.owner[chosen]] = True
        return found

    def squares(self) -> float:
        """Mean over outputs, summed over rows, of the squared residual; for estimating a Gaussian's noise."""
        return float((self.targets - self.expected).square().mean(-1).sum())

    def traces(self, top_k: int | None = None) -> tuple[float, float]:
        """Trace of the labels' own information, summed over rows, and of what the columns carry of it, damped.

        The "softmax" form is not told apart.

        Args:
            top_k (`int`, *optional*): Of the columns, see [`Observation.roots`].
        """
        coarse = top_k is not None and top_k < self.observation.directions(self.expected.shape[-1])
        if not len(self) or not (coarse or (self.damping > 0 and self.form == "logit")):
            return float(len(self)), float(len(self))
        own = self.observation.trace(self.expected, self.targets)
        if coarse:
            roots = self.observation.roots(self.expected, self.targets, self.damping, top_k)
            carried = roots.square().sum((1, 2))
        else:
            carried = own + self.damping * self.observation.directions(self.expected.shape[-1])
        weights = torch.ones_like(own) if self.weights is None else self.weights
        return float(weights @ own), float(weights @ carried)

    def score(self) -> Tensor:
        """Cotangent of the negative log-likelihood, of the logits' shape."""
        rows = self._soften(self._residual(self.targets))
        return self.place(rows if self.weights is None else rows * self.weights[:, None])

    def draw(self, kind: str, random: RowRandom) -> Tensor:
        """A random cotangent whose square has the rows' information as its expectation: "sampled" or "rademacher"."""
        if kind == "sampled":
            rows = self._residual(self.observation.draw(self.expected, random))
        else:
            rows = self.observation.random_root(self.expected, self.targets, random)
        if self.damping > 0:
            other = RowRandom(random.state, 1)  # independent of the draw itself
            noise = self.observation.damping_noise(random_signs(rows.shape, rows, other))
            rows = rows + self.damping**0.5 * noise
        return self.place(self._weigh(self._soften(rows)))

    def roots(self, top_k: int | None, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Cotangents whose squares sum to the rows' information, one label of every sequence at a time.

        Args:
            top_k (`int`, *optional*): See [`Observation.roots`].
            limit (`int`): Most cotangents.

        Yields:
            tuple: A cotangent of the logits' shape, and which sequences it touches, (B,) boolean.

        Raises:
            ValueError: More than `limit` of them.
        """
        slots, number = self._slots(), self.observation.num_roots(self.expected.shape[-1], top_k)
        passes = (int(slots.max()) + 1) * number
        if passes > limit:
            raise ValueError(
                f"columns='exact' takes {passes} backward passes for this batch ({number} for each label of a "
                f"sequence), more than {limit}; use columns='sampled', or top_k."
            )
        roots = self.observation.roots(self.expected, self.targets, self.damping, top_k)  # (N, K, V)
        for slot in range(int(slots.max()) + 1):
            chosen = slots == slot
            touched = self.touched(chosen)
            for k in range(roots.shape[1]):
                rows = roots.new_zeros(roots.shape[0], roots.shape[2])
                rows[chosen] = roots[chosen, k]
                yield self.place(self._weigh(self._soften(rows))), touched

    def place(self, rows: Tensor) -> Tensor:
        """Rows (N, V) at their places in a tensor of the logits' shape and dtype."""
        flat = torch.zeros_like(self.logits).view(-1, self.logits.shape[-1])
        return flat.index_copy_(0, self.index, rows.to(flat.dtype)).view_as(self.logits)

    def _residual(self, targets: Tensor) -> Tensor:
        out = torch.zeros_like(self.expected)
        self.observation.residual(self.expected, targets, out, torch.arange(len(out), device=out.device))
        return out

    def _soften(self, rows: Tensor) -> Tensor:
        if self.form == "softmax" and self.damping > 0:
            return self.observation.soften(self.expected, rows, self.damping)
        return rows

    def _weigh(self, rows: Tensor) -> Tensor:
        return rows if self.weights is None else rows * self.weights.sqrt()[:, None]

    def _slots(self) -> Tensor:
        """How many observed rows of the same sequence come before each, (N,)."""
        return number_labels(self.index, self.logits)


def linearise(
    logits: Tensor,
    labels: Tensor,
    observation: Observation,
    segments: Tensor | None = None,
    *,
    options: dict[str, Any],
    variance: float | None = None,
) -> Rows:
    """Read a micro-batch.

    Args:
        logits (`Tensor`): Shape (B, ..., V).
        labels (`Tensor`): As the model takes them.
        observation (`Observation`): How labels meet outputs.
        segments (`Tensor`, *optional*): See [`Observation.targets`].
        options (`dict`): "damping", "form" and "outlier_threshold".
        variance (`float`, *optional*): Estimated noise of a Gaussian observation, of which `observation` has 1.

    Returns:
        `Rows`: Perhaps none.

    Raises:
        ValueError: The labels do not fit the logits.
    """
    if isinstance(observation, CategoricalObservation) and logits.shape[-1] < 2:
        raise ValueError("One class tells nothing: set num_labels >= 2, or observe values with a GaussianObservation.")
    targets = observation.targets(logits, labels, segments)
    index = observation.observed(targets).nonzero().squeeze(-1)
    outputs, targets = logits.detach().reshape(-1, logits.shape[-1])[index], targets[index]
    expected = observation.expect(outputs)
    loss = observation.loss(outputs, expected, targets) if len(index) else expected.new_zeros(0)
    threshold, weights = options["outlier_threshold"], None
    if threshold is not None:
        surprise = observation.surprise(expected, targets, _WEIGHT_DAMPING)
        if isinstance(observation, GaussianObservation):
            surprise = surprise / (variance or 1.0)
        weights = 1 / (1 + surprise / threshold**2)
    damping = options["damping"] / observation.directions(logits.shape[-1])
    return Rows(logits.detach(), index, expected, targets, loss, weights, observation, damping, options["form"])
