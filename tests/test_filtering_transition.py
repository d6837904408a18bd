"""Process noise and decay: what they mean, and what is refused."""

import math

import pytest
import torch
from state_space import F64, LAYOUT, SHAPES, rand, start_state

from kalman_peft import Transition, initial_belief, predict


LIKE = torch.zeros((), dtype=F64)
A0, B0, A1, B1 = SHAPES


def noise(values):
    return Transition(values).noise(SHAPES, LIKE)


def test_last_matching_pattern_counts():
    assert noise(0.5) == dict.fromkeys(SHAPES, 0.5)
    assert noise({"": 1.0, "lora_B": 2.0, r"layers\.1\.": 3.0}) == {A0: 1.0, B0: 2.0, A1: 3.0, B1: 3.0}
    assert noise({r"layers\.[1-9]\.": 3.0}) == {A0: 0.0, B0: 0.0, A1: 3.0, B1: 3.0}


def test_patterns_see_the_module_name():
    assert noise({r"0\.q_proj$": 1.0}) == {A0: 1.0, B0: 1.0, A1: 0.0, B1: 0.0}


def test_a_key_means_itself_alone():
    shapes = {"l.1.lora_A.weight": torch.Size((1, 1)), "l.1.lora_A.weight2": torch.Size((1, 1))}
    assert Transition({"l.1.lora_A.weight": 2.0}).noise(shapes, LIKE) == dict(zip(shapes, (2.0, 0.0), strict=True))


def test_tensors_by_key():
    q = rand(2, 3).square()
    found = noise({"lora": 1.0, A1: q})
    assert torch.equal(found[A1], q) and found[A0] == 1.0


@pytest.mark.parametrize("decay", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("fraction", [0.3, 0.5])
def test_parts_compose_to_the_step(decay, fraction):
    step = Transition({"lora_A": 0.4, "lora_B": 2.0}, decay)
    start, belief = start_state(1), initial_belief(start_state(2), 0.5, "diagonal", dtype=F64)
    whole = predict(belief, step, start)
    parts = predict(predict(belief, step.part(fraction), start), step.part(1 - fraction), start)
    torch.testing.assert_close(LAYOUT.flatten(parts.mean), LAYOUT.flatten(whole.mean))
    torch.testing.assert_close(parts.precision.to_dense(), whole.precision.to_dense())


def test_a_part_of_several_steps():
    step = Transition(0.4, 0.7)
    belief = initial_belief(start_state(2), 0.5, "diagonal", dtype=F64)
    start = start_state(1)
    twice = predict(predict(belief, step, start), step, start)
    once = predict(belief, step.part(2), start)
    torch.testing.assert_close(LAYOUT.flatten(once.mean), LAYOUT.flatten(twice.mean))
    torch.testing.assert_close(once.precision.to_dense(), twice.precision.to_dense())


@pytest.mark.parametrize("bad", [-1e-9, math.nan, math.inf])
@pytest.mark.parametrize("wrap", [lambda q: q, lambda q: {"lora_A": q}, lambda q: {A0: torch.tensor([[q]])}])
def test_raises_when_noise_is_no_variance(bad, wrap):
    with pytest.raises(ValueError, match=r"process_noise.* must be >= 0 and finite"):
        Transition(wrap(bad))


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan])
def test_raises_when_decay_is_no_share(decay):
    with pytest.raises(ValueError, match="decay must be in"):
        Transition(0.0, decay)


def test_raises_when_a_pattern_matches_nothing_or_is_none():
    with pytest.raises(ValueError, match=r"no adapter key matches.*layer99"):
        noise({"layer99": 1.0, "lora_A": 2.0})
    with pytest.raises(ValueError, match="no regular expression"):
        Transition({"(": 1.0})


def test_raises_when_a_tensor_does_not_fit():
    with pytest.raises(ValueError, match=r"shape \(3, 2\), the factor \(2, 3\)"):
        noise({A0: torch.ones(3, 2)})
    with pytest.raises(ValueError, match="no adapter key: give a number"):
        noise({"lora_A": torch.ones(2, 3)})


def test_raises_when_drift_has_no_start():
    belief = initial_belief(start_state(), 1.0, "diagonal", dtype=F64)
    with pytest.raises(ValueError, match=r"pass start="):
        predict(belief, Transition(0.1, decay=0.5))
    with pytest.raises(ValueError, match="other keys or shapes"):
        predict(belief, Transition(0.1, decay=0.5), {A0: belief.mean[A0]})


def test_raises_when_a_part_is_negative():
    with pytest.raises(ValueError, match="fraction must be"):
        Transition(0.1).part(-0.5)


def test_raises_when_stationary_has_no_prior():
    with pytest.raises(ValueError, match="prior_precision must be > 0"):
        Transition.stationary(0.5, 0.0)
