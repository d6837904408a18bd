"""Teach a Llama several unlike domains in a row, and see what stays: filters over tasks beside the usual remedies.

    python recipes/sequential_llama.py                                # SmolLM2-135M on a laptop's CPU, no hub needed
    python recipes/sequential_llama.py --config recipes/sequential_llama.yaml          # three seeds, two orders
    python recipes/sequential_llama.py --model meta-llama/Llama-3.2-1B --orders 0,1,2 2,1,0 --max_steps 200 \\
        --domains maths:openai/gsm8k cipher:caesar_cipher chat:owner/name:configuration        # on a GPU, with a hub

A domain is NAME:DATA: a Hub id, a .jsonl file (question and answer columns), a generator of reasoning-gym or a text
that needs no hub. An order is a list of places among --domains. Methods are KIND or KIND:OPTION=VALUE,...:

    sequential   AdamW, task after task; also the mean of each task's adapter and its neighbours, on its own task
    l2           to=previous (pull to the adapter after the task before) or to=start; strength per squared weight
    ewc          online EWC: diagonal empirical Fisher of sequences (their scores squared), summed over tasks; strength
    filter       Gaussian filter: structure=diagonal, low_rank or ekfac; q (process noise between tasks, in squared
                 weights), layers=REGEX (where q goes), decay, strength (factor on the pull; 1 is the filter's), prior
                 (precision at the start), rank, fisher; with q also smoothed adapters
    loko         the filter as optimizer, its belief carried on; memory=kronecker, diagonal or low_rank; q, layers,
                 decay
    replay       share of rows from earlier tasks (at least one row), in place of as many of the task's own
    separate     an adapter per task, each from the start: no transfer, nothing to forget
    joint        all tasks at once, in as many steps: what is to be had

All but loko take lr, a learning rate of their own in place of --learning_rate.
All methods of a seed begin with the same adapter and see the same rows. Every run is a file of its own under
--output_dir; runs that are there are not repeated, and those of other settings, data or weights refused. One process.
"""

import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import DataCollatorForSeq2Seq, set_seed
from transformers.utils import logging

from kalman_peft import AdapterState, KalmanConfig
from kalman_peft.continual.store import check_name
from recipe_tools.arguments import parser_with_config, refuse
from recipe_tools.domains import Domain, built_in, load_domain, split_spec
from recipe_tools.encoding import tokenize
from recipe_tools.evaluate import kl_from_base, text_loss
from recipe_tools.models import BUNDLED, MODEL_HELP, load_base, load_tokenizer
from recipe_tools.report import write_json
from recipe_tools.rows import head
from recipe_tools.runs import all_cores, device_name, file_marks, file_name, read_run, short_name
from recipe_tools.sequence_report import (
    CAPTION,
    plot_sequences,
    summarise_sequences,
    table_cells,
)
from recipe_tools.sequences import Adapter, Learnt, Setup, canonical, learn
from recipe_tools.sources import TEXTS, load_sources
from recipe_tools.tables import console_table, markdown


# In runs this short a task has about a thousand labels, and the belief that they amount to is hardly felt: here
# earlier tasks count a hundredfold, and the prior as before.
_FELT = "strength=100,prior=0.01"
METHODS = (
    "sequential", "replay:share=0.05", "l2:to=previous", "ewc:strength=100", f"filter:structure=diagonal,{_FELT}",
    f"filter:structure=low_rank,{_FELT}", f"filter:structure=ekfac,{_FELT}", f"filter:structure=ekfac,{_FELT},q=0.1",
    "loko", "separate", "joint",
)  # fmt: skip
# What a run does not depend on; all other options are stored with it, and must not change in one folder.
FREE = ("methods", "orders", "seeds", "threads", "keep_states", "output_dir")


