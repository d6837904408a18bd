"""Fine-tune a Llama on grade-school maths, and see what it forgets: plain LoRA + AdamW beside kalman_peft.

    accelerate launch recipes/llama_math.py                         # SmolLM2-135M on a laptop's CPU, no hub needed
    accelerate launch recipes/llama_math.py --config recipes/llama_math.yaml --max_steps 100
    accelerate launch recipes/llama_math.py --model meta-llama/Llama-3.2-3B --dataset openai/gsm8k \\
        --sources Salesforce/wikitext:wikitext-2-raw-v1 --max_steps 2000          # on a GPU, with a hub

Each method starts from the same model and the same adapter and sees the same batches. Written to --output_dir: per
method the adapter, the belief, a model card and a JSON report (in the shape of PEFT's MetaMathQA benchmark); one table
over all methods (report.md), and two pictures: the learning-forgetting plane and the learning curves.
"""

import os
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import (
    DataCollatorForSeq2Seq,
    TrainerCallback,
    set_seed,
)

from kalman_peft import Belief, KalmanConfig, KalmanTrainer
from kalman_peft.curvature.fisher import FISHERS
from kalman_peft.curvature.memory import STRUCTURES
from recipe_tools.answers import answer_accuracy, teacher_forced_answer_accuracy
from recipe_tools.arguments import parser_with_config
from recipe_tools.choices import load_choices
from recipe_tools.encoding import tokenize, tokenize_supervised
from recipe_tools.evaluate import choice_accuracy, kl_from_base, text_loss
from recipe_tools.models import MODEL_HELP, load_base, load_tokenizer
from recipe_tools.plots import Curve, plot_curves, plot_plane
from recipe_tools.report import results_json, write_json
from recipe_tools.runs import all_cores
from recipe_tools.sources import Source, load_sources
from recipe_tools.tables import markdown_table, table
from recipe_tools.targets import Target, load_target


LABELS = {
    "lora": "LoRA + AdamW",
    "lalora": "LoRA + AdamW + LaLoRA",
    "loko": "LoKO",
    "kalman": "LoKO with LaLoRA prior",
}
CURVATURE = ("laplace_structure", "laplace_space", "laplace_fisher")


