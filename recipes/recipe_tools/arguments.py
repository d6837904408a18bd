"""Command lines of recipes: the options of a dataclass, with the recipe's text as help, on top of a YAML file."""

import argparse
from dataclasses import fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The text as it is written, and every default."""


def parser_with_config(options: type, text: str | None, arguments: list[str]) -> tuple[HfArgumentParser, list[str]]:
    """A parser whose defaults are those of the YAML file that `--config` names, if it does.

    Args:
        options (`type`): Dataclass of the options.
        text (`str`, *optional*): What the recipe does.
        arguments (`list[str]`): Without the program's name.

    Returns:
        `tuple[HfArgumentParser, list[str]]`: The parser, and the arguments without `--config`.
    """
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--config", type=Path)
    known, rest = early.parse_known_args(arguments)
    parser = HfArgumentParser(options, description=text, formatter_class=Help)  # type: ignore[arg-type]
    parser.add_argument("--config", help="YAML file with any of these options; the command line goes before it.")
    if known.config:
        values = yaml.safe_load(known.config.read_text()) or {}
        unknown = sorted(values.keys() - {f.name for f in fields(options)})
        if unknown:
            parser.error(f"{known.config}: unknown options {unknown}")
        parser.set_defaults(**values)
    return parser, rest
