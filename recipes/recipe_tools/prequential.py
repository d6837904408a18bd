"""Prequential evaluation: one pass over a stream, each batch predicted with the current weights, then learned from.

The model stays in evaluation mode (no dropout), so that one forward pass serves both: its logits are recorded before
the optimizer's step, and the step uses the same logits' graph.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from kalman_peft import CategoricalObservation, create_loko_optimizer

from .spelling import parse_options, spelt


RATED = {"adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}
DIAGNOSTICS = ("trust", "innovation", "gain_norm", "decrease", "kl", "trace_p")


class Learner:
    """An optimizer by the name of a method, and its step from logits and labels.

    Args:
        method (`str`): "adamw:RATE", "adagrad:RATE" or "sgd:RATE" (no weight decay, no schedule), or
            "loko:OPTION=VALUE,..." with options of `create_loko_optimizer`; "loko" alone takes its defaults.
        model (`PeftModel`): Model with a trainable adapter.
        seed (`int`): Of LoKO's label draws.

    Raises:
        ValueError: The method's name cannot be read.
    """

    def __init__(self, method: str, model: Any, seed: int):
        kind, _, rest = canonical(method).partition(":")
        self.is_filter = kind == "loko"
        self.optimizer: Any
        if self.is_filter:
            options: dict[str, Any] = {"observation": CategoricalObservation(shift=False), "seed": seed}
            self.optimizer = create_loko_optimizer(model, **(options | parse_options(rest)))
        else:
            trained = [p for p in model.parameters() if p.requires_grad]
            decay = {"weight_decay": 0.0} if kind == "adamw" else {}
            self.optimizer = RATED[kind](trained, lr=float(rest), **decay)

    def learn(self, logits: Tensor, labels: Tensor) -> None:
        """One step on the mean loss of a batch.

        Args:
            logits (`Tensor`): Shape (n, classes), with a graph to the weights.
            labels (`Tensor`): Shape (n,), classes.
        """
        if self.is_filter:
            self.optimizer.observe(logits, labels)
        else:
            self.optimizer.zero_grad()
            cross_entropy(logits.float(), labels).backward()
        self.optimizer.step()

    def diagnostics(self) -> dict[str, float]:
        """What a filter says of its last step; empty for other optimizers."""
        found = getattr(self.optimizer, "diagnostics", {})
        return {key: float(found[key]) for key in DIAGNOSTICS if key in found}


def canonical(method: str) -> str:
    """One spelling per method: a rate as short as it can be; checks that the name can be read.

    Args:
        method (`str`): See [`Learner`].

    Returns:
        `str`: Such as "adamw:0.001" for "adamw:1e-3".

    Raises:
        ValueError: The kind is unknown, or the rate or an option cannot be read.
    """
    kind, _, rest = method.partition(":")
    if kind == "loko":
        parse_options(rest)
        return method if rest else kind
    if kind not in RATED:
        raise ValueError(f"{method!r} is none of {', '.join(f'{k}:RATE' for k in RATED)}, loko:OPTION=VALUE,...")
    try:
        rate = float(rest)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ValueError(f"{method!r} needs a positive learning rate, as in '{kind}:1e-3'.")
    return f"{kind}:{spelt(rate)}"


@dataclass
class Trace:
    """What one pass recorded, sample by sample in the stream's order.

    Attributes:
        correct (`list[int]`): 1 where the most probable class was the label.
        loss (`list[float]`): Negative log-likelihood of the label in nats, before it was learned from.
        step_seconds (`list[float]`): Of each batch: forward, backward and step.
        diagnostics (`dict[str, list[float | None]]`): Of each batch; `None` where a filter did not say.
        diverged (`bool`): The logits were not finite, and the pass ended there.
    """

    correct: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    diagnostics: dict[str, list[float | None]] = field(default_factory=dict)
    diverged: bool = False


def run_stream(model: Any, learner: Learner, batches: Iterable[Mapping[str, Tensor]], description: str = "") -> Trace:
    """Predict each batch, then learn from it.

    Args:
        model (`nn.Module`): A classifier; put in evaluation mode.
        learner (`Learner`): Of this model.
        batches (`Iterable`): The stream: the model's inputs, and `labels` of shape (n,).
        description (`str`, *optional*): For the progress bar.

    Returns:
        `Trace`: One entry per sample and per batch.
    """
    model.eval()
    device = next(model.parameters()).device
    trace = Trace()
    for batch in tqdm(batches, desc=description, leave=False, mininterval=2):
        began = time.perf_counter()
        inputs = {key: value.to(device) for key, value in batch.items()}
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        known = logits.detach().float()
        if not torch.isfinite(known).all():
            trace.diverged = True
            break
        trace.loss += cross_entropy(known, labels, reduction="none").tolist()
        trace.correct += (known.argmax(-1) == labels).int().tolist()
        learner.learn(logits, labels)
        trace.step_seconds.append(time.perf_counter() - began)
        said = learner.diagnostics()
        for key in DIAGNOSTICS if learner.is_filter else ():
            trace.diagnostics.setdefault(key, []).append(said.get(key))
    return trace


def summarise(trace: Trace, windows: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Accuracy and log loss over windows of the stream.

    Args:
        trace (`Trace`): Of one pass.
        windows (`Mapping[str, tuple[int, int]]`): By name, the first sample and the one after the last.

    Returns:
        `dict[str, Any]`: Per window `accuracy` and `log_loss` (nats; infinite if the pass diverged before the window's
        end), and the median `seconds_per_step`.
    """
    result: dict[str, Any] = {}
    for name, (start, end) in windows.items():
        whole = len(trace.loss) >= end
        # A pass that diverged gets no credit for the samples that it never saw.
        result[name] = {
            "accuracy": sum(trace.correct[start:end]) / (end - start),
            "log_loss": statistics.fmean(trace.loss[start:end]) if whole else math.inf,
        }
    result["seconds_per_step"] = statistics.median(trace.step_seconds) if trace.step_seconds else math.nan
    return result


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place, of fewer at the start."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[k] - sums[max(k - window, 0)]) / min(k, window) for k in range(1, len(sums))]


def to_record(trace: Trace) -> dict[str, Any]:
    """Plain values for JSON, losses to a millionth of a nat."""
    record = asdict(trace)
    record["loss"] = [round(value, 6) for value in trace.loss]
    record["step_seconds"] = [round(value, 6) for value in trace.step_seconds]
    return record
