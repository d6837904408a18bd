"""Command lines of recipes: the options of a dataclass, with the recipe's text as help, on top of a YAML file."""

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The text as it is written, and every default."""


def parsed(options: type, text: str | None, arguments: list[str]) -> tuple[HfArgumentParser, Any]:
    """Read a command line that takes no YAML file.

    Args:
        options (`type`): Dataclass of the options.
        text (`str`, *optional*): What the recipe does.
        arguments (`list[str]`): Without the program's name.

    Returns:
        `tuple[HfArgumentParser, Any]`: The parser, for what it is to refuse, and the options.
    """
    parser = _parser(options, text)
    return parser, parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)[0]


def refuse(parser: argparse.ArgumentParser, refusals: Mapping[str, bool]) -> None:
    """Leave with the first message that applies, and exit code 2.

    Args:
        parser (`ArgumentParser`): Whose usage is shown.
        refusals (`Mapping[str, bool]`): Whether a message applies.

    Raises:
        SystemExit: One does.
    """
    for message, refused in refusals.items():
        if refused:
            parser.error(message)


def _parser(options: type, text: str | None) -> HfArgumentParser:
    return HfArgumentParser(options, description=text, formatter_class=Help)  # type: ignore[arg-type]


def parser_with_config(options: type, text: str | None, arguments: list[str]) -> tuple[HfArgumentParser, list[str]]:
    """A parser whose defaults are those of the YAML file that `--config` names, if it does.

    Args:
        options (`type`): Dataclass of the options.
        text (`str`, *optional*): What the recipe does.
        arguments (`list[str]`): Without the program's name.

    Returns:
        `tuple[HfArgumentParser, list[str]]`: The parser, and the arguments without `--config`.

    Raises:
        SystemExit: The file cannot be read, or holds an unknown option or a value of the wrong kind.
    """
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--config", type=Path)
    known, rest = early.parse_known_args(arguments)
    parser = _parser(options, text)
    parser.add_argument("--config", help="YAML file with any of these options; the command line goes before it.")
    if known.config:
        parser.set_defaults(**_read_yaml(known.config, options, parser))
    return parser, rest


def _read_yaml(file: Path, options: type, parser: argparse.ArgumentParser) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {file} cannot be read: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {file} must hold options with their values, as in 'max_steps: 30'")
    hints = get_type_hints(options)
    unknown = sorted(set(map(str, values)) - {f.name for f in fields(options)})
    if unknown:
        parser.error(f"{file}: unknown options {unknown}")
    try:
        return {name: _converted(value, hints[name], name) for name, value in values.items()}
    except ValueError as error:
        parser.error(f"--config {file}: {error}")


def _converted(value: Any, hint: Any, name: str) -> Any:
    """A value of YAML as the type of its option; YAML takes 1e-3 for text."""
    inner = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list, as in [a, b], got {value!r}")
        return [_converted(part, inner[0], f"each of {name}") for part in value]
    if inner:  # may be left out
        return None if value is None else _converted(value, inner[0], name)
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif type(value) is hint:
        return value
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "text (in quotes if need be)"}
    raise ValueError(f"{name} must be {kinds[hint]}, got {value!r}")
