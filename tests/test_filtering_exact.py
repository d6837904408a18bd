"""Filter, smoother and interpolation against the joint posterior over all task states, in float64."""

import pytest
import torch
from state_space import (
    F64,
    LAYOUT,
    SHAPES,
    STRUCTURES,
    Chain,
    D,
    check,
    curvature,
    rand,
    root,
    run,
    start_state,
)

from kalman_peft import Transition, initial_belief, interpolate, predict, smooth, update
from kalman_peft.filtering import draw, smooth_means


BY_KEY = {"layers\\.": 0.05, "layers\\.1\\.": 0.4, "lora_B": 0.02}
MOTIONS = {
    "none": Transition(),
    "scalar": Transition(0.3),
    "by pattern": Transition(BY_KEY),
    "drift": Transition(BY_KEY, decay=0.8),
    "strong drift": Transition(0.3, decay=0.02),
    "reset": Transition(0.3, decay=0.0),
    "partly frozen": Transition({"layers\\.1\\.": 0.4}),
}
TENSORS = {k: rand(*s, seed=3).square() for k, s in SHAPES.items()}


@pytest.fixture(params=STRUCTURES)
def structure(request):
    return request.param


@pytest.mark.parametrize("motion", MOTIONS)
def test_filter_is_the_posterior_of_what_came_so_far(structure, motion):
    for tasks in (1, 2, 3):
        records, chain, nodes, _ = run(structure, [Transition(), *[MOTIONS[motion]] * (tasks - 1)])
        means, covariances = chain.posterior()
        check(records[-1].belief, means[nodes[-1]], covariances[nodes[-1]])


@pytest.mark.parametrize("motion", MOTIONS)
def test_smoother_is_the_posterior_of_every_task(structure, motion):
    records, chain, nodes, prior = run(structure, [MOTIONS[motion]] * 4)
    means, covariances = chain.posterior()
    for belief, node in zip(smooth(records, start=prior.mean), nodes, strict=True):
        check(belief, means[node], covariances[node])
        assert belief.info["filtering"]["kind"] == "smoothed"


def test_smoother_with_another_transition_at_every_step(structure):
    motions = [MOTIONS[m] for m in ("scalar", "drift", "none", "by pattern", "reset", "scalar")]
    records, chain, nodes, prior = run(structure, motions)
    means, covariances = chain.posterior()
    for belief, node in zip(smooth(records, start=prior.mean), nodes, strict=True):
        check(belief, means[node], covariances[node])


@pytest.mark.parametrize("structure", ["diagonal", "low_rank", "dense"])
@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_noise_by_weight(structure, decay):
    records, chain, nodes, prior = run(structure, [Transition(TENSORS, decay)] * 3)
    means, covariances = chain.posterior()
    for belief, node in zip(smooth(records, start=prior.mean), nodes, strict=True):
        check(belief, means[node], covariances[node])


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_increments_can_be_recovered_by_subtraction(structure):
    records, chain, nodes, prior = run(structure, [MOTIONS["drift"]] * 4)
    for record in records:
        record.increment = None
    means, covariances = chain.posterior()
    for belief, node in zip(smooth(records, start=prior.mean), nodes, strict=True):
        check(belief, means[node], covariances[node])


def test_means_need_no_increments(structure):
    records, chain, nodes, prior = run(structure, [MOTIONS["drift"]] * 4)
    filtered = [r.belief.precision.to_dense() for r in records]
    for record in records:
        record.increment = None
    means, _ = chain.posterior()
    for found, node in zip(smooth_means(records, start=prior.mean), nodes, strict=True):
        torch.testing.assert_close(LAYOUT.flatten(found), means[node], rtol=1e-8, atol=1e-8)
    beliefs = smooth(records, start=prior.mean, covariance=False)
    for belief, dense, node in zip(beliefs, filtered, nodes, strict=True):
        torch.testing.assert_close(LAYOUT.flatten(belief.mean), means[node], rtol=1e-8, atol=1e-8)
        assert torch.equal(belief.precision.to_dense(), dense)
        assert belief.info["filtering"]["precision"] == "filtered"


@pytest.mark.parametrize("fraction", [0.2, 0.75])
@pytest.mark.parametrize("motion", MOTIONS)
def test_interpolation_is_the_posterior_of_a_state_between(structure, motion, fraction):
    step, t = MOTIONS[motion], 1
    records, _, _, prior = run(structure, [step] * 4)
    mean, covariance = run_with_a_state_between(structure, step, t, fraction)
    check(interpolate(records, t + fraction, start=prior.mean), mean, covariance)


def run_with_a_state_between(structure, step, after, fraction):
    """The same tasks with one more node, written out here, between tasks `after` and `after + 1`."""
    start = LAYOUT.flatten(start_state())
    full = {k: torch.as_tensor(q, dtype=F64).expand(SHAPES[k]) for k, q in step.noise(SHAPES, start).items()}
    noise, c = LAYOUT.flatten(full), step.decay
    first, second = c**fraction, c ** (1 - fraction)
    share = fraction if c == 1 else (1 - first**2) / (1 - c**2)
    chain, node = Chain(start, torch.eye(D, dtype=F64) / 0.5), None
    for t in range(4):
        if t == after + 1:
            node = chain.move(first, share * noise)
            rest = noise - second**2 * share * noise
            chain.move(second, rest.clamp(min=0))
        else:
            chain.move(c, noise)
        h = root(20 * curvature(structure, 10 * t + 20).to_dense())
        chain.observe(h, rand(D, seed=500 + t) + h @ start)
    means, covariances = chain.posterior()
    return means[node], covariances[node]


