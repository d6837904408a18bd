"""Taps on the LoRA factors: the input and the output gradient of each linear map, as the backward pass reaches it.

An identity in the autograd graph behind each factor saves the factor's input and, in its backward, hands it over with
the gradient. Saved that way the input obeys gradient checkpointing (it is dropped and recomputed like any other
activation), and each tap fires once per backward pass, which a forward hook does not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapters import AdapterState


Side = Literal["a", "b"]
# (index of the pair, which factor, input (..., d_in), gradient of the factor's output (..., d_out))
TapFunction = Callable[[int, Side, Tensor, Tensor], None]


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, root: Tensor, handler: Callable) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.handler = handler
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inputs,) = ctx.saved_tensors
        # A batched backward pass cannot detach, and has nothing to.
        ctx.handler(inputs.detach(), grads[0].detach() if grads[0].requires_grad else grads[0])
        return grads[0], None, None, None


class Tap:
    """Forward hook of a linear module: hands its input and its output's gradient over in every backward pass.

    Args:
        handler (`Callable`): Called as `handler(inputs, output_gradient)`.
    """

    def __init__(self, handler: Callable[[Tensor, Tensor], None]):
        self.handler = handler
        self._roots: dict[torch.device, Tensor] = {}

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """See `torch.nn.Module.register_forward_hook`."""
        if not torch.is_grad_enabled():  # inference, or the outer pass of reentrant checkpointing
            return output
        # A leaf with which the graph begins at a tap, whether or not the weight requires a gradient.
        if output.device not in self._roots:
            self._roots[output.device] = torch.zeros((), device=output.device, requires_grad=True)
        return _Tap.apply(output, args[0], self._roots[output.device], self.handler)  # type: ignore[return-value]


@contextmanager
def tapped(state: AdapterState, handler: TapFunction) -> Iterator[None]:
    """Call `handler` for both factors of every pair while gradients flow through the adapter.

    For one backward pass the handler sees, per adapted layer, first B with input u = A x and gradient dl/d(B u), then
    A with input x and gradient dl/d(A x). The gradient of a factor's weight is the sum over positions of
    gradient x input. The scaling of the pair is already contained in both gradients. The weights themselves need no
    gradient. Hooks are removed on exit, also after an exception.

    Args:
        state (`AdapterState`): The adapter to tap.
        handler (`TapFunction`): Called as `handler(index, side, inputs, output_gradient)`, in the backward pass.

    Yields:
        None: Forward passes run inside the context are tapped.
    """
    handles = []
    try:
        for index, pair in enumerate(state):
            handles.append(pair.linear_a.register_forward_hook(Tap(partial(handler, index, "a"))))
            handles.append(pair.linear_b.register_forward_hook(Tap(partial(handler, index, "b"))))
        yield
    finally:
        for handle in handles:
            handle.remove()
