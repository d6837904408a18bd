"""Figures, with matplotlib (`pip install kalman_peft[plots]`), which is imported when one is drawn."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .metrics import Matrix, check_matrix


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_accuracy_matrix(
    scores: Matrix,
    names: Sequence[str],
    path: str | os.PathLike | None = None,
    *,
    label: str = "accuracy",
    higher_is_better: bool = True,
) -> "Figure":
    """Heat map of the scores on every task (columns) after every task (rows); tasks that are yet to come are hatched.

    Args:
        scores (`np.ndarray`): R, shape (T + 1, tasks), see `kalman_peft.metrics`; NaN stays blank.
        names (`Sequence[str]`): Of the tasks, one per column.
        path (`str` or `os.PathLike`, *optional*): Where to save it; the ending says in which format.
        label (`str`, *optional*, defaults to `"accuracy"`): Of the scores.
        higher_is_better (`bool`, *optional*, defaults to `True`): False for losses: dark stays good.

    Returns:
        `Figure`: That of matplotlib.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: Not as many names as columns.
    """
    mpl, figure_class, canvas_class = _matplotlib()
    matrix = check_matrix(scores)
    rows, columns = matrix.shape
    if len(names) != columns:
        raise ValueError(f"names has {len(names)} entries for {columns} columns of scores.")
    with mpl.rc_context({"font.size": 10, "axes.titlelocation": "left"}):
        figure = figure_class(figsize=(2.2 + 0.62 * columns, 1.5 + 0.42 * rows), layout="constrained")
        canvas_class(figure)
        axes = figure.add_subplot()
        image = axes.imshow(matrix, cmap="Blues" if higher_is_better else "Blues_r", aspect="auto")
        middle = sum(image.get_clim()) / 2
        for i in range(rows):
            for j in range(columns):
                if j >= i:
                    axes.add_patch(_hatched(mpl, i, j))
                if matrix[i, j] == matrix[i, j]:
                    dark = (matrix[i, j] > middle) == higher_is_better
                    axes.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=8,
                              color="white" if dark else "black")  # fmt: skip
        axes.set_xticks(range(columns), names, rotation=45, ha="right")
        axes.set_yticks(range(rows), ["start", *names[: rows - 1]])
        axes.set_xlabel("score on task")
        axes.set_ylabel("after learning")
        figure.colorbar(image, label=label)
        if path is not None:
            figure.savefig(path, dpi=150)
    return figure


def plot_training(
    history: Sequence[Mapping[str, Any]], path: str | os.PathLike | None = None, *, title: str = "Learning and keeping"
) -> "Figure":
    """Training loss, and what was measured or predicted of forgetting, over the steps.

    Args:
        history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`, or that of trainer_state.json.
        path (`str` or `os.PathLike`, *optional*): Where to save it; the ending says in which format.
        title (`str`, *optional*): Heading.

    Returns:
        `Figure`: That of matplotlib.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The history holds no losses.
    """
    mpl, figure_class, canvas_class = _matplotlib()
    learning = {name: _series(history, name) for name in ("loss", "eval_loss")}
    keeping = {name: _series(history, name) for name in ("source/rise", "laplace/drift", "laplace/penalty")}
    keeping = {name: series for name, series in keeping.items() if series[0]}
    if not learning["loss"][0] and not learning["eval_loss"][0]:
        raise ValueError("history holds no losses; was anything logged (logging_steps)?")
    panels = [("loss (nats/token)", learning)] + ([("forgetting (nats/token)", keeping)] if keeping else [])
    with mpl.rc_context({"font.size": 10, "axes.titlelocation": "left", "legend.frameon": False}):
        figure = figure_class(figsize=(4.4 * len(panels), 3.2), layout="constrained")
        canvas_class(figure)
        for axes, (label, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for name, (steps, values) in curves.items():
                if steps:
                    axes.plot(steps, values, marker="." if len(steps) < 40 else None, label=name)
            axes.set_xlabel("step")
            axes.set_ylabel(label)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend()
        figure.suptitle(title)
        if path is not None:
            figure.savefig(path, dpi=150)
    return figure


def _series(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(entry["step"], entry[name]) for entry in history if name in entry and "step" in entry]
    return [step for step, _ in found], [value for _, value in found]


def _hatched(mpl: Any, row: int, column: int) -> Any:
    return mpl.patches.Rectangle(
        (column - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", edgecolor="#BBBBBB", linewidth=0
    )


def _matplotlib() -> tuple[Any, Any, Any]:
    try:
        import matplotlib as mpl
        import matplotlib.patches
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install kalman_peft[plots].") from error
    return mpl, Figure, FigureCanvasAgg
