"""The benchmark of the filter over tasks runs end to end on small adapters, and counts what is there."""

import sys
from pathlib import Path

import pytest


pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes" / "benchmarks"))

import sequence_cost
from rich.console import Console
from sequence_cost import SequenceOptions


def test_sizes_and_a_sequence_are_measured_and_shown():
    options = SequenceOptions(sizes=[1e4, 2e4], ranks=[2], r=2, tasks=4, pass_rank=2, pass_layers=1, rounds=1)
    result = sequence_cost.benchmark(options)
    assert [(row["structure"], row["k"], row["weights"]) for row in result["sizes"]] == [
        (structure, k, size)
        for structure, k in (("diagonal", 0), ("low_rank", 2), ("ekfac", 2))
        for size in (4 * 576 * 4, 4 * 576 * 9)
    ]
    assert all(row[verb] > 0 for row in result["sizes"] for verb in sequence_cost.VERBS)
    assert len(result["slopes"]) == 3
    for row in result["sequences"]:
        assert row["weights"] == 2 * 10176 and len(row["covariance_trace"]) == 4
        first, last = row["precision_mib"]
        assert last <= 1.5 * first  # bounded over tasks
    console = Console(width=200, record=True)
    sequence_cost.show(result, console)
    text = console.export_text()
    assert all(word in text for word in ("low_rank", "ekfac", "exponent of D, diagonal", "trace"))


def test_the_adapter_of_smollm2_has_its_size():
    shapes = sequence_cost.smollm2_shapes(8)
    assert sum(shape.numel() for shape in shapes.values()) == 2_442_240
    assert len(shapes) == 2 * 7 * 30


def test_the_exponent_of_a_square_is_two():
    rows = [{"structure": "x", "k": 1, "weights": d} | dict.fromkeys(sequence_cost.VERBS, d**2) for d in (10, 30, 100)]
    assert sequence_cost.slopes(rows) == [
        {"structure": "x", "k": 1} | dict.fromkeys(sequence_cost.VERBS, pytest.approx(2))
    ]


def test_raises_when_a_structure_is_unknown():
    with pytest.raises(ValueError, match="structures must be of"):
        SequenceOptions(structures=["dense"])


@pytest.mark.parametrize(
    "name, value",
    [("rounds", 0), ("r", 0), ("sizes", [-5.0]), ("sizes", [1e4, 1e4]), ("ranks", []), ("tasks", -1), ("threads", 0)],
)
def test_raises_when_nothing_would_be_measured(name, value):
    with pytest.raises(ValueError, match=name):
        SequenceOptions(**{name: value})


def test_no_exponent_between_equal_sizes():
    row = {"structure": "x", "k": 1, "weights": 10} | dict.fromkeys(sequence_cost.VERBS, 1.0)
    assert sequence_cost.slopes([row, dict(row)]) == []
