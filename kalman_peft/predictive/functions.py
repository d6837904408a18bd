"""Moment rules by torch function: rule(result, *arguments) gives the variance of the result.

Arguments are as the function got them, with `MomentTensor`s among them; the result is the plain mean. Sums take their
terms as independent, products their factors; sums over anything but the last dimension, over positions that is, their
terms as shared.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .moments import (
    attention_variance,
    gelu_slope,
    gelu_tanh_slope,
    layer_norm_variance,
    linear_variance,
    product_variance,
    relu_slope,
    rms_norm_variance,
    silu_slope,
    variance_dtype,
)
from .positions import position_mixer, summed_over_positions
from .tensor import (
    DROPS,
    EAGER,
    FIRST,
    FUNCTION_RULES,
    SAME_PLACE,
    MomentTensor,
    lifted,
    mean_of,
    refuse,
    strip,
    variance_of,
)


def _register(rule: Any, *functions: Any) -> None:
    for function in functions:
        FUNCTION_RULES[function] = rule


# -- the same entries in another place, dtype or device --------------------------------------------------------------


def _carried(out: Tensor, x: MomentTensor, *args: Any, **kwargs: Any) -> Tensor:
    return x.moment_variance.to(out.device).reshape(out.shape)


_register(
    _carried,
    *(torch.clone, torch.detach, torch.Tensor.contiguous, torch.Tensor.clone, torch.Tensor.detach),
    *(torch.Tensor.to, torch.Tensor.type, torch.Tensor.type_as, torch.Tensor.float, torch.Tensor.double),
    *(torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.cpu, torch.Tensor.cuda),
    *(torch.neg, torch.Tensor.neg, torch.Tensor.__neg__),
)


SAME_PLACE.update(FUNCTION_RULES)


def _moved(function: Any) -> Any:
    """The function itself, on the variance: it only moves entries."""

    def rule(out: Any, x: MomentTensor, *args: Any, **kwargs: Any) -> Any:
        return function(x.moment_variance, *strip(args), **strip(kwargs))

    return rule


_MOVING = (
    "reshape", "transpose", "permute", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as",
    "repeat", "repeat_interleave", "chunk", "split", "unbind", "narrow", "select", "index_select", "gather",
    "flip", "roll", "swapaxes", "swapdims", "movedim", "t", "broadcast_to", "tile", "tensor_split", "__getitem__",
    "take_along_dim", "masked_select", "tril", "triu",
)  # fmt: skip
for _name in _MOVING:
    for _owner in (torch.Tensor, torch):
        if hasattr(_owner, _name):
            _register(_moved(getattr(_owner, _name)), getattr(_owner, _name))
# A variance may lie otherwise in memory than its mean: what is a view of the one is a copy of the other.
_register(_moved(torch.Tensor.reshape), torch.Tensor.view)
_register(_moved(torch.Tensor.reshape_as), torch.Tensor.view_as, torch.Tensor.reshape_as)
_register(_carried, torch.Tensor.data.__get__)  # type: ignore[attr-defined]
SAME_PLACE.add(torch.Tensor.data.__get__)  # type: ignore[attr-defined]
for _name in ("T", "mT"):
    _getter = getattr(torch.Tensor, _name).__get__
    _register(_moved(_getter), _getter)
FIRST.update(FUNCTION_RULES)


def _zeros_for(x: Any, like: Tensor) -> Tensor:
    found = variance_of(x)
    return torch.zeros(x.shape, dtype=variance_dtype(like), device=x.device) if found is None else found


def _joined(function: Any) -> Any:
    def rule(out: Tensor, tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
        return function([_zeros_for(t, out) for t in tensors], *args, **kwargs)

    return rule


for _function in (torch.cat, torch.concat, torch.stack):
    _register(_joined(_function), _function)


def _masked_fill(out: Tensor, x: Any, mask: Tensor, value: Any) -> Tensor:
    if not isinstance(x, MomentTensor) or isinstance(value, MomentTensor):
        raise refuse("masked_fill() with an uncertain value")
    return x.moment_variance.masked_fill(mask, 0.0)


def _where(out: Tensor, condition: Tensor, x: Any = 0.0, y: Any = 0.0) -> Tensor:
    zero = torch.zeros((), dtype=variance_dtype(out), device=out.device)
    v, w = variance_of(x), variance_of(y)
    return torch.where(condition, zero if v is None else v, zero if w is None else w)


_register(_masked_fill, torch.masked_fill, torch.Tensor.masked_fill)
_register(_where, torch.where)


# -- arithmetic ------------------------------------------------------------------------------------------------------


def _added(out: Tensor, x: Any, other: Any, *, alpha: float = 1.0) -> Tensor:
    v, w = variance_of(x), variance_of(other)
    if x is other and v is not None:
        return (1 + alpha) ** 2 * v
    scaled = None if w is None else (w if alpha == 1 else alpha**2 * w)
    total = v if scaled is None else scaled if v is None else v + scaled
    assert total is not None
    return total


def _subtracted(out: Tensor, x: Any, other: Any, *, alpha: float = 1.0) -> Tensor:
    return _added(out, x, other, alpha=-alpha) if x is other else _added(out, x, other, alpha=alpha)


def _reverse_subtracted(out: Tensor, x: Any, other: Any) -> Tensor:
    return _added(out, x, other)


def _squared(known: Any, like: Tensor) -> Any:
    return known.to(like).square() if isinstance(known, Tensor) else known**2


def _multiplied(out: Tensor, x: Any, other: Any) -> Tensor:
    if isinstance(x, MomentTensor) and isinstance(other, MomentTensor):
        if x is other:  # the square of a Gaussian
            return 2 * x.moment_variance * (2 * lifted(x).square() + x.moment_variance)
        return product_variance(lifted(x), x.moment_variance, lifted(other), other.moment_variance)
    uncertain, known = (x, other) if isinstance(x, MomentTensor) else (other, x)
    return uncertain.moment_variance * _squared(known, uncertain.moment_variance)


def _divided(out: Tensor, x: Any, other: Any, **kwargs: Any) -> Tensor:
    if isinstance(other, MomentTensor) or kwargs.get("rounding_mode"):
        raise refuse("Division by an uncertain tensor, or with rounding,")
    return x.moment_variance / _squared(other, x.moment_variance)


_register(_added, torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
_register(_subtracted, torch.sub, torch.Tensor.sub, torch.Tensor.__sub__)
_register(_reverse_subtracted, torch.Tensor.__rsub__)
_register(_multiplied, torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
_register(_divided, torch.div, torch.Tensor.div, torch.true_divide, torch.Tensor.__truediv__)


def _dims(x: Tensor, dim: Any) -> list[int]:
    """As a list, not negative; all of them for `None`."""
    given = range(x.dim()) if dim is None or dim == () or x.dim() == 0 else [dim] if isinstance(dim, int) else dim
    return [d % x.dim() for d in given]


def _summed(out: Tensor, x: MomentTensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    return summed_over_positions(x.moment_variance, _dims(x, dim), keepdim)


def _averaged(out: Tensor, x: MomentTensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    count = x.shape.numel() // max(out.numel(), 1)
    return _summed(out, x, dim, keepdim) / count**2


_register(_summed, torch.sum, torch.Tensor.sum)
_register(_averaged, torch.mean, torch.Tensor.mean)


# -- linear maps -----------------------------------------------------------------------------------------------------


def _linear(out: Tensor, x: Any, weight: Any, bias: Any = None) -> Tensor:
    if not isinstance(x, MomentTensor) or isinstance(weight, MomentTensor) or isinstance(bias, MomentTensor):
        raise refuse("linear() with an uncertain weight")
    return linear_variance(x.moment_variance, weight)


def _matmul(out: Tensor, x: Any, other: Any) -> Tensor:
    if not isinstance(x, MomentTensor):
        known = x.to(variance_dtype(out))
        if other.dim() < 2:
            return known.square() @ other.moment_variance
        mix = position_mixer(other)
        return mix(known) if x.dim() > 1 else mix(known[None]).squeeze(-2)
    v, w = x.moment_variance, variance_of(other)
    if w is None:
        return v @ _squared(other, v)
    return v @ (lifted(other).square() + w) + lifted(x).square() @ w


def _addmm(out: Tensor, bias: Any, x: Any, y: Any, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    total = alpha**2 * _matmul(out, x, y)
    own = variance_of(bias)
    return total if own is None else total + beta**2 * own


def _conv2d(out: Tensor, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    if not isinstance(x, MomentTensor) or isinstance(weight, MomentTensor):
        raise refuse("conv2d() with an uncertain weight")
    v = x.moment_variance
    return F.conv2d(v, weight.to(v).square(), None, *args, **kwargs)


_register(_linear, F.linear)
_register(_matmul, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)
_register(_addmm, torch.addmm, torch.baddbmm)
_register(_conv2d, F.conv2d)


# -- layers ----------------------------------------------------------------------------------------------------------


def _layer_norm(
    out: Tensor, x: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    return layer_norm_variance(lifted(x), x.moment_variance, len(normalized_shape), mean_of(weight), eps)


def _rms_norm(out: Tensor, x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return rms_norm_variance(lifted(x), x.moment_variance, len(normalized_shape), mean_of(weight), eps)


def _gelu(out: Tensor, x: MomentTensor, approximate: str = "none") -> Tensor:
    slope = gelu_slope if approximate == "none" else gelu_tanh_slope
    return slope(lifted(x)).square() * x.moment_variance


def _relu(out: Tensor, x: MomentTensor, inplace: bool = False) -> Tensor:
    return relu_slope(lifted(x)).square() * x.moment_variance


def _silu(out: Tensor, x: MomentTensor, inplace: bool = False) -> Tensor:
    if inplace:
        raise refuse("silu() in place")
    return silu_slope(lifted(x)).square() * x.moment_variance


def _tanh(out: Tensor, x: MomentTensor) -> Tensor:
    return (1 - lifted(x).tanh().square()).square() * x.moment_variance


def _sigmoid(out: Tensor, x: MomentTensor) -> Tensor:
    s = lifted(x).sigmoid()
    return (s * (1 - s)).square() * x.moment_variance


def _dropout(out: Tensor, x: MomentTensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if training and p > 0:
        raise refuse("Dropout in training; call model.eval()")
    return x.moment_variance


def _attention(
    out: Tensor, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if dropout_p > 0:
        raise refuse("Dropout of attention weights; call model.eval()")
    if not isinstance(value, MomentTensor):  # queries and keys count as known
        return torch.zeros(out.shape, dtype=variance_dtype(out), device=out.device)
    query, key = mean_of(query), mean_of(key)
    groups = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    if groups > 1:
        key = key.repeat_interleave(groups, -3)
    dtype = variance_dtype(mean_of(value))
    return attention_variance(
        query.to(dtype), key.to(dtype), position_mixer(value, groups), mean_of(attn_mask), is_causal, scale
    )


_register(_layer_norm, F.layer_norm, torch.layer_norm)
_register(_rms_norm, F.rms_norm, torch.rms_norm)
_register(_gelu, F.gelu)
_register(_relu, F.relu, torch.relu, torch.Tensor.relu)
_register(_silu, F.silu)
_register(_tanh, torch.tanh, torch.Tensor.tanh, F.tanh)
_register(_sigmoid, torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid)
_register(_dropout, F.dropout)
_register(_attention, F.scaled_dot_product_attention)

EAGER.update({F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm})
# Attention weights are known ones, losses are those of the means, and some only take over a shape.
DROPS.update(
    {F.softmax, torch.softmax, torch.Tensor.softmax, F.cross_entropy, F.mse_loss, F.nll_loss}
    | {F.binary_cross_entropy_with_logits, F.l1_loss, F.smooth_l1_loss}
    | {torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.Tensor.new_zeros}
    | {torch.Tensor.new_ones, torch.Tensor.new_full, torch.Tensor.new_empty, torch.Tensor.new_tensor}
)
