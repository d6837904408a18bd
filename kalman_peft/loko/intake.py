"""From logits and labels to the evidence of one step, in which everything is finite and the prior settled."""

import logging
import math
from typing import Any

from torch import Tensor

from ..observations import Observation
from .columns import ColumnTaps
from .harvest import Evidence, Harvest, Plan
from .idle import warn_at_first
from .memories import Memory
from .noise import estimate_variance, in_units_of
from .paper import PaperHarvest, whiten_evidence
from .planning import plan_step
from .rows import linearise
from .settling import settle_priors


logger = logging.getLogger(__name__)


class Intake:
    """What is observed between two steps of a filter.

    Args:
        group (`dict[str, Any]`): Options and progress of the filter.
        memories (`list[Memory]`): Of the filter.
        observation (`Observation`): How labels meet logits.
        taps (`ColumnTaps`, *optional*): For columns of single sequences.
        estimate_noise (`bool`): Whether the variance of Gaussian labels is estimated.
        state (`dict[str, Any]`): Keeps the noise of `mode="paper"`.

    Attributes:
        plan (`Plan`, *optional*): Which columns are taken, once something was observed.
    """

    def __init__(
        self,
        group: dict[str, Any],
        memories: list[Memory],
        observation: Observation,
        *,
        taps: ColumnTaps | None,
        estimate_noise: bool,
        state: dict[str, Any],
    ):
        self._group, self._memories, self._observation = group, memories, observation
        self._estimates_noise, self._state = estimate_noise, state
        kind = PaperHarvest if group["mode"] == "paper" else Harvest
        self.harvest = kind([memory.view for memory in memories], taps)
        self.plan: Plan | None = None
        self._warned = False  # of options without effect

    @property
    def is_empty(self) -> bool:
        """Whether nothing was observed since the last step."""
        return self.plan is None or not self.harvest.observed

    def clear(self) -> None:
        """Drop what was observed."""
        self.harvest.clear()
        self.plan = None

    def add(self, logits: Tensor, labels: Tensor, segments: Tensor | None) -> Tensor:
        """Take a micro-batch, see [`LoKO.observe`]."""
        _check_logits(logits)
        group = self._group
        plan = self.plan or plan_step(group, self._observation, logits)
        if not self._warned:
            warn_at_first(group, self._observation, logits)
            self._warned = True
        try:
            _check_tensor("labels", labels)
            rows = linearise(logits, labels, self._observation, segments, options=group, variance=group["variance"])
        except Exception as error:
            self.harvest.add_failure(error, logits, plan)
            self.plan = plan
            return logits.new_full((), math.nan)
        self.plan = plan
        self.harvest.add(logits, rows, plan, rows.squares() if self._estimates_noise else 0.0)
        return rows.loss.mean() if len(rows) else rows.loss.new_zeros(())

    def take(self, fresh: bool) -> Evidence | None:
        """What was observed by all processes, if anything was.

        Args:
            fresh (`bool`): Whether these labels are seen for the first time, rather than linearised once more.

        Returns:
            `Evidence`: Or `None` if there is nothing to learn from it.

        Raises:
            Exception: A micro-batch could not be taken on some process; of several processes only.
            FloatingPointError: More than `max_skipped` batches in a row were not finite.
        """
        assert self.plan is not None
        group = self._group
        try:
            evidence = self.harvest.reduce(self.plan, group["max_columns"])
            if not self._is_usable(evidence):
                return None
            if isinstance(self.harvest, PaperHarvest):
                residuals = self.harvest.residuals()
                evidence = whiten_evidence(self._state, self._memories, evidence, residuals, group["noise_decay"])
        finally:
            self.clear()
        if self._estimates_noise:
            if fresh:
                estimate_variance(group, evidence)
            evidence = in_units_of(evidence, group["variance"])
        settle_priors(group, self._memories, evidence)
        return evidence if group["settled"] else None

    def _is_usable(self, evidence: Evidence) -> bool:
        group = self._group
        if evidence.is_finite:
            group["skipped"] = 0
            if evidence.count == 0:
                logger.warning("LoKO saw no label in this step (all -100); weights and memory stay as they are.")
            return evidence.count > 0
        group["skipped"] += 1
        logger.warning(
            "LoKO skipped a batch whose logits or scores overflow or contain NaN or Inf (%d in a row); weights and "
            "memory stay as they are.", group["skipped"],
        )  # fmt: skip
        if group["skipped"] > group["max_skipped"]:
            raise FloatingPointError(
                f"{group['skipped']} batches in a row contained NaN or Inf. Weights and memory are those before the "
                "first of them; check the data and the model's dtype, or raise max_skipped."
            )
        return False


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}; pass `model(**inputs).logits`.")


def _check_logits(logits: Any) -> None:
    _check_tensor("logits", logits)
    if not logits.requires_grad:
        raise ValueError(
            "logits have no graph to the weights: run the model with gradients enabled and its adapter active, and do "
            "not detach them."
        )
