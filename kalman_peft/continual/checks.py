"""What a [`ContinualLearner`] is given: arguments and data of the wrong kind are named before anything is written."""

import numbers
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..adapters import AdapterState
from ..belief import Belief
from ..distributed import any_process, from_first
from ..filtering import Transition, initial_belief, predict
from ..lineage import data_fingerprint
from ..sources import is_streaming
from .store import check_name


# Variances and precisions of weights beyond this are senseless, and overflow float32 with the curvature of a task.
_LARGEST = 1e30


def check_motion(process_noise: Any, decay: Any) -> Transition:
    """The transition between tasks.

    Raises:
        TypeError: An argument is no number or mapping.
        ValueError: See [`Transition`].
    """
    values = list(process_noise.values()) if isinstance(process_noise, Mapping) else [process_noise]
    if isinstance(process_noise, Transition) or not all(_is_number(q) or isinstance(q, Tensor) for q in values):
        kind = type(next((q for q in values if not _is_number(q) and not isinstance(q, Tensor)), process_noise))
        hint = "; give process_noise=t.process_noise, decay=t.decay" if kind is Transition else ""
        raise TypeError(
            "process_noise must be a number, or a mapping from patterns to numbers or tensors, got "
            f"{kind.__name__}{hint}."
        )
    if isinstance(process_noise, Tensor) and process_noise.numel() != 1:
        raise TypeError("process_noise is a tensor for no weight in particular; give {adapter key: tensor}.")
    if not _is_number(decay):
        raise TypeError(f"decay must be a number in [0, 1], got {type(decay).__name__}.")
    return Transition(cast(Any, process_noise), decay)


def check_filter(state: AdapterState, prior_precision: Any, structure: str, transition: Transition) -> None:
    """Try the prior and the first prediction on the adapter's weights.

    Args:
        state (`AdapterState`): Of the adapter.
        prior_precision (`float` or `Mapping[str, float]`): See [`initial_belief`].
        structure (`str`): Of the filter.
        transition (`Transition`): Between tasks.

    Raises:
        ValueError: A pattern matches no weight, or numbers that float32 cannot hold.
        BeliefError: The structure cannot hold the prior or the noise.
    """
    mean = {key: torch.zeros(()).expand(t.shape) for key, t in state.tensors().items()}
    # A dense precision takes any noise that a diagonal one takes, at the square of its memory.
    belief = initial_belief(mean, prior_precision, "diagonal" if structure == "dense" else structure)
    if transition.decay == 0:
        predict(belief, transition, belief.mean)  # says where noise is missing
    noise = transition.noise({key: m.shape for key, m in mean.items()}, torch.empty(0, dtype=torch.float64))
    for key, value in noise.items():
        q, squared = torch.as_tensor(value, dtype=torch.float64), transition.decay**2
        extremes = [float(1 / q.min())] if transition.decay == 0 else [float(q.max()), 1 / max(squared, 1e-300)]
        if transition.decay:
            extremes.append(float(q.max()) / max(squared, 1e-300))
        if not max(extremes) <= _LARGEST:
            raise ValueError(
                f"process_noise={float(q.max()):g} with decay={transition.decay:g} at {key!r} leaves float32: "
                f"process_noise, 1 / decay^2 and process_noise / decay^2 must be at most {_LARGEST:g} (at decay=0 "
                "1 / process_noise)."
            )
    _finite(predict(belief, transition, belief.mean))


def _finite(belief: Belief) -> None:
    if not all(bool(torch.isfinite(t).all()) for t in belief.precision.tensors().values() if t.is_floating_point()):
        raise ValueError("process_noise and decay lead to a precision that is not finite; give smaller ones.")


def check_whole(name: str, value: Any) -> None:
    """Raise TypeError unless the value is a whole number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")


def check_evaluation(datasets: Any) -> dict[str, Any]:
    """Evaluation sets by task's name.

    Raises:
        TypeError: No mapping, or one that holds something else than datasets.
        ValueError: A name that no task can have, or an empty set.
    """
    if datasets is not None and not isinstance(datasets, Mapping):
        raise TypeError(f"eval_datasets must be a mapping from tasks' names to datasets, got {_kind(datasets)}.")
    found = {check_name(name): data for name, data in (datasets or {}).items()}
    for name, data in found.items():
        check_dataset(f"eval_datasets[{name!r}]", data)
        if not is_streaming(data) and not len(data):
            raise ValueError(f"eval_datasets[{name!r}] has no data.")
    return found


def check_dataset(what: str, data: Any) -> None:
    """Raise TypeError unless this is one dataset."""
    if data is None or isinstance(data, Mapping | str | bytes):
        raise TypeError(f"{what} must be one dataset, got {_kind(data)}.")
    if is_streaming(data) and not isinstance(data, IterableDataset):
        raise TypeError(f"{what} must be a dataset with a length and rows by number, got {_kind(data)}; a list does.")


def fingerprint(name: str, data: Any, argument: str) -> str:
    """Of the data of a task, the same on all processes; `argument` names them in errors.

    Raises:
        TypeError: No dataset.
        ValueError: Streaming, or no data.
    """
    check_dataset(f"Task {name!r}: {argument}", data)
    if is_streaming(data):
        raise ValueError(f"Task {name!r}: streaming data cannot be resumed; give a dataset with a length.")
    if not len(data):
        raise ValueError(f"Task {name!r} has no data.")
    return from_first(lambda: data_fingerprint(data))


def check_trained(tensors: Mapping[str, Tensor], name: str, device: torch.device) -> None:
    """See that training has left numbers.

    Args:
        tensors (`Mapping[str, Tensor]`): Of the adapter, with `modules_to_save`.
        name (`str`): Of the task.
        device (`torch.device`): Of this process.

    Raises:
        FloatingPointError: NaN or Inf on some process.
    """
    bad = next((key for key, t in tensors.items() if not bool(torch.isfinite(t).all())), None)
    if any_process(bad is not None, device):
        raise FloatingPointError(
            f"Task {name!r} has diverged: the adapter holds NaN or Inf{f' ({bad})' if bad else ''}. Its run is thrown "
            "away. Give a lower learning_rate or max_grad_norm, or warmup_steps: the first task is then begun anew in "
            "the same output_dir; where tasks are finished, go on from a copy with ContinualLearner.from_pretrained."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.numel() == 1)


def _kind(value: Any) -> str:
    hint = "; take one of its parts" if isinstance(value, Mapping) else ""
    return f"{'None' if value is None else 'a ' + type(value).__name__}{hint}"
