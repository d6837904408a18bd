"""What a task leaves for the smoother, in memory and in files.

Beside the belief's own two files lies `task_record.safetensors`: the task's increment, its transition and its name,
with the fingerprint of the belief that they belong to.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..belief import Belief, BeliefError, tensors_fingerprint, write_atomically
from ..precision import Precision, precision_from_tensors
from .transition import Transition


TASK_RECORD = "task_record.safetensors"
_FORMAT = 1


@dataclass
class TaskRecord:
    """One task of a filter.

    Args:
        name (`str`): Of the task.
        belief (`Belief`): Filtered state, after the task's data.
        transition (`Transition`): Motion from the task before (from the first belief, for the first task) to this one.
        increment (`Precision`, *optional*):
            What the task's data added, from [`increment_of`]; a filter that carries its own precision, such as LoKO,
            has none.
        info (`dict`, *optional*): Anything of the caller's, JSON-serialisable.
    """

    name: str
    belief: Belief
    transition: Transition = field(default_factory=Transition)
    increment: Precision | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.increment is None:
            return
        mine, theirs = self.belief.precision, self.increment
        if (mine.structure, mine.coordinates()) != (theirs.structure, theirs.coordinates()):
            raise BeliefError(
                f"The increment of task {self.name!r} has structure {theirs.structure!r} or other weights than its "
                f"belief ({mine.structure!r}); make it with increment_of(belief, curvature, num_labels)."
            )

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the belief's files and `task_record.safetensors`, each atomically, bit for bit.

        Args:
            save_directory (`str` or `os.PathLike`): Created if missing.

        Raises:
            BeliefError: The belief or the increment contains NaN or Inf.
        """
        motion, noise = self.transition.describe()
        tensors = {f"noise/{key}": q for key, q in noise.items()}
        if self.increment is not None:
            tensors |= {f"increment/{key}": t for key, t in self.increment.tensors().items()}
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        bad = [name for name, t in tensors.items() if not torch.isfinite(t).all()]
        if bad:
            raise BeliefError(f"The record of task {self.name!r} contains NaN or Inf ({bad[0]}) and is not written.")
        record = {
            "format": _FORMAT,
            "name": self.name,
            "transition": motion,
            "increment": None if self.increment is None else self.increment.structure,
            "belief_fingerprint": self.belief.fingerprint(),
            "fingerprint": tensors_fingerprint(tensors),
            "info": self.info,
        }
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record)
        # The record first: a folder with a belief of its own fingerprint is complete.
        write_atomically(folder / TASK_RECORD, lambda p: save_file(tensors, p, {"record": text}))
        self.belief.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, device: torch.device | str = "cpu") -> Self:
        """Read what `save_pretrained` has written.

        Args:
            folder (`str` or `os.PathLike`): With the three files.
            device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where the tensors go.

        Returns:
            `TaskRecord`: As saved.

        Raises:
            FileNotFoundError: A file is missing.
            BeliefError: A file is damaged, of an unknown format, or belongs to another belief.
        """
        path = Path(folder) / TASK_RECORD
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {TASK_RECORD}; was the task learnt with a filter?")
        record, tensors = _read(path, device)
        belief = Belief.from_pretrained(folder, device=device)
        if record["belief_fingerprint"] != belief.fingerprint():
            raise BeliefError(f"{path} belongs to another belief than the one beside it; learn the task again.")
        noise = _under("noise/", tensors)
        increment = None
        try:
            if record["increment"] is not None:
                increment = precision_from_tensors(record["increment"], "adapter", _under("increment/", tensors))
            transition = Transition.from_description(record["transition"], noise)
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            raise BeliefError(f"{path} holds no complete record: {error}") from error
        return cls(record["name"], belief, transition, increment, record["info"])


def _read(path: Path, device: torch.device | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            text = (file.metadata() or {}).get("record", "")
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        record = json.loads(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise BeliefError(f"{path} cannot be read; it is truncated or no task record ({error}).") from error
    if record.get("format") != _FORMAT:
        raise BeliefError(f"{path} has format {record.get('format')}; this version reads {_FORMAT}.")
    if record["fingerprint"] != tensors_fingerprint(tensors):
        raise BeliefError(f"{path} was altered: its tensors do not have the fingerprint it states.")
    return record, tensors


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
