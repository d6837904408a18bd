"""BeliefMixin: the life of a belief inside a Hugging Face Trainer, from source data to checkpoint. No mathematics."""

import json
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from transformers.trainer_utils import HubStrategy, get_last_checkpoint
from transformers.utils import logging

from .adapters import AdapterState
from .belief import BELIEF_CONFIG, BELIEF_WEIGHTS, Belief, write_atomically
from .callbacks import LaplaceCallback
from .config import KalmanArguments
from .curvature import estimate_curvature
from .distributed import broadcast_
from .evidence import maximise_evidence
from .laplace import ForgettingBudget, schedule_factor
from .lineage import LINEAGE, join_lineages
from .loko import LoKO
from .losses import mean_loss_gradient
from .observations import IGNORE_INDEX, Observation, infer_observation
from .source_trainer import SourceMixin
from .sources import first_rows, is_streaming
from .warmup import warm_start


logger = logging.get_logger(__name__)

# Adam divides the penalty's gradient by the size of all gradients, so that its useful weight is larger than that of
# the Kalman step, which does not. Both were chosen on SmolLM2-135M with GSM8K (the README's figure).
DEFAULT_STRENGTH, DEFAULT_STRENGTH_LOKO = 100.0, 10.0
STATE_FILE = "kalman_state.json"
_OF_A_BELIEF = ("laplace_structure", "laplace_space", "laplace_fisher", "laplace_form", "laplace_rank")


