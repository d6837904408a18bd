"""Learn a classification task online, in one pass: LoKO beside AdamW and AdaGrad with their learning rates tuned.

    python recipes/online_classification.py --task sst2                      # MiniLM and 872 sentences, no hub needed
    python recipes/online_classification.py --task cola --model roberta-base --data nyu-mll/glue         # with a hub
    python recipes/online_classification.py --task fashion --images FOLDER   # a ViT, and a shift in mid-stream

Samples come in batches; each batch is predicted with the current weights first, then learned from (prequential
evaluation), so that accuracy and log loss are those of data never seen before. The model is in evaluation mode: there
is no dropout, and the one forward pass that predicts is also the one learned from.

Text (sst2, cola, mrpc): an encoder with LoRA and a new classification head. Images (digits, mnist, fashion, cifar10):
a small ViT that the recipe trains on upright images first (once; it is cached); then LoRA and the head learn from a
stream of other images, of which the second half is rotated and jittered.

A method is "adamw:RATE", "adagrad:RATE", "sgd:RATE", or "loko:OPTION=VALUE,..." with options of
`create_loko_optimizer`. Without a rate, the best of --rates by log loss over --tune_seeds is taken, and evaluated on
--seeds, which are others: a seed is an order of the data, a head and an adapter, and the same for all methods. LoKO is
not tuned. Every run is a file of its own under --output_dir; runs that are there are not repeated.
"""

import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import set_seed
from transformers.utils import logging

from recipe_tools.arguments import parsed, refuse
from recipe_tools.labelled import TEXT_TASKS
from recipe_tools.online_report import online_markdown, online_table, plot_online, summarise_runs
from recipe_tools.prequential import RATED, Learner, Trace, canonical, run_stream, summarise, to_record
from recipe_tools.report import write_json
from recipe_tools.runs import device_name, file_name, read_run, short_name
from recipe_tools.streams import Stream, image_stream, text_stream
from recipe_tools.vit import Pretraining


IMAGE_TASKS = ("digits", "mnist", "fashion", "cifar10")
# What a run does not depend on; all other options are stored with it, and must not change in one folder.
FREE = ("methods", "rates", "seeds", "tune_seeds", "batch_sizes", "window", "threads", "output_dir")


