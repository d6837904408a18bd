"""Backwards over the tasks: what later tasks say of earlier ones, from stored beliefs and without data.

Means by Rauch, Tung and Striebel (1965), precisions by Fraser and Potter's two filters (1969): the filtered precision
plus what the future's information amounts to, so that the sum is positive definite by construction and stays in its
structure. In a linear-Gaussian model both are the marginals of the joint posterior. Low-Rank Filtering and Smoothing
(arXiv:2410.06800) smooths means alike; what lies between two tasks it leaves as an open question.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..belief import Belief, BeliefError
from ..lineage import LINEAGE
from ..precision import DensePrecision, DiagonalPrecision, LowRankPrecision, Precision
from .algebra import add, as_double, diffuse, diffuse_back, least_damping
from .records import TaskRecord
from .state import INFO, check_state, predict
from .transition import Transition


Start = Mapping[str, Tensor] | None
Weights = dict[str, Tensor]
_SMALL_DECAY = 0.1


def smooth(
    records: Sequence[TaskRecord],
    *,
    start: Start = None,
    covariance: bool = True,
    rank: int | None = None,
    keep_discarded: bool = True,
) -> list[Belief]:
    """The belief of every task given the data of all.

    m^s_t = m_t + G_t (m^s_t+1 - m^-_t+1), G_t = (I - Q Lambda^-_t+1) / decay;
    Lambda^s_t = Lambda_t + decay^2 (J_t+1^-1 + Q)^-1, J_t the information of the data of tasks t and later on theta_t.

    Args:
        records (`Sequence[TaskRecord]`): In the order of the tasks.
        start (`Mapping[str, Tensor]`, *optional*): Mean of the first belief; for transitions with decay < 1.
        covariance (`bool`, *optional*, defaults to `True`):
            Without it only means are smoothed, for which no increments are needed; the beliefs then keep their
            filtered precision, and their record says so.
        rank (`int`, *optional*):
            To which J and the result are cut for structure "low_rank"; by default the largest of the records' ranks.
        keep_discarded (`bool`, *optional*, defaults to `True`): See [`compress`].

    Returns:
        `list[Belief]`: One per task; the last is the filtered one.

    Raises:
        BeliefError: No records, records that do not fit each other, or increments that are missing and cannot be
            recovered.
        ValueError: decay < 1 without a start.
    """
    backwards = smooth_each(records, start=start, covariance=covariance, rank=rank, keep_discarded=keep_discarded)
    return [belief for _, belief in backwards][::-1]


def smooth_each(
    records: Sequence[TaskRecord],
    *,
    start: Start = None,
    covariance: bool = True,
    rank: int | None = None,
    keep_discarded: bool = True,
) -> Iterator[tuple[int, Belief]]:
    """As [`smooth`], one belief at a time from the last task to the first: two records are in memory at once, if
    `records` reads them when they are asked for, however long the sequence.

    Args:
        records (`Sequence[TaskRecord]`): See [`smooth`], as all arguments.
        start (`Mapping[str, Tensor]`, *optional*): See there.
        covariance (`bool`, *optional*, defaults to `True`): See there.
        rank (`int`, *optional*): See there.
        keep_discarded (`bool`, *optional*, defaults to `True`): See there.

    Yields:
        `tuple[int, Belief]`: Place of the task, and its smoothed belief.
    """
    if not records:
        raise BeliefError("There are no task records to smooth.")
    if covariance and rank is None:
        rank = _rank(records)
    mean: Weights = {}
    info: Mapping[str, Any] = {}
    later: TaskRecord | None = None
    walk = _backwards(records, rank, keep_discarded) if covariance else ((r, None, None) for r in _reversed(records))
    for t, (record, _, back) in zip(range(len(records) - 1, -1, -1), walk, strict=True):
        belief, precision = record.belief, record.belief.precision
        mean = dict(belief.mean) if later is None else _step_back(belief, later.transition, mean, start)
        if back is not None:
            precision = add(precision, back, rank, keep_discarded)
        info = info or belief.info
        yield t, _smoothed(belief, mean, precision, info, covariance)
        later = record


def smooth_means(records: Sequence[TaskRecord], *, start: Start = None) -> list[dict[str, Tensor]]:
    """Smoothed means alone; needs products with predicted precisions, no increments.

    Args:
        records (`Sequence[TaskRecord]`): In the order of the tasks.
        start (`Mapping[str, Tensor]`, *optional*): See [`smooth`].

    Returns:
        `list[dict[str, Tensor]]`: Adapter weights by key, one per task.
    """
    return [dict(belief.mean) for _, belief in smooth_each(records, start=start, covariance=False)][::-1]


def interpolate(
    records: Sequence[TaskRecord],
    position: float,
    *,
    start: Start = None,
    transition: Transition | None = None,
    rank: int | None = None,
    keep_discarded: bool = True,
) -> Belief:
    """The belief between two tasks, or after the last, given the data of all: for a task never observed.

    At fraction u between tasks t and t+1 (a Brownian bridge, or an Ornstein-Uhlenbeck one):
    Lambda(u) = predict(Lambda_t, first u of the step) + what J_t+1 says across the rest of it,
    m(u) = m^-(u) + G(u) (m^s_t+1 - m^-_t+1).

    Args:
        records (`Sequence[TaskRecord]`): In the order of the tasks.
        position (`float`): >= 0; 0 is the first task, 1.25 a quarter of the way from the second to the third.
        start (`Mapping[str, Tensor]`, *optional*): See [`smooth`].
        transition (`Transition`, *optional*): Motion after the last task; by default that into it.
        rank (`int`, *optional*): See [`smooth`].
        keep_discarded (`bool`, *optional*, defaults to `True`): See [`compress`].

    Returns:
        `Belief`: At a task the smoothed one, after the last the predicted one.

    Raises:
        ValueError: The position is negative, NaN or infinite.
        BeliefError: See [`smooth`].
    """
    if not records:
        raise BeliefError("There are no task records to interpolate.")
    if not 0 <= position < math.inf:
        raise ValueError(f"position must be >= 0 and finite, got {position}; 0 is the first task.")
    last = len(records) - 1
    if position > last:
        motion = records[last].transition if transition is None else transition
        return predict(records[last].belief, motion.part(position - last), start)
    t = math.floor(position)
    rank = _rank(records) if rank is None else rank
    if t == position:
        backwards = smooth_each(records[t:], start=start, rank=rank, keep_discarded=keep_discarded)
        return _last(backwards)[1]
    step = records[t + 1].transition
    before, after = step.part(position - t), step.part(1 - (position - t))
    here = predict(records[t].belief, before, start)
    _, smoothed = _last(smooth_each(records[t + 1 :], start=start, covariance=False))
    mean = _step_back(here, after, smoothed.mean, start)
    _, future, _ = _last(_backwards(records[t:], rank, keep_discarded))
    back = None if future is None else _back(future, after)
    precision = here.precision if back is None else add(here.precision, back, rank, keep_discarded)
    return _smoothed(here, mean, precision, records[-1].belief.info)


def _step_back(belief: Belief, transition: Transition, smoothed: Mapping[str, Tensor], start: Start) -> dict:
    """m + G (m^s_next - m^-_next), with G = decay Lambda^-1 Lambda^-_next = (I - Q Lambda^-_next) / decay."""
    if transition.decay == 0:
        return dict(belief.mean)
    predicted = predict(belief, transition, start)
    like = predicted.precision.like
    surprise = {k: smoothed[k].to(like) - m.to(like) for k, m in predicted.mean.items()}
    pulled = predicted.precision.matvec(surprise)
    if transition.decay >= _SMALL_DECAY:
        noise = transition.noise(belief.precision.coordinates(), like)
        gained = {k: (x - noise[k] * pulled[k]) / transition.decay for k, x in surprise.items()}
    else:  # where I - Q Lambda^- is all cancellation
        precision = as_double(belief.precision)
        solved = precision.solve(pulled, damping=least_damping(precision))
        gained = {k: transition.decay * x for k, x in solved.items()}
    return {k: m + gained[k].to(m) for k, m in belief.mean.items()}


def _backwards(
    records: Sequence[TaskRecord], rank: int | None, keep_discarded: bool
) -> Iterator[tuple[TaskRecord, Precision | None, Precision | None]]:
    """Walk backwards over the tasks t, with one J in memory at a time.

    Yields:
        tuple: Record t; J_t+1, the information on theta_t+1 of the data of tasks t+1 and later; and what that says of
        theta_t. Neither for the last task.
    """
    future: Precision | None = None
    later: TaskRecord | None = None
    for record in _reversed(records):
        back = None
        if later is not None:
            information = _information(record, later)
            future = information if future is None else add(information, future, rank, keep_discarded)
            back = _back(future, later.transition)
        yield record, future, back
        # What the task says of itself is added to it at the next step.
        future, later = back, record


def _reversed(records: Sequence[TaskRecord]) -> Iterator[TaskRecord]:
    """Walk from the last to the first.

    Yields:
        `TaskRecord`: Each read once, and seen to be of the same filter.
    """
    later: TaskRecord | None = None
    for t in range(len(records) - 1, -1, -1):
        record = records[t]
        _check(record, later)
        yield record
        later = record


def _last(walk: Iterator[Any]) -> Any:
    """The last item, without keeping the others."""
    return deque(walk, maxlen=1).pop()


def _back(future: Precision, transition: Transition) -> Precision | None:
    """What J on the state after a step says of the state before it."""
    return diffuse_back(future, transition.noise(future.coordinates(), future.like), transition.decay)


def _information(before: TaskRecord, record: TaskRecord) -> Precision:
    """The task's increment, or else the filtered precision less the predicted one."""
    if record.increment is not None:
        return record.increment
    filtered, transition = record.belief.precision, record.transition
    noise = transition.noise(filtered.coordinates(), filtered.like)
    predicted = diffuse(before.belief.precision, noise, transition.decay)
    if isinstance(filtered, DiagonalPrecision) and isinstance(predicted, DiagonalPrecision):
        entries = {k: (f - predicted.entries[k].to(f)).clamp(min=0) for k, f in filtered.entries.items()}
        return DiagonalPrecision(entries)
    if isinstance(filtered, DensePrecision) and isinstance(predicted, DensePrecision):
        values, vectors = torch.linalg.eigh((filtered.matrix - predicted.matrix.to(filtered.matrix)).double())
        difference = (vectors * values.clamp(min=0)) @ vectors.mT
        return DensePrecision(difference.to(filtered.matrix), filtered.coordinates())
    raise BeliefError(
        f"Task {record.name!r} has no increment, and two {filtered.structure} precisions cannot be subtracted. Store "
        "increment=increment_of(predicted, curvature, num_labels) with it, or smooth means only: covariance=False."
    )


