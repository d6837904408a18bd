"""Options of methods: what they may be, how they are read, and their one spelling."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..spelling import spelt, split_options


@dataclass(frozen=True)
class Number:
    """An option whose value is a number.

    Attributes:
        default (`float`, *optional*): `None` leaves the choice to the scenario, or switches the option off.
        low, high (`float`): Smallest and largest value.
        above (`bool`): `low` itself is not allowed.
        below (`bool`): `high` itself is not allowed.
        whole (`bool`): Only whole numbers.
        several (`bool`): "0.25/0.5/0.75" is allowed too: several points of one training.
        names (`tuple[str, ...]`): Words that may stand in place of a number.
    """

    default: float | str | None
    low: float = 0.0
    high: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    several: bool = False
    names: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """The range in words."""
        kind = "a whole number" if self.whole else "a number"
        open_high = self.below or math.isinf(self.high)
        text = f"{kind} in {'(' if self.above else '['}{self.low:g}, {self.high:g}{')' if open_high else ']'}"
        text += " (or several, as in 0.25/0.5)" if self.several else ""
        return text + (f" or {' or '.join(self.names)}" if self.names else "")

    def read(self, value: Any) -> Any:
        """A checked value: a float or int, a tuple of them for several, or one of the names.

        Args:
            value (`Any`): A Python literal, or text.

        Raises:
            ValueError: Out of range; says what is expected.
        """
        if self.several and isinstance(value, str) and "/" in value:
            points = tuple(self._one(_literal(part), value) for part in value.split("/"))
            if len(set(points)) < len(points):
                raise ValueError(f"each value once, got {value!r}")
            return points
        return value if isinstance(value, str) and value in self.names else self._one(value, value)

    def _one(self, value: Any, shown: Any) -> float | int:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        fits = fits and (value > self.low if self.above else value >= self.low)
        fits = fits and (value < self.high if self.below else value <= self.high)
        if not fits or (self.whole and value != int(value)):
            raise ValueError(f"{self.expected}, got {shown!r}")
        return int(value) if self.whole else float(value)


@dataclass(frozen=True)
class Name:
    """An option whose value is a word.

    Attributes:
        default (`str`, *optional*): `None` leaves the choice to the scenario.
        choices (`tuple[str, ...]`): The words; a trailing "N" stands for a whole number.
    """

    default: str | None
    choices: tuple[str, ...]

    @property
    def expected(self) -> str:
        """The choices in words."""
        return f"one of {', '.join(self.choices)}"

    def read(self, value: Any) -> str:
        """The word, if it is one of the choices; for others raise ValueError."""
        patterns = (re.sub(r"N$", r"\\d+", choice) for choice in self.choices)
        if not isinstance(value, str) or not any(re.fullmatch(pattern, value) for pattern in patterns):
            raise ValueError(f"{self.expected}, got {value!r}")
        return value


Options = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of method.

    Attributes:
        options (`Mapping[str, Number | Name]`): By name, in the order of the spelling.
        run (`Callable`): From a run and options to points, each with the options that tell it from the others.
        shown (`str`): Option that is always part of the name, if it has a value.
        check (`Callable`): From the options that were given, and all: raises ValueError for some that do not go
            together, and may change the latter.
    """

    options: Mapping[str, Number | Name]
    run: Callable[[Any, Options], list[tuple[Options, Any]]]
    shown: str = ""
    check: Callable[[Options, Options], None] = lambda given, options: None


# Of every kind that is trained by AdamW or a relative; None: the scenario's.
RATE = {"lr": Number(None, above=True)}


def read_options(kind: Kind, text: str) -> Options:
    """Read "OPTION=VALUE,...".

    Args:
        kind (`Kind`): Whose options they are.
        text (`str`): May be empty.

    Returns:
        `dict[str, Any]`: All options of the kind.

    Raises:
        ValueError: An unknown option, one given twice or out of range, or options that do not go together.
    """
    given: Options = {}
    for name, value in split_options(text).items():
        if name not in kind.options:
            raise ValueError(f"there is no option {name!r}; there are {', '.join(kind.options) or 'none'}")
        option = kind.options[name]
        try:
            given[name] = option.read(_literal(value) if isinstance(option, Number) else value)
        except ValueError as error:
            raise ValueError(f"{name} must be {error}") from error
    options = {name: option.default for name, option in kind.options.items()} | given
    kind.check(given, options)
    return options


def spell(name: str, kind: Kind, options: Mapping[str, Any]) -> str:
    """One spelling: numbers as short as can be, no option at its default but the one that is always shown.

    Args:
        name (`str`): Of the kind.
        kind (`Kind`): Its options.
        options (`Mapping[str, Any]`): From `read_options`.

    Returns:
        `str`: Such as "laplace:strength=100,structure=diagonal".
    """
    shown = [
        f"{key}={spelt(options[key])}"
        for key, option in kind.options.items()
        if options[key] is not None and (key == kind.shown or options[key] != option.default)
    ]
    return f"{name}:{','.join(shown)}" if shown else name


def _literal(text: str) -> Any:
    """A number if it reads as one, else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
