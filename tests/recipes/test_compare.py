"""The comparison as a grid: what is in it, that no run is repeated or lost, and that its figures add up."""

import json
import random
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import compare as recipe
import numpy as np
import pytest
import torch
import yaml

from recipe_tools.comparison import runner as running
from recipe_tools.comparison.data import ScenarioData
from recipe_tools.comparison.measures import RESAMPLES, front, hypervolume, interval, ratio_interval, second_at, show
from recipe_tools.comparison.metrics import evaluate
from recipe_tools.comparison.pool import run_all
from recipe_tools.comparison.report import write_report
from recipe_tools.comparison.runner import Run, Runner
from recipe_tools.comparison.scenario import Scenario, expand, load_scenarios
from recipe_tools.comparison.summary import figures_of, report_settings, summarise

from . import fake_methods


CONFIGS = sorted(Path(recipe.__file__).with_suffix("").glob("*.yaml"))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(sys.modules, "recipe_tools.methods", None)  # put back afterwards, whatever is installed
    return fake_methods.install()


@pytest.fixture
def scenario(tmp_path, tokenizer, model, monkeypatch):
    """Fields of a scenario over files, with a tiny model."""
    monkeypatch.setenv("KALMAN_PEFT_CACHE", str(tmp_path / "cache"))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question": f"ab {k}", "answer": "ab" * (1 + k % 3)} for k in range(60)]
    (tmp_path / "ab.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [
        {"text": f"{k} general words of which nothing is learnt and which should stay as they are " * 2}
        for k in range(12)
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return {
        "model": str(tmp_path / "model"), "target": str(tmp_path / "ab.jsonl"),
        "source": ["self", str(tmp_path / "text.jsonl")], "sources": ["self", str(tmp_path / "text.jsonl")],
        "methods": [{"lora": {"lr": [0.05, 0.2]}}, {"wise": {"alpha": "0.1/0.3"}}], "seeds": [0, 1], "steps": 3,
        "batch_size": 2, "r": 2, "source_rows": 6, "validation_rows": 2, "eval_items": 3, "source_items": 2,
        "source_length": 24, "max_length": 48, "dtype": "float32", "learning_rate": "1e-2",
    }  # fmt: skip


@pytest.fixture
def arguments(tmp_path, scenario):
    def write(**changes):
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"tiny": scenario | changes}))
        return ["--config", str(tmp_path / "grid.yaml"), "--output_dir", str(tmp_path / "out"), "--threads", "1"]

    return write


def stored(folder):
    return {path.name: json.loads(path.read_text()) for path in sorted((folder / "tiny" / "runs").glob("*.json"))}


def losses(record):
    own = record["kalman_peft"]
    return own["before"], own["after"], own["change"], own["data"], record["run"]


# -- the grid ------------------------------------------------------------------------------------------------------