def _check(record: TaskRecord, later: TaskRecord | None) -> None:
    check_state(record.belief)
    if later is None:
        return
    mine, theirs = record.belief.precision, later.belief.precision
    if mine.structure != theirs.structure or mine.coordinates() != theirs.coordinates():
        raise BeliefError(
            f"Task {record.name!r} has another structure or other weights than {later.name!r}; smooth the tasks of "
            "one filter."
        )


def _rank(records: Sequence[TaskRecord]) -> int | None:
    if not isinstance(records[0].belief.precision, LowRankPrecision):  # all are of one structure; reading takes time
        return None
    return max(r.belief.precision.rank for r in records if isinstance(r.belief.precision, LowRankPrecision))


def _smoothed(
    belief: Belief, mean: Mapping[str, Tensor], precision: Precision, info: Mapping[str, Any], covariance: bool = True
) -> Belief:
    """A smoothed belief remembers the data of all tasks, as the last one's `info` says; so do its means alone."""
    known = info if covariance else belief.info
    record = known[INFO] | {"kind": "smoothed", "precision": "smoothed" if covariance else "filtered"}
    past = {LINEAGE: info[LINEAGE]} if LINEAGE in info else {}
    return Belief(mean, precision, belief.info | {INFO: record} | past, belief.source)
