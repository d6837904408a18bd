"""Options of a command from its dataclasses: flags by HfArgumentParser, on top of a YAML file; and the launcher."""

import argparse
import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        run (`Callable`): Takes one instance of each dataclass.
        options (`tuple[type, ...]`): Dataclasses of its flags, no name twice.
        text (`str`): What it does, with examples.
        variants (`Mapping[str, tuple]`, *optional*):
            By flag (without dashes): its help, and a function that gives the command that it makes of this one.
        launches (`bool`, *optional*, defaults to `False`): Whether it runs in several processes.
        first (`str`, *optional*): The flag that what stands before any flag belongs to.
    """

    run: Callable[..., None]
    options: tuple[type, ...]
    text: str
    variants: Mapping[str, "tuple[str, Callable[[], Command]]"] = field(default_factory=dict)
    launches: bool = False
    first: str | None = None


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The text as it is written, and every default."""


def run_command(name: str, command: Command, arguments: Sequence[str]) -> int:
    """Parse and run.

    Args:
        name (`str`): Of the command.
        command (`Command`): It.
        arguments (`Sequence[str]`): Its flags.

    Returns:
        `int`: The exit code: 0, or that of a launched process that failed.

    Raises:
        SystemExit: With code 2, for unknown flags, a file that cannot be read, or options that contradict each other.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    for flag in command.variants:
        early.add_argument(f"--{flag}", action="store_true")
    if command.launches:
        launcher = argparse.ArgumentParser(f"kalman-peft {name}", add_help=False, allow_abbrev=False)
        launcher.add_argument("--accelerate_config", type=Path)
        found, arguments = launcher.parse_known_args(arguments)
        if found.accelerate_config is not None:
            if not found.accelerate_config.is_file():
                launcher.error(f"--accelerate_config {found.accelerate_config}: there is no such file")
            return _launch(found.accelerate_config, [name, *arguments])
    known, rest = early.parse_known_args(arguments)
    chosen = next((make() for flag, (_, make) in command.variants.items() if getattr(known, flag)), command)
    parser = _parser(name, command, chosen)
    if command.first is not None and rest and not rest[0].startswith("-"):
        rest = [f"--{command.first}", *rest]
    if known.config is not None:
        rest = [*_from_yaml(known.config, chosen, parser), *rest]  # a flag that comes later wins
    try:
        values = parser.parse_args_into_dataclasses(rest, look_for_args_file=False)[: len(chosen.options)]
    except (ValueError, TypeError) as error:  # the dataclasses refuse what argparse cannot know of
        parser.error(" ".join(str(error).split()))
    chosen.run(*values)
    return 0


def _parser(name: str, command: Command, chosen: Command) -> HfArgumentParser:
    parser = HfArgumentParser(
        chosen.options,  # type: ignore[arg-type]
        prog=f"kalman-peft {name}",
        description=chosen.text,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with any of these options; flags go before it.")
    if not any(f.name == "debug" for options in chosen.options for f in fields(options)):  # TrainingArguments has one
        parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    for flag, (text, _) in command.variants.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    if command.launches:
        parser.add_argument("--accelerate_config", help="File of `accelerate config`: launch with it.")
    needed = " ".join(f"{a.option_strings[0]} {a.dest.upper()}" for a in parser._actions if a.required)
    parser.usage = " ".join(f"kalman-peft {name} {needed} [options]".split())  # argparse would list 150 of them
    return parser


def _from_yaml(file: Path, command: Command, parser: argparse.ArgumentParser) -> list[str]:
    """The options of a YAML file as flags, so that one parser checks both."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {file} cannot be read: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        parser.error(f"--config {file} must hold options with their values, as in 'max_steps: 30'")
    names = {f.name for options in command.options for f in fields(options) if f.init}
    unknown = sorted(set(map(str, values)) - names)
    if unknown:
        parser.error(f"--config {file}: unknown options {unknown}")
    flags: list[str] = []
    for name, value in values.items():
        if value is None:
            parser.set_defaults(**{name: None})
        elif isinstance(value, list):
            flags += [f"--{name}", *map(_as_text, value)]
        else:
            flags.append(f"--{name}={_as_text(value)}")
    return flags


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _launch(config: Path, arguments: list[str]) -> int:
    """Run this command line under accelerate's launcher; its exit code."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    flags = ["--config_file", str(config), "-m", "kalman_peft.cli", *arguments]
    try:
        launch_command(launch_command_parser().parse_args(flags))
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0