def test_a_grid_runs_once_and_its_files_hold_what_was_measured(arguments, tmp_path, fake, monkeypatch):
    summaries = recipe.main(arguments())
    records = stored(tmp_path / "out")
    settings = ["lora_lr=0.05", "lora_lr=0.2", "wise_alpha=0.1", "wise_alpha=0.3"]
    assert list(records) == [f"{setting}-s{seed}.json" for setting in settings for seed in (0, 1)]
    record = records["lora_lr=0.2-s1.json"]
    # As PEFT's benchmark has it.
    assert record["train_info"]["status"] == "success" and record["train_info"]["train_time"] == 1.0
    own = record["kalman_peft"]
    rises = [own["after"]["sources"][n]["loss"] - own["before"]["sources"][n]["loss"] for n in own["after"]["sources"]]
    assert record["train_info"]["metrics"][-1]["forgetting"] == pytest.approx(np.mean(rises))
    assert len(rises) == 2 and own["after"]["target"]["kl"] > 0 and own["figures"]["train/loss"] == 0.2
    assert str(tmp_path) not in json.dumps(record["run"]) + json.dumps(own)
    # What a fake method did, measured again by hand.
    (loaded,) = load_scenarios([tmp_path / "grid.yaml"]).values()
    data = ScenarioData(loaded)
    job = running.make_job(data, 1, tmp_path, running._Written(data))
    ((_, trained),) = fake.train("lora:lr=0.2", job)
    assert evaluate(data, trained.model)["sources"]["self"] == pytest.approx(own["after"]["sources"]["self"])
    assert evaluate(data, data.base, tuned=False)["target"] == pytest.approx(own["before"]["target"])
    # Held-out rows are the same for every seed, training rows are not.
    assert all(r["kalman_peft"]["before"] == own["before"] for r in records.values())
    assert data.target(0)[0]["input_ids"] != data.target(1)[0]["input_ids"]
    folder = tmp_path / "out" / "tiny"
    assert {p.name for p in folder.iterdir()} == {"learning_forgetting.png", "report.md", "runs", "summary.json"}
    assert "| lora |" in (folder / "report.md").read_text()
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summaries["tiny"]))

    monkeypatch.setattr(fake, "train", lambda *_: pytest.fail("a run was repeated"))
    assert recipe.main(arguments()) == summaries
    # What only the report depends on may change.
    changed = recipe.main(arguments(seeds=[1], tune_seeds=[0], worst_rise=2, forgetting=["self"]))["tiny"]
    assert changed["settings"]["lora:lr=0.2"]["forgetting"]["mean"] == pytest.approx(rises[0])
    with pytest.raises(ValueError, match=r"other settings.*Choose another --output_dir"):
        recipe.main(arguments(steps=4))


def test_runs_of_another_file_of_the_same_name_are_refused(arguments, tmp_path, fake, monkeypatch):
    recipe.main(arguments())
    text = tmp_path / "text.jsonl"
    was = text.read_text()
    text.write_text(was.replace("general", "special"))
    with pytest.raises(ValueError, match=r"other settings.*Choose another --output_dir"):
        recipe.main(arguments())
    text.write_text(was)  # at another time
    monkeypatch.setattr(fake, "train", lambda *_: pytest.fail("a run was repeated"))
    recipe.main(arguments())


def test_a_killed_grid_goes_on(arguments, tmp_path, fake, monkeypatch):
    done, train = [], fake.train

    def count(method, job):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append((method, job.seed))
        return train(method, job)

    monkeypatch.setattr(fake, "train", count)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(arguments())
    assert len(stored(tmp_path / "out")) == 5  # wise makes two
    partial = recipe.main([*arguments(), "--report"])["tiny"]
    assert partial["missing"].keys() == {"lora:lr=0.2", "wise:alpha=0.1", "wise:alpha=0.3"}
    assert partial["settings"].keys() == {"lora:lr=0.05"} and partial["families"].keys() == {"lora"}
    monkeypatch.setattr(fake, "train", lambda method, job: done.append((method, job.seed)) or train(method, job))
    whole = recipe.main(arguments())["tiny"]
    assert len(done) == len(set(done)) == 6 and not whole["missing"] and len(whole["settings"]) == 4


def test_seeds_of_the_report_run_what_tuning_chose(arguments, tmp_path, fake, monkeypatch):
    done, train = [], fake.train
    monkeypatch.setattr(fake, "train", lambda method, job: done.append((method, job.seed)) or train(method, job))
    given = arguments(
        methods=[{"lora": {"lr": [0.05, 0.2]}}, {"wise": {"alpha": "0.1/0.3"}}], tune_seeds=[9], points=1
    )
    result = recipe.main(given)["tiny"]
    chosen = {name: family["tuned"] for name, family in result["families"].items()}
    assert done[:3] == [("lora:lr=0.05", 9), ("lora:lr=0.2", 9), ("wise:alpha=0.1/0.3", 9)] and not result["missing"]
    assert done[3:] == [(method, seed) for seed in (0, 1) for method in (chosen["lora"], "wise:alpha=0.1/0.3")]
    assert list(result["settings"]) == list(chosen.values())  # the other of wise is there, and not reported
    assert all(family["settings"] == [family["tuned"]] for family in result["families"].values())
    # Without all runs of tuning nothing can be chosen.
    (tmp_path / "out" / "tiny" / "runs" / "lora_lr=0.2-s9.json").unlink()
    partial = recipe.main([*given, "--report"])["tiny"]
    assert partial["missing"] == {"lora:lr=0.2": [9]} and list(partial["families"]) == ["wise"]
    assert recipe.main(given)["tiny"] == result and len(done) == 8


