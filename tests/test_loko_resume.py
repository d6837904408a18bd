"""A filter saved and loaded goes on bit for bit."""

import io

import pytest
import torch
from toys import Linear

from kalman_peft import GaussianObservation
from kalman_peft.loko import MEMORIES


ESTIMATES = {"estimate_noise": True, "observation": GaussianObservation(), "noise_decay": 0.8}
CASES = {memory: ("classes", {"memory": memory}) for memory in MEMORIES} | {
    "everything": (
        "classes",
        {
            "forgetting": 0.9, "averaging": True, "adaptive_noise": 0.7, "process_noise": {"w": 1e-3},
            "curvature_every": 3, "first_draws": 2, "max_kl": 1e-3, "damping": 0.1, "outlier_threshold": 2.0,
        },
    ),
    "flat": ("classes", {"memory": "low_rank", "rank": 4, "forgetting": 0.9, "averaging": True, "process_noise": 1e-3}),
    "noise": ("values", ESTIMATES),
    "paper": ("classes", {"mode": "paper", "initial_bound": 0.5}),
    "paper_values": ("values", {"mode": "paper", "noise_decay": 0.5}),
    "tokens": ("tokens", {"correlation": 0.5, "memory": "block"}),
}  # fmt: skip


def through_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(kind, options, optimizer_state, weights, dtype):
    toy = Linear(kind, dtype=dtype, **options)
    toy.w.data, toy.b.data = weights[0].clone(), weights[1].clone()
    toy.optimizer.load_state_dict(optimizer_state)
    return toy


def check_equal(a, b):
    assert torch.equal(a.theta, b.theta)
    first, second = a.optimizer, b.optimizer
    first.state_dict(), second.state_dict()  # an average's stand-in for the weights is renewed here
    for memory, other in zip(first._memories, second._memories, strict=True):
        assert memory.tensors.keys() == other.tensors.keys()
        for key, tensor in memory.tensors.items():
            assert torch.equal(tensor, other.tensors[key]), key
    for extra, other in zip(first._extras, second._extras, strict=True):
        assert extra.keys() == other.keys() and all(torch.equal(t, other[key]) for key, t in extra.items())
    ignored = ("params", "param_names")
    groups = [{k: v for k, v in o.param_groups[0].items() if k not in ignored} for o in (first, second)]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_resume_is_bitwise_exact(case, stop, dtype):
    kind, options = CASES[case]
    whole = Linear(kind, dtype=dtype, **options).run(7)
    first = Linear(kind, dtype=dtype, **options).run(stop)
    state, weights = through_file((first.optimizer.state_dict(), (first.w.data, first.b.data)))
    second = resumed(kind, options, state, weights, dtype)
    check_equal(first, second)
    for seed in range(stop, 7):
        second.step(seed)
    check_equal(whole, second)
    assert not torch.equal(first.theta, whole.theta)


@pytest.mark.parametrize("averaging", [False, True])
def test_a_filter_saved_in_evaluation_mode_comes_back_in_training_mode(averaging):
    options = {"averaging": averaging}
    whole = Linear(**options).run(6)
    first = Linear(**options).run(3)
    live = first.theta
    first.optimizer.eval()
    state, weights = through_file((first.optimizer.state_dict(), (first.w.data, first.b.data)))
    second = resumed("classes", options, state, weights, torch.float64)
    assert torch.equal(second.theta, live)
    for seed in range(3, 6):
        second.step(seed)
    assert torch.equal(second.theta, whole.theta)


def test_what_was_observed_before_loading_is_dropped():
    first = Linear().run(2)
    state, weights = through_file((first.optimizer.state_dict(), (first.w.data, first.b.data)))
    second = Linear()
    second.observe(*second.batch(9))
    second.w.data, second.b.data = weights
    second.optimizer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="without an observation"):
        second.optimizer.step()
    second.step(2)
    first.step(2)
    check_equal(first, second)


@pytest.mark.parametrize(
    "saved,own,match",
    [
        ({"averaging": True}, {}, "averaging=True, this one False"),
        ({}, {"averaging": True}, "averaging=False, this one True"),
        ({"forgetting": 0.9}, {}, "forgetting=0.9, this one 1.0"),
        ({}, {"forgetting": 0.9}, "forgetting=1.0, this one 0.9"),
        ({"rank": 3}, {}, "rank=3, this one 16"),
        ({"mode": "paper"}, {}, "mode='paper', this one 'kalman'"),
        ({"memory": "dense"}, {}, "memory='dense', this one 'kronecker'"),
        ({"dense_limit": 2}, {}, "does not fit"),
    ],
)
def test_raises_when_the_saved_filter_holds_other_state(saved, own, match):
    state = Linear(**saved).run(2).optimizer.state_dict()
    with pytest.raises(ValueError, match=match):
        Linear(**own).optimizer.load_state_dict(state)


def test_saved_options_go_on_and_are_said_to(caplog):
    options = {"memory": "diagonal", "process_noise": 0.05, "forgetting": 0.9, "tempering": 0.5}
    first = Linear(**options).run(2)
    second = Linear(memory="diagonal", forgetting=0.8, process_noise={"w": 1.0})
    second.w.data, second.b.data = first.w.data.clone(), first.b.data.clone()
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert all(name in caplog.text for name in ("process_noise", "forgetting", "tempering"))
    for toy in (first, second):
        toy.step(2)
    check_equal(first, second)
