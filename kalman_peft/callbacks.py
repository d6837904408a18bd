"""LaplaceCallback: LaLoRA in any Trainer, without a subclass."""

from typing import Any

import torch
from transformers import TrainerCallback

from .adapters import AdapterState, unwrap
from .belief import Belief
from .laplace import FORMS, add_penalty_gradient, proximal_step


class LaplaceCallback(TrainerCallback):
    """Keeps a LoRA adapter close to a belief while any Trainer trains it with any optimizer.

    Logs `laplace/penalty` (strength * R, nats per token), `laplace/drift` (R) and `laplace/strength`. In a stock
    Trainer they reach `state.log_history` and the console; [`KalmanTrainer`] also sends them to its reporters.

    Supported: single process, DistributedDataParallel, gradient accumulation and checkpointing, bf16. Not supported,
    and refused: fp16 mixed precision (its gradients are scaled at this point), FSDP and DeepSpeed (their parameters
    are sharded).

    Args:
        belief (`Belief`): Over the adapter that is trained.
        strength (`float`, *optional*, defaults to 1.0): lambda >= 0; may be changed while training.
        form (`str`, *optional*, defaults to `"gradient"`):
            "gradient": added once per optimizer step, before it. "proximal": a decoupled step after it.
        adapter_name (`str`, *optional*): Defaults to the active adapter.

    Raises:
        ValueError: Negative strength, unknown form, or a form that the belief's structure does not have.
    """

    def __init__(
        self,
        belief: Belief,
        strength: float = 1.0,
        *,
        form: str = "gradient",
        adapter_name: str | None = None,
    ):
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength must be >= 0 and finite, got {strength}.")
        if form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, got {form!r}.")
        if form == "proximal" and not belief.precision.supports_proximal:
            belief.proximal({}, 0.0)  # raises, and says what to use instead
        self.belief, self.strength, self.form, self.adapter_name = belief, strength, form, adapter_name
        self.state: AdapterState | None = None
        self._energy: torch.Tensor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check that the belief is over this model's adapter, and that the setting is supported."""
        refuse_scaled_or_sharded(args, "LaplaceCallback")
        self.state = self.belief.check(unwrap(model), self.adapter_name)
        self.belief = self.belief.to(self.state.pairs[0].a.device)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the gradient of the penalty."""
        if self.form == "gradient" and self.strength > 0:
            assert self.state is not None
            self._energy = add_penalty_gradient(self.belief, self.state, self.strength)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Take the proximal step, with the learning rate that the optimizer has just used."""
        if self.form == "proximal" and self.strength > 0:
            assert self.state is not None
            proximal_step(self.belief, self.state, self.strength * optimizer.param_groups[0]["lr"])
            self._energy = None

    def metrics(self) -> dict[str, float]:
        """`laplace/penalty`, `laplace/drift` and `laplace/strength` as last seen (empty before the first step)."""
        if self.state is None:
            return {}
        energy = self._energy if self._energy is not None else self.belief.energy(self.state.parameters())
        return {
            "laplace/penalty": self.strength * float(energy),
            "laplace/drift": float(energy),
            "laplace/strength": self.strength,
        }

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Add the metrics to a training log entry, unless the trainer has done so."""
        if logs is None or "loss" not in logs or "laplace/drift" in logs:
            return
        logs.update(self.metrics())
        if state.log_history:
            state.log_history[-1].update(self.metrics())


def refuse_scaled_or_sharded(args: Any, who: str, accelerator: Any = None) -> None:
    """Raise for settings in which gradients or weights are not what they seem.

    Args:
        args (`TrainingArguments`): Of the Trainer.
        who (`str`): Named in the error.
        accelerator (`Accelerator`, *optional*): Of the Trainer; knows what was set outside the arguments.

    Raises:
        ValueError: fp16 mixed precision, FSDP or DeepSpeed.
    """
    kind = str(getattr(accelerator, "distributed_type", "")).rsplit(".", 1)[-1]
    mixed = getattr(accelerator, "mixed_precision", None) or getattr(args, "mixed_precision", None)
    if getattr(args, "fp16", False) or mixed == "fp16":
        raise ValueError(f"{who} does not support fp16=True, whose gradients are loss-scaled; use bf16=True.")
    if getattr(args, "deepspeed", None) or kind == "DEEPSPEED":
        raise ValueError(f"{who} does not support DeepSpeed; use DistributedDataParallel.")
    if getattr(args, "fsdp", None) or kind == "FSDP":
        raise ValueError(f"{who} does not support FSDP yet; use DistributedDataParallel.")
