"""Stands in for `recipe_tools.methods`: nothing is trained, the base model's head is shifted by what the seed draws."""

import os
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Job:
    base: Any
    lora: Any
    config: Any
    target: Any
    source: Any
    self_source: Any
    validation: Any
    trainer_options: Any
    folder: Any
    seed: int
    steps: int


@dataclass
class Trained:
    model: Any
    seconds: float = 1.0
    setup_seconds: float = 0.5
    peak_bytes: int = 2**20
    peak_kind: str = "none"
    extra_bytes: int = 2**21
    figures: dict = field(default_factory=dict)


def read(text):
    kind, _, rest = text.partition(":")
    options = dict(part.split("=") for part in rest.split(",") if part)
    if kind not in ("lora", "other", "wise", "broken", "killed"):
        raise ValueError(f"{text!r}: the kind is none of lora, other, wise, broken.")
    return kind, options


def canonical(text):
    kind, options = read(text)
    shown = ",".join(f"{k}={v}" for k, v in sorted(options.items()))
    return f"{kind}:{shown}" if shown else kind


def points(text):
    kind, options = read(text)
    return [canonical(f"{kind}:alpha={alpha}") for alpha in options["alpha"].split("/")] if kind == "wise" else [text]


def train(method, job):
    kind, options = read(method)
    if kind == "broken":
        raise RuntimeError("this method [never] works")
    if kind == "killed":
        os._exit(3)
    # A method uses all of the job.
    rows = job.self_source(3)
    assert len(rows) == 3 and len(job.source) and len(job.validation) and job.folder.is_dir() and job.lora.r
    assert job.config(learning_rate=1e-4).max_steps == job.steps
    assert not {tuple(x) for x in job.target["input_ids"]} & {tuple(x) for x in job.validation["input_ids"]}
    made = []
    for name in points(method):
        model = job.base()
        size = float(read(name)[1].get("alpha", options.get("lr", 0.1)))
        generator = torch.Generator().manual_seed(job.seed)
        head = model.lm_head.weight
        with torch.no_grad():
            head += size * torch.randn(head.shape, generator=generator).to(head)
        made.append((name, Trained(model, figures={"train/loss": size})))
    return made


def install():
    module = types.ModuleType("recipe_tools.methods")
    for name, value in {
        "Job": Job,
        "Trained": Trained,
        "canonical": canonical,
        "points": points,
        "train": train,
    }.items():
        setattr(module, name, value)
    sys.modules["recipe_tools.methods"] = module
    return module


class Faked:
    """Work for a process of its own, where nothing is installed yet."""

    def __init__(self, runner):
        self.runner = runner

    def __call__(self, run):
        install()
        self.runner(run)


def misbehave(item):
    """Work for a pool: odd items fail, 4 takes its process down, the others leave a file."""
    folder, number = item
    if number == 4:
        os._exit(3)
    if number % 2:
        raise RuntimeError(f"no {number}")
    (folder / str(number)).touch()
