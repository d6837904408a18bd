"""Ways to learn image tasks in sequence: the filter over adapters, and what it is compared with.

A loop of its own rather than ContinualLearner: one step of this MLP takes about a millisecond, and a Trainer's
bookkeeping several, in runs of thousands of steps and dozens of settings. The filter is that of the library.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kalman_peft import (
    AdapterState,
    Belief,
    CategoricalObservation,
    TaskRecord,
    Transition,
    estimate_curvature,
    initial_belief,
    interpolate,
    predict,
    smooth,
    update,
)
from kalman_peft.filtering import belief_figures, increment_of, transition_figures
from kalman_peft.laplace import add_penalty_gradient

from .image_tasks import Batch, ImageTask, accuracy, batches, joined
from .spelling import spelt, split_options


KINDS = ("sequential", "l2", "ewc", "filter", "replay", "separate", "joint")
USED = {
    "filter": {"structure", "rank", "q", "where", "prior", "strength", "keep", "fisher"},
    "ewc": {"strength", "prior"},
    "l2": {"strength"},
    "replay": {"share"},
}
STRUCTURES = ("diagonal", "low_rank", "ekfac", "dense")
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Method:
    """A method and its options, written as "filter:rank=10,q=1e-4".

    Attributes:
        kind (`str`): One of `KINDS`: "sequential": AdamW alone. "l2": pulled to the start. "ewc": online EWC, a
            diagonal filter with the exact Fisher, without noise, and with next to no prior. "filter": that of the
            library. "replay": a share of every earlier task's images is learnt along. "separate": an adapter per task.
            "joint": all tasks at once, the ceiling.
        structure (`str`): Filter: of the state.
        rank (`int`): Filter: columns of a state of structure "low_rank".
        q (`float`): Filter: process noise.
        where (`str`): Filter: "all" weights gain it, or those of the "first" layer, where a permutation lives.
        prior (`float`): Filter, EWC: prior precision.
        strength (`float`): Filter, EWC: factor on the belief. L2: precision of the pull.
        keep (`int`): Filter: 1 keeps the diagonal of what is cut.
        fisher (`str`): Filter: "sampled" labels or the "exact" expectation over them, which EWC takes.
        share (`float`): Replay: of every earlier task's images.
    """

    kind: str
    structure: str = "low_rank"
    rank: int = 10
    q: float = 0.0
    where: str = "all"
    prior: float = 1.0
    strength: float = 1.0
    keep: int = 1
    fisher: str = "sampled"
    share: float = 0.01

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read what `str` writes.

        Args:
            text (`str`): Kind, and options after a colon.

        Returns:
            `Method`: With the defaults of its kind.

        Raises:
            ValueError: Unknown kind or option, one given twice, a value out of range, or one without effect.
        """
        kind, _, rest = text.partition(":")
        if kind not in KINDS:
            raise ValueError(f"{text!r}: expected one of {list(KINDS)}, with options after a colon.")
        types = {f.name: f.type for f in fields(cls)}
        given: dict[str, Any] = {}
        try:
            pairs = split_options(rest)
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}.") from error
        for name, value in pairs.items():
            if name not in USED.get(kind, set()):
                raise ValueError(f"{text!r}: {kind} has no option {name!r}; it has {sorted(USED.get(kind, set()))}.")
            try:
                given[name] = {"int": int, "float": float, "str": str}[str(types[name])](value)
            except ValueError:
                kinds = {"int": "a whole number", "float": "a number"}
                raise ValueError(f"{text!r}: {name} must be {kinds[str(types[name])]}, got {value!r}.") from None
        if given.get("where", "all") not in ("all", "first") or not 0 < given.get("share", 1) <= 1:
            raise ValueError(f"{text!r}: where is 'all' or 'first', share in (0, 1].")
        if given.get("fisher", "exact") not in ("sampled", "exact"):
            raise ValueError(f"{text!r}: fisher is 'sampled' or 'exact'.")
        _check_numbers(text, given)
        if kind == "filter":
            _check_filter(text, given)
        if kind == "ewc":
            given = {"structure": "diagonal", "prior": 1e-3, "fisher": "exact"} | given
        return cls(kind, **given)

    def __str__(self) -> str:
        default = asdict(Method.parse(self.kind))
        own = {k: v for k, v in asdict(self).items() if k != "kind" and v != default[k]}
        return self.kind + (":" if own else "") + ",".join(f"{k}={spelt(v)}" for k, v in own.items())


