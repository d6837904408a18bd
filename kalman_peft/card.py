"""The model card: what was trained, how, and what it cost in forgetting; nothing that was not measured."""

import json
from importlib.resources import files
from typing import Any

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
    from huggingface_hub import ModelCard, ModelCardData

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
    template = str(files("kalman_peft") / "model_card_template.md")
    card = ModelCard.from_template(
        data,
        template_path=template,
        model_name=kwargs.get("model_name") or arguments.output_dir.rstrip("/").split("/")[-1],
        base=base,
        optimizer="LoKO (Kalman filter)"
        if arguments.uses_loko
        else str(getattr(arguments.optim, "value", arguments.optim)),
        uses_loko=arguments.uses_loko,
        learning_rate=arguments.learning_rate,
        batch=arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        steps=trainer.state.global_step,
        curvature=belief.info.get("curvature") if belief is not None else None,
        warm_start=belief.info.get("warm_start") if belief is not None else None,
        lineage=belief.info.get(LINEAGE, []) if belief is not None else [],
        written=belief is not None and bool(belief.source),
        refit=arguments.laplace_refit_steps,
        strength=trainer.laplace_strength,
        prior_precision=trainer.prior_precision,
        schedule=arguments.laplace_schedule,
        evidence=arguments.uses_evidence,
        budget=arguments.forgetting_budget,
        form=arguments.laplace_form,
        source={k.removeprefix("source/"): v for k, v in trainer._source_metrics().items()},
        lora=json.dumps(
            {n: getattr(trainer.model.peft_config[trainer.model.active_adapters[0]], n) for n in ("r", "lora_alpha")}
        ),
        results=results,
    )
    card.save(path)
