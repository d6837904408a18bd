"""Process noise and forgetting, against dense algebra in float64."""

import pytest
import torch
from filtering import F64, close, covariance, gaussian_evidence, linear, rand, two_layers

from kalman_peft import GaussianObservation, LoKO
from kalman_peft.loko import MEMORIES
from kalman_peft.precision import DensePrecision, LowRankPrecision
from kalman_peft.precision.dense import diffuse_dense


NOISE, PRIOR = 0.3, {"a": 0.6, "b": 2.0, "c": 8.0}


def new_filter(toy, **options):
    prior = {name: PRIOR.get(name, 0.6) for name in toy.params}
    options = {"columns": "exact", "max_decrease": None, "max_columns": 10**6, "adaptive_noise": 0.0} | options
    return LoKO(toy.params.items(), GaussianObservation(NOISE), prior_precision=prior, **options)


def take(optimizer, toy, seed, n=3):
    x = rand(n, 5, seed=seed)
    y = rand(n, 2, seed=seed + 100)
    optimizer.observe(toy(x), y)
    optimizer.step()
    return x, y


def filled(memory, **options):
    """A filter that has seen two batches, and its toy model."""
    toy = two_layers()
    optimizer = new_filter(toy, memory=memory, rank=4, gain="joint", block_limit=13, **options)
    for seed in range(2):
        take(optimizer, toy, seed)
    return optimizer, toy


# by regular expression over the names; of several that match the last counts
NOISES = [
    (0.2, {"a": 0.2, "b": 0.2, "c": 0.2}), ({"a": 0.3, "b|c": 0.1}, {"a": 0.3, "b": 0.1, "c": 0.1}),
    ({".*": 0.5, "a": 0.0}, {"a": 0.0, "b": 0.5, "c": 0.5}), ({"c": 0.4}, {"a": 0.0, "b": 0.0, "c": 0.4}),
]  # fmt: skip


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("noise,by_name", NOISES)
def test_process_noise_adds_to_the_covariance_before_the_update(memory, noise, by_name):
    optimizer, toy = filled(memory, process_noise=noise)
    before, p = toy.theta, covariance(optimizer, toy)
    predicted = p + torch.diag(toy.spread(by_name))
    x, y = rand(3, 5, seed=7), rand(3, 2, seed=8)
    score, information = gaussian_evidence(toy, x, y, NOISE)
    optimizer.observe(toy(x), y)
    optimizer.step()
    close(toy.theta - before, torch.linalg.solve(torch.linalg.inv(predicted) + information, score))


@pytest.mark.parametrize("memory", MEMORIES)
def test_forgetting_relaxes_mean_and_precision_to_the_start(memory):
    # A step that weighs its data next to nothing leaves the dynamics alone.
    toy = two_layers()
    start, prior = toy.theta, toy.spread(PRIOR)
    optimizer, toy = filled(memory, forgetting=0.8)
    optimizer.param_groups[0]["tempering"] = 1e-25
    before, precision = toy.theta, torch.linalg.inv(covariance(optimizer, toy))
    take(optimizer, toy, 7)
    relaxed = 0.8 * precision + 0.2 * torch.diag(prior)
    close(torch.linalg.inv(covariance(optimizer, toy)), relaxed)
    mean = torch.linalg.solve(relaxed, 0.8 * precision @ before + 0.2 * prior * start)
    close(toy.theta, mean)
    assert (toy.theta - before).norm() > 0.01


def test_forgetting_is_exponentially_weighted_regression():
    # After t steps: the minimum of sum_s gamma^(t - s) |y_s - f(x_s)|^2 / noise + prior |theta - start|^2, where the
    # filter has also predicted once more (relaxed after the last step).
    toy, gamma = linear(inputs=5), 0.8
    start, d = toy.theta, len(toy.theta)
    prior = toy.spread({"w": 0.6, "b": 2.0})
    optimizer = new_filter(toy, memory="dense", forgetting=gamma)
    information, right = torch.zeros(d, d, dtype=F64), torch.zeros(d, dtype=F64)
    for t in range(12):
        x, y = take(optimizer, toy, t)
        jacobian = toy.jacobian(x).flatten(0, 1)
        residual = y.reshape(-1) - toy.at(start, x).reshape(-1)
        information = gamma * (information + jacobian.T @ jacobian / NOISE)
        right = gamma * (right + jacobian.T @ residual / NOISE)
        whole = torch.diag(prior) + information
        close(covariance(optimizer, toy), torch.linalg.inv(whole))
        close(toy.theta, start + torch.linalg.solve(whole, right))


