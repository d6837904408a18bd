"""Before/after tables of evaluations (of the shape given in `recipe_tools.report`), for consoles and model cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


# Rows of the table by group: metric, heading, whether more is better.
TABLE_METRICS = {
    "target": (
        ("loss", "loss (nats/token)", False),
        ("forced_accuracy", "answer right, solution given", True),
        ("accuracy", "answer right, generated", True),
    ),
    "sources": (("loss", "loss (nats/token)", False), ("kl", "KL from base (nats/token)", False)),
    "choices": (("accuracy", "accuracy", True), ("accuracy_norm", "accuracy, normalised", True)),
}


def table(
    before: Mapping[str, Any], after: Mapping[str, Mapping[str, Any]], *, title: str = "Before and after"
) -> Table:
    """Lay out evaluations for the console: one row per metric, one column per method with its change.

    Args:
        before (`Mapping[str, Any]`): Evaluation of the base model.
        after (`Mapping[str, Mapping[str, Any]]`): Evaluation by method.
        title (`str`, *optional*): Heading.

    Returns:
        `Table`: For `rich.print`.
    """
    result = Table(title=title)
    result.add_column("metric")
    for heading in ("base", *after):
        result.add_column(heading, justify="right")
    for name, cells in _table_rows(before, after):
        coloured = (f"{text} [{'green' if good else 'red'}]({delta})[/]" for text, delta, good in cells[1:])
        result.add_row(name, cells[0][0], *coloured)
    return result


def markdown_table(before: Mapping[str, Any], after: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out the same rows as [`table`] in GitHub's Markdown, for model cards.

    Args:
        before (`Mapping[str, Any]`): Evaluation of the base model.
        after (`Mapping[str, Mapping[str, Any]]`): Evaluation by method.

    Returns:
        `str`: The table, ending with a newline.
    """
    rows = [
        [name, cells[0][0], *(f"{text} ({delta})" for text, delta, _ in cells[1:])]
        for name, cells in _table_rows(before, after)
    ]
    return markdown(["metric", "base", *after], rows)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's Markdown, ending with a newline; all columns but the first are set to the right.

    Args:
        headings (`Sequence[str]`): Of the columns.
        rows (`Sequence[Sequence[str]]`): Cells.

    Returns:
        `str`: Several lines.
    """
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def console_table(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str, caption: str) -> Table:
    """The same table for `rich.print`.

    Args:
        headings (`Sequence[str]`): Of the columns.
        rows (`Sequence[Sequence[str]]`): Cells.
        title (`str`): Heading.
        caption (`str`): Below the table.

    Returns:
        `Table`: For the console.
    """
    table = Table(title=title, caption=caption)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _table_rows(
    before: Mapping[str, Any], after: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Return rows of (name, cells), cells of (value, signed change, whether that change is not a loss)."""
    rows = []
    for group, metrics in TABLE_METRICS.items():
        evaluations = [evaluation.get(group, {}) for evaluation in (before, *after.values())]
        if group == "target":
            evaluations = [{"target": evaluation} for evaluation in evaluations]
        for name in evaluations[0]:
            for metric, heading, more_is_better in metrics:
                base, *tuned = (evaluation.get(name, {}).get(metric) for evaluation in evaluations)
                if not tuned or None in tuned:
                    continue
                # The base model's divergence from itself is not measured: it is zero.
                base = base or 0.0
                cells = [(f"{base:.3f}", "", True)]
                for value in tuned:
                    change = value - base
                    cells.append((f"{value:.3f}", f"{change:+.3f}", change >= 0 if more_is_better else change <= 0))
                rows.append((f"{name}: {heading}", cells))
    return rows