class BeliefMixin(SourceMixin):
    """What [`KalmanMixin`] does with a belief: fits it, keeps the adapter close to it, saves it.

    Args:
        model (`PeftModel`): See [`KalmanMixin`].
        args (`KalmanArguments`): See [`KalmanMixin`].
        source_dataset (`Dataset`, `Mapping`, `Sequence` or `str`, *optional*): See [`KalmanMixin`].
        belief (`Belief`, *optional*): See [`KalmanMixin`].
        **kwargs: As for the Trainer.

    Raises:
        ValueError: Options that exclude each other, or a source that is too small.
    """

    optimizer: Any

    def __init__(
        self,
        model: Any,
        args: Any,
        *posargs: Any,
        source_dataset: Any = None,
        belief: Belief | None = None,
        **kwargs: Any,
    ):
        _refuse_contradictions(args, source_dataset, belief)
        self.belief = belief
        self._budget = ForgettingBudget(args.forgetting_budget) if args.forgetting_budget is not None else None
        self.laplace_strength: float = _first_strength(args, self._budget)  # before the schedule's factor
        self.prior_precision = 0.0  # per target label; chosen by the evidence
        self._log_evidence: float | None = None
        self._laplace: LaplaceCallback | None = None
        self._once: dict[str, float] = {}  # for the first entry of the log
        fits = belief is None or args.laplace_refit_steps > 0
        super().__init__(model, args, *posargs, source_dataset=source_dataset, fits_source=fits, **kwargs)
        if belief is not None:
            belief.check(self.model)

    @property
    def _has_source(self) -> bool:
        return self.belief is not None or self._sources is not None or self._writes_source

    @property
    def _kalman(self) -> LoKO | None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, LoKO) else None

    # -- before training -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Fit the belief (or read it from the checkpoint), then train as the Trainer does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): As for the Trainer.
            *args: As for the Trainer.
            **kwargs: As for the Trainer.

        Returns:
            `TrainOutput`: As from the Trainer.
        """
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        self._prepare_belief(Path(checkpoint) if checkpoint else None)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._kalman is not None and not self.args.load_best_model_at_end:
            self._kalman.eval()  # with averaging, what is measured and saved now is the average
        if self._measures_source:
            self._measure_source()
            self.log(self._source_metrics())
        return output

    def _prepare_belief(self, checkpoint: Path | None) -> None:
        saved = checkpoint is not None and (checkpoint / BELIEF_CONFIG).is_file()
        if saved:  # the belief belongs to the run that is resumed: also where no source data are given any more
            given = None if self.belief is None else (self.belief.precision.structure, self.belief.precision.space)
            self.belief = Belief.from_pretrained(cast(Path, checkpoint), device=self.args.device)
            found = (self.belief.precision.structure, self.belief.precision.space)
            if found != (given or (self.args.laplace_structure, self.args.laplace_space)):
                logger.warning(
                    f"Going on with the checkpoint's belief ({found[0]} in {found[1]} space), not a new one."
                )
        elif not self._has_source:
            return
        elif checkpoint is not None and self.args.laplace_warmup_steps:
            raise ValueError(
                f"{checkpoint} has no belief, and laplace_warmup_steps={self.args.laplace_warmup_steps} would start "
                "from other weights than the checkpoint's; set it to 0, or do not resume."
            )
        if self._writes_source and self._sources is None:
            self._write_source(self.belief.source if saved and self.belief is not None else {})
        if self.belief is None:
            broadcast_(AdapterState(self.model, warn_excluded=False).tensors().values())
        if self._measures_source:
            self._measure_source()
            self._losses_start = self._losses_start or self._losses  # a second train() goes on from the first
        if self.belief is None:
            self._fit_belief()
        assert self.belief is not None
        self.belief.check(self.model)
        if checkpoint is not None and (checkpoint / STATE_FILE).is_file():
            self._restore(json.loads((checkpoint / STATE_FILE).read_text()))
        self._install_belief()
        self._apply_strength()

    def _fit_belief(self) -> None:
        args, data, info = self.args, self._fit_data(), {}
        if args.laplace_warmup_steps:
            losses = warm_start(
                self.model,
                data,
                steps=args.laplace_warmup_steps,
                learning_rate=args.laplace_warmup_learning_rate,
                weights=self._weights,
                progress_bar=not args.disable_tqdm,
            )
            info["warm_start"] = {
                "steps": args.laplace_warmup_steps,
                "learning_rate": args.laplace_warmup_learning_rate,
                "losses": losses,
            }
            if self._measures_source:
                self._measure_source()
            self._once = {"laplace/warmup_loss": losses[-1]} | self._source_metrics()
        settings, source = self._written_record()
        if settings:
            info["source"] = settings
        belief = Belief.fit(self.model, *self._as_sources(data), **self._curvature_options(), seed=args.seed)
        info[LINEAGE] = self._fit_lineage(belief.info)
        self.belief = Belief(belief.mean, belief.precision, belief.info | info, source)

    def _as_sources(self, data: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(data.values()) if len(data) == 1 else (data,)

    def _curvature_options(self) -> dict[str, Any]:
        options = self.args.curvature_options() | {"progress_bar": not self.args.disable_tqdm}
        if self.belief is not None:  # a belief that was given or resumed may be of another kind
            precision = self.belief.precision
            options |= {"structure": precision.structure, "space": precision.space}
        if len(self._weights) > 1:
            options["weights"] = self._weights
        return options

    def _install_belief(self) -> None:
        """Hand the belief in force to whatever keeps the adapter close to it."""
        assert self.belief is not None
        args = self.args
        self.belief = self.belief.to("cpu" if args.laplace_offload else args.device)
        if args.uses_loko:
            if self._kalman is not None:  # else create_optimizer() will
                options = self._belief_options()
                self._kalman.set_belief(
                    self.belief, options["belief_strength"], options["belief_mode"], options["belief_labels"]
                )
        elif self._laplace is None:
            self._laplace = LaplaceCallback(
                self.belief, self.laplace_strength, form=args.laplace_form, offload=args.laplace_offload
            )
            self.add_callback(self._laplace)
        else:
            self._laplace.belief = self.belief

    # -- while training --------------------------------------------------------------------------------------------

    def _follow_training(self) -> None:
        """Before an optimizer step: refit, choose the strength, and apply its schedule, each where it is due."""
        if self.belief is None:
            return
        args, step = self.args, self.state.global_step
        if step and args.laplace_refit_steps and step % args.laplace_refit_steps == 0:
            self._refit(step)
        if self._budget is not None and step and step % args.budget_steps == 0:
            self._measure_source()
            self.laplace_strength = self._budget.update(self._source_metrics()["source/rise"])
        if args.uses_evidence and step % args.laplace_evidence_steps == 0:
            self._choose_by_evidence(step)
        self._apply_strength()

    def _refit(self, step: int) -> None:
        assert self.belief is not None
        precision, record = estimate_curvature(
            self.model,
            *self._as_sources(self._fit_data()),
            **self._curvature_options(),
            seed=self.args.seed + step,
        )
        info = self.belief.info | {"curvature": record | {"step": step}}
        info[LINEAGE] = join_lineages(self.belief.info, self._fit_lineage(info))  # a belief that was given has its own
        self.belief = Belief(self.belief.mean, precision, info, self.belief.source)
        self._install_belief()

    def _choose_by_evidence(self, step: int) -> None:
        assert self.belief is not None
        rows = first_rows(self.train_dataset, self.args.source_samples)
        loader = self._loader(rows, "training")
        options = self._curvature_options()
        options.pop("weights", None)
        target, record = estimate_curvature(self.model, loader, **options, seed=self.args.seed + step)
        state = AdapterState(self.model, warn_excluded=False)
        num_labels = record["num_tokens"] / len(rows) * self._sequences_in_run()
        strength, prior_precision, self._log_evidence = maximise_evidence(
            self.belief.precision,
            target,
            state.parameters(),
            self.belief.mean,
            num_labels=num_labels,
            num_observed=record["num_tokens"],
            gradient=mean_loss_gradient(state, loader)[1],
        )
        # One answer for all: where rounding differs by process, the search may end at another point of its mesh.
        chosen = torch.tensor([strength, prior_precision / num_labels], device=self.args.device)
        broadcast_([chosen])
        self.laplace_strength, self.prior_precision = chosen.tolist()

    def _sequences_in_run(self) -> int:
        """Training sequences that are seen at least once."""
        seen = self._seen_in_run()
        return seen if is_streaming(self.train_dataset) else min(seen, len(cast(Any, self.train_dataset)))

    def _seen_in_run(self) -> int:
        """Training sequences, repeated ones counted again."""
        args = self.args
        if args.max_steps <= 0:
            return math.ceil(args.num_train_epochs * len(cast(Any, self.train_dataset)))
        return args.max_steps * cast(Any, self).get_total_train_batch_size(args)  # as auto_find_batch_size found it

    def _epochs_in_run(self) -> float:
        """How often a training sequence is seen, at least 1."""
        if self.train_dataset is None or is_streaming(self.train_dataset):
            return 1.0
        return max(1.0, self._seen_in_run() / max(len(cast(Any, self.train_dataset)), 1))

    def _belief_options(self) -> dict[str, Any]:
        """How LoKO takes the belief, as keyword arguments of [`create_loko_optimizer`]."""
        mode = self.args.loko_belief_mode
        labels = self._labels_in_run() if mode == "prior" else None
        return {"belief_strength": self.laplace_strength, "belief_mode": mode, "belief_labels": labels}

    def _labels_in_run(self) -> float:
        """Target labels that the run will observe, from the first training sequences."""
        rows = first_rows(self.train_dataset, self.args.source_samples)
        return self._count_labels(rows) / len(rows) * self._seen_in_run()

    def _count_labels(self, rows: Any) -> int:
        """Target labels of training sequences."""
        shift = self._observed.layout == "causal"
        count = 0
        for batch in self._loader(rows, "training"):
            labels = batch["labels"]
            labels = labels[:, 1:] if shift else labels
            count += int(labels.ne(IGNORE_INDEX).sum()) if not labels.is_floating_point() else len(labels)
        return count

    @property
    def _observed(self) -> Observation:
        return getattr(self, "_observation", None) or infer_observation(self.model)

    def _apply_strength(self) -> None:
        factor = schedule_factor(self.args.laplace_schedule, self.state.global_step / max(self.state.max_steps, 1))
        if self._laplace is not None:
            self._laplace.strength = self.laplace_strength * factor
            self._laplace.prior_precision = self.prior_precision
        if self._kalman is not None:
            self._kalman.belief_strength = self.laplace_strength * factor

    def _belief_metrics(self) -> dict[str, float]:
        metrics, self._once = self._once, {}
        if self._laplace is not None:
            metrics |= self._laplace.metrics()
        if self._log_evidence is not None:
            metrics["laplace/log_evidence"] = self._log_evidence
        if self._budget is not None:
            metrics |= self._source_metrics()
        return metrics

    # -- files -----------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        kalman = self._kalman
        averages = kalman is not None and kalman.param_groups[0]["averaging"]
        with kalman.posterior_mean() if kalman is not None and averages else nullcontext():
            super()._save(output_dir, None if averages else state_dict)
        if self.args.should_save and self.belief is not None:
            folder = Path(output_dir or self.args.output_dir)
            self.belief.save_pretrained(folder)
            state = {
                "laplace_strength": self.laplace_strength,
                "prior_precision": self.prior_precision,
                "log_evidence": self._log_evidence,
                "source_losses_start": self._losses_start,
            }
            write_atomically(folder / STATE_FILE, lambda p: p.write_text(json.dumps(state, indent=2) + "\n"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The Trainer copies files that it knows from the checkpoint and uploads them; the belief goes with them."""
        args, earlier = self.args, self.push_in_progress
        if not args.hub_always_push and earlier is not None and not earlier.is_done():
            return  # as the Trainer does: what is being uploaded must not be replaced
        if self.is_world_process_zero() and args.hub_strategy != HubStrategy.END and self.belief is not None:
            for name in (BELIEF_WEIGHTS, BELIEF_CONFIG, STATE_FILE):
                source = Path(checkpoint_folder, name)
                write_atomically(Path(args.output_dir, name), lambda p, source=source: shutil.copy(source, p))
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with _same_dtypes(self.model):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with _same_dtypes(self.model):
            super()._load_best_model()

    def _restore(self, state: dict[str, Any]) -> None:
        start = state["source_losses_start"]
        if not self._losses or start.keys() == self._losses.keys():
            self._losses_start = start
        else:
            logger.warning(f"The checkpoint measured sources {sorted(start)}, not {sorted(self._losses)}.")
        if self._budget is not None:
            self._budget.strength = self.laplace_strength = state["laplace_strength"]
        elif self.args.uses_evidence:
            self.laplace_strength, self.prior_precision = state["laplace_strength"], state["prior_precision"]
            self._log_evidence = state["log_evidence"]
        elif self.args.laplace_strength is None:
            self.laplace_strength = state["laplace_strength"]


