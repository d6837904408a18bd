"""Learning against forgetting: methods with their strengths and learning rates, on scenarios, over seeds.

    python recipes/compare.py --config recipes/compare/smoke.yaml            # minutes, to see that all is there
    python recipes/compare.py --config recipes/compare/far.yaml --processes 2
    python recipes/compare.py --config recipes/compare/far.yaml --report     # tables of what is there, nothing is run

A YAML file holds scenarios by name; their keys are those of `Scenario` in recipe_tools/comparison/scenario.py: what is
learnt, what is to be kept, and methods such as

    - lora: {lr: [1.0e-3, 2.0e-3]}                        # a list is tried in full, several in all combinations
    - ewc: {strength: [1, 10, 100], lr: [1.0e-3, 2.0e-3]}
    - wise: {alpha: 0.25/0.5/0.75}                        # several points of one training
    - replay:share=0.05

Methods and their options are told in recipe_tools/methods/. All methods of a seed begin with the same adapter and see
the same target rows in the same number of steps. Every setting and seed is a file of its own under
OUTPUT_DIR/SCENARIO/runs, in the shape of PEFT's MetaMathQA benchmark; what is there is not run again, so that a grid
that was killed goes on, and files of other settings or data are refused. Per scenario: report.md, summary.json and
learning_forgetting.png. How the figures are made is told in recipe_tools/comparison/summary.py.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from recipe_tools.arguments import parsed
from recipe_tools.comparison.pool import run_all
from recipe_tools.comparison.report import write_report
from recipe_tools.comparison.runner import Run, Runner
from recipe_tools.comparison.scenario import Scenario, load_scenarios
from recipe_tools.comparison.summary import summarise
from recipe_tools.runs import all_cores, file_name


@dataclass
class Options:
    """Which scenarios, and how they are run."""

    config: list[str] = field(metadata={"help": "YAML files of scenarios."})
    scenarios: list[str] = field(default_factory=list, metadata={"help": "Names of those to run; by default all."})
    processes: int = field(default=1, metadata={"help": "Runs at once."})
    threads: int = field(default=0, metadata={"help": "CPU threads per run; 0 shares out the cores."})
    report: bool = field(default=False, metadata={"help": "Only make the tables again."})
    output_dir: str = field(default="outputs/compare", metadata={"help": "Where everything is written."})


def parse(arguments: list[str]) -> tuple[Options, dict[str, Scenario]]:
    """Read and check the command line and the scenarios.

    Args:
        arguments (`list[str]`): Without the program's name.

    Returns:
        `tuple[Options, dict[str, Scenario]]`: The scenarios by name.
    """
    parser, o = parsed(Options, __doc__, arguments)
    if o.processes < 1 or o.threads < 0:
        parser.error("--processes must be at least 1 and --threads at least 0")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("a run is one process: start this without a launcher, and give --processes")
    try:
        found = load_scenarios([Path(file) for file in o.config])
        chosen = {name: found[name] for name in o.scenarios or found}
        for scenario in chosen.values():
            scenario.families()
    except KeyError as error:
        parser.error(f"--scenarios: {error} is not in {', '.join(o.config)}")
    except (OSError, ValueError) as error:
        parser.error(f"--config: {error}")
    return o, chosen


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run what is missing of the grid, and write tables and figures.

    Args:
        arguments (`list[str]`, *optional*): Defaults to the command line.

    Returns:
        `dict[str, Any]`: By scenario what summary.json holds.

    Raises:
        SystemExit: With code 1, after the reports, if a run failed.
    """
    o, scenarios = parse(sys.argv[1:] if arguments is None else arguments)
    console, folder = Console(width=200), Path(o.output_dir)
    runner = Runner(scenarios, folder, o.threads or max(all_cores() // o.processes, 1))
    todo = runner.missing()  # refuses files of other settings before anything is run
    failed: dict[Run, str] = {}
    tried: dict[Run, None] = {}
    while todo and not o.report:
        if o.processes > 1:
            runner.prepare(todo)
        failed |= run_all(runner, todo, o.processes)
        tried |= dict.fromkeys(todo)
        todo = [run for run in runner.missing() if run not in tried]  # what tuning has chosen
    summaries = {}
    for name, scenario in scenarios.items():
        summaries[name] = summarise(scenario, lambda setting, seed, name=name: runner.stored(name, setting, seed))
        write_report(scenario, summaries[name], folder / file_name(name), console)
    console.print(f"Written to {folder}.")
    for run, error in failed.items():
        console.print(f"failed: {run}\n{error}", markup=False, highlight=False)
    if failed:
        console.print(f"{len(failed)} of {len(tried)} runs failed; the same command tries them again.")
        raise SystemExit(1)
    return summaries


if __name__ == "__main__":
    main()
