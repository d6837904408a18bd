"""A belief as the prior of a filter.

(1/N) sum of the losses + lambda/2 |theta - theta_0|^2_Lambda is the objective of a filter over N labels that starts at
theta_0 with precision lambda N Lambda. Either that precision is there from the start ("prior"), or every step brings
the share of its labels: the gradient ("penalty"), or gradient and information ("factor"), which also serves energies
that are no Gaussian in A and B, such as that of the merged update.
"""

import logging
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .memories import Memory, export
from .options import check


if TYPE_CHECKING:
    from ..belief import Belief


logger = logging.getLogger(__name__)

BELIEF_MODES = ("factor", "penalty", "prior")


class Pull(NamedTuple):
    """What a belief adds to a step.

    Args:
        gradient (`list[Tensor]`): Of the penalty, per view.
        information (`list[Tensor]`, *optional*): Its Gauss-Newton diagonal, per view.
        energy (`Tensor`): The penalty at strength 1, nats per label.
    """

    gradient: list[Tensor]
    information: list[Tensor] | None
    energy: Tensor


class BeliefPrior:
    """The belief of one filter, if it has any.

    Args:
        group (`dict[str, Any]`): Options and progress of the filter.
        memories (`list[Memory]`): Of the filter.

    Attributes:
        belief (`Belief`, *optional*): Once `set`.
    """

    def __init__(self, group: dict[str, Any], memories: list[Memory]):
        self._group, self._memories = group, memories
        self.belief: Belief | None = None
        self.mode = "factor"
        self.strength = 0.0
        self._num_labels: float | None = None

    def set(self, belief: "Belief", strength: float, mode: str, num_labels: float | None) -> None:
        """See [`LoKO.set_belief`]."""
        group = self._group
        check(mode in BELIEF_MODES, f"mode must be one of {BELIEF_MODES}, got {mode!r}")
        check(group["mode"] != "paper", "mode='paper' has no prior belief; use mode='kalman'")
        check(0 <= strength < math.inf, f"strength must be >= 0 and finite, got {strength}")
        missing = belief.mean.keys() - {n for m in self._memories for n in m.view.names}
        check(not missing, f"The belief covers weights that are not optimised: {sorted(missing)[:3]}")
        if group["belief_counted"]:
            check(mode == "prior", "The filter's precision holds a belief already; another would count it twice")
        if mode == "prior":
            self._check_prior(belief, num_labels)
        self.belief, self.strength, self.mode, self._num_labels = belief, strength, mode, num_labels

    def _check_prior(self, belief: "Belief", num_labels: float | None) -> None:
        group = self._group
        precision = belief.precision
        check(
            num_labels is not None and 0 < num_labels < math.inf,
            f"mode='prior' needs num_labels > 0, the labels of the whole run; got {num_labels}",
        )
        check(
            precision.space == "adapter",
            f"mode='prior' needs a Gaussian over A and B; a belief in space {precision.space!r} is none: fit it with "
            "space='adapter', or use mode='factor'",
        )
        check(
            group["forgetting"] == 1,
            f"forgetting={group['forgetting']} would relax the belief itself with mode='prior'; use mode='factor', or "
            "process_noise",
        )
        if group["belief_counted"]:
            return  # resumed: the filter's precision holds it
        check(group["steps"] == 0, "mode='prior' is the filter's start, but it has taken steps; use mode='factor'")

    def _check_start(self, belief: "Belief") -> None:
        for name, p in self._named_parameters():
            if name in belief.mean and not torch.allclose(
                p.detach().float(), belief.mean[name].float().to(p.device), atol=1e-2
            ):
                raise ValueError(
                    f"mode='prior' starts at the belief's mean, but {name} is elsewhere; load the adapter that the "
                    "belief was fitted at, or use mode='factor'."
                )

    @property
    def adds_information(self) -> bool:
        """Whether a step to come adds to the filter's precision."""
        if self.belief is None or self.mode == "penalty":
            return False
        return not self._group["belief_counted"] if self.mode == "prior" else self.strength > 0

    def change_strength(self, value: float) -> None:
        """A new strength for the steps to come.

        Raises:
            ValueError: There is no belief, or it was counted as a whole at the start.
        """
        check(self.belief is not None, "There is no belief whose strength could be set; call set_belief(belief) first")
        if self.mode == "prior" and value != self.strength:
            raise ValueError("With mode='prior' the belief is counted once, at the start; its strength cannot change.")
        self.strength = value

    def count_once(self) -> None:
        """With mode "prior": add the belief to the settled prior, if that has not been done."""
        group = self._group
        if self.belief is None or self.mode != "prior" or group["belief_counted"]:
            return
        assert self._num_labels is not None
        self._check_start(self.belief)  # not in `set`: a run that is resumed has other weights, and counts it no more
        weight = self.strength * self._num_labels * group["tempering"]
        precision = self.belief.precision
        own = self.belief.mean.keys()
        kept = [m.absorb(precision, weight) for m in self._memories if own & set(m.view.names)]
        if not all(kept):
            logger.info(
                "A %s memory cannot hold all of a %s belief; of the rest it keeps a diagonal.",
                group["memory"], precision.structure,
            )  # fmt: skip
        group["belief_counted"] = True

    def pull(self, weight: float) -> Pull | None:
        """The belief's share for `weight` labels."""
        if self.belief is None or self.mode == "prior" or self.strength == 0:
            return None
        state = dict(self._named_parameters())
        energy, gradient = self.belief.energy_and_gradient(state)
        weight *= self.strength
        information = None
        if self.mode == "factor":
            information = self._gather(self.belief.precision.diagonal(state), weight)
        return Pull(self._gather(gradient, weight), information, energy)

    def _named_parameters(self) -> list[tuple[str, Tensor]]:
        return [(n, p) for m in self._memories for n, p in zip(m.view.names, m.view.params, strict=True)]

    def _gather(self, found: dict[str, Tensor], weight: float) -> list[Tensor]:
        return [m.view.gather([found.get(name) for name in m.view.names]).mul_(weight) for m in self._memories]


def belief_of(group: dict[str, Any], memories: list[Memory], prior: "BeliefPrior", model: Any) -> "Belief":
    """See [`LoKO.belief`]."""
    from ..adapters import AdapterState
    from ..belief import Belief
    from ..lineage import LINEAGE, describe, join_lineages

    if not group["settled"] or group["tokens"] <= 0:
        raise ValueError("The filter has observed nothing yet; there is no belief to give.")
    state = AdapterState(model, warn_excluded=False)
    labels = group["tokens"] * group["tempering"]
    precision = export(memories, list(state.parameters())).scale(1 / labels)
    record = {"structure": precision.structure, "space": "adapter", "memory": group["memory"], "num_tokens": labels}
    info = {"adapter": describe(state), "filter": record, "num_labels": labels}
    given = prior.belief
    past = join_lineages(given.info if given is not None else [])  # what was learned since has no name here
    return Belief(state.snapshot(), precision, info | ({LINEAGE: past} if past else {}))
