"""Records and beliefs that stay in their files until they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar, overload


T = TypeVar("T")


class Stored(Sequence[T], Generic[T]):
    """A sequence of folders, each read anew when it is asked for.

    Args:
        folders (`Sequence[Path]`): In order.
        read (`Callable[[Path], T]`): Reads one.
    """

    def __init__(self, folders: Sequence[Path], read: Callable[[Path], T]):
        self.folders, self.read = list(folders), read

    def __len__(self) -> int:
        return len(self.folders)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Stored[T]: ...
    def __getitem__(self, index: int | slice) -> T | Stored[T]:
        if isinstance(index, slice):
            return Stored(self.folders[index], self.read)
        return self.read(self.folders[index])


class StoredByName(Mapping[str, T], Generic[T]):
    """Folders by name, each read anew when it is asked for.

    Args:
        folders (`Mapping[str, Path]`): By name, in order.
        read (`Callable[[Path], T]`): Reads one.
    """

    def __init__(self, folders: Mapping[str, Path], read: Callable[[Path], T]):
        self.folders, self.read = dict(folders), read

    def __len__(self) -> int:
        return len(self.folders)

    def __iter__(self) -> Iterator[str]:
        return iter(self.folders)

    def __getitem__(self, name: str) -> T:
        return self.read(self.folders[name])
