"""A learner on the Hub: all tasks in one commit, the newest adapter and belief at the root, and back into a folder."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .. import __version__
from ..belief import BELIEF_CONFIG, BELIEF_WEIGHTS, tensors_fingerprint
from ..distributed import from_first
from ..filtering import Transition
from ..hub import explained
from ..lineage import LINEAGE
from .files import ADAPTER, ADAPTER_CONFIG, damaged, is_first, read_adapter, read_json, write_json
from .store import INDEX, NOISE, ORIGIN, START_FILE, Store, holds_learner, read_learner


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


_PARTS = ("initial", "tasks")
_FIXED = ("structure", "rank", "prior_precision")
_MOTION = ("process_noise", "decay", "noise_fingerprint")


def push(
    store: Store,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> "CommitInfo | None":
    """See [`ContinualLearner.push_to_hub`]."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if not store.entries:
        raise ValueError("No task is learnt yet; there is nothing to push.")
    if not is_first():
        return None
    files = _files(store)
    api = HfApi(token=token, library_name="kalman_peft", library_version=__version__)
    with explained(f"push the learner to {repo_id!r}", revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # What an earlier learner left there would be mixed with this one.
        there = api.list_repo_files(repo_id, revision=revision)
        parts = (*(f"{part}/" for part in (*_PARTS, "smoothed")), NOISE)
        gone = [name for name in there if name.startswith(parts) and name not in files]
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in sorted(files.items())),
                *(CommitOperationDelete(name) for name in sorted(gone)),
            ],
            commit_message=commit_message or f"Upload {len(store.entries)} tasks",
            revision=revision,
        )


def _files(store: Store) -> dict[str, Path]:
    """What is pushed, by its name there: of this learner's tasks only, and nothing that a kill has left."""
    folders = [store.initial, *(store.task(i) for i in range(len(store.entries)))]
    folders += [folder for entry in store.entries if _is_current(folder := store.smoothed(entry["name"]), store)]
    found = [store.folder / INDEX, *(path for folder in folders for path in folder.glob("*"))]
    if store.options["noise_fingerprint"] is not None:
        found.append(store.folder / NOISE)
    files = {path.relative_to(store.folder).as_posix(): path for path in found if path.name[0] != "."}
    return files | {name: store.task(-1) / name for name in (ADAPTER, ADAPTER_CONFIG, BELIEF_WEIGHTS, BELIEF_CONFIG)}


def _is_current(folder: Path, store: Store) -> bool:
    """Whether a smoothed belief knows all tasks: those that were smoothed before the last one was learnt do not."""
    if not (folder / BELIEF_CONFIG).is_file():
        return False
    lineages = [read_json(place / BELIEF_CONFIG).get(LINEAGE) for place in (folder, store.task(-1))]
    return lineages[0] == lineages[1]


def fetch(
    pretrained: str | os.PathLike, folder: Path, *, revision: str | None, token: str | bool | None
) -> tuple[dict[str, Any], Transition]:
    """Copy a learner into `folder`, unless a copy of it is there.

    Args:
        pretrained (`str` or `os.PathLike`): Folder, or repository id.
        folder (`Path`): Of the learner that goes on.
        revision (`str`, *optional*): Of the repository.
        token (`str` or `bool`, *optional*): For private repositories.

    Returns:
        tuple: Options that cannot change any more, by name; and the motion between tasks.

    Raises:
        FileNotFoundError: There is no learner in that place.
        ValueError: The folder holds a learner that was not begun from that one.
        BeliefError: A file of either is damaged or missing.
    """

    def copy() -> tuple[dict[str, Any], dict[str, Tensor]]:
        with tempfile.TemporaryDirectory() as temporary:
            source = Path(pretrained)
            if source.is_dir() and folder.is_dir() and source.samefile(folder):
                pass  # goes on in its place
            elif holds_learner(folder) and not _cut_short(folder):
                _check_origin(pretrained, folder, revision, token, Path(temporary))
            else:
                source = _local(pretrained, Path(temporary), revision, token)
                _copy(source, folder, {"pretrained": str(pretrained), "revision": revision})
        index = read_json(folder / INDEX, "options")
        options = index["kept"] if index["options"] is None else index["options"]
        return options, _noise(folder, options)

    options, noise = from_first(copy)
    return {name: options[name] for name in _FIXED}, Transition.from_description(options, noise)


