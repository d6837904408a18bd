"""The filter against dense references: batch posteriors, and the textbook's update with H, S and K."""

from typing import Any

import pytest
import torch
from filtering import F64, Toy, close, covariance, gaussian_evidence, linear, rand, softmax_evidence, two_layers

from kalman_peft import CategoricalObservation, GaussianObservation, LoKO
from kalman_peft.loko import MEMORIES


NOISE = 0.3
SPLITS = {"one by one": [[1]] * 9, "stacked": [[9]], "uneven": [[2, 1], [4], [1, 1]]}  # micro-batches of steps


def new_filter(toy, observation=None, prior: Any = 0.7, **options):
    options = {"columns": "exact", "max_decrease": None, "max_columns": 10**6, "damping": 0.0} | options
    prior = prior if isinstance(prior, dict) else dict.fromkeys(toy.params, prior)
    return LoKO(toy.params.items(), observation or GaussianObservation(NOISE), prior_precision=prior, **options)


def take(optimizer, toy, x, y, sizes=None):
    """One step from micro-batches of the given sizes."""
    sizes = sizes or [len(x)]
    for part, labels in zip(x.split(sizes), y.split(sizes), strict=True):
        optimizer.observe(toy(part), labels)
    optimizer.step()


def regression(toy, n=9, inputs=3, outputs=2):
    return rand(n, inputs, seed=5), rand(n, outputs, seed=6)


def batch_posterior(toy, start, prior, x, y):
    """Mean and covariance of Bayesian linear regression from all the data at once, by the normal equations."""
    jacobian = toy.jacobian(x).flatten(0, 1)
    precision = torch.diag(prior) + jacobian.T @ jacobian / NOISE
    intercept = toy.at(torch.zeros_like(start), x).reshape(-1)
    right = prior * start + jacobian.T @ (y.reshape(-1) - intercept) / NOISE
    return torch.linalg.solve(precision, right), torch.linalg.inv(precision)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("gain", ["joint", "memory"])
@pytest.mark.parametrize("order", [0, 1])
def test_dense_filter_is_the_posterior_of_bayesian_linear_regression(split, gain, order):
    toy, prior = linear(), {"w": 0.5, "b": 2.0}
    start = toy.theta
    x, y = regression(toy)
    mean, expected = batch_posterior(toy, start, toy.spread(prior), x, y)
    shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(order))
    optimizer = new_filter(toy, prior=prior, memory="dense", gain=gain)
    begin = 0
    for sizes in SPLITS[split]:
        chosen = shuffled[begin : begin + sum(sizes)]
        take(optimizer, toy, x[chosen], y[chosen], sizes)
        begin += sum(sizes)
    assert begin == 9
    close(toy.theta, mean)
    close(covariance(optimizer, toy), expected)


def test_recursive_least_squares_agrees_at_every_step():
    toy = linear(outputs=1, bias=False)
    x, y = regression(toy, outputs=1)
    optimizer = new_filter(toy, memory="dense")
    m, p = toy.theta, torch.eye(3, dtype=F64) / 0.7
    for t in range(9):
        gain = p @ x[t] / (NOISE + x[t] @ p @ x[t])
        m, p = m + gain * (y[t, 0] - x[t] @ m), p - torch.outer(gain, x[t] @ p)
        take(optimizer, toy, x[t : t + 1], y[t : t + 1])
        close(toy.theta, m)
        close(covariance(optimizer, toy), p)


# -- structures that hold the posterior exactly ------------------------------------------------------------------------


def classification(steps=5, classes=3, inputs=5, batch=4):
    labels = torch.randint(0, classes, (steps, batch), generator=torch.Generator().manual_seed(1))
    return list(zip(rand(steps, batch, inputs, seed=8), labels, strict=True))


def after(make, data, **options):
    toy = make()
    optimizer = new_filter(toy, CategoricalObservation(shift=False), **options)
    for x, labels in data:
        take(optimizer, toy, x, labels)
    return toy.theta, covariance(optimizer, toy)


@pytest.mark.parametrize("gain", ["joint", "memory"])
@pytest.mark.parametrize("rank", [1000, 27])  # of 35 weights 8 reach no output: the data are of rank 27
def test_low_rank_filter_of_the_data_s_rank_is_the_dense_one(rank, gain):
    data = classification()
    dense = after(lambda: two_layers(outputs=3), data, memory="dense", gain=gain)
    found = after(lambda: two_layers(outputs=3), data, memory="low_rank", rank=rank, gain=gain)
    for a, b in zip(found, dense, strict=True):
        close(a, b)