def test_interpolation_meets_the_smoothed_beliefs(structure):
    records, _, _, prior = run(structure, [MOTIONS["drift"]] * 4)
    smoothed = smooth(records, start=prior.mean)
    for t, belief in enumerate(smoothed):
        at = interpolate(records, t, start=prior.mean)
        torch.testing.assert_close(LAYOUT.flatten(at.mean), LAYOUT.flatten(belief.mean), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(at.precision.to_dense(), belief.precision.to_dense(), rtol=1e-10, atol=1e-10)
    for t, side in ((1, 1e-10), (1, -1e-10), (3, -1e-10)):
        near = interpolate(records, t + side, start=prior.mean)
        torch.testing.assert_close(LAYOUT.flatten(near.mean), LAYOUT.flatten(smoothed[t].mean), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(near.precision.to_dense(), smoothed[t].precision.to_dense(), rtol=1e-5, atol=1e-5)


def test_after_the_last_task_the_state_is_predicted(structure):
    records, _, _, prior = run(structure, [MOTIONS["drift"]] * 3)
    once = predict(predict(records[-1].belief, MOTIONS["drift"], prior.mean), MOTIONS["drift"], prior.mean)
    far = interpolate(records, 4, start=prior.mean)
    check(far, LAYOUT.flatten(once.mean), torch.linalg.inv(once.precision.to_dense()))
    other = interpolate(records, 2.5, start=prior.mean, transition=Transition(2.0))
    check(other, LAYOUT.flatten(records[-1].belief.mean),
          torch.linalg.inv(records[-1].belief.precision.to_dense()) + torch.eye(D, dtype=F64))  # fmt: skip


def test_no_noise_is_the_identity(structure):
    records, _, _, _ = run(structure, [Transition()] * 2)
    belief = records[-1].belief
    for transition in (Transition(), Transition({"lora_A": 0.0}), Transition(0.5).part(0)):
        again = predict(belief, transition)
        assert all(torch.equal(again.mean[k], m) for k, m in belief.mean.items())
        before, after = belief.precision.tensors(), again.precision.tensors()
        assert before.keys() == after.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_much_noise_forgets(structure):
    records, _, _, _ = run(structure, [Transition()] * 2)
    predicted = predict(records[-1].belief, Transition(1e12))
    torch.testing.assert_close(predicted.precision.to_dense(), torch.eye(D, dtype=F64) / 1e12, rtol=1e-6, atol=1e-18)
    # The next task is then learnt as if there had been none before.
    task = curvature(structure, 77)
    updated = update(predicted, records[-1].belief.mean, task, 20)
    torch.testing.assert_close(updated.precision.to_dense(), 20 * task.to_dense(), rtol=1e-6, atol=1e-8)


def test_order_of_tasks_does_not_matter_without_noise(structure):
    tasks = [curvature(structure, 10 * t + 20) for t in range(4)]
    start = initial_belief({k: torch.zeros(s, dtype=F64) for k, s in SHAPES.items()}, 0.5, structure, dtype=F64)

    def learn(order):
        belief = start
        for t in order:
            h = root(20 * tasks[t].to_dense())
            y = rand(D, seed=500 + t)
            predicted = predict(belief, Transition())
            dense, mean = predicted.precision.to_dense(), LAYOUT.flatten(predicted.mean)
            mode = mean + torch.linalg.solve(dense + h.T @ h, h.T @ (y - h @ mean))
            belief = update(predicted, LAYOUT.unflatten(mode), tasks[t], 20)
        return belief

    one, other = learn([0, 1, 2, 3]), learn([2, 0, 3, 1])
    check(one, LAYOUT.flatten(other.mean), torch.linalg.inv(other.precision.to_dense()))


def test_decay_to_the_stationary_noise_keeps_the_prior(structure):
    prior = initial_belief({k: torch.ones(s, dtype=F64) for k, s in SHAPES.items()}, 4.0, structure, dtype=F64)
    predicted = predict(prior, Transition.stationary(0.6, 4.0), prior.mean)
    check(predicted, LAYOUT.flatten(prior.mean), torch.eye(D, dtype=F64) / 4)
    deltas = {"lora_A": 4.0, "lora_B": 9.0}
    prior = initial_belief(prior.mean, deltas, structure, dtype=F64)
    predicted = predict(prior, Transition.stationary(0.6, deltas), prior.mean)
    torch.testing.assert_close(predicted.precision.to_dense(), prior.precision.to_dense())


def test_draws_have_the_covariance_of_the_state(structure):
    records, _, _, prior = run(structure, [MOTIONS["drift"]] * 2, labels=3)
    belief = smooth(records, start=prior.mean)[0]
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([LAYOUT.flatten(draw(belief, generator)) for _ in range(6000)])
    covariance = torch.linalg.inv(belief.precision.to_dense())
    spread = covariance.diagonal().sqrt()
    draws = draws - LAYOUT.flatten(belief.mean)
    error = (draws.T @ draws / len(draws) - covariance) / torch.outer(spread, spread)
    assert error.abs().max() < 6 / len(draws) ** 0.5
