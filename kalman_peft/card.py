"""The model card: what was trained, how, and what it cost in forgetting; nothing that was not measured."""

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from .belief import BELIEF_CONFIG, Belief
from .lineage import LINEAGE


def write_model_card(
    trainer: Any, path: str, *args: Any, results: str | None = None, tags: Any = None, **kwargs: Any
) -> None:
    """Render the card of a `KalmanTrainer`'s adapter.

    Args:
        trainer (`KalmanTrainer`): After training.
        path (`str`): File to write.
        *args: As for `Trainer.create_model_card`; a first one is the language.
        results (`str`, *optional*): Markdown with measured results, put under its own heading.
        tags (`str` or `list[str]`, *optional*): Further tags.
        **kwargs: Of `Trainer.create_model_card`: `language`, `license`, `model_name`, `dataset`, `dataset_tags`,
            `tasks` (as tags), `finetuned_from`; of TRL's: `dataset_name`.
    """
    from huggingface_hub import ModelCardData

    own = ["kalman_peft", "lora", *(getattr(trainer.model, "model_tags", None) or [])]
    for more in (tags, kwargs.get("tasks")):
        own += [more] if isinstance(more, str) else list(more or [])
    base = (
        kwargs.get("finetuned_from")
        or trainer.model.peft_config[trainer.model.active_adapters[0]].base_model_name_or_path
    )
    data = ModelCardData(
        language=args[0] if args else kwargs.get("language"),
        license=kwargs.get("license"),
        library_name="peft",
        base_model=base or None,
        datasets=kwargs.get("dataset_tags") or kwargs.get("dataset") or kwargs.get("dataset_name"),
        tags=sorted(set(own)),
    )
    arguments = trainer.args
    belief = trainer.belief
    _render(
        path,
        data,
        belief,
        model_name=kwargs.get("model_name") or arguments.output_dir.rstrip("/").split("/")[-1],
        optimizer="LoKO (Kalman filter)"
        if arguments.uses_loko
        else str(getattr(arguments.optim, "value", arguments.optim)),
        uses_loko=arguments.uses_loko,
        learning_rate=arguments.learning_rate,
        batch=arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        steps=trainer.state.global_step,
        refit=arguments.laplace_refit_steps,
        strength=trainer.laplace_strength,
        prior_precision=trainer.prior_precision,
        schedule=arguments.laplace_schedule,
        evidence=arguments.uses_evidence,
        budget=arguments.forgetting_budget,
        source={k.removeprefix("source/"): v for k, v in trainer._source_metrics().items()},
        lora=_lora(trainer.model.peft_config[trainer.model.active_adapters[0]]),
        results=results,
    )


def write_card_of_folder(folder: str | os.PathLike, *, results: str | None = None, **data: Any) -> Path:
    """Render the card of a saved adapter from what its folder says; what no file records is left out.

    Args:
        folder (`str` or `os.PathLike`): With an adapter, and perhaps a belief, `kalman_state.json` and
            `trainer_state.json`.
        results (`str`, *optional*): Markdown with measured results, put under its own heading.
        **data: For the card's header, such as `license`, `language`, `datasets`, `tags`.

    Returns:
        `Path`: README.md in that folder, which is replaced.

    Raises:
        FileNotFoundError: The folder has no adapter.
    """
    from huggingface_hub import ModelCardData
    from peft import PeftConfig

    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} has no adapter_config.json; give the folder of an adapter.")
    config = PeftConfig.from_pretrained(str(folder))
    belief = Belief.from_pretrained(folder) if (folder / BELIEF_CONFIG).is_file() else None
    kept, trained = _json(folder / "kalman_state.json"), _json(folder / "trainer_state.json")
    history = trained.get("log_history", [])
    loko = any("kalman/trace_p" in entry for entry in history)
    measured = [entry for entry in history if {"source/loss", "source/loss_start", "source/rise"} <= entry.keys()]
    data["tags"] = sorted({"kalman_peft", "lora", *(data.get("tags") or [])})
    data = {"library_name": "peft", "base_model": config.base_model_name_or_path or None} | data
    _render(
        folder / "README.md",
        ModelCardData(**data),
        belief,
        model_name=folder.absolute().name,
        optimizer="LoKO (Kalman filter)" if loko else None,
        uses_loko=loko,
        steps=trained.get("global_step"),
        strength=kept.get("laplace_strength"),
        prior_precision=kept.get("prior_precision") or 0.0,
        ended=True,
        source={k.removeprefix("source/"): v for k, v in (measured[-1] if measured else {}).items()},
        lora=_lora(config),
        results=results,
    )
    return folder / "README.md"


def _render(path: Any, data: Any, belief: Belief | None, **fields: Any) -> None:
    from huggingface_hub import ModelCard

    info = belief.info if belief is not None else {}
    template = str(files("kalman_peft") / "model_card_template.md")
    ModelCard.from_template(
        data,
        template_path=template,
        base=data.base_model or "",
        curvature=info.get("curvature"),
        warm_start=info.get("warm_start"),
        lineage=info.get(LINEAGE, []),
        written=belief is not None and bool(belief.source),
        **fields,
    ).save(path)


def _lora(config: Any) -> str:
    return json.dumps({name: getattr(config, name) for name in ("r", "lora_alpha")})


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
