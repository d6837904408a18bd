"""What is measured of a model: the target, what was to be kept, and the divergence from the base model."""

from __future__ import annotations

from typing import Any

from ..answers import answer_accuracy
from ..evaluate import choice_accuracy, kl_from_base, text_loss
from ..rows import head
from .data import ScenarioData


def evaluate(data: ScenarioData, model: Any, tuned: bool = True) -> dict[str, Any]:
    """Target, sources and multiple choice.

    Args:
        data (`ScenarioData`): Of the scenario.
        model (`nn.Module`): Causal language model, on the device of `data.base`.
        tuned (`bool`, *optional*, defaults to `True`): Measure KL(base || model) too.

    Returns:
        `dict[str, Any]`: For `recipe_tools.report`: `target` (`loss`, `kl` and `tokens`; with `generate_items` also
        `accuracy`, `correct` and so on), by name `sources` (`loss`, `kl`, `tokens`) and `choices`.
    """
    s = data.scenario

    def losses(rows: Any, name: str) -> dict[str, float]:
        if not tuned:
            return text_loss(model, rows, description=name)
        found = kl_from_base(model, rows, base=data.base, description=name)
        return {key: found[key] for key in ("loss", "kl", "tokens")}

    target: dict[str, Any] = losses(data.heldout_rows, "target")
    if s.generate_items and "answer" in data.heldout.column_names:
        some = head(data.heldout, s.generate_items)
        longest = max(len(ids) for ids in data.tokenizer(list(some["answer"]))["input_ids"])
        room = min(longest + longest // 4 + 8, s.max_length)
        target |= answer_accuracy(model, data.tokenizer, some, extract=data.reader, max_new_tokens=room)
    return {
        "target": target,
        "sources": {name: losses(rows, name) for name, rows in data.kept.items()},
        "choices": {
            name: choice_accuracy(model, data.tokenizer, items, description=name)
            for name, items in data.choices.items()
        },
    }