def test_block_filter_of_one_parameter_is_the_dense_one():
    data = classification()
    dense = after(lambda: linear(3, 5, bias=False), data, memory="dense")
    for found, expected in zip(after(lambda: linear(3, 5, bias=False), data, memory="block"), dense, strict=True):
        close(found, expected)


@pytest.mark.parametrize("outputs,inputs", [(2, 5), (5, 2)])  # a tall matrix is kept transposed
@pytest.mark.parametrize("gain", ["joint", "memory"])
def test_kronecker_filter_is_exact_where_the_posterior_is_a_kronecker_product(outputs, inputs, gain):
    toy = linear(outputs, inputs, bias=False)
    start, (x, y) = toy.theta, regression(toy, 9, inputs, outputs)
    mean, expected = batch_posterior(toy, start, toy.spread({"w": 0.7}), x, y)
    optimizer = new_filter(toy, rank=5, gain=gain)
    for sizes in SPLITS["uneven"]:
        take(optimizer, toy, x[: sum(sizes)], y[: sum(sizes)], sizes)
        x, y = x[sum(sizes) :], y[sum(sizes) :]
    close(toy.theta, mean)
    close(covariance(optimizer, toy), expected)


# -- diagonals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", ["joint", "memory"])
def test_diagonal_filter_is_the_diagonal_of_the_dense_update(gain):
    toy = two_layers(outputs=3)
    optimizer = new_filter(toy, CategoricalObservation(shift=False), memory="diagonal", gain=gain)
    m, precision = toy.theta, torch.full((len(toy.theta),), 0.7, dtype=F64)
    for x, labels in classification():
        score, information = softmax_evidence(toy, x, labels)
        whole = torch.diag(precision) + information
        precision = whole.diagonal().clone()
        m = m + (torch.linalg.solve(whole, score) if gain == "joint" else score / precision)
        take(optimizer, toy, x, labels)
        close(toy.theta, m)
        close(covariance(optimizer, toy), torch.diag(1 / precision))


@pytest.mark.parametrize("limit", [None, "max_decrease", "max_kl", "lr"])
def test_covariance_filter_is_the_textbook_update_in_joseph_form(limit):
    # Of a gain cut to s K the posterior is (I - s K H) P (I - s K H)^T + s^2 K R K^T, of which the diagonal is kept.
    toy, scales = two_layers(), []
    bounds = {"max_decrease": 0.01} if limit == "max_decrease" else {"max_kl": 0.01} if limit == "max_kl" else {}
    optimizer = new_filter(toy, memory="diagonal_covariance", trust_decay=0.0, **bounds)
    if limit == "lr":
        optimizer.param_groups[0]["lr"] = 0.4
    p, eye = torch.full((len(toy.theta),), 1 / 0.7, dtype=F64), torch.eye(len(toy.theta), dtype=F64)
    for step in range(5):
        x, y = rand(4, 5, seed=10 + step), rand(4, 2, seed=20 + step)
        h, e = toy.jacobian(x).flatten(0, 1), (y - toy(x).detach()).reshape(-1)
        r = NOISE * torch.eye(len(h), dtype=F64)
        gain = torch.diag(p) @ h.T @ torch.linalg.inv(h @ torch.diag(p) @ h.T + r)
        whole = gain @ e
        if limit == "max_decrease":
            loss = float(e.square().sum() / (2 * NOISE)) / 4  # but for a constant
            s = min(1.0, 0.01 * loss / float((h.T @ e / NOISE) @ whole / 4))
        elif limit == "max_kl":  # under all information so far, this batch's too
            gathered = torch.diag(1 / p - 0.7) + h.T @ h / NOISE
            s = min(1.0, (0.01 / float(whole @ gathered @ whole / (2 * 4 * (step + 1)))) ** 0.5)
        else:
            s = 0.4 if limit == "lr" else 1.0
        expected = toy.theta + s * whole
        left = eye - s * gain @ h
        p = (left @ torch.diag(p) @ left.T + s**2 * gain @ r @ gain.T).diagonal().clone()
        take(optimizer, toy, x, y)
        close(toy.theta, expected)
        close(covariance(optimizer, toy), torch.diag(p))
        scales.append(s)
    assert limit is None or min(scales) < 0.5


