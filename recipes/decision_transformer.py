"""Adapt a decision transformer, sample by sample, to a pendulum whose dynamics shift.

    python recipes/decision_transformer.py                                            # no hub, no gymnasium

A small decision transformer learns from a linear-quadratic expert to balance an inverted pendulum. Then mass, length
and friction change, three times. After each shift the expert, who knows the new dynamics, shows --episodes of --length
steps; each step is predicted first, then learned from, once and in order. Before and after that the model balances
--trials pendulums by itself.

A method is KIND or KIND:OPTION=VALUE,... (the classes of recipe_tools/decisions.py): "frozen"; "adamw" (warm-started
retraining of all weights on the `memory` newest samples, `steps` per sample); "loko" (the filter, over a LoRA of the
blocks, with a `memory` too); "kbt" (the Kalman Bayesian Transformer: all weights, no memory). --grids has the settings
at which each entry of --methods is tried on --tune_seeds, which are others; the one with the least error of the
predicted actions is run on --seeds. Runs that are there are not repeated.
"""

import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

from recipe_tools.arguments import parsed, refuse
from recipe_tools.decision_report import cells, plot_phases, summarise
from recipe_tools.decisions import EPISODE, Frozen, contexts, make_learner, pretrain, success_rate
from recipe_tools.pendulum import Pendulum, demonstrate
from recipe_tools.report import write_json
from recipe_tools.runs import device_name, file_name, read_run
from recipe_tools.tables import console_table, markdown


NOMINAL = Pendulum(1.0, 1.0, 0.1)
SHIFTED = {
    "heavy and long": Pendulum(2.0, 1.5, 0.1),
    "light and short": Pendulum(0.5, 0.6, 0.05),
    "damped": Pendulum(1.5, 1.0, 0.5),
}
FREE = ("methods", "grids", "seeds", "tune_seeds", "threads", "output_dir")