def test_a_run_that_fails_leaves_the_others(arguments, tmp_path, fake, capsys):
    with pytest.raises(SystemExit) as exit:
        recipe.main(arguments(methods=["broken", "lora"], seeds=[0]))
    assert exit.value.code == 1 and list(stored(tmp_path / "out")) == ["lora-s0.json"]
    said = capsys.readouterr().out
    assert "failed: tiny, broken, seed 0" in said and "this method [never] works" in said
    assert "- broken: seeds 0" in (tmp_path / "out" / "tiny" / "report.md").read_text()


def test_two_processes_write_the_same_files_as_one(arguments, tmp_path, fake, monkeypatch):
    recipe.main(arguments())
    (scenarios, other) = load_scenarios([tmp_path / "grid.yaml"]), tmp_path / "other"
    runner = Runner(scenarios, other, threads=1)
    monkeypatch.setenv("KALMAN_PEFT_CACHE", str(tmp_path / "cold"))
    runner.prepare(runner.missing())
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "cold").rglob("*")}
    assert run_all(fake_methods.Faked(runner), runner.missing(), processes=2) == {}
    ours, theirs = stored(tmp_path / "out"), stored(other)
    assert ours.keys() == theirs.keys() and len(ours) == 8
    assert all(losses(ours[name]) == losses(theirs[name]) for name in ours)
    assert cached and cached == {path: path.stat().st_mtime_ns for path in (tmp_path / "cold").rglob("*")}


def test_a_process_that_dies_leaves_the_others(tmp_path):
    items = [(tmp_path, number) for number in range(7)]
    failed = run_all(fake_methods.misbehave, items, processes=2)
    assert {number for _, number in failed} == {1, 3, 4, 5} and "code 3" in failed[(tmp_path, 4)]
    assert "RuntimeError: no 5" in failed[(tmp_path, 5)]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "2", "6"}


def test_rows_written_earlier_cost_what_they_cost(scenario, fake, monkeypatch):
    data = ScenarioData(Scenario(name="tiny", **scenario | {"learning_rate": 1e-2}))
    monkeypatch.setattr(data, "self_source", lambda part, rows: (list(range(rows)), 100.0))
    written = running._Written(data)
    assert written(4) == [0, 1, 2, 3] and 99 < written.hidden_seconds <= 100


def test_what_the_model_writes_is_kept_and_parts_share_nothing(scenario):
    data = ScenarioData(Scenario(name="tiny", **scenario | {"learning_rate": 1e-2}))
    first, seconds = data.self_source("fit", 6)
    again, third = data.self_source("fit", 2)
    assert first[:2] == again[:] and seconds == pytest.approx(3 * third) and len(first[0]["input_ids"]) == 24
    assert seconds > 0
    seen = set(map(tuple, first["input_ids"]))
    assert len(data.kept["self"]) == 2 and not seen & set(map(tuple, data.kept["self"]["input_ids"]))
    # Half of the source is the model's own, half the text, whose held-out half is measured.
    own = [tuple(ids) in seen for ids in data.source(3)["input_ids"]]
    assert sum(own) == 3 and len(own) == 6
    text = set(map(tuple, data.source(3)["input_ids"])) - seen
    assert not text & set(map(tuple, data.kept["text"]["input_ids"]))


def test_raises_when_data_do_not_suffice(scenario):
    few = ScenarioData(Scenario(name="tiny", **scenario | {"learning_rate": 1e-2, "source_rows": 40}))
    with pytest.raises(ValueError, match=r"text\.jsonl' has 6 rows, of 20; give fewer source_rows"):
        few.source(0)
    with pytest.raises(ValueError, match="41 rows by the model itself are more than source_rows=40"):
        few.self_source("fit", 41)
    few = ScenarioData(Scenario(name="tiny", **scenario | {"learning_rate": 1e-2, "validation_rows": 60}))
    with pytest.raises(ValueError, match="none is left to train on"):
        few.target(0)