# -- the joint gain ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("rank", [2, 16])
def test_joint_gain_solves_with_the_memory_and_all_columns(memory, rank):
    toy = two_layers(outputs=3)
    options = {"memory": memory, "rank": rank, "gain": "joint", "block_limit": 13, "dense_limit": 4}
    optimizer = new_filter(toy, CategoricalObservation(shift=False), prior={"a": 0.5, "b": 2.0, "c": 8.0}, **options)
    for x, labels in classification():
        before, p = toy.theta, covariance(optimizer, toy)
        close(p, p.T)
        score, information = softmax_evidence(toy, x, labels)
        take(optimizer, toy, x, labels)
        close(toy.theta - before, torch.linalg.solve(torch.linalg.inv(p) + information, score))


# -- the iterated update -----------------------------------------------------------------------------------------------


def newton(objective, theta):
    """Minimum of a smooth function by damped Newton steps."""
    for _ in range(100):
        gradient, hessian = torch.func.grad(objective)(theta), torch.func.hessian(objective)(theta)
        values, vectors = torch.linalg.eigh(hessian)
        step = -vectors @ ((vectors.T @ gradient) / values.abs().clamp_min(1e-6))
        while objective(theta + step) > objective(theta) + 1e-12:
            step = step / 2
        theta = theta + step
        if gradient.norm() < 1e-11:
            return theta
    raise AssertionError("Newton's method did not converge.")


@pytest.mark.parametrize("kind", ["gaussian", "softmax"])
@pytest.mark.parametrize("memory", ["dense", "kronecker", "diagonal_covariance"])
def test_iterated_update_converges_to_the_posterior_mode(kind, memory):
    toy = two_layers(outputs=3)
    observation = CategoricalObservation(shift=False) if kind == "softmax" else GaussianObservation(NOISE)
    optimizer = new_filter(toy, observation, prior=4.0, memory=memory, gain="joint")
    for step in range(2):  # the second time from a prior that is not isotropic
        x = rand(3, 5, seed=30 + step)
        labels = torch.tensor([2, 0, 1])
        y = labels if kind == "softmax" else toy(x).detach() + 0.5 * rand(3, 3, seed=40 + step)
        mean, precision = toy.theta, torch.linalg.inv(covariance(optimizer, toy))

        def objective(theta, x=x, y=y, mean=mean, precision=precision):
            outputs = toy.at(theta, x)
            nll = (y - outputs).square().sum() / (2 * NOISE) if kind == "gaussian" else None
            if nll is None:
                nll = torch.nn.functional.cross_entropy(outputs, y, reduction="sum")
            return nll + (theta - mean) @ precision @ (theta - mean) / 2

        expected = newton(objective, mean)
        for _ in range(40):
            optimizer.observe(toy(x), y)
            optimizer.relinearise()
        take(optimizer, toy, x, y)
        close(toy.theta, expected, 1e-6)
        assert (expected - mean).norm() > 0.1
        if memory == "dense":  # the memory took the batch in once, at the last linearisation
            _, information = softmax_evidence(toy, x, y) if kind == "softmax" else gaussian_evidence(toy, x, y, NOISE)
            close(torch.linalg.inv(covariance(optimizer, toy)), precision + information, 1e-5)


def test_iterating_a_linear_update_changes_nothing():
    results = []
    for inner in (0, 1, 3):
        toy = linear()
        x, y = regression(toy)
        optimizer = new_filter(toy, memory="dense", gain="joint")
        for _ in range(inner):
            optimizer.observe(toy(x), y)
            optimizer.relinearise()
        take(optimizer, toy, x, y)
        results.append((toy.theta, covariance(optimizer, toy)))
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            close(a, b)


def test_relinearising_once_is_one_gauss_newton_step_more():
    toy = two_layers()
    optimizer = new_filter(toy, memory="dense", gain="joint")
    x, y = rand(3, 5, seed=1), rand(3, 2, seed=2)
    start, prior = toy.theta, 0.7 * torch.eye(len(toy.theta), dtype=F64)
    reference = two_layers()
    for _ in range(2):
        score, information = gaussian_evidence(reference, x, y, NOISE)
        moved = start + torch.linalg.solve(prior + information, score + information @ (reference.theta - start))
        for p, value in zip(reference.params.values(), _parts(reference, moved), strict=True):
            p.data.copy_(value)
    optimizer.observe(toy(x), y)
    optimizer.relinearise()
    take(optimizer, toy, x, y)
    close(toy.theta, reference.theta)


def _parts(toy: Toy, theta):
    sizes = [p.numel() for p in toy.params.values()]
    return [part.view(p.shape) for part, p in zip(theta.split(sizes), toy.params.values(), strict=True)]
