"""A learner travels by way of a Hub: another user goes on from it and gets what its first user would have got."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


sys.path.insert(0, str(Path(__file__).parent))
from server import Hub


WORKER = str(Path(__file__).with_name("learner_worker.py"))


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder, results = tmp_path_factory.mktemp("hub"), {}
    with Hub() as hub:
        for task in ("push", "load"):
            kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
            kept = {k: v for k, v in kept.items() if "proxy" not in k.lower()} | {
                "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
                "HF_HOME": str(folder / task), "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
            }  # fmt: skip
            done = subprocess.run(
                [sys.executable, WORKER, task, str(folder)], env=kept, capture_output=True, text=True, timeout=300,
                check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-4000:]
            results[task] = json.loads((folder / f"{task}.json").read_text())
    return SimpleNamespace(hub=hub, **results)


def test_tasks_are_one_commit_with_the_newest_at_the_root(session):
    repo = session.hub.repos["me/tasks"]
    first, pushed = repo.branches["main"]
    assert first.files == {} and (pushed.sha, pushed.message) == (session.push["commit"], "Upload 2 tasks")
    assert repo.private and repo.branches["second"][-1].message == "Again"
    folders = ("initial", "tasks/000-a", "tasks/001-b", "smoothed/a", "smoothed/b")
    parts = [f"{folder}/{name}" for folder in folders for name in ("adapter_model.safetensors", "belief.safetensors")]
    assert {*parts, "continual.json", "tasks/000-a/task_record.safetensors", "tasks/001-b/task.json"} <= {
        *pushed.files
    }
    for name in ("adapter_model.safetensors", "adapter_config.json", "belief.safetensors", "belief_config.json"):
        assert pushed.files[name] == pushed.files[f"tasks/001-b/{name}"]
    assert not [name for name in pushed.files if name.startswith("work")]


def test_second_user_goes_on_as_the_first_would_have(session):
    assert session.load["same"] and session.load["lineage"] == ["a", "b"]


def test_plain_peft_loads_the_newest_and_smoothed_adapters(session):
    assert session.load["newest"] and session.load["smoothed"]


def test_a_second_push_leaves_nothing_of_the_first(session):
    files = session.hub.repos["me/again"].branches["main"][-1].files
    assert {name.rsplit("/", 1)[0] for name in files if "/" in name} == {"initial", "tasks/000-x"}
    assert "noise.safetensors" in files and session.load["again"] == [["x"], 8.0]


def test_refusals_say_what_to_do(session):
    assert "HubError: Could not push the learner to 'me/tasks'" in session.push["refused"]
    assert "HubError: Could not load a learner from 'me/tasks'" in session.load["refused"]
    assert "401" in session.load["refused"]
