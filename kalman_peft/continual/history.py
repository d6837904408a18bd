"""What a [`ContinualLearner`] has learnt: records, smoothed beliefs, scores; and sharing it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from ..belief import Belief, BeliefError
from ..filtering import TaskRecord, smooth_each
from ..metrics import continual_metrics
from ..plots import plot_accuracy_matrix
from .evaluation import metric_of, score_matrix
from .files import fill, with_remedy, write_moved_adapter
from .sharing import push
from .store import INDEX, Entry, Store, read_learner
from .stored import Stored, StoredByName


class History:
    """The finished tasks of a learner; its base class.

    Args:
        folder (`Path`): Of the learner.
        metric (`str`, *optional*): See [`ContinualLearner`].
    """

    rank: int | None  # of the state, if it is of low rank; set by the learner

    def __init__(self, folder: Path, metric: str | None):
        self.store, self.metric = Store(folder.absolute()), metric

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, metric: str | None = None) -> Self:
        """Read a learner's folder without its model, to smooth, measure and share what was learnt.

        Args:
            folder (`str` or `os.PathLike`): The learner's `output_dir`.
            metric (`str`, *optional*): See [`ContinualLearner`].

        Returns:
            `History`: Of the finished tasks.

        Raises:
            FileNotFoundError: There is no learner.
            BeliefError: Something is missing or damaged.
        """
        history = cls(Path(folder), metric)
        index, history.store.entries, history.store.start = read_learner(history.store.folder)
        if index is None:
            raise FileNotFoundError(f"{folder} is no folder of a ContinualLearner: it has no {INDEX}.")
        history.store.options = (
            index["options"] or index.get("kept") or {}
        )  # a copy that was not gone on from keeps them
        history.rank = history.store.options.get("rank")
        return history

    @property
    def tasks(self) -> list[Entry]:
        """The finished tasks in order: name, folder, data, num_labels, figures of the filter, scores and so on."""
        return [dict(entry) for entry in self.store.entries]

    def records(self) -> Sequence[TaskRecord]:
        """What the smoother and [`interpolate`] need of every task, each read from its folder when it is asked for.

        Where there is decay, they need `start=learner.start().mean` besides.
        """
        return Stored(
            [self.store.task(i) for i in range(len(self.store.entries))], with_remedy(TaskRecord.from_pretrained)
        )

    def smooth(self, covariance: bool = True) -> Mapping[str, Belief]:
        """The belief of every task given the data of all, also as an adapter in `smoothed/<name>/`.

        Two tasks are in memory at a time, however many there are.

        Args:
            covariance (`bool`, *optional*, defaults to `True`): Without it only means are smoothed, see [`smooth`];
                LoKO's beliefs of structure "low_rank" and "ekfac" allow no more.

        Returns:
            `Mapping[str, Belief]`: By task, each read from its folder when it is asked for.

        Raises:
            ValueError: No task is learnt yet.
            BeliefError: Covariances are asked for where only means can be smoothed, or a file is damaged.
        """
        if not self.store.entries:
            raise ValueError("No task is learnt yet; there is nothing to smooth.")
        without = [entry["name"] for entry in self.store.entries[1:] if not entry["increment"]]
        structure = self.store.options["structure"]
        if covariance and without and structure not in ("diagonal", "dense"):
            raise BeliefError(
                f"Task {without[0]!r} was learnt with LoKO, which keeps no increments, and two beliefs of structure "
                f"{structure!r} cannot be subtracted: use learner.smooth(covariance=False), which smooths the means."
            )
        names = [entry["name"] for entry in self.store.entries]
        backwards = smooth_each(self.records(), start=self.start().mean, covariance=covariance, rank=self.rank)
        with self.store.locked():
            for index, belief in backwards:

                def write(folder: Path, index: int = index, belief: Belief = belief) -> None:
                    source, mark = self.store.task(index), self.store.entries[index]["adapter"]
                    write_moved_adapter(source, folder, belief.mean, mark)
                    belief.save_pretrained(folder)

                fill(self.store.smoothed(names[index]), write)
        return StoredByName({name: self.store.smoothed(name) for name in names}, with_remedy(Belief.from_pretrained))

    def scores(self) -> tuple[np.ndarray, list[str]]:
        """R[i, j], the score on task j after i tasks, with NaN where it was not measured; and the tasks' names.

        Returns:
            `tuple[np.ndarray, list[str]]`: Shape (T + 1, T), as `kalman_peft.metrics` and `plot_accuracy_matrix` take.
        """
        return score_matrix(self._rows(), [entry["name"] for entry in self.store.entries], self._metric())

    def metrics(self) -> dict[str, float]:
        """Average and learning accuracy (or loss), forgetting, transfer; see [`continual_metrics`]."""
        return continual_metrics(self.scores()[0], not self._metric().endswith("loss"))

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """Heat map of the scores, dark is good; see [`plot_accuracy_matrix`].

        Args:
            path (`str` or `os.PathLike`, *optional*): Where to save it; the ending says in which format.

        Returns:
            `Figure`: That of matplotlib.
        """
        label = self._metric().removeprefix("eval_")
        return plot_accuracy_matrix(*self.scores(), path, label=label, higher_is_better=not label.endswith("loss"))

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the newest adapter and belief, and all tasks with their records, in one commit.

        Args:
            repo_id (`str`): Created if missing. Plain PEFT loads its adapter, `Belief.from_pretrained` its belief.
            **options: `private`, `token`, `revision`, `commit_message`.

        Returns:
            `CommitInfo`: `None` on other processes than the first.

        Raises:
            HubError: The Hub refuses or cannot be reached.
            ValueError: No task is learnt yet.
        """
        return push(self.store, repo_id, **options)

    def start(self, device: torch.device | str = "cpu") -> Belief:
        """The belief before any task.

        Args:
            device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where its tensors go.

        Returns:
            `Belief`: The prior around the adapter's start.
        """
        return with_remedy(lambda folder: Belief.from_pretrained(folder, device=device))(self.store.initial)

    def _rows(self) -> list[dict[str, dict[str, float]]]:
        """Scores before any task, and after each."""
        return [self._start_scores(), *(entry["scores"] for entry in self.store.entries)]

    def _metric(self) -> str:
        return metric_of(self._rows(), self.metric)

    def _start_scores(self) -> dict[str, dict[str, float]]:
        if not self.store.entries:
            raise ValueError("No task is learnt yet; there is nothing to measure.")
        assert self.store.start is not None
        return self.store.start["scores"]
