"""Averages over adapters: draws from a belief (Monte Carlo), or several trained ones (a deep ensemble).

One forward pass per adapter, or one over several adapters stacked: faster where a batch is a few short rows, which a
pass alone does not fill; as fast otherwise, and with the memory of them all.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..adapters import AdapterState, unwrap
from ..belief import Belief
from ..filtering.algebra import least_damping
from .moments import variance_dtype
from .posterior import Prior, at, check_active, check_predicts, posterior, solvable
from .result import Positions, Predictive, select, without_labels


Adapter = str | os.PathLike | Mapping[str, Tensor]


def sampled(
    model: nn.Module,
    belief: Belief,
    inputs: Mapping[str, Any],
    *,
    draws: int = 20,
    stacked: int = 1,
    positions: Positions = None,
    entries: Any = None,
    num_labels: float | None = None,
    prior_precision: Prior = None,
    adapter_name: str | None = None,
    generator: torch.Generator | None = None,
) -> Predictive:
    """Monte Carlo over the belief: probabilities averaged over adapters drawn from it, one forward pass each.

    Args:
        model (`PeftModel`): In evaluation mode; unchanged afterwards, also after an error.
        belief (`Belief`): Over its adapter, of any kind of LoRA layer.
        inputs (`Mapping`): A batch; `labels` are not used.
        draws (`int`, *optional*, defaults to 20): Adapters, at least 2.
        stacked (`int`, *optional*, defaults to 1):
            Adapters per forward pass, by `torch.func.vmap`, which not every model allows.
        positions (`str` or `Tensor`, *optional*): See [`select`].
        entries (`Sequence[int]`, *optional*):
            See [`select`]; probabilities are then among these alone.
        num_labels (`float`, *optional*): See [`weight_variances`].
        prior_precision (`float` or `Mapping[str, float]`, *optional*): See [`weight_variances`].
        adapter_name (`str`, *optional*): Defaults to the active adapter.
        generator (`torch.Generator`, *optional*): Of the draws, on the precision's device.

    Returns:
        `Predictive`: Mean and variance (divisor draws - 1) of the logits over the draws, and mean probabilities.

    Raises:
        BeliefError: The belief is over another adapter, or is no posterior.
        ValueError: Too few draws, or the model or the adapter is in a state that is not supported.
    """
    if draws < 2:
        raise ValueError(f"draws must be at least 2, for a variance; got {draws}.")
    if stacked < 1:
        raise ValueError(f"stacked must be at least 1, got {stacked}.")
    check_predicts(model, "sampled")
    state = belief.check(model, adapter_name)
    check_active(state)
    found = solvable(posterior(belief, num_labels, prior_precision))
    damping = least_damping(found.precision)
    inputs = without_labels(inputs)

    parameters = state.parameters()
    names = {id(p): name for name, p in model.named_parameters()}

    def drawn() -> dict[str, Tensor]:
        offset = found.precision.sample(damping, generator)
        return {key: (m + offset[key].to(m)).to(parameters[key]) for key, m in belief.mean.items()}

    def stack(count: int) -> Tensor:
        adapters = [drawn() for _ in range(count)]
        weights = {names[id(p)]: torch.stack([a[key] for a in adapters]) for key, p in parameters.items()}
        return vmap(lambda w: functional_call(model, w, (), inputs).logits)(weights)

    def passes() -> Iterator[Tensor]:
        if stacked == 1:
            for _ in range(draws):
                with at(state, drawn()):
                    yield select(model(**inputs).logits, inputs, positions, entries)
            return
        for start in range(0, draws, stacked):
            for one in stack(min(stacked, draws - start)):
                yield select(one, inputs, positions, entries)

    return _average(passes())


def ensembled(
    model: nn.Module,
    adapters: Sequence[Adapter],
    inputs: Mapping[str, Any],
    *,
    positions: Positions = None,
    entries: Any = None,
) -> Predictive:
    """A deep ensemble: probabilities averaged over several adapters of one base model.

    Args:
        model (`PeftModel`): In evaluation mode; unchanged afterwards, also after an error.
        adapters (`Sequence`):
            At least 2. Each is the name of an adapter in the model, the folder of a saved one, or its tensors by
            their saved names (`AdapterState.snapshot()`, or `get_peft_model_state_dict` with a trained head too).
            Folders and tensors take the active adapter's place; what they do not hold stays as it is there.
        inputs (`Mapping`): A batch; `labels` are not used.
        positions (`str` or `Tensor`, *optional*): See [`select`].
        entries (`Sequence[int]`, *optional*): See [`select`]; probabilities are then among these alone.

    Returns:
        `Predictive`: As of [`sampled`].

    Raises:
        ValueError: Too few adapters, an unknown one, or one of other layers or another rank.
    """
    if len(adapters) < 2:
        raise ValueError(f"adapters must be at least 2, for a variance; got {len(adapters)}.")
    check_predicts(model, "ensembled")
    peft_model: Any = unwrap(model)
    inputs = without_labels(inputs)

    def passes() -> Iterator[Tensor]:
        for adapter in adapters:
            with _in_place(peft_model, adapter):
                yield select(model(**inputs).logits, inputs, positions, entries)

    return _average(passes())


@contextmanager
def _in_place(model: Any, adapter: Adapter) -> Iterator[None]:
    """The model with that adapter."""
    if isinstance(adapter, str) and adapter in model.peft_config:
        before, flags = list(model.active_adapters), {p: p.requires_grad for p in model.parameters()}
        named = model.active_adapter
        try:
            model.set_adapter(adapter)  # with its own head
            check_active(AdapterState(model, adapter, warn_excluded=False))
            yield
        finally:
            model.base_model.set_adapter(before)
            model.active_adapter = named
            for p, flag in flags.items():
                p.requires_grad_(flag)
        return
    name = AdapterState(model, warn_excluded=False).adapter_name
    check_active(AdapterState(model, name, warn_excluded=False))
    given = adapter if isinstance(adapter, Mapping) else _read(adapter, model)
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)  # shares storage
    unknown, missing = sorted(given.keys() - own.keys()), [k for k in own if ".lora_" in k and k not in given]
    shapes = [k for k in given if k in own and given[k].shape != own[k].shape]
    if unknown or missing or shapes:
        what = f"holds {unknown[:2]}, unknown here" if unknown else f"lacks {missing[:2]}"
        what = what if unknown or missing else f"has another shape at {shapes[:2]}"
        label = "a mapping" if isinstance(adapter, Mapping) else repr(str(adapter))
        raise ValueError(f"adapters: {label} does not fit the active adapter {name!r}: it {what}.")
    kept = {key: own[key].clone() for key in given}
    try:
        with torch.no_grad():
            for key, value in given.items():
                own[key].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for key, value in kept.items():
                own[key].copy_(value)


def _read(adapter: str | os.PathLike, model: Any) -> dict[str, Tensor]:
    if not os.path.isdir(adapter):
        raise ValueError(
            f"adapters: {str(adapter)!r} is neither a folder nor an adapter of the model, which has "
            f"{sorted(model.peft_config)}."
        )
    return load_peft_weights(os.fspath(adapter), device="cpu")


@torch.no_grad()
def _average(passes: Iterable[Tensor]) -> Predictive:
    """Moments over passes, one at a time (Welford, 1962)."""
    mean = spread = total = None
    count = 0
    for logits in passes:
        z = logits.detach().to(variance_dtype(logits))
        count += 1
        if mean is None or spread is None or total is None:
            mean, spread, total = z.clone(), torch.zeros_like(z), z.softmax(-1)
            continue
        step = z - mean
        mean = mean + step / count
        spread = spread + step * (z - mean)
        total = total + z.softmax(-1)
    assert mean is not None and spread is not None and total is not None
    return Predictive(mean, spread / (count - 1), total / count, gaussian=False)
