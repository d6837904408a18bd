"""Two gloo processes give the single-process answer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


WORKER = str(Path(__file__).with_name("worker.py"))
TASKS = "curvature,sharded,adamw,adamw_accumulated,budget,loko,loko_accumulated,sources,evidence,written"
EXACT = ("curvature", "sharded", "loko", "loko_accumulated", "filters", "filters_accumulated", "skipped")
TASKS += ",ima,filters,filters_accumulated,skipped,continual"


def launch(tasks, out, processes):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*command, WORKER, tasks, str(out)], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    tasks = TASKS + ",failure,failure_sharded,loko_draws,loko_failures,trainer_failure"
    tasks += ",continual_delayed,continual_refused"
    launch(tasks, out, 2)
    launch(TASKS, out, 1)

    def read(task, size, rank):
        result = torch.load(out / f"{task}-{size}-{rank}.pt")
        assert result.pop("world_size") == size
        return result

    return read


@pytest.mark.parametrize("task", TASKS.split(","))
def test_two_processes_equal_one(results, task):
    one, first, second = results(task, 1, 0), results(task, 2, 0), results(task, 2, 1)
    assert one.keys() == first.keys()
    tolerances = {"rtol": 1e-8, "atol": 1e-10} if task in EXACT else {"rtol": 2e-4, "atol": 2e-6}
    for key, value in one.items():
        tolerance = (
            {"rtol": 2e-6, "atol": 1e-6} if task in EXACT and key == "losses" else tolerances
        )  # logged in float32
        torch.testing.assert_close(first[key], value, **tolerance, msg=lambda m, k=key: f"{k}: {m}")
        if key != "losses":
            torch.testing.assert_close(second[key], first[key], rtol=0, atol=0)


def test_filters_of_all_processes_stay_identical(results):
    first, second = results("loko_draws", 2, 0), results("loko_draws", 2, 1)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("task", ["failure", "failure_sharded"])
def test_a_failure_on_one_process_is_raised_on_all(results, task):
    messages = []
    for rank in (0, 1):
        result = results(task, 2, rank)
        assert result["raised"] == 1
        messages.append(bytes(int(b) for b in result["message"]).decode())
    assert "another process" in messages[0] and "outside the 17 classes" in messages[1]


def test_what_fails_in_observe_is_raised_by_step_on_all_processes(results):
    """A bad label, in either half of an accumulated batch, at steps with and without columns; training goes on after."""
    first, second = results("loko_failures", 2, 0), results("loko_failures", 2, 1)
    messages = [bytes(r.pop("messages").tolist()).decode().splitlines() for r in (first, second)]
    assert len(messages[0]) == len(messages[1]) == 7
    for other, own in zip(*messages, strict=True):
        assert own.startswith("ValueError: Labels range over")
        assert other.startswith("RuntimeError: process 1 failed with ValueError: Labels range over")
    assert first.pop("unchanged") == second.pop("unchanged") == 1
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_a_bad_row_ends_training_on_all_processes(results):
    messages = sorted(bytes(results("trainer_failure", 2, rank)["messages"].tolist()).decode() for rank in (0, 1))
    assert messages[0].startswith("RuntimeError: process ")
    assert messages[1].startswith("ValueError: Labels range over [") and messages[0].endswith(messages[1])


def test_a_late_process_takes_the_same_branches_as_the_first(results):
    first, second = results("continual_delayed", 2, 0), results("continual_delayed", 2, 1)
    assert first["halted"] == second["halted"] == 1 and first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_what_a_learner_refuses_is_raised_on_all_processes(results):
    first, second = (bytes(results("continual_refused", 2, rank)["message"].tolist()).decode() for rank in (0, 1))
    assert "has initial/ or tasks/, but no continual.json" in first
    assert second == f"RuntimeError: process 0 failed with {first}"
