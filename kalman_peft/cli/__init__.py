"""The command line: `kalman-peft train | curvature | smooth | merge | evaluate | report | card`."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise

from .. import __version__


# Command: (module, what it does). Modules are imported when their command is called, so that --help is quick.
COMMANDS = {
    "train": ("training", "fine-tune a causal language model without losing what it could do"),
    "curvature": ("beliefs", "fit a belief over an adapter from data, and save it"),
    "smooth": ("beliefs", "smooth the beliefs of a ContinualLearner's folder over all its tasks"),
    "merge": ("beliefs", "merge beliefs that several parties made from one prior"),
    "evaluate": ("measuring", "loss of an adapter on data, and its divergence from the base model"),
    "report": ("reporting", "tables and figures of what a run's folder holds"),
    "card": ("reporting", "write the model card of an adapter and its belief"),
}
OK, FAILURE, USAGE = 0, 1, 2
_TEXT = """LoRA fine-tuning with a Gaussian belief over the adapter.

commands:
{commands}

examples:
  kalman-peft train --model HuggingFaceTB/SmolLM2-135M --dataset maths.jsonl --source keep.jsonl --output_dir out
  kalman-peft evaluate --model HuggingFaceTB/SmolLM2-135M --adapter out --dataset keep.jsonl
  kalman-peft report out
  kalman-peft train --help
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments (`Sequence[str]`, *optional*): Without the program's name; those of the process by default.

    Returns:
        `int`: 0 if all went well, 1 for a failure (told in one line; with `--debug` by a traceback). Wrong usage ends
        with SystemExit(2), as argparse does.
    """
    listed = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "kalman-peft",
        description=_TEXT.format(commands=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kalman-peft {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of the above")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the command; see its --help")
    given = parser.parse_args(arguments)
    from .parsing import run_command  # torch and transformers come with it

    # Alone; with a value it is an option of TrainingArguments.
    alone = [a == "--debug" and b.startswith("-") for a, b in pairwise([*given.options, "-"])]
    options = [option for option, drop in zip(given.options, alone, strict=True) if not drop]
    module = import_module(f".{COMMANDS[given.command][0]}", __name__)
    try:
        return run_command(given.command, module.COMMANDS[given.command], options)
    except Exception as error:
        if any(alone):
            traceback.print_exc()
        else:
            print(f"kalman-peft {given.command}: error: {_one_line(error)}", file=sys.stderr)
        return FAILURE


def _one_line(error: Exception) -> str:
    """The message, with the kind of errors that are not this library's to explain."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return text if text and isinstance(error, ValueError | OSError | ImportError) else f"{kind}: {text} (see --debug)"
