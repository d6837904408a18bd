"""The folder of a [`ContinualLearner`]: which tasks are done, and files that a kill at any point leaves whole.

```
continual.json            options, and the finished tasks in order
initial/                  the adapter's start and the prior belief
tasks/000-name/           adapter, belief, record (increment and transition), task.json
work/001-name/            of the task being learnt: checkpoints, mode/
smoothed/name/            adapter and belief given the data of all tasks
```

A folder is filled beside its place and renamed: it is there in full or not at all. What `continual.json` lacks after a
kill, the folders of the tasks tell.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adapters import AdapterState
from ..belief import BeliefError, write_atomically
from ..distributed import world


INDEX, TASK_FILE, START_FILE = "continual.json", "task.json", "start.json"
ADAPTER = "adapter_model.safetensors"
_FORMAT = 1
_NAME = re.compile(r"[^\W_][\w .+=@-]*")
Entry = dict[str, Any]


class Store:
    """Files of a learner. The first process writes, all read.

    Args:
        folder (`Path`): The learner's.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: list[Entry] = []
        self.options: dict[str, Any] = {}

    @property
    def initial(self) -> Path:
        """Folder of the start."""
        return self.folder / "initial"

    def task(self, index: int) -> Path:
        """Folder of a finished task."""
        return self.folder / "tasks" / self.entries[index]["folder"]

    def last(self) -> Path:
        """Folder of the newest task, or of the start."""
        return self.task(-1) if self.entries else self.initial

    def work(self, index: int, name: str) -> Path:
        """Folder of the task being learnt."""
        return self.folder / "work" / folder_name(index, name)

    def smoothed(self, name: str) -> Path:
        """Folder of a smoothed task."""
        return self.folder / "smoothed" / name

    def open(self, options: dict[str, Any]) -> None:
        """Read what is there, or begin; complete the index after a kill.

        Args:
            options (`dict[str, Any]`): Of the learner, JSON-serialisable.

        Raises:
            ValueError: The folder was begun with other options.
            BeliefError: Its index is damaged.
        """
        path = self.folder / INDEX
        if path.is_file():
            found = read_json(path)
            if found.get("format") != _FORMAT:
                raise BeliefError(f"{path} has format {found.get('format')}; this version reads {_FORMAT}.")
            if found["options"] is not None:  # None: a copy that goes on, see `sharing.fetch`
                check_options(self.folder, found["options"], options)
            self.entries = found["tasks"]
        self.options = options
        while found := sorted((self.folder / "tasks").glob(f"{len(self.entries):03d}-*/{TASK_FILE}")):
            self.entries.append(read_json(found[0]))
        self.write_index()

    def add(self, entry: Entry) -> None:
        """Take up a task whose folder is in place."""
        self.entries.append(entry)
        self.write_index()
        if is_first():
            shutil.rmtree(self.work(entry["index"], entry["name"]), ignore_errors=True)
        wait()

    def write_index(self) -> None:
        """Write `continual.json`."""
        if is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / INDEX, {"format": _FORMAT, "options": self.options, "tasks": self.entries})
        wait()


def check_name(name: Any) -> str:
    """The name of a task, which is also that of a folder.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith((" ", ".")) or len(name) > 100:
        raise ValueError(
            f"A task's name becomes a folder's: it must be 1 to 100 letters, digits and ' ._+=@-', beginning with a "
            f"letter or digit, got {name!r}."
        )
    return name


def folder_name(index: int, name: str) -> str:
    """Of a task."""
    return f"{index:03d}-{name}"


def check_options(folder: Path, found: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ValueError unless a folder was begun with these options."""
    given = json.loads(json.dumps(given))
    changed = [k for k in {**found, **given} if found.get(k) != given.get(k)]
    if changed:
        listed = "; ".join(f"{k}={given.get(k)!r}, was {found.get(k)!r}" for k in changed[:4])
        raise ValueError(
            f"{folder} was begun with other options: {listed}. Give the same, or another output_dir; "
            "ContinualLearner.from_pretrained goes on from a copy with new ones."
        )


def fill(folder: Path, write: Callable[[Path], None]) -> None:
    """Make a folder in full, or not at all; an older one is replaced.

    Args:
        folder (`Path`): To be there afterwards.
        write (`Callable[[Path], None]`): Writes into the folder it is given.
    """
    if is_first():
        beside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        write(beside)
        if folder.is_dir():  # only what can be made again is ever replaced
            shutil.rmtree(folder)
        beside.rename(folder)
    wait()


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter as PEFT does, with `modules_to_save`.

    Args:
        model (`PeftModel`): With one active adapter.
        folder (`Path`): Where the two files go, whatever the adapter's name.
    """
    name = AdapterState(model, warn_excluded=False).adapter_name
    model.save_pretrained(str(folder), selected_adapters=[name])
    if name != "default":
        for file in (folder / name).iterdir():
            file.rename(folder / file.name)
        (folder / name).rmdir()


def load_adapter(model: Any, folder: Path) -> None:
    """Write a saved adapter into the model's, bit for bit.

    Args:
        model (`PeftModel`): With one active adapter.
        folder (`Path`): With `adapter_model.safetensors`.

    Raises:
        BeliefError: It is another adapter.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    name = AdapterState(model, warn_excluded=False).adapter_name
    tensors = load_file(folder / ADAPTER)
    own = {key: t.shape for key, t in get_peft_model_state_dict(model, adapter_name=name).items()}
    if own != {key: t.shape for key, t in tensors.items()}:
        differing = sorted(
            k for k in own.keys() | tensors.keys() if k not in tensors or own.get(k) != tensors[k].shape
        )
        raise BeliefError(
            f"The adapter in {folder} is another than the model's: they differ at {differing[:2]} ({len(differing)} "
            "in all). Use the LoraConfig that the learner was begun with."
        )
    set_peft_model_state_dict(model, tensors, adapter_name=name)


def write_moved_adapter(source: Path, folder: Path, mean: Mapping[str, Tensor]) -> None:
    """A saved adapter with other factors; what else it holds stays.

    Args:
        source (`Path`): Folder of the adapter.
        folder (`Path`): Where the new one goes.
        mean (`Mapping[str, Tensor]`): A and B by key.
    """
    tensors = load_file(source / ADAPTER)
    moved = {key: mean[key].to(t).contiguous() if key in mean else t for key, t in tensors.items()}
    save_file(moved, folder / ADAPTER, {"format": "pt"})
    for file in source.glob("adapter_config.json"):
        shutil.copy(file, folder / file.name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        BeliefError: The file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise BeliefError(f"{path} is damaged ({error}).") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, atomically."""
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))


def is_first() -> bool:
    """Whether this process writes the files."""
    return world()[0] == 0


def wait() -> None:
    """For all processes to arrive."""
    if world()[1] > 1:
        PartialState().wait_for_everyone()