def saved_in_full(folder: Path) -> bool:
    """Whether a saved adapter is in float32, as PEFT makes adapters of half-precision models unless it is told not to.

    Raises:
        BeliefError: A file of the adapter is damaged or missing.
    """
    read_json(folder / ADAPTER_CONFIG, "peft_type")
    tensors = read_adapter(folder, read_json(folder / START_FILE, "adapter")["adapter"])
    return not any(t.element_size() < 4 for t in tensors.values() if t.is_floating_point())


def _local(pretrained: str | os.PathLike, temporary: Path, revision: str | None, token: str | bool | None) -> Path:
    """The source's folder, downloaded if it is none."""
    source = Path(pretrained)
    if not source.is_dir():
        if source.is_absolute() or source.exists() or str(pretrained).startswith("."):
            raise FileNotFoundError(f"{pretrained} is no folder; give a learner's output_dir, or a repository's id.")
        source = _download(str(pretrained), temporary, revision, token)
    if not (source / INDEX).is_file() or not (source / "initial").is_dir():
        raise FileNotFoundError(
            f"{pretrained} has no {INDEX} with initial/; was it made by a ContinualLearner that has learnt a task?"
        )
    return source


def _copy(source: Path, folder: Path, origin: dict[str, Any]) -> None:
    index, entries, start = read_learner(source)
    assert index is not None and start is not None
    chain = entries[-1]["chain"] if entries else start["chain"]
    options = index["kept"] if index["options"] is None else index["options"]
    noise = _noise(source, options)
    folder.mkdir(parents=True, exist_ok=True)
    for part in _PARTS:  # of a copy that was cut short
        if (folder / part).exists():
            shutil.rmtree(folder / part)
    (folder / INDEX).unlink(missing_ok=True)
    write_json(folder / ORIGIN, origin | {"chain": chain, "complete": False})
    for name in ("initial", *(f"tasks/{entry['folder']}" for entry in entries)):
        (folder / name).mkdir(parents=True)
        for file in source.joinpath(name).iterdir():  # contents alone: a read-only source makes no read-only copy
            shutil.copyfile(file, folder / name / file.name)
    if noise:
        shutil.copy(source / NOISE, folder / NOISE)
    # The index last, without options: those of the runs to come are taken up by the constructor.
    kept = {name: options[name] for name in (*_FIXED, *_MOTION)}
    write_json(folder / INDEX, {"format": index["format"], "options": None, "tasks": entries, "kept": kept})
    write_json(folder / ORIGIN, origin | {"chain": chain, "complete": True})


def _cut_short(folder: Path) -> bool:
    """Whether a kill has left a copy without its index."""
    if (folder / INDEX).exists() or not (folder / ORIGIN).exists():
        return False
    return not read_json(folder / ORIGIN, "complete")["complete"]


def _check_origin(
    pretrained: str | os.PathLike, folder: Path, revision: str | None, token: str | bool | None, temporary: Path
) -> None:
    """See that the learner in `folder` was begun from this one."""
    foreign = ValueError(
        f"output_dir={str(folder)!r} holds a learner that was not begun from {str(pretrained)!r}; give another one."
    )
    if not (folder / ORIGIN).exists():
        raise foreign
    origin = read_json(folder / ORIGIN, "pretrained", "revision", "chain")
    same_name = (origin["pretrained"], origin["revision"]) == (str(pretrained), revision)
    if same_name and not Path(pretrained).is_dir():
        return  # a repository, which may have moved on, or cannot be reached now
    _, entries, start = read_learner(_local(pretrained, temporary, revision, token))
    if origin["chain"] not in {entry["chain"] for entry in [*entries, start or {"chain": None}]}:
        raise foreign


def _noise(folder: Path, options: dict[str, Any]) -> dict[str, Tensor]:
    """Process noise that was given as tensors."""
    if options["noise_fingerprint"] is None:
        return {}
    try:
        tensors = load_file(folder / NOISE)
    except (SafetensorError, OSError) as error:
        raise damaged(folder / NOISE, str(error)) from error
    if tensors_fingerprint(tensors) != options["noise_fingerprint"]:
        raise damaged(folder / NOISE, "its tensors are not those that were written")
    return tensors


def _download(repo_id: str, folder: Path, revision: str | None, token: str | bool | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    with explained(f"load a learner from {repo_id!r}, which is no local folder", revision):
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise FileNotFoundError(f"{repo_id!r} is no folder, and no repository's id either: {error}") from error
        found = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            allow_patterns=[INDEX, NOISE, *(f"{part}/*" for part in _PARTS)],
            library_name="kalman_peft",
            library_version=__version__,
            local_dir=folder,
        )
    return Path(found)
