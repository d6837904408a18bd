"""From the logits of micro-batches to what one Kalman step takes in: the summed score, and columns of information."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..distributed import all_counts, all_rows, all_sum_, raise_together, world
from ..sampling import RowRandom
from .columns import ColumnTaps, batched_backward
from .rows import Rows
from .views import View


EXACT_LIMIT = 1024  # backward passes per micro-batch
_PASSES = 2**20  # more than there are for a step; column keys are sequence * _PASSES + pass
_LARGEST = 1e15  # norm of scores and columns; with variances up to 1e8, their energies still fit into float32


@dataclass(frozen=True)
class Plan:
    """Which columns are taken at a step.

    Args:
        kind (`str`): "sampled", "rademacher", "exact", "empirical"; "none" at steps without a draw.
        per_sequence (`bool`): One column for each sequence rather than for the whole batch.
        number (`int`): Draws of each.
        top_k (`int`, *optional*): For "exact".
        seed (`int`): Of this step's draws.
    """

    kind: str
    per_sequence: bool
    number: int
    top_k: int | None
    seed: int


@dataclass(frozen=True)
class Evidence:
    """What all processes have observed for one step.

    Args:
        plan (`Plan`): With which it was taken.
        scores (`list[Tensor]`): Gradient of the summed log-likelihood, per view.
        columns (`list[Tensor]`, *optional*): (m, *shape) per view; their squares sum to the information.
        count (`float`): Labels.
        loss (`float`): Summed negative log-likelihood.
        sequences (`float`): Sequences with a label.
        squares (`float`): Summed squared residuals, see `Rows.squares`.
        broken (`float`): Micro-batches that were not finite, and one more if the sums over all are not, or are
            so large that their squares, seen by a loose prior, would not be.
        undamped (`float`):
            The labels' own information over that of the columns, by their traces: below 1 with damping, above with
            `top_k`.
    """

    plan: Plan
    scores: list[Tensor]
    columns: list[Tensor] | None
    count: float
    loss: float
    sequences: float
    squares: float
    broken: float
    undamped: float = 1.0

    @property
    def is_finite(self) -> bool:
        """Whether nothing is NaN or infinite."""
        return not self.broken


@dataclass
class Totals:
    """Sums over the micro-batches of one step; all of them numbers, to be summed over processes in one go.

    Args:
        count (`float`): Labels.
        loss (`float`): See `Evidence`.
        sequences (`float`): See `Evidence`.
        squares (`float`): See `Evidence`.
        own (`float`): First of `Rows.traces`.
        carried (`float`): Second of `Rows.traces`.
        broken (`float`): Micro-batches that were not finite.
        failed (`float`): 1 if an error is kept.
    """

    count: float = 0.0
    loss: float = 0.0
    sequences: float = 0.0
    squares: float = 0.0
    own: float = 0.0
    carried: float = 0.0
    broken: float = 0.0
    failed: float = 0.0

    def add(self, other: "Totals") -> None:
        """Add another's, one by one."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


