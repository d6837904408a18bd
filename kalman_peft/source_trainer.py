"""SourceMixin: source data inside a Hugging Face Trainer: where they come from, how they are read, what they cost."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from .lineage import fit_lineage
from .losses import mean_loss
from .self_source import Row, refuse_other_tasks, rows_from_tensors, sample_source, tensors_from_rows
from .sources import Sources, split_sources


SELF = "self"

_TrainerBase = Trainer if TYPE_CHECKING else object  # a mixin: the Trainer comes after it


class SourceMixin(_TrainerBase):
    """Holds the source data of a [`KalmanMixin`], loads them, and measures the loss on the part held out.

    Args:
        model (`PeftModel`): See [`KalmanMixin`].
        args (`KalmanArguments`): See [`KalmanMixin`].
        source_dataset (`Dataset`, `Mapping`, `Sequence` or `str`, *optional*): See [`KalmanMixin`].
        fits_source (`bool`): Whether a part for the curvature is needed.
        **kwargs: As for the Trainer.

    Raises:
        ValueError: A source is too small, or is "self" for a model that writes nothing.
    """

    args: Any
    model: Any

    def __init__(self, model: Any, args: Any, *posargs: Any, source_dataset: Any, fits_source: bool, **kwargs: Any):
        if isinstance(source_dataset, str) and source_dataset != SELF:
            raise ValueError(
                f"`source_dataset` must be a dataset or {SELF!r}, got {source_dataset!r}; load the dataset first."
            )
        self._writes_source = isinstance(source_dataset, str)
        self._written: list[Row] = []
        self._fits_source = fits_source
        self._sources: Sources | None = None
        if source_dataset is not None and not self._writes_source:
            self._sources = self._split(source_dataset, args)
        self._losses_start: dict[str, float] = {}  # held-out loss per source
        self._losses: dict[str, float] = {}
        super().__init__(model, args, *posargs, **kwargs)
        if self._sources is not None:
            self._sources = replace(
                self._sources,
                fit={name: self._prepare_source(part, name) for name, part in self._sources.fit.items()},
                heldout={name: self._prepare_source(part, name) for name, part in self._sources.heldout.items()},
            )
        if self._writes_source:
            refuse_other_tasks(self.model)

    def _prepare_source(self, rows: Any, name: str) -> Any:
        """What the Trainer does to its training data before it batches them: nothing, here."""
        return rows

    def _split(self, dataset: Any, args: Any) -> Sources:
        return split_sources(
            dataset,
            weights=args.source_weights,
            num_samples=args.source_samples,
            num_heldout=args.source_heldout,
            fit=self._fits_source,
        )

    def _write_source(self, kept: dict[str, Any]) -> None:
        """Sequences of the base model's own, or those that a checkpoint kept."""
        args = self.args
        if kept:
            self._written = rows_from_tensors(kept)
        else:
            self._written = sample_source(
                self.model,
                getattr(self.processing_class, "tokenizer", self.processing_class),
                (args.source_samples if self._fits_source else 0) + args.source_heldout,
                args.source_self_length,
                seed=args.seed,
                prompts=args.source_self_prompts,
                batch_size=args.per_device_eval_batch_size,
                progress_bar=not args.disable_tqdm,
            )
        self._sources = self._split(self._written, args)

    def _written_record(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """How self-written source data came about, and the sequences as tensors; both empty for other sources."""
        if not self._writes_source:
            return {}, {}
        tensors = tensors_from_rows(self._written)
        settings = {
            "kind": SELF,
            "seed": self.args.seed,
            "temperature": 1.0,
            "length": tensors["input_ids"].shape[1],
            "prompts": self.args.source_self_prompts,
            "num_heldout": self.args.source_heldout,
        }
        return settings, tensors

    @property
    def _weights(self) -> dict[str, float]:
        return self._sources.weights if self._sources is not None else {}

    @property
    def _measures_source(self) -> bool:
        return self._sources is not None and bool(self._sources.heldout)

    def _loader(self, dataset: Any, description: str = "source") -> DataLoader:
        prepared, collate = dataset, self.data_collator
        if hasattr(dataset, "column_names"):
            prepared = self._remove_unused_columns(dataset, description=description)
        else:
            collate = self._get_collator_with_removed_columns(collate, description=description)
        return DataLoader(
            cast(Any, prepared),
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=collate,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator(),  # reading the source must not move the run's random state
        )

    def _fit_data(self) -> dict[str, DataLoader]:
        assert self._sources is not None
        return {name: self._loader(dataset) for name, dataset in self._sources.fit.items()}

    def _fit_lineage(self, info: dict[str, Any]) -> list[dict[str, Any]]:
        """What a belief with this info was fitted on, see [`fit_lineage`]."""
        assert self._sources is not None
        fit = {SELF if self._writes_source else name: dataset for name, dataset in self._sources.fit.items()}
        return fit_lineage(info, fit)

    def _measure_source(self) -> None:
        """Loss on the held-out part of every source."""
        assert self._sources is not None
        self._losses = {
            name: mean_loss(self.model, self._loader(dataset), self._prepare_inputs, self.compute_loss_context_manager)
            for name, dataset in self._sources.heldout.items()
        }

    def _source_metrics(self) -> dict[str, float]:
        """Weighted loss over the sources, and each source's own where there are several."""
        if not self._losses or not self._losses_start:
            return {}
        now, start = (
            sum(self._weights[name] * loss for name, loss in losses.items())
            for losses in (self._losses, self._losses_start)
        )
        metrics = {"source/loss": now, "source/loss_start": start, "source/rise": now - start}
        if len(self._losses) > 1:
            for name, loss in self._losses.items():
                metrics[f"source/{name}/loss"] = loss
                metrics[f"source/{name}/rise"] = loss - self._losses_start[name]
        return metrics
