"""What a LoKO optimizer reaches on one of three tasks, each run once: its loss is kept in a file.

- `TextRuns`: a stream of labelled sentences, predicted before learned; mean log loss.
- `RegressionRuns`: the same stream with its labels taken as numbers, so that LoKO estimates the noise; mean squared
  error of what was predicted before it was learned.
- `LanguageRuns`: a language model on short problems; held-out loss of the solutions after a few steps.

A run's name is that of `online_classification.py`: "loko", or "loko:OPTION=VALUE,...".
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    set_seed,
)


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kalman_peft import create_loko_optimizer
from online_classification import Options as StreamOptions
from online_classification import Runner, make_stream
from recipe_tools.encoding import tokenize_supervised
from recipe_tools.evaluate import text_loss
from recipe_tools.offline import minilm_checkpoint, smollm2_checkpoint
from recipe_tools.prequential import summarise
from recipe_tools.report import write_json
from recipe_tools.rows import head
from recipe_tools.runs import file_name, read_run, short_name
from recipe_tools.spelling import parse_options
from recipe_tools.targets import load_target


@dataclass(frozen=True)
class Setting:
    """What all runs of a task share.

    Attributes:
        task (`str`): A text task, or "lm".
        model (`str`): "minilm", "smollm2", a Hub id or a path.
        data (`str`): "offline", a file or a Hub id.
        samples (`int`): Sentences of the stream, or sequences that the language model learns from.
        batch_size (`int`): Of them per step.
        max_length (`int`): Language model: tokens of a problem with its solution; longer ones are left out.
        eval_items (`int`): Language model: held-out problems.
    """

    task: str
    model: str
    data: str
    samples: int
    batch_size: int
    max_length: int = 128
    eval_items: int = 24


class TextRuns:
    """Runs on a stream of labelled sentences.

    Args:
        setting (`Setting`): The task.
        seeds (`list[int]`): Losses are averaged over them.
        r (`int`): Rank of the adapter.
        folder (`Path`): Of the runs' files.
    """

    unit = "log loss"

    def __init__(self, setting: Setting, seeds: list[int], r: int, folder: Path):
        self.setting, self.seeds = setting, seeds
        options = StreamOptions(
            task=setting.task, model=setting.model, data=setting.data, samples=setting.samples,
            batch_sizes=[setting.batch_size], seeds=seeds, r=r,
        )  # fmt: skip
        # Runs with adapters of another rank are others.
        self.folder = folder if r == StreamOptions.r else folder / f"r{r}"
        self.runner = Runner(options, make_stream(options), self.folder)

    def loss(self, name: str) -> float:
        """Mean over samples and seeds; infinite where the logits were not finite."""
        span = {"all": (0, self.setting.samples)}
        traces = [self.runner.run(name, self.setting.batch_size, seed) for seed in self.seeds]
        return statistics.fmean(summarise(trace, span)["all"]["log_loss"] for trace in traces)


class RegressionRuns(TextRuns):
    """Runs on that stream with labels as numbers: one output, squared error, the noise estimated."""

    unit = "squared error"

    def __init__(self, setting: Setting, seeds: list[int], r: int, folder: Path):
        super().__init__(setting, seeds, r, folder)
        path = str(minilm_checkpoint() if setting.model == "minilm" else setting.model)
        self.runner.stream = replace(
            self.runner.stream,
            model=lambda: AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=1, problem_type="regression", dtype=torch.float32, ignore_mismatched_sizes=True
            ),
        )

    def loss(self, name: str) -> float:
        """Mean over samples and seeds."""
        return statistics.fmean(
            _once(
                self.folder / "regression", name, seed, self.runner.settings | {"batch_size": self.setting.batch_size},
                lambda seed=seed: self._pass(name, seed),
            )
            for seed in self.seeds
        )  # fmt: skip

    def _pass(self, name: str, seed: int) -> float:
        model, stream, size = self.runner.model(seed).eval(), self.runner.stream, self.setting.batch_size
        optimizer = make_loko(name, model, seed)
        samples = stream.samples(seed)
        errors: list[float] = []
        for start in tqdm(range(0, len(samples), size), desc=f"regression, {name}", leave=False, mininterval=2):
            inputs = _to(stream.collate(samples[start : start + size]), model)
            labels = inputs.pop("labels").float()
            outputs = model(**inputs).logits
            errors += (outputs.detach().float()[:, 0] - labels).square().tolist()
            optimizer.observe(outputs, labels)
            optimizer.step()
        return statistics.fmean(errors)


class LanguageRuns:
    """Runs of a language model on short problems with solutions, all from the same adapter and batches.

    Args:
        setting (`Setting`): The task.
        seeds (`list[int]`): Losses are averaged over them; a seed is an order, an adapter and LoKO's draws.
        r (`int`): Rank of the adapter, on all linear layers.
        folder (`Path`): Of the runs' files.

    Raises:
        ValueError: There are fewer short problems than samples.
    """

    unit = "held-out loss"

    def __init__(self, setting: Setting, seeds: list[int], r: int, folder: Path):
        self.setting, self.seeds, self.r, self.folder = setting, seeds, r, folder
        self.path = str(smollm2_checkpoint() if setting.model == "smollm2" else setting.model)
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        name = "gsm8k-offline" if setting.data == "offline" else setting.data
        # One order of the problems: which of them a seed takes follows from the seed itself.
        target = load_target(name, limit_train=None, limit_eval=None, seed=0)
        self.train = self._short(target.train)
        self.heldout = head(self._short(target.heldout), setting.eval_items)
        if len(self.train) < setting.samples or not len(self.heldout):
            raise ValueError(
                f"--samples {setting.samples}: only {len(self.train)} problems ({len(self.heldout)} held-out) have "
                f"at most {setting.max_length} tokens; raise --max_length."
            )
        named = {key: short_name(getattr(setting, key)) for key in ("model", "data")}
        provenance = target.provenance.replace(name, short_name(name))
        self.settings = asdict(setting) | named | {"r": r, "provenance": provenance}

    def loss(self, name: str) -> float:
        """Mean over seeds of the held-out loss, nats per token of the solutions; "start" is that before any step."""
        return statistics.fmean(
            _once(self.folder / "lm", name, seed, self.settings, lambda seed=seed: self._train(name, seed))
            for seed in self.seeds
        )

    def _short(self, rows: Dataset) -> Dataset:
        longest = self.setting.max_length
        encoded = tokenize_supervised(rows, self.tokenizer, longest + 1)
        return encoded.filter(lambda ids: len(ids) <= longest, input_columns="input_ids")

    def _train(self, name: str, seed: int) -> float:
        set_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.bfloat16)
        config = LoraConfig(r=self.r, lora_alpha=2 * self.r, target_modules="all-linear", task_type="CAUSAL_LM")
        model: Any = get_peft_model(base, config).to("cuda" if torch.cuda.is_available() else "cpu")
        if name != "start":
            model.train()
            optimizer = make_loko(name, model, seed)
            for batch in tqdm(self._batches(seed), desc=f"{name}, seed {seed}", leave=False, mininterval=2):
                inputs = _to(batch, model)
                labels = inputs.pop("labels")
                optimizer.observe(model(**inputs, use_cache=False).logits, labels)
                optimizer.step()
        return text_loss(model, self.heldout, description="held-out")["loss"]  # type: ignore[arg-type]

    def _batches(self, seed: int) -> list[dict[str, Tensor]]:
        rows = head(self.train.shuffle(seed=seed), self.setting.samples).to_list()
        collate = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=-100)
        size = self.setting.batch_size
        return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def make_loko(name: str, model: Any, seed: int) -> Any:
    """The optimizer of a run; its observation is inferred from the model.

    Args:
        name (`str`): "loko" or "loko:OPTION=VALUE,...".
        model (`PeftModel`): With an adapter.
        seed (`int`): Of its draws.
    """
    kind, _, rest = name.partition(":")
    if kind != "loko":
        raise ValueError(f"{name!r} is neither 'loko' nor 'loko:OPTION=VALUE,...'.")
    options: dict[str, Any] = {"seed": seed}
    return create_loko_optimizer(model, **(options | parse_options(rest)))


def _to(batch: Any, model: Any) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


def _once(folder: Path, name: str, seed: int, settings: dict[str, Any], measure: Callable[[], float]) -> float:
    """The loss of a run, from its file if it is there.

    Raises:
        ValueError: The file is of other settings.
    """
    file = folder / f"{file_name(name)}-s{seed}.json"
    identity = {"method": name, "seed": seed, "settings": settings}
    if stored := read_run(file, identity):
        return stored["loss"]
    loss = measure()
    write_json({"run": identity, "loss": loss}, file)
    return loss
