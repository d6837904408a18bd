"""Moment rules by module type: rule(module, result, *inputs) gives the variance of the module's result.

For modules whose forward is no sequence of functions with rules of their own, or whose parts are not independent:
LoRA layers, RMS norms, activations written out in elementary functions.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .covariances import FactorCovariance
from .moments import gelu_slope, gelu_tanh_slope, lora_variance, rms_norm_variance, silu_slope, variance_dtype
from .positions import LoraWeights, Origin
from .tensor import EAGER, FUNCTION_RULES, MomentTensor, Rule, lifted, mean_of, strip, variance_of, with_variance


MODULE_RULES: dict[type[nn.Module] | str, Rule] = {}


def register_rule(target: Any, rule: Rule) -> None:
    """Say how the variance goes through a function or a module.

    The mean is never touched: function and module run on it as they are. Entries of a tensor count as independent.

    Args:
        target (`type[nn.Module]` or a torch function or method):
            Of a module class also its subclasses. A module's rule comes before those of the functions that it calls.
        rule (`Callable`):
            `rule(result, *arguments, **keywords)` for a function, `rule(module, result, *arguments, **keywords)` for a
            module; at least one of the arguments is uncertain, with `.moment_variance` beside its mean
            (`predictive.mean_of`, `predictive.variance_of` read either kind). Returns the variance of the result, of
            its shape, for a tuple of results one each.

    Raises:
        TypeError: The target is neither, or the rule cannot be called.
    """
    if not callable(rule) or not callable(target):
        raise TypeError(f"register_rule needs a function or a module class, and a rule to call; got {target!r}.")
    if isinstance(target, type) and issubclass(target, nn.Module):
        MODULE_RULES[target] = rule
    else:
        FUNCTION_RULES[target] = rule


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of the module's class or of the nearest of its bases.

    Classes of transformers are known by name, so that they need not be imported; of those only the class itself
    counts, since a subclass may compute something else.
    """
    for cls in type(module).__mro__:
        if cls in MODULE_RULES:
            return MODULE_RULES[cls]
    if type(module).__module__.startswith("transformers."):
        return MODULE_RULES.get(type(module).__name__)
    return None


def attach(module: nn.Module, rule: Rule, always: bool = False) -> list[RemovableHandle]:
    """Let a module run on means, and give its result the rule's variance.

    Args:
        module (`nn.Module`): Keeps its forward.
        rule (`Callable`): See [`register_rule`].
        always (`bool`, *optional*, defaults to `False`): Also for inputs that are all known.

    Returns:
        `list[RemovableHandle]`: To be removed in the end.
    """
    pending: list[tuple[tuple, dict]] = []

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        pending.append((args, kwargs))
        return strip(args), strip(kwargs)

    def after(_: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
        given, named = pending.pop()
        out = strip(out)
        if not always and not any(isinstance(x, MomentTensor) for x in (*given, *named.values())):
            return out
        if not isinstance(out, Tensor):
            found = rule(module, out, *given, **named)
            return type(out)(with_variance(mean, v) for mean, v in zip(out, found, strict=True))
        result = with_variance(out, lambda: rule(module, out, *given, **named))
        if isinstance(rule, LoraRule):
            result._origin = rule.origin(module, out, *given, **named)
        if rule in EAGER:
            result.moment_variance  # noqa: B018 - worked out now
        return result

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


class LoraRule:
    """The rule of one LoRA layer, W x + s B A x with uncertain A and B.

    Args:
        adapter_name (`str`): Of the adapter that is uncertain.
        covariances (`tuple[FactorCovariance, FactorCovariance]`): Of A (r, d_in) and B (d_out, r).
    """

    def __init__(self, adapter_name: str, covariances: tuple[FactorCovariance, FactorCovariance]):
        self.adapter_name, self.covariances = adapter_name, covariances
        self._cast: dict[tuple[torch.device, torch.dtype], tuple[FactorCovariance, FactorCovariance]] = {}

    def __call__(self, module: Any, out: Tensor, x: Any) -> Tensor:
        """See [`register_rule`]."""
        known = self.weights(module, out, x)
        mean, variance = mean_of(x).to(variance_dtype(out)), variance_of(x)
        return lora_variance(mean, variance, known.weight(), known.factors, known.covariances, known.scaling)

    def origin(self, module: Any, out: Tensor, x: Any) -> Origin:
        """Where the layer's result comes from."""
        return Origin(lambda: self.weights(module, out, x), x)

    def weights(self, module: Any, out: Tensor, x: Any) -> LoraWeights:
        """Means and covariances of the layer's weights, in the dtype of the result's variance."""
        place = (out.device, variance_dtype(out))
        a, b = (side[self.adapter_name].weight.to(*place) for side in (module.lora_A, module.lora_B))
        if place not in self._cast:
            self._cast[place] = tuple(c.to(*place).completed(side) for side, c in enumerate(self.covariances))  # type: ignore[assignment]
        scaling = module.scaling[self.adapter_name]
        return LoraWeights((a, b), self._cast[place], scaling, lambda: _base_weight(module, variance_of(x)))


def _base_weight(module: Any, variance: Tensor | None) -> Tensor:
    """W as (d_out, d_in); dequantised only where it is needed."""
    from peft.utils.integrations import dequantize_module_weight

    layer = module.get_base_layer()
    if variance is None:
        return layer.weight
    weight = dequantize_module_weight(layer)
    return weight.T if getattr(module, "fan_in_fan_out", False) else weight


# -- rules of transformers' modules ----------------------------------------------------------------------------------


def _rms_norm(module: Any, out: Tensor, x: MomentTensor) -> Tensor:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return rms_norm_variance(lifted(x), x.moment_variance, 1, module.weight, eps)


def _shifted_rms_norm(module: Any, out: Tensor, x: MomentTensor) -> Tensor:
    """Gemma's, whose gain is 1 + weight."""
    gain = 1 + module.weight.to(x.moment_variance)
    return rms_norm_variance(lifted(x), x.moment_variance, 1, gain, module.eps)


def slope_rule(slope: Callable[[Tensor], Tensor]) -> Rule:
    """The rule of a module that applies one function g to each entry: g'(mu)^2 v.

    Args:
        slope (`Callable`): g', from a tensor to one of its shape.

    Returns:
        `Callable`: A rule for [`register_rule`].
    """

    def rule(module: nn.Module, out: Tensor, x: MomentTensor) -> Tensor:
        return slope(lifted(x)).square() * x.moment_variance

    return rule


_RMS_NORMS = (
    "LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "SmolLM3RMSNorm",
    "Phi3RMSNorm", "GraniteRMSNorm", "Olmo2RMSNorm", "Olmo3RMSNorm",
)  # fmt: skip
MODULE_RULES.update(dict.fromkeys(_RMS_NORMS, _rms_norm))
MODULE_RULES.update(dict.fromkeys(("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"), _shifted_rms_norm))
EAGER.update({_rms_norm, _shifted_rms_norm})
_gelu_tanh: Rule = slope_rule(gelu_tanh_slope)
MODULE_RULES.update(dict.fromkeys(("NewGELUActivation", "FastGELUActivation", "GELUTanh"), _gelu_tanh))
MODULE_RULES["GELUActivation"] = slope_rule(gelu_slope)
MODULE_RULES["QuickGELUActivation"] = slope_rule(lambda x: silu_slope(x, 1.702))


def rules_in(model: nn.Module) -> Mapping[nn.Module, Rule]:
    """Every module of the model that has a rule."""
    found = {module: rule_for(module) for module in model.modules()}
    return {module: rule for module, rule in found.items() if rule is not None}
