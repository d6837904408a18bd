"""The benchmark of training steps runs end to end on a tiny model, and counts what is there."""

import sys
from pathlib import Path

import pytest
import torch


pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes" / "benchmarks"))

import step_cost
from rich.console import Console
from step_cost import StepOptions

import step_runs
import step_scaling
from measuring import Samples


def shown(result):
    console = Console(width=200, record=True)
    step_cost.show(result, console)
    return console.export_text()


def options(tmp_path, model, **chosen):
    model.save_pretrained(tmp_path / "model")
    tiny = {"batch": 2, "tokens": 6, "r": 2, "rounds": 1, "dtype": "float32"}
    return StepOptions(model=str(tmp_path / "model"), **(tiny | chosen))


def test_all_steps_on_a_model_are_measured_and_shown(tmp_path, model):
    result = step_cost.benchmark(options(tmp_path, model))
    figures = result["figures"]
    for memory in ("kronecker", "diagonal", "diagonal_covariance", "low_rank", step_cost.PER_SEQUENCE):
        assert {
            f"LoKO {memory}, {when}" for when in ("with draw", "no draw", "every 4th", "every 10th")
        } <= figures.keys()
    assert figures["forward + backward"]["to_forward_backward"] == figures["AdamW"]["to_adamw"] == 1
    assert all(row["seconds"] > 0 for row in figures.values())
    text = shown(result)
    assert all(name in text for name in (*figures, *result["left_out"]))


def test_a_schedule_is_the_mean_of_its_steps():
    samples = {"x, with draw": Samples([4.0], [0.0], [7.0]), "x, no draw": Samples([1.0], [0.0], [2.0])}
    result = step_cost.add_schedules(samples)
    assert result["x, every 4th"].repeated == [1.75] and result["x, every 10th"].repeated == [1.3]
    assert result["x, every 4th"].mebibytes == [7.0]


def test_optimizers_alone_are_measured_and_judged(tmp_path, model):
    result = step_cost.benchmark(options(tmp_path, model, synthetic=True, sizes=[2e4], ranks=[4], rounds=1))
    rows = {row["optimizer"]: row for row in result["scaling"]}
    assert rows["AdamW"]["weights"] == rows["kronecker"]["weights"] == 2 * 4 * 256 * 10
    assert rows["AdamW"]["state_bytes"] == pytest.approx(8, abs=0.01)  # two moments in float32
    assert rows["diagonal"]["state_bytes"] == pytest.approx(4, abs=0.01)
    assert "skipped" in rows["dense"] and "skipped" in rows["block"]
    assert {row["what"] for row in result["targets"]} == step_scaling.TARGETS.keys()
    assert "left out: dense" in shown(result)


def test_given_gradients_are_the_scores_and_the_columns():
    params, gradients = step_runs.make_params([(2, 5), (5, 2)])
    optimizer, run = step_runs.loko_on(params, gradients, True, memory="diagonal", curvature_every=1)
    run()
    learned = optimizer._memories[0].tensors["precision"] - optimizer._memories[0].prior[:, None, None]
    for part, gradient in zip(optimizer._views[0].slices(learned), gradients, strict=True):
        torch.testing.assert_close(part, gradient.square(), rtol=0, atol=0.1)  # on top of a prior of 1e6, in float32
    assert all(not p.any() for p in params.values())  # lr = 0


def test_operators_of_a_step_are_counted(tmp_path, model):
    result = step_cost.benchmark(options(tmp_path, model, profile=True))
    adamw, plain, draw = result["profile"]
    assert adamw["tensors"] == plain["tensors"] > 0
    assert draw["operators"] > plain["operators"] > 0
    assert plain["waits"] < draw["waits"]
    assert "kronecker, with draw" in shown(result)


def test_dense_is_left_out_by_its_own_limit(model, monkeypatch):
    adapted = step_cost.add_adapter(model, 2)
    monkeypatch.setattr("kalman_peft.loko.memories._DENSE_LIMIT", 10)
    runs, left_out = step_cost.variants(adapted, step_cost.make_batch(adapted, 2, 6))
    assert "at most 10" in left_out["dense"] and not any("dense" in name for name in runs)
