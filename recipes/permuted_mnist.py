"""Learn permuted (or slowly rotating) digits task after task: filter and smoother beside other remedies.

    python recipes/permuted_mnist.py                                     # 8 x 8 digits of scikit-learn, no hub needed
    python recipes/permuted_mnist.py --data mnist --images FOLDER --tasks 20
    python recipes/permuted_mnist.py --kind rotated --methods filter:q=1e-4 filter:q=1e-3 sequential

The setting of Low-Rank Filtering and Smoothing (arXiv:2410.06800): an MLP learns one permutation of the pixels after
the other, here through LoRA factors on a frozen random base. A method is one of those that `Method` in
recipe_tools/continual_methods.py describes, with options: "filter:rank=10,q=1e-4,where=first",
"filter:structure=ekfac", "ewc:strength=10", "l2:strength=100", "replay:share=0.05", "sequential", "separate", "joint".

A seed is a base, an adapter, permutations and draws, the same for all methods. Every run is a file of its own; runs
that are there are not repeated. Tables hold means over seeds and 95 % intervals by Student's t.
"""

import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from recipe_tools.arguments import parsed, refuse
from recipe_tools.continual_methods import Method, Training, run
from recipe_tools.image_report import CAPTION, plot_all, summarise, table_cells
from recipe_tools.image_tasks import KINDS, between_rotations, make_mlp, make_tasks
from recipe_tools.images import Images, load_images
from recipe_tools.report import write_json
from recipe_tools.runs import read_run
from recipe_tools.tables import console_table, markdown


DEFAULT_METHODS = [
    "sequential", "l2:strength=10", "l2:strength=100", "ewc", "ewc:strength=10", "replay:share=0.01",
    "replay:share=0.05", "separate", "joint",
    *(f"filter:rank={rank}" for rank in (0, 2, 5, 10, 20)),
    "filter:structure=diagonal", "filter:structure=ekfac",
    *(f"filter:structure=ekfac,q={q}{where}" for q in ("1e-5", "1e-4", "1e-3") for where in ("", ",where=first")),
]  # fmt: skip
DATA = ("digits", "mnist", "fashion")
ORDERS = ("given", "reversed")
# What a run does not depend on.
FREE = ("methods", "seeds", "orders", "threads", "output_dir", "images")