@dataclass
class Options:
    """What to train, on what, by which methods."""

    model: str = field(default="smollm2", metadata={"help": MODEL_HELP})
    dataset: str = field(
        default="gsm8k-offline",
        metadata={"help": "Target: 'gsm8k-offline', 'gsm_symbolic', 'far-domains', a Hub id, or a .jsonl file."},
    )
    sources: str = field(
        default="offline", metadata={"help": "What to keep: 'offline', or comma-separated Hub ids and text files."}
    )
    choices: list[str] = field(
        default_factory=lambda: ["hellaswag", "arc_easy"],
        metadata={
            "help": "Multiple-choice tasks: 'hellaswag', 'arc_easy', 'arc_challenge', 'winogrande', or Hub ids."
        },
    )
    methods: list[str] = field(
        default_factory=lambda: ["lora", "lalora", "kalman"], metadata={"help": f"Of {', '.join(LABELS)}."}
    )
    output_dir: str = field(default="outputs/llama_math", metadata={"help": "Where everything is written."})
    max_steps: int = field(default=36, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=4, metadata={"help": "Sequences per process and micro-batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches per step."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade time for memory."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Of AdamW; LoKO has none."})
    lr_scheduler: str = field(default="linear", metadata={"help": "Schedule of AdamW's learning rate."})
    r: int = field(default=8, metadata={"help": "Rank of the adapter, on all linear layers."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapter times r."})
    laplace_strength: float | None = field(
        default=None, metadata={"help": "Strength of LaLoRA; defaults to 100, with LoKO to 10."}
    )
    forgetting_budget: float | None = field(
        default=None, metadata={"help": "Instead of a strength: allowed rise of the source loss, nats per token."}
    )
    laplace_structure: str = field(default="kronecker", metadata={"help": f"Shape of the precision: {STRUCTURES}."})
    laplace_space: str = field(
        default="delta_w", metadata={"help": "Curvature of the merged update ('delta_w') or of A and B ('adapter')."}
    )
    laplace_fisher: str = field(default="sampled", metadata={"help": f"What is back-propagated: {FISHERS}."})
    laplace_warmup_steps: int = field(default=0, metadata={"help": "Steps on source data before the curvature."})
    source_samples: int = field(default=48, metadata={"help": "Source sequences for the curvature, over all sources."})
    source_heldout: int = field(default=12, metadata={"help": "Source sequences whose loss is logged."})
    loko_curvature_every: int = field(default=4, metadata={"help": "Steps between LoKO's curvature draws."})
    max_length: int = field(default=384, metadata={"help": "Tokens per target sequence; longer ones are cut."})
    source_length: int = field(default=256, metadata={"help": "Tokens per source sequence."})
    eval_items: int = field(default=40, metadata={"help": "Held-out target problems for loss and forced accuracy."})
    generate_items: int = field(default=8, metadata={"help": "Held-out target problems answered by generation."})
    source_items: int = field(default=12, metadata={"help": "Held-out texts per source."})
    choice_items: int = field(default=32, metadata={"help": "Items of each multiple-choice task."})
    curve_points: int = field(default=2, metadata={"help": "Light evaluations while training, for the pictures."})
    bf16: bool = field(default=True, metadata={"help": "Load the base model in bfloat16."})
    threads: int = field(default=0, metadata={"help": "CPU threads per process; 0 shares out the cores."})
    seed: int = field(default=0, metadata={"help": "Of data order, adapter and label draws."})


def parse(arguments: list[str]) -> Options:
    """Read options from the command line, on top of a YAML file if `--config` names one.

    Args:
        arguments (`list[str]`): Without the program's name.

    Returns:
        `Options`: All checked against the known names.
    """
    parser, rest = parser_with_config(Options, __doc__, arguments)
    (options, _) = parser.parse_args_into_dataclasses(rest, look_for_args_file=False)
    unknown = sorted(set(options.methods) - LABELS.keys())
    if unknown:
        parser.error(f"--methods: {unknown} are not among {list(LABELS)}")
    return options


class Job:
    """Everything the methods share: data, evaluation, output."""

    def __init__(self, options: Options):
        self.options = options
        self.output = Path(options.output_dir)
        self.main = PartialState().is_main_process
        with PartialState().main_process_first():
            self.tokenizer = load_tokenizer(options.model)
        with PartialState().main_process_first():
            self.target: Target = load_target(
                options.dataset, limit_train=None, limit_eval=options.eval_items, seed=options.seed
            )
            self.sources: dict[str, Source] = load_sources(options.sources)
            self.choices = {name: load_choices(name, limit=options.choice_items) for name in options.choices}
        self.train_dataset = tokenize_supervised(self.target.train, self.tokenizer, options.max_length)
        self.kept = {
            name: tokenize(_head(source.heldout, options.source_items), self.tokenizer, options.source_length)
            for name, source in self.sources.items()
        }
        self.source_dataset = self._source_dataset()
        self.collator = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=-100)
        self.belief: Belief | None = None
        self.provenance = {self.target.name: self.target.provenance}
        self.provenance |= {name: source.provenance for name, source in self.sources.items()}

    def _source_dataset(self) -> Dataset:
        """Equal shares of all sources, shuffled: the first part gives the curvature, the last is held out."""
        share = -(-(self.options.source_samples + self.options.source_heldout) // len(self.sources))
        parts = [
            tokenize(_head(source.fit, share), self.tokenizer, self.options.source_length)
            for source in self.sources.values()
        ]
        return concatenate_datasets(parts).shuffle(seed=self.options.seed)

    def model(self) -> Any:
        """The base model with a fresh adapter, the same for every method."""
        base = load_base(self.options.model, torch.bfloat16 if self.options.bf16 else torch.float32)
        set_seed(self.options.seed)
        config = LoraConfig(
            r=self.options.r, lora_alpha=self.options.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        return get_peft_model(base, config)

    def trainer(self, method: str, callbacks: list[TrainerCallback]) -> KalmanTrainer:
        """A KalmanTrainer set up for one method."""
        o = self.options
        loko, keeps = method in ("loko", "kalman"), method in ("lalora", "kalman")
        config = KalmanConfig(
            str(self.output / method),
            optimizer="loko" if loko else "adamw_torch",
            learning_rate=None if loko else o.learning_rate,
            lr_scheduler_type="constant" if loko else o.lr_scheduler,
            loko_curvature_every=o.loko_curvature_every,
            laplace_strength=o.laplace_strength if keeps else None,
            **({name: getattr(o, name) for name in CURVATURE} if keeps else {}),
            laplace_warmup_steps=o.laplace_warmup_steps if keeps else 0,
            forgetting_budget=o.forgetting_budget if keeps else None,
            source_samples=o.source_samples,
            source_heldout=o.source_heldout,
            max_steps=o.max_steps,
            per_device_train_batch_size=o.batch_size,
            per_device_eval_batch_size=o.batch_size,
            gradient_accumulation_steps=o.gradient_accumulation_steps,
            gradient_checkpointing=o.gradient_checkpointing,
            include_num_input_tokens_seen="all",
            logging_steps=max(o.max_steps // 10, 1),
            save_strategy="no",
            report_to=[],
            seed=o.seed,
            use_cpu=not torch.cuda.is_available(),
        )
        return KalmanTrainer(
            model=self.model(),
            args=config,
            train_dataset=self.train_dataset,
            source_dataset=self.source_dataset if keeps else None,
            # A warm start moves the adapter, so that each method needs its own.
            belief=self.belief if keeps and not o.laplace_warmup_steps else None,
            processing_class=self.tokenizer,
            data_collator=self.collator,
            callbacks=callbacks,
        )

    def evaluate(self, model: Any, tuned: bool) -> dict[str, Any]:
        """Target, sources and multiple choice; every process does the same."""
        o, tokenizer = self.options, self.tokenizer
        target = teacher_forced_answer_accuracy(model, tokenizer, self.target.heldout)
        if o.generate_items:
            some = _head(self.target.heldout, o.generate_items)
            target |= answer_accuracy(model, tokenizer, some)
        sources = {}
        for name, rows in self.kept.items():
            measured = (
                kl_from_base(model, rows, description=f"{name}: loss and KL")
                if tuned
                else text_loss(model, rows, description=f"{name}: loss")
            )
            sources[name] = {key: measured[key] for key in ("loss", "kl", "tokens") if key in measured}
        choices = {
            name: choice_accuracy(model, tokenizer, items, description=name) for name, items in self.choices.items()
        }
        return {"target": target, "sources": sources, "choices": choices}


class Light(TrainerCallback):
    """Target and source loss on a few held-out items while training; the clock stops meanwhile."""

    def __init__(self, job: Job):
        o = job.options
        self.steps = {round(o.max_steps * (k + 1) / (o.curve_points + 1)) for k in range(o.curve_points)}
        heldout = _head(job.target.heldout, 16)
        self.target = tokenize_supervised(heldout, job.tokenizer, o.max_length)
        self.sources = {name: _head(rows, 6) for name, rows in job.kept.items()}
        self.points: list[dict[str, Any]] = []
        self.pause = 0.0
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start the clock, and measure the start."""
        self.start, self.pause = time.perf_counter(), 0.0
        self._measure(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure at a few steps."""
        if state.global_step in self.steps or state.global_step == state.max_steps:
            self._measure(model, state.global_step)

    def _measure(self, model: Any, step: int) -> None:
        began = time.perf_counter()
        point: dict[str, Any] = {"step": step, "seconds": began - self.start - self.pause}
        point["target_loss"] = text_loss(model, self.target, description="light: target")["loss"]
        point["source_loss"] = {
            name: text_loss(model, rows, description=f"light: {name}")["loss"] for name, rows in self.sources.items()
        }
        self.points.append(point)
        self.pause += time.perf_counter() - began


def run(job: Job, method: str, before: dict[str, Any]) -> tuple[dict[str, Any], Light]:
    """Train by one method, evaluate, and write its folder."""
    began, created = time.perf_counter(), datetime.now(UTC).isoformat()
    light = Light(job)
    trainer = job.trainer(method, [light])
    model, args = cast(Any, trainer.model), cast(KalmanConfig, trainer.args)
    output = trainer.train()
    after = job.evaluate(model, tuned=True)
    trainer.save_model()
    trainer.create_model_card(
        results=markdown_table(before, {LABELS[method]: after}),
        dataset=_hub_name(job.options.dataset),
    )
    if trainer.belief is not None:
        job.belief = trainer.belief
    if job.main:
        adapter = Path(str(args.output_dir)) / "adapter_model.safetensors"
        state = trainer.state
        metrics = [
            {"step": e["step"], "train loss": e["loss"], **{k: v for k, v in e.items() if "/" in k}}
            for e in state.log_history
            if "loss" in e
        ]
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        record = results_json(
            experiment_name=method,
            created_at=created,
            total_time=time.perf_counter() - began,
            train_time=light.points[-1]["seconds"],
            train_config={"model_id": job.options.model, **asdict(job.options)},
            peft_config=model.peft_config["default"],
            metrics=metrics,
            before=before,
            after=after,
            curve=light.points,
            num_trainable_params=trainable,
            num_total_params=sum(p.numel() for p in model.parameters()),
            train_samples=args.max_steps * args.train_batch_size
            * args.gradient_accumulation_steps * args.world_size,
            train_total_tokens=int(state.num_input_tokens_seen),
            provenance=job.provenance,
            forgetting_source=next(iter(job.sources)),
            file_size=adapter.stat().st_size,
            method={"label": LABELS[method], "optimizer": str(args.optimizer), "metrics": output.metrics},
        )  # fmt: skip
        write_json(record, job.output / method / "results.json")
    return after, light


def _head(dataset: Dataset, rows: int) -> Dataset:
    return dataset.select(range(min(rows, len(dataset))))


def _hub_name(name: str) -> str | None:
    return name if "/" in name and not Path(name).exists() else None


def write_summary(job: Job, before: dict[str, Any], afters: dict[str, Any], lights: dict[str, Light]) -> None:
    """Tables and pictures over all methods."""
    labelled = {LABELS[m]: after for m, after in afters.items()}
    Console(width=160).print(table(before, labelled))
    data = "\n".join(f"- {name}: {text}" for name, text in job.provenance.items())
    (job.output / "report.md").write_text(markdown_table(before, labelled) + f"\nData:\n{data}\n")

    def mean_source(losses: dict[str, float]) -> float:
        return sum(losses.values()) / len(losses)

    start = next(iter(lights.values())).points[0]
    planes = {
        LABELS[m]: [(p["target_loss"], mean_source(p["source_loss"])) for p in light.points[1:]]
        for m, light in lights.items()
    }
    plot_plane(
        planes,
        job.output / "learning_forgetting.png",
        base=(start["target_loss"], mean_source(start["source_loss"])),
        source="mean source",
        title=f"{job.options.dataset}: {job.options.max_steps} steps, points along the run",
    )
    plot_curves(
        {
            LABELS[m]: Curve(
                [p["step"] for p in light.points],
                [p["seconds"] for p in light.points],
                [p["target_loss"] for p in light.points],
            )
            for m, light in lights.items()
        },
        job.output / "learning_curves.png",
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the job."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    PartialState(cpu=not torch.cuda.is_available())  # joins the process group, if there is one
    if options.threads or not torch.cuda.is_available():  # a launcher may have set a single thread
        torch.set_num_threads(options.threads or max(all_cores() // PartialState().num_processes, 1))
    began = time.perf_counter()
    job = Job(options)
    console = Console(quiet=not job.main)
    console.rule(f"base model {options.model}: what it knows")
    model = job.model()
    model.to(PartialState().device)
    before = job.evaluate(model, tuned=False)
    del model
    afters, lights = {}, {}
    for method in options.methods:
        console.rule(LABELS[method])
        afters[method], lights[method] = run(job, method, before)
    if job.main:
        write_summary(job, before, afters, lights)
        console.print(f"Written to {job.output} in {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    main()