@dataclass
class Options:
    """The stream, the model and the methods."""

    task: str = field(default="sst2", metadata={"help": f"Of {', '.join((*TEXT_TASKS, *IMAGE_TASKS))}."})
    model: str | None = field(
        default=None,
        metadata={
            "help": "Text: 'minilm' (from a package, no hub; the default), a Hub id such as 'roberta-base', or a "
            "path; a head for another number of classes is replaced. Images: 'vit' only."
        },
    )
    data: str = field(
        default="offline",
        metadata={"help": "Text: 'offline' (from a package), a .tsv or .jsonl file (also .gz), or a Hub id."},
    )
    images: str = field(
        default="offline",
        metadata={"help": "Images: 'offline' (digits, fashion), a folder of IDX files or CIFAR sheets, or a Hub id."},
    )
    methods: list[str] = field(
        default_factory=lambda: ["adamw", "adagrad", "loko"],
        metadata={"help": "Methods, see above; differences in the tables are to the first."},
    )
    rates: list[float] = field(
        default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
        metadata={"help": "Learning rates tried for methods without one."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the evaluation."})
    tune_seeds: list[int] = field(default_factory=lambda: [100], metadata={"help": "Seeds of the tuning."})
    samples: int | None = field(
        default=None, metadata={"help": "Length of the stream; by default 1000, or all there are if these are fewer."}
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16], metadata={"help": "Samples per step, each tried."})
    max_length: int = field(default=64, metadata={"help": "Text: tokens per sample; longer ones are cut."})
    angles: list[float] = field(
        default_factory=lambda: [45.0, 90.0], metadata={"help": "Images: bounds of the rotations after the shift."}
    )
    jitter: float = field(
        default=0.2,
        metadata={"help": "Images: strength of contrast, brightness and noise after the shift; 0 is none."},
    )
    pretrain_images: int = field(default=20_000, metadata={"help": "Images: at most so many to pre-train on."})
    pretrain_epochs: int = field(default=6, metadata={"help": "Images: passes over them; digits want 60."})
    r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapter times r."})
    targets: list[str] = field(
        default_factory=lambda: ["query", "value", "q_proj", "v_proj"],
        metadata={"help": "Names of the layers to adapt, as far as the model has them."},
    )
    window: int = field(default=100, metadata={"help": "Samples over which the curves are averaged."})
    threads: int = field(default=1, metadata={"help": "Threads of torch on a CPU."})
    output_dir: str = field(default="outputs/online", metadata={"help": "A folder per task is made in it."})


def parse(arguments: list[str]) -> Options:
    """Read and check options.

    Args:
        arguments (`list[str]`): Without the program's name.

    Returns:
        `Options`: With methods in their canonical form and `model` filled in.
    """
    parser, o = parsed(Options, __doc__, arguments)
    text = o.task in TEXT_TASKS
    o.model = o.model or ("minilm" if text else "vit")
    refusals = {
        f"--task {o.task}: expected one of {[*TEXT_TASKS, *IMAGE_TASKS]}": not text and o.task not in IMAGE_TASKS,
        f"--model {o.model}: for images the model is 'vit', which the recipe trains": not text and o.model != "vit",
        "--images is for image tasks; give --data": text and o.images != "offline",
        "--data is for text tasks; give --images": not text and o.data != "offline",
        f"--seeds and --tune_seeds share {set(o.seeds) & set(o.tune_seeds)}; tune on others": bool(
            set(o.seeds) & set(o.tune_seeds)
        ),
        "--seeds, --batch_sizes and --methods need at least one entry": not (o.seeds and o.batch_sizes and o.methods),
        "--batch_sizes and --window must be positive, --samples at least 2": min(*o.batch_sizes, o.window) < 1
        or (o.samples is not None and o.samples < 2),
        "--angles takes two bounds, the lower one first": len(o.angles) != 2 or o.angles[0] > o.angles[-1],
        "--rates and --tune_seeds are needed to tune methods without a rate": bool(set(o.methods) & RATED.keys())
        and not (o.rates and o.tune_seeds),
    }
    refuse(parser, refusals)
    try:
        o.methods = list(dict.fromkeys(m if m in RATED else canonical(m) for m in o.methods))
    except ValueError as error:
        parser.error(f"--methods: {error}")
    return o


def make_stream(o: Options) -> Stream:
    """What the options describe."""
    if o.task in TEXT_TASKS:
        return text_stream(o.task, str(o.model), o.data, o.samples, o.max_length)
    how = Pretraining(images=o.pretrain_images, epochs=o.pretrain_epochs)
    return image_stream(o.task, o.images, o.samples, (o.angles[0], o.angles[1]), o.jitter, how)


class Runner:
    """Runs a method on a seed once, and remembers it in a file."""

    def __init__(self, options: Options, stream: Stream, folder: Path):
        self.options, self.stream, self.folder = options, stream, folder
        settings = {key: value for key, value in asdict(options).items() if key not in FREE}
        for key in ("model", "data", "images"):  # a file's name, not where it lies on this machine
            settings[key] = short_name(settings[key])
        self.settings = settings | {"samples": stream.length, "provenance": stream.provenance}

    def run(self, method: str, batch_size: int, seed: int) -> Trace:
        """The trace of one pass, from its file if it is there.

        Args:
            method (`str`): With a rate, or LoKO.
            batch_size (`int`): Samples per step.
            seed (`int`): Of order, head, adapter and draws.

        Returns:
            `Trace`: See there.

        Raises:
            ValueError: The file is of other settings.
        """
        file = self.folder / "runs" / f"b{batch_size}" / f"{file_name(method)}-s{seed}.json"
        identity = {"method": method, "batch_size": batch_size, "seed": seed, "settings": self.settings}
        if stored := read_run(file, identity):
            return Trace(**stored["trace"])
        model = self.model(seed)
        samples = self.stream.samples(seed)
        batches = [
            self.stream.collate(samples[start : start + batch_size]) for start in range(0, len(samples), batch_size)
        ]
        trace = run_stream(model, Learner(method, model, seed), batches, f"{method}, batch {batch_size}, seed {seed}")
        record = to_record(trace)
        write_json({"run": identity, "device": device_name(), "trace": record}, file)
        return Trace(**record)

    def model(self, seed: int) -> Any:
        """The model of a seed with its adapter: the same for every method."""
        o = self.options
        set_seed(seed)
        base = self.stream.model()
        config = LoraConfig(r=o.r, lora_alpha=o.lora_alpha, target_modules=o.targets, lora_dropout=0.0)
        if o.task in TEXT_TASKS:
            config.task_type = "SEQ_CLS"  # trains the new head too
        else:
            config.modules_to_save = ["classifier"]
        return get_peft_model(base, config).to("cuda" if torch.cuda.is_available() else "cpu")

    def tune(self, kind: str, batch_size: int) -> dict[str, Any]:
        """Try every rate on the tuning seeds.

        Args:
            kind (`str`): "adamw" and so on.
            batch_size (`int`): Samples per step.

        Returns:
            `dict[str, Any]`: `log_loss` by method with its rate, the `chosen` one, and whether it is at an `edge` of
            the grid, beyond which a better one may lie.
        """
        tried = [canonical(f"{kind}:{rate}") for rate in sorted(set(self.options.rates))]
        span = {"all": self.stream.windows["all"]}
        losses = {
            method: statistics.fmean(
                summarise(self.run(method, batch_size, seed), span)["all"]["log_loss"]
                for seed in self.options.tune_seeds
            )
            for method in tried
        }
        chosen = min(tried, key=lambda method: losses[method])
        return {"log_loss": losses, "chosen": chosen, "edge": len(tried) > 1 and chosen in (tried[0], tried[-1])}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Tune, evaluate, and write tables and pictures.

    Args:
        arguments (`list[str]`, *optional*): Defaults to the command line.

    Returns:
        `dict[str, Any]`: What summary.json holds.
    """
    o = parse(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(o.threads)
    logging.set_verbosity_error()  # each run would say that the head is new
    logging.disable_progress_bar()
    console = Console(width=150)
    stream = make_stream(o)
    folder = Path(o.output_dir) / o.task
    runner = Runner(o, stream, folder)
    tuning: dict[str, Any] = {}
    traces: dict[str, dict[str, list[Trace]]] = {}
    for size in o.batch_sizes:
        console.rule(f"{o.task}, batches of {size}")
        tuned = {kind: runner.tune(kind, size) for kind in o.methods if kind in RATED}
        for kind, found in tuned.items():
            console.print(f"{kind}: best of {len(found['log_loss'])} rates is {found['chosen']}")
            if found["edge"]:
                console.print(f"[yellow]{kind}: that is at an edge of --rates; widen them.[/]")
        chosen = [tuned[method]["chosen"] if method in tuned else method for method in o.methods]
        tuning[str(size)] = tuned
        traces[str(size)] = {method: [runner.run(method, size, seed) for seed in o.seeds] for method in chosen}
    results = {size: summarise_runs(runs, stream.windows) for size, runs in traces.items()}
    summary = {
        "settings": runner.settings | {"seeds": o.seeds, "tune_seeds": o.tune_seeds, "rates": o.rates},
        "device": device_name(),
        "tuning": tuning,
        "results": results,
    }
    write_json(summary, folder / "summary.json")
    text, heading = "", f"{o.task}, {runner.settings['model']}"
    for size, result in results.items():
        title = f"{heading}: {stream.length} samples in batches of {size}, {len(o.seeds)} seeds"
        console.print(online_table(result, title))
        text += f"### {title}\n\n{online_markdown(result)}\n"
    (folder / "report.md").write_text(f"{text}Data: {stream.provenance}.\n")
    plot_online(
        traces,
        folder / "curves.png",
        window=o.window,
        shift_at=stream.shift_at,
        title=f"{heading}: predicted, then learned",
    )
    console.print(f"Written to {folder}.")
    return summary


if __name__ == "__main__":
    main()
