"""Rows and models of a scenario, loaded when they are first needed and then kept."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets

from ..answers import MARK, final_number, final_text
from ..choices import load_choices
from ..domains import Domain, load_domain
from ..encoding import tokenize
from ..models import load_base, load_tokenizer
from ..rows import head
from ..runs import short_name
from ..self_written import self_written
from ..sources import Source, load_sources
from .scenario import SELF, Scenario, short_source


class ScenarioData:
    """What the runs of a scenario share. Held-out rows are the same for all seeds.

    Args:
        scenario (`Scenario`): See there.
    """

    def __init__(self, scenario: Scenario):
        self.scenario = scenario
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._targets: dict[int, Domain] = {}

    def model(self) -> Any:
        """A fresh base model on the accelerator, if there is one."""
        return load_base(self.scenario.model, self.scenario.torch_dtype).to(self.device)

    @cached_property
    def base(self) -> Any:
        """The base model to compare with; never trained."""
        return self.model().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's."""
        return load_tokenizer(self.scenario.model)

    # -- target ------------------------------------------------------------------------------------------------------

    def domain(self, seed: int) -> Domain:
        """The target with the rows of a seed."""
        if seed not in self._targets:
            s = self.scenario
            # Rows whose question leaves no room for an answer are dropped: read more.
            wanted = 4 * ((s.rows or s.steps * s.batch_size) + s.validation_rows)
            self._targets[seed] = load_domain(
                f"target:{s.target}", limit_train=wanted, limit_eval=s.eval_items, seed=seed
            )
        return self._targets[seed]

    def target(self, seed: int) -> tuple[Dataset, Dataset]:
        """Rows to train on and rows for validation, which share none; both depend on the seed.

        Args:
            seed (`int`): Of the run.

        Returns:
            `tuple[Dataset, Dataset]`: Tokenised.

        Raises:
            ValueError: There are too few.
        """
        s = self.scenario
        rows = tokenize(self.domain(seed).train, self.tokenizer, s.max_length)
        if len(rows) <= s.validation_rows:
            raise ValueError(
                f"{s.name}: the target {s.target!r} has {len(rows)} rows of at most {s.max_length} tokens; with "
                f"validation_rows={s.validation_rows} none is left to train on."
            )
        first = s.validation_rows
        last = min(first + (s.rows or s.steps * s.batch_size), len(rows))
        return rows.select(range(first, last)), rows.select(range(first))

    @cached_property
    def heldout(self) -> Dataset:
        """Held-out rows of the target as text: `question` and `answer`, or `text`."""
        return self.domain(self.scenario.seeds[0]).heldout

    @cached_property
    def heldout_rows(self) -> Dataset:
        """The same rows, tokenised."""
        return tokenize(self.heldout, self.tokenizer, self.scenario.max_length)

    @property
    def reader(self) -> Any:
        """Reads the final answer of a target problem: a number where the answers mark one, else text."""
        marked = all(MARK in answer for answer in self.heldout["answer"])
        return final_number if marked or self.scenario.target == "gsm_symbolic" else final_text

    # -- what is to be kept ------------------------------------------------------------------------------------------

    def self_source(self, part: str, rows: int) -> tuple[Dataset, float]:
        """Rows that the base model writes.

        Args:
            part (`str`): "fit", of which all runs see the first rows of the same `source_rows`; or "heldout".
            rows (`int`): How many.

        Returns:
            `tuple[Dataset, float]`: Rows, and their share of the seconds that it took when they were written.

        Raises:
            ValueError: More than `source_rows` to fit.
        """
        s = self.scenario
        count = s.source_rows if part == "fit" else rows
        if rows > count:
            raise ValueError(f"{s.name}: {rows} rows by the model itself are more than source_rows={count}; raise it.")
        found, seconds = self_written(s.model, s.torch_dtype, part, count, s.source_length)
        return head(found, rows), seconds * rows / count

    @cached_property
    def _texts(self) -> dict[str, Source]:
        """The texts of `source` and `sources`, by their names there."""
        names = dict.fromkeys(name for name in (*self.scenario.source, *self.scenario.sources) if name != SELF)
        return {name: next(iter(load_sources(name).values())) for name in names}

    def source(self, seed: int) -> Dataset:
        """Rows that methods may see of what is to be kept, in the order of a seed; sources in equal parts.

        Args:
            seed (`int`): Of the run.

        Returns:
            `Dataset`: Tokenised.

        Raises:
            ValueError: A source has too few.
        """
        s = self.scenario
        parts = []
        for place, name in enumerate(s.source):
            count = s.source_rows // len(s.source) + (place < s.source_rows % len(s.source))
            if name == SELF:
                rows = self.self_source("fit", count)[0].shuffle(seed=seed)
            else:
                texts = head(self._texts[name].fit.shuffle(seed=seed), 4 * count)
                rows = head(tokenize(texts, self.tokenizer, s.source_length), count)
            if len(rows) < count:
                raise ValueError(
                    f"{s.name}: source {name!r} has {len(rows)} rows, of {count}; give fewer source_rows."
                )
            parts.append(rows)
        return concatenate_datasets(parts).shuffle(seed=seed)

    @cached_property
    def kept(self) -> dict[str, Dataset]:
        """Held-out rows by source, tokenised."""
        s, found = self.scenario, {}
        for name in s.sources:
            if name == SELF:
                seen = {tuple(ids) for ids in self.self_source("fit", s.source_rows)[0]["input_ids"]}
                rows = self.self_source("heldout", s.source_items)[0]
                rows = rows.select([i for i, ids in enumerate(rows["input_ids"]) if tuple(ids) not in seen])
            else:
                rows = tokenize(head(self._texts[name].heldout, s.source_items), self.tokenizer, s.source_length)
            found[short_source(name)] = rows
        return found

    @cached_property
    def choices(self) -> dict[str, Dataset]:
        """Multiple-choice items by task."""
        return {name: load_choices(name, limit=items) for name, items in self.scenario.choices.items()}

    def provenance(self, seed: int) -> dict[str, str]:
        """What the data are, by name."""
        s = self.scenario
        written = f"rows of {s.source_length} tokens that {short_name(s.model)} wrote, drawn at temperature 1"
        texts = {name: source.provenance for name, source in self._texts.items()}
        used = {short_source(name): texts.get(name, written) for name in dict.fromkeys((*s.source, *s.sources))}
        return {"target": self.domain(seed).provenance} | used
