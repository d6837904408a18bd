"""Rows from which a method takes curvature, and what a belief made of them takes to keep."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from .training import Run, tensor_bytes


SOURCES = ("true", "self", "proxy")


def source_rows(run: Run, samples: int, heldout: int = 0, kind: str = "true") -> Dataset:
    """Source data of a run.

    Args:
        run (`Run`): Of a job.
        samples (`int`): For the curvature.
        heldout (`int`, *optional*, defaults to 0): More of them, at the end.
        kind (`str`, *optional*, defaults to `"true"`):
            "true": the job's source. "self": written by the base model, in the time of the set-up. "proxy": rows of
            the target stand in, for their texts only: their labels are for methods that draw labels from the model.

    Returns:
        `Dataset`: At least so many rows.

    Raises:
        ValueError: There are fewer.
    """
    wanted = samples + heldout
    if kind == "self":
        with run.setting_up():
            return run.job.self_source(wanted)
    rows = run.job.target if kind == "proxy" else run.job.source
    if len(rows) < wanted:
        raise ValueError(
            f"samples={samples} with {heldout} rows held out needs {wanted} rows of the {kind} source; it has "
            f"{len(rows)}. Give a smaller samples=, or more source rows."
        )
    return rows


def belief_bytes(trainer: Any) -> int:
    """Bytes of a trainer's belief, mean and precision; 0 without one."""
    belief = trainer.belief
    return 0 if belief is None else tensor_bytes(belief.mean) + tensor_bytes(belief.precision.tensors())
