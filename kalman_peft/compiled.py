"""Compiled models: two backward passes through one graph, and no hooks."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.compiler.config
from torch._functorch import config as _aot_config

from .observations import Observation


logger = logging.getLogger(__name__)

aot_config: Any = _aot_config  # `patch` is put there at run time
compiler_config: Any = torch.compiler.config


@contextmanager
def keep_saved_tensors() -> Iterator[None]:
    """Compile so that a graph can be walked back twice, as a draw of labels does; for forward and backward passes.

    By default the first backward pass may overwrite what the forward pass saved ("donated buffers"). The setting is
    no part of the key of inductor's cache on disk, where another run's graphs lie: hence the tag.

    Yields:
        `None`: With the settings in force on this thread.
    """
    with aot_config.patch(donated_buffer=False), compiler_config.patch(cache_key_tag="kalman_peft"):
        yield


def whole_batch_columns(options: Mapping[str, Any], observation: Observation) -> dict[str, Any]:
    """Options of LoKO for a compiled model, which leaves out the hooks that read scores of single sequences.

    Args:
        options (`Mapping[str, Any]`): See [`LoKOOptions`].
        observation (`Observation`): What will be observed.

    Returns:
        `dict[str, Any]`: What takes the place of some of them.

    Raises:
        ValueError: An option asks for columns of single sequences.
    """
    asks = {"mode": ("paper",), "columns": ("exact", "empirical"), "per_sequence": (True,)}
    found = [name for name, values in asks.items() if options.get(name) in values]
    found += ["top_k"] if options.get("top_k") is not None else []
    for name in found:
        raise ValueError(
            f"loko_{name}={options[name]!r} is not supported with torch_compile: it reads scores of single sequences "
            "by forward hooks, which compiled models leave out. Leave one of them out."
        )
    if observation.layout == "full":
        logger.warning("torch_compile: LoKO takes one column for a batch rather than one for each sequence.")
    return {"per_sequence": False}
