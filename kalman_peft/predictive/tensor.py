"""A tensor with a variance beside it, which follows it through a model's own forward.

Every torch function that meets one runs on the plain means, exactly as in the deterministic network, and then gets
the variance of its result from a rule. A function without a rule is refused by name.
"""

import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from .moments import variance_dtype


Rule = Callable[..., Any]

FUNCTION_RULES: dict[Any, Rule] = {}
DROPS: set[Any] = set()  # functions whose results count as known
# Functions whose rule runs at once. Between two of them lie a block's intermediate results, and no more are kept.
EAGER: set[Any] = set()
FIRST: set[Any] = set()  # functions of which only the first argument is content, others say where it goes
SAME_PLACE: set[Any] = set()  # of those, the ones that leave every entry where it is
MODULE_NAMES: ContextVar[Mapping[nn.Module, str] | None] = ContextVar("MODULE_NAMES", default=None)


class NoMomentRule(NotImplementedError):
    """An uncertain tensor met a function or a module for which no moment rule is known."""


class MomentTensor(Tensor):
    """A mean with a variance of the same shape; made by `with_variance`.

    The variance is worked out when it is asked for: what attention drops (queries, keys) costs nothing.
    """

    _mean: Tensor
    _variance: Tensor | Callable[[], Tensor]
    _origin: Any  # see `positions.Origin`

    @property
    def moment_variance(self) -> Tensor:
        """The variance, float32 (float64 beside float64 means)."""
        found = self._variance
        if not isinstance(found, Tensor):
            # Autocast would round squares to 16 bits.
            with torch.autocast(self._mean.device.type, enabled=False):
                found = found()
            if found.shape != self._mean.shape:
                found = found.expand(self._mean.shape)
            self._variance = found  # lets go of what it was worked out from
        return found

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"MomentTensor({self._mean!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Run `func` on the means, then its rule."""
        kwargs = dict(kwargs or {})
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        rule = FUNCTION_RULES.get(func)
        if rule is None and func not in DROPS and _writes(func):
            raise NoMomentRule(_refusal(func))
        out = func(*_means(args), **_means(kwargs))
        if func in DROPS or _without_moments(out) or (func in FIRST and not isinstance(args[0], MomentTensor)):
            return out
        if rule is None:
            raise NoMomentRule(_refusal(func))
        if isinstance(out, Tensor):
            result = with_variance(out, lambda: rule(out, *args, **kwargs))
            if func in EAGER:
                result.moment_variance  # noqa: B018 - worked out now
            result._origin = _moved_origin(func, rule, args, kwargs)
            return result
        shared = _Once(lambda: rule(out, *args, **kwargs))
        parts = [with_variance(o, lambda i=i: shared()[i]) for i, o in enumerate(out)]
        for i, part in enumerate(parts):
            part._origin = _moved_origin(func, rule, args, kwargs, i)
        return type(out)(parts)


def _moved_origin(func: Any, rule: Rule, args: tuple, kwargs: dict[str, Any], part: int | None = None) -> Any:
    """Where the result came from, if `func` only moved entries."""
    origin = args[0]._origin if func in FIRST else None
    if origin is None or func in SAME_PLACE:
        return origin
    rest, named = strip(args[1:]), strip(kwargs)
    if part is None:
        return origin.moved(lambda x: rule(None, x, *rest, **named))
    return origin.moved(lambda x: rule(None, x, *rest, **named)[part])


class _Once:
    """The variances of several results of one function, worked out together."""

    def __init__(self, compute: Callable[[], Any]):
        self.compute: Callable[[], Any] | None = compute
        self.found: Any = None

    def __call__(self) -> Any:
        if self.compute is not None:
            self.found, self.compute = self.compute(), None
        return self.found


def with_variance(mean: Tensor, variance: Tensor | Callable[[], Tensor]) -> MomentTensor:
    """A `MomentTensor`.

    Args:
        mean (`Tensor`): Plain, of a float dtype; shares its storage with the result.
        variance (`Tensor` or `Callable[[], Tensor]`): Of the same shape, or what works it out.

    Returns:
        `MomentTensor`: In computations its mean.
    """
    with torch._C.DisableTorchFunctionSubclass():
        result = mean.as_subclass(MomentTensor)
    result._mean, result._variance, result._origin = mean, variance, None
    return result


def mean_of(x: Any) -> Any:
    """The mean of an uncertain tensor, anything else as it is."""
    return x._mean if isinstance(x, MomentTensor) else x


def variance_of(x: Any) -> Tensor | None:
    """The variance of an uncertain tensor, `None` for anything else."""
    return x.moment_variance if isinstance(x, MomentTensor) else None


def lifted(x: MomentTensor) -> Tensor:
    """The mean in the dtype of the variance."""
    return x._mean.to(variance_dtype(x._mean))


def strip(tree: Any) -> Any:
    """Lists, tuples and dicts with means in place of uncertain tensors."""
    return _means(tree)


def refuse(what: str) -> NoMomentRule:
    """The error for a case that a rule does not cover; for the author of a rule to raise."""
    return NoMomentRule(f"{what}{_where()}. Register a rule that covers it with `register_rule`.")


def _means(tree: Any) -> Any:
    if isinstance(tree, MomentTensor):
        return tree._mean
    if type(tree) in (list, tuple):
        return type(tree)(_means(item) for item in tree)
    if type(tree) is dict:
        return {key: _means(item) for key, item in tree.items()}
    return tree


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _writes(func: Any) -> bool:
    """Whether it changes a tensor in place, whose variance would be left behind."""
    name = _name(func)
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__"))
    return name.endswith("_") and not name.startswith("_")


def _without_moments(out: Any) -> bool:
    """Shapes, dtypes, integers, comparisons: nothing that could carry a variance."""
    if isinstance(out, Tensor):
        return not (out.is_floating_point() or out.is_complex())
    if isinstance(out, tuple | list):
        return all(_without_moments(item) for item in out)
    return out is None or isinstance(out, bool | int | str | torch.dtype | torch.device | torch.layout)


def _refusal(func: Any) -> str:
    return (
        f"No moment rule for {_name(func)}(){_where()}: its result would lose the variance. Give the function, or the "
        "module as a whole, a rule with kalman_peft.predictive.register_rule(function_or_module_class, rule)"
    )


def _where() -> str:
    """The innermost module in whose forward this happens."""
    names = MODULE_NAMES.get() or {}
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            name = f" {names[owner]!r}" if owner in names else ""
            return f", called by module{name} of type {type(owner).__name__}"
        frame = frame.f_back
    return ""
