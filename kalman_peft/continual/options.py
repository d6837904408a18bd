"""Options of a [`ContinualLearner`]: which it refuses, which the outcome depends on, and those of one task's run."""

from collections.abc import Mapping
from copy import copy, deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..adapters import AdapterState
from ..belief import tensors_fingerprint
from ..config import KalmanArguments
from ..filtering import Transition
from .checks import check_motion, check_whole


logger = logging.get_logger(__name__)

# Structure of the filter that LoKO's memory carries on.
_OF_MEMORY = {"diagonal": "diagonal", "low_rank": "low_rank", "kronecker": "ekfac", "dense": "dense"}
# What the driver sets, so that another value would be ignored.
_TAKEN = (
    "laplace_strength", "laplace_schedule", "laplace_structure", "laplace_space", "laplace_warmup_steps",
    "laplace_refit_steps", "forgetting_budget", "loko_belief_mode", "source_weights", "source_self_prompts",
)  # fmt: skip
# What the outcome depends on, apart from the fields of KalmanArguments.
_DECISIVE = (
    "seed", "data_seed", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "lr_scheduler_kwargs", "warmup_steps", "label_smoothing_factor", "bf16", "train_sampling_strategy",
    "neftune_noise_alpha", "dataloader_drop_last", "load_best_model_at_end", "average_tokens_across_devices",
    "accelerator_config",
)  # fmt: skip
# A filter that holds its belief from the start needs no prior of its own; one this weak is settled and not felt.
_NO_PRIOR = {"loko_prior": "pooled", "loko_prior_tokens": 1e-9}
# With which a run that goes on from a checkpoint ends otherwise than one that was not killed.
_NOT_RESUMED = {
    "save_only_model": "checkpoints without the optimizer's state",
    "ignore_data_skip": "a resumed run begins the epoch's data again",
}
# Of the LoraConfig. Ranks, scalings, layers and `modules_to_save` are compared with the files.
_OF_ADAPTER = ("lora_dropout", "bias", "use_dora")
_OF_LEARNER = (
    "model",
    "args",
    "train_dataset",
    "eval_dataset",
    "source_dataset",
    "belief",
    "optimizers",
    "model_init",
)


def check_arguments(args: Any, trainer_options: Mapping[str, Any]) -> None:
    """Refuse what the learner decides itself.

    Args:
        args (`KalmanConfig`): Of the learner.
        trainer_options (`Mapping[str, Any]`): Further arguments for the Trainer.

    Raises:
        TypeError: `args` has no Kalman fields.
        ValueError: An option that would be ignored, or does not go with one run per task.
    """
    if not isinstance(args, KalmanArguments):
        raise TypeError(f"args must be a KalmanConfig, got {type(args).__name__}.")
    default = {f.name: f.default for f in fields(KalmanArguments)}
    for name in _TAKEN:
        if getattr(args, name) != default[name]:
            raise ValueError(
                f"{name}={getattr(args, name)!r}: the learner sets it for every task; leave it out. The filter is "
                "chosen by structure=, rank=, prior_precision=, process_noise=, decay= and strength= of the learner."
            )
    for name, why in _NOT_RESUMED.items():
        if getattr(args, name, False):
            raise ValueError(f"{name}=True: {why}, so that a learner would not end as without a kill; leave it out.")
    epochs = getattr(args, "num_train_epochs", 1)
    if epochs <= 0 and getattr(args, "max_steps", 0) <= 0:
        raise ValueError(f"num_train_epochs={epochs} would learn nothing; it must be > 0 (or set max_steps).")
    if getattr(args, "push_to_hub", False):
        raise ValueError("push_to_hub=True would push every task's run; use learner.push_to_hub(repo_id).")
    for name in _OF_LEARNER:
        if name in trainer_options:
            remedy = {
                "eval_dataset": "use eval_datasets={name: data}, or learn(..., eval_dataset=)",
                "optimizers": "an optimizer carries its state from task to task; use KalmanConfig(optimizer=...)",
            }.get(name, "the learner gives it to every task")
            raise ValueError(f"{name}= is no option of a ContinualLearner: {remedy}.")


def decisive_arguments(args: Any) -> dict[str, Any]:
    """Training arguments that the outcome depends on, JSON-serialisable.

    Args:
        args (`KalmanConfig`): Of the learner.

    Returns:
        `dict[str, Any]`: By name.
    """
    names = [f.name for f in fields(KalmanArguments)] + [n for n in _DECISIVE if hasattr(args, n)]
    return {name: _plain(getattr(args, name)) for name in names}


def of_motion(transition: Transition) -> dict[str, Any]:
    """A transition as `continual.json` states it."""
    motion, noise = transition.describe()
    return motion | {"noise_fingerprint": tensors_fingerprint(noise) if noise else None}


def of_model(state: AdapterState) -> dict[str, Any]:
    """What the outcome depends on in the model, and no file tells, JSON-serialisable.

    Args:
        state (`AdapterState`): Of the adapter.

    Returns:
        `dict[str, Any]`: Dropout and the like, and the dtypes of the adapter and of the base model.
    """
    own = state.parameters()
    within = {id(p) for p in own.values()}
    base = {str(p.dtype) for p in state.model.parameters() if id(p) not in within and not p.requires_grad}
    return {
        **{name: getattr(state.config, name, None) for name in _OF_ADAPTER},
        "adapter_dtype": sorted({str(p.dtype) for p in own.values()}),
        "base_dtype": sorted(base),
    }


