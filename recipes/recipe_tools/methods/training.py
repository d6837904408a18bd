"""One training run of a method: its model, its KalmanTrainer, its clock and its memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from kalman_peft import KalmanConfig, KalmanTrainer
from kalman_peft.trainer import with_adapter

from ..meters import PeakMemory, now


LOGGED = ("laplace/", "kalman/", "source/", "ima/")


@dataclass(frozen=True)
class Job:
    """What the methods of one run share: one scenario, one seed.

    Attributes:
        base (`Callable[[], PreTrainedModel]`): Makes a fresh base model, without adapter, in the scenario's dtype.
        lora (`LoraConfig`): Of the adapter; a method may change a copy.
        config (`Callable[..., KalmanConfig]`): Training arguments from changes (`output_dir`, `learning_rate`, ...);
            steps, batch size, seed and schedule are the scenario's.
        target (`Dataset`): Tokenised rows to learn: `input_ids`, `labels`.
        source (`Dataset`): Tokenised rows of the source domain, for curvature or for replay.
        self_source (`Callable[[int], Dataset]`): So many rows that the base model writes itself.
        validation (`Dataset`): Target rows for early stopping only.
        trainer_options (`Mapping[str, Any]`): `data_collator`, `processing_class`.
        folder (`Path`): Scratch, deleted afterwards.
        seed (`int`): Of the adapter, the order of rows and the draws.
        steps (`int`): Of the optimizer.
    """

    base: Callable[[], PreTrainedModel]
    lora: LoraConfig
    config: Callable[..., KalmanConfig]
    target: Dataset
    source: Dataset
    self_source: Callable[[int], Dataset]
    validation: Dataset
    trainer_options: Mapping[str, Any]
    folder: Path
    seed: int
    steps: int


@dataclass
class Trained:
    """What a method leaves.

    Attributes:
        model (`Any`): Evaluates as the tuned model, its adapter active. Without the adapter it need not be the base
            model: some initialisations change the base weights.
        seconds (`float`): Of training, with what a method does between its steps (validation, refits).
        setup_seconds (`float`): Of what comes before the first step: curvature, decompositions, written sources.
        peak_bytes (`int`): Most memory above what the base model left, over set-up and training.
        peak_kind (`str`): What that is: "cuda allocation", "resident set", or "resident set of the process" where the
            high-water mark cannot be reset, so that earlier runs of the process may hide this one.
        extra_bytes (`int`): What has to be kept beside an ordinary adapter: a belief, replayed rows, a start.
        figures (`dict[str, float]`): Last logged values ("laplace/...", "kalman/...", "source/...", "ima/...",
            "train/loss"), and the method's own.
    """

    model: Any
    seconds: float
    setup_seconds: float
    peak_bytes: int
    peak_kind: str
    extra_bytes: int = 0
    figures: dict[str, float] = field(default_factory=dict)


class Run:
    """A base model in place, and what it takes to make a tuned one of it.

    Args:
        job (`Job`): Data, model and arguments.
    """

    def __init__(self, job: Job):
        self.job = job
        self.device = self.arguments().device
        self.base: Any = job.base().to(self.device)  # type: ignore[arg-type]
        self._peak = PeakMemory(self.device)
        self._setup = 0.0

    def arguments(self, **changes: Any) -> KalmanConfig:
        """Training arguments; a change of `None` to the learning rate is none.

        Args:
            **changes: Fields of [`KalmanConfig`].

        Returns:
            `KalmanConfig`: The scenario's, changed.
        """
        if changes.get("optimizer") != "loko" and changes.get("learning_rate") is None:
            changes.pop("learning_rate", None)
        logs = {"logging_strategy": "steps", "logging_steps": max(self.job.steps // 10, 1), "save_strategy": "no"}
        return self.job.config(output_dir=str(self.job.folder), **(logs | changes))

    def adapt(self, config: Any = None) -> Any:
        """The base model with an adapter; ordinary LoRA starts alike in all methods.

        Args:
            config (`PeftConfig`, *optional*): Defaults to the job's.

        Returns:
            `PeftModel`: Trainable.
        """
        return with_adapter(self.base, copy.deepcopy(self.job.lora) if config is None else config, self.job.seed)

    @contextmanager
    def setting_up(self) -> Iterator[None]:
        """Count what happens inside as set-up."""
        began = now(self.device)
        yield
        self._setup += now(self.device) - began

    def fit(
        self,
        model: Any,
        rows: Dataset | None = None,
        *,
        trainer: type[KalmanTrainer] = KalmanTrainer,
        make_optimizer: Callable[[Any, KalmanConfig], torch.optim.Optimizer] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        source: Dataset | None = None,
        belief: Any = None,
        trainer_options: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> tuple[Trained, KalmanTrainer]:
        """Train a model.

        Args:
            model (`PeftModel`): From `adapt`.
            rows (`Dataset`, *optional*): Defaults to the target's.
            trainer (`type`, *optional*): [`KalmanTrainer`], or a subclass.
            make_optimizer (`Callable`, *optional*): From model and arguments; by default the arguments' own.
            callbacks (`Sequence[TrainerCallback]`, *optional*): More of them.
            source (`Dataset`, *optional*): For the trainer to fit a belief on.
            belief (`Belief`, *optional*): In place of that.
            trainer_options (`Mapping[str, Any]`, *optional*): For a subclass.
            **changes: Of the arguments.

        Returns:
            `tuple[Trained, KalmanTrainer]`: The second for what is left in it.
        """
        with self.setting_up():
            args, clock = self.arguments(**changes), Clock(self.device)
            made = None if make_optimizer is None else make_optimizer(model, args)
            used = trainer(
                model=model,
                args=args,
                train_dataset=self.job.target if rows is None else rows,
                source_dataset=source,
                belief=belief,
                optimizers=(made, None),
                callbacks=[clock, *callbacks],
                **self.job.trainer_options,
                **(trainer_options or {}),
            )
            used.remove_callback(PrinterCallback)
        before = now(self.device)
        used.train()
        self._setup += clock.began - before  # fitting a belief
        figures: dict[str, float] = {}
        for entry in used.state.log_history:
            figures |= {"train/loss": entry["loss"]} if "loss" in entry else {}
            figures |= {key: float(value) for key, value in entry.items() if key.startswith(LOGGED)}
        # Autocast's wrapper would stay in copies of the model.
        tuned = used.accelerator.unwrap_model(used.model, keep_fp32_wrapper=False)
        return Trained(tuned, clock.seconds, self._setup, *self._peak.read(), figures=figures), used


class Clock(TrainerCallback):
    """Seconds between the beginning and the end of training.

    Args:
        device (`torch.device`): Whose work has to be finished.
    """

    def __init__(self, device: torch.device):
        self.device, self.began, self.seconds = device, 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        self.began = now(self.device)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        self.seconds = now(self.device) - self.began


def copied(model: Any) -> Any:
    """A copy of a model's adapter on the same base weights: what is trained is copied, what is frozen is shared."""
    kept = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in kept})


def row_bytes(rows: Dataset) -> int:
    """Bytes that stored rows take: ids and labels, four each."""
    return sum(4 * (len(row["input_ids"]) + len(row["labels"])) for row in rows)  # type: ignore[index]


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of named tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
