"""Methods that learn task after task, each as the adapters that it leaves after every task.

A method is KIND or KIND:OPTION=VALUE,... (see `KINDS`). Whatever the kind, task t has the same rows in the same order,
the same number of steps and the seed `seed` + t, and all begin with the same adapter.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from torch import Tensor

from kalman_peft import AdapterState, Belief, ContinualLearner, KalmanConfig, KalmanTrainer, initial_belief

from .spelling import parse_options, spelt


# Kinds and their options with defaults; the first option of a kind is always part of the method's name. A rate `lr` of
# 0 is that of all methods.
_RATE = {"lr": 0.0}
KINDS: dict[str, dict[str, Any]] = {
    "sequential": _RATE,
    "l2": {"to": "previous", "strength": 1e-3} | _RATE,
    "ewc": {"strength": 1.0} | _RATE,
    "filter": {
        "structure": "ekfac",
        "q": 0.0,
        "layers": "",
        "decay": 1.0,
        "strength": 1.0,
        "prior": 1.0,
        "rank": 16,
        "fisher": "sampled",
    }
    | _RATE,
    "loko": {"memory": "kronecker", "q": 0.0, "layers": "", "decay": 1.0},
    "replay": {"share": 0.05} | _RATE,
    "separate": _RATE,
    "joint": _RATE,
}
CHOICES = {
    "to": ("previous", "start"),
    "structure": ("diagonal", "low_rank", "ekfac"),
    "memory": ("diagonal", "low_rank", "kronecker"),
    "fisher": ("sampled", "rademacher", "empirical"),
}
NEIGHBOURS, SMOOTHED = "neighbours averaged", "smoothed"
# A precision too weak to be felt: EWC has no prior, and a filter needs one.
_NO_PRIOR = 1e-6

Adapter = Mapping[str, Tensor]


@dataclass(frozen=True)
class Setup:
    """What the methods of one run share.

    Attributes:
        model (`Callable[[], Any]`): Makes the base model with a new adapter, always the same.
        config (`Callable[..., KalmanConfig]`): Training arguments of one task, from changes.
        tasks (`Mapping[str, Dataset]`): Tokenised rows, in the order of learning.
        trainer_options (`Mapping[str, Any]`): Of every [`KalmanTrainer`].
        curvature_samples (`int`): Sequences of a task from which a filter takes its curvature.
        folder (`Path`): For what a filter keeps on disk; a run that was killed goes on from there.
        seed (`int`): Of the adapter and of the first task.
        steps (`int`): Of one task.
    """

    model: Callable[[], Any]
    config: Callable[..., KalmanConfig]
    tasks: Mapping[str, Dataset]
    trainer_options: Mapping[str, Any]
    curvature_samples: int
    folder: Path
    seed: int
    steps: int


@dataclass
class Learnt:
    """What a method leaves.

    Attributes:
        model (`PeftModel`): To load adapters into.
        adapters (`list`): After each task: A and B by key. Of "joint" one, after all tasks.
        seconds (`float`): Of learning: training, curvature, and the filter's files; NaN where a run that was killed
            went on, as what it had done before was not timed.
        own (`dict[str, list]`): Adapters of every task that are found afterwards: "smoothed", "neighbours averaged".
        figures (`list[dict]`): Of a filter, by task.
        per_task (`bool`): An adapter is for its own task alone.
    """

    model: Any
    adapters: list[Adapter]
    seconds: float = math.nan
    own: dict[str, list[Adapter]] = field(default_factory=dict)
    figures: list[dict[str, float]] = field(default_factory=list)
    per_task: bool = False


def read_method(text: str) -> tuple[str, dict[str, Any]]:
    """Read KIND:OPTION=VALUE,...

    Args:
        text (`str`): Such as "filter:structure=low_rank,q=1e-5".

    Returns:
        `tuple[str, dict[str, Any]]`: The kind and all its options.

    Raises:
        ValueError: An unknown kind or option, or a value out of range.
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise ValueError(f"{text!r}: the kind is none of {', '.join(KINDS)}.")
    given = parse_options(rest)
    if unknown := given.keys() - KINDS[kind].keys():
        raise ValueError(f"{text!r}: {kind} has no option {sorted(unknown)}; it has {list(KINDS[kind])}.")
    options = KINDS[kind] | given
    for name, value in options.items():
        if name in CHOICES:
            fits, expected = value in CHOICES[name], f"one of {', '.join(CHOICES[name])}"
        elif name == "layers":
            fits, expected = _is_pattern(value), "a regular expression"
        elif name == "rank":
            fits, expected = type(value) is int and value > 0, "a whole number above 0"
        else:
            low, high = {"share": (0, 1), "decay": (0, 1)}.get(name, (0, math.inf))
            fits, expected = type(value) in (int, float) and low <= value <= high, f"in [{low}, {high}]"
            fits = fits and math.isfinite(value)
        if name == "prior":
            fits = fits and value > 0
            expected = "above 0"
        if not fits:
            raise ValueError(f"{text!r}: {name} must be {expected}, got {value!r}.")
    if options.get("layers") and not options["q"]:
        raise ValueError(f"{text!r}: layers= says where the process noise goes; give q= too.")
    if options.get("decay") == 0 and (not options["q"] or options["layers"]):
        raise ValueError(
            f"{text!r}: with decay=0 every weight begins each task anew, and needs process noise: give q= without "
            "layers=, or decay= above 0."
        )
    if "rank" in given and options["structure"] != "low_rank":
        raise ValueError(f"{text!r}: rank= goes with structure=low_rank.")
    if kind == "replay" and not 0 < options["share"] < 1:
        raise ValueError(f"{text!r}: share must be between 0 and 1, got {options['share']}.")
    return kind, options


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def canonical(text: str) -> str:
    """One spelling per method: numbers short but unchanged, no options at their defaults but the first of the kind."""
    kind, options = read_method(text)
    first = next(iter(KINDS[kind]), None)
    shown = [
        f"{name}={spelt(value)}"
        for name, value in options.items()
        if (name == first and name != "lr") or value != KINDS[kind][name]
    ]
    return f"{kind}:{','.join(shown)}" if shown else kind


