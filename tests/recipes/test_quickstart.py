"""The two-minute script, in seconds."""

import subprocess
import sys
from pathlib import Path


def test_quickstart_runs_and_draws(tmp_path):
    script = Path(__file__).parents[2] / "recipes" / "quickstart.py"
    done = subprocess.run(
        [sys.executable, script, "--pretraining_steps", "3", "--steps", "2", "--output_dir", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[:22].strip() for line in lines[:3]] == [
        "LoRA + AdamW", "with a belief (LaLoRA)", "LoKO with the belief",
    ]  # fmt: skip
    before = {line[22:].split("->")[0] for line in lines[:3]}
    assert len(before) == 1  # all three start from the same loss
    assert (tmp_path / "quickstart.png").read_bytes()[:4] == b"\x89PNG"
