"""`kalman-peft report` and `card`: what a folder holds, for people."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..belief import BELIEF_CONFIG, BELIEF_WEIGHTS, Belief
from ..lineage import LINEAGE
from .parsing import Command


_STATE, _LEARNER = "trainer_state.json", "continual.json"
_SHOWN = (
    "loss", "eval_loss", "laplace/strength", "laplace/drift", "source/loss", "source/rise", "kalman/innovation",
    "kalman/trace_p", "kalman/effective_observations",
)  # fmt: skip


@dataclass
class ReportOptions:
    """Whose report."""

    folder: str = field(metadata={"help": "Output folder of a Trainer or a ContinualLearner, or of a belief."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where report.md and figures go; the folder itself by default."}
    )
    figures: bool = field(default=True, metadata={"help": "Draw them (needs kalman_peft[plots])."})


def report(options: ReportOptions) -> None:
    """Write report.md and figures, and print the former.

    Args:
        options (`ReportOptions`): Whose.

    Raises:
        FileNotFoundError: The folder holds nothing to report.
    """
    folder = Path(options.folder)
    output = Path(options.output_dir or folder)
    parts = [make(folder, output if options.figures else None) for make in (_of_tasks, _of_training, _of_belief)]
    found = [part for part in parts if part]
    if not found:
        raise FileNotFoundError(f"{folder} holds nothing to report: no {_STATE}, {_LEARNER} or {BELIEF_CONFIG}.")
    text = "\n\n".join([f"# {folder.absolute().name}", *found]) + "\n"
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.md").write_text(text, encoding="utf-8")
    print(text)


def _of_tasks(folder: Path, pictures: Path | None) -> str:
    """Scores of every task after every task."""
    if not (folder / _LEARNER).is_file():
        return ""
    from ..continual.history import History

    history = History.from_folder(folder)
    scores, names = history.scores()
    header = ["after learning", *names]
    rows = [[label, *map(_number, row)] for label, row in zip(["start", *names], scores, strict=False)]
    metrics = [[name.replace("_", " "), _number(value)] for name, value in history.metrics().items()]
    text = f"## Tasks\n\n{table(header, rows)}\n\n{table(['over all tasks', ''], metrics)}"
    if pictures is None:
        return text
    pictures.mkdir(parents=True, exist_ok=True)
    history.plot(pictures / "tasks.png")
    return f"{text}\n\n![Score of every task after every task](tasks.png)"


def _of_training(folder: Path, pictures: Path | None) -> str:
    """First and last of what was logged."""
    state = _newest_state(folder)
    if state is None:
        return ""
    history = json.loads(state.read_text(encoding="utf-8")).get("log_history", [])
    rows = []
    for name in _SHOWN:
        seen = [(entry["step"], entry[name]) for entry in history if name in entry and "step" in entry]
        if seen:
            rows.append(
                [name, f"{_number(seen[0][1])} (step {seen[0][0]})", f"{_number(seen[-1][1])} ({seen[-1][0]})"]
            )
    if not rows:
        return ""
    text = f"## Training\n\n{table(['', 'first', 'last'], rows)}"
    if pictures is None or not any("loss" in entry or "eval_loss" in entry for entry in history):
        return text
    from ..plots import plot_training

    pictures.mkdir(parents=True, exist_ok=True)
    plot_training(history, pictures / "training.png")
    return f"{text}\n\n![Learning and keeping](training.png)"


def _newest_state(folder: Path) -> Path | None:
    from transformers.trainer_utils import get_last_checkpoint

    if (folder / _STATE).is_file() or not folder.is_dir():
        return folder / _STATE if folder.is_dir() else None
    checkpoint = get_last_checkpoint(str(folder))
    return Path(checkpoint, _STATE) if checkpoint and Path(checkpoint, _STATE).is_file() else None


def _of_belief(folder: Path, pictures: Path | None) -> str:
    """What the belief is over, and where it comes from."""
    if not (folder / BELIEF_CONFIG).is_file():
        return ""
    belief = Belief.from_pretrained(folder)
    info: Mapping[str, Any] = belief.info
    size = (folder / BELIEF_WEIGHTS).stat().st_size
    rows = [
        ["base model", str(info.get("adapter", {}).get("base_model"))],
        ["structure", f"{belief.precision.structure} in {belief.precision.space} space"],
        ["weights", str(sum(m.numel() for m in belief.mean.values()))],
        ["size", f"{size / 2**20:.1f} MiB"],
    ]
    record = info.get("curvature", {})
    rows += [[name, str(record[name])] for name in ("fisher", "num_sequences", "num_tokens") if record.get(name)]
    rows += [[f"remembers {task['name']}", f"`{task['data']}`"] for task in info.get(LINEAGE, [])]
    return f"## Belief\n\n{table(['', ''], rows)}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown.

    Args:
        header (`list[str]`): Headings.
        rows (`list[list[str]]`): Cells; all but the first are set to the right.
    """
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float) -> str:
    return "" if value != value else f"{value:.4g}"


@dataclass
class CardOptions:
    """Whose card."""

    folder: str = field(metadata={"help": "Of an adapter, with its belief."})
    results: str | None = field(default=None, metadata={"help": "Markdown file with measured results."})
    license: str | None = field(default=None, metadata={"help": "Of the adapter."})
    language: str | None = field(default=None, metadata={"help": "Of the data, such as en."})
    datasets: list[str] | None = field(default=None, metadata={"help": "Names of datasets on the Hub."})
    tags: list[str] | None = field(default=None, metadata={"help": "Further tags."})


def card(options: CardOptions) -> None:
    """Write README.md.

    Args:
        options (`CardOptions`): Whose.
    """
    from ..card import write_card_of_folder

    results = Path(options.results).read_text(encoding="utf-8") if options.results else None
    given = {name: getattr(options, name) for name in ("license", "language", "datasets", "tags")}
    path = write_card_of_folder(
        options.folder, results=results, **{name: value for name, value in given.items() if value is not None}
    )
    print(f"Wrote {path}.")


COMMANDS = {
    "report": Command(
        report,
        (ReportOptions,),
        """Tables and figures of a run's folder: losses and forgetting over the steps, the scores of every task after
every task, and what the belief is and remembers. Written to report.md beside the figures, and printed.

examples:
  kalman-peft report out
  kalman-peft report out --output_dir pages --figures false
""",
        first="folder",
    ),
    "card": Command(
        card,
        (CardOptions,),
        """Write the model card (README.md) of an adapter and its belief from what their folder records.

examples:
  kalman-peft card out --license apache-2.0 --datasets openai/gsm8k --results measured.md
""",
        first="folder",
    ),
}
