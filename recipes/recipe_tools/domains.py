"""Domains that are learnt one after the other: problems or texts; their held-out rows are the same in every run."""

from __future__ import annotations

from dataclasses import dataclass

from datasets import Dataset

from .rows import head
from .sources import TEXTS, load_sources
from .targets import GENERATED, load_target, names_generated


@dataclass(frozen=True)
class Domain:
    """One task of a sequence.

    Attributes:
        name (`str`): Short name.
        provenance (`str`): What the rows are and how they were split.
        train (`Dataset`): Columns `question` and `answer`, or `text`.
        heldout (`Dataset`): The same columns.
    """

    name: str
    provenance: str
    train: Dataset
    heldout: Dataset


def split_spec(spec: str) -> tuple[str, str]:
    """Read "NAME:DATA", or DATA alone, which then is the name too.

    Args:
        spec (`str`): DATA is a generator of reasoning-gym (`GENERATED`) or several with "+" between, an offline text
            (`TEXTS`), a .jsonl file or a Hub id, which may have a configuration: "chat:owner/name:configuration".

    Returns:
        `tuple[str, str]`: Name and data.

    Raises:
        ValueError: One of the two is missing.
    """
    known = names_generated(spec) or spec in TEXTS
    name, colon, data = (spec, ":", spec) if known else spec.partition(":")
    if not (name and colon and data) or "/" in name:
        raise ValueError(
            f"{spec!r} is no domain: give NAME:DATA, DATA a Hub id, a .jsonl file or one of "
            f"{', '.join((*GENERATED, *TEXTS))}."
        )
    return name, data


def built_in(name: str) -> bool:
    """Whether data go by a word of the recipes' own, whatever files of that name there may be."""
    return name in (*TEXTS, "offline", "gsm8k-offline", "far-domains") or names_generated(name)


def load_domain(spec: str, *, limit_train: int | None, limit_eval: int, seed: int) -> Domain:
    """Load one domain.

    Args:
        spec (`str`): See [`split_spec`].
        limit_train (`int`, *optional*): Training rows; `None` takes all.
        limit_eval (`int`): Held-out rows, always the same ones.
        seed (`int`): Chooses and orders the training rows.

    Returns:
        `Domain`: Training and held-out rows.
    """
    name, data = split_spec(spec)
    if data in TEXTS:
        source = load_sources(data)[data]
        train = head(source.fit.shuffle(seed=seed), limit_train)
        return Domain(name, source.provenance, train, head(source.heldout, limit_eval))
    target = load_target(data, limit_train=limit_train, limit_eval=limit_eval, seed=seed)
    return Domain(name, target.provenance, target.train, target.heldout)
