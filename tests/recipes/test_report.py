import json

import pytest
from peft import LoraConfig
from rich.console import Console

from recipe_tools import plots
from recipe_tools.plots import Curve, PlanePoint, plot_curves, plot_plane
from recipe_tools.report import flips, results_json, write_json
from recipe_tools.tables import markdown_table, table


BEFORE = {
    "target": {"loss": 1.5, "accuracy": 0.0, "correct": [False, True], "per_item": [{"completion": "x"}]},
    "sources": {"wikipedia": {"loss": 3.3, "tokens": 10}, "math": {"loss": 1.4, "tokens": 10}},
    "choices": {"arc_easy": {"accuracy": 0.5, "accuracy_norm": 0.4, "correct": [True, False]}},
}
AFTER = {
    "target": {"loss": 1.0, "accuracy": 0.5, "correct": [True, True], "per_item": [{"completion": "y"}]},
    "sources": {"wikipedia": {"loss": 3.35, "kl": 0.1, "tokens": 10}, "math": {"loss": 1.2, "kl": 0.2, "tokens": 10}},
    "choices": {"arc_easy": {"accuracy": 0.0, "accuracy_norm": 0.4, "correct": [False, False]}},
}


def make_record(**overrides):
    options = {
        "experiment_name": "lora/tiny",
        "created_at": "2026-01-01T00:00:00+00:00",
        "total_time": 9.0,
        "train_time": 5.0,
        "train_config": {"model_id": "tiny", "max_steps": 2},
        "peft_config": LoraConfig(target_modules={"q_proj"}),
        "metrics": [{"step": 2, "train loss": 1.1}],
        "before": BEFORE,
        "after": AFTER,
        "curve": [{"step": 0, "loss": 1.5}],
        "num_trainable_params": 3,
        "num_total_params": 30,
        "train_samples": 8,
        "train_total_tokens": 99,
        "provenance": {"gsm8k-offline": "a split"},
    }
    return results_json(**(options | overrides))


def test_record_has_the_shape_of_the_peft_benchmark():
    record = json.loads(json.dumps(make_record()))
    assert set(record) == {"run_info", "train_info", "meta_info", "kalman_peft"}
    assert set(record["run_info"]) == {
        "created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg",
    }  # fmt: skip
    assert set(record["train_info"]) == {
        "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time",
        "file_size", "num_trainable_params", "num_total_params", "status", "metrics",
    }  # fmt: skip
    assert set(record["meta_info"]) == {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"}
    assert {"peft-version", "transformers-version", "bitsandbytes-version"} <= set(record["meta_info"]["package_info"])
    assert record["run_info"]["peft_config"]["peft_type"] == "LORA"
    assert record["run_info"]["peft_config"]["target_modules"] == ["q_proj"]
    final = record["train_info"]["metrics"][-1]
    assert set(final) == {
        "step", "test accuracy", "train loss", "train samples", "train total tokens", "forgetting",
    }  # fmt: skip
    assert final["forgetting"] == pytest.approx(0.05)
    assert final["test accuracy"] == 0.5


def test_record_holds_changes_and_flips_but_no_texts():
    section = make_record()["kalman_peft"]
    assert section["change"]["target"]["loss"] == pytest.approx(-0.5)
    assert section["change"]["target"]["flips"] == {"lost": 0, "won": 1}
    assert section["change"]["choices"]["arc_easy"]["flips"] == {"lost": 1, "won": 0}
    assert "tokens" not in section["change"]["sources"]["math"]
    assert "per_item" not in section["before"]["target"]
    assert section["after"]["sources"]["math"]["kl"] == 0.2


def test_memory_is_summarised():
    info = make_record(memory_reserved=[1, 2, 9])["train_info"]
    assert (info["accelerator_memory_reserved_avg"], info["accelerator_memory_max"]) == (4, 9)


def test_raises_when_the_forgetting_source_is_missing():
    with pytest.raises(ValueError, match="news"):
        make_record(forgetting_source="news")
    with pytest.raises(ValueError, match=r"\['math', 'news'\]"):
        make_record(forgetting_source=["math", "news"])
    with pytest.raises(ValueError, match="model_id"):
        make_record(train_config={})


def test_forgetting_of_several_sources_is_their_mean():
    record = make_record(forgetting_source=["wikipedia", "math"], further={"setup_seconds": 2.0})
    assert record["train_info"]["metrics"][-1]["forgetting"] == pytest.approx((0.05 - 0.2) / 2)
    assert record["kalman_peft"]["setup_seconds"] == 2.0


def test_flips_need_equal_lengths():
    assert flips([True, True, False], [False, True, True]) == {"lost": 1, "won": 1}
    with pytest.raises(ValueError, match="shorter"):
        flips([True, True], [True])


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "results" / "run.json"
    write_json({"a": 1}, path)
    write_json({"a": 2}, path)
    assert json.loads(path.read_text()) == {"a": 2}
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]


def test_tables_agree():
    text = markdown_table(BEFORE, {"LoRA": AFTER})
    assert "| wikipedia: KL from base (nats/token) | 0.000 | 0.100 (+0.100) |" in text
    assert "| target: loss (nats/token) | 1.500 | 1.000 (-0.500) |" in text
    console = Console(record=True, width=120, file=open("/dev/null", "w"))
    console.print(table(BEFORE, {"LoRA": AFTER}))
    shown = console.export_text()
    assert "1.000 (-0.500)" in shown and "0.100 (+0.100)" in shown
    assert len(text.splitlines()) - 2 == table(BEFORE, {"LoRA": AFTER}).row_count


def test_the_plane_ends_at_the_worst_rise(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure.axes[0]))
    runs = {"a": [(1.2, 0.1), (0.5, 9.0), (1.0, -0.2)]}
    details = {
        "a": [PlanePoint(chosen=True, target=(1.1, 1.3), source=(0.0, 0.2)), PlanePoint(joined=False), PlanePoint()]
    }
    plot_plane(runs, tmp_path / "x.png", base=(1.5, 0.0), details=details, worst=0.5)
    low, high = drawn[0].get_ylim()
    assert high <= 0.5 and low < -0.2  # what is not joined does not stretch the axes
    curve = next(line for line in drawn[0].lines if line.get_label() == "a")
    assert curve.get_xdata().tolist() == pytest.approx([0, 0.3, 0.5])
    bars = [line.get_xdata() for line in drawn[0].lines if len(line.get_xdata()) == 2]
    assert any(list(bar) == pytest.approx([0.4, 0.2]) for bar in bars)
    plot_plane({"a": [(0.5, 9.0)]}, tmp_path / "x.png", base=(1.5, 0.0), worst=0.5)
    assert drawn[1].get_ylim()[1] == 0.5


def test_figures_are_pngs(tmp_path):
    plot_plane({"LoRA": [(1.2, 3.4), (1.0, 3.5)], "LaLoRA": [(1.1, 3.3)]}, tmp_path / "plane.png", base=(1.5, 3.3))
    plot_curves({"AdamW": Curve([0, 1], [0, 2.0], [1.5, 1.2])}, tmp_path / "figures" / "curves.png")
    for path in (tmp_path / "plane.png", tmp_path / "figures" / "curves.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
