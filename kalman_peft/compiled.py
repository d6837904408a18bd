"""Two backward passes through one compiled graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.compiler.config
from torch._functorch import config as _aot_config


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
