"""Train adapters, fit their belief, and judge every method of prediction on the same rows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup, set_seed

from kalman_peft import Belief, CategoricalObservation, create_loko_optimizer
from kalman_peft.predictive import FittedScale, Predictive, ensembled, fit_scale, posterior_predictive
from kalman_peft.uncertainty_metrics import ood_auroc, uncertainty_metrics

from .uncertainty_tasks import Problem, answers, inputs_of


@dataclass(frozen=True)
class Training:
    """How an adapter is trained.

    Attributes:
        r (`int`): Rank.
        lora_alpha (`int`): Scale times r.
        epochs (`int`): Passes over the rows.
        batch_size (`int`): Rows per step.
        learning_rate (`float`): Peak of AdamW's; LoKO takes none.
        belief (`str`): "kronecker", "ekfac", "diagonal" or "low_rank": AdamW, then the curvature of the training rows
            in that structure; "loko": the LoKO optimizer's own belief.
    """

    r: int
    lora_alpha: int
    epochs: int
    batch_size: int
    learning_rate: float
    belief: str


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name (`str`): As printed.
        method (`str`): Of `posterior_predictive`, or "ensemble".
        options (`Mapping`): Of that method.
        fit (`str`, *optional*): What is fitted on the validation rows.
        marginal (`bool`): Probabilities by the variances alone, also where there is a covariance.
    """

    name: str
    method: str
    options: Mapping[str, Any]
    fit: str | None = None
    marginal: bool = False


def table_rows(draws: int, members: int) -> list[Row]:
    """What is compared.

    Args:
        draws (`int`): Of Monte Carlo.
        members (`int`): Of the ensemble; below 2 leaves it out.

    Returns:
        `list[Row]`: In the order of the table.
    """
    diagonal = {"structure": "diagonal"}
    rows = [
        Row("MAP", "map", {}),
        Row("MAP, temperature", "map", {}, "temperature"),
        Row("streamlined", "streamlined", {}),
        Row("streamlined, scale", "streamlined", {}, "scale"),
        Row("linearised, diagonal, variances", "linearized", diagonal, marginal=True),
        Row("linearised, diagonal", "linearized", diagonal),
        Row("linearised, full", "linearized", {}),
        Row("linearised, full, scale", "linearized", {}, "scale"),
        Row(f"Monte Carlo, {draws} draws", "sampled", {"draws": draws}),
    ]
    return rows + ([Row(f"ensemble of {members}", "ensemble", {})] if members > 1 else [])


def new_model(problem: Problem, how: Training, seed: int) -> Any:
    """The model with a fresh adapter, also on its head, so that the belief is over all that is trained.

    Args:
        problem (`Problem`): The task.
        how (`Training`): Of the adapter.
        seed (`int`): Of a new head and of the adapter.

    Returns:
        `PeftModel`: On the accelerator if there is one.
    """
    set_seed(seed)
    base = problem.model()
    head = [n for n, m in base.named_modules() if n.startswith("classifier") and isinstance(m, nn.Linear)]
    config = LoraConfig(r=how.r, lora_alpha=how.lora_alpha, target_modules=problem.targets + head, lora_dropout=0.0)
    model = get_peft_model(base, config)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def renew(model: Any, seed: int) -> None:
    """Initialise the adapter again, for another member of an ensemble on the same base."""
    set_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_lora_parameters"):
            module.reset_lora_parameters("default", True)


