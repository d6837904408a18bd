"""Curvature passes to be measured: the work per batch apart from what is done once per pass.

Not run by itself: part of `curvature_cost.py`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import psutil
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kalman_peft import AdapterState, estimate_curvature
from kalman_peft.curvature import estimate
from kalman_peft.curvature.memory import curvature_memory
from kalman_peft.curvature.passes import Scorer

from measuring import Samples, measure, synchronize


Batches = Sequence[Mapping[str, Tensor]]
PLAIN = "forward + backward"
PASS = 16  # batches of the whole pass that is written out
EVERY_SIDE = 10**9  # dense_limit
ROOM = 0.5  # of the free memory that one curvature may take here: peak memory is more than the curvature


@dataclass(frozen=True)
class Variant:
    """One of our curvatures.

    Args:
        structure (`str`): As for `estimate_curvature`.
        fisher (`str`, *optional*, defaults to `"empirical"`): As for `estimate_curvature`.
        space (`str`, *optional*, defaults to `"adapter"`): As for `estimate_curvature`.
        dense (`bool`, *optional*, defaults to `False`):
            Sum every Kronecker side in full, as peers do, and leave the eigendecompositions out, as they do.
    """

    structure: str
    fisher: str = "empirical"
    space: str = "adapter"
    dense: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.structure} {self.fisher} {self.space}" + (", dense sides" if self.dense else "")

    @property
    def options(self) -> dict[str, Any]:
        """For `curvature_memory` and the like."""
        return {"dense_limit": EVERY_SIDE} if self.dense else {}


class _Enough(Exception):
    """The last batch has been seen."""


@dataclass
class BatchClock:
    """Seconds spent on batches, in all passes."""

    seconds: float = 0.0


@contextmanager
def batch_clock(finish: bool = True) -> Iterator[BatchClock]:
    """Time the loops over batches of `estimate_curvature`, and with `finish=False` stop after the first of them.

    What lies outside the loops (hooks, test matrices of the sketches, eigendecompositions) happens once per pass,
    however many batches there are.

    Yields:
        BatchClock: Complete on exit.
    """
    clock, loop, make = BatchClock(), Scorer._pass, estimate.make_accumulator

    def timed(self: Scorer, *args: Any) -> None:
        synchronize()
        began = time.perf_counter()
        loop(self, *args)
        synchronize()
        clock.seconds += time.perf_counter() - began

    def stop() -> None:
        raise _Enough

    def make_unfinished(*args: Any, **kwargs: Any) -> Any:
        accumulator: Any = make(*args, **kwargs)
        accumulator.finalize = stop
        return accumulator

    maker = make if finish else make_unfinished
    with patch.object(Scorer, "_pass", timed), patch.object(estimate, "make_accumulator", maker), suppress(_Enough):
        yield clock


def plain_run(model: Any, batches: Batches) -> Callable[[], None]:
    """What everything is compared with: gradients of the adapter."""

    def run() -> None:
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad()

    return run


def curvature_run(model: Any, batches: Batches, variant: Variant) -> Callable[[], float]:
    """A pass over the batches; the run returns the seconds spent on them."""

    def run() -> float:
        with batch_clock(finish=not variant.dense) as clock:
            estimate_curvature(
                model, batches, variant.structure, variant.fisher, space=variant.space, progress_bar=False,
                **variant.options,
            )  # fmt: skip
        return clock.seconds

    return run


def randomise_b(model: Any) -> None:
    """B = 0 would spare the structures half of their work."""
    for pair in AdapterState(model, warn_excluded=False):
        torch.nn.init.normal_(pair.b, std=0.02)


def bytes_of(model: Any, variant: Variant) -> int:
    """As estimated before a pass."""
    state = AdapterState(model, warn_excluded=False)
    return curvature_memory(state, variant.structure, variant.space, **variant.options).total


def misfits(model: Any, variants: Sequence[Variant]) -> dict[str, str]:
    """Variants too large for this machine, by name, with the reason."""
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    sizes = {variant.name: bytes_of(model, variant) for variant in variants}
    return {
        name: f"takes {size / 2**30:.1f} GiB, more than {ROOM:.0%} of the free {free / 2**30:.1f} GiB"
        for name, size in sizes.items()
        if size > ROOM * free
    }


def measure_curvatures(
    model: Any,
    batches: Batches,
    variants: Sequence[Variant],
    rounds: int,
    others: Mapping[str, Callable[[], float | None]] | None = None,
) -> dict[str, Samples]:
    """The plain run, our variants and others in turn."""
    runs: dict[str, Callable[[], float | None]] = {PLAIN: plain_run(model, batches)}
    runs |= {variant.name: curvature_run(model, batches, variant) for variant in variants}
    return measure(runs | dict(others or {}), rounds)


def _addmm_flops(total: Sequence[int], a: Sequence[int], b: Sequence[int], **kwargs: Any) -> int:
    """Of the in-place product, given by shapes; the counter knows only the other one."""
    return 2 * a[0] * a[1] * b[1]


def count_flops(model: Any, batch: Mapping[str, Tensor], variant: Variant) -> int:
    """Matrix products that a pass over the batch takes beyond the plain run's, counted while it runs."""

    def counted(run: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as counter:
            run()
        return counter.get_total_flops()

    def one_pass() -> None:
        with batch_clock(finish=False):
            estimate_curvature(
                model, [batch], variant.structure, variant.fisher, space=variant.space, progress_bar=False,
                **variant.options,
            )  # fmt: skip

    return counted(one_pass) - counted(plain_run(model, [batch]))
