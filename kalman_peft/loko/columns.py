"""Gradients of single sequences: one backward pass gives a column of scores for each.

A tap on a linear layer sees inputs x_t and output gradients g_t; the score of sequence b is the sum over its positions
of g_t x_t^T for the weight and of g_t for the bias. Parameters that belong to no linear layer are reached by a batched
backward pass, one cotangent per sequence, which costs as much as that many passes.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from ..curvature.taps import Tap


class ColumnTaps:
    """Taps, until they are removed, on the linear layers that own the filtered parameters.

    Args:
        model (`nn.Module`): The model.
        params (`Iterable[Tensor]`): Its filtered parameters.

    Attributes:
        uncovered (`int`): How many of them belong to no linear layer.
    """

    def __init__(self, model: nn.Module, params: Iterable[Tensor]):
        wanted = {id(p) for p in params}
        self._found: dict[int, Tensor] | None = None
        self._batch = 0
        covered, elsewhere, linear = set(), set(), []
        for name, module in model.named_modules():
            own = {id(p) for p in module.parameters(recurse=False)} & wanted
            if own and type(module) is nn.Linear:
                linear.append((name, module))
                covered |= own
            else:
                elsewhere |= own  # perhaps tied to a linear layer, which sees its own share only
        self.uncovered = len(wanted - (covered - elsewhere))
        used = linear if not self.uncovered else []
        self._handles = [m.register_forward_hook(Tap(partial(self._handle, name, m))) for name, m in used]

    def remove(self) -> None:
        """Take the taps off the model."""
        for handle in self._handles:
            handle.remove()

    def record(self, batch: int) -> None:
        """Collect the scores of `batch` sequences in the backward passes to come, until `take`."""
        self._found, self._batch = {}, batch

    def take(self) -> dict[int, Tensor]:
        """Scores (batch, *shape) by the id of the parameter; ends the recording."""
        found, self._found = self._found or {}, None
        return found

    def _handle(self, name: str, module: nn.Linear, inputs: Tensor, grads: Tensor) -> None:
        if self._found is None:
            return
        if len(grads) != self._batch or len(inputs) != self._batch:
            raise ValueError(
                f"{name} sees {len(grads)} rows for a batch of {self._batch} sequences, so that scores of single "
                "sequences cannot be told apart; use columns='sampled' with per_sequence=False."
            )
        dtype = torch.promote_types(module.weight.dtype, torch.float32)
        x, g = (t.to(dtype).reshape(self._batch, -1, t.shape[-1]) for t in (inputs, grads))
        self._add(module.weight, g.mT @ x)
        if module.bias is not None:
            self._add(module.bias, g.sum(1))

    def _add(self, p: Tensor, score: Tensor) -> None:
        assert self._found is not None
        if p.requires_grad:
            self._found[id(p)] = self._found[id(p)] + score if id(p) in self._found else score


def batched_backward(
    logits: Tensor, params: list[Tensor], cotangent: Tensor, retain_graph: bool
) -> list[Tensor | None]:
    """Scores (B, *shape) of every sequence, by a batched backward pass with one cotangent for each."""
    each = torch.diag_embed(cotangent.movedim(0, -1)).movedim(-1, 0).movedim(-1, 1)  # (B, B, ...): sequence b alone
    try:
        return list(
            torch.autograd.grad(
                logits, params, each.contiguous(), retain_graph=retain_graph, allow_unused=True, is_grads_batched=True
            )
        )
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise ValueError(
            "Columns of single sequences take a batched backward pass here, as some trained tensors belong to no "
            f"plain linear layer, and this model does not allow it ({str(error).splitlines()[0]}). Set "
            "per_sequence=False; or, with gradient checkpointing, switch dropout or the checkpointing off."
        ) from error