def learn(method: str, setup: Setup) -> Learnt:
    """Learn all tasks in their order.

    Args:
        method (`str`): See [`read_method`].
        setup (`Setup`): Tasks, model and arguments.

    Returns:
        `Learnt`: Adapters and times.
    """
    kind, options = read_method(method)
    if options.get("lr"):
        setup = replace(setup, config=partial(setup.config, learning_rate=options["lr"]))
    began = time.perf_counter()
    if kind in ("filter", "ewc", "loko"):
        return _filtered(kind, options, setup)
    if kind == "joint":
        learnt = _joint(setup)
    else:
        learnt = _plain(kind, options, setup)
    learnt.seconds = time.perf_counter() - began
    if kind == "sequential":
        learnt.own[NEIGHBOURS] = averages(learnt.adapters)
    return learnt


def noise_of(options: Mapping[str, Any]) -> float | dict[str, float]:
    """The process noise as [`Transition`] takes it: q everywhere, or in the weights that `layers` matches."""
    return {options["layers"]: options["q"]} if options["layers"] else options["q"]


def _filtered(kind: str, options: Mapping[str, Any], setup: Setup) -> Learnt:
    """A filter over tasks; online EWC is the diagonal one, without process noise and with the empirical Fisher."""
    changes: dict[str, Any] = {}
    chosen: dict[str, Any] = {"curvature_samples": setup.curvature_samples}
    if kind == "ewc":
        changes = {"laplace_fisher": "empirical"}
        chosen |= {"structure": "diagonal", "prior_precision": _NO_PRIOR, "strength": options["strength"]}
    else:
        chosen |= {"process_noise": noise_of(options), "decay": options["decay"]}
    if kind == "filter":
        changes = {"laplace_fisher": options["fisher"]}
        chosen |= {name: options[name] for name in ("structure", "strength")}
        chosen["prior_precision"] = options["prior"]
        if options["structure"] == "low_rank":
            chosen["rank"] = changes["laplace_rank"] = options["rank"]
    if kind == "loko":
        changes = {"optimizer": "loko", "loko_memory": options["memory"]}
    args = setup.config(output_dir=str(setup.folder), **changes)
    began = time.perf_counter()
    learner = ContinualLearner(setup.model(), args, **chosen, **setup.trainer_options)
    resumed = bool(learner.tasks)
    for name, rows in setup.tasks.items():
        learner.learn(name, rows)
    seconds = math.nan if resumed else time.perf_counter() - began
    learnt = Learnt(learner.model, [record.belief.mean for record in learner.records()], seconds)
    learnt.figures = [entry["figures"] for entry in learner.tasks]
    if options.get("q") or options.get("decay", 1.0) < 1:
        # Without motion between tasks all smoothed adapters are the last one.
        smoothed = learner.smooth(covariance=False)
        learnt.own[SMOOTHED] = [smoothed[name].mean for name in setup.tasks]
    return learnt


