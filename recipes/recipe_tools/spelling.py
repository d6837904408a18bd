"""One spelling of a value in the name of a method, from which the same value is read."""

from __future__ import annotations

from typing import Any


def spelt(value: Any) -> str:
    """A number as short as can be without changing it, several with "/" between; anything else as it is.

    Args:
        value (`Any`): Of an option.

    Returns:
        `str`: Such as "0.0001" for 1e-4.
    """
    if isinstance(value, tuple):
        return "/".join(map(spelt, value))
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)
