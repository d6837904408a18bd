"""Options that would have no effect are said, once; those that have one are not."""

import warnings

import pytest
import torch
from toys import Linear

from kalman_peft import GaussianObservation, KalmanConfig, LoKO


def said(kind="classes", outputs=4, **options):
    """Warnings of the constructor, and of three steps."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        toy = Linear(kind, outputs, **options)
        first = [str(w.message) for w in found]
        toy.run(3)
    return first, [str(w.message) for w in found][len(first) :]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"first_draws": 2}, "first_draws=2: no effect with curvature_every=1"),
        ({"first_draws": 2, "curvature_every": 1, "kind": "tokens"}, "first_draws=2: no effect"),
        ({"noise_decay": 0.9}, "noise_decay=0.9: no effect where no noise is estimated"),
        ({"max_columns": 3, "per_sequence": False}, "max_columns=3: no effect with per_sequence=False"),
        ({"num_columns": 2, "top_k": 2}, "num_columns=2: no effect with top_k"),
    ],
)
def test_the_constructor_says_what_has_no_effect(options, message):
    (found,), later = said(**options)
    assert found.startswith(message) and later == []


@pytest.mark.parametrize(
    "options,message",
    [
        ({"correlation": 0.5}, "correlation=0.5: no effect where each sequence has one label"),
        ({"max_columns": 3, "kind": "tokens"}, "max_columns=3: no effect where columns"),
        ({"num_columns": 2, "outputs": 3}, "num_columns=2: no effect with 3 outputs"),
    ],
)
def test_the_first_batch_says_what_has_no_effect(options, message):
    first, (found,) = said(**options)
    assert first == [] and found.startswith(message)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": "tokens"},
        {"first_draws": 2, "curvature_every": 3},
        {"max_columns": 3},
        {"max_columns": 3, "kind": "tokens", "per_sequence": True},
        {"num_columns": 2},
        {"num_columns": 2, "outputs": 3, "columns": "sampled"},
        {"correlation": 0.5, "kind": "tokens"},
        {"noise_decay": 0.9, "mode": "paper"},
        {"noise_decay": 0.9, "kind": "values", "observation": GaussianObservation(), "estimate_noise": True},
    ],
)
def test_what_has_an_effect_is_not_warned_of(options):
    assert said(**options) == ([], [])


def test_raises_when_a_pattern_of_process_noise_is_no_regular_expression(tmp_path):
    named = [("w", torch.nn.Parameter(torch.ones(2, 2)))]
    for pattern in ("(", 3):
        with pytest.raises(ValueError, match=r"process_noise: ('\('|3) is no regular expression"):
            LoKO(named, GaussianObservation(), process_noise={pattern: 1.0})
    with pytest.raises(ValueError, match=r"loko_process_noise: '\(' is no regular expression"):
        KalmanConfig(str(tmp_path), optimizer="loko", use_cpu=True, loko_process_noise='{"(": 1}')
