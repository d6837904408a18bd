"""How good is the uncertainty of a fine-tuned adapter? One belief, every method of prediction, the same rows.

    python recipes/uncertainty.py --task digits                                   # images, no hub needed
    python recipes/uncertainty.py --task sst2 --outside mrpc                       # MiniLM, no hub needed
    python recipes/uncertainty.py --task sst2 --data FILE --outside cola --outside_data FILE --train 2000
    python recipes/uncertainty.py --task mnist --images FOLDER --outside fashion --outside_images FOLDER
    python recipes/uncertainty.py --task arc_easy --outside hellaswag              # SmolLM2 answers with a letter
    python recipes/uncertainty.py --config recipes/uncertainty_smoke.yaml          # seconds

An adapter, also on the head, is trained by AdamW and gets the belief of its curvature (or is trained by LoKO, whose
state is one). Then, on the same test rows: the mean alone (MAP), with a temperature, one streamlined pass, with a
scale fitted on validation rows, the linearised network with the belief's variances and with its full structure, Monte
Carlo, and a deep ensemble. The prior precision of a curvature is chosen on the validation rows, by the full linearised
network. NLL in nats; ECE over 15 equal-width bins of the confidence; AUROC of telling rows of another kind by their
entropy, and wrong answers by their confidence; seconds by the wall clock for the test rows.

Every seed is a split, a head, an adapter and draws; its results are a file of its own and are not measured again.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

from recipe_tools.arguments import parser_with_config, refuse
from recipe_tools.labelled import TEXT_TASKS
from recipe_tools.online_report import interval
from recipe_tools.report import write_json
from recipe_tools.runs import device_name, file_marks, read_run, short_name
from recipe_tools.tables import console_table, markdown
from recipe_tools.uncertainty_runs import Judge, Training, load_or_train, table_rows
from recipe_tools.uncertainty_tasks import (
    CHOICE_TASKS,
    IMAGE_TASKS,
    Problem,
    Sizes,
    choice_problem,
    image_problem,
    text_problem,
)
from recipe_tools.vit import Pretraining


TASKS = (*TEXT_TASKS, *IMAGE_TASKS, *CHOICE_TASKS)
BELIEFS = ("kronecker", "ekfac", "diagonal", "low_rank", "loko")
FILES = ("model", "data", "outside_data", "images", "outside_images", "adapter")
FREE = ("seeds", "threads", "output_dir")  # what a run does not depend on
METRICS = {"nll": "NLL", "ece": "ECE", "brier": "Brier", "accuracy": "accuracy", "auroc_errors": "AUROC errors"}


@dataclass
class Options:
    """Task, model, adapter and methods."""

    task: str = field(default="sst2", metadata={"help": f"Of {', '.join(TASKS)}."})
    model: str | None = field(
        default=None,
        metadata={
            "help": "Text: 'minilm' (default), a Hub id or a path; multiple choice: 'smollm2' (default), or so."
        },
    )
    data: str = field(default="offline", metadata={"help": "Text: 'offline', a .tsv or .jsonl file, or a Hub id."})
    images: str = field(default="offline", metadata={"help": "Images: 'offline' (digits), a folder, or a Hub id."})
    outside: str | None = field(
        default=None,
        metadata={"help": "Another task whose rows are out of distribution; images: their negatives by default."},
    )
    outside_data: str = field(default="offline", metadata={"help": "Text: of the other task, as --data."})
    outside_images: str = field(default="offline", metadata={"help": "Images: of the other task, as --images."})
    adapter: str | None = field(
        default=None, metadata={"help": "Folder of an adapter with its belief, instead of training; no ensemble then."}
    )
    belief: str = field(
        default="kronecker",
        metadata={"help": f"Curvature's structure, or an optimizer's belief: {', '.join(BELIEFS)}."},
    )
    prior_precisions: list[float] = field(
        default_factory=lambda: [1.0, 10.0, 100.0, 1000.0, 10000.0],
        metadata={"help": "Of a curvature's prior: the best on the validation rows; one value is taken as it is."},
    )
    train: int = field(default=400, metadata={"help": "Rows to train on."})
    validation: int = field(default=150, metadata={"help": "Rows to fit scale and temperature on."})
    test: int = field(default=300, metadata={"help": "Rows to judge on."})
    outside_rows: int = field(default=300, metadata={"help": "Rows of the other task, at most."})
    epochs: int = field(default=5, metadata={"help": "Passes over the training rows."})
    batch_size: int = field(default=16, metadata={"help": "Rows per step and per prediction."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak of AdamW's."})
    r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapter times r."})
    max_length: int = field(default=64, metadata={"help": "Text and multiple choice: tokens per row."})
    draws: int = field(default=20, metadata={"help": "Adapters of Monte Carlo."})
    members: int = field(default=3, metadata={"help": "Adapters of the ensemble; 1 leaves it out."})
    pretrain_images: int = field(default=20_000, metadata={"help": "Images: at most so many to pre-train the ViT on."})
    pretrain_epochs: int = field(default=6, metadata={"help": "Images: passes over them; digits want 60."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One run each."})
    threads: int = field(default=1, metadata={"help": "Threads of torch on a CPU."})
    output_dir: str = field(default="outputs/uncertainty", metadata={"help": "A folder per task is made in it."})


def parse(arguments: list[str]) -> Options:
    """Read and check options.

    Args:
        arguments (`list[str]`): Without the program's name.

    Returns:
        `Options`: With `model` and `outside` filled in.
    """
    parser, rest = parser_with_config(Options, __doc__, arguments)
    o: Options = parser.parse_args_into_dataclasses(rest, look_for_args_file=False)[0]
    text, images, choices = o.task in TEXT_TASKS, o.task in IMAGE_TASKS, o.task in CHOICE_TASKS
    o.model = o.model or ("minilm" if text else "vit" if images else "smollm2")
    if o.outside is None and not images:
        o.outside = {"sst2": "mrpc", "mrpc": "sst2", "cola": "sst2", "arc_easy": "hellaswag"}.get(o.task, "arc_easy")
    kind = TEXT_TASKS if text else IMAGE_TASKS if images else CHOICE_TASKS
    counts = (o.train, o.validation, o.test, o.outside_rows, o.epochs, o.batch_size, o.members, o.r)
    refusals = {
        f"--task {o.task}: expected one of {list(TASKS)}": not (text or images or choices),
        f"--outside {o.outside}: expected another one of {list(kind)}": o.outside is not None
        and (o.outside not in kind or o.outside == o.task),
        f"--model {o.model}: for images the model is 'vit', which the recipe trains": images and o.model != "vit",
        "--images and --outside_images are for image tasks": not images
        and (o.images, o.outside_images) != ("offline", "offline"),
        "--data and --outside_data are for text tasks": not text
        and (o.data, o.outside_data) != ("offline", "offline"),
        "--outside_images needs --outside": images and o.outside is None and o.outside_images != "offline",
        f"--belief {o.belief}: expected one of {list(BELIEFS)}": o.belief not in BELIEFS,
        "--prior_precisions must be > 0, at least one": not o.prior_precisions or min(o.prior_precisions) <= 0,
        "--seeds needs at least one entry, each once": not o.seeds or len(set(o.seeds)) < len(o.seeds),
        "--draws must be at least 2": o.draws < 2,
        "rows, --epochs, --batch_size, --members and --r must be at least 1": min(counts) < 1,
        f"--adapter {o.adapter} is no folder": o.adapter is not None and not Path(o.adapter).is_dir(),
        "--members is for adapters that are trained here; give --members 1 with --adapter": o.adapter is not None
        and o.members > 1,
    }
    refuse(parser, refusals)
    return o


def make_problem(o: Options, seed: int) -> Problem:
    """What the options describe."""
    sizes = Sizes(o.train, o.validation, o.test, o.outside_rows)
    if o.task in TEXT_TASKS:
        outside = (str(o.outside), o.outside_data)
        return text_problem(o.task, str(o.model), o.data, outside, sizes, o.max_length, seed)
    if o.task in CHOICE_TASKS:
        return choice_problem(o.task, str(o.model), str(o.outside), sizes, o.max_length, seed)
    how = Pretraining(images=o.pretrain_images, epochs=o.pretrain_epochs)
    other = None if o.outside is None else (o.outside, o.outside_images)
    return image_problem(o.task, o.images, other, sizes, how, seed)


def run(o: Options, seed: int, settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One seed, from its file if it is there.

    Args:
        o (`Options`): All.
        seed (`int`): Of split, head, adapter and draws.
        settings (`Mapping`): What the run depends on.
        folder (`Path`): For runs.

    Returns:
        `dict[str, Any]`: "provenance", "prior_precision", and "results" by line of the table.
    """
    file, identity = folder / "runs" / f"s{seed}.json", {"seed": seed, "settings": dict(settings)}
    if stored := read_run(file, identity):
        return stored
    problem = make_problem(o, seed)
    how = Training(o.r, o.lora_alpha, o.epochs, o.batch_size, o.learning_rate, o.belief)
    adapter = None if o.adapter is None else Path(o.adapter)
    model, belief, members = load_or_train(problem, how, o.members, seed, adapter)
    judge = Judge(problem, model, belief, members, o.batch_size, seed)
    prior = judge.choose_prior(o.prior_precisions)
    cache: dict[Any, Any] = {}
    results = {row.name: judge.judge(row, cache) for row in table_rows(o.draws, len(members))}
    record = {
        "run": identity, "device": device_name(), "provenance": problem.provenance, "prior_precision": prior,
        "results": results,
    }  # fmt: skip
    write_json(record, file)
    return record


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and half-width of the 95 % interval over seeds of every number, by line.

    Args:
        runs (`Sequence`): As returned by [`run`].

    Returns:
        `dict[str, Any]`: By line: the metrics, "auroc_ood" and "shifted" by name, "seconds", "passes".
    """
    summary: dict[str, Any] = {}
    for name in runs[0]["results"]:
        found = [r["results"][name] for r in runs]
        line: dict[str, Any] = {m: interval([f[m] for f in found]) for m in (*METRICS, "seconds", "rows_per_second")}
        line["auroc_ood"] = {k: interval([f["auroc_ood"][k] for f in found]) for k in found[0]["auroc_ood"]}
        line["shifted"] = {
            k: {m: interval([f["shifted"][k][m] for f in found]) for m in METRICS} for k in found[0]["shifted"]
        }
        summary[name] = line | {"passes": found[0]["passes"]}
    return summary


def cells(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table.

    Args:
        summary (`Mapping`): See [`summarise`].

    Returns:
        `tuple[list[str], list[list[str]]]`: Best means are not marked: differences may be noise.
    """
    first = next(iter(summary.values()))
    headings = ["method", *METRICS.values(), *(f"AUROC {k}" for k in first["auroc_ood"])]
    headings += [f"{METRICS[m]}, {k}" for k in first["shifted"] for m in ("nll", "ece")]
    headings += ["passes", "seconds"]
    rows = []
    for name, line in summary.items():
        passes = line["passes"]
        both = str(passes["forward"]) + (f" + {passes['backward']} backward" if passes["backward"] else "")
        row = [name, *(_shown(line[m]) for m in METRICS), *(_shown(v) for v in line["auroc_ood"].values())]
        row += [_shown(v[m]) for v in line["shifted"].values() for m in ("nll", "ece")]
        rows.append([*row, both, _shown(line["seconds"], 2)])
    return headings, rows


