"""One run of the comparison: a method on a scenario with a seed, kept as one file per setting that it makes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from transformers import DataCollatorForSeq2Seq, set_seed
from transformers.utils import logging

from kalman_peft import KalmanConfig

from ..choices import OFFLINE_CHOICES
from ..domains import built_in
from ..models import BUNDLED
from ..report import results_json, write_json
from ..runs import device_name, file_marks, file_name, read_run, short_name
from .data import ScenarioData
from .metrics import evaluate
from .scenario import FREE, SELF, Scenario
from .summary import report_settings


@dataclass(frozen=True)
class Run:
    """A training: one method may make several settings ("wise:alpha=0.25/0.5")."""

    scenario: str
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.scenario}, {self.method}, seed {self.seed}"


@dataclass
class Runner:
    """Does runs and keeps them.

    Args:
        scenarios (`Mapping[str, Scenario]`): By name.
        folder (`Path`): Gets a folder per scenario, with the files under `runs/`.
        threads (`int`): Of torch, in the process that runs.
    """

    scenarios: Mapping[str, Scenario]
    folder: Path
    threads: int
    _data: dict[str, ScenarioData] = field(default_factory=dict, repr=False)
    _before: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    _marks: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)

    def file(self, scenario: str, setting: str, seed: int) -> Path:
        """Of a setting and a seed."""
        return self.folder / file_name(scenario) / "runs" / f"{file_name(setting)}-s{seed}.json"

    def stored(self, scenario: str, setting: str, seed: int) -> dict[str, Any] | None:
        """The record of a setting, if it is there.

        Args:
            scenario (`str`): Its name.
            setting (`str`): Canonical.
            seed (`int`): Of rows, adapter and draws.

        Returns:
            `dict[str, Any]` or `None`: In the shape of PEFT's MetaMathQA benchmark, with `run` besides.

        Raises:
            ValueError: The file is of other settings.
        """
        return read_run(self.file(scenario, setting, seed), self.identity(scenario, setting, seed))

    def identity(self, scenario: str, setting: str, seed: int) -> dict[str, Any]:
        """What a run depends on."""
        values = asdict(self.scenarios[scenario])
        settings = {key: value for key, value in values.items() if key not in FREE}
        # A file's name, not where it lies on this machine.
        settings |= {key: short_name(settings[key]) for key in ("model", "target")}
        settings |= {key: [short_name(name) for name in settings[key]] for key in ("source", "sources")}
        settings["choices"] = {short_name(name): items for name, items in settings["choices"].items()}
        if scenario not in self._marks:
            self._marks[scenario] = self._files(scenario)
        if self._marks[scenario]:
            settings["files"] = self._marks[scenario]
        return {"method": setting, "seed": seed, "settings": settings}

    def _files(self, scenario: str) -> dict[str, str]:
        """What the local files of a scenario hold: a name alone does not tell."""
        s = self.scenarios[scenario]
        names = {"target": s.target}
        for option in ("source", "sources", "choices"):
            names |= {f"{option}/{place}": name for place, name in enumerate(getattr(s, option))}
        marked = {o: name for o, name in names.items() if not (name in (SELF, *OFFLINE_CHOICES) or built_in(name))}
        return file_marks(marked | ({} if s.model in BUNDLED else {"model": s.model}))

    def missing(self) -> list[Run]:
        """Runs of which a file is not there: tuning first, and a seed after the other.

        Where a scenario chooses settings by tuning (`points`), its other runs are known only after that.

        Returns:
            `list[Run]`: None twice.

        Raises:
            ValueError: A file is of other settings, or the scenario's methods cannot be read.
        """
        found: dict[Run, None] = {}
        for name, scenario in self.scenarios.items():
            families = scenario.families()
            chosen = {
                family: report_settings(scenario, list(settings), partial(self.stored, name)) or []
                for family, settings in families.items()
            }
            for seed in (*scenario.tune_seeds, *scenario.seeds):
                for family, settings in families.items():
                    for setting in settings if seed in scenario.tune_seeds else chosen[family]:
                        if self.stored(name, setting, seed) is None:
                            found[Run(name, settings[setting], seed)] = None
        return list(found)

    def prepare(self, runs: Iterable[Run]) -> None:
        """Make what lies in the cache once, before several processes would each make it.

        Args:
            runs (`Iterable[Run]`): Which will be done.
        """
        for name in dict.fromkeys(run.scenario for run in runs):
            data = ScenarioData(self.scenarios[name])
            _ = data.kept, data.source(data.scenario.seeds[0])

    def __call__(self, run: Run) -> None:
        """Train, measure, and write a file for every setting that the method makes.

        Args:
            run (`Run`): What to do.
        """
        from recipe_tools.methods import train  # late: loads what only training needs

        torch.set_num_threads(self.threads)
        logging.disable_progress_bar()
        data = self._data.setdefault(run.scenario, ScenarioData(self.scenarios[run.scenario]))
        if run.scenario not in self._before:
            self._before[run.scenario] = evaluate(data, data.base, tuned=False)
        created, began = datetime.now(UTC).isoformat(), time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            written = _Written(data)
            job = make_job(data, run.seed, Path(scratch), written)
            set_seed(run.seed)
            points = train(run.method, job)
        seconds = time.perf_counter() - began
        while points:
            setting, trained = points.pop(0)
            record = self.record(run, setting, trained, job, created, seconds, written)
            write_json(record, self.file(run.scenario, setting, run.seed))

    def record(
        self, run: Run, setting: str, trained: Any, job: Any, created: str, seconds: float, written: _Written
    ) -> dict[str, Any]:
        """Measure a tuned model, and put down all that is known of it.

        Args:
            run (`Run`): Which made it.
            setting (`str`): Its canonical name.
            trained (`Trained`): Model and costs.
            job (`Job`): Of the run.
            created (`str`): Start of the run, ISO 8601.
            seconds (`float`): Of set-up and training together.
            written (`_Written`): What the base model wrote for the method.

        Returns:
            `dict[str, Any]`: See [`stored`].
        """
        s, data, model = self.scenarios[run.scenario], self._data[run.scenario], trained.model
        began = time.perf_counter()
        after = evaluate(data, model.to(data.device))
        identity = self.identity(run.scenario, setting, run.seed)
        samples = s.steps * s.batch_size
        tokens = sum(map(len, job.target["input_ids"]))
        config = getattr(model, "peft_config", {}).get("default")
        trained_weights = [p for p in model.parameters() if p.requires_grad]
        figures = dict(trained.figures)
        own = {
            "seconds": trained.seconds,
            "setup_seconds": trained.setup_seconds + written.hidden_seconds,
            "peak_bytes": trained.peak_bytes,
            "peak_kind": trained.peak_kind,
            "extra_bytes": trained.extra_bytes,
            "figures": figures,
            "device": device_name(),
        }
        record = results_json(
            experiment_name=f"{s.name}/{setting}/seed {run.seed}",
            created_at=created,
            total_time=seconds + time.perf_counter() - began,
            train_time=trained.seconds,
            train_config={"model_id": identity["settings"]["model"], "seed": run.seed, **identity["settings"]},
            peft_config=config if isinstance(config, PeftConfig) else None,
            metrics=[{"step": s.steps, "train loss": figures.get("train/loss")}],
            before=self._before[run.scenario],
            after=after,
            curve=[],
            num_trainable_params=sum(p.numel() for p in trained_weights),
            num_total_params=sum(p.numel() for p in model.parameters()),
            train_samples=samples,
            train_total_tokens=round(tokens * samples / len(job.target)),
            provenance=data.provenance(run.seed),
            forgetting_source=list(data.kept),
            file_size=sum(p.numel() * p.element_size() for p in trained_weights),
            memory_reserved=[trained.peak_bytes] if data.device.type == "cuda" else [],
            method={"method": setting, "training": run.method},
            further=own,
        )
        return {"run": identity} | record


class _Written:
    """Gives out rows that the base model writes, and knows what their writing cost before this run.

    Args:
        data (`ScenarioData`): Of the scenario.
    """

    def __init__(self, data: ScenarioData):
        self._data, self.hidden_seconds = data, 0.0

    def __call__(self, rows: int) -> Dataset:
        """So many rows; from the cache, their seconds are counted as if they had been written now."""
        began = time.perf_counter()
        found, seconds = self._data.self_source("fit", rows)
        self.hidden_seconds += max(seconds - (time.perf_counter() - began), 0.0)
        return found


def make_job(data: ScenarioData, seed: int, folder: Path, self_source: Any) -> Any:
    """What a method gets.

    Args:
        data (`ScenarioData`): Of the scenario.
        seed (`int`): Of rows, adapter and draws.
        folder (`Path`): Scratch.
        self_source (`Callable[[int], Dataset]`): Rows by the base model.

    Returns:
        `Job`: See `recipe_tools.methods`.
    """
    from recipe_tools.methods import Job

    s = data.scenario
    target, validation = data.target(seed)

    def config(**changes: Any) -> KalmanConfig:
        given = {
            "output_dir": str(folder), "learning_rate": s.learning_rate, "lr_scheduler_type": "linear",
            "max_steps": s.steps, "per_device_train_batch_size": s.batch_size, "seed": seed, "save_strategy": "no",
            "report_to": [], "disable_tqdm": True, "use_cpu": data.device.type == "cpu",
        }  # fmt: skip
        return KalmanConfig(**(given | changes))

    return Job(
        base=data.model,
        lora=LoraConfig(r=s.r, lora_alpha=s.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
        config=config,
        target=target,
        source=data.source(seed),
        self_source=self_source,
        validation=validation,
        trainer_options={
            "processing_class": data.tokenizer,
            "data_collator": DataCollatorForSeq2Seq(data.tokenizer, label_pad_token_id=-100),
        },
        folder=folder,
        seed=seed,
        steps=s.steps,
    )
