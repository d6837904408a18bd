"""Mask-the-target distillation: hold on to what the base model says of all tokens but the one to be learnt.

At a labelled token with label y, p the base model's probabilities and q the tuned one's:
    KL_y = sum_{v != y} p'_v log(p'_v / q'_v),   p'_v = p_v / (1 - p_y),   q'_v = q_v / (1 - q_y),
loss = mean over labelled tokens of (-log q_y + strength * KL_y). The label's own probability is free to rise; the
proportions among the others are not free to change.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kalman_peft import KalmanTrainer

from ..encoding import IGNORE_INDEX
from ..scoring import evaluating
from .options import RATE, Kind, Number, Options
from .training import Run, Trained


def masked_kl(base: Tensor, tuned: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of KL(base || tuned), the label left out and both renormalised.

    Args:
        base (`Tensor`): Logits, shape (tokens, vocabulary).
        tuned (`Tensor`): Logits of the same shape.
        labels (`Tensor`): Shape (tokens,).

    Returns:
        `Tensor`: A scalar in nats, in float32 or wider.
    """
    wide = torch.promote_types(tuned.dtype, torch.float32)
    # The lowest finite number rather than -inf: its probability is 0, and 0 * (difference) is no NaN.
    low, index = torch.finfo(wide).min, labels[:, None]
    p = base.to(wide).scatter(1, index, low).log_softmax(-1)
    q = tuned.to(wide).scatter(1, index, low).log_softmax(-1)
    return F.kl_div(q, p, reduction="sum", log_target=True)


class MaskedKLTrainer(KalmanTrainer):
    """Adds the masked KL to the loss, from logits of labelled tokens only.

    Args:
        strength (`float`): Weight of the KL, >= 0; with 0 the base model is not run.
        **kwargs: As for [`KalmanTrainer`].
    """

    def __init__(self, *args: Any, strength: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.strength = strength
        self.last_kl: Tensor | None = None  # of the last batch, nats per labelled token

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """See the Trainer."""
        if not self.strength:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        scored = labels != IGNORE_INDEX
        peft_model: Any = self.accelerator.unwrap_model(model)
        # The base model first: switching the adapter off and on leaves no mark on the graph of the other pass.
        with evaluating(peft_model), peft_model.disable_adapter():
            unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
            base = model(**unlabelled, use_cache=False).logits[:, :-1][scored]  # (tokens, vocabulary)
        outputs: Any
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        divergence = masked_kl(base, outputs.logits[:, :-1][scored], labels[scored])
        count = int(scored.sum()) if num_items_in_batch is None else num_items_in_batch
        self.last_kl = divergence.detach() / scored.sum()
        loss = loss + self.strength * divergence / count
        return (loss, outputs) if return_outputs else loss


def _kl(run: Run, options: Options) -> list[tuple[Options, Trained]]:
    trained, trainer = run.fit(
        run.adapt(),
        trainer=MaskedKLTrainer,
        trainer_options={"strength": options["strength"]},
        learning_rate=options["lr"],
    )
    last: Tensor | None = getattr(trainer, "last_kl", None)
    if last is not None:
        trained.figures["kl/last"] = float(last)
    return [({}, trained)]


KINDS = {"kl": Kind({"strength": Number(1.0)} | RATE, _kl, "strength")}
