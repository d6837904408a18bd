"""Which adapted layers read the same input (q, k and v; gate and up), so that its second moment is taken once."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import AdapterState
from ..distributed import any_process, max_


class SharedInputs:
    """Finds, while the model runs, for each layer the first one that was called on the same tensor.

    Identity is that of the tensor object during the call, never of its address: memory is reused. Until a layer was
    called its leader is unknown.

    Args:
        state (`AdapterState`): The adapter.
        enabled (`bool`): `False` makes every layer its own leader.
    """

    def __init__(self, state: AdapterState, enabled: bool = True):
        self.state, self.enabled = state, enabled
        self.leaders = [-1 if enabled else index for index in range(len(state))]
        self._last: weakref.ref[Tensor] | None = None
        self._leader = -1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the inputs of forward passes inside.

        Yields:
            None: Hooks are removed on exit, also after an exception.
        """
        handles = []
        try:
            if self.enabled:
                for index, pair in enumerate(self.state):
                    layer = self.state.model.get_submodule(pair.name)
                    handles.append(layer.register_forward_pre_hook(self._hook(index), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def leader(self, index: int) -> int:
        """The layer that stands for the input of layer `index`."""
        return self.leaders[index]

    def settle(self, device: torch.device) -> None:
        """Agree with the other processes; a layer that nobody called leads itself.

        Raises:
            ValueError: The processes saw different layers share an input.
        """
        found = torch.tensor(self.leaders, device=device)
        max_([found])
        agreed = [place if leader < 0 else leader for place, leader in enumerate(found.tolist())]
        differs = any(mine not in (-1, other) for mine, other in zip(self.leaders, agreed, strict=True))
        if any_process(differs, device):
            raise ValueError(_UNSTABLE.format("across processes"))
        self.leaders = agreed

    def _hook(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if self._last is None or self._last() is not x:
                self._last, self._leader = weakref.ref(x), index
            if self.leaders[index] < 0:
                self.leaders[index] = self._leader
            elif self.leaders[index] != self._leader:
                raise ValueError(_UNSTABLE.format(f"from one batch to the next ({self.state.pairs[index].name})"))

        return hook


_UNSTABLE = "Which layers share an input changes {}; pass share_inputs=False."