def test_filter_with_process_noise_is_the_kalman_filter_of_a_random_walk():
    toy, q = linear(inputs=5), {"w": 0.05, "b": 0.2}
    optimizer = new_filter(toy, memory="dense", process_noise=q)
    m, p = toy.theta, torch.diag(1 / toy.spread({"w": 0.6, "b": 2.0}))
    for t in range(8):
        p = p + torch.diag(toy.spread(q))
        x, y = rand(3, 5, seed=t), rand(3, 2, seed=t + 100)
        h, e = toy.jacobian(x).flatten(0, 1), (y - toy(x).detach()).reshape(-1)
        gain = p @ h.T @ torch.linalg.inv(h @ p @ h.T + NOISE * torch.eye(6, dtype=F64))
        m, p = m + gain @ e, p - gain @ h @ p
        take(optimizer, toy, t)
        close(toy.theta, m)
        close(covariance(optimizer, toy), p)


@pytest.mark.parametrize("memory", MEMORIES)
def test_without_noise_and_forgetting_nothing_is_predicted(memory):
    found = []
    for options in ({}, {"process_noise": 0.0, "forgetting": 1.0}, {"process_noise": {"a": 0.0}}):
        optimizer, toy = filled(memory, **options)
        found.append((toy.theta, covariance(optimizer, toy)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


# -- precisions --------------------------------------------------------------------------------------------------------

SHAPES = {"a": torch.Size((2, 3)), "b": torch.Size((4,))}


def noises():
    return [0.3, {"a": 0.3, "b": 0.0}, {"a": rand(2, 3, seed=3).square(), "b": 0.7}]


def flat(noise):
    parts = noise if isinstance(noise, dict) else dict.fromkeys(SHAPES, noise)
    return torch.cat([torch.as_tensor(parts[k], dtype=F64).expand(s).reshape(-1) for k, s in SHAPES.items()])


@pytest.mark.parametrize("noise", noises(), ids=["scalar", "by block", "by weight"])
def test_predict_of_dense_and_low_rank_precisions(noise):
    root = rand(10, 3, seed=1)
    low_rank = LowRankPrecision(rand(10, seed=2).exp(), root, SHAPES)
    dense = DensePrecision(low_rank.to_dense(), SHAPES)
    expected = torch.linalg.inv(torch.linalg.inv(dense.matrix) + torch.diag(flat(noise)))
    close(dense.predict(noise).to_dense(), expected)
    close(low_rank.predict(noise).to_dense(), expected)
    assert low_rank.predict(noise).rank == 3


@pytest.mark.parametrize("noise", noises(), ids=["scalar", "by block", "by weight"])
def test_predict_of_singular_precisions(noise):
    # U U^T has no inverse; as the limit of epsilon I + U U^T its prediction is U (I + U^T Q U)^-1 U^T.
    root, q = rand(10, 3, seed=1), torch.diag(flat(noise))
    expected = root @ torch.linalg.inv(torch.eye(3, dtype=F64) + root.T @ q @ root) @ root.T
    found = diffuse_dense(root @ root.T, flat(noise))
    close(found, expected)
    close(found, found.T)
    close(LowRankPrecision(torch.zeros(10, dtype=F64), root, SHAPES).predict(noise).to_dense(), expected)
    for b in diffuse_dense((root @ root.T).expand(2, 10, 10), flat(noise).expand(2, 10)):
        close(b, expected)


def test_predict_names_the_blocks_that_are_missing():
    precision = DensePrecision(torch.eye(10, dtype=F64), SHAPES)
    with pytest.raises(ValueError, match=r"must name every block.*'b'"):
        precision.predict({"a": 0.1})
    with pytest.raises(ValueError, match="process_noise is a variance"):
        precision.predict({"a": 0.1, "b": -0.1})
