"""Predictions with uncertainty in one forward pass, through an unmodified Hugging Face model.

After Streamlining Prediction in Bayesian Deep Learning (arXiv:2411.18425): each layer passes on a mean and a variance.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..adapters import AdapterState
from ..belief import Belief
from . import functions as functions  # registers the rules of torch's functions
from .modules import LoraRule, attach, rules_in
from .posterior import at, check_active, check_predicts
from .tensor import MODULE_NAMES, MomentTensor, NoMomentRule, mean_of, strip
from .variances import factor_covariances


_ATTENTION = ("eager", "sdpa")


@contextmanager
def streamlined(
    model: nn.Module,
    belief: Belief,
    *,
    num_labels: float | None = None,
    prior_precision: float | Mapping[str, float] | None = None,
    structure: str = "full",
    adapter_name: str | None = None,
) -> Iterator[nn.Module]:
    """Within this context the model's outputs have variances.

    ```python
    with torch.no_grad(), streamlined(model, belief):
        out = model(**batch)
    out.logits, out.logits_variance  # the same shape; the variance in float32 (float64 beside float64 logits)
    ```

    The adapter takes the belief's mean, and the logits are bit for bit those of that network. Each factor has its
    block of the belief's covariance where that is "kronecker" or "ekfac", of other structures the diagonal. Channels
    of hidden states count as independent, and so do the two sides of a residual sum and the places of a convolution;
    attention weights count as known, also where queries and keys are adapted. Positions share the adapter's weights:
    LoRA on the values is exact, and what was uncertain before it is correlated over positions as far as the layer's
    inputs are alike; other sums over positions (pooling) count as fully correlated.

    Besides the logits, `last_hidden_state` and `pooler_output` get a variance; other fields are means. The loss is
    that of the mean. Variances are differentiable; call backward within the context where the adapter's own weights
    are not the belief's mean.

    Supported: models whose forward consists of functions and modules with moment rules, such as Llama and its kin,
    GPT-2, BERT, RoBERTa and ViT, with attention "eager" or "sdpa". Everything else is refused by name; see
    [`register_rule`]. Not supported: `generate()` and caches, training mode, tuples as outputs, DoRA, several active
    adapters, a merged or disabled adapter, torch.compile.

    Args:
        model (`PeftModel`): In evaluation mode; unchanged when the context is left.
        belief (`Belief`): Over this adapter.
        num_labels (`float`, *optional*): See [`weight_variances`].
        prior_precision (`float` or `Mapping[str, float]`, *optional*): See [`weight_variances`].
        structure (`str`, *optional*, defaults to `"full"`):
            With "diagonal" the diagonal alone counts, whatever the belief's structure.
        adapter_name (`str`, *optional*): Defaults to the active adapter.

    Yields:
        `PeftModel`: The model.

    Raises:
        BeliefError: The belief is over another adapter, or gives no variances.
        ValueError: The model or the adapter is in a state that is not supported.
    """
    state = belief.check(model, adapter_name)
    found = factor_covariances(belief, num_labels=num_labels, prior_precision=prior_precision, structure=structure)
    base: Any = state.model.get_base_model()  # type: ignore[operator]
    _check_supported(state, base)
    if MODULE_NAMES.get() is not None:
        raise ValueError("streamlined() cannot be nested; leave the outer context first.")
    token = MODULE_NAMES.set({module: name for name, module in base.named_modules()})
    handles = []
    try:
        with at(state, belief.mean):
            for pair in state:
                rule = LoraRule(state.adapter_name, (found[pair.key_a], found[pair.key_b]))
                handles += attach(state.model.get_submodule(pair.name), rule, always=True)
            for module, rule in rules_in(base).items():
                handles += attach(module, rule)
            handles.append(base.register_forward_pre_hook(_before, with_kwargs=True))
            handles.append(base.register_forward_hook(_after))
            yield model
    finally:
        for handle in handles:
            handle.remove()
        MODULE_NAMES.reset(token)


def _check_supported(state: AdapterState, base: Any) -> None:
    check_active(state)
    for pair in state:
        if not pair.merges_linearly:
            raise ValueError(f"{pair.name} is a DoRA layer (or another variant of LoRA), which has no moment rule.")
    kind = getattr(getattr(base, "config", None), "_attn_implementation", None)
    if kind is not None and kind not in _ATTENTION:
        raise ValueError(
            f"Attention {kind!r} has no moment rule; load the model with attn_implementation='sdpa' or 'eager'."
        )


def _before(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    check_predicts(model, "streamlined")
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        raise ValueError(
            "A cache would lose the variances of keys and values: generate() and past_key_values are not supported "
            "within streamlined(). Call the model on whole sequences, with use_cache=False."
        )
    if kwargs.get("return_dict") is False:
        raise ValueError("A tuple cannot take logits_variance; leave out return_dict=False.")
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs = kwargs | {"use_cache": False}
    return args, kwargs


def _after(model: nn.Module, args: tuple, out: Any) -> Any:
    if not isinstance(out, dict):
        raise ValueError(f"{type(model).__name__} returned {type(out).__name__}, which cannot take logits_variance.")
    certain = [name for name, value in out.items() if isinstance(value, MomentTensor)]
    if not certain:
        raise NoMomentRule(
            f"No output of {type(model).__name__} has a variance (its fields are {list(out)}): queries and keys count "
            "as known, and so an adapter on them alone leaves none. Adapt values or other layers too."
        )
    variances: dict[str, Tensor] = {}
    for name, value in list(out.items()):
        if isinstance(value, MomentTensor):
            variances[f"{name}_variance"] = value.moment_variance
            out[name] = mean_of(value)
        elif value is not None:
            out[name] = strip(value)
    for name, value in variances.items():
        out[name] = value
    return out