@dataclass
class Options:
    """The stream, the model and the methods."""

    methods: list[str] = field(
        default_factory=lambda: ["frozen", "kbt", "loko", "adamw:memory=1", "adamw:memory=16"],
        metadata={"help": "Methods, see above."},
    )
    grids: list[str] = field(
        default_factory=lambda: [
            "kbt variance=0.001/0.003/0.01 relaxation=0/0.03",
            "loko process_noise=0/1e-6/1e-4 prior_tokens=100/1000",
            "adamw lr=3e-4/1e-3/3e-3 steps=1/5",
        ],
        metadata={"help": "Per kind the values that are tried, as 'KIND OPTION=VALUE/VALUE ...'."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the evaluation."})
    tune_seeds: list[int] = field(default_factory=lambda: [100], metadata={"help": "Seeds of the tuning."})
    episodes: int = field(default=4, metadata={"help": "Shown by the expert after each shift."})
    length: int = field(default=25, metadata={"help": "Steps of each."})
    noise: float = field(
        default=0.1,
        metadata={"help": "On the expert's torques while it shows, as a share of m g l; labels have none."},
    )
    trials: int = field(
        default=20, metadata={"help": "Pendulums that the model balances before and after each phase."}
    )
    pretrain_episodes: int = field(default=100, metadata={"help": "Of the expert, before any shift."})
    pretrain_steps: int = field(default=600, metadata={"help": "Of AdamW, before any shift."})
    hidden: int = field(default=32, metadata={"help": "Width of the model."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    output_dir: str = field(default="outputs/decision_transformer", metadata={"help": "Where all is written."})


def parse(arguments: list[str]) -> Options:
    """Read and check options.

    Args:
        arguments (`list[str]`): Without the program's name.

    Returns:
        `Options`: As given.
    """
    parser, o = parsed(Options, __doc__, arguments)
    refusals = {
        f"--seeds and --tune_seeds share {set(o.seeds) & set(o.tune_seeds)}; tune on others": bool(
            set(o.seeds) & set(o.tune_seeds)
        ),
        "--seeds and --methods need at least one entry": not (o.seeds and o.methods),
        "--episodes, --length, --trials, --pretrain_episodes and --pretrain_steps must be positive": min(
            o.episodes, o.length, o.trials, o.pretrain_episodes, o.pretrain_steps
        )
        < 1,
        f"--length must be at most {EPISODE}": o.length > EPISODE,
        "--hidden must be even and positive": o.hidden < 2 or o.hidden % 2 == 1,
    }
    refuse(parser, refusals)
    return o


def settings_of(method: str, grids: list[str]) -> list[str]:
    """All settings at which a method is tried.

    Args:
        method (`str`): Its own options stay as they are.
        grids (`list[str]`): See [`Options`].

    Returns:
        `list[str]`: Methods; that one alone if its kind has no grid.

    Raises:
        ValueError: A grid that cannot be read.
    """
    kind, colon, own = method.partition(":")
    for grid in grids:
        name, *parts = grid.split()
        if not parts or any(part.count("=") != 1 for part in parts):
            raise ValueError(f"--grids {grid!r}: expected 'KIND OPTION=VALUE/VALUE ...'.")
        if name == kind:
            choices = [[f"{p.split('=')[0]}={value}" for value in p.split("=")[1].split("/")] for p in parts]
            fixed = [own] if colon else []
            return [f"{kind}:{','.join([*fixed, *chosen])}" for chosen in product(*choices)]
    return [method]


class Runner:
    """Runs of one set of options, kept as files.

    Args:
        options (`Options`): See there.
    """

    def __init__(self, options: Options):
        self.options = options
        self.folder = Path(options.output_dir)
        dynamics = {name: asdict(p) for name, p in ({"nominal": NOMINAL} | SHIFTED).items()}
        self.settings = {k: v for k, v in asdict(options).items() if k not in FREE} | {"dynamics": dynamics}
        self._start: tuple[int, Any] = (-1, None)  # of the last seed

    def start(self, seed: int) -> Any:
        """Pre-trained model, its contexts in random order, the return to ask for, and how well it balances."""
        if self._start[0] != seed:
            o, generator = self.options, torch.Generator().manual_seed(seed)
            shown = demonstrate(NOMINAL, o.pretrain_episodes, EPISODE, o.noise, generator)
            model = pretrain(shown, hidden=o.hidden, steps=o.pretrain_steps, rate=3e-3, seed=seed)
            inputs, targets = contexts(shown)
            order = torch.randperm(len(targets), generator=generator)
            target = float(shown.returns[:, 0].mean())
            own = success_rate(Frozen(model), NOMINAL, o.trials, target, seed)
            self._start = (seed, (model, {name: x[order] for name, x in inputs.items()}, target, own))
        return self._start[1]

    def run(self, method: str, seed: int) -> dict[str, Any]:
        """One pass over the stream, from its file if it is there.

        Args:
            method (`str`): See above.
            seed (`int`): Of the model, the demonstrations and the trials.

        Returns:
            `dict[str, Any]`: `nominal` (success before any shift), and per phase `errors` (squared, of each action
            before it was learned; in units of 10 N m), `arrived` and `adapted` (success rates), `seconds` per sample.
        """
        identity = {"method": method, "seed": seed, "settings": self.settings}
        file = self.folder / "runs" / f"{file_name(method)}-s{seed}.json"
        if stored := read_run(file, identity):
            return stored["result"]
        o = self.options
        model, seen, target, own = self.start(seed)
        learner = make_learner(method, model, seen)
        generator, phases = torch.Generator().manual_seed(seed + 1_000_000), {}
        for index, (name, pendulum) in enumerate(SHIFTED.items()):
            inputs, targets = contexts(demonstrate(pendulum, o.episodes, o.length, o.noise, generator))
            arrived = success_rate(learner, pendulum, o.trials, target, seed + index)
            errors, seconds = [], []
            for i in range(len(targets)):
                one, wanted = {key: x[i : i + 1] for key, x in inputs.items()}, targets[i : i + 1]
                errors.append(float((learner.act(one) - wanted).square().mean()))
                began = time.perf_counter()
                learner.learn(one, wanted)
                seconds.append(time.perf_counter() - began)
            adapted = success_rate(learner, pendulum, o.trials, target, seed + index)
            phases[name] = {
                "errors": errors, "arrived": arrived, "adapted": adapted, "seconds": statistics.median(seconds)
            }  # fmt: skip
        result = {"nominal": own, "phases": phases}
        write_json({"run": identity, "device": device_name(), "result": result}, file)
        return result

    def tune(self, method: str) -> dict[str, Any]:
        """Try a method's settings on the tuning seeds.

        Args:
            method (`str`): See above.

        Returns:
            `dict[str, Any]`: `error` by setting (`None` where it diverged), and the `chosen` one.
        """
        tried = settings_of(method, self.options.grids)
        if len(tried) == 1:
            return {"error": {}, "chosen": tried[0]}
        errors = {}
        for setting in tried:
            runs = [self.run(setting, seed) for seed in self.options.tune_seeds]
            found = [e for run in runs for phase in run["phases"].values() for e in phase["errors"]]
            mean = statistics.fmean(found)
            errors[setting] = mean if mean < float("inf") else None
        known = {setting: e for setting, e in errors.items() if e is not None}
        return {"error": errors, "chosen": min(known, key=lambda s: known[s]) if known else tried[0]}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Tune, evaluate, and write the table, the figure and summary.json.

    Args:
        arguments (`list[str]`, *optional*): Defaults to the command line.

    Returns:
        `dict[str, Any]`: What summary.json holds.
    """
    o = parse(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(o.threads)
    logging.set_verbosity_error()
    console, runner = Console(width=160), Runner(o)
    tuning = {method: runner.tune(method) for method in o.methods}
    # Seed by seed: the pre-trained model is made once for all methods.
    by_seed = [{method: runner.run(found["chosen"], seed) for method, found in tuning.items()} for seed in o.seeds]
    runs = {tuning[method]["chosen"]: [one[method] for one in by_seed] for method in o.methods}
    result = summarise(runs)
    summary = {
        "settings": runner.settings | {"seeds": o.seeds, "tune_seeds": o.tune_seeds, "grids": o.grids},
        "device": device_name(), "tuning": tuning, "results": result,
    }  # fmt: skip
    write_json(summary, runner.folder / "summary.json")
    headings, rows = cells(result)
    nominal = statistics.fmean(one[o.methods[0]]["nominal"] for one in by_seed)
    note = (
        f"Mean over {len(o.seeds)} seeds ± 95 % interval (Student's t). Error: squared, of actions before they are "
        f"learned, in units of (10 N m)^2. Success: of {o.trials} trials before (arrived) and after (adapted) "
        f"{o.episodes * o.length} samples. Before any shift the model balances {nominal:.0%}."
    )
    title = f"Decision transformer, {len(SHIFTED)} shifts"
    console.print(console_table(headings, rows, title, note))
    (runner.folder / "report.md").write_text(f"### {title}\n\n{markdown(headings, rows)}\n{note}\n", encoding="utf-8")
    plot_phases(runs, runner.folder / "decision_transformer.png", window=10)
    console.print(f"Written to {runner.folder}.")
    return summary


if __name__ == "__main__":
    main()
