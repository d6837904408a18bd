"""KalmanMixin and KalmanTrainer: the belief and the Kalman optimizer inside a Hugging Face Trainer. No mathematics."""

import os
from typing import Any, cast

import torch
from accelerate.utils import DynamoBackend, is_compiled_module
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import Trainer, set_seed

from .belief import Belief
from .belief_trainer import BeliefMixin
from .callbacks import LaplaceCallback, refuse_scaled_or_sharded
from .card import write_model_card
from .compiled import keep_saved_tensors, whole_batch_columns
from .config import KalmanArguments
from .curvature.fisher import default_forward
from .curvature.sequences import find_segments
from .ima import ImaCallback
from .loko import LoKO, create_loko_optimizer
from .observations import Observation
from .quantized import keep_differentiable


# Of LoKO's diagnostics; the loss is the Trainer's to log.
_LOGGED = (
    "innovation", "gain_norm", "trace_p", "kl", "trust", "effective_observations", "effective_parameters", "variance",
)  # fmt: skip


class KalmanMixin(BeliefMixin):
    """Goes before any Trainer class: `class MyTrainer(KalmanMixin, Seq2SeqTrainer)`.

    With a source dataset it fits a belief before training, keeps the adapter close to it while any optimizer trains,
    and saves it beside the adapter. With `optimizer="loko"` the adapter is trained by a Kalman filter, which takes the
    belief as its prior.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A model with one LoRA adapter, or a plain one with `peft_config`.
        args (`KalmanArguments`): [`KalmanConfig`], or any TrainingArguments that include [`KalmanArguments`].
        source_dataset (`Dataset`, `Mapping`, `Sequence` or `str`, *optional*):
            What must not be forgotten, prepared as the training data is. `args.source_samples` of its sequences give
            the curvature, `args.source_heldout` others measure the source loss (see [`split_sources`]; streaming
            datasets are read once, at their beginning). A mapping from names, or a sequence, holds several sources,
            weighed by `args.source_weights`. "self": sequences that the base model writes, see [`sample_source`].
        belief (`Belief`, *optional*): A belief made earlier, in place of fitting one.
        peft_config (`LoraConfig`, *optional*): Adapter to put on a plain model.
        observation (`Observation`, *optional*):
            With `optimizer="loko"`: how labels meet the model's outputs; inferred from the model's class by default.
        **kwargs: As for the Trainer.

    Raises:
        ValueError: Options that exclude each other, or a source that is too small.
        TypeError: `args` has no Kalman fields.
    """

    _takes_peft_config = False  # whether the Trainer behind puts the adapter on the model itself

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *posargs: Any,
        source_dataset: Any = None,
        belief: Belief | None = None,
        peft_config: Any = None,
        observation: Observation | None = None,
        **kwargs: Any,
    ):
        if not isinstance(args, KalmanArguments):
            raise TypeError(f"args must be a KalmanConfig, got {type(args).__name__}.")
        if hasattr(args, "packing") and not hasattr(self, "_prepare_dataset"):
            raise TypeError(
                f"{type(args).__name__} holds options of TRL (packing, max_length, ...) that {type(self).__name__} "
                "would ignore; use KalmanSFTTrainer, or a KalmanConfig."
            )
        if peft_config is not None and self._takes_peft_config:
            kwargs["peft_config"] = peft_config
        elif peft_config is not None:
            model = with_adapter(model, peft_config, getattr(args, "seed", 42))
        given = kwargs.get("optimizers", (None, None))[0]
        if args.uses_loko and given is not None:
            raise ValueError("optimizer='loko' and `optimizers=` exclude each other.")
        if isinstance(given, LoKO):
            raise ValueError("Pass KalmanConfig(optimizer='loko', loko_...=...) rather than a LoKO in `optimizers=`.")
        if args.uses_loko and kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func is not supported with optimizer='loko': it observes the labels.")
        owner = type(self).compute_loss.__module__.partition(".")[0]
        if args.uses_loko and owner not in ("transformers", "trl"):
            raise ValueError(
                f"{type(self).__name__}.compute_loss would not be called with optimizer='loko', which observes labels "
                "by a likelihood of its own; express the loss as observation=LikelihoodObservation(f)."
            )
        if observation is not None and not args.uses_loko:
            raise ValueError("observation= needs optimizer='loko'; other optimizers follow the model's own loss.")
        self._observation = observation
        self._batches: list[dict[str, Any]] = []  # of one step, where its update is iterated
        super().__init__(model, args, *posargs, source_dataset=source_dataset, belief=belief, **kwargs)
        if args.uses_loko and any(isinstance(c, LaplaceCallback) for c in self.callback_handler.callbacks):
            raise ValueError(
                "LaplaceCallback adds to `.grad`, which LoKO does not read; pass the belief as `belief=`, which is "
                "then LoKO's prior."
            )
        self._ima = ImaCallback(args.ima_weight, args.ima_factors, args.ima_epsilon) if args.ima_weight else None
        if self._ima is not None:
            refuse_scaled_or_sharded(self.args, "ima_weight", self.accelerator)
            self.add_callback(self._ima)
        if self._has_source and self.model_init is not None:
            raise ValueError("model_init makes a new adapter for each run, which a belief or source data do not fit.")
        keep_differentiable(self.model)
        if args.uses_loko or self._has_source:
            refuse_scaled_or_sharded(self.args, type(self).__name__, self.accelerator)
            if self.args.n_gpu > 1:
                raise ValueError("DataParallel is not supported; start one process per GPU with `accelerate launch`.")

    # -- Kalman optimizer ------------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """LoKO if `args.optimizer` says so, else the Trainer's choice."""
        if not self.args.uses_loko:
            return super().create_optimizer(*args, **kwargs)
        if self._kalman is not None:
            self._kalman.discard()  # what a run that ended inside a step left (auto_find_batch_size)
            self._follow_batch_size(self._kalman)
        if self.optimizer is None:
            self.args.check_loko()  # again: a hyperparameter search sets arguments afterwards
            compiler = getattr(self.accelerator.state.dynamo_plugin, "backend", DynamoBackend.NO)
            if compiler != DynamoBackend.NO or is_compiled_module(self.model):
                torch.compiler.reset()  # see `keep_saved_tensors`: graphs compiled before may not be used
            options = self.args.loko_options()
            if compiler != DynamoBackend.NO or is_compiled_module(self.model):
                options |= whole_batch_columns(options, self._observed)
            if self._tempers:
                options["tempering"] = 1 / self._epochs_in_run()
            if self.belief is not None:
                options |= {"belief": self.belief} | self._belief_options()
            self.optimizer = create_loko_optimizer(
                self.model, seed=self.args.seed, observation=self._observation, **options
            )
            (group,) = self.optimizer.param_groups
            group["lr"] = self.args.learning_rate
            if self.args.loko_iterations > 1 and group["curvature_every"] > 1:
                raise ValueError(
                    f"loko_iterations={self.args.loko_iterations} needs columns at every step and the joint gain: set "
                    "loko_curvature_every=1 and loko_gain='joint'."
                )
        return self.optimizer

    @property
    def _tempers(self) -> bool:
        return self.args.loko_tempering is None and self.args.loko_mode != "paper"

    def _follow_batch_size(self, optimizer: LoKO) -> None:
        """Another batch size before the first step: the run sees its data another number of times."""
        group = optimizer.param_groups[0]
        if group["steps"] > 0:
            return
        if self._tempers:
            group["tempering"] = 1 / self._epochs_in_run()
        if self.belief is not None:
            self._install_belief()

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
            self._follow_training()
        optimizer = self._kalman
        if optimizer is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        optimizer.train()  # evaluation calls `optimizer.eval()`
        inputs = self._prepare_inputs(inputs)
        if "labels" not in inputs:
            raise ValueError(f"A batch has no `labels` (keys: {sorted(inputs)}); LoKO observes them.")
        loss, count = self._observe(model, inputs)
        if self.args.loko_iterations > 1:
            self._batches.append(inputs)
            if self.accelerator.sync_gradients:
                for _ in range(self.args.loko_iterations - 1):
                    optimizer.relinearise()
                    for batch in self._batches:
                        self._observe(model, batch)
                self._batches.clear()
        if num_items_in_batch is None:
            return loss / self.current_gradient_accumulation_steps
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss * count * scale / num_items_in_batch

    def _observe(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Show one micro-batch to the filter; its mean loss, and how many labels count."""
        optimizer = cast(LoKO, self._kalman)
        labels, observation = inputs["labels"], optimizer.observation
        segments = find_segments(inputs, labels, observation, self.model)
        # Compiled graphs may reuse what they saved ("donated buffers") as of their first backward pass; a draw is a
        # second one.
        with keep_saved_tensors():
            # The filter sums over processes itself: DistributedDataParallel must not wait for gradients.
            with self.accelerator.no_sync(model), self.compute_loss_context_manager():
                logits = default_forward(model, inputs)
            every = self.args.torch_empty_cache_steps
            if every is not None and self.state.global_step % every == 0:
                clear_device_cache()
            loss = optimizer.observe(logits, labels, segments)
        if optimizer.has_failed:  # `step` will say so, on all processes
            return loss, torch.zeros_like(loss)
        return loss, observation.observed(observation.targets(logits, labels, segments)).sum()

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
        metrics = self._belief_metrics() | (self._ima.metrics() if self._ima is not None else {})
        optimizer = self._kalman
        if optimizer is not None:
            seen = {name: float(value) for name, value in optimizer.diagnostics.items()}
            metrics |= {f"kalman/{name}": seen[name] for name in _LOGGED if name in seen}
            if "drift" in seen:
                metrics |= {
                    "laplace/penalty": seen["penalty"],
                    "laplace/drift": seen["drift"],
                    "laplace/strength": optimizer.belief_strength,
                }
        return metrics

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


def with_adapter(model: Any, peft_config: Any, seed: int) -> Any:
    """Put an adapter on a plain model.

    Args:
        model (`PreTrainedModel`): Without one.
        peft_config (`LoraConfig`): Of the adapter.
        seed (`int`): Of its start.

    Returns:
        `PeftModel`: The model with the adapter.

    Raises:
        ValueError: There is no model, or it has an adapter already.
    """
    from peft import PeftModel, get_peft_model

    if model is None:
        raise ValueError("peft_config needs `model=`.")
    if isinstance(model, PeftModel):
        raise ValueError("`model` has an adapter already; leave out `peft_config`, or pass the base model.")
    set_seed(seed)  # the adapter's start is part of the run
    return get_peft_model(model, peft_config)
