"""The folder of a [`ContinualLearner`]: which tasks are done, whose they are, and what a kill has left.

```
continual.json            options, and the finished tasks in order
noise.safetensors         process noise that is given as tensors
origin.json               which learner this one is a copy of, if of any
.lock                     held while something is learnt
initial/                  the adapter's start and the prior belief
tasks/000-name/           adapter, belief, record (increment and transition), task.json
work/001-name/            of the task being learnt: checkpoints, mode/
smoothed/name/            adapter and belief given the data of all tasks
```

A folder is filled beside its place and renamed: it is there in full or not at all. What `continual.json` lacks after a
kill, the folders of the tasks tell: each names its place in a chain of hashes that begins with `initial/`.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from ..belief import BELIEF_CONFIG, BELIEF_WEIGHTS, BeliefError, write_atomically
from ..distributed import from_first
from ..filtering.records import TASK_RECORD
from .files import ADAPTER, ADAPTER_CONFIG, damaged, discard, read_json, write_json


logger = logging.get_logger(__name__)

INDEX, TASK_FILE, START_FILE = "continual.json", "task.json", "start.json"
NOISE, ORIGIN, LOCK = "noise.safetensors", "origin.json", ".lock"
_FORMAT = 2
_OF_START = (START_FILE, ADAPTER, ADAPTER_CONFIG, BELIEF_WEIGHTS, BELIEF_CONFIG)
_OF_TASK = (TASK_FILE, ADAPTER, ADAPTER_CONFIG, BELIEF_WEIGHTS, BELIEF_CONFIG, TASK_RECORD)
_NAME = re.compile(r"[^\W_][\w .+=@-]*")
_NUMBERED = re.compile(r"(\d{3,})-.+", re.DOTALL)
_MOST_BYTES = 200  # of a name: file systems allow 255 for a folder, whose number and mark take some
Entry = dict[str, Any]


class Store:
    """Files of a learner. The first process reads and writes, and tells the others.

    Args:
        folder (`Path`): The learner's.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: list[Entry] = []
        self.options: dict[str, Any] = {}
        self.start: Entry | None = None  # of `initial/`, once it is there

    @property
    def initial(self) -> Path:
        """Folder of the start."""
        return self.folder / "initial"

    def task(self, index: int) -> Path:
        """Folder of a finished task."""
        return self.folder / "tasks" / self.entries[index]["folder"]

    def last(self) -> tuple[Path, str]:
        """Folder of the newest task, or of the start, and the fingerprint of its adapter."""
        if self.entries:
            return self.task(-1), self.entries[-1]["adapter"]
        assert self.start is not None
        return self.initial, self.start["adapter"]

    @property
    def chain(self) -> str:
        """Identity of what is learnt so far."""
        found = self.entries[-1] if self.entries else self.start
        assert found is not None
        return found["chain"]

    def work(self, index: int, name: str) -> Path:
        """Folder of the task being learnt."""
        return self.folder / "work" / folder_name(index, name)

    def smoothed(self, name: str) -> Path:
        """Folder of a smoothed task."""
        return self.folder / "smoothed" / name

    def open(self, options: dict[str, Any], noise: Mapping[str, Tensor]) -> None:
        """Read what is there, or begin; complete the index and clean up after a kill.

        Args:
            options (`dict[str, Any]`): Of the learner, JSON-serialisable.
            noise (`Mapping[str, Tensor]`): Process noise that is given as tensors.

        Raises:
            ValueError: The folder was begun with other options, on which something depends.
            BeliefError: Something is missing, damaged or of another learner.
        """
        self.options = json.loads(json.dumps(options))

        def begin() -> tuple[list[Entry], Entry | None]:
            index, self.entries, self.start = read_learner(self.folder)
            if index == self._index() and not leftovers(self.folder, len(self.entries)):
                return self.entries, self.start  # nothing to write: the folder may be read-only
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock():
                clean(self.folder, len(self.entries))
                if index is not None and index["options"] is not None:  # None: a copy, see `sharing.fetch`
                    self._compare(index["options"])
                if noise:
                    tensors = {key: t.detach().cpu().contiguous() for key, t in noise.items()}
                    write_atomically(self.folder / NOISE, lambda path: save_file(tensors, path))
                else:
                    (self.folder / NOISE).unlink(missing_ok=True)
                self._write_index()
            return self.entries, self.start

        self.entries, self.start = from_first(begin)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone with the folder: no other learner writes into it, or has since this one was opened.

        Raises:
            ValueError: One does, or has.
        """

        def take() -> None:
            held.enter_context(self._lock())
            _, entries, start = read_learner(self.folder)
            if (entries, start) != (self.entries, self.start):
                raise ValueError(
                    f"{self.folder} has changed since this learner was opened: another one has learnt there. Open it "
                    "anew, and learn with one learner at a time."
                )

        with ExitStack() as held:
            from_first(take)
            yield

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Held by the first process; the system lets go of it when that dies."""
        try:
            with FileLock(self.folder / LOCK, timeout=0):
                yield
        except Timeout:
            raise ValueError(
                f"Another learner is at work in {self.folder}. Wait for it, or give another output_dir."
            ) from None

    def add(self, entry: Entry) -> Entry:
        """Take up a task whose folder is in place; gives the first process's entry."""

        def take() -> Entry:
            self._write_index([*self.entries, entry])
            clean(self.folder, len(self.entries) + 1)
            return entry

        self.entries.append(from_first(take))
        return self.entries[-1]

    def _compare(self, found: Mapping[str, Any]) -> None:
        """See that the options are those that the folder was begun with, as far as something depends on them."""
        changed = [k for k in {**found, **self.options} if found.get(k) != self.options.get(k)]
        if not changed:
            return
        listed = "; ".join(f"{k}={self.options.get(k)!r}, was {found.get(k)!r}" for k in changed[:4])
        begun = f"{self.folder} was begun with other options: {listed}. "
        if self.entries or (self.folder / ORIGIN).exists():
            raise ValueError(
                f"{begun}Give the same, or another output_dir; ContinualLearner.from_pretrained goes on from a copy "
                "with new ones."
            )
        work = list(_numbered(self.folder / "work"))
        trained = [folder for folder in work if any(path.is_dir() for path in folder.iterdir())]
        if trained:
            raise ValueError(
                f"{begun}No task is finished, but {trained[0]} holds training with them. Give the same, or delete "
                "that folder to begin the task anew with these."
            )
        logger.warning(f"{begun}No task is learnt yet, so that it is begun anew with these.")
        for folder in work:
            discard(folder)
        if self.start is not None:
            discard(self.initial)
            self.start = None

    def _write_index(self, entries: list[Entry] | None = None) -> None:
        write_json(self.folder / INDEX, self._index(entries))

    def _index(self, entries: list[Entry] | None = None) -> dict[str, Any]:
        return {"format": _FORMAT, "options": self.options, "tasks": self.entries if entries is None else entries}