# -- scenarios -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry, name, settings",
    [
        ("lora", "lora", ["lora"]),
        ({"ewc": {"strength": [1, 1e-3], "lr": ["1e-3", 2e-3], "samples": 8}}, "ewc:samples=8", [
            "ewc:strength=1,lr=1e-3,samples=8", "ewc:strength=1,lr=0.002,samples=8",
            "ewc:strength=0.001,lr=1e-3,samples=8", "ewc:strength=0.001,lr=0.002,samples=8",
        ]),
        ({"laplace:form=proximal": {"strength": [3]}}, "laplace:form=proximal", ["laplace:form=proximal,strength=3"]),
        ({"wise": {"alpha": "0.1/0.5"}}, "wise", ["wise:alpha=0.1/0.5"]),
        ({"wise": {"label": "WiSE-FT", "lr": 1e-3}}, "WiSE-FT", ["wise:lr=0.001"]),
    ],
)  # fmt: skip
def test_lists_are_tried_in_all_combinations(entry, name, settings):
    assert expand(entry, "x") == (name, settings)


def make(**changes):
    return Scenario(**{"name": "x", "target": "caesar_cipher", "methods": ["lora"]} | changes)


def test_settings_of_several_points_count_each(fake):
    found = make(methods=[{"lora": {"lr": [1, 2]}}, {"wise": {"alpha": "0.1/0.3"}}], tune_seeds=[9]).families()
    assert found["wise"] == {"wise:alpha=0.1": "wise:alpha=0.1/0.3", "wise:alpha=0.3": "wise:alpha=0.1/0.3"}
    drawn = make(methods=[{"lora": {"lr": list(range(9))}}, {"other": {"lr": list(range(3))}}], trials=3).families()
    again = make(methods=[{"other": {"lr": list(range(3))}}, {"lora": {"lr": list(range(9))}}], trials=3).families()
    assert list(map(len, drawn.values())) == [3, 3] and drawn == again


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stpes": 3}, "unknown key stpes; known are target"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": "many"}, "steps must be a whole number, got 'many'"),
        ({"seeds": ["a"]}, "seeds must be a whole number, got 'a'"),
        ({"choices": ["hellaswag"]}, "choices must be names with numbers of items"),
        ({"choices": {"hellaswag": 0}}, "at least 1 item"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"points": 0, "tune_seeds": [7]}, "points must be at least 1"),
        ({"points": 2}, "points chooses settings on tune_seeds, of which there are none"),
        ({"validation_rows": -1}, "must not be negative"),
        ({"source_length": 1}, "source_length must be at least 2"),
        ({"seeds": []}, "at least one entry"),
        ({"seeds": [0, 0]}, "anything twice"),
        ({"sources": ["a/x.jsonl", "b/x.txt"]}, "one short name"),
        ({"tune_seeds": [0]}, r"share \[0\]"),
        ({"forgetting": ["chat"]}, r"forgetting names \['chat'\]"),
        ({"dtype": "int8"}, "neither bfloat16 nor float32"),
        ({"worst_rise": 0}, "must be above 0"),
        ({"matched": [1.5]}, r"shares in \(0, 1\]"),
        ({"methods": [{"lora": 3}]}, "neither a name nor"),
        ({"methods": [{"lora": {"lr": []}}]}, "lr has no values"),
        ({"methods": [{"lora": {"label": 3}}]}, "label must be text"),
        ({"methods": ["lora", {"lora": {"lr": [1]}}]}, "two entries of methods are named 'lora'"),
        ({"methods": ["lion"]}, "methods: 'lion': the kind is none of"),
        ({"methods": ["other"]}, r"reference 'lora' is none of the methods \['other'\]"),
        ({"methods": [{"lora": {"lr": [1, 2]}}, "other"], "tune_seeds": [7]}, r"these have \{'lora': 2, 'other': 1\}"),
        ({"methods": [{"lora": {"lr": [1, 2]}}, "other"], "trials": 2}, r"trials=2: \{'other': 1\}"),
    ],
)
def test_raises_when_a_scenario_makes_no_sense(changes, message, tmp_path, fake, capsys):
    values = {"target": "caesar_cipher", "methods": ["lora"]} | changes
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"x": values}))
    with pytest.raises(SystemExit):
        recipe.parse(["--config", str(tmp_path / "x.yaml")])
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(message, said) and "x" in said