def task_arguments(args: Any, folder: Path, index: int, *, in_order: bool) -> Any:
    """The arguments of one task's run.

    Args:
        args (`KalmanConfig`): Of the learner.
        folder (`Path`): For checkpoints.
        index (`int`): Of the task; every task has a seed of its own.
        in_order (`bool`): Read the data once, in their order.

    Returns:
        `KalmanConfig`: A copy.
    """
    own = copy(args)
    own.output_dir = str(folder)
    own.seed = args.seed + index
    if args.data_seed is not None:
        own.data_seed = args.data_seed + index
    if args.uses_loko and index:
        for name, value in _NO_PRIOR.items():
            setattr(own, name, value)
    if in_order:
        own.train_sampling_strategy, own.num_train_epochs, own.max_steps = "sequential", 1, -1
    return own


def plain_arguments(args: Any, folder: Path) -> Any:
    """The learner's arguments for a Trainer that only evaluates."""
    own = copy(args)
    own.output_dir, own.eval_strategy, own.load_best_model_at_end = str(folder), "no", False
    return own


def own_callbacks(trainer_options: Mapping[str, Any]) -> dict[str, Any]:
    """The Trainer's options with copies of the callbacks, whose state must not go from task to task."""
    options = dict(trainer_options)
    if options.get("callbacks"):
        options["callbacks"] = deepcopy(list(options["callbacks"]))
    return options


def structure_of(args: Any, structure: str | None) -> str:
    """Structure of the filter's state.

    Args:
        args (`KalmanConfig`): Of the learner.
        structure (`str`, *optional*): That is asked for.

    Returns:
        `str`: With LoKO that of its memory.

    Raises:
        ValueError: The memory has none, or another.
    """
    if not args.uses_loko:
        return "low_rank" if structure is None else structure
    carried = _OF_MEMORY.get(args.loko_memory) if args.loko_mode != "paper" else None
    if carried is None:
        raise ValueError(
            f"loko_memory={args.loko_memory!r} (loko_mode={args.loko_mode!r}) cannot carry a belief to the next task; "
            f"use one of {sorted(_OF_MEMORY)} with loko_mode='kalman'."
        )
    if structure not in (None, carried):
        raise ValueError(
            f"structure={structure!r}, but with loko_memory={args.loko_memory!r} the filter's is {carried!r}; leave "
            "structure out."
        )
    return carried


def carried_over(args: Any, kept: Mapping[str, Any], motion: Transition, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a learner that goes on from another.

    Args:
        args (`KalmanConfig`): Of the learner that goes on.
        kept (`Mapping[str, Any]`): Options that cannot change, by name; LoKO's memory stands for them.
        motion (`Transition`): Of the other learner, which goes on unless it is given anew.
        options (`Mapping[str, Any]`): That are given.

    Returns:
        `dict[str, Any]`: For the constructor.

    Raises:
        ValueError: An option cannot change, or LoKO's memory cannot go on from the state.
    """
    own = {"process_noise": motion.process_noise, "decay": motion.decay, **options}
    now, earlier = (of_motion(t) for t in (check_motion(own["process_noise"], own["decay"]), motion))
    if now != earlier:
        logger.warning(f"The weights move by {now} from now on; the learner was begun with {earlier}.")
    if args.uses_loko:
        _check_memory(args, kept["structure"])
        return own
    for name, value in kept.items():
        if own.setdefault(name, value) != value:
            raise ValueError(f"{name}={own[name]!r}, but the learner was begun with {value!r}; leave it out.")
    return own


def _check_memory(args: Any, structure: str) -> None:
    carried = structure_of(args, None)
    if carried != {"kronecker": "ekfac"}.get(structure, structure):
        memory = next((m for m, s in _OF_MEMORY.items() if s == structure), "kronecker")
        raise ValueError(
            f"loko_memory={args.loko_memory!r} carries a state of structure {carried!r}, but the learner was begun "
            f"with {structure!r}: set loko_memory={memory!r}."
        )


def check_numbers(
    args: Any, strength: float, prior_precision: Any, rank: int | None, structure: str, samples: int
) -> None:
    """Raise ValueError (TypeError) for numbers out of range, or that the optimizer does not use."""
    if not 0 <= strength < float("inf"):
        raise ValueError(f"strength must be >= 0 and finite, got {strength}.")
    check_whole("curvature_samples", samples)
    if samples < 1:
        raise ValueError(f"curvature_samples must be >= 1, got {samples}.")
    if rank is not None:
        check_whole("rank", rank)
    if rank is not None and (structure != "low_rank" or rank < 0 or args.uses_loko):
        raise ValueError(
            f"rank={rank}: it must be >= 0, and goes with structure='low_rank' and another optimizer than LoKO (there "
            "it is loko_rank)."
        )
    if args.uses_loko and strength != 1:
        raise ValueError(f"strength={strength} is not supported with optimizer='loko', which holds the belief itself.")
    if args.uses_loko and prior_precision is not None:
        raise ValueError("prior_precision= is not used with optimizer='loko'; choose loko_prior, loko_prior_tokens.")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, int | float | bool | str | None) else str(value)
