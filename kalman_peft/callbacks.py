"""Callbacks for any Trainer: LaplaceCallback (LaLoRA without a subclass) and DriftCallback (LoKO's alarm)."""

from copy import copy
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .adapters import AdapterState, unwrap
from .belief import Belief
from .laplace import FORMS, add_penalty_gradient, proximal_step, squared_distance
from .loko import LoKO


logger = logging.get_logger(__name__)


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
        prior_precision (`float`, *optional*, defaults to 0.0):
            Isotropic pull towards the mean beside the belief, prior_precision / 2 * |theta - mean|^2 per target label,
            >= 0; may be changed while training. It also holds what has no curvature.
        form (`str`, *optional*, defaults to `"gradient"`):
            "gradient": added once per optimizer step, before it. "proximal": a decoupled step after it.
        offload (`bool`, *optional*, defaults to `False`):
            Keep the belief on the CPU and evaluate the penalty there, which moves the adapter's weights and their
            gradient at every step, but no precision.
        adapter_name (`str`, *optional*): Defaults to the active adapter.

    Raises:
        ValueError: Negative strength or prior precision, unknown form, or a form that the belief's structure does not
            have.
    """

    def __init__(
        self,
        belief: Belief,
        strength: float = 1.0,
        *,
        prior_precision: float = 0.0,
        form: str = "gradient",
        offload: bool = False,
        adapter_name: str | None = None,
    ):
        for name, value in (("strength", strength), ("prior_precision", prior_precision)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be >= 0 and finite, got {value}.")
        if form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, got {form!r}.")
        if form == "proximal" and not belief.precision.supports_proximal:
            belief.proximal({}, 0.0)  # raises, and says what to use instead
        self.belief, self.strength, self.prior_precision = belief, strength, prior_precision
        self.form, self.offload, self.adapter_name = form, offload, adapter_name
        self.state: AdapterState | None = None
        self._energy: torch.Tensor | None = None
        self._distance: torch.Tensor | None = None

    @property
    def is_active(self) -> bool:
        """Whether the penalty has any weight at present."""
        return self.strength > 0 or self.prior_precision > 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check that the belief is over this model's adapter, and that the setting is supported."""
        refuse_scaled_or_sharded(args, "LaplaceCallback")
        self.state = self.belief.check(unwrap(model), self.adapter_name)
        self.belief = self.belief.to("cpu" if self.offload else self.state.pairs[0].a.device)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the gradient of the penalty."""
        self._energy = self._distance = None
        if self.form == "gradient" and self.is_active:
            assert self.state is not None
            if self.prior_precision:
                self._distance = squared_distance(self.belief, self.state)
            self._energy = add_penalty_gradient(self.belief, self.state, self.strength, self.prior_precision)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Take the proximal step, with the learning rate that the optimizer has just used."""
        if self.form == "proximal" and self.is_active:
            assert self.state is not None
            rate = optimizer.param_groups[0]["lr"]
            proximal_step(self.belief, self.state, self.strength * rate, self.prior_precision * rate)

    def metrics(self) -> dict[str, float]:
        """`laplace/penalty`, `laplace/drift` and `laplace/strength` as last seen (empty before the first step).

        With a prior precision, its share of the penalty is in `laplace/penalty` and its value is reported too.
        """
        if self.state is None:
            return {}
        energy = self._energy if self._energy is not None else self.belief.energy(self.state.parameters())
        seen = {
            "laplace/penalty": self.strength * float(energy),
            "laplace/drift": float(energy),
            "laplace/strength": self.strength,
        }
        if self.prior_precision:
            distance = self._distance if self._distance is not None else squared_distance(self.belief, self.state)
            seen["laplace/penalty"] += self.prior_precision / 2 * float(distance)
            seen["laplace/prior_precision"] = self.prior_precision
        return seen

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Add the metrics to a training log entry, unless the trainer has done so."""
        if logs is None or "loss" not in logs or "laplace/drift" in logs:
            return
        logs.update(self.metrics())
        if state.log_history:
            state.log_history[-1].update(self.metrics())


class DriftCallback(TrainerCallback, ExportableState):
    """Raises an alarm when the data stop being what LoKO's filter expects.

    Watches the normalised innovation, the score energy g^T P g over its expectation: its mean over the last `window`
    steps, divided by its running mean before them. At an alarm a warning is logged, and `action` is taken; the steps
    after it make a new running mean. Logs `kalman/drift`, that ratio. A run that is resumed from a checkpoint goes on
    with the means and alarms that were saved in it.

    Args:
        threshold (`float`, *optional*, defaults to 3.0): Ratio above which the alarm goes off.
        window (`int`, *optional*, defaults to 5): Steps.
        warmup (`int`, *optional*, defaults to 20): Steps after the start, or an alarm, before the next is possible.
        action (`str`, *optional*, defaults to `"log"`):
            "log": nothing more. "stop": end the training. "inflate": widen the belief, see [`LoKO.inflate`].
        factor (`float`, *optional*, defaults to 10.0): Of "inflate".

    Attributes:
        alarms (`list[int]`): Steps at which the alarm went off.

    Raises:
        ValueError: An option is out of range.
    """

    ACTIONS = ("log", "stop", "inflate")
    _KEPT = ("alarms", "ratio", "_recent", "_mean", "_count")

    def __init__(
        self,
        threshold: float = 3.0,
        *,
        window: int = 5,
        warmup: int = 20,
        action: str = "log",
        factor: float = 10.0,
    ):
        for name, value, least in (("threshold", threshold, 1), ("factor", factor, 1)):
            if not least < value < float("inf"):
                raise ValueError(f"{name} must be > {least} and finite, got {value}.")
        if window < 1 or warmup < window:
            raise ValueError(f"window must be >= 1 and warmup >= window, got {window} and {warmup}.")
        if action not in self.ACTIONS:
            raise ValueError(f"action must be one of {self.ACTIONS}, got {action!r}.")
        self.threshold, self.window, self.warmup, self.action, self.factor = threshold, window, warmup, action, factor
        self.alarms: list[int] = []
        self.ratio = 1.0
        self._recent: list[float] = []
        self._mean, self._count = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Make sure that the optimizer is LoKO, and go on from the checkpoint's means, if a run is resumed."""
        self._filter(optimizer)
        name = type(self).__name__
        # A new run has the present state here, a resumed one the checkpoint's, which may be without this callback; the
        # Trainer's next checkpoint needs the entry.
        saved = state.stateful_callbacks.setdefault(name, self.state())
        found = [saved] if isinstance(saved, dict) else [s for s in saved if s["args"] == self.state()["args"]]
        if found:  # of several, in the order of their saving, the last
            self._restore(found[-1]["attributes"])

    def state(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint keeps.

        Returns:
            `dict`: "args" of the constructor, and "attributes".
        """
        args = ("threshold", "window", "warmup", "action", "factor")
        return {
            "args": {k: getattr(self, k) for k in args},
            "attributes": {k: copy(getattr(self, k)) for k in self._KEPT},
        }

    def _restore(self, attributes: dict[str, Any]) -> None:
        for name in self._KEPT:
            if name in attributes:
                setattr(self, name, copy(attributes[name]))

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Take the step's innovation, and act on it."""
        kalman = self._filter(optimizer)
        innovation = kalman.innovation
        if innovation is None or not self.update(innovation):
            return
        self.alarms.append(state.global_step)
        logger.warning(
            f"Drift at step {state.global_step}: the innovation is {self.ratio:.1f} times what it was; action: "
            f"{self.action}."
        )
        if self.action == "stop":
            control.should_training_stop = True
        elif self.action == "inflate":
            kalman.inflate(self.factor)

    def update(self, innovation: float) -> bool:
        """Take one innovation.

        Args:
            innovation (`float`): Of one step.

        Returns:
            `bool`: Whether the alarm goes off.
        """
        self._recent.append(innovation)
        while len(self._recent) > self.window:  # several where a run is resumed with a shorter window
            self._count += 1
            self._mean += (self._recent.pop(0) - self._mean) / min(self._count, 10 * self.window)
        if self._count == 0:
            return False
        self.ratio = sum(self._recent) / len(self._recent) / max(self._mean, 1e-30)
        if self._count + len(self._recent) < self.warmup or self.ratio <= self.threshold:
            return False
        self._recent, self._mean, self._count = [], 0.0, 0
        return True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Add the ratio to a training log entry."""
        if logs is not None and "loss" in logs:
            logs["kalman/drift"] = self.ratio
            if state.log_history:
                state.log_history[-1]["kalman/drift"] = self.ratio

    @staticmethod
    def _filter(optimizer: Any) -> LoKO:
        found = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(found, LoKO):
            raise ValueError(f"DriftCallback watches LoKO, got {type(found).__name__}; set optimizer='loko'.")
        return found


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