@pytest.mark.parametrize(
    "content, message",
    [("- a", "must be a mapping"), ("x: {target: a}", "methods must be given"), ("x: 3", "must be a mapping")],
)
def test_raises_when_a_file_is_no_scenario(content, message, tmp_path):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_scenarios([tmp_path / "x.yaml"])


def test_raises_when_scenarios_cannot_be_told_apart(tmp_path, fake, capsys):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"x": {"target": "caesar_cipher", "methods": ["lora"]}}))
    with pytest.raises(ValueError, match="two scenarios named 'x'"):
        load_scenarios([tmp_path / "x.yaml"] * 2)
    for wrong in (["--scenarios", "y"], ["--processes", "0"]):
        with pytest.raises(SystemExit):
            recipe.parse(["--config", str(tmp_path / "x.yaml"), *wrong])
    assert "'y' is not in" in capsys.readouterr().err


def test_raises_under_a_launcher(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        recipe.parse(["--config", "x.yaml"])
    assert "without a launcher" in capsys.readouterr().err


# -- figures -------------------------------------------------------------------------------------------------------


def dominated_cells(points, corner):
    """Area by brute force: cells of the grid of all coordinates, each counted if some point is below its corner."""
    xs = sorted({p[0] for p in points if p[0] < corner[0]} | {corner[0]})
    ys = sorted({p[1] for p in points if p[1] < corner[1]} | {corner[1]})
    total = 0.0
    for x, next_x in pairwise(xs):
        for y, next_y in pairwise(ys):
            total += (next_x - x) * (next_y - y) * any(p[0] <= x and p[1] <= y for p in points)
    return total


@pytest.mark.parametrize("seed", range(8))
def test_hypervolume_equals_brute_force(seed):
    draw = random.Random(seed)
    points = [(draw.randint(-5, 9) / 4, draw.randint(-5, 9) / 4) for _ in range(draw.randint(1, 14))]
    corner = (1.5, 1.25)
    assert hypervolume(points, corner) == pytest.approx(dominated_cells(points, corner))
    inside = np.random.default_rng(seed).uniform((-1.25, -1.25), corner, (20_000, 2))
    share = np.mean([any(p[0] <= x and p[1] <= y for p in points) for x, y in inside[:4000]])
    assert hypervolume(points, corner) == pytest.approx(share * 2.75 * 2.5, abs=0.25)
    best = {
        i for i, p in enumerate(points)
        if not any((q != p and q[0] <= p[0] and q[1] <= p[1]) or (q == p and j < i) for j, q in enumerate(points))
    }  # fmt: skip
    found = front([*points, (float("nan"), -9.0), (-9.0, float("inf"))])
    assert set(found) == best and [points[i][0] for i in found] == sorted(points[i][0] for i in found)


def test_forgetting_is_read_off_the_front_between_its_points():
    points = [(3.0, 0.1), (2.0, 0.5), (2.5, 0.9), (5.0, -1.0)]  # the third is dominated, the last worse than the start
    assert second_at(points, (4.0, 0.0), 3.5) == pytest.approx(0.05)
    assert second_at(points, (4.0, 0.0), 2.25) == pytest.approx(0.4)
    assert second_at(points, (4.0, 0.0), 3.0) == pytest.approx(0.1)
    assert second_at(points, (4.0, 0.0), 1.9) is None and second_at([], (4.0, 0.0), 3.0) is None


def test_intervals_are_those_of_resampled_means_and_always_the_same():
    values = [1.0, 2.0, 4.0]
    means = np.random.default_rng(0).choice(values, (RESAMPLES, 3)).mean(1)
    found = interval(values)
    assert found == interval(values) and found["mean"] == pytest.approx(7 / 3)
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(means, (0.025, 0.975)).tolist(), abs=0.02)
    assert interval([3.0]) == {"mean": 3.0, "low": None, "high": None}
    assert interval([3.0, float("inf")])["mean"] is interval([])["mean"] is None
    ratio = ratio_interval([1.0, 2.0, 6.0], [2.0, 4.0, 12.0])  # the same ratio for every seed
    assert ratio == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert ratio_interval([1.0, 2.0], [3.0, -1.0]) == {"mean": 1.5, "low": None, "high": None}
    assert ratio_interval([1.0, 2.0], [3.0, -4.0])["mean"] is None
    assert (show(found, ".1f"), show(interval([]), ".1f"), show(interval([3.0]), "+.1f")) == (
        f"2.3 [{found['low']:.1f}, {found['high']:.1f}]", "–", "+3.0",
    )  # fmt: skip


