"""The benchmark of curvature runs end to end on a tiny model, and what it says of sizes and work is what is there."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch


pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes" / "benchmarks"))

import curvature_cost
from rich.console import Console

import curvature_runs
import curvature_scaling
from curvature_runs import Variant
from measuring import Samples, add_adapter, make_batch


@pytest.fixture
def checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def adapted(model):
    adapted = add_adapter(model, 2)
    adapted.config.use_cache = False
    curvature_runs.randomise_b(adapted)
    return adapted


def test_all_rows_are_measured_and_shown(checkpoint):
    peers = ["opacus"] if importlib.util.find_spec("opacus") else ["none"]
    options = curvature_cost.CurvatureOptions(
        model=checkpoint, batch=2, tokens=6, r=2, rounds=1, batches=2, dtype="float32", peers=peers
    )
    result = curvature_cost.benchmark(options)
    assert {variant.name for variant in curvature_cost.VARIANTS} <= result["figures"].keys()
    assert result["figures"]["forward + backward"]["per_batch"] == 1
    assert all(row["seconds_per_batch"] > 0 for row in result["figures"].values())
    assert all(check["equal"] for check in result["checks"])
    assert len(result["checks"]) == (peers != ["none"])
    assert all(target["value"] > 0 for target in result["targets"])
    console = Console(width=165, record=True)
    curvature_cost.show(result, console)
    text = console.export_text()
    assert all(name in text for name in result["figures"])


def test_raises_when_a_peer_is_unknown():
    with pytest.raises(ValueError, match=r"peers must be among .*'nobody'"):
        curvature_cost.chosen_peers(["nobody"])


def test_a_missing_peer_is_named_and_skipped(checkpoint, monkeypatch):
    missing = curvature_cost.Peer("no_such_library", "diagonal", lambda model: None)
    monkeypatch.setattr(curvature_cost, "PEERS", (missing,))
    options = curvature_cost.CurvatureOptions(
        model=checkpoint, batch=1, tokens=4, r=1, rounds=1, batches=1, dtype="float32", peers=["no_such_library"]
    )
    result = curvature_cost.benchmark(options)
    assert result["skipped"] == {missing.name: "`no_such_library` or what it needs is not installed"}
    assert result["checks"] == []


def test_what_is_done_once_is_spread_over_the_pass():
    plain = Samples(repeated=[1.0, 2.0, 1.0], once=[0.0, 0.0, 0.0])
    other = Samples(repeated=[2.0, 4.0, 9.0], once=[4.0, 8.0, 4.0])
    assert other.over(plain) == 2
    assert other.over(plain, once_in=4) == 3


def test_the_clock_leaves_everything_as_it_was(adapted):
    before = curvature_runs.Scorer._pass, curvature_runs.estimate.make_accumulator
    seconds = curvature_runs.curvature_run(adapted, [make_batch(adapted, 2, 6)], Variant("kronecker", dense=True))()
    assert seconds > 0
    assert (curvature_runs.Scorer._pass, curvature_runs.estimate.make_accumulator) == before
    assert adapted.training


@pytest.mark.parametrize("variant", curvature_scaling.SCALED, ids=lambda variant: variant.name)
def test_no_more_products_than_the_formula_says(adapted, variant):
    counted = curvature_runs.count_flops(adapted, make_batch(adapted, 2, 6), variant)
    assert counted <= curvature_scaling.extra_flops(adapted, variant, 2, 6)


def test_raises_when_a_structure_has_no_formula(adapted):
    with pytest.raises(ValueError, match="structure='ekfac'"):
        curvature_scaling.extra_flops(adapted, Variant("ekfac"), 2, 6)


def test_the_large_model_is_shapes_only_and_takes_over_the_price_of_a_product():
    measured = {"r": 16, "variant": "diagonal empirical adapter", "per_batch": 1.1, "flops": 0.01}
    rows = {row["variant"]: row for row in curvature_scaling.extrapolate([measured], 4, 160)}
    diagonal, kronecker = rows["diagonal empirical adapter"], rows["kronecker empirical adapter"]
    # Llama-3.1-8B with r = 16 on all linear layers has 41,943,040 adapter weights.
    assert diagonal["result_bytes"] == 4 * 41_943_040
    assert diagonal["price"] == pytest.approx(10)
    assert diagonal["per_batch"] == pytest.approx(1 + 10 * diagonal["flops"])
    assert "price" not in kronecker
    assert rows["kronecker empirical adapter, dense sides"]["sums_bytes"] > 50 * kronecker["sums_bytes"]


def test_forward_and_backward_are_counted(model):
    from torch.utils.flop_counter import FlopCounterMode

    model.set_attn_implementation("eager")
    adapted = add_adapter(model, 2)
    with FlopCounterMode(display=False) as counter:
        curvature_runs.plain_run(adapted, [make_batch(adapted, 2, 64)])()
    # The formula also counts gradients of the first inputs, which nobody asks for.
    torch.testing.assert_close(
        curvature_scaling.forward_backward_flops(adapted, 2, 64), float(counter.get_total_flops()), rtol=0.1, atol=0
    )
