"""Training on rows of the source beside those of the target.

- replay: a share of the rows gives way to rows of the source, in the same number of steps.
- joint: half of them, the reference that has all data.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from ..sequences import mixed
from .options import RATE, Kind, Number, Options
from .training import Run, Trained, row_bytes


def with_source(run: Run, share: float) -> tuple[Dataset, int, dict[str, float]]:
    """Target rows of which some gave way to rows of the source.

    Args:
        run (`Run`): Target and source.
        share (`float`): Of the source, in (0, 1); at least one row. A source with fewer rows gives them several times.

    Returns:
        `tuple[Dataset, int, dict[str, float]]`: As many rows as the target has, the bytes that the source's rows take
        (each once), and how many there are.
    """
    target, source = run.job.target, run.job.source
    columns = [name for name in target.column_names if name in source.column_names]
    wanted = max(1, round(share * len(target)))
    order = source.select_columns(columns).shuffle(seed=run.job.seed)
    distinct = min(wanted, len(order))
    repeated = order.select([index % len(order) for index in range(wanted)])
    rows = mixed(target.select_columns(columns), [repeated], share, run.job.seed)
    figures = {"replay/rows": float(min(wanted, len(target) - 1)), "replay/distinct": float(distinct)}
    return rows, row_bytes(order.select(range(distinct))), figures


def _replay(run: Run, options: Options) -> list[tuple[Options, Trained]]:
    rows, extra, figures = with_source(run, options.get("share", 0.5))
    trained, _ = run.fit(run.adapt(), rows, learning_rate=options["lr"])
    trained.extra_bytes = extra
    trained.figures |= figures
    return [({}, trained)]


SHARE: dict[str, Any] = {"above": True, "high": 1.0, "below": True}
KINDS = {
    "replay": Kind({"share": Number(0.05, **SHARE)} | RATE, _replay, "share"),
    "joint": Kind(dict(RATE), _replay),
}
