"""A Gaussian belief over named parameters as a torch optimizer: all of a filter but how it learns."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .evaluating import Average, drawn_weights
from .memories import create_memories
from .noise import check_patterns
from .options import check
from .prior import BeliefPrior, belief_of
from .settling import draw_variances, set_priors
from .state import check_group, create_extras, entries, load_group, load_tensors


if TYPE_CHECKING:
    from ..belief import Belief


class GaussianFilter(torch.optim.Optimizer):
    """Weights and memory of a filter: saved, loaded, evaluated and drawn from.

    Args:
        named (`list[tuple[str, Tensor]]`): Parameters by name.
        options (`dict[str, Any]`): From [`LoKOOptions.resolve`].
        prior_precision (`Mapping[str, float | None]`): By parameter name; `None` for one to be settled.
    """

    def __init__(
        self,
        named: list[tuple[str, Tensor]],
        options: dict[str, Any],
        prior_precision: Mapping[str, float | None],
    ):
        progress = {
            "settled": False, "steps": 0, "tokens": 0.0, "skipped": 0, "averaged": 0, "evaluating": False,
            "variance": None, "variance_weight": 0.0, "misfit": 1.0, "expected_energy": 0.0, "score_energy": 0.0,
            "column_energy": 0.0, "belief_counted": False, "draw_due": False,
        }  # fmt: skip
        super().__init__(named, {"lr": 1.0} | options | progress)
        group = self.param_groups[0]
        self._memories = create_memories(
            named, group["memory"], rank=group["rank"], dense_limit=group["dense_limit"],
            block_limit=group["block_limit"],
        )  # fmt: skip
        self._views = [memory.view for memory in self._memories]
        self._extras = create_extras(group, self._memories)
        self._average = Average(group, self._views, self._extras)
        self._prior = BeliefPrior(group, self._memories)
        self._drawn = False  # whether the weights are a draw at present
        check_patterns(group["process_noise"], [name for view in self._views for name in view.names])
        if group["mode"] == "paper":
            draw_variances(group, self._memories)
        else:
            set_priors(group, self._memories, prior_precision)
        for p, key, part in entries(self._memories, self._extras):
            self.state[p][key] = part

    def belief(self, model: Any) -> "Belief":
        """What the filter knows, as a belief over the adapter: its mean, and its precision per observed label.

        Args:
            model (`PeftModel`): The model whose adapter is filtered.

        Returns:
            `Belief`: With structure "ekfac" (Kronecker memory), "diagonal", "low_rank" or "dense"; the number of
            labels by which the precision was divided is `info["num_labels"]`.

        Raises:
            RuntimeError: Inside `sample`.
            ValueError: The prior is not settled yet, or memories of several structures.
        """
        if self._drawn:
            raise RuntimeError("LoKO.belief() inside sample(), where the weights are drawn ones.")
        return belief_of(self.param_groups[0], self._memories, self._prior, model)

    def eval(self) -> None:
        """Put the averaged weights in place (with `averaging=True`), and refuse to step until `train`.

        Inside `sample` the draw stays where it is.
        """
        if not self._drawn:
            self._average.eval()

    def train(self) -> None:
        """Put the filter's own weights back in place after `eval`; inside `sample` nothing is done."""
        if not self._drawn:
            self._average.train()

    @contextmanager
    def posterior_mean(self) -> Iterator[None]:
        """Evaluate at the posterior mean: the filter's weights, or their average with `averaging=True`.

        Yields:
            None: Inside, the model has these weights, and the optimizer is in evaluation mode.
        """
        was = self.param_groups[0]["evaluating"]
        self.eval()
        try:
            yield
        finally:
            if not was:
                self.train()

    @contextmanager
    def sample(self, generator: torch.Generator | None = None, scale: float = 1.0) -> Iterator[None]:
        """Evaluate an adapter drawn from the filter's belief, N(theta, scale^2 P).

        Args:
            generator (`torch.Generator`, *optional*): Source of the draw, on the parameters' device.
            scale (`float`, *optional*, defaults to 1.0): Factor on the standard deviations.

        Yields:
            None: Inside, the model has the drawn weights.

        Raises:
            RuntimeError: The prior is not settled yet.
            ValueError: The scale is negative or not finite.
        """
        check(0 <= scale < math.inf, f"scale must be >= 0 and finite, got {scale}")
        if not self.param_groups[0]["settled"]:
            raise RuntimeError("The prior is not settled; take a step before drawing from the belief.")
        was, self._drawn = self._drawn, True
        try:
            with drawn_weights(self._memories, generator, scale):
                yield
        finally:
            self._drawn = was

    def _check_training(self, verb: str) -> None:
        """Raise RuntimeError unless the weights are the filter's own."""
        if self._drawn:
            raise RuntimeError(f"LoKO.{verb}() inside sample(), where the weights are drawn ones.")
        if self.param_groups[0]["evaluating"]:
            raise RuntimeError(f"LoKO.{verb}() in evaluation mode; call optimizer.train() first.")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only from the constructor: the memory is laid out once.

        Args:
            param_group (`dict[str, Any]`): From the constructor.

        Raises:
            ValueError: Called later.
        """
        if self.param_groups:
            raise ValueError("LoKO has one parameter group; create a new optimizer for other parameters.")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("LoKO cannot be copied or pickled as an object; use state_dict() and load_state_dict().")

    def state_dict(self) -> dict[str, Any]:
        """As of torch; with an average, which may be in the model's place, the filter's own weights are part of it.

        Raises:
            RuntimeError: Inside `sample`.
        """
        if self._drawn:
            raise RuntimeError("LoKO.state_dict() inside sample(), where the weights are drawn ones.")
        self._average.keep_live()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved filter bit for bit; torch would cast the state to the parameters' dtype.

        A filter saved in evaluation mode comes back in training mode, with its own weights in place.

        Args:
            state_dict (`dict`): From `state_dict()` of a filter over the same parameters.

        Raises:
            ValueError: The saved filter has another memory, or other shapes.
        """
        saved, own = state_dict["param_groups"][0], self.param_groups[0]
        check_group(own, saved)
        found = load_tensors(own, state_dict, list(entries(self._memories, self._extras)))
        first = self._views[0].params[0]
        noise = found[id(first)].get("observation_noise")
        if noise is not None:
            self.state[first]["observation_noise"] = noise.to(first.device, copy=True)
        load_group(own, saved)
        self.train()