@contextmanager
def _same_dtypes(model: Any) -> Iterator[None]:
    """PEFT loads an adapter of 16 bits in 32; one that was trained in 16 goes on in 16."""
    before = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != before.get(name, parameter.dtype):
            parameter.data = parameter.data.to(before[name])


def _first_strength(args: Any, budget: ForgettingBudget | None) -> float:
    if budget is not None:
        return budget.strength
    if args.laplace_strength is None or args.uses_evidence:
        return DEFAULT_STRENGTH_LOKO if args.uses_loko else DEFAULT_STRENGTH
    return args.laplace_strength


def _refuse_contradictions(args: Any, source: Any, belief: Belief | None) -> None:
    """Raise ValueError for options that source data and belief do not allow."""
    if source is None and belief is None:
        for name in ("laplace_strength", "forgetting_budget", "laplace_warmup_steps", "laplace_offload"):
            if getattr(args, name):
                raise ValueError(f"{name}={getattr(args, name)} needs `source_dataset=` or `belief=`.")
        if args.laplace_schedule != "constant":
            raise ValueError(f"laplace_schedule={args.laplace_schedule!r} needs `source_dataset=` or `belief=`.")
        chosen = {f.name: getattr(args, f.name) for f in fields(KalmanArguments) if f.name in _OF_A_BELIEF}
        default = {f.name: f.default for f in fields(KalmanArguments)}
        unused = [name for name, value in chosen.items() if value != default[name]]
        if unused:
            warnings.warn(f"{', '.join(unused)}: no effect without `source_dataset=` or `belief=`.", stacklevel=5)
    if source is None:
        for name in ("forgetting_budget", "laplace_refit_steps", "source_weights", "source_self_prompts"):
            if getattr(args, name):
                raise ValueError(f"{name}={getattr(args, name)} needs source data; pass `source_dataset=`.")
    elif not isinstance(source, str) and args.source_self_prompts:
        raise ValueError("source_self_prompts needs source_dataset='self'.")
    if belief is not None and args.laplace_warmup_steps:
        raise ValueError(
            f"laplace_warmup_steps={args.laplace_warmup_steps} moves the adapter before a belief is fitted, but "
            "`belief=` is given; leave one of them out."
        )
    if belief is not None and args.uses_evidence and belief.precision.structure == "block_tridiagonal":
        raise ValueError(
            "laplace_strength='evidence' is not supported for a `belief` of structure='block_tridiagonal', which adds "
            "up only at one point of expansion."
        )
    if belief is not None and args.uses_evidence and belief.precision.space != "adapter":
        raise ValueError(
            f"laplace_strength='evidence' is not supported for a `belief` in space {belief.precision.space!r}; fit "
            "one with space='adapter'."
        )
