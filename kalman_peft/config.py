"""KalmanConfig: TrainingArguments plus what the belief and the Kalman optimizer need."""

import json
import math
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, cast

from transformers import TrainingArguments

from . import precision
from .curvature.fisher import FISHERS, REDUCTIONS, kinds_for, resolve_reduction
from .curvature.memory import DEFAULT_RANK, SPACES, STRUCTURES, check_structure
from .ima import FACTORS, check_ima
from .laplace import FORMS, SCHEDULES
from .loko import BELIEF_MODES, MEMORIES, LoKOOptions, check_options
from .loko.options import COLUMNS, GAINS, MODES, PRIORS, parse_noise
from .sources import parse_weights


EVIDENCE = "evidence"
_LEAST = {
    "laplace_rank": 1,
    "laplace_num_samples": 1,
    "laplace_dense_limit": 0,
    "laplace_evidence_steps": 1,
    "laplace_warmup_steps": 0,
    "laplace_refit_steps": 0,
    "budget_steps": 1,
    "loko_iterations": 1,
    "source_samples": 1,
    "source_heldout": 0,
    "source_self_length": 2,
}


@dataclass
class KalmanArguments:
    """The fields that this library adds; goes before any TrainingArguments class.

    `@dataclass class MyArguments(KalmanArguments, Seq2SeqTrainingArguments): ...`

    > Parameters that control the optimizer

    Args:
        optimizer (`str`, *optional*):
            "loko", or the name of any optimizer of the Trainer (as in `optim`). `None` leaves the choice to `optim`.
        loko_mode, loko_memory, loko_rank, loko_dense_limit, loko_block_limit, loko_columns, loko_num_columns,
            loko_per_sequence, loko_top_k, loko_max_columns, loko_curvature_every, loko_first_draws, loko_gain,
            loko_prior, loko_prior_tokens, loko_correlation, loko_adaptive_noise, loko_forgetting, loko_damping,
            loko_form, loko_outlier_threshold, loko_max_decrease, loko_trust_decay, loko_max_kl, loko_noise_decay,
            loko_averaging, loko_max_skipped, loko_initial_bound (*optional*):
            The options of [`LoKOOptions`], with its defaults.
        loko_process_noise (`float` or `dict[str, float]`, *optional*, defaults to 0.0):
            See [`LoKOOptions`]; from the command line a mapping is given as JSON.
        loko_tempering (`float`, *optional*): See [`LoKOOptions`]; defaults to 1 / number of epochs.
        loko_iterations (`int`, *optional*, defaults to 1):
            Linearisations per step, see [`LoKO.relinearise`]; each repeats the step's forward and backward passes.
        loko_belief_mode (`str`, *optional*, defaults to `"factor"`): See [`LoKO.set_belief`].

    > Parameters that control the belief (with `source_dataset` or `belief`)

    Args:
        laplace_strength (`float` or `str`, *optional*):
            lambda, weight of a source token relative to a target token. 0 switches the regulariser off. "evidence":
            strength and prior precision maximise the log marginal likelihood of the training data (see
            [`maximise_evidence`]); needs `laplace_space="adapter"`. Defaults to 100, with LoKO (whose step does not
            rescale the penalty as Adam's does) to 10, unless `forgetting_budget` is given.
        laplace_schedule (`str`, *optional*, defaults to `"constant"`):
            Factor on a fixed strength by training progress: "constant", "linear" and "cosine" (both fall to 0), or
            "warmup" (rises from 0 over the first tenth).
        laplace_evidence_steps (`int`, *optional*, defaults to 50):
            With `laplace_strength="evidence"`: maximise it at every n-th step, on the first `source_samples` training
            sequences.
        forgetting_budget (`float`, *optional*):
            Instead of a strength: allowed rise of the held-out source loss, in nats per token.
        budget_steps (`int`, *optional*, defaults to 10): Measure the source loss at every n-th step.
        laplace_form (`str`, *optional*, defaults to `"gradient"`): "gradient" or "proximal".
        laplace_structure (`str`, *optional*, defaults to `"kronecker"`): See [`estimate_curvature`].
        laplace_space (`str`, *optional*, defaults to `"delta_w"`): See [`estimate_curvature`].
        laplace_fisher (`str`, *optional*, defaults to `"sampled"`): See [`estimate_curvature`].
        laplace_reduction (`str`, *optional*): See [`estimate_curvature`].
        laplace_rank (`int`, *optional*, defaults to 16): See [`estimate_curvature`].
        laplace_num_samples (`int`, *optional*, defaults to 1): See [`estimate_curvature`].
        laplace_dense_limit (`int`, *optional*, defaults to 256): See [`estimate_curvature`].
        laplace_warmup_steps (`int`, *optional*, defaults to 0):
            AdamW steps on the source data before the belief is fitted, see [`warm_start`]; the belief's mean is the
            adapter after them. A remedy for the blind spot of `laplace_space="adapter"` at B = 0.
        laplace_warmup_learning_rate (`float`, *optional*, defaults to 1e-3): Of these steps.
        laplace_refit_steps (`int`, *optional*, defaults to 0):
            Fit the curvature again at every n-th step, on the same source data at the present weights (dynamic
            precision); the mean stays. 0 keeps the first one.
        laplace_offload (`bool`, *optional*, defaults to `False`):
            Keep the belief on the CPU and evaluate the penalty there.
        source_samples (`int`, *optional*, defaults to 64): Sequences of each source used for the curvature.
        source_heldout (`int`, *optional*, defaults to 16):
            Sequences of each source kept aside to measure the source loss.
        source_weights (`dict`, `list` or `str`, *optional*):
            Relative weights of several sources, by name or in order, or as JSON; equal by default.
        source_self_length (`int`, *optional*, defaults to 128):
            With `source_dataset="self"`: tokens per sequence that the base model writes.
        source_self_prompts (`list[str]`, *optional*):
            With `source_dataset="self"`: texts to start from, in place of the BOS token.

    > Parameters that control the shape of the adapter (with any optimizer but LoKO)

    Args:
        ima_weight (`float`, *optional*, defaults to 0.0):
            Weight of the independent-mechanism contrast of the adapter's factors, see [`ImaCallback`]. 0 is off.
        ima_factors (`str`, *optional*, defaults to `"both"`): "b": columns of B. "a": rows of A. "both".
        ima_epsilon (`float`, *optional*, defaults to 1e-3): Columns much shorter than its square root are left alone.
    """

    optimizer: str | None = field(
        default=None, metadata={"help": "'loko', or any optimizer of the Trainer; None leaves it to `optim`."}
    )
    loko_mode: str = field(default="kalman", metadata={"help": f"LoKO's mode, one of {MODES}."})
    loko_memory: str = field(default="kronecker", metadata={"help": f"Memory of LoKO, one of {MEMORIES}."})
    loko_rank: int = field(default=16, metadata={"help": "Eigenpairs on long sides, or directions, of LoKO's memory."})
    loko_dense_limit: int = field(default=128, metadata={"help": "Longest short side with a Kronecker memory."})
    loko_block_limit: int = field(default=1024, metadata={"help": "Most weights of a parameter with a block memory."})
    loko_columns: str = field(default="auto", metadata={"help": f"How LoKO takes information, one of {COLUMNS}."})
    loko_num_columns: int = field(default=1, metadata={"help": "Draws per step of LoKO."})
    loko_per_sequence: bool | None = field(
        default=None, metadata={"help": "One column per sequence rather than per batch; by default not for tokens."}
    )
    loko_top_k: int | None = field(
        default=None, metadata={"help": "Labels told apart by exact columns; all by default."}
    )
    loko_max_columns: int = field(default=64, metadata={"help": "More columns per step are summed in groups."})
    loko_curvature_every: int | None = field(
        default=None, metadata={"help": "Take columns at every n-th step of LoKO; 4 for tokens, 1 otherwise."}
    )
    loko_first_draws: int = field(default=6, metadata={"help": "LoKO takes columns at each of the first steps."})
    loko_gain: str = field(default="auto", metadata={"help": f"Gain of LoKO, one of {GAINS}."})
    loko_prior: str = field(default="auto", metadata={"help": f"Prior of LoKO's weights, one of {PRIORS}."})
    loko_prior_tokens: float | None = field(
        default=None, metadata={"help": "Strength of LoKO's prior, in labels; 1e4 for tokens, 1e3 otherwise."}
    )
    loko_tempering: float | None = field(
        default=None, metadata={"help": "Power on the likelihood in LoKO; 1 / number of epochs by default."}
    )
    loko_correlation: float = field(
        default=0.0, metadata={"help": "T labels of a sequence count as T^(1 - this) in LoKO; in [0, 1]."}
    )
    loko_adaptive_noise: float = field(
        default=0.0, metadata={"help": "Decay of LoKO's running misspecification factor; 0 is off."}
    )
    loko_forgetting: float = field(default=1.0, metadata={"help": "Forgetting factor of LoKO per step, in (0, 1]."})
    loko_process_noise: float | dict | str = field(  # type: ignore[assignment]
        default=0.0, metadata={"help": "Variance LoKO adds to every weight per step; or JSON, pattern to variance."}
    )
    loko_damping: float | None = field(
        default=None, metadata={"help": "Added to LoKO's output curvature; for classification 0.1 by default."}
    )
    loko_form: str = field(default="logit", metadata={"help": "How the damping enters: 'logit' or 'softmax'."})
    loko_outlier_threshold: float | None = field(
        default=None, metadata={"help": "Labels further off than this, in standard deviations, count less in LoKO."}
    )
    loko_max_decrease: float | None = field(
        default=0.5,
        metadata={"help": "LoKO's trust region: largest predicted decrease per step, as share of the loss."},
    )
    loko_trust_decay: float = field(
        default=0.0, metadata={"help": "Power with which LoKO's trust region shrinks as information is gathered."}
    )
    loko_max_kl: float | None = field(
        default=None, metadata={"help": "LoKO's trust region: largest KL divergence per step, nats per label."}
    )
    loko_noise_decay: float = field(default=0.99, metadata={"help": "Decay of LoKO's estimate of the label noise."})
    loko_averaging: bool = field(
        default=False, metadata={"help": "Evaluate LoKO at a running average of the weights."}
    )
    loko_max_skipped: int = field(default=10, metadata={"help": "Batches with NaN in a row before LoKO raises."})
    loko_initial_bound: float = field(
        default=1.0, metadata={"help": "Bound of the initial variances with loko_mode='paper'."}
    )
    loko_iterations: int = field(default=1, metadata={"help": "Linearisations per step of LoKO."})
    loko_belief_mode: str = field(
        default="factor", metadata={"help": f"How LoKO takes a belief as prior, one of {BELIEF_MODES}."}
    )
    laplace_strength: float | str | None = field(
        default=None,
        metadata={
            "help": "Weight of a source token relative to a target token; defaults to 100, with LoKO to 10. "
            "'evidence' maximises the marginal likelihood."
        },
    )
    laplace_schedule: str = field(
        default="constant", metadata={"help": f"Factor on the strength by progress, one of {SCHEDULES}."}
    )
    laplace_evidence_steps: int = field(default=50, metadata={"help": "Maximise the evidence at every n-th step."})
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
    laplace_reduction: str | None = field(
        default=None, metadata={"help": f"What the empirical Fisher squares its scores over, one of {REDUCTIONS}."}
    )
    laplace_rank: int = field(
        default=DEFAULT_RANK, metadata={"help": "Eigenpairs kept on long sides of the precision, or in all of it."}
    )
    laplace_num_samples: int = field(default=1, metadata={"help": "Draws per sequence of the sampled Fisher."})
    laplace_dense_limit: int = field(default=256, metadata={"help": "Longest side of the precision kept in full."})
    laplace_warmup_steps: int = field(
        default=0, metadata={"help": "AdamW steps on the source data before the belief is fitted."}
    )
    laplace_warmup_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the warm start."})
    laplace_refit_steps: int = field(
        default=0, metadata={"help": "Fit the curvature again at every n-th step; 0 keeps the first one."}
    )
    laplace_offload: bool = field(default=False, metadata={"help": "Keep and evaluate the belief on the CPU."})
    source_samples: int = field(default=64, metadata={"help": "Sequences of each source used for the curvature."})
    source_heldout: int = field(default=16, metadata={"help": "Sequences of each source held out for their loss."})
    source_weights: dict | str | list | None = field(
        default=None, metadata={"help": "Relative weights of several sources, by name or in order; may be JSON."}
    )
    source_self_length: int = field(
        default=128, metadata={"help": "Tokens per sequence that the base model writes for source_dataset='self'."}
    )
    source_self_prompts: list[str] | None = field(
        default=None, metadata={"help": "Texts that self-written sequences start from, in place of the BOS token."}
    )
    ima_weight: float = field(
        default=0.0, metadata={"help": "Weight of the independent-mechanism contrast of the adapter's factors."}
    )
    ima_factors: str = field(default="both", metadata={"help": f"Factors that it keeps apart, one of {FACTORS}."})
    ima_epsilon: float = field(
        default=1e-3, metadata={"help": "Columns much shorter than its square root are left alone by the contrast."}
    )

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Learning rate; defaults to 5e-5. With LoKO, scale of the step: 1."}
    )
    lr_scheduler_type: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Schedule of the learning rate; defaults to linear, constant with LoKO."}
    )
    max_grad_norm: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Largest gradient norm; defaults to 1.0. With LoKO it must be 0."}
    )

    _default_learning_rate: ClassVar[float] = 5e-5  # without LoKO

    def __post_init__(self) -> None:
        loko = self.uses_loko
        if self.learning_rate is None:
            self.learning_rate = 1.0 if loko else self._default_learning_rate
        if self.lr_scheduler_type is None:
            self.lr_scheduler_type = "constant" if loko else "linear"
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0 if loko else 1.0
        if self.optimizer and not loko:
            self.optim = self.optimizer
        self._check_kalman()
        if loko:
            self.check_loko()
        else:
            self._warn_unused("loko_", "optimizer='loko'")
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    def _warn_unused(self, prefix: str, needed: str) -> None:
        unused = [f.name for f in fields(self) if f.name.startswith(prefix) and getattr(self, f.name) != f.default]
        if unused:
            warnings.warn(f"{', '.join(unused)}: no effect without {needed}.", stacklevel=4)

    def check_loko(self) -> None:
        """Raise ValueError for the first argument that does not go with `optimizer="loko"`."""
        self.loko_process_noise = parse_noise(self.loko_process_noise)
        check_options(self.loko_options(), prefix="loko_")
        self._check_belief_mode()
        if self.loko_iterations > 1:
            if self.loko_mode == "paper" or self.loko_gain == "memory" or (self.loko_curvature_every or 1) > 1:
                raise ValueError(
                    f"loko_iterations={self.loko_iterations} needs loko_mode='kalman', loko_gain='joint' and "
                    f"loko_curvature_every=1, got {self.loko_mode!r}, {self.loko_gain!r} and "
                    f"{self.loko_curvature_every}."
                )
        if self.learning_rate is not None and not 0 <= self.learning_rate <= 1:
            raise ValueError(
                f"learning_rate={self.learning_rate} is not in [0, 1]: it scales LoKO's step, which needs none."
            )
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
            "use_liger_kernel": (me.use_liger_kernel, False, "its kernels allow one backward pass per forward pass"),
            "parallelism_config": (me.parallelism_config, None, "use DistributedDataParallel"),
            "deepspeed": (bool(me.deepspeed), False, "use DistributedDataParallel"),
            "fsdp": (bool(me.fsdp), False, "use DistributedDataParallel"),
        }
        for name, (value, allowed, remedy) in refused.items():
            if value != allowed:
                raise ValueError(f"{name}={value} is not supported with optimizer='loko': {remedy}.")
        default = {f.name: f.default for f in fields(me)}
        for name in ("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon"):
            if name in default and getattr(me, name) != default[name]:
                raise ValueError(f"{name}={getattr(me, name)} has no effect with optimizer='loko'; leave it out.")
        self._check_checkpointing()

    def _check_checkpointing(self) -> None:
        """Choose checkpointing that is not reentrant, under the name the user (and this transformers) has for it."""
        me = cast(Any, self)
        names = ("activation_checkpointing", "gradient_checkpointing")
        used = [name for name in names if getattr(me, name, None)]
        for name in [f"{n}_kwargs" for n in names if getattr(me, f"{n}_kwargs", None)] or [
            f"{n}_kwargs" for n in used
        ]:
            given = getattr(me, name) or {}
            chosen: dict[str, Any] = json.loads(given) if isinstance(given, str) else dict(given)
            if used and chosen.setdefault("use_reentrant", False):
                raise ValueError(
                    f"optimizer='loko' does not support reentrant gradient checkpointing; set {name}="
                    "{'use_reentrant': False}."
                )
            setattr(me, name, chosen)

    def _check_belief_mode(self) -> None:
        if self.loko_belief_mode != "prior":
            return
        for name, needed, given in (
            ("laplace_space", "'adapter', a Gaussian over A and B", self.laplace_space),
            ("laplace_schedule", "'constant'", self.laplace_schedule),
            ("laplace_refit_steps", "0", self.laplace_refit_steps),
            ("forgetting_budget", "None", self.forgetting_budget),
        ):
            if str(given) not in needed.replace("'", "").replace(",", "").split():
                raise ValueError(
                    f"loko_belief_mode='prior' counts the belief once, at the start: it needs {name}={needed}, got "
                    f"{given!r}. loko_belief_mode='factor' has no such limit."
                )
        if self.loko_forgetting < 1:
            raise ValueError(
                f"loko_forgetting={self.loko_forgetting} would relax the belief itself with loko_belief_mode='prior'; "
                "use 'factor', or loko_process_noise."
            )

    def _check_kalman(self) -> None:
        for name, choices in (
            ("loko_memory", MEMORIES),
            ("loko_belief_mode", BELIEF_MODES),
            ("laplace_form", FORMS),
            ("laplace_structure", STRUCTURES),
            ("laplace_space", SPACES),
            ("laplace_fisher", FISHERS),
            ("laplace_schedule", SCHEDULES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        self.source_weights = parse_weights(self.source_weights)
        check_ima(self.ima_weight, self.ima_factors, self.ima_epsilon, self.uses_loko)
        if not self.ima_weight:
            self._warn_unused("ima_", "ima_weight")
        self._check_strength()
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}.")
        check_structure(self.laplace_structure, self.laplace_space)
        try:
            reduction = resolve_reduction(self.laplace_fisher, self.laplace_reduction)
            kinds_for(self.laplace_fisher, reduction, self.laplace_num_samples)
        except ValueError as error:
            raise ValueError(f"laplace_fisher, laplace_reduction or laplace_num_samples: {error}") from error
        if not 0 < self.laplace_warmup_learning_rate < math.inf:
            raise ValueError(
                f"laplace_warmup_learning_rate must be positive, got {self.laplace_warmup_learning_rate}."
            )
        kind = (self.laplace_structure, self.laplace_space)
        if self.laplace_form == "proximal" and not _has_proximal(*kind):
            raise ValueError(
                f"laplace_form='proximal' is not supported for laplace_structure={kind[0]!r} in laplace_space="
                f"{kind[1]!r}; use laplace_form='gradient' or laplace_structure='kronecker'."
            )
        for name, needed, given in (
            ("laplace_evidence_steps", "laplace_strength='evidence'", self.uses_evidence),
            ("laplace_warmup_learning_rate", "laplace_warmup_steps", self.laplace_warmup_steps > 0),
        ):
            if not given:
                self._warn_unused(name, needed)
        if self.uses_loko and self.laplace_form != "gradient":
            raise ValueError(
                f"laplace_form={self.laplace_form!r} goes with optimizers that follow `.grad`; LoKO takes the belief "
                "as its prior (see loko_belief_mode)."
            )

    def _check_strength(self) -> None:
        strength, budget = self.laplace_strength, self.forgetting_budget
        if isinstance(strength, str) and strength != EVIDENCE:  # as from the command line
            try:
                strength = self.laplace_strength = float(strength)
            except ValueError as error:
                raise ValueError(f"laplace_strength must be a number or {EVIDENCE!r}, got {strength!r}.") from error
        if budget is not None and strength is not None:
            raise ValueError(
                "Give laplace_strength (a fixed weight, or 'evidence') or forgetting_budget (which chooses the "
                f"weight), not both; got {strength} and {budget}."
            )
        for name, value in (("laplace_strength", strength), ("forgetting_budget", budget)):
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {value}.")
        if budget is not None and self.source_heldout < 1:
            raise ValueError("forgetting_budget measures the source loss and needs source_heldout >= 1.")
        chooses = "forgetting_budget" if budget is not None else "laplace_strength='evidence'"
        if self.laplace_schedule != "constant" and (budget is not None or strength == EVIDENCE):
            raise ValueError(
                f"laplace_schedule={self.laplace_schedule!r} goes with a fixed strength, but {chooses} chooses it."
            )
        if strength == EVIDENCE and self.uses_loko:
            raise ValueError(
                "laplace_strength='evidence' is not supported with optimizer='loko', whose prior precision is its "
                "own; give a number or a forgetting_budget."
            )
        if strength == EVIDENCE and self.laplace_structure == "block_tridiagonal":
            raise ValueError(
                "laplace_strength='evidence' is not supported with laplace_structure='block_tridiagonal', which adds "
                "up only at one point of expansion; use 'kronecker' or 'low_rank'."
            )
        if strength == EVIDENCE and self.laplace_space != "adapter":
            raise ValueError(
                f"laplace_strength='evidence' is not supported in laplace_space={self.laplace_space!r}, whose energy "
                "is no Gaussian in A and B; use laplace_space='adapter' (with laplace_warmup_steps, so that A has "
                "curvature)."
            )

    @property
    def uses_evidence(self) -> bool:
        """Whether strength and prior precision are chosen by the marginal likelihood."""
        return self.laplace_strength == EVIDENCE

    @property
    def uses_loko(self) -> bool:
        """Whether the adapter is trained by the Kalman filter."""
        return (self.optimizer or "").lower() == "loko"

    def curvature_options(self) -> dict[str, Any]:
        """Keyword arguments for [`estimate_curvature`]."""
        names = ("structure", "space", "fisher", "reduction", "rank", "num_samples", "dense_limit", "offload")
        return {name: getattr(self, f"laplace_{name}") for name in names}

    def loko_options(self) -> dict[str, Any]:
        """Keyword arguments for [`create_loko_optimizer`]."""
        names = [f.name for f in fields(LoKOOptions) if f.name != "seed"]
        options = {name: getattr(self, f"loko_{name}") for name in names}
        return options | {"tempering": 1.0 if self.loko_tempering is None else self.loko_tempering}


def _has_proximal(structure: str, space: str) -> bool:
    classes = (vars(precision)[name] for name in precision.__all__)
    kinds = [c for c in classes if isinstance(c, type) and issubclass(c, precision.Precision)]
    return any(
        c.supports_proximal
        for c in kinds
        if (getattr(c, "structure", ""), getattr(c, "space", "")) == (structure, space)
    )


@dataclass
class KalmanConfig(KalmanArguments, TrainingArguments):
    """TrainingArguments with the fields of [`KalmanArguments`].

    Changed defaults, with `optimizer="loko"` only: `learning_rate` 1.0 (it scales the Kalman step; there is nothing to
    tune), `lr_scheduler_type` "constant", `max_grad_norm` 0 (the filter has a trust region of its own). Without LoKO
    they are the Trainer's: 5e-5, "linear", 1.0.

    With LoKO, a schedule scales the Kalman step by its factor; what the filter takes in is the same. A warm-up from 0
    thus makes the filter surer of weights that it has hardly moved.

    Raises:
        ValueError: Options that exclude each other, or a value that is out of range; the message says which.
    """