def a_record(target, wiki, math, lost=0):
    """Of a run whose base model has losses 4, 1 and 2."""
    right = [True] * 4
    return {
        "kalman_peft": {
            "before": {
                "target": {"loss": 4.0}, "sources": {"wiki": {"loss": 1.0}, "math": {"loss": 2.0}},
                "choices": {"arc": {"accuracy": 1.0, "items": 4}},
            },
            "after": {
                "target": {"loss": target, "kl": 0.3},
                "sources": {"wiki": {"loss": wiki, "kl": 0.1}, "math": {"loss": math, "kl": 0.3}},
                "choices": {"arc": {"accuracy": 1 - lost / 4, "correct": right}},
            },
            "change": {"choices": {"arc": {"accuracy": -lost / 4, "flips": {"lost": lost, "won": 0}}}},
            "seconds": 2.0, "setup_seconds": 1.0, "peak_bytes": 2**20, "extra_bytes": 2**19,
        }
    }  # fmt: skip


def test_the_report_is_what_a_hand_computes(fake, tmp_path, capsys):
    given = make(
        methods=[{"lora": {"lr": [1, 2]}}, {"other": {"lr": [1, 2]}}], seeds=[0, 1], tune_seeds=[5], worst_rise=1.0,
        sources=["wiki", "math"], matched=[0.5], choices={"arc": 4},
    )  # fmt: skip
    # Target loss, and losses of wiki and math, whose mean rise is forgetting.
    runs = {
        ("lora:lr=1", 5): (3.5, 1.0, 2.0), ("lora:lr=2", 5): (3.0, 1.2, 2.2),
        ("other:lr=1", 5): (3.4, 1.0, 2.2), ("other:lr=2", 5): (3.4, 1.0, 2.0),
        ("lora:lr=1", 0): (3.0, 1.0, 2.2), ("lora:lr=2", 0): (2.0, 1.4, 2.4),  # forgetting .1, .4
        ("lora:lr=1", 1): (3.5, 1.0, 2.2), ("lora:lr=2", 1): (3.0, 1.4, 2.8),  # .1, .6
        ("other:lr=1", 0): (2.0, 1.1, 2.3), ("other:lr=2", 0): (3.0, 1.0, 2.0),  # .2, 0
        ("other:lr=1", 1): (3.0, 1.1, 2.1), ("other:lr=2", 1): (3.8, 1.0, 2.0),  # .1, 0
    }  # fmt: skip
    records = {key: a_record(*values, lost=key[1]) for key, values in runs.items()}
    result = summarise(given, lambda setting, seed: records.get((setting, seed)))
    lora, other = result["families"]["lora"], result["families"]["other"]
    assert (lora["tuned"], other["tuned"]) == ("lora:lr=2", "other:lr=2")  # 3.2 < 3.5, 3.4 < 3.5
    assert result["settings"]["lora:lr=2"]["target_loss"]["mean"] == pytest.approx(2.5)
    assert result["settings"]["lora:lr=2"]["forgetting"]["mean"] == pytest.approx(0.5)
    assert result["settings"]["lora:lr=2"]["rise/wiki"]["mean"] == pytest.approx(0.4)
    assert result["settings"]["lora:lr=2"]["lost/arc"]["mean"] == 0.5
    assert other["target_loss_minus_reference"]["mean"] == pytest.approx(0.9)  # 1 and .8
    assert other["forgetting_minus_reference"]["mean"] == pytest.approx(-0.5)
    # Corner (4, 1): seed 0: 1 * .9 + 1 * .6; seed 1: .5 * .9 + .5 * .4. The other's: 1 + .8, and .2 + .8 * .9.
    assert lora["hypervolume"]["mean"] == pytest.approx((1.5 + 0.65) / 2)
    assert other["hypervolume"]["mean"] == pytest.approx((1.8 + 0.92) / 2)
    assert other["hypervolume_minus_reference"]["mean"] == pytest.approx((0.3 + 0.27) / 2)
    # Half of lora's learning: levels 3 and 3.5, where lora has .1 and .1, the other 0 and 3/8 of .1.
    assert lora["matched"]["0.5"]["ratio"]["mean"] == 1.0 and "hypervolume_minus_reference" not in lora
    assert other["matched"]["0.5"] == {
        "seeds": 2, "forgetting": pytest.approx(interval([0.0, 0.0375])), "ratio": pytest.approx(ratio_interval([0.0, 0.0375], [0.1, 0.1])),
    }  # fmt: skip
    write_report(given, result, tmp_path, recipe.Console(width=250))
    text = (tmp_path / "report.md").read_text()
    assert "| lora | lora:lr=2 | 2.500 [2.000, 3.000] | +0.500 [+0.400, +0.600] |" in text
    assert "chosen on seeds [5]" in text and "-0.125 [-0.250, +0.000] | 0.5 [0.0, 1.0] / 0.0 [0.0, 0.0]" in text
    assert (tmp_path / "learning_forgetting.png").read_bytes().startswith(b"\x89PNG")
    assert result == summarise(given, lambda setting, seed: records.get((setting, seed)))

    # A setting without one of its seeds does not count, and neither does one that diverged.
    del records["lora:lr=2", 0]
    records["other:lr=2", 5] = a_record(float("nan"), 1.0, 2.0)
    result = summarise(given, lambda setting, seed: records.get((setting, seed)))
    assert result["missing"] == {"lora:lr=2": [0]} and result["families"]["lora"]["settings"] == ["lora:lr=1"]
    assert result["families"]["lora"]["tuned"] == "lora:lr=1" and result["families"]["other"]["tuned"] == "other:lr=1"
    records["other:lr=1", 1] = a_record(float("nan"), 1.0, float("inf"))
    result = summarise(given, lambda setting, seed: records.get((setting, seed)))
    write_report(given, result, tmp_path, recipe.Console(width=250))
    assert "| other | other:lr=1 | – | – |" in (tmp_path / "report.md").read_text()
    assert summarise(given, lambda *_: None)["families"] == {}


