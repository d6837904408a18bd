"""One task of a [`ContinualLearner`]: a [`KalmanTrainer`] under the predicted belief, and whole checkpoints."""

import json
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..belief import Belief
from ..distributed import from_first
from ..trainer import KalmanTrainer
from .files import is_first, wait, write_json


logger = logging.get_logger(__name__)

_WHOLE = "whole.json"  # marks a checkpoint of which nothing is missing, and tells sizes and checksums of its files


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
        batch = self.get_total_train_batch_size(self.args)  # type: ignore[attr-defined]
        batch //= self.args.gradient_accumulation_steps
        if self.args.dataloader_drop_last and len(data) < batch:
            raise ValueError(
                f"dataloader_drop_last=True leaves nothing of {len(data)} sequences, fewer than a batch of {batch}; "
                "set it to False, or a smaller batch."
            )
        if self.num_labels <= 0:
            raise ValueError("The task's data have no label that counts: all are -100.")
        self.laplace_strength = 1.0 if self.args.uses_loko else strength / self.num_labels

    def _count_labels(self, rows: Any) -> int:
        try:
            return super()._count_labels(rows)
        except KeyError as error:
            if error.args != ("labels",):
                raise
            raise ValueError(
                "The task's batches have no `labels`, which the filter counts; give the data a column `labels`, or a "
                "data_collator that makes them."
            ) from error

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
                write_json(folder / _WHOLE, _checksums(folder))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; others are removed.

    Args:
        folder (`Path`): The Trainer's output folder.

    Returns:
        `Path` or `None`: Of the checkpoint, the same on all processes.
    """

    def find() -> str | None:
        whole: dict[int, Path] = {}
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            step = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
            if step is None or not path.is_dir():
                continue
            if _is_whole(path):
                whole[int(step[1])] = path
            else:
                shutil.rmtree(path)
        return str(whole[max(whole)]) if whole else None

    found = from_first(find)
    return None if found is None else Path(found)


def _is_whole(checkpoint: Path) -> bool:
    marker = checkpoint / _WHOLE
    if not marker.exists():
        return False  # a kill
    try:
        expected = json.loads(marker.read_text())
    except ValueError:
        expected = {}
    found = _checksums(checkpoint)
    wrong = [name for name, size in expected.items() if found.get(name) != size] if expected else [_WHOLE]
    if wrong:
        logger.warning(f"{checkpoint / wrong[0]} is damaged or missing; the checkpoint is thrown away.")
    return not wrong


def _checksums(folder: Path) -> dict[str, str]:
    """Size and CRC-32 of all files but the marker: a power cut may leave zeros of the right size."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _WHOLE)
    return {path.relative_to(folder).as_posix(): _checksum(path) for path in files if path.suffix != ".tmp"}


def _checksum(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            value = zlib.crc32(part, value)
    return f"{path.stat().st_size}-{value:08x}"
