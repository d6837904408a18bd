"""One task of a [`ContinualLearner`]: a [`KalmanTrainer`] under the predicted belief, and whole checkpoints."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..belief import Belief
from ..trainer import KalmanTrainer
from .store import is_first, wait


_WHOLE = "whole"  # marks a checkpoint of which nothing is missing


class TaskTrainer(KalmanTrainer):
    """A KalmanTrainer whose LoKO takes the belief as the absolute precision that it is.

    Args:
        strength (`float`, *optional*, defaults to 1.0): Factor on the penalty, which is shared out over the labels.
        figures (`Mapping[str, float]`, *optional*): For the first entry of the log.
        **kwargs: As for [`KalmanTrainer`].

    Attributes:
        num_labels (`float`): Labels that training sees at least once.

    Raises:
        ValueError: There are none.
    """

    def __init__(self, *args: Any, strength: float = 1.0, figures: Mapping[str, float] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._once = {f"filter/{name}": value for name, value in (figures or {}).items()}
        data: Any = self.train_dataset
        self.num_labels = self._count_labels(data) * min(1.0, self._sequences_in_run() / len(data))
        if self.num_labels <= 0:
            raise ValueError("The task's data have no label that counts: all are -100.")
        self.laplace_strength = 1.0 if self.args.uses_loko else strength / self.num_labels

    def _belief_options(self) -> dict[str, Any]:
        # LoKO multiplies by strength, labels and tempering: the three make 1.
        tempering = self.args.loko_tempering or (1 / self._epochs_in_run() if self._tempers else 1.0)
        return {"belief_strength": 1.0, "belief_mode": "prior", "belief_labels": 1 / tempering}

    def rows_seen(self) -> int:
        """Training sequences behind the present step, in their order."""
        return self.state.global_step * self.get_total_train_batch_size(self.args)  # type: ignore[attr-defined]

    def filter_belief(self) -> Belief:
        """That of the LoKO optimizer after training, per label; it lets go of the model."""
        assert self._kalman is not None
        self._kalman.release()
        return self._kalman.belief(self.model)

    def sample_loader(self, count: int, seed: int) -> Any:
        """Batches of so many training sequences (all, if there are fewer), drawn without replacement."""
        data: Any = self.train_dataset
        if count < len(data):
            chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count].tolist()
            data = data.select(chosen) if hasattr(data, "select") else Subset(data, chosen)
        return self._loader(data, "training")


def let_go(trainer: Any) -> None:
    """Take what accelerate has put on the model off again.

    A model that any Trainer has used, if only to evaluate, is marked as prepared, and the next Trainer would train it
    without DistributedDataParallel. And what follows must not depend on what this process has done before.

    Args:
        trainer (`Trainer`): After its work.
    """
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    model._is_accelerate_prepared = False


class WholeCheckpoints(TrainerCallback):
    """Marks checkpoints once they are whole: a kill while one is written leaves files that cannot be resumed from."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the last file of all processes.

        Not where training ends: a Trainer that resumes from its last step may take another, which a run that was not
        killed does not.
        """
        wait()
        if is_first() and not control.should_training_stop:
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            if folder.is_dir():  # save_total_limit may have taken it
                (folder / _WHOLE).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; others are removed.

    Args:
        folder (`Path`): The Trainer's output folder.

    Returns:
        `Path` or `None`: Of the checkpoint.
    """
    found = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    whole = [path for path in found if (path / _WHOLE).exists()]
    wait()
    if is_first():
        for path in found:
            if path not in whole:
                shutil.rmtree(path)
    wait()
    return whole[-1] if whole else None