def test_the_rank_that_is_used_is_shown_where_all_records_know_it(tmp_path):
    given = make(methods=[{"lora": {"lr": [1, 2]}}], seeds=[0, 1], sources=["wiki", "math"], choices={"arc": 4})
    records = {(f"lora:lr={rate}", seed): a_record(3.0, 1.1, 2.1) for rate in (1, 2) for seed in (0, 1)}
    for (setting, seed), record in records.items():
        if setting == "lora:lr=1" or seed == 0:  # the other record is of an earlier version
            record["kalman_peft"]["figures"] = {"rank/effective": 2.5 + seed, "train/loss": 1.0}
    result = summarise(given, lambda setting, seed: records.get((setting, seed)))
    assert result["settings"]["lora:lr=1"]["rank"]["mean"] == pytest.approx(3.0)
    assert "rank" not in result["settings"]["lora:lr=2"]
    write_report(given, result, tmp_path, recipe.Console(width=250))
    text = (tmp_path / "report.md").read_text()
    assert "| rank used |" in text and "| 3.00 [2.50, 3.50] |" in text


def test_the_points_that_run_are_those_of_the_largest_hypervolume():
    given = make(methods=["lora"], tune_seeds=[5, 6], points=3, sources=["wiki", "math"])
    places = {  # target loss and forgetting, base model (4, 0), corner (4, .5)
        "best": (3.0, 0.1), "far": (2.8, 0.45), "near": (3.6, 0.0), "dominated": (3.05, 0.12), "beyond": (2.0, 2.0),
    }  # fmt: skip
    records = {name: a_record(loss, 1 + rise, 2 + rise) for name, (loss, rise) in places.items()}
    records["diverged"] = a_record(float("nan"), 1.0, 2.0)
    # The best adds 1 * .4; then near .4 * .1, and far .2 * .05.
    assert report_settings(given, list(records), lambda name, _: records[name]) == ["best", "far", "near"]
    fewer = replace(given, points=2)
    assert report_settings(fewer, list(records), lambda name, _: records[name]) == ["best", "near"]
    all_of_them = report_settings(replace(given, points=9), list(records), lambda name, _: records[name])
    assert all_of_them == list(places)
    missing = {("best", 6)}
    assert report_settings(given, list(records), lambda *key: None if key in missing else records[key[0]]) is None
    assert report_settings(replace(given, points=None), ["a", "b"], lambda *_: None) == ["a", "b"]


