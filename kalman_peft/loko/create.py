"""A LoKO optimizer for a PEFT model, with priors from the weights' initialisation."""

import logging
from typing import TYPE_CHECKING, Any

from torch import nn

from ..adapters import AdapterState
from ..distributed import broadcast_
from ..observations import GaussianObservation, Observation, infer_observation
from .columns import ColumnTaps
from .optimizer import LoKO
from .options import LoKOOptions


if TYPE_CHECKING:
    from ..belief import Belief


logger = logging.getLogger(__name__)


def create_loko_optimizer(
    model: nn.Module,
    *,
    adapter_name: str | None = None,
    belief: "Belief | None" = None,
    belief_strength: float = 1.0,
    belief_mode: str = "factor",
    belief_labels: float | None = None,
    observation: Observation | None = None,
    **options: Any,
) -> LoKO:
    """A LoKO optimizer over all trainable weights of a PEFT model.

    Args:
        model (`PeftModel`): Model with a LoRA adapter; `modules_to_save` and other trainable tensors are filtered too.
        adapter_name (`str`, *optional*): Defaults to the active adapter.
        belief (`Belief`, *optional*): Prior belief over the adapter, see [`LoKO.set_belief`].
        belief_strength (`float`, *optional*, defaults to 1.0): See [`LoKO.set_belief`].
        belief_mode (`str`, *optional*, defaults to `"factor"`): See [`LoKO.set_belief`].
        belief_labels (`float`, *optional*): See `num_labels` of [`LoKO.set_belief`].
        observation (`Observation`, *optional*):
            Inferred from the model's class by default; for regression the noise is then estimated.
        **options: See [`LoKOOptions`].

    Returns:
        `LoKO`: Usable in a hand-written loop and in `KalmanTrainer`.

    Raises:
        TypeError: The model has no PEFT adapter.
        ValueError: An option is out of range, or the task cannot be told from the model.
    """
    state = AdapterState(model, adapter_name, warn_excluded=False)
    broadcast_(p.detach() for p in state.model.parameters() if p.requires_grad)  # one start for all processes
    factors = {id(p): key for key, p in state.parameters().items()}
    random_start = {id(pair.a) for pair in state}
    named, own = [], {}
    for name, p in state.model.named_parameters():
        if p.requires_grad:
            key = factors.get(id(p), name)
            named.append((key, p))
            spread = float(p.detach().float().square().mean()) if id(p) in random_start else 0.0
            own[key] = 1 / spread if spread > 0 else None
    trained = {id(p) for _, p in named}
    if not any(id(p) in trained for p in state.parameters().values()) and named:
        raise ValueError(
            f"Adapter {state.adapter_name!r} is not trained; call model.set_adapter({state.adapter_name!r}) first."
        )
    if observation is not None and not isinstance(observation, Observation):
        raise ValueError(
            f"observation must be an Observation, got {type(observation).__name__}; LikelihoodObservation(f) makes "
            "one of a function."
        )
    if belief is None and (belief_strength, belief_mode, belief_labels) != (1.0, "factor", None):
        raise ValueError("belief_strength, belief_mode and belief_labels need `belief=`.")
    found = observation or infer_observation(state.model)
    pooled = LoKOOptions(**options).resolve(found)["prior"] == "pooled"
    optimizer = LoKO(
        named, found, prior_precision=None if pooled else own, taps=_taps(state.model, named, found, options),
        estimate_noise=(
            observation is None and isinstance(found, GaussianObservation) and options.get("mode") != "paper"
        ), **options,
    )  # fmt: skip
    if belief is not None:
        belief.check(model, state.adapter_name)
        optimizer.set_belief(belief, belief_strength, belief_mode, belief_labels)
    return optimizer


def _taps(model: nn.Module, named: list, observation: Observation, options: dict[str, Any]) -> ColumnTaps | None:
    """Taps where columns of single sequences can be asked for."""
    wanted = options.get("per_sequence")
    if wanted is None:
        wanted = (
            observation.layout == "full"
            or options.get("columns") in ("exact", "empirical")
            or options.get("top_k") is not None
        )
    if not wanted:
        return None
    taps = ColumnTaps(model, [p for _, p in named])
    if taps.uncovered:
        logger.warning(
            "%d trained tensors belong to no linear layer: scores of single sequences take a batched backward pass, "
            "as dear as one for each. per_sequence=False avoids it.", taps.uncovered,
        )  # fmt: skip
    return taps
