"""A learner on the Hub: all tasks in one commit, the newest adapter and belief at the root, and back into a folder."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..hub import explained
from .store import INDEX, Store, is_first, read_json, wait, write_json


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


_PARTS = ("initial", "tasks")
_KEPT = ("structure", "rank", "prior_precision")


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
    from huggingface_hub import CommitOperationAdd, HfApi

    if not store.entries:
        raise ValueError("No task is learnt yet; there is nothing to push.")
    if not is_first():
        return None
    files = {INDEX: store.folder / INDEX}
    for part in (*_PARTS, "smoothed"):
        found = (path for path in (store.folder / part).rglob("*") if path.is_file())
        files |= {path.relative_to(store.folder).as_posix(): path for path in found}
    newest = (path for path in store.last().iterdir() if path.name.startswith(("adapter_", "belief")))
    files |= {path.name: path for path in newest}
    api = HfApi(token=token, library_name="kalman_peft", library_version=__version__)
    with explained(f"push the learner to {repo_id!r}", revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(name, path) for name, path in sorted(files.items())],
            commit_message=commit_message or f"Upload {len(store.entries)} tasks",
            revision=revision,
        )


def fetch(
    pretrained: str | os.PathLike, folder: Path, *, revision: str | None, token: str | bool | None
) -> dict[str, Any]:
    """Copy a learner into `folder`, unless one is there.

    Args:
        pretrained (`str` or `os.PathLike`): Folder, or repository id.
        folder (`Path`): Of the learner that goes on.
        revision (`str`, *optional*): Of the repository.
        token (`str` or `bool`, *optional*): For private repositories.

    Returns:
        `dict[str, Any]`: Options that cannot change any more.

    Raises:
        FileNotFoundError: There is no learner in that place.
    """
    source = Path(pretrained)
    if is_first() and not (folder / INDEX).is_file():
        with tempfile.TemporaryDirectory() as temporary:
            if not source.is_dir():
                source = _download(str(pretrained), Path(temporary), revision, token)
            if not (source / INDEX).is_file():
                raise FileNotFoundError(f"{pretrained} has no {INDEX}; was it made by a ContinualLearner?")
            index = read_json(source / INDEX)
            for part in _PARTS:
                shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
        # The index last, without options: those of the runs to come are taken up by the constructor.
        kept = {name: index["options"][name] for name in _KEPT}
        write_json(folder / INDEX, index | {"options": None, "kept": kept})
    wait()
    found = read_json(folder / INDEX)
    options = found["kept"] if found["options"] is None else found["options"]
    return {name: options[name] for name in _KEPT}


def _download(repo_id: str, folder: Path, revision: str | None, token: str | bool | None) -> Path:
    from huggingface_hub import snapshot_download

    with explained(f"load a learner from {repo_id!r}, which is no local folder", revision):
        found = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            allow_patterns=[INDEX, *(f"{part}/*" for part in _PARTS)],
            library_name="kalman_peft",
            library_version=__version__,
            local_dir=folder,
        )
    return Path(found)
