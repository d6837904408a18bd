"""Saving and loading a filter: its state by parameter, and what must agree with a saved one."""

import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .memories import Memory
from .options import LoKODefaults, check


logger = logging.getLogger(__name__)


def create_extras(group: dict[str, Any], memories: list[Memory]) -> list[dict[str, Tensor]]:
    """Copies of the weights that a filter holds beside its memory.

    Args:
        group (`dict[str, Any]`): Options of the filter.
        memories (`list[Memory]`): Of the filter.

    Returns:
        `list[dict[str, Tensor]]`: Per view: "start" (with forgetting), "average" and "live" (with averaging).
    """
    names = (["start"] if group["forgetting"] < 1 else []) + (["average", "live"] if group["averaging"] else [])
    return [{name: memory.view.read() for name in names} for memory in memories]


def entries(memories: list[Memory], extras: list[dict[str, Tensor]]) -> Iterator[tuple[Tensor, str, Tensor]]:
    """The filter's state by parameter.

    Args:
        memories (`list[Memory]`): Of the filter.
        extras (`list[dict[str, Tensor]]`): See `create_extras`.

    Yields:
        tuple: Parameter, name, and a tensor that shares memory with the state.
    """
    for memory, extra in zip(memories, extras, strict=True):
        for p, parts in memory.view.shared_state(memory.tensors):
            yield from ((p, key, part) for key, part in parts.items())
        for key, tensor in extra.items():
            for p, part in zip(memory.view.params, memory.view.slices(tensor), strict=True):
                yield p, key, part


def load_group(own: dict[str, Any], saved: dict[str, Any]) -> None:
    """Go on with the saved options and progress, in evaluation mode if there is an average.

    Args:
        own (`dict[str, Any]`): Parameter group of the filter.
        saved (`dict[str, Any]`): That of the saved one, which fits; see `check_group`.
    """
    changed = {k: (own[k], v) for k, v in saved.items() if k in LoKODefaults and own[k] != v}
    if changed:
        logger.warning(
            "LoKO goes on with the saved options: %s", {k: f"{v[1]}, not {v[0]}" for k, v in changed.items()}
        )
    own.update({k: v for k, v in saved.items() if k not in ("params", "param_names")})
    own["evaluating"] = own["averaging"]  # so that `train` puts the filter's own weights in place


def check_group(own: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raise ValueError unless the saved filter has the same kind of memory over the same parameters.

    Args:
        own (`dict[str, Any]`): Parameter group of the filter.
        saved (`dict[str, Any]`): That of the saved one.
    """
    if "memory" not in saved:
        raise ValueError("The saved optimizer state is not one of LoKO; resume with the optimizer that wrote it.")
    for name in ("mode", "memory", "rank", "averaging", "forgetting"):
        same = saved.get(name) == own[name]
        if name == "forgetting":  # its value may change, but with 1 the start is not kept
            same = (saved.get(name, 1) < 1) == (own[name] < 1)
        if not same:
            raise ValueError(
                f"The saved filter has {name}={saved.get(name)!r}, this one {own[name]!r}; resume with the same."
            )
    slots = saved["params"]
    if len(own["params"]) != len(slots):
        raise ValueError(f"The saved filter has {len(slots)} parameters, this one {len(own['params'])}.")
    for name, other in zip(own["param_names"], saved.get("param_names", own["param_names"]), strict=True):
        check(name == other, f"The saved filter is over {other!r} where this one has {name!r}")


def load_tensors(
    own: dict[str, Any], state_dict: dict[str, Any], parts: list[tuple[Tensor, str, Tensor]]
) -> dict[int, dict[str, Tensor]]:
    """Copy the saved tensors into the filter's, all of them or none.

    Args:
        own (`dict[str, Any]`): Parameter group of the filter.
        state_dict (`dict[str, Any]`): Of the saved one, which fits; see `check_group`.
        parts (`list[tuple]`): From `entries`.

    Returns:
        `dict[int, dict[str, Tensor]]`: The saved state by the id of the parameter.

    Raises:
        ValueError: A tensor is missing or of another shape.
    """
    slots = state_dict["param_groups"][0]["params"]
    saved = {id(p): state_dict["state"].get(slot, {}) for p, slot in zip(own["params"], slots, strict=True)}
    names = {id(p): name for p, name in zip(own["params"], own["param_names"], strict=True)}
    for p, key, part in parts:
        found = saved[id(p)].get(key)
        if found is None or found.shape != part.shape:
            raise ValueError(
                f"The saved filter does not fit: {key!r} of {names[id(p)]} is missing or of another shape."
            )
    for p, key, part in parts:
        part.copy_(saved[id(p)][key])
    return saved
