"""What a [`ContinualLearner`] writes and reads: folders that are there in full or not at all, adapters, JSON.

The first process writes. What it finds decides for all, so that no two processes take different branches.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adapters import AdapterState
from ..belief import BeliefError, tensors_fingerprint, write_atomically
from ..distributed import from_first, world


T = TypeVar("T")
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


# -- folders ---------------------------------------------------------------------------------------------------------


def fill(folder: Path, write: Callable[[Path], None]) -> None:
    """Make a folder in full, or not at all; an older one is replaced.

    Args:
        folder (`Path`): To be there afterwards.
        write (`Callable[[Path], None]`): Writes into the folder it is given; called on the first process, and what it
            raises is raised on all.
    """

    def make() -> None:
        beside = _beside(folder)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        write(beside)
        for file in beside.iterdir():  # safetensors writes for the owner only, whatever the umask
            file.chmod(beside.stat().st_mode & 0o666)
        if folder.is_dir():  # only what can be made again is ever replaced
            shutil.rmtree(folder)
        beside.rename(folder)

    from_first(make)


def discard(folder: Path) -> None:
    """Remove a folder, whole at once for whoever looks; the first process calls."""
    beside = _beside(folder)
    shutil.rmtree(beside, ignore_errors=True)
    folder.rename(beside)
    shutil.rmtree(beside)


def is_first() -> bool:
    """Whether this process writes the files."""
    return world()[0] == 0


def wait() -> None:
    """For all processes to arrive."""
    if world()[1] > 1:
        PartialState().wait_for_everyone()


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.tmp")


# -- adapters --------------------------------------------------------------------------------------------------------


def save_adapter(model: Any, folder: Path) -> str:
    """Write the adapter as PEFT does, with `modules_to_save`, and the same bytes in every process.

    Args:
        model (`PeftModel`): With one active adapter.
        folder (`Path`): Where the two files go, whatever the adapter's name.

    Returns:
        `str`: Fingerprint of what was written, see `read_adapter`.
    """
    name = AdapterState(model, warn_excluded=False).adapter_name
    model.save_pretrained(str(folder), selected_adapters=[name])
    if name != "default":
        for file in (folder / name).iterdir():
            file.rename(folder / file.name)
        (folder / name).rmdir()
    config = read_json(folder / ADAPTER_CONFIG)
    for key, value in vars(model.peft_config[name]).items():
        if isinstance(value, set):  # of which every process has an order of its own
            config[key] = sorted(value)
    write_json(folder / ADAPTER_CONFIG, config)
    return _fingerprint(folder, read_adapter(folder))


def _fingerprint(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """Of a saved adapter, tensors and configuration."""
    return link(tensors_fingerprint(tensors), (folder / ADAPTER_CONFIG).read_text())


def read_adapter(folder: Path, fingerprint: str | None = None) -> dict[str, Tensor]:
    """The tensors of a saved adapter.

    Args:
        folder (`Path`): With `adapter_model.safetensors`.
        fingerprint (`str`, *optional*): That they must have.

    Returns:
        `dict[str, Tensor]`: By PEFT's names.

    Raises:
        BeliefError: It or its configuration is missing, truncated or altered.
    """
    path = folder / ADAPTER
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise damaged(path, str(error)) from error
    read_json(folder / ADAPTER_CONFIG)
    if fingerprint is not None and _fingerprint(folder, tensors) != fingerprint:
        raise damaged(path, f"this file or {ADAPTER_CONFIG} is not what was written")
    return tensors


def load_adapter(model: Any, folder: Path, fingerprint: str | None = None) -> None:
    """Write a saved adapter into the model's, bit for bit.

    Args:
        model (`PeftModel`): With one active adapter.
        folder (`Path`): With `adapter_model.safetensors`.
        fingerprint (`str`, *optional*): See `read_adapter`.

    Raises:
        BeliefError: It is another adapter, or see `read_adapter`.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    name = AdapterState(model, warn_excluded=False).adapter_name
    tensors = read_adapter(folder, fingerprint)
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


def write_moved_adapter(source: Path, folder: Path, mean: Mapping[str, Tensor], fingerprint: str | None) -> None:
    """A saved adapter with other factors; what else it holds stays.

    Args:
        source (`Path`): Folder of the adapter.
        folder (`Path`): Where the new one goes.
        mean (`Mapping[str, Tensor]`): A and B by key.
        fingerprint (`str`, *optional*): That the adapter in `source` must have.
    """
    tensors = read_adapter(source, fingerprint)
    moved = {key: mean[key].to(t).contiguous() if key in mean else t for key, t in tensors.items()}
    save_file(moved, folder / ADAPTER, {"format": "pt"})
    shutil.copy(source / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)


# -- JSON ------------------------------------------------------------------------------------------------------------


def read_json(path: Path, *required: str) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path (`Path`): Of the file.
        *required (`str`): Keys that it must have.

    Returns:
        `dict[str, Any]`: The object.

    Raises:
        BeliefError: The file is missing or damaged.
    """
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise damaged(path, str(error)) from error
    missing = [key for key in required if key not in found] if isinstance(found, dict) else ["everything"]
    if missing:
        raise damaged(path, f"it lacks {missing[0]}")
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, atomically."""
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))


def link(*parts: str) -> str:
    """Identity of a place in a chain, from that of the place before and what is there."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def damaged(path: Path, why: str) -> BeliefError:
    """For a file of a learner that is missing, truncated or altered; with the remedy."""
    return BeliefError(f"{path} is damaged or missing ({why}). {_remedy(path.parent)}")


def with_remedy(read: Callable[[Path], T]) -> Callable[[Path], T]:
    """A reader of a learner's folders whose errors say what to do."""

    def call(folder: Path) -> T:
        try:
            return read(folder)
        except (BeliefError, FileNotFoundError) as error:
            raise BeliefError(f"{error} {_remedy(folder)}") from error

    return call


def _remedy(folder: Path) -> str:
    if folder.parent.name == "smoothed":
        return "Call smooth() again."
    if folder.parent.name == "tasks":
        return (
            f"Restore it from a copy, or remove {folder} and all later tasks with their entries in continual.json: "
            "they are then learnt again."
        )
    return "Restore it from a copy, or learn in another output_dir."