def _shown(value: Mapping[str, float | None], digits: int = 3) -> str:
    if value["mean"] is None:
        return "-"
    text = f"{value['mean']:.{digits}f}"
    return text if value["ci95"] is None else f"{text} ± {value['ci95']:.{digits}f}"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run every seed, and write the table.

    Args:
        arguments (`list[str]`, *optional*): Defaults to the command line.

    Returns:
        `dict[str, Any]`: What summary.json holds.
    """
    o = parse(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(o.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(width=200)
    folder = Path(o.output_dir) / o.task
    settings = {key: value for key, value in asdict(o).items() if key not in FREE}
    settings |= {key: short_name(settings[key]) for key in FILES if settings[key]}
    settings["files"] = file_marks({key: getattr(o, key) for key in FILES if getattr(o, key)})
    runs = [run(o, seed, settings, folder) for seed in o.seeds]
    lines = summarise(runs)
    summary = {
        "settings": settings | {"seeds": o.seeds}, "device": runs[0]["device"],
        "provenance": runs[0]["provenance"], "prior_precisions": [r["prior_precision"] for r in runs],
        "results": lines,
    }  # fmt: skip
    write_json(summary, folder / "summary.json")
    headings, rows = cells(lines)
    title = f"{o.task}, {settings['model']}: {o.test} test rows, {len(o.seeds)} seed{'s' * (len(o.seeds) > 1)}"
    caption = f"seconds: {runs[0]['device']}; ±: 95 % over seeds"
    console.print(console_table(headings, rows, title, caption))
    data = "; ".join(f"{name}: {what}" for name, what in runs[0]["provenance"].items())
    text = f"### {title}\n\n{markdown(headings, rows)}\n{caption}. Data: {data}.\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    for r in runs:
        if r["prior_precision"].get("edge"):
            console.print(
                f"[yellow]The prior precision is at an edge of --prior_precisions: {r['prior_precision']}[/]"
            )
    console.print(f"Written to {folder}.")
    return summary


if __name__ == "__main__":
    main()
