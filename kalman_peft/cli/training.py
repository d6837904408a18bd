"""`kalman-peft train`: KalmanTrainer or, with --sft, TRL's SFTTrainer, from a command line."""

from dataclasses import dataclass, field
from typing import Any

from ..belief import Belief
from ..config import KalmanConfig
from .loading import (
    DataOptions,
    LoraOptions,
    ModelOptions,
    TextOptions,
    collator,
    load_adapter,
    load_base,
    load_data,
    load_named,
    load_tokenizer,
    tokenized,
)
from .parsing import Command


_SELF = "self"
_TEXT = """Fine-tune a causal language model on --dataset while keeping it close to what --source shows.

Data have a column `text`, or `prompt` and `completion`, or are tokenised (`input_ids`, perhaps `labels`).
With --sft also `messages`, and other options: `kalman-peft train --sft --help` (needs kalman_peft[trl]).
Written to --output_dir: the adapter, the belief, the tokenizer, a model card and trainer_state.json.

examples:
  kalman-peft train --model HuggingFaceTB/SmolLM2-135M --dataset maths.jsonl --source keep.jsonl --output_dir out
  kalman-peft train --config run.yaml --optimizer loko --max_steps 100
  kalman-peft train --model m --dataset d.jsonl --source wiki=wiki.txt chat=chat.jsonl --forgetting_budget 0.01
  kalman-peft train --model m --dataset d.jsonl --adapter out --belief out --output_dir next
  kalman-peft train --sft --packing --accelerate_config two_gpus.yaml --config chats.yaml
"""


@dataclass
class TrainOptions(LoraOptions):
    """What is kept, and how it is measured."""

    source: list[str] | None = field(
        default=None,
        metadata={"help": "What must not be forgotten: datasets, each perhaps as name=place; or 'self'."},
    )
    source_split: str = field(default="train", metadata={"help": "Of the source data."})
    belief: str | None = field(default=None, metadata={"help": "Folder or name of a belief made earlier."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Data to evaluate on."})
    eval_split: str = field(default="train", metadata={"help": "Of the data to evaluate on."})


def train(
    model: ModelOptions, data: DataOptions, options: TrainOptions, text: TextOptions, args: KalmanConfig
) -> None:
    """Fine-tune with [`KalmanTrainer`].

    Args:
        model (`ModelOptions`): The base model.
        data (`DataOptions`): What is learned.
        options (`TrainOptions`): The adapter, and what is kept.
        text (`TextOptions`): How raw data become tokens.
        args (`KalmanConfig`): Of the trainer.
    """
    from ..trainer import KalmanTrainer

    tokenizer = load_tokenizer(model.model)

    def prepared(rows: Any) -> Any:
        return tokenized(rows, tokenizer, text.max_length)

    _train(KalmanTrainer, model, data, options, args, tokenizer, prepared, data_collator=collator(tokenizer))


def train_sft(model: ModelOptions, data: DataOptions, options: TrainOptions, args: Any) -> None:
    """Fine-tune with [`KalmanSFTTrainer`].

    Args:
        model (`ModelOptions`): The base model.
        data (`DataOptions`): What is learned.
        options (`TrainOptions`): The adapter, and what is kept.
        args (`KalmanSFTConfig`): Of the trainer.
    """
    from ..sft import KalmanSFTTrainer

    _train(KalmanSFTTrainer, model, data, options, args, load_tokenizer(model.model), lambda rows: rows)


def _train(
    trainer_class: Any,
    model: ModelOptions,
    data: DataOptions,
    options: TrainOptions,
    args: Any,
    tokenizer: Any,
    prepared: Any,
    **more: Any,
) -> None:
    base = load_base(model)
    trainer = trainer_class(
        model=base if options.adapter is None else load_adapter(base, options.adapter, trainable=True),
        args=args,
        train_dataset=prepared(load_data(data.dataset, data.split)),
        eval_dataset=prepared(load_data(options.eval_dataset, options.eval_split)) if options.eval_dataset else None,
        source_dataset=_sources(options, prepared),
        belief=Belief.from_pretrained(options.belief) if options.belief else None,
        peft_config=options.config() if options.adapter is None else None,
        processing_class=tokenizer,
        **more,
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        what = "adapter and belief" if trainer.belief is not None else "adapter"
        print(f"Wrote {what} to {args.output_dir}.")


def _sources(options: TrainOptions, prepared: Any) -> Any:
    if options.source is None:
        return None
    if options.source == [_SELF]:
        return _SELF
    named = {name: prepared(rows) for name, rows in load_named(options.source, options.source_split).items()}
    return named if len(named) > 1 else next(iter(named.values()))


def _sft_command() -> Command:
    from ..sft import KalmanSFTConfig

    return Command(train_sft, (ModelOptions, DataOptions, TrainOptions, KalmanSFTConfig), _TEXT, launches=True)


COMMANDS = {
    "train": Command(
        train,
        (ModelOptions, DataOptions, TrainOptions, TextOptions, KalmanConfig),
        _TEXT,
        variants={"sft": ("By TRL's SFTTrainer: conversations, packing, its own options.", _sft_command)},
        launches=True,
    )
}