def test_without_tuning_seeds_the_best_is_chosen_in_hindsight(fake):
    given = make(methods=[{"lora": {"lr": [1, 2]}}, "other"], seeds=[0], sources=["wiki", "math"])
    records = {
        "lora:lr=1": a_record(3.0, 1.0, 2.0),
        "lora:lr=2": a_record(2.0, 3.0, 4.0),
        "other": a_record(3.0, 1, 2),
    }
    result = summarise(given, lambda setting, _: records[setting])
    assert result["in_hindsight"] and result["families"]["lora"]["tuned"] == "lora:lr=1"
    assert result["families"]["lora"]["front"] == ["lora:lr=2", "lora:lr=1"]
    # The reference forgets nothing there: there is no ratio.
    assert result["families"]["other"]["matched"]["0.5"]["ratio"]["mean"] is None


def test_forgetting_is_of_the_sources_that_are_named():
    record = a_record(3.0, 1.1, 2.5)
    assert figures_of(record, ["wiki", "math"])["forgetting"] == pytest.approx(0.3)
    assert figures_of(record, ["math"])["forgetting"] == pytest.approx(0.5)
    assert figures_of(record, ["math"])["kl"] == 0.3


def test_runs_are_told_by_their_names():
    assert str(Run("far", "lora:lr=1", 3)) == "far, lora:lr=1, seed 3"


# -- with the methods ----------------------------------------------------------------------------------------------


def test_real_methods_run_in_the_grid(arguments, tmp_path):
    pytest.importorskip("recipe_tools.methods")
    methods = ["lora", {"wise": {"alpha": "0/0.5"}}, {"init": {"weights": "pissa"}}, {"laplace": {"samples": 4}}]
    summary = recipe.main(arguments(methods=methods, seeds=[0]))["tiny"]["settings"]
    assert summary["wise:alpha=0"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert 0 < summary["wise:alpha=0.5"]["kl"]["mean"] < summary["lora"]["kl"]["mean"]
    # Its adapter cannot be switched off to find the base model: KL is to the base model all the same.
    assert summary["init:weights=pissa"]["kl"]["mean"] > 0 and len(stored(tmp_path / "out")) == 5
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_the_scenarios_that_come_with_it_are_read(file):
    pytest.importorskip("recipe_tools.methods")
    for scenario in load_scenarios([file]).values():
        families = scenario.families()
        assert scenario.reference in families
        assert not scenario.tune_seeds or len({len(settings) for settings in families.values()}) == 1
