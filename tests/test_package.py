"""The package as a user meets it."""

import json
import subprocess
import sys

import kalman_peft


def test_import_is_lazy():
    code = "import sys, json, kalman_peft; print(json.dumps([m in sys.modules for m in ('torch', 'transformers', 'peft', 'trl')]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False] * 4


def test_public_names_resolve_and_unknown_ones_do_not():
    for name in kalman_peft.__all__:
        assert getattr(kalman_peft, name) is not None
    assert set(kalman_peft.__all__) <= set(dir(kalman_peft))
    assert not hasattr(kalman_peft, "nonsense")


def test_package_data_is_there():
    from importlib.resources import files

    assert (files("kalman_peft") / "model_card_template.md").is_file()
    assert (files("kalman_peft") / "py.typed").is_file()


def test_the_command_line_is_installed():
    import tomllib
    from importlib.metadata import EntryPoint
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    value = project["scripts"]["kalman-peft"]
    assert EntryPoint("kalman-peft", value, "console_scripts").load() is kalman_peft.cli.main