class Harvest:
    """Sums over the micro-batches of one step.

    Args:
        views (`list[View]`): Of the filter.
        taps (`ColumnTaps`, *optional*): For columns of single sequences; without them by batched backward passes.
    """

    def __init__(self, views: list[View], taps: ColumnTaps | None):
        self.views, self.taps = views, taps
        self.params = [p for view in views for p in view.params]
        self.names = [name for view in views for name in view.names]
        self.clear()

    def clear(self) -> None:
        """Begin a new step."""
        self._score: list[Tensor] = []
        self._draws: list[list[Tensor]] = []  # per draw, per view: summed over the batch
        self._columns: list[list[Tensor]] = []  # per backward pass, per view: (touched sequences, *shape)
        self._keys: list[Tensor] = []  # per backward pass: whose columns they are
        self._totals = Totals()
        self._failure: Exception | None = None
        self._sequences = 0  # begun so far, over all processes
        self.observed = False

    def add(self, logits: Tensor, rows: Rows, plan: Plan, squares: float = 0.0) -> None:
        """Take a micro-batch, by one backward pass for the score and one or more for the columns.

        Args:
            logits (`Tensor`): With a graph to the parameters.
            rows (`Rows`): Read from them.
            plan (`Plan`): Which columns to take.
            squares (`float`, *optional*): See `Evidence`.
        """
        first = self._begin(logits, plan)
        if self._failure is not None:
            return
        try:
            self._add(logits, rows, plan, squares, first)
        except Exception as error:
            self._fail(error)

    def add_failure(self, error: Exception, logits: Tensor, plan: Plan) -> None:
        """In place of `add`: keep an error until `reduce`, where the other processes will wait for this one.

        Args:
            error (`Exception`): With one process it is raised at once.
            logits (`Tensor`): Of the micro-batch that could not be read.
            plan (`Plan`): Which columns the other processes take.
        """
        if world()[1] == 1:
            raise error
        self._begin(logits, plan)
        self._fail(error)

    @property
    def has_failed(self) -> bool:
        """Whether an error is kept."""
        return self._failure is not None

    def _fail(self, error: Exception) -> None:
        """Drop the step's batches; with one process raise the error."""
        if world()[1] == 1:
            self.clear()
            raise error
        self._failure = self._failure or error
        self._score, self._draws, self._columns, self._keys = [], [], [], []
        self._totals = Totals(failed=1.0)

    def _begin(self, logits: Tensor, plan: Plan) -> int:
        """Place of the micro-batch's first sequence, where draws need it."""
        self.observed = True
        return self._place(len(logits), logits.device) if plan.kind != "none" else 0

    def _add(self, logits: Tensor, rows: Rows, plan: Plan, squares: float, first: int) -> None:
        if not rows.is_finite:
            self._totals.broken += 1
        elif len(rows):
            own, carried = rows.traces(plan.top_k)
            self._totals.add(
                Totals(len(rows), float(rows.loss.sum()), len(rows.owner.unique()), squares, own, carried)
            )
            self._take(logits, rows, plan, first)

    def _place(self, batch: int, device: torch.device) -> int:
        """Place of the micro-batch's first sequence in the joined batch; those of the first process come first."""
        counts = all_counts(batch, device)
        first = self._sequences + sum(counts[: world()[0]])
        self._sequences += sum(counts)
        return first

    def _take(self, logits: Tensor, rows: Rows, plan: Plan, first: int) -> None:
        empirical = plan.kind == "empirical"
        score, columns = self._backward(logits, rows.score(), plan.kind not in ("none", "empirical"), empirical)
        for tensor in score:
            tensor.neg_()  # the cotangent is that of the negative log-likelihood
        self._score = [a.add_(b) for a, b in zip(self._score, score, strict=True)] if self._score else score
        if empirical:
            self._keep(columns, rows.touched(), first, 0)
        if plan.kind in ("none", "empirical"):
            return
        for j, (cotangent, touched, last) in enumerate(_with_last(self._cotangents(rows, plan, first))):
            drawn, columns = self._backward(logits, cotangent, not last, plan.per_sequence)
            if plan.per_sequence:
                scale = plan.number**-0.5 if plan.kind != "exact" else 1.0
                self._keep([c.mul_(scale) for c in columns], touched, first, j)
            elif j < len(self._draws):
                self._draws[j] = [a.add_(b) for a, b in zip(self._draws[j], drawn, strict=True)]
            else:
                self._draws.append(drawn)

    def _keep(self, columns: list[Tensor], touched: Tensor, first: int, j: int) -> None:
        """Keep the columns of the sequences that the j-th backward pass touches."""
        self._columns.append([c[touched] for c in columns])
        self._keys.append((first + touched.nonzero()[:, 0]) * _PASSES + j)

    def _cotangents(self, rows: Rows, plan: Plan, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Cotangents of the columns.

        Yields:
            tuple: A cotangent, and the sequences that it touches, (B,) boolean.
        """
        if plan.kind == "exact":
            yield from rows.roots(plan.top_k, EXACT_LIMIT)
            return
        for j in range(plan.number):
            yield rows.draw(plan.kind, rows.random(first, plan.seed * 1009 + j)), rows.touched()

    def _backward(
        self, logits: Tensor, cotangent: Tensor, retain_graph: bool, per_sequence: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients summed over the batch, and (if asked for) those of each sequence, per view."""
        batch = len(logits)
        tapped = per_sequence and batch > 1 and self.taps is not None and not self.taps.uncovered
        if per_sequence and batch > 1 and not tapped:
            each = batched_backward(logits, self.params, cotangent, retain_graph)
            self._check_reached(each)
            columns = self._gather(each, batch)
            return [c.sum(0) for c in columns], columns
        if tapped:
            assert self.taps is not None
            self.taps.record(batch)
        try:
            grads = torch.autograd.grad(logits, self.params, cotangent, retain_graph=retain_graph, allow_unused=True)
        finally:
            found = self.taps.take() if tapped and self.taps is not None else {}
        self._check_reached(grads)
        summed = self._gather(grads)
        if not per_sequence:
            return summed, []
        if not tapped:
            return summed, [s[None].clone() for s in summed]
        if any(g is not None and id(p) not in found for p, g in zip(self.params, grads, strict=True)):
            raise ValueError(
                "Columns of single sequences are read by forward hooks, which did not see the backward pass; compiled "
                "models (torch.compile) leave hooks out. Set per_sequence=False."
            )
        return summed, self._gather([found.get(id(p)) for p in self.params], batch)

    def _gather(self, tensors: Any, *leading: int) -> list[Tensor]:
        found = dict(zip(map(id, self.params), tensors, strict=True))
        return [view.gather([found[id(p)] for p in view.params], *leading) for view in self.views]

    def _check_reached(self, grads: Any) -> None:
        factors = [g for g, name in zip(grads, self.names, strict=True) if ".lora_" in name]
        if all(g is None for g in factors or grads):
            raise ValueError(
                "No gradient reaches the adapter. Either the adapter is not active, or gradient checkpointing is "
                "reentrant, which hides the graph: set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )

    # -- over all processes ----------------------------------------------------------------------------------------

    def reduce(self, plan: Plan, max_columns: int) -> Evidence:
        """Sum over processes, and join the columns; processes must have observed with the same plan.

        Args:
            plan (`Plan`): With which the micro-batches were taken.
            max_columns (`int`): More columns of sequences are summed in groups, with random signs, which keeps the
                expected sum of squares.

        Returns:
            `Evidence`: The same in all processes.

        Raises:
            Exception: A micro-batch could not be taken, on this process or (as RuntimeError) on another.
        """
        scores = self._score or [view.zeros() for view in self.views]
        sums = torch.tensor(astuple(self._totals), dtype=torch.float64, device=scores[0].device)
        all_sum_([sums, *scores])
        columns = None
        if plan.kind != "none":
            columns = self._joined(max_columns, plan.seed) if plan.per_sequence else self._drawn(plan.number)
        norms = torch.stack([torch.linalg.vector_norm(t) for t in (*scores, *(columns or []))])
        overflow = 1 - (norms < _LARGEST).all().to(sums)
        *numbers, overflow = torch.cat([sums, overflow[None]]).tolist()  # the one wait for the device
        total = Totals(*numbers)
        if total.failed:
            raise_together(self._failure)
        return Evidence(
            plan, scores, columns, total.count, total.loss, total.sequences, total.squares, total.broken + overflow,
            total.own / total.carried if total.carried else 1.0,
        )  # fmt: skip

    def _drawn(self, number: int) -> list[Tensor]:
        # Independent draws of mean zero: the square of their sum has the summed information as its expectation.
        draws = self._draws or [[view.zeros() for view in self.views] for _ in range(number)]
        stacked = [torch.stack(parts) for parts in zip(*draws, strict=True)]
        all_sum_(stacked)
        return [c.mul_(number**-0.5) for c in stacked]

    def _all_columns(self) -> list[Tensor]:
        parts = zip(*self._columns, strict=True) if self._columns else ([view.zeros(0)] for view in self.views)
        return [all_rows(torch.cat(list(part))) for part in parts]

    def _joined(self, max_columns: int, seed: int) -> list[Tensor]:
        columns = self._all_columns()
        keys = torch.cat(self._keys) if self._keys else torch.zeros(0, dtype=torch.long, device=columns[0].device)
        keys, order = all_rows(keys).sort()  # as in the joined batch, however it was split
        if not torch.equal(order, torch.arange(len(order), device=order.device)):
            columns = [c[order] for c in columns]
        number = len(keys)
        if number <= max_columns:
            return columns
        signs = RowRandom(keys, seed).signs(1)[:, 0]
        groups = torch.arange(number) % max_columns
        return [
            c.new_zeros(max_columns, *c.shape[1:]).index_add_(
                0, groups.to(c.device), c * signs.to(c).view(-1, *(1,) * (c.dim() - 1))
            )
            for c in columns
        ]


def _with_last(pairs: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Mark the last pair.

    Yields:
        tuple: The pair, and whether it is the last.
    """
    held = next(pairs)
    for following in pairs:
        yield *held, False
        held = following
    yield *held, True