def _plain(kind: str, options: Mapping[str, Any], setup: Setup) -> Learnt:
    """Task after task with the Trainer: AdamW as it is, with a pull to one point, or with rows of earlier tasks."""
    model = setup.model()
    state = AdapterState(model)
    start, adapters = state.snapshot(), []
    for index, rows in enumerate(setup.tasks.values()):
        belief = None
        if kind == "separate":
            state.load(start)
        if kind == "l2":
            belief = initial_belief(state if options["to"] == "previous" else start, 1.0, "diagonal")
        if kind == "replay" and index:
            rows = mixed(rows, list(setup.tasks.values())[:index], options["share"], setup.seed + index)
        _train(setup, model, rows, setup.seed + index, belief, options.get("strength"))
        adapters.append(state.snapshot())
    return Learnt(model, adapters, per_task=kind == "separate")


def _joint(setup: Setup) -> Learnt:
    """All tasks in one run, of as many steps as they have one after the other."""
    model = setup.model()
    rows = concatenate_datasets(list(setup.tasks.values()))
    _train(setup, model, rows, setup.seed, steps=setup.steps * len(setup.tasks))
    return Learnt(model, [AdapterState(model).snapshot()])


def _train(
    setup: Setup, model: Any, rows: Dataset, seed: int, belief: Belief | None = None, strength: float | None = None,
    steps: int | None = None,
) -> None:  # fmt: skip
    changes = {"laplace_strength": strength} if belief is not None else {}
    if steps is not None:
        changes["max_steps"] = steps
    args = setup.config(output_dir=str(setup.folder), seed=seed, **changes)
    KalmanTrainer(model=model, args=args, train_dataset=rows, belief=belief, **setup.trainer_options).train()


def mixed(rows: Dataset, earlier: Sequence[Dataset], share: float, seed: int) -> Dataset:
    """A task's rows, some of which give way to rows of earlier tasks: as many in all.

    Args:
        rows (`Dataset`): Of the task.
        earlier (`Sequence[Dataset]`): Rows of the tasks before.
        share (`float`): Of rows from earlier tasks, in (0, 1); at least one row, and evenly over the tasks.
        seed (`int`): Chooses the rows.

    Returns:
        `Dataset`: The task's first rows, and the others.
    """
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    parts = []
    for index, old in enumerate(earlier):
        # The newest task first, where there are more tasks than rows.
        place = len(earlier) - 1 - index
        wanted = count // len(earlier) + (place < count % len(earlier))
        parts.append(old.shuffle(seed=seed).select(range(min(wanted, len(old)))))
    taken = sum(len(part) for part in parts)
    return concatenate_datasets([rows.select(range(len(rows) - taken)), *parts])


def averages(adapters: Sequence[Adapter]) -> list[Adapter]:
    """For each task the mean, factor by factor, of the adapters after it and after its neighbours in the sequence."""
    found = []
    for index in range(len(adapters)):
        near = adapters[max(index - 1, 0) : index + 2]
        found.append({key: sum(adapter[key] for adapter in near) / len(near) for key in adapters[index]})
    return found
