"""Other weights in the model's place: the running average, or a draw from the belief."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .memories import Memory
from .views import View, write_all


class Average:
    """Running average of the weights, and which weights are in place.

    Args:
        group (`dict[str, Any]`): Options and progress of the filter.
        views (`list[View]`): Its weights.
        extras (`list[dict[str, Tensor]]`): Per view; with `averaging=True` "average" and "live", the filter's own.
    """

    def __init__(self, group: dict[str, Any], views: list[View], extras: list[dict[str, Tensor]]):
        self._group, self._views, self._extras = group, views, extras

    def update(self) -> None:
        """Polynomial-decay average (Shamir and Zhang, 2013): the t-th iterate comes in with weight 9 / (t + 8)."""
        if self._group["averaging"]:
            self._group["averaged"] += 1
            for view, extra in zip(self._views, self._extras, strict=True):
                extra["average"].lerp_(view.read(), 9 / (self._group["averaged"] + 8))

    def keep_live(self) -> None:
        """Keep the filter's own weights, unless the average is in their place."""
        if self._group["averaging"] and not self._group["evaluating"]:
            for view, extra in zip(self._views, self._extras, strict=True):
                extra["live"].copy_(view.read())

    def eval(self) -> None:
        """See [`LoKO.eval`]."""
        self.keep_live()
        self._place("average", evaluating=False)
        self._group["evaluating"] = True

    def train(self) -> None:
        """See [`LoKO.train`]."""
        self._place("live", evaluating=True)
        self._group["evaluating"] = False

    @torch.no_grad()
    def _place(self, name: str, evaluating: bool) -> None:
        """Put these weights in place, if there is an average and this is the mode that is left."""
        if self._group["averaging"] and self._group["evaluating"] == evaluating:
            write_all(self._views, [extra[name] for extra in self._extras])


@contextmanager
def drawn_weights(memories: list[Memory], generator: torch.Generator | None, scale: float) -> Iterator[None]:
    """Weights drawn from N(theta, scale^2 P) in place.

    Args:
        memories (`list[Memory]`): Of the filter.
        generator (`torch.Generator`, *optional*): Source of the draw, on the parameters' device.
        scale (`float`): Factor on the standard deviations.

    Yields:
        None: Inside, the model has the drawn weights; afterwards its own, to the bit.
    """
    params = [p for memory in memories for p in memory.view.params]
    kept = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for memory in memories:
                memory.view.add(memory.sample(generator), scale)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(params, kept, strict=True):
                p.copy_(value)