def train(model: Any, problem: Problem, how: Training, seed: int) -> Any:
    """Train the adapter in place.

    Args:
        model (`PeftModel`): With a fresh adapter.
        problem (`Problem`): Whose training rows are learnt.
        how (`Training`): Of this.
        seed (`int`): Of the order and of dropout.

    Returns:
        `LoKO` or `None`: The optimizer, if it is a filter.
    """
    generator = torch.Generator().manual_seed(seed)
    set_seed(seed)
    rows = problem.parts["train"]
    steps = how.epochs * -(-len(rows) // how.batch_size)
    loko = schedule = None
    if how.belief == "loko":
        observation = CategoricalObservation(shift="choice" in problem.batches(rows[:1], 1)[0])
        loko = optimizer = create_loko_optimizer(model, observation=observation, seed=seed)
        model.eval()
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=how.learning_rate, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
        model.train()
    progress = tqdm(total=steps, desc=f"training, seed {seed}")
    for _ in range(how.epochs):
        order = torch.randperm(len(rows), generator=generator).tolist()
        for batch in problem.batches([rows[i] for i in order], how.batch_size):
            inputs = _to(inputs_of(batch), model)
            out = model(**inputs)
            if loko is not None:
                loko.observe(out.logits, inputs["labels"])
            else:
                optimizer.zero_grad()
                out.loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            progress.update()
    progress.close()
    model.eval()
    return loko


def load_or_train(
    problem: Problem, how: Training, members: int, seed: int, folder: Path | None
) -> tuple[Any, Belief, list[dict[str, Tensor]]]:
    """A model with its adapter and the belief over it, and the adapters of an ensemble.

    Args:
        problem (`Problem`): The task.
        how (`Training`): Of every adapter.
        members (`int`): Of the ensemble, the first of which is the adapter itself.
        seed (`int`): Of base, adapter and order; further members add 1000 each.
        folder (`Path`, *optional*): Of a saved adapter with its belief, instead of training; then without ensemble.

    Returns:
        `tuple`: Model in evaluation mode, belief, and the members' tensors.
    """
    if folder is not None:
        set_seed(seed)
        model = PeftModel.from_pretrained(problem.model(), str(folder)).eval()
        return model, Belief.from_pretrained(folder), []
    model = new_model(problem, how, seed)
    loko = train(model, problem, how, seed)
    if loko is not None:
        belief = loko.belief(model)
    else:
        batches = [_to(inputs_of(b), model) for b in problem.batches(problem.parts["train"], how.batch_size)]
        belief = Belief.fit(model, batches, structure=how.belief, space="adapter", progress_bar=False)
    found = [_tensors(model)]
    for number in range(1, members):
        renew(model, seed + 1000 * number)
        train(model, problem, how, seed + 1000 * number)
        found.append(_tensors(model))
    with torch.no_grad():
        for key, p in get_peft_model_state_dict(model, save_embedding_layers=False).items():
            p.copy_(found[0][key])
    return model, belief, found


class Judge:
    """Predicts with every method, and measures.

    Args:
        problem (`Problem`): The task.
        model (`PeftModel`): In evaluation mode.
        belief (`Belief`): Over its adapter.
        members (`Sequence`): Adapters of the ensemble.
        batch_size (`int`): Rows per pass.
        seed (`int`): Of Monte Carlo.
    """

    def __init__(
        self, problem: Problem, model: Any, belief: Belief, members: Sequence[Any], batch_size: int, seed: int
    ):
        self.problem, self.model, self.belief, self.members = problem, model, belief, list(members)
        self.batch_size, self.seed = batch_size, seed
        self.numbers: dict[str, float] = {}

    def choose_prior(self, values: Sequence[float]) -> dict[str, Any]:
        """The prior precision of a curvature by the validation rows' likelihood under the full linearised network.

        Args:
            values (`Sequence[float]`): To try; a LoKO belief holds its prior, and none is tried.

        Returns:
            `dict[str, Any]`: "chosen", the "nll" by value, and whether the choice is at an "edge" of several.
        """
        if "curvature" not in self.belief.info:
            return {}
        labels = float(len(self.problem.parts["train"]))
        found = {}
        for value in values:
            self.numbers = {"num_labels": labels, "prior_precision": value}
            if len(values) > 1:
                predicted, _ = self.predict(Row("", "linearized", {}), self.problem.parts["validation"])
                found[value] = uncertainty_metrics(predicted.probabilities.cpu(), self.labels("validation"))["nll"]
        chosen = min(found, key=found.__getitem__) if found else values[0]
        self.numbers["prior_precision"] = chosen
        edge = len(values) > 1 and chosen in (min(values), max(values))
        return {"chosen": chosen, "nll": {str(k): v for k, v in found.items()}, "edge": edge}

    def labels(self, part: str) -> Tensor:
        """The right classes of a part's rows."""
        rows = self.problem.parts[part] if part in self.problem.parts else self.problem.shifted[part]
        return torch.cat([answers(batch) for batch in self.problem.batches(rows, self.batch_size)])

    def predict(self, row: Row, samples: Sequence[Any]) -> tuple[Predictive, float]:
        """Predictions for some rows, and seconds by the wall clock.

        Args:
            row (`Row`): The method.
            samples (`Sequence`): Rows.

        Returns:
            `tuple[Predictive, float]`: On the CPU.
        """
        batches = [_to(inputs_of(b), self.model) for b in self.problem.batches(samples, self.batch_size)]
        generator = torch.Generator(self.belief.precision.like.device).manual_seed(self.seed)
        began, parts = time.perf_counter(), []
        for batch in batches:
            if row.method == "ensemble":
                parts.append(ensembled(self.model, self.members, batch, **self.problem.select))
                continue
            options: dict[str, Any] = {**row.options, **self.problem.select}
            if row.method != "map":
                options |= self.numbers
            if row.method == "sampled":
                options["generator"] = generator
            parts.append(posterior_predictive(self.model, self.belief, batch, row.method, **options))
        joined = Predictive.cat(parts)
        joined.probabilities.sum().item()  # a device has then done its work
        seconds = time.perf_counter() - began
        joined = Predictive.from_fields({k: v.cpu() for k, v in joined.fields().items()}, joined.gaussian)
        return (joined.marginal() if row.marginal else joined), seconds

    def judge(self, row: Row, cache: dict[Any, Any]) -> dict[str, Any]:
        """Everything about one line of the table.

        Args:
            row (`Row`): The method.
            cache (`dict`): Predictions of methods without their fit, shared by the lines.

        Returns:
            `dict[str, Any]`: The metrics, `auroc_ood` by name, `shifted` by name, `seconds` and `rows_per_second` of
            the test rows, and what was fitted.
        """
        key = (row.method, repr(row.options), row.marginal)
        if key not in cache:
            cache[key] = {
                name: self.predict(row, samples)
                for name, samples in {
                    "test": self.problem.parts["test"],
                    "validation": self.problem.parts["validation"],
                    **self.problem.shifted,
                    **self.problem.outside,
                }.items()
            }
        found = {name: predicted for name, (predicted, _) in cache[key].items()}
        seconds = cache[key]["test"][1]
        fitted: FittedScale | None = None
        if row.fit is not None:
            fitted = fit_scale(found["validation"], self.labels("validation"), row.fit)
            found = {name: fitted.apply(predicted) for name, predicted in found.items()}
        test = found["test"].probabilities
        result: dict[str, Any] = dict(uncertainty_metrics(test, self.labels("test")))
        result["auroc_ood"] = {name: ood_auroc(test, found[name].probabilities) for name in self.problem.outside}
        result["shifted"] = {
            name: uncertainty_metrics(found[name].probabilities, self.labels(name)) for name in self.problem.shifted
        }
        result |= {"seconds": seconds, "rows_per_second": len(test) / seconds}
        result["passes"] = self._passes(row, test.shape[1])
        result["fit"] = None if fitted is None else asdict(fitted)
        return result

    def _passes(self, row: Row, classes: int) -> dict[str, int]:
        """Forward and backward passes of a batch."""
        forwards = {"sampled": row.options.get("draws", 20), "ensemble": len(self.members)}.get(row.method, 1)
        return {"forward": forwards, "backward": classes if row.method == "linearized" else 0}


def _tensors(model: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in get_peft_model_state_dict(model, save_embedding_layers=False).items()}


def _to(batch: Mapping[str, Any], model: Any) -> dict[str, Any]:
    return {key: value.to(model.device) for key, value in batch.items()}
