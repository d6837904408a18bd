"""One training step each: of AdamW, AdamW + LaLoRA and LoKO on a model, or of an optimizer on given gradients.

Not run by itself: part of `step_cost.py`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kalman_peft import AdapterState, Belief, CategoricalObservation, LoKO, create_loko_optimizer
from kalman_peft.laplace import add_penalty_gradient


Run = Callable[[], None]
PLAIN, ADAMW = "forward + backward", "AdamW"
DRAW, NO_DRAW = "with draw", "no draw"
EVERY = (4, 10)  # steps of which one draws; 4 is the default for tokens
LABELS = 4  # of the observation through which given gradients come
_PRIOR = 1e6  # settled at once, so that steps without a draw can come first


def schedule(optimizer: LoKO, draw: bool) -> None:
    """Make the next step one with or without a draw, whatever the count of steps; lr = 0 leaves the weights alone."""
    every = {"steps": 0, "curvature_every": 1} if draw else {"steps": 1, "curvature_every": 10**9}
    optimizer.param_groups[0].update(every, first_draws=0, lr=0.0)


# -- on a model ----------------------------------------------------------------------------------------------------


def plain_steps(model: Any, batch: dict[str, Tensor]) -> dict[str, Run]:
    """Forward and backward, and what steps after them."""
    state = AdapterState(model)
    params = list(state.parameters().values())
    belief = Belief.fit(model, [batch], progress_bar=False)
    adamw, penalised = torch.optim.AdamW(params, lr=1e-5), torch.optim.AdamW(params, lr=1e-5)

    def plain() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    def step(optimizer: torch.optim.Optimizer, penalty: bool) -> None:
        model(**batch).loss.backward()
        if penalty:
            add_penalty_gradient(belief, state, 1.0)
        optimizer.step()
        model.zero_grad()

    return {PLAIN: plain, ADAMW: lambda: step(adamw, False), "AdamW + LaLoRA": lambda: step(penalised, True)}


def loko_step(model: Any, batch: dict[str, Tensor], draw: bool, **options: Any) -> Run:
    """A step of a LoKO optimizer of its own.

    Args:
        model (`PeftModel`): The model.
        batch (`dict[str, Tensor]`): With labels.
        draw (`bool`): Whether columns are taken.
        **options: See [`LoKOOptions`].

    Returns:
        `Callable`: Runs one step.
    """
    optimizer = create_loko_optimizer(model, **options)
    for memory in optimizer._memories:
        memory.set_prior(torch.full_like(memory.prior, _PRIOR))
    optimizer.param_groups[0]["settled"] = True
    inputs = {key: value for key, value in batch.items() if key != "labels"}

    def run() -> None:
        schedule(optimizer, draw)
        optimizer.observe(model(**inputs).logits, batch["labels"])
        optimizer.step()

    return run


# -- on given gradients --------------------------------------------------------------------------------------------


class _Given(torch.autograd.Function):
    """Logits whose gradients are given: what a model would compute costs nothing."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *params: Tensor) -> Tensor:  # type: ignore[override]
        """Zeros for one sequence."""
        ctx.gradients = gradients
        return params[0].new_zeros(1, LABELS + 1, LABELS)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The gradients, whatever the cotangent."""
        return None, *ctx.gradients


def lora_shapes(weights: float, r: int, width: int) -> list[tuple[int, int]]:
    """Shapes of A (r, width) and B (width, r) in turn, of about as many weights."""
    return [(r, width), (width, r)] * max(round(weights / (2 * r * width)), 1)


def make_params(shapes: Iterable[tuple[int, ...]]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Named parameters, and a gradient for each; on the accelerator if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    draw = {"generator": generator, "device": device}
    params = {f"p{j}": torch.zeros(shape, device=device, requires_grad=True) for j, shape in enumerate(shapes)}
    return params, [torch.randn(p.shape, **draw) for p in params.values()]  # type: ignore[arg-type]


def adamw_on(
    params: dict[str, Tensor], gradients: list[Tensor], foreach: bool | None = None
) -> tuple[torch.optim.Optimizer, Run]:
    """AdamW, as it is by default unless told, and its step on the gradients."""
    optimizer = torch.optim.AdamW(params.values(), foreach=foreach)
    for p, gradient in zip(params.values(), gradients, strict=True):
        p.grad = gradient
    return optimizer, optimizer.step


def loko_on(params: dict[str, Tensor], gradients: list[Tensor], draw: bool, **options: Any) -> tuple[LoKO, Run]:
    """LoKO, and its observing and stepping with the gradients for scores and columns alike."""
    prior = dict.fromkeys(params, _PRIOR)
    optimizer = LoKO(params.items(), CategoricalObservation(shift=True), prior_precision=prior, **options)
    labels = torch.zeros(1, LABELS + 1, dtype=torch.long, device=gradients[0].device)

    def run() -> None:
        schedule(optimizer, draw)
        logits: Any = _Given.apply(gradients, *params.values())
        optimizer.observe(logits, labels)
        optimizer.step()

    return optimizer, run


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all tensors in the optimizer's state."""
    tensors = [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
