"""KalmanMixin and KalmanTrainer: the belief and the Kalman optimizer inside a Hugging Face Trainer. No mathematics."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from .belief import BELIEF_CONFIG, Belief, write_atomically
from .callbacks import LaplaceCallback, refuse_scaled_or_sharded
from .card import write_model_card
from .config import KalmanArguments
from .curvature.fisher import default_forward
from .distributed import all_sum_, world
from .laplace import ForgettingBudget
from .loko import LoKO, create_loko_optimizer
from .observations import IGNORE_INDEX, infer_observation, negative_log_likelihood


logger = logging.get_logger(__name__)

# Adam divides the penalty's gradient by the size of all gradients, so that its useful weight is larger than that of
# the Kalman step, which does not. Both were chosen on SmolLM2-135M with GSM8K (the README's figure).
DEFAULT_STRENGTH, DEFAULT_STRENGTH_LOKO = 100.0, 10.0
STATE_FILE = "kalman_state.json"


_TrainerBase = Trainer if TYPE_CHECKING else object  # a mixin: the Trainer comes after it


class KalmanMixin(_TrainerBase):
    """Goes before any Trainer class: `class MyTrainer(KalmanMixin, Seq2SeqTrainer)`.

    With a source dataset it fits a belief before training, keeps the adapter close to it while any optimizer trains,
    and saves it beside the adapter. With `optimizer="loko"` the adapter is trained by a Kalman filter, which takes the
    belief as its prior.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A model with one LoRA adapter, or a plain one with `peft_config`.
        args (`KalmanArguments`): [`KalmanConfig`], or any TrainingArguments that include [`KalmanArguments`].
        source_dataset (`Dataset`, *optional*):
            What must not be forgotten, prepared as the training data is. `args.source_samples` of its sequences give
            the curvature, the last `args.source_heldout` measure the source loss.
        belief (`Belief`, *optional*): A belief made earlier, in place of fitting one.
        peft_config (`LoraConfig`, *optional*): Adapter to put on a plain model.
        **kwargs: As for the Trainer.

    Raises:
        ValueError: Options that exclude each other, or a source that is too small.
        TypeError: `args` has no Kalman fields.
    """

    args: Any
    model: Any
    optimizer: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *posargs: Any,
        source_dataset: Any = None,
        belief: Belief | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ):
        if not isinstance(args, KalmanArguments):
            raise TypeError(f"args must be a KalmanConfig, got {type(args).__name__}.")
        if peft_config is not None:
            model = _with_adapter(model, peft_config, getattr(args, "seed", 42))
        self.belief = belief
        self._source_fit, self._source_heldout = _split_source(source_dataset, args, belief)
        if belief is None and source_dataset is None:
            for name in ("laplace_strength", "forgetting_budget"):
                if getattr(args, name):
                    raise ValueError(f"{name}={getattr(args, name)} needs `source_dataset=` or `belief=`.")
        if args.forgetting_budget is not None and source_dataset is None:
            raise ValueError("forgetting_budget measures the loss on held-out source data; pass `source_dataset=`.")
        self._budget = ForgettingBudget(args.forgetting_budget) if args.forgetting_budget is not None else None
        strength = args.laplace_strength
        if strength is None:
            strength = DEFAULT_STRENGTH_LOKO if args.uses_loko else DEFAULT_STRENGTH
        self.laplace_strength: float = self._budget.strength if self._budget else strength
        self._laplace: LaplaceCallback | None = None
        self._source_loss_start: float | None = None
        self._source_loss: float | None = None
        self._budget_step = -1
        given = kwargs.get("optimizers", (None, None))[0]
        if args.uses_loko and given is not None:
            raise ValueError("optimizer='loko' and `optimizers=` exclude each other.")
        if isinstance(given, LoKO):
            raise ValueError("Pass KalmanConfig(optimizer='loko', loko_...=...) rather than a LoKO in `optimizers=`.")
        if args.uses_loko and kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func is not supported with optimizer='loko': it observes the labels.")
        super().__init__(model, cast(Any, args), *posargs, **kwargs)
        if args.uses_loko or self._has_source:
            refuse_scaled_or_sharded(self.args, type(self).__name__, self.accelerator)
            if self.args.n_gpu > 1:
                raise ValueError("DataParallel is not supported; start one process per GPU with `accelerate launch`.")
        if belief is not None:
            belief.check(self.model)

    @property
    def _has_source(self) -> bool:
        return self.belief is not None or self._source_fit is not None

    # -- belief ----------------------------------------------------------------------------------------------------

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
        if self._source_heldout is not None:
            self._measure_source()
            self.log(self._source_metrics())
        return output

    def _prepare_belief(self, checkpoint: Path | None) -> None:
        device = self.args.device
        if checkpoint is not None and (checkpoint / BELIEF_CONFIG).is_file():
            # The belief belongs to the run that is resumed: also where no source data are given any more.
            self.belief = Belief.from_pretrained(checkpoint, device=device)
            found = (self.belief.precision.structure, self.belief.precision.space)
            if found != (self.args.laplace_structure, self.args.laplace_space):
                logger.warning(
                    f"Going on with the checkpoint's belief ({found[0]} in {found[1]} space), not a new one."
                )
        elif not self._has_source:
            return
        elif self.belief is None:
            options = {
                name: getattr(self.args, f"laplace_{name}") for name in ("structure", "space", "fisher", "rank")
            }
            self.belief = Belief.fit(
                self.model,
                self._source_dataloader(self._source_fit),
                seed=self.args.seed,
                progress_bar=not self.args.disable_tqdm,
                **options,
            )
        self.belief.check(self.model)
        self.belief = self.belief.to(device)
        if self._source_heldout is not None:
            self._measure_source()
            if self._source_loss_start is None:  # a second call of train() goes on from the first
                self._source_loss_start = self._source_loss
        if checkpoint is not None and (checkpoint / STATE_FILE).is_file():
            self._restore(json.loads((checkpoint / STATE_FILE).read_text()))
        if not self.args.uses_loko and self._laplace is None:
            self._laplace = LaplaceCallback(self.belief, self.laplace_strength, form=self.args.laplace_form)
            self.add_callback(self._laplace)
        if self._kalman is not None:  # made before the belief was, by create_optimizer()
            self._kalman.set_belief(self.belief, self.laplace_strength, self.args.loko_belief_mode)
        self._apply_strength(self.laplace_strength)

    def _source_dataloader(self, dataset: Any) -> DataLoader:
        prepared: Any = dataset
        if hasattr(dataset, "column_names"):
            prepared = self._remove_unused_columns(dataset, description="source")
        return DataLoader(
            prepared,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator(),  # reading the source must not move the run's random state
        )

    @torch.no_grad()
    def _measure_source(self) -> None:
        """Token-weighted loss on the held-out source data, each process taking its share."""
        rank, size = world()
        model, mode = self.model, self.model.training
        observation = infer_observation(model)
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        model.eval()
        try:
            for index, batch in enumerate(self._source_dataloader(self._source_heldout)):
                if index % size != rank:
                    continue
                batch = self._prepare_inputs(batch)
                if batch.get("labels") is None:
                    raise ValueError(f"A batch of `source_dataset` has no `labels` (keys: {sorted(batch)}).")
                with self.compute_loss_context_manager():
                    logits = default_forward(model, batch)
                total, count = negative_log_likelihood(logits, batch["labels"], observation)
                sums += torch.stack([total.double(), count.double()])
        finally:
            model.train(mode)
        all_sum_([sums])
        total, count = sums.tolist()
        if count == 0:
            raise ValueError("The held-out part of `source_dataset` has no labels; all are -100 or it is empty.")
        self._source_loss = total / count

    def _source_metrics(self) -> dict[str, float]:
        if self._source_loss is None or self._source_loss_start is None:
            return {}
        return {
            "source/loss": self._source_loss,
            "source/loss_start": self._source_loss_start,
            "source/rise": self._source_loss - self._source_loss_start,
        }

    def _follow_budget(self) -> None:
        step = self.state.global_step
        if self._budget is None or step == 0 or step % self.args.budget_steps or step == self._budget_step:
            return
        self._budget_step = step
        self._measure_source()
        assert self._source_loss is not None and self._source_loss_start is not None
        self._apply_strength(self._budget.update(self._source_loss - self._source_loss_start))

    def _apply_strength(self, strength: float) -> None:
        self.laplace_strength = strength
        if self._laplace is not None:
            self._laplace.strength = strength
        if self._kalman is not None:
            self._kalman.belief_strength = strength

    # -- Kalman optimizer ------------------------------------------------------------------------------------------

    @property
    def _kalman(self) -> LoKO | None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, LoKO) else None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """LoKO if `args.optimizer` says so, else the Trainer's choice."""
        if not self.args.uses_loko:
            return super().create_optimizer(*args, **kwargs)
        if self.optimizer is None:
            options = self.args.loko_options()
            if self.belief is not None:
                options |= {
                    "belief": self.belief,
                    "belief_strength": self.laplace_strength,
                    "belief_mode": self.args.loko_belief_mode,
                }
            self.optimizer = create_loko_optimizer(self.model, seed=self.args.seed, **options)
            for group in self.optimizer.param_groups:
                group["lr"] = self.args.learning_rate
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The Trainer's step; with LoKO, harvest of the scores of one micro-batch.

        Args:
            model (`nn.Module`): The (possibly wrapped) model.
            inputs (`dict[str, Any]`): One micro-batch.
            num_items_in_batch (`Tensor` or `int`, *optional*): Labels in the whole accumulated batch.

        Returns:
            `Tensor`: This micro-batch's share of the loss, for the Trainer's log.
        """
        if self.accelerator.sync_gradients:
            self._follow_budget()
        optimizer = self._kalman
        if optimizer is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        if "labels" not in inputs:
            raise ValueError(f"A batch has no `labels` (keys: {sorted(inputs)}); LoKO observes them.")
        # The filter sums over processes itself: DistributedDataParallel must not wait for gradients.
        with self.accelerator.no_sync(model), self.compute_loss_context_manager():
            logits = default_forward(model, inputs)
        loss = optimizer.observe(logits, inputs["labels"])
        if num_items_in_batch is None:
            return loss / self.current_gradient_accumulation_steps
        count = optimizer.observation.targets(logits, inputs["labels"]).ne(IGNORE_INDEX).sum()
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss * count * scale / num_items_in_batch

    # -- logs, files, card -----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what belief and filter report to each training log entry.

        Args:
            logs (`dict[str, float]`): Of the Trainer.
            start_time (`float`, *optional*): Of the Trainer.
        """
        if "loss" in logs:
            logs = {**logs, **self._kalman_metrics()}
            if self.args.uses_loko:  # `.grad` is not used, so that its norm would read 0
                logs.pop("grad_norm", None)
        super().log(logs, start_time)

    def _kalman_metrics(self) -> dict[str, float]:
        metrics = self._laplace.metrics() if self._laplace is not None else {}
        optimizer = self._kalman
        if optimizer is not None:
            seen = {name: float(value) for name, value in optimizer.diagnostics.items()}
            names = ("innovation", "gain_norm", "trace_p", "kl", "trust")
            metrics |= {f"kalman/{name}": seen[name] for name in names if name in seen}
            if "drift" in seen:
                metrics |= {
                    "laplace/penalty": seen["penalty"],
                    "laplace/drift": seen["drift"],
                    "laplace/strength": optimizer.belief_strength,
                }
        return metrics | (self._source_metrics() if self._budget is not None else {})

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.belief is not None:
            folder = Path(output_dir or self.args.output_dir)
            self.belief.save_pretrained(folder)
            state = {
                "laplace_strength": self.laplace_strength,
                "source_loss_start": self._source_loss_start,
                "budget_step": self._budget_step,
            }
            write_atomically(folder / STATE_FILE, lambda p: p.write_text(json.dumps(state, indent=2) + "\n"))

    def _restore(self, state: dict[str, Any]) -> None:
        self._source_loss_start = state["source_loss_start"]
        if self._budget is not None:
            self._budget.strength = self.laplace_strength = state["laplace_strength"]
            self._budget_step = state["budget_step"]
        elif self.args.laplace_strength is None:
            self.laplace_strength = state["laplace_strength"]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A model card that names the optimizer, the belief and the measured forgetting."""
        from peft import PeftModel

        if not isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            write_model_card(self, os.path.join(self.args.output_dir, "README.md"), *args, **kwargs)


class KalmanTrainer(KalmanMixin, Trainer):
    """A Trainer that knows what must not be forgotten.

    ```python
    trainer = KalmanTrainer(
        model=model,
        args=KalmanConfig("out", optimizer="loko"),
        train_dataset=maths,
        source_dataset=what_must_not_be_forgotten,
        peft_config=LoraConfig(task_type="CAUSAL_LM"),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    trainer.save_model()  # adapter and belief
    trainer.create_model_card()
    ```

    See [`KalmanMixin`] for the arguments it adds to those of the Trainer.
    """


def _with_adapter(model: Any, peft_config: Any, seed: int) -> Any:
    from peft import PeftModel, get_peft_model

    if model is None:
        raise ValueError("peft_config needs `model=`.")
    if isinstance(model, PeftModel):
        raise ValueError("`model` has an adapter already; leave out `peft_config`, or pass the base model.")
    set_seed(seed)  # the adapter's start is part of the run
    return get_peft_model(model, peft_config)


def _split_source(dataset: Any, args: KalmanArguments, belief: Belief | None) -> tuple[Any, Any]:
    """(sequences for the curvature, sequences held out); no sequence is in both."""
    if dataset is None:
        return None, None
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError("`source_dataset` must be a map-style dataset; streaming ones are not supported yet.")
    size, heldout = len(dataset), args.source_heldout
    if size < heldout or (belief is None and size == heldout):
        raise ValueError(
            f"`source_dataset` has {size} sequences, of which source_heldout={heldout} are held out, so none is left "
            "for the curvature; give more data or a smaller source_heldout."
        )
    fit = None if belief is not None else _select(dataset, range(min(args.source_samples, size - heldout)))
    return fit, _select(dataset, range(size - heldout, size)) if heldout else None


def _select(dataset: Any, indices: range) -> Any:
    return dataset.select(indices) if hasattr(dataset, "select") else torch.utils.data.Subset(dataset, indices)
