"""mode="paper" against its own formulas, step by step, in float64."""

import pytest
import torch
from filtering import F64, close, covariance, linear, rand, two_layers

from kalman_peft import CategoricalObservation, GaussianObservation, LoKO
from kalman_peft.loko.paper import whiten


BETA = 0.9


def naive_step(state, h, e):
    """LoKO's formulas for a batch of rows h (B, C, D) and residuals e (B, C), with S inverted where it is not zero."""
    theta, p, r = state
    batch, outputs, _ = h.shape
    estimate = sum(torch.outer(e[b], e[b]) + h[b] @ torch.diag(p) @ h[b].T for b in range(batch)) / batch
    r = estimate if r is None else BETA * r + (1 - BETA) * estimate
    stacked = h.reshape(batch * outputs, -1)
    s = stacked @ torch.diag(p) @ stacked.T + torch.kron(torch.eye(batch, dtype=F64), r)
    gain = torch.diag(p) @ stacked.T @ torch.linalg.pinv(s, rtol=1e-9, hermitian=True)
    p_new = ((torch.eye(len(p), dtype=F64) - gain @ stacked) @ torch.diag(p)).diagonal().clone()
    return theta + gain @ e.reshape(-1), p_new, r


def evidence(toy, x, labels, kind):
    jacobian, outputs = toy.jacobian(x), toy(x).detach()
    if kind == "gaussian":
        return jacobian, labels - outputs
    q = outputs.softmax(-1)
    middle = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
    return middle @ jacobian, torch.nn.functional.one_hot(labels, q.shape[-1]) - q


@pytest.mark.parametrize("model", [two_layers, linear], ids=["two layers", "linear"])
@pytest.mark.parametrize("kind", ["softmax", "gaussian"])
@pytest.mark.parametrize("sizes", [[1], [4], [2, 1]], ids=["one", "stacked", "accumulated"])
def test_paper_mode_follows_the_published_formulas(model, kind, sizes):
    toy = model(outputs=3, inputs=5)
    observation = CategoricalObservation(shift=False) if kind == "softmax" else GaussianObservation()
    optimizer = LoKO(toy.params.items(), observation, mode="paper", noise_decay=BETA, initial_bound=0.5, seed=3)
    p = covariance(optimizer, toy).diagonal().clone()
    assert p.min() > 0 and p.max() < 0.5 and p.std() > 0.1
    state, first = (toy.theta, p, None), p
    for t in range(6):
        x = rand(sum(sizes), 5, seed=t)
        labels = torch.tensor([2, 0, 1, 1])[: len(x)] if kind == "softmax" else rand(len(x), 3, seed=t + 50)
        state = naive_step(state, *evidence(toy, x, labels, kind))
        for part, y in zip(x.split(sizes), labels.split(sizes), strict=True):
            optimizer.observe(toy(part), y)
        optimizer.step()
        close(toy.theta, state[0], 1e-7)
        close(covariance(optimizer, toy), torch.diag(state[1]), 1e-7)
        found = optimizer.state[next(iter(toy.params.values()))]["observation_noise"]
        close(found, state[2], 1e-7)
    assert (state[1] < first).any() and (state[0] - model(outputs=3, inputs=5).theta).norm() > 0.05


def test_whitened_rows_and_residuals_give_the_textbook_s_gain():
    noise = torch.diag(torch.tensor([0.5, 2.0, 1.0], dtype=F64)) + 0.1
    h, e = rand(6, 4, seed=1), rand(2, 3, seed=2)
    (score,), (columns,) = whiten(noise, [h], e)
    r = torch.kron(torch.eye(2, dtype=F64), noise)
    close(score, h.T @ torch.linalg.solve(r, e.reshape(-1)))
    close(columns.T @ columns, h.T @ torch.linalg.solve(r, h))


def test_paper_mode_skips_masked_labels():
    moved = []
    for masked in (False, True):
        toy = linear(outputs=3, inputs=5)
        optimizer = LoKO(toy.params.items(), CategoricalObservation(shift=False), mode="paper", initial_bound=0.5)
        x, labels = rand(4, 5, seed=1), torch.tensor([2, 0, 1, 1])
        if masked:
            x, labels = torch.cat([x, rand(2, 5, seed=2)]), torch.cat([labels, torch.tensor([-100, -100])])
            optimizer.observe(toy(x[4:]), labels[4:])
        optimizer.observe(toy(x), labels)
        optimizer.step()
        moved.append(toy.theta)
    close(moved[1], moved[0])
