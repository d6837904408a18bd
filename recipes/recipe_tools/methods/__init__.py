"""Methods of fine-tuning by name, each from a job to tuned models.

A method is KIND or KIND:OPTION=VALUE,... Whatever the kind, an adapter that starts as ordinary LoRA starts alike, rows
come in the same order, and training is [`KalmanTrainer`]'s. Kinds, with their modules:
- lora, wise, lora_plus, lora_fa (`plain`); l2, ewc, ewc_dw, ima (`penalties`); kl (`masked_kl`); replay, joint
  (`replay`); init, osf (`inits`); laplace, loko (`ours`).

`lora:stop=0.25/0.5/1` and `wise:alpha=0.25/0.5` are several points of one training: [`points`] names them.
"""

from __future__ import annotations

from typing import Any

from peft import PeftType

from kalman_peft import AdapterState
from kalman_peft.ima import effective_ranks

from . import inits, masked_kl, ours, penalties, plain, replay
from .options import Kind, read_options, spell
from .training import Job, Run, Trained


__all__ = ["KINDS", "Job", "Trained", "canonical", "points", "read_method", "train"]

KINDS: dict[str, Kind] = {
    **plain.KINDS, **penalties.KINDS, **masked_kl.KINDS, **replay.KINDS, **inits.KINDS, **ours.KINDS
}  # fmt: skip


def read_method(text: str) -> tuple[str, dict[str, Any]]:
    """Read KIND:OPTION=VALUE,...

    Args:
        text (`str`): Such as "laplace:strength=30,structure=ekfac".

    Returns:
        `tuple[str, dict[str, Any]]`: The kind and all its options.

    Raises:
        ValueError: An unknown kind or option, a value out of range, or options that do not go together.
    """
    kind, colon, rest = text.partition(":")
    if kind not in KINDS:
        raise ValueError(f"{text!r}: the kind is none of {', '.join(KINDS)}.")
    if colon and not rest:
        raise ValueError(f"{text!r}: there are no options behind the colon.")
    try:
        return kind, read_options(KINDS[kind], rest)
    except ValueError as error:
        raise ValueError(f"{text!r}: {str(error).rstrip('.')}.") from error


def canonical(text: str) -> str:
    """One spelling per method: numbers as short as can be, few options at their defaults.

    Args:
        text (`str`): See [`read_method`].

    Returns:
        `str`: Such as "l2:strength=0.001" for "l2".

    Raises:
        ValueError: See [`read_method`].
    """
    kind, options = read_method(text)
    return spell(kind, KINDS[kind], options)


def points(text: str) -> list[str]:
    """Names of what [`train`] will yield, in order; that of the method itself unless it stands for several.

    Args:
        text (`str`): See [`read_method`].

    Returns:
        `list[str]`: Canonical.

    Raises:
        ValueError: See [`read_method`].
    """
    kind, options = read_method(text)
    several = next((name for name, value in options.items() if isinstance(value, tuple)), None)
    if several is None:
        return [spell(kind, KINDS[kind], options)]
    return [spell(kind, KINDS[kind], options | {several: value}) for value in options[several]]


def train(method: str, job: Job) -> list[tuple[str, Trained]]:
    """Train by a method.

    Args:
        method (`str`): See [`read_method`].
        job (`Job`): Data, model and arguments.

    Returns:
        `list[tuple[str, Trained]]`: By canonical name, see [`points`]; models of one training share their base
        weights. A LoRA adapter's `figures` have "rank/effective": how many directions B A uses, mean over the layers.

    Raises:
        ValueError: See [`read_method`]; or the job has too few rows for the method.
    """
    kind, options = read_method(method)
    found = KINDS[kind].run(Run(job), options)
    for _, trained in found:
        config = getattr(trained.model, "peft_config", {}).get("default")
        if getattr(config, "peft_type", None) == PeftType.LORA:
            ranks = effective_ranks(AdapterState(trained.model, warn_excluded=False))
            trained.figures["rank/effective"] = float(ranks.mean())
    return [(spell(kind, KINDS[kind], options | own), trained) for own, trained in found]
