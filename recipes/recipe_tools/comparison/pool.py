"""Pieces of work in several processes; one that fails, or takes its process down, leaves the others at work."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Hashable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

from tqdm.auto import tqdm


Item = TypeVar("Item", bound=Hashable)


def run_all(work: Callable[[Item], Any], items: Sequence[Item], processes: int, unit: str = "run") -> dict[Item, str]:
    """Do the work for every item, in their order.

    Args:
        work (`Callable`): Must leave its result in a file. With several processes it is pickled, once per process.
        items (`Sequence`): Hashable, and with a readable `str`.
        processes (`int`): At once; 1 is this process.
        unit (`str`, *optional*): For the progress bar.

    Returns:
        `dict`: By item that failed, what went wrong.
    """
    failed: dict[Item, str] = {}
    with tqdm(total=len(items), unit=unit) as bar:

        def note(item: Item, error: str | None) -> None:
            if error is not None:
                failed[item] = error
                bar.write(f"{item} failed: {error.strip().splitlines()[-1]}")
            bar.set_postfix_str(str(item), refresh=False)
            bar.update()

        if processes == 1:
            for item in items:
                note(item, _attempt(work, item))
        elif items:
            _spread(work, list(items), min(processes, len(items)), note)
    return failed


def _attempt(work: Callable[[Item], Any], item: Item) -> str | None:
    try:
        work(item)
    except Exception:
        return traceback.format_exc()
    return None


def _serve(pipe: Connection, work: Callable[[Any], Any]) -> None:
    """A process: take items until there are no more."""
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        pipe.send(_attempt(work, item))


def _spread(
    work: Callable[[Item], Any], items: list[Item], processes: int, note: Callable[[Item, str | None], None]
) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would break CUDA, and threads of torch
    todo = iter(items)
    workers: dict[Any, Any] = {}  # processes by pipe
    busy: dict[Any, Item] = {}  # what they are at

    def hand_out(pipe: Any) -> None:
        """Give the next item, or send the process home."""
        item = next(todo, None)
        if item is None:
            pipe.close()
            workers.pop(pipe).join()
        else:
            pipe.send(item)
            busy[pipe] = item

    def hire() -> None:
        ours, theirs = context.Pipe()
        workers[ours] = context.Process(target=_serve, args=(theirs, work), daemon=True)
        workers[ours].start()
        theirs.close()
        hand_out(ours)

    try:
        for _ in range(processes):
            hire()
        while busy:
            for pipe in cast(list[Any], wait(list(busy))):
                item = busy.pop(pipe)
                try:
                    note(item, pipe.recv())
                except (EOFError, ConnectionResetError):  # killed, most likely for want of memory
                    process = workers.pop(pipe)
                    process.join()
                    note(item, f"its process ended with code {process.exitcode}")
                    hire()
                else:
                    hand_out(pipe)
    finally:
        for process in workers.values():
            process.terminate()
