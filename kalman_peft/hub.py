"""The Hub side of a belief: two files go up in one commit and come down from one; errors say what to do."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .belief import BELIEF_CONFIG, BELIEF_WEIGHTS, Belief, BeliefError
from .distributed import world


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class HubError(OSError):
    """The Hub refused a belief or cannot be reached; the message names the remedy, `__cause__` is the Hub's own."""


def push_belief(
    belief: Belief,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> "CommitInfo | None":
    """See [`Belief.push_to_hub`]."""
    from huggingface_hub import CommitOperationAdd, HfApi

    if create_pr and revision is not None:
        raise ValueError(f"create_pr=True opens a pull request on the main branch; leave out revision={revision!r}.")
    if world()[0] != 0:
        return None
    api = HfApi(token=token, library_name="kalman_peft", library_version=__version__)
    with tempfile.TemporaryDirectory() as folder, explained(f"push the belief to {repo_id!r}", revision):
        belief.save_pretrained(folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.create_commit(
            repo_id,
            [
                CommitOperationAdd(f"{subfolder}/{name}" if subfolder else name, Path(folder) / name)
                for name in (BELIEF_WEIGHTS, BELIEF_CONFIG)
            ],
            commit_message=commit_message or "Upload belief",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def download_belief(repo_id: str, *, revision: str | None, subfolder: str | None, **options: Any) -> tuple[Path, Path]:
    """The two files of a belief in the local cache, both of one commit.

    Args:
        repo_id (`str`): Repository on the Hub.
        revision (`str`, *optional*): Branch, tag or commit.
        subfolder (`str`, *optional*): Folder inside the repository.
        **options: Of `huggingface_hub.hf_hub_download`: `token`, `cache_dir`, `force_download`, `local_files_only`.

    Returns:
        `tuple[Path, Path]`: Of `belief.safetensors` and `belief_config.json`.

    Raises:
        FileNotFoundError: The repository has no belief, or `repo_id` names neither a folder nor a repository.
        HubError: The repository or the revision does not exist, may not be read, or the Hub cannot be reached.
        BeliefError: A file arrived shorter or longer than the Hub has it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError

    options |= {"subfolder": subfolder, "library_name": "kalman_peft", "library_version": __version__}
    try:
        with explained(f"load a belief from {repo_id!r}, which is no local folder", revision):
            config = Path(hf_hub_download(repo_id, BELIEF_CONFIG, revision=revision, **options))
            # A push between the two downloads must not give files of two beliefs: the cache names the commit.
            commit = config.parents[len(Path(subfolder or "").parts)].name
            weights = Path(hf_hub_download(repo_id, BELIEF_WEIGHTS, revision=commit, **options))
    except HFValidationError as error:
        raise FileNotFoundError(f"{repo_id!r} is neither a folder nor the id of a repository ({error})") from error
    except RemoteEntryNotFoundError as error:
        where = f"{repo_id}/{subfolder}" if subfolder else repo_id
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"{where} has no {BELIEF_WEIGHTS} and {BELIEF_CONFIG}{at}; was the adapter trained with kalman_peft? "
            "A belief in another folder or branch needs `subfolder=` or `revision=`."
        ) from error
    except OSError as error:
        if "Consistency check failed" not in str(error):
            raise
        raise BeliefError(f"{repo_id}: a file of the belief was cut short on its way ({error}).") from error
    return weights, config


@contextmanager
def explained(doing: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises into a [`HubError`] with a remedy.

    Args:
        doing (`str`): What is being done, for the message.
        revision (`str`, *optional*): That was asked for.

    Yields:
        None: Nothing.

    Raises:
        HubError: The Hub refuses or cannot be reached.
    """
    from huggingface_hub import errors

    # In the order of what they tell. The Hub's client wraps them: failed uploads in RuntimeError, failed lookups in
    # LocalEntryNotFoundError, both for many reasons.
    kinds = (
        (errors.OfflineModeIsEnabled, errors.LocalTokenNotFoundError),
        errors.HTTPError,
        errors.FileMetadataError,
        errors.LocalEntryNotFoundError,
    )
    try:
        yield
    except Exception as error:
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        root = next((e for kind in kinds for e in chain if isinstance(e, kind)), None)
        if root is None or isinstance(error, errors.RemoteEntryNotFoundError):
            raise
        raise HubError(f"Could not {doing}: {_remedy(root, revision)}") from error


def _remedy(root: BaseException, revision: str | None) -> str:
    """What went wrong and what to do about it."""
    from huggingface_hub import errors

    if isinstance(root, errors.OfflineModeIsEnabled):
        return (
            "HF_HUB_OFFLINE is set, which allows only what the cache has; unset it, or use a local folder "
            "(`save_pretrained`, `from_pretrained`)."
        )
    if isinstance(root, errors.LocalTokenNotFoundError):
        return "token=True, but no token is stored; run `hf auth login`, or pass `token='hf_...'`."
    if isinstance(root, errors.LocalEntryNotFoundError):
        return "the cache has no copy of it and `local_files_only=True` forbids a download; leave that out."
    if isinstance(root, errors.GatedRepoError):
        return "access to the repository is granted on request; ask for it on the repository's page."
    if isinstance(root, errors.RevisionNotFoundError):
        return f"the repository has no revision {revision!r}; name one of its branches, tags or commits."
    status = getattr(getattr(root, "response", None), "status_code", None)
    if status == 401:
        return (
            "no valid token came along (401), which a push and a private repository need; run `hf auth login`, set "
            "HF_TOKEN, or pass `token=`. A repository that does not exist answers the same."
        )
    if status == 403:
        return (
            "the token may not do that (403); use one that may. A push needs the right to write to this repository, "
            f"or `create_pr=True` to propose the belief. {_said(root)}"
        )
    if status == 404:
        return "there is no such repository, or this token may not see it (404); check the name, and `token=`."
    if status in {409, 412}:
        return f"the repository changed at the same time ({status}); push again."
    if status is not None:
        again = " try again later." if status == 429 or status >= 500 else ""
        return f"the Hub answered {status}.{again} {_said(root)}"
    if isinstance(root, errors.FileMetadataError):
        return f"the answer is not that of a Hub; check the proxy and HF_ENDPOINT. {_said(root)}"
    return (
        f"the Hub cannot be reached ({type(root).__name__}: {root}); check the network, the proxy and HF_ENDPOINT. "
        "Meanwhile a local folder does (`save_pretrained`, `from_pretrained`)."
    )


def _said(error: BaseException) -> str:
    return f"It said: {getattr(error, 'server_message', None) or error}"


def resolve(
    pretrained: str | os.PathLike, *, revision: str | None, subfolder: str | None, **options: Any
) -> tuple[Path, Path, bool]:
    """The two files of a belief, in a folder or downloaded.

    Args:
        pretrained (`str` or `os.PathLike`): Folder, or repository id.
        revision (`str`, *optional*): See [`download_belief`].
        subfolder (`str`, *optional*): Inside the folder or the repository.
        **options: See [`download_belief`].

    Returns:
        `tuple[Path, Path, bool]`: Of `belief.safetensors` and `belief_config.json`; whether they were downloaded.

    Raises:
        FileNotFoundError: There is no such folder, or no belief in it.
    """
    folder = Path(pretrained)
    if folder.is_dir():
        folder = folder / (subfolder or "")
        for name in (BELIEF_WEIGHTS, BELIEF_CONFIG):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}; was the adapter trained with kalman_peft?")
        return folder / BELIEF_WEIGHTS, folder / BELIEF_CONFIG, False
    if folder.is_absolute() or str(pretrained).startswith("."):
        raise FileNotFoundError(f"{folder} is no folder.")
    return *download_belief(str(pretrained), revision=revision, subfolder=subfolder, **options), True