@dataclass
class Options:
    """The domains, the model and the methods."""

    model: str = field(default="smollm2", metadata={"help": MODEL_HELP})
    domains: list[str] = field(
        default_factory=lambda: ["maths:gsm_symbolic", "cipher:caesar_cipher", "sorting:word_sorting"],
        metadata={"help": "NAME:DATA, see above; at least two."},
    )
    text: str = field(
        default="wikipedia",
        metadata={"help": f"General text that should stay: of {TEXTS}, a Hub id or a file; never trained on."},
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": "Methods, see above; differences in the table are to the first."},
    )
    orders: list[str] = field(
        default_factory=list, metadata={"help": "Orders of the domains, such as 0,1,2 2,1,0; by default as given."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of rows, adapter and draws."})
    max_steps: int = field(default=15, metadata={"help": "Optimizer steps per task."})
    batch_size: int = field(default=4, metadata={"help": "Sequences per step."})
    rows: int | None = field(
        default=None, metadata={"help": "Training rows per task; by default as many as its steps take."}
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "Of AdamW, linear to 0 in each task; LoKO has none."})
    r: int = field(default=8, metadata={"help": "Rank of the adapter, on all linear layers."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapter times r."})
    max_length: int = field(default=128, metadata={"help": "Tokens per sequence; longer ones are cut."})
    curvature_samples: int = field(default=16, metadata={"help": "Sequences of a task for a filter's curvature."})
    eval_items: int = field(default=12, metadata={"help": "Held-out rows per domain."})
    text_items: int = field(default=12, metadata={"help": "Held-out rows of the general text."})
    bf16: bool = field(default=True, metadata={"help": "Load the base model in bfloat16."})
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 takes all cores."})
    keep_states: bool = field(
        default=False, metadata={"help": "Keep what the filters store on disk (adapters, beliefs), under states/."}
    )
    output_dir: str = field(default="outputs/sequential_llama", metadata={"help": "Where everything is written."})


def parse(arguments: list[str]) -> Options:
    """Read and check options, on top of a YAML file if `--config` names one.

    Args:
        arguments (`list[str]`): Without the program's name.

    Returns:
        `Options`: With methods in one spelling, and at least one order.
    """
    parser, rest = parser_with_config(Options, __doc__, arguments)
    (o, _) = parser.parse_args_into_dataclasses(rest, look_for_args_file=False)
    o.orders = o.orders or [",".join(map(str, range(len(o.domains))))]
    whole = sorted(range(len(o.domains)))
    refusals = {
        "--domains needs at least two": len(o.domains) < 2,
        "--methods and --seeds need at least one entry": not (o.methods and o.seeds),
        f"--orders {o.orders}: each must name the places {whole} once, with commas": any(
            sorted(_places(order)) != whole for order in o.orders
        ),
        "--max_steps, --batch_size, --rows, --max_length, --curvature_samples, --eval_items, --text_items, --r and "
        "--lora_alpha must be positive": min(
            o.max_steps, o.batch_size, 1 if o.rows is None else o.rows, o.max_length, o.curvature_samples,
            o.eval_items, o.text_items, o.r, o.lora_alpha
        ) < 1,
        "--learning_rate must be above 0 and finite": not 0 < o.learning_rate < math.inf,
        "--threads must not be negative": o.threads < 0,
        f"--seeds {o.seeds}: each must be in [0, 2^32)": not all(0 <= seed < 2**32 for seed in o.seeds),
        "more than one process: a run is one process; start it without a launcher": int(
            os.environ.get("WORLD_SIZE", "1")
        )
        > 1,
    }  # fmt: skip
    refuse(parser, refusals)
    # The same run twice would count as two.
    o.seeds = list(dict.fromkeys(o.seeds))
    o.orders = list(dict.fromkeys(",".join(map(str, _places(order))) for order in o.orders))
    try:
        o.methods = list(dict.fromkeys(map(canonical, o.methods)))
    except ValueError as error:
        parser.error(f"--methods: {error}")
    try:
        names = [check_name(split_spec(spec)[0]) for spec in o.domains]
    except ValueError as error:
        parser.error(f"--domains: {error}")
    if len(set(names)) < len(names):
        parser.error(f"--domains: {names} has a name twice")
    return o


def _places(order: str) -> list[int]:
    return [int(part) if part.strip().isdecimal() else -1 for part in order.split(",")]


class Runner:
    """Runs a method on an order and a seed once, and remembers it in a file."""

    def __init__(self, options: Options):
        self.options, self.folder = options, Path(options.output_dir)
        self.names = [split_spec(spec)[0] for spec in options.domains]
        settings = {key: value for key, value in asdict(options).items() if key not in FREE}
        # A file's name, not where it lies on this machine.
        settings |= {key: short_name(settings[key]) for key in ("model", "text")}
        settings["domains"] = [
            f"{n}:{short_name(split_spec(d)[1])}" for n, d in zip(self.names, options.domains, strict=True)
        ]
        if marks := self._files():
            settings["files"] = marks
        self.settings = settings
        self._rows: dict[int, tuple[dict[str, Dataset], dict[str, Domain]]] = {}

    def _files(self) -> dict[str, str]:
        """What the local files among the options hold: a name alone does not tell."""
        o = self.options
        names = {f"domains/{n}": split_spec(d)[1] for n, d in zip(self.names, o.domains, strict=True)}
        names |= {f"text/{place}": part.strip() for place, part in enumerate(o.text.split(","))}
        marked = {option: name for option, name in names.items() if not built_in(name)}
        return file_marks(marked | ({} if o.model in BUNDLED else {"model": o.model}))

    def run(self, method: str, order: str, seed: int) -> dict[str, Any]:
        """The record of one run, from its file if it is there.

        Args:
            method (`str`): See the head of this file.
            order (`str`): Places of the domains, with commas.
            seed (`int`): Of rows, adapter and draws.

        Returns:
            `dict[str, Any]`: `kind`, `names` of the tasks in order, `scores` (R), `own`, `text`, `seconds` (None
            where a killed run went on), `figures`.

        Raises:
            ValueError: The file is of other settings.
        """
        name = f"{file_name(method)}-o{order}-s{seed}"
        file = self.folder / "runs" / f"{name}.json"
        identity = {"method": method, "order": order, "seed": seed, "settings": self.settings}
        if stored := read_run(file, identity):
            return stored
        names = [self.names[place] for place in _places(order)]
        setup = self.setup(names, seed, self.folder / "states" / name)
        learnt = learn(method, setup)
        record = {"run": identity, "kind": method.partition(":")[0], "names": names, "device": device_name()}
        record |= self.scores(learnt, names)
        seconds = None if math.isnan(learnt.seconds) else learnt.seconds
        record |= {"seconds": seconds, "figures": learnt.figures, "provenance": self.provenance(names, seed)}
        write_json(record, file)
        if not self.options.keep_states:
            shutil.rmtree(setup.folder, ignore_errors=True)
        return record

    def setup(self, names: list[str], seed: int, folder: Path) -> Setup:
        """What the methods of one run share."""
        rows, _ = self.rows(seed)
        o, tokenizer = self.options, self.tokenizer

        def config(**changes: Any) -> KalmanConfig:
            given = {
                "learning_rate": None if changes.get("optimizer") == "loko" else o.learning_rate,
                "max_steps": o.max_steps, "per_device_train_batch_size": o.batch_size, "seed": seed,
                "logging_strategy": "no", "save_strategy": "no", "report_to": [], "disable_tqdm": True,
                "use_cpu": not torch.cuda.is_available(),
            }  # fmt: skip
            return KalmanConfig(**(given | changes))

        return Setup(
            model=lambda: self.model(seed),
            config=config,
            tasks={name: rows[name] for name in names},
            trainer_options={
                "processing_class": tokenizer,
                "data_collator": DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
            },
            curvature_samples=o.curvature_samples,
            folder=folder,
            seed=seed,
            steps=o.max_steps,
        )

    def scores(self, learnt: Learnt, names: list[str]) -> dict[str, Any]:
        """Losses of the adapters that a method left.

        Args:
            learnt (`Learnt`): Adapters.
            names (`list[str]`): Of the tasks, in their order.

        Returns:
            `dict[str, Any]`: R as `scores`, the losses of adapters `own` to a task, and the general `text`.
        """
        model, state = learnt.model, AdapterState(learnt.model)

        def losses(adapter: Adapter, chosen: list[str]) -> list[float | None]:
            state.load(adapter)
            return [text_loss(model, self.heldout[n])["loss"] if n in chosen else None for n in names]

        start = self.start(model)
        rows: list[list[float | None]] = [[start[name] for name in names]]
        if len(learnt.adapters) == 1:  # of all tasks at once
            rows += [losses(learnt.adapters[0], []) for _ in names[1:]]
        for index, adapter in enumerate(learnt.adapters):
            rows.append(losses(adapter, [names[index]] if learnt.per_task else names))
        after = None if learnt.per_task else kl_from_base(model, self.text)  # of the last adapter, which is loaded
        own = {
            kind: [losses(adapter, [name])[names.index(name)] for name, adapter in zip(names, found, strict=True)]
            for kind, found in learnt.own.items()
        }
        return {"scores": rows, "own": own, "text": {"before": start[""], "after": after}}

    def start(self, model: Any) -> dict[str, float]:
        """Losses of the base model by domain, and of the general text by ""; measured once."""
        if not hasattr(self, "_start"):
            with model.disable_adapter():
                self._start = {name: text_loss(model, rows)["loss"] for name, rows in self.heldout.items()}
                self._start[""] = text_loss(model, self.text)["loss"]
        return self._start

    # -- model and data, loaded only if there is a run to do ---------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Any:
        """That of the model, with a pad token."""
        return load_tokenizer(self.options.model)

    @cached_property
    def heldout(self) -> dict[str, Dataset]:
        """Held-out rows by domain, the same for every seed."""
        _, domains = self.rows(self.options.seeds[0])
        return {
            name: tokenize(domain.heldout, self.tokenizer, self.options.max_length) for name, domain in domains.items()
        }

    @cached_property
    def text(self) -> Dataset:
        """Held-out rows of the general text."""
        source = next(iter(load_sources(self.options.text, limit_heldout=self.options.text_items).values()))
        return tokenize(source.heldout, self.tokenizer, self.options.max_length)

    def rows(self, seed: int) -> tuple[dict[str, Dataset], dict[str, Domain]]:
        """Training rows by domain, tokenised, and the domains."""
        if seed not in self._rows:
            o = self.options
            wanted = o.rows or o.max_steps * o.batch_size
            # Rows whose question leaves no room for an answer are dropped: read more.
            domains = [load_domain(d, limit_train=4 * wanted, limit_eval=o.eval_items, seed=seed) for d in o.domains]
            train = {d.name: head(tokenize(d.train, self.tokenizer, o.max_length), wanted) for d in domains}
            self._rows[seed] = train, {domain.name: domain for domain in domains}
        return self._rows[seed]

    def provenance(self, names: list[str], seed: int) -> dict[str, str]:
        """What the rows are, by domain."""
        train, domains = self.rows(seed)
        return {name: f"{domains[name].provenance}; {len(train[name])} rows to train on" for name in names}

    def model(self, seed: int) -> Any:
        """The base model with the adapter of a seed."""
        o = self.options
        base = load_base(o.model, torch.bfloat16 if o.bf16 else torch.float32)
        set_seed(seed)
        config = LoraConfig(r=o.r, lora_alpha=o.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(base, config)


def write_summary(
    runner: Runner, runs: dict[str, dict[str, list[dict[str, Any]]]], console: Console
) -> dict[str, Any]:
    """Tables over all runs and, where there are several orders, of each; pictures of each order.

    Args:
        runner (`Runner`): Names and settings.
        runs (`dict`): By order and method, one run per seed.
        console (`Console`): To print to.

    Returns:
        `dict[str, Any]`: What summary.json holds.
    """
    o = runner.options
    everything = {method: [run for found in runs.values() for run in found[method]] for method in o.methods}
    parts = {"all orders": everything, **runs} if len(runs) > 1 else runs
    results, text = {}, ""
    for part, found in parts.items():
        names = [runner.names[place] for place in _places(part)] if part in runs else []
        count = len(found[o.methods[0]])
        title = f"{' > '.join(names) if names else part}, {count} {'runs' if count > 1 else 'run'} each"
        results[part] = summarise_sequences(found)
        headings, rows = table_cells(results[part], runner.settings["text"])
        console.print(console_table(headings, rows, title, CAPTION))
        text += f"### {title}\n\n{markdown(headings, rows)}\n{CAPTION}\n\n"
        if names:
            labels = {method: file_name(method) for method in o.methods}
            plot_sequences(found, names, runner.folder / f"order-{part}", labels, title)
    first = everything[o.methods[0]][0]
    data = "\n".join(f"- {name}: {what}" for name, what in first["provenance"].items())
    (runner.folder / "report.md").write_text(f"{text}Data:\n{data}\n", encoding="utf-8")
    summary = {"settings": runner.settings | {"seeds": o.seeds, "orders": o.orders}, "results": results}
    write_json(summary, runner.folder / "summary.json")
    return summary


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run what is missing of the grid, and write tables and pictures.

    Args:
        arguments (`list[str]`, *optional*): Defaults to the command line.

    Returns:
        `dict[str, Any]`: What summary.json holds.
    """
    o = parse(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(o.threads or all_cores())
    logging.disable_progress_bar()
    console, runner = Console(width=170), Runner(o)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for order in o.orders:
        runs[order] = {method: [] for method in o.methods}
        for seed in o.seeds:
            for method in o.methods:
                console.print(f"order {order}, seed {seed}: {method}")
                runs[order][method].append(runner.run(method, order, seed))
    summary = write_summary(runner, runs, console)
    console.print(f"Written to {runner.folder}.")
    return summary


if __name__ == "__main__":
    main()
