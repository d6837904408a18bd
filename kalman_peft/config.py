"""KalmanConfig: TrainingArguments plus what the belief and the Kalman optimizer need."""

import json
import math
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, cast

from transformers import TrainingArguments

from .curvature.estimate import SPACES, STRUCTURES
from .curvature.fisher import FISHERS
from .laplace import FORMS
from .loko import MEMORIES, check_options


@dataclass
class KalmanArguments:
    """The fields that this library adds; goes before any TrainingArguments class.

    `@dataclass class MyArguments(KalmanArguments, Seq2SeqTrainingArguments): ...`

    > Parameters that control the optimizer

    Args:
        optimizer (`str`, *optional*):
            "loko", or the name of any optimizer of the Trainer (as in `optim`). `None` leaves the choice to `optim`.
        loko_memory (`str`, *optional*, defaults to `"kronecker"`): See [`LoKO`].
        loko_rank (`int`, *optional*, defaults to 16): See [`LoKO`].
        loko_curvature_every (`int`, *optional*, defaults to 4): See [`LoKO`].
        loko_first_draws (`int`, *optional*, defaults to 6): See [`LoKO`].
        loko_prior_tokens (`float`, *optional*): See [`LoKO`].
        loko_max_decrease (`float`, *optional*, defaults to 1.0): See [`LoKO`].
        loko_trust_decay (`float`, *optional*, defaults to 1.0): See [`LoKO`].
        loko_max_kl (`float`, *optional*): See [`LoKO`].
        loko_tempering (`float`, *optional*, defaults to 1.0): See [`LoKO`].
        loko_forgetting (`float`, *optional*, defaults to 1.0): See [`LoKO`].
        loko_process_noise (`float`, *optional*, defaults to 0.0): See [`LoKO`].
        loko_belief_mode (`str`, *optional*, defaults to `"factor"`): See [`LoKO.set_belief`].

    > Parameters that control the belief (with `source_dataset` or `belief`)

    Args:
        laplace_strength (`float`, *optional*):
            lambda, weight of a source token relative to a target token. 0 switches the regulariser off. Defaults to
            100, with LoKO (whose step does not rescale the penalty as Adam's does) to 10, unless `forgetting_budget`
            is given.
        forgetting_budget (`float`, *optional*):
            Instead of a strength: allowed rise of the held-out source loss, in nats per token.
        budget_steps (`int`, *optional*, defaults to 10): Measure the source loss at every n-th step.
        laplace_form (`str`, *optional*, defaults to `"gradient"`): "gradient" or "proximal".
        laplace_structure (`str`, *optional*, defaults to `"kronecker"`): See [`estimate_curvature`].
        laplace_space (`str`, *optional*, defaults to `"delta_w"`): See [`estimate_curvature`].
        laplace_fisher (`str`, *optional*, defaults to `"sampled"`): See [`estimate_curvature`].
        laplace_rank (`int`, *optional*, defaults to 32): See [`estimate_curvature`].
        source_samples (`int`, *optional*, defaults to 64): Sequences of the source data used for the curvature.
        source_heldout (`int`, *optional*, defaults to 16):
            Sequences of the source data kept aside to measure the source loss.
    """

    optimizer: str | None = field(
        default=None, metadata={"help": "'loko', or any optimizer of the Trainer; None leaves it to `optim`."}
    )
    loko_memory: str = field(default="kronecker", metadata={"help": f"Memory of LoKO, one of {MEMORIES}."})
    loko_rank: int = field(default=16, metadata={"help": "Eigenpairs kept on long sides by LoKO's Kronecker memory."})
    loko_first_draws: int = field(default=6, metadata={"help": "LoKO draws curvature at each of the first steps."})
    loko_trust_decay: float = field(
        default=1.0, metadata={"help": "Power with which LoKO's trust region shrinks as information is gathered."}
    )
    loko_curvature_every: int = field(default=4, metadata={"help": "Draw curvature at every n-th step of LoKO."})
    loko_prior_tokens: float | None = field(
        default=None, metadata={"help": "Strength of LoKO's unit-information prior, in labels; 1e4 for causal models."}
    )
    loko_max_decrease: float | None = field(
        default=1.0, metadata={"help": "LoKO's trust region: largest predicted decrease per step, nats per token."}
    )
    loko_max_kl: float | None = field(
        default=None, metadata={"help": "LoKO's trust region: largest KL divergence per step, nats per token."}
    )
    loko_tempering: float = field(default=1.0, metadata={"help": "Power on the likelihood in LoKO."})
    loko_forgetting: float = field(default=1.0, metadata={"help": "Forgetting factor of LoKO per step, in (0, 1]."})
    loko_process_noise: float = field(default=0.0, metadata={"help": "Variance LoKO adds to every weight per step."})
    loko_belief_mode: str = field(
        default="factor", metadata={"help": "How LoKO takes a belief as prior: 'factor' or 'penalty'."}
    )
    laplace_strength: float | None = field(
        default=None,
        metadata={"help": "Weight of a source token relative to a target token; defaults to 100, with LoKO to 10."},
    )
    forgetting_budget: float | None = field(
        default=None, metadata={"help": "Allowed rise of the source loss in nats per token, instead of a strength."}
    )
    budget_steps: int = field(default=10, metadata={"help": "Measure the source loss at every n-th step."})
    laplace_form: str = field(default="gradient", metadata={"help": f"Form of the penalty, one of {FORMS}."})
    laplace_structure: str = field(
        default="kronecker", metadata={"help": f"Structure of the precision, one of {STRUCTURES}."}
    )
    laplace_space: str = field(default="delta_w", metadata={"help": f"Space of the precision, one of {SPACES}."})
    laplace_fisher: str = field(default="sampled", metadata={"help": f"Fisher of the curvature, one of {FISHERS}."})
    laplace_rank: int = field(default=32, metadata={"help": "Eigenpairs kept on long sides of the precision."})
    source_samples: int = field(default=64, metadata={"help": "Source sequences used for the curvature."})
    source_heldout: int = field(default=16, metadata={"help": "Source sequences held out to measure their loss."})

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Learning rate; defaults to 5e-5. With LoKO, scale of the step: 1."}
    )
    lr_scheduler_type: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Schedule of the learning rate; defaults to linear, constant with LoKO."}
    )
    max_grad_norm: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Largest gradient norm; defaults to 1.0. With LoKO it must be 0."}
    )

    def __post_init__(self) -> None:
        loko = self.uses_loko
        if self.learning_rate is None:
            self.learning_rate = 1.0 if loko else 5e-5
        if self.lr_scheduler_type is None:
            self.lr_scheduler_type = "constant" if loko else "linear"
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0 if loko else 1.0
        if self.optimizer and not loko:
            self.optim = self.optimizer
        self._check_kalman()
        if loko:
            self._check_loko()
        else:
            self._warn_unused("loko_", "optimizer='loko'")
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    def _warn_unused(self, prefix: str, needed: str) -> None:
        unused = [f.name for f in fields(self) if f.name.startswith(prefix) and getattr(self, f.name) != f.default]
        if unused:
            warnings.warn(f"{', '.join(unused)}: no effect without {needed}.", stacklevel=4)

    def _check_loko(self) -> None:
        check_options(self.loko_options(), prefix="loko_")
        if self.learning_rate is not None and self.learning_rate < 0.1:
            warnings.warn(
                f"learning_rate={self.learning_rate} scales LoKO's step, which needs none: leave it out.", stacklevel=4
            )
        me = cast(Any, self)  # the fields of TrainingArguments
        refused = {
            "max_grad_norm": (self.max_grad_norm, 0, "the trust region (loko_max_decrease) bounds the step"),
            "weight_decay": (me.weight_decay, 0, "the prior (loko_prior_tokens, a belief) takes its place"),
            "label_smoothing_factor": (me.label_smoothing_factor, 0, "the filter observes the labels themselves"),
            "fp16": (me.fp16, False, "use bf16=True"),
            "deepspeed": (bool(me.deepspeed), False, "use DistributedDataParallel"),
            "fsdp": (bool(me.fsdp), False, "use DistributedDataParallel"),
        }
        for name, (value, allowed, remedy) in refused.items():
            if value != allowed:
                raise ValueError(f"{name}={value} is not supported with optimizer='loko': {remedy}.")
        if me.gradient_checkpointing:
            given = me.gradient_checkpointing_kwargs or {}
            chosen: dict[str, Any] = json.loads(given) if isinstance(given, str) else dict(given)
            if chosen.setdefault("use_reentrant", False):
                raise ValueError(
                    "optimizer='loko' does not support reentrant gradient checkpointing; set "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
            me.gradient_checkpointing_kwargs = chosen

    def _check_kalman(self) -> None:
        for name, choices in (
            ("loko_memory", MEMORIES),
            ("loko_belief_mode", ("factor", "penalty")),
            ("laplace_form", FORMS),
            ("laplace_structure", STRUCTURES),
            ("laplace_space", SPACES),
            ("laplace_fisher", FISHERS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if self.forgetting_budget is not None and self.laplace_strength is not None:
            raise ValueError(
                "Give laplace_strength (a fixed weight) or forgetting_budget (which chooses the weight), not both; "
                f"got {self.laplace_strength} and {self.forgetting_budget}."
            )
        if self.forgetting_budget is not None and self.source_heldout < 1:
            raise ValueError("forgetting_budget measures the source loss and needs source_heldout >= 1.")
        for name in ("laplace_strength", "forgetting_budget"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {value}.")
        if self.laplace_rank < 1:
            raise ValueError(f"laplace_rank must be >= 1, got {self.laplace_rank}.")
        if self.laplace_form == "proximal" and (self.laplace_structure, self.laplace_space) == ("diagonal", "delta_w"):
            raise ValueError(
                "laplace_form='proximal' is not supported for laplace_structure='diagonal' in laplace_space="
                "'delta_w'; use laplace_form='gradient' or laplace_structure='kronecker'."
            )
        if min(self.source_samples, self.budget_steps) < 1 or self.source_heldout < 0:
            raise ValueError("source_samples and budget_steps must be >= 1, and source_heldout >= 0.")
        if self.uses_loko and self.laplace_form != "gradient":
            raise ValueError(
                f"laplace_form={self.laplace_form!r} goes with optimizers that follow `.grad`; LoKO takes the belief "
                "as its prior (see loko_belief_mode)."
            )

    @property
    def uses_loko(self) -> bool:
        """Whether the adapter is trained by the Kalman filter."""
        return (self.optimizer or "").lower() == "loko"

    def loko_options(self) -> dict[str, Any]:
        """Keyword arguments for [`create_loko_optimizer`]."""
        names = (
            "memory", "rank", "curvature_every", "first_draws", "prior_tokens", "max_decrease", "trust_decay",
            "max_kl", "tempering", "forgetting", "process_noise",
        )  # fmt: skip
        return {name: getattr(self, f"loko_{name}") for name in names}


@dataclass
class KalmanConfig(KalmanArguments, TrainingArguments):
    """TrainingArguments with the fields of [`KalmanArguments`].

    Changed defaults, with `optimizer="loko"` only: `learning_rate` 1.0 (it scales the Kalman step; there is nothing to
    tune), `lr_scheduler_type` "constant", `max_grad_norm` 0 (the filter has a trust region of its own). Without LoKO
    they are the Trainer's: 5e-5, "linear", 1.0.

    Raises:
        ValueError: Options that exclude each other, or a value that is out of range; the message says which.
    """
