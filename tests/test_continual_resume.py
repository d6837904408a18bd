"""A learner that is killed at any point and started again leaves the same bytes as one that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "continual_worker.py"), str(folder)],
        env=environment, capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("kind", ["diagonal", "low_rank", "loko", "stream"])
def test_a_kill_at_any_point_changes_nothing(result, kind):
    found = result[kind]
    assert found["killed"] >= 4 and found["tasks"] == 2
    assert found["wrong"] == []
    assert found["times"] >= 2 and found["again"]
    assert {"step", "replace", "rename", "save_file"} <= set(found["kinds"])
    assert ("curvature" in found["kinds"]) == (kind in ("diagonal", "low_rank"))
    assert found["work"] == []
