"""KalmanSFTTrainer: the belief and the Kalman optimizer inside TRL's SFTTrainer (`pip install "kalman_peft[trl]"`)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

from datasets import Dataset
from torch import Tensor, nn


try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError(
        f'KalmanSFTTrainer and KalmanSFTConfig need TRL ({error}): pip install "kalman_peft[trl]"'
    ) from error

from .config import KalmanArguments
from .sources import SINGLE
from .trainer import KalmanMixin


@dataclass
class KalmanSFTConfig(KalmanArguments, SFTConfig):
    """TRL's SFTConfig with the fields of [`KalmanArguments`].

    Defaults are TRL's (bf16, gradient checkpointing, a learning rate of 2e-5), with `optimizer="loko"` those of
    [`KalmanConfig`] for learning rate, schedule and gradient norm.

    Raises:
        ValueError: Options that exclude each other, or a value that is out of range; the message says which.
    """

    _default_learning_rate: ClassVar[float] = next(f.default for f in fields(SFTConfig) if f.name == "learning_rate")  # pyright: ignore[reportAssignmentType]

    def check_loko(self) -> None:
        """Also what SFTTrainer adds; see [`KalmanArguments`].

        Raises:
            ValueError: An option does not go with `optimizer="loko"`.
        """
        super().check_loko()
        for name, allowed, remedy in (
            ("loss_type", ("nll", "chunked_nll"), "the filter observes the labels themselves; set loss_type='nll'"),
            ("activation_offloading", (False,), "use gradient_checkpointing=True"),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not supported with optimizer='loko': {remedy}.")
        if cast(dict, self.gradient_checkpointing_kwargs or {}).get("selective"):  # read by the check above
            raise ValueError(
                "gradient_checkpointing_kwargs={'selective': True} keeps activations for one backward pass, and "
                "optimizer='loko' takes a second one; leave `selective` out."
            )


class KalmanSFTTrainer(KalmanMixin, SFTTrainer):
    """TRL's SFTTrainer that knows what must not be forgotten.

    ```python
    trainer = KalmanSFTTrainer(
        model="HuggingFaceTB/SmolLM2-135M",
        args=KalmanSFTConfig("out", packing=True, max_length=1024),
        train_dataset=chats,                # text, prompt and completion, or messages
        source_dataset=what_must_not_be_forgotten,
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()  # adapter and belief
    ```

    `source_dataset` may be raw, too: each source goes through SFTTrainer's own preparation (chat template, end of
    sequence, labels, `max_length`, `formatting_func`), but is not packed: `source_samples` counts its sequences. What
    is tokenised already (a column `input_ids`) stays as it is. With `packing` or `padding_free` the sequences of a
    batch lie in one row, and are told apart by their `position_ids`.

    Training with LaLoRA needs no logits and keeps TRL's fused LM head. LoKO takes its draws from the logits, so that
    it runs the model without that head: (tokens, vocabulary) logits are in memory, and TRL's `entropy` and
    `mean_token_accuracy` are not logged while training.

    Supported: text, prompt-completion and conversational data, `completion_only_loss`, `assistant_only_loss`, packing,
    padding-free, gradient checkpointing. Refused by name: images; with LoKO also `loss_type="dft"`, label smoothing,
    `compute_loss_func`, `activation_offloading`, the auxiliary loss of mixtures of experts.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): As for SFTTrainer.
        args (`KalmanSFTConfig`): Its options.
        *posargs: As for SFTTrainer.
        **kwargs: As for SFTTrainer and [`KalmanMixin`].

    Raises:
        TypeError: `args` is no KalmanSFTConfig.
        ValueError: Options that exclude each other, or data that are not supported.
    """

    _takes_peft_config = True

    def __init__(self, model: Any = None, args: Any = None, *posargs: Any, **kwargs: Any):
        if not isinstance(args, KalmanSFTConfig):
            raise TypeError(f"args must be a KalmanSFTConfig, got {type(args).__name__}.")
        super().__init__(model, args, *posargs, **kwargs)
        if self._is_vision_dataset:
            raise ValueError("KalmanSFTTrainer does not support images in `train_dataset`; use text data.")
        if args.uses_loko and self.aux_loss_enabled:
            raise ValueError(
                "The auxiliary loss of a mixture of experts is not supported with optimizer='loko', which observes "
                "labels only; set router_aux_loss_coef=0.0."
            )

    def _prepare_source(self, rows: Any, name: str) -> Any:
        """What SFTTrainer does to its training data, but for packing."""
        if self._skip_prepare_dataset:
            return rows
        if not isinstance(rows, Dataset):  # the beginning of a stream, or a dataset of another kind
            first = rows[0]
            if not isinstance(first, Mapping):
                raise ValueError(f"`source_dataset` must have rows that are mappings, got {type(first).__name__}.")
            rows = Dataset.from_list([dict(row) for row in rows])
        args, name = cast(Any, self.args), "source" if name == SINGLE else f"source {name!r}"
        prepared = cast(
            Dataset,
            self._prepare_dataset(rows, cast(Any, self.processing_class), args, False, self._formatting_func, name),
        )
        if not len(prepared):
            raise ValueError(
                f"No sequence of {name} in `source_dataset` has labels within max_length={self.args.max_length}; give "
                "shorter prompts or a larger max_length."
            )
        return prepared

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """See [`KalmanMixin`]; with LoKO it counts tokens as SFTTrainer's loss does."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.uses_loko:
            mask = inputs.get("attention_mask")
            seen = inputs["input_ids"].new_tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
            seen = cast(Tensor, self.accelerator.gather_for_metrics(seen.to(self.accelerator.device)))
            self._total_train_tokens += int(seen.sum())
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **kwargs: Any
    ) -> None:
        """See [`KalmanMixin`]; arguments in SFTTrainer's order."""
        given = {"model_name": model_name, "dataset_name": dataset_name, "tags": tags} | kwargs
        super().create_model_card(**{name: value for name, value in given.items() if value is not None})
