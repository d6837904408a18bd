"""Belief and adapter travel by way of a Hub: pushed by one process, loaded by another, and what is said on errors."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


sys.path.insert(0, str(Path(__file__).parent))
from server import Hub


WORKER = str(Path(__file__).with_name("worker.py"))
BELIEF = ["belief.safetensors", "belief_config.json"]


def run_worker(task, hub, folder, **environment):
    # huggingface_hub reads its environment when it is imported, hence a process of its own.
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_")) and "proxy" not in k.lower()
    }
    environment = kept | {
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    } | environment  # fmt: skip
    command = [sys.executable, WORKER, task, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return SimpleNamespace(**json.loads((folder / f"{task}.json").read_text()))


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with Hub() as hub:
        pushed = run_worker("push", hub, folder)
        hub.log.clear()
        loaded = run_worker("load", hub, folder)
    offline = run_worker("offline", hub, folder, HF_HUB_OFFLINE="1")
    return SimpleNamespace(hub=hub, push=pushed, load=loaded, offline=offline)


def commits(session, repo, branch="main"):
    return session.hub.repos[repo].branches[branch]


def test_trainer_pushes_adapter_belief_and_card_in_the_end(session):
    last = next(c for c in commits(session, "me/every_save") if c.message == "End of training")
    assert {*BELIEF, "adapter_model.safetensors", "adapter_config.json", "README.md", "kalman_state.json"} <= {
        *last.files
    }
    card = last.files["README.md"].decode()
    assert "It remembers" in card and "datasets:" in card


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_belief_travels_with_every_push_of_a_strategy(session, strategy):
    on_the_way = [c for c in commits(session, f"me/{strategy}") if c.message.startswith("Training in progress")]
    whole = [c for c in on_the_way if not c.message.endswith(", checkpoint")]
    assert whole
    for commit in whole:
        assert {*BELIEF, "kalman_state.json", "adapter_model.safetensors"} <= commit.files.keys()
    if strategy != "every_save":
        folder = "last-checkpoint" if strategy == "checkpoint" else "checkpoint-1"
        checkpoint = next(c for c in on_the_way if c.message.endswith("step 1, checkpoint"))
        assert {f"{folder}/{name}" for name in (*BELIEF, "kalman_state.json")} <= checkpoint.files.keys()


def test_belief_is_one_commit_of_two_files(session):
    (first, pushed) = commits(session, "me/alone")
    assert first.files == {} and pushed.touched == BELIEF
    assert (pushed.sha, pushed.message) == (session.push.result["commit"], session.push.result["message"])
    assert pushed.message == "A belief" and session.hub.repos["me/alone"].private
    assert not session.hub.repos["me/every_save"].private
    assert commits(session, "me/every_save")[-1].touched == [f"kept/{name}" for name in BELIEF]


def test_branches_and_pull_requests_leave_main_alone(session):
    assert session.push.result["pull"].endswith("/me/every_save/discussions/1")
    branches = session.hub.repos["me/every_save"].branches
    assert branches.keys() == {"main", "second", "refs/pr/1"}
    weights = {branches[name][-1].files["belief.safetensors"] for name in branches}
    assert len(weights) == 3
    assert "adapter_model.safetensors" in branches["second"][-1].files  # other files stay


def test_other_process_loads_equal_adapter_and_belief(session):  # logits: asserted in the worker
    assert len(session.load.result) == 8
    assert all(session.load.result.values()), session.load.result


def test_both_files_come_from_one_commit(session):
    weights = [line for line in session.hub.log if line.endswith("/belief.safetensors")]
    assert weights and not [line for line in weights if "/resolve/main/" in line]
    assert any("/resolve/main/belief_config.json" in line for line in session.hub.log)


def test_cache_serves_where_the_hub_is_gone(session):
    assert session.offline.result == {"cached": True}


REFUSALS = [
    ("push", "no token", "HubError", "Could not push the belief to 'me/new': .*401.*hf auth login"),
    ("push", "unknown token", "HubError", "401.*pass `token=`"),
    ("push", "reader", "HubError", "403.*right to write.*this token has no write role"),
    ("push", "other", "HubError", "403.*create_pr=True"),
    ("push", "other's private", "HubError", "403"),
    ("push", "pull request on a branch", "ValueError", "leave out revision='second'"),
    ("push", "no stored token", "HubError", "no token is stored.*hf auth login"),
    ("push", "failed upload", "HubError", "answered 400.*another hash"),
    ("push", "unreachable", "HubError", "cannot be reached.*Connect.*HF_ENDPOINT"),
    ("push", "not finite", "BeliefError", "NaN or Inf"),
    ("load", "private without token", "HubError", "Could not load a belief from 'me/alone'.*401.*HF_TOKEN"),
    ("load", "private for others", "HubError", "404.*check the name, and `token=`"),
    ("load", "no such repository", "HubError", "no such repository"),
    ("load", "no such revision", "HubError", "no revision 'third'"),
    (
        "load",
        "no belief",
        "FileNotFoundError",
        "me/every_save/elsewhere has no belief.safetensors and belief_config.json",
    ),
    ("load", "no id", "FileNotFoundError", "'out/of/nowhere' is neither a folder nor the id of a repository"),
    ("load", "cut in flight", "BeliefError", "cut short on its way"),
    ("load", "bit flipped", "BeliefError", "altered.*force_download=True"),
    ("load", "cut on disk", "BeliefError", "truncated.*force_download=True"),
    ("load", "not cached", "HubError", "local_files_only=True"),
    ("offline", "not cached", "HubError", "HF_HUB_OFFLINE is set, which allows only what the cache has"),
    ("offline", "push", "HubError", "HF_HUB_OFFLINE is set.*save_pretrained"),
    ("offline", "forced", "HubError", "HF_HUB_OFFLINE is set"),
]


@pytest.mark.parametrize(("task", "name", "kind", "message"), REFUSALS)
def test_raises_with_a_remedy(session, task, name, kind, message):
    error = getattr(session, task).errors[name]
    assert error["type"] == kind
    assert re.search(message, error["message"], re.DOTALL), error["message"]
    assert error["causes"] or kind in ("ValueError", "BeliefError")


def test_nothing_else_went_wrong(session):
    raised = {(task, name) for task in ("push", "load", "offline") for name in getattr(session, task).errors}
    assert raised == {row[:2] for row in REFUSALS}
    assert "me/new" not in session.hub.repos
    assert len(commits(session, "me/no-storage")) == 1  # nothing is committed where one file does not arrive