def _check_numbers(text: str, given: Mapping[str, Any]) -> None:
    expected = {
        "rank": ("at least 0", lambda v: v >= 0), "keep": ("0 or 1", lambda v: v in (0, 1)),
        "q": ("at least 0 and finite", lambda v: 0 <= v < math.inf),
        "strength": ("at least 0 and finite", lambda v: 0 <= v < math.inf),
        "prior": ("above 0 and finite", lambda v: 0 < v < math.inf),
    }  # fmt: skip
    for name, (words, fits) in expected.items():
        if name in given and not fits(given[name]):
            raise ValueError(f"{text!r}: {name} must be {words}, got {given[name]}.")


def _check_filter(text: str, given: Mapping[str, Any]) -> None:
    structure = given.get("structure", "low_rank")
    if structure not in STRUCTURES:
        raise ValueError(f"{text!r}: structure must be one of {list(STRUCTURES)}, got {structure!r}.")
    if structure != "low_rank" and (useless := {"rank", "keep"} & given.keys()):
        raise ValueError(f"{text!r}: {' and '.join(sorted(useless))} goes with structure=low_rank only; leave it out.")
    if given.get("where") == "first" and not given.get("q"):
        raise ValueError(f"{text!r}: where= says which weights gain process noise; give q= too.")


@dataclass(frozen=True)
class Training:
    """How a task is learnt, whatever the method.

    Attributes:
        epochs (`int`): Passes.
        batch_size (`int`): Images per step.
        learning_rate (`float`): Of AdamW, with a linear decay within each task.
        curvature_samples (`int`): Images for the curvature of a task.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 3e-3
    curvature_samples: int = 500


@dataclass
class Result:
    """What one run tells.

    Attributes:
        scores (`list[list[float]]`): R[i][j], accuracy on task j after i tasks; NaN where not measured.
        own (`dict[str, list[float]]`): Accuracy on its own task of every task's adapter: as "learnt", "smoothed", and
            "averaged" over it and its neighbours.
        between (`dict[str, list[float]]`): Accuracy half-way between two tasks: of the belief "interpolated" there, of
            the adapter of the task "before", and of the mean of "both".
        figures (`list[dict[str, float]]`): Of the filter, per task.
        seconds (`float`): In all.
    """

    scores: list[list[float]]
    own: dict[str, list[float]] = field(default_factory=dict)
    between: dict[str, list[float]] = field(default_factory=dict)
    figures: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


def run(
    method: Method, model: Any, tasks: Sequence[ImageTask], how: Training, seed: int, between: Sequence[Batch] = ()
) -> Result:
    """Learn the tasks in sequence and measure after each.

    Args:
        method (`Method`): What to do.
        model (`PeftModel`): At its start.
        tasks (`Sequence[ImageTask]`): In order.
        how (`Training`): For all methods alike.
        seed (`int`): Of the order of the images, and of draws.
        between (`Sequence[Batch]`, *optional*): Test images half-way between the tasks.

    Returns:
        `Result`: See there.
    """
    began, state = time.perf_counter(), AdapterState(model)
    start = state.snapshot()
    result = Result([_measure(model, tasks)])
    means: list[Weights] = []
    records: list[TaskRecord] = []
    generator = torch.Generator().manual_seed(seed)
    belief = _first_belief(method, model)
    for index, task in enumerate(tasks):
        data, predicted, transition = task.train, belief, Transition()
        if method.kind == "joint":
            data = joined(*(t.train for t in tasks))
        elif method.kind == "separate":
            state.load(start)
        elif method.kind == "replay" and index:
            data = joined(data, *(_share(t.train, method.share, seed) for t in tasks[:index]))
        elif method.kind == "filter" and index and belief is not None:
            transition = Transition(method.q if method.where == "all" else {r"layers\.0$": method.q})
            predicted = predict(belief, transition)
        _train(model, state, data, predicted, method.strength / len(task.train["labels"]), how, generator)
        means.append(state.snapshot())
        if method.kind in ("filter", "ewc"):
            assert belief is not None and predicted is not None
            before, (belief, record) = belief, _learnt(method, model, predicted, transition, task, how, seed + index)
            records.append(record)
            result.figures.append(transition_figures(before, predicted) | belief_figures(belief))
        result.scores.append(_measure(model, tasks))
        if method.kind == "joint":
            break
    if method.kind == "joint":
        result.scores = [result.scores[0], *[[float("nan")] * len(tasks)] * (len(tasks) - 1), result.scores[1]]
    elif method.kind == "separate":
        diagonal = [result.scores[t + 1][t] for t in range(len(tasks))]
        rest = float("nan")
        result.scores[1:] = [[s if t <= i else rest for t, s in enumerate(diagonal)] for i in range(len(tasks))]
    else:
        result.own = _own(model, state, tasks, means, records)
        result.between = _between(model, state, between, means, records)
    result.seconds = time.perf_counter() - began
    return result


def _first_belief(method: Method, model: Any) -> Belief | None:
    if method.kind in ("filter", "ewc"):
        return initial_belief(model, method.prior, method.structure)
    return initial_belief(model, 1.0, "diagonal") if method.kind == "l2" else None


def _train(
    model: Any, state: AdapterState, data: Batch, belief: Belief | None, strength: float, how: Training,
    generator: torch.Generator,
) -> None:  # fmt: skip
    """AdamW on mean loss + strength * 1/2 (theta - m)^T Lambda (theta - m)."""
    model.train()
    parameters = list(state.parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=how.learning_rate, weight_decay=0.0)
    steps = how.epochs * -(-len(data["labels"]) // how.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for batch in batches(data, how.batch_size, how.epochs, generator):
        optimizer.zero_grad()
        cross_entropy(model(**batch).logits, batch["labels"]).backward()
        if belief is not None:
            add_penalty_gradient(belief, state, strength)
        optimizer.step()
        schedule.step()
    model.eval()


def _learnt(
    method: Method, model: Any, predicted: Belief, transition: Transition, task: ImageTask, how: Training, seed: int
) -> tuple[Belief, TaskRecord]:
    number = len(task.train["labels"])
    rows = torch.randperm(number, generator=torch.Generator().manual_seed(seed))[: how.curvature_samples]
    sample = {key: value[rows] for key, value in task.train.items()}
    loader = [{key: value[part] for key, value in sample.items()} for part in torch.arange(len(rows)).split(100)]
    low_rank = method.structure == "low_rank"
    curvature, _ = estimate_curvature(
        model, loader, method.structure, method.fisher, space="adapter",
        rank=max(method.rank, 1) if low_rank else 16, observation=CategoricalObservation(shift=False), seed=seed,
        progress_bar=False,
    )  # fmt: skip
    state = AdapterState(model)
    belief = update(
        predicted, state.snapshot(), curvature, number, method.rank if low_rank else None, bool(method.keep)
    )
    return belief, TaskRecord(task.name, belief, transition, increment_of(predicted, curvature, number))


def _own(
    model: Any,
    state: AdapterState,
    tasks: Sequence[ImageTask],
    means: Sequence[Weights],
    records: Sequence[TaskRecord],
) -> dict[str, list[float]]:
    """Accuracy of every task's own adapter."""
    averaged = [_mean(means[max(t - 1, 0) : t + 2]) for t in range(len(means))]
    adapters: dict[str, Sequence[Weights]] = {"learnt": means, "averaged": averaged}
    if records:
        adapters["smoothed"] = [belief.mean for belief in smooth(records, covariance=False)]
    return _accuracies(model, state, [task.test for task in tasks], adapters)


