"""Options in the name of a method, OPTION=VALUE,...: how they are read, and one spelling of each value."""

from __future__ import annotations

import ast
from typing import Any


def split_options(text: str) -> dict[str, str]:
    """Take "OPTION=VALUE,..." apart.

    Args:
        text (`str`): May be empty.

    Returns:
        `dict[str, str]`: Values as they stand, in their order.

    Raises:
        ValueError: A part of another form, or an option that is given twice.
    """
    options: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if not (name and value):
            raise ValueError(f"{part!r} is not OPTION=VALUE")
        if name in options:
            raise ValueError(f"{name} is given twice")
        options[name] = value
    return options


def parse_options(text: str) -> dict[str, Any]:
    """As [`split_options`], with values that are Python literals read as such; others are names as they stand."""
    try:
        return {name: _literal(value) for name, value in split_options(text).items()}
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}.") from error


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value  # a name, such as that of a memory


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