def read_learner(folder: Path) -> tuple[dict[str, Any] | None, list[Entry], Entry | None]:
    """What a learner's folder holds; nothing is changed.

    Args:
        folder (`Path`): The learner's, or a new one.

    Returns:
        tuple: `continual.json`, the finished tasks with those that it lacks, and `start.json`; each if it is there.

    Raises:
        ValueError: It is a file.
        BeliefError: Something is missing, damaged or of another learner.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={str(folder)!r} is a file; give a folder.")
    if not (folder / INDEX).exists():
        if holds_learner(folder):
            raise BeliefError(
                f"{folder} has initial/ or tasks/, but no {INDEX}, which says with what options they were made. "
                "Restore it from a copy, or give another output_dir; a copy by from_pretrained that was cut short is "
                "made anew by from_pretrained."
            )
        return None, [], None
    index = read_json(folder / INDEX, "format")
    if index["format"] != _FORMAT:
        raise BeliefError(
            f"{folder / INDEX} has format {index['format']}; this version reads {_FORMAT}. Go on with the version of "
            "kalman_peft that began it, or learn the tasks in another output_dir."
        )
    index = read_json(folder / INDEX, "options", "tasks")
    start = None
    if (folder / "initial").is_dir():
        _complete(folder / "initial", _OF_START)
        start = read_json(folder / "initial" / START_FILE, "scores", "adapter", "chain")
    elif index["tasks"] or any(_numbered(folder / "tasks")):
        raise BeliefError(
            f"{folder / 'initial'} is missing, with the prior and the scores before the first task. Restore it from a "
            "copy, or learn in another output_dir."
        )
    chain, entries = (start or {}).get("chain", ""), []
    for entry in index["tasks"]:
        entries.append(_read_task(folder / "tasks" / entry["folder"], len(entries), chain, entry))
        chain = entry["chain"]
    more = sorted(set(_numbered(folder / "tasks")) - {folder / "tasks" / entry["folder"] for entry in entries})
    for path in more:  # after a kill there is one
        entries.append(_read_task(path, len(entries), chain))
        chain = entries[-1]["chain"]
    return index, entries, start


def holds_learner(folder: Path) -> bool:
    """Whether anything is there that a learner has learnt, or begun with."""
    return (folder / "initial").exists() or any(_numbered(folder / "tasks"))


def check_task(folder: Path) -> None:
    """Raise BeliefError unless all files of a finished task are there."""
    _complete(folder, _OF_TASK)


def _read_task(folder: Path, index: int, chain: str, expected: Entry | None = None) -> Entry:
    """A task's entry, if it is the learner's own in this place."""
    check_task(folder)
    entry = read_json(folder / TASK_FILE, "previous", "chain", "adapter")
    if (entry["previous"], entry.get("index"), entry.get("folder")) != (chain, index, folder.name) or (
        expected is not None and entry != expected
    ):
        raise BeliefError(
            f"{folder} is not task {index} of this learner: it was copied from another place, or continual.json was. "
            "Remove it, or restore what was there."
        )
    return entry


def _complete(folder: Path, files: tuple[str, ...]) -> None:
    for name in files:
        if not (folder / name).is_file():
            raise damaged(folder / name, "no such file")


def _numbered(folder: Path) -> Iterator[Path]:
    """Folders of tasks, finished or begun."""
    return (path for path in folder.glob("*") if _NUMBERED.fullmatch(path.name) and path.is_dir())


def leftovers(folder: Path, finished: int) -> list[Path]:
    """What a kill has left: files and folders that were being written, and work on finished tasks.

    Args:
        folder (`Path`): The learner's.
        finished (`int`): Number of finished tasks.

    Returns:
        `list[Path]`: Of files and folders.
    """
    found: list[Path] = []
    for part, pattern in (("", r"initial"), ("tasks", r"\d{3,}-.+"), ("work", r"\d{3,}-.+"), ("smoothed", r".+")):
        for path in (folder / part).glob(".*.tmp"):
            if path.is_dir() and re.fullmatch(rf"\.{pattern}\.tmp", path.name, re.DOTALL):
                found.append(path)
    for path in folder.glob(".*.tmp"):
        if path.is_file() and re.fullmatch(rf"\.({INDEX}|{NOISE}|{ORIGIN})\.\d+\.\d+\.tmp", path.name):
            found.append(path)
    return found + [path for path in _numbered(folder / "work") if int(path.name.partition("-")[0]) < finished]


def clean(folder: Path, finished: int) -> None:
    """Remove [`leftovers`]; whoever calls has locked the folder."""
    for path in leftovers(folder, finished):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_name(name: Any) -> str:
    """The name of a task, which is also that of a folder.

    Raises:
        ValueError: It is none.
    """
    if (
        not isinstance(name, str)
        or not _NAME.fullmatch(name)
        or name.endswith((" ", "."))
        or len(name) > 100
        or len(name.encode()) > _MOST_BYTES
    ):
        raise ValueError(
            f"A task's name becomes a folder's: it must be 1 to 100 letters, digits and ' ._+=@-' (at most "
            f"{_MOST_BYTES} bytes in UTF-8), beginning with a letter or digit, got {name!r}."
        )
    return name


def folder_name(index: int, name: str) -> str:
    """Of a task."""
    return f"{index:03d}-{name}"