def _between(
    model: Any, state: AdapterState, tests: Sequence[Batch], means: Sequence[Weights], records: Sequence[TaskRecord]
) -> dict[str, list[float]]:
    """Accuracy half-way between tasks, of adapters that saw neither."""
    if not tests:
        return {}
    adapters: dict[str, Sequence[Weights]] = {
        "before": means[:-1], "both": [_mean(means[t : t + 2]) for t in range(len(means) - 1)]
    }  # fmt: skip
    if records:
        adapters["interpolated"] = [interpolate(records, t + 0.5).mean for t in range(len(records) - 1)]
    return _accuracies(model, state, tests, adapters)


def _mean(adapters: Sequence[Weights]) -> Weights:
    return {key: torch.stack([adapter[key] for adapter in adapters]).mean(0) for key in adapters[0]}


def _accuracies(
    model: Any, state: AdapterState, tests: Sequence[Batch], adapters: Mapping[str, Sequence[Weights]]
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for name, every in adapters.items():
        found[name] = []
        for test, weights in zip(tests, every, strict=True):
            state.load(weights)
            found[name].append(accuracy(model, test))
    return found


def _share(data: Batch, share: float, seed: int) -> Batch:
    number = len(data["labels"])
    rows = torch.randperm(number, generator=torch.Generator().manual_seed(seed))[: max(1, round(share * number))]
    return {key: value[rows] for key, value in data.items()}


def _measure(model: Any, tasks: Sequence[ImageTask]) -> list[float]:
    model.eval()
    return [accuracy(model, task.test) for task in tasks]
