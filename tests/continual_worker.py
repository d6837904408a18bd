"""Learners that are killed (SIGKILL) and go on, in forks of one process: `continual_worker.py FOLDER`, see
test_continual_resume.py.

Everything that touches a file, and every optimizer step, is an event; a run is killed at the n-th.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from learning import EVALS, TASKS, contents, learner, model, ramps, stream
from transformers import TrainerCallback

from kalman_peft import DriftCallback, belief
from kalman_peft.continual import runs, store
from kalman_peft.filtering import records


FOLDER = Path(sys.argv[1])
KINDS = {
    "diagonal": ({"structure": "diagonal"}, {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}),
    "low_rank": ({"structure": "low_rank", "rank": 2, "decay": 0.9}, {"save_strategy": "no"}),
    "loko": ({}, {"optimizer": "loko", "loko_memory": "diagonal", "loko_averaging": True, "save_strategy": "steps",
                  "save_steps": 3}),
    "stream": ({}, {"optimizer": "loko", "loko_memory": "diagonal", "loko_curvature_every": 1, "save_strategy": "steps",
                    "save_steps": 10, "loko_num_columns": 4, "logging_steps": 50}),
}  # fmt: skip


class Events(TrainerCallback):
    """Counts events of this process, and kills it at one of them."""

    def __init__(self, fatal=None):
        self.seen, self.fatal = [], fatal

    def __deepcopy__(self, memo):
        return self

    def happen(self, what):
        self.seen.append(what)
        if len(self.seen) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, **kwargs):
        self.happen("step")

    def before(self, what, function):
        def call(*args, **kwargs):
            self.happen(what)
            return function(*args, **kwargs)

        return call

    def watch(self):
        os.replace = self.before("replace", os.replace)
        Path.rename = self.before("rename", Path.rename)
        store.shutil.rmtree = self.before("rmtree", store.shutil.rmtree)
        torch.save = self.before("torch.save", torch.save)
        for module in (belief, records):
            module.save_file = self.before("save_file", module.save_file)
        runs.estimate_curvature = self.before("curvature", runs.estimate_curvature)


def play(kind, folder, events):
    options, configured = KINDS[kind]
    made = model(r=4, target_modules="all-linear") if kind == "stream" else model()
    made = learner(folder, made=made, configured=configured, callbacks=[events], **options)
    if kind == "stream":
        made.learn_stream("s", stream(ramps(240, 1, 0), ramps(80, 5, 1)), DriftCallback(2.0, action="stop", window=4))
    else:
        made.eval_datasets = dict(EVALS)
        for name in ("a", "b"):
            made.learn(name, TASKS[name])


def fork(kind, folder, fatal=None):
    """Run in a fork; the events it saw, or None if it was killed."""
    report = FOLDER / "report.json"
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            events = Events(fatal)
            events.watch()
            play(kind, folder, events)
            events.fatal = None
            report.write_text(json.dumps(events.seen))
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert os.WEXITSTATUS(status) == 0, f"{kind}, killed at {fatal}"
    return json.loads(report.read_text())


def main():
    result = {}
    for kind, points in (("diagonal", 8), ("low_rank", 5), ("loko", 6), ("stream", 3)):
        reference = FOLDER / kind / "whole"
        seen = fork(kind, reference)
        expected, wrong, killed = contents(reference), [], 0
        # Spread over the run; and after the last checkpoint, before the mode is in its place.
        spread = {1 + (2 * i + 1) * len(seen) // (2 * points) for i in range(points)}
        trained = max(place for place, event in enumerate(seen, 1) if event in ("step", "torch.save"))
        for fatal in sorted(spread | {trained + 2}):
            folder = FOLDER / kind / f"killed-{fatal}"
            killed += fork(kind, folder, fatal) is None
            assert fork(kind, folder) is not None
            if contents(folder) != expected:
                wrong.append([fatal, seen[fatal - 1]])
        # Killed again and again; each time it gets a little further.
        folder, times = FOLDER / kind / "again", 0
        while fork(kind, folder, len(seen) // 3) is None:
            times += 1
            assert times < 20
        result[kind] = {
            "killed": killed, "wrong": wrong, "times": times, "again": contents(folder) == expected,
            "kinds": sorted(set(seen)), "events": len(seen), "tasks": len(list((reference / "tasks").iterdir())),
            "work": [str(path) for path in (reference / "work").rglob("*")],
        }  # fmt: skip
    (FOLDER / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