@dataclass
class Options:
    """Data, model and methods."""

    data: str = field(default="digits", metadata={"help": "digits, mnist or fashion."})
    images: str = field(default="offline", metadata={"help": "'offline' (digits, fashion), a folder, or a Hub id."})
    kind: str = field(default="permuted", metadata={"help": f"Of the tasks, one of {KINDS}."})
    tasks: int = field(default=5, metadata={"help": "Number of tasks."})
    samples: int = field(default=400, metadata={"help": "Training images per task."})
    heldout: int = field(default=500, metadata={"help": "Test images."})
    hidden: int = field(default=100, metadata={"help": "Width of the hidden layers."})
    layers: int = field(default=2, metadata={"help": "Hidden layers."})
    r: int = field(default=16, metadata={"help": "Rank of the LoRA factors."})
    epochs: int = field(default=20, metadata={"help": "Passes over a task's images."})
    batch_size: int = field(default=64, metadata={"help": "Images per step."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Of AdamW."})
    curvature_samples: int = field(default=500, metadata={"help": "Images for the curvature of a task."})
    methods: list[str] = field(default_factory=lambda: list(DEFAULT_METHODS), metadata={"help": "See above."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run each, in each order."})
    orders: list[str] = field(
        default_factory=lambda: ["given"], metadata={"help": f"Of the tasks, some of {ORDERS}: one run each."}
    )
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    output_dir: str = field(default="outputs/permuted", metadata={"help": "For runs, tables and figures."})


def parse(arguments: list[str]) -> Options:
    """Read and check options.

    Args:
        arguments (`list[str]`): Without the program's name.

    Returns:
        `Options`: With methods in their canonical form.
    """
    parser, o = parsed(Options, __doc__, arguments)
    refusals = {
        f"--kind must be one of {KINDS}, got {o.kind!r}": o.kind not in KINDS,
        f"--data must be one of {DATA}, got {o.data!r}": o.data not in DATA,
        "--methods and --seeds need at least one entry": not (o.methods and o.seeds),
        f"--orders must be some of {ORDERS}, got {o.orders}": not o.orders or bool(set(o.orders) - set(ORDERS)),
        "--tasks, --samples, --heldout, --hidden, --layers, --r, --epochs, --batch_size, --curvature_samples and "
        "--threads must be at least 1": min(
            o.tasks, o.samples, o.heldout, o.hidden, o.layers, o.r, o.epochs, o.batch_size, o.curvature_samples,
            o.threads,
        ) < 1,
        "--learning_rate must be above 0 and finite": not 0 < o.learning_rate < math.inf,
        f"--seeds {o.seeds}: each must be in [0, 2^32)": not all(0 <= seed < 2**32 for seed in o.seeds),
    }  # fmt: skip
    refuse(parser, refusals)
    # The same run twice would count as two.
    o.seeds, o.orders = list(dict.fromkeys(o.seeds)), list(dict.fromkeys(o.orders))
    try:
        o.methods = list(dict.fromkeys(str(Method.parse(text)) for text in o.methods))
    except ValueError as error:
        parser.error(f"--methods: {error}")
    return o


def run_once(
    o: Options, images: tuple[Images, Images, str], text: str, seed: int, order: str, folder: Path
) -> dict[str, Any]:
    """One run, from its file if it is there.

    Args:
        o (`Options`): See there.
        images (`tuple[Images, Images, str]`): To train on, to test on, and what they are.
        text (`str`): The method.
        seed (`int`): Of everything.
        order (`str`): One of `ORDERS`.
        folder (`Path`): For the file.

    Returns:
        `dict[str, Any]`: What `Result` holds.

    Raises:
        ValueError: The file is of other settings.
    """
    file = folder / "runs" / f"{text.replace(':', '+')}-s{seed}-{order}.json"
    settings = {key: value for key, value in asdict(o).items() if key not in FREE} | {"provenance": images[2]}
    identity = {"method": text, "seed": seed, "order": order, "settings": settings}
    if stored := read_run(file, identity):
        return stored["result"]
    tasks = make_tasks(o.kind, images[0], images[1], o.tasks, o.samples, o.heldout, seed)
    between = between_rotations(images[1], o.tasks, o.heldout, seed) if o.kind == "rotated" else []
    if order == "reversed":
        tasks, between = tasks[::-1], between[::-1]
    model = make_mlp(tasks[0].train["pixel_values"].shape[1], o.hidden, o.layers, o.r, seed)
    how = Training(o.epochs, o.batch_size, o.learning_rate, o.curvature_samples)
    result = asdict(run(Method.parse(text), model, tasks, how, seed, between))
    result["scores"] = [[None if math.isnan(s) else s for s in row] for row in result["scores"]]
    write_json({"run": identity, "result": result}, file)
    return result


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run all methods on all seeds, and write tables and figures.

    Args:
        arguments (`list[str]`, *optional*): Defaults to the command line.

    Returns:
        `dict[str, Any]`: What summary.json holds.
    """
    o = parse(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(o.threads)
    console, folder = Console(width=170), Path(o.output_dir) / f"{o.data}-{o.kind}-{o.tasks}"
    images = load_images(o.data, o.images)
    runs: dict[str, list[dict[str, Any]]] = {}
    for method in o.methods:
        runs[method] = [run_once(o, images, method, seed, order, folder) for order in o.orders for seed in o.seeds]
        console.print(f"{method}: {summarise(runs[method])['average_accuracy']['mean']:.3f}")
    results = {method: summarise(every) for method, every in runs.items()}
    heading = f"{o.data}, {o.tasks} {o.kind} tasks, {o.samples} images each, {len(o.seeds) * len(o.orders)} runs"
    headings, rows = table_cells(results)
    console.print(console_table(headings, rows, heading, CAPTION))
    (folder / "report.md").write_text(
        f"### {heading}\n\n{markdown(headings, rows)}\n{CAPTION}\n\nData: {images[2]}.\n", encoding="utf-8"
    )
    summary = {"settings": asdict(o) | {"images": Path(o.images).name}, "results": results}
    write_json(summary, folder / "summary.json")
    plot_all(runs, results, folder, o.tasks)
    console.print(f"Written to {folder}.")
    return summary


if __name__ == "__main__":
    main()
