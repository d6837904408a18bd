"""Columns of information against the exact Gauss-Newton matrix, in float64."""

import pytest
import torch
from filtering import Toy, close, gaussian_evidence, linear, rand, softmax_evidence, two_layers

from kalman_peft import CategoricalObservation, GaussianObservation, LoKO
from kalman_peft.loko import MEMORIES
from kalman_peft.loko.memories import create_memories


PRIOR, NOISE = 1.0, 0.3


def recurrent():
    """A tiny causal language model, each output a function of all tokens so far."""

    def forward(p, x):
        mean = torch.tanh(x @ p["a"].mT).cumsum(-2) / torch.arange(1, x.shape[-2] + 1).view(-1, 1)
        return mean @ p["b"].mT

    return Toy({"a": (3, 4), "b": (5, 3)}, forward)


def information(toy, observation, x, labels, calls=1, **options):
    """What a dense filter gathers from one batch: the sum of c c^T over the columns."""
    options = {"damping": 0.0} | options
    optimizer = LoKO(
        toy.params.items(), observation, memory="dense", prior_precision=dict.fromkeys(toy.params, PRIOR),
        max_decrease=1e-12, gain="memory", **options,
    )  # fmt: skip
    before = toy.theta
    for part, own in zip(x.chunk(calls), labels.chunk(calls), strict=True):
        optimizer.observe(toy(part), own)
    optimizer.step()
    assert (toy.theta - before).norm() < 1e-3  # the model stays where it is
    precision = optimizer._memories[0].tensors["precision"][0]
    return precision - PRIOR * torch.eye(len(precision), dtype=precision.dtype)


def sequences(toy_labels=5):
    x = rand(3, 6, 4, seed=1)
    labels = torch.randint(0, toy_labels, (3, 6), generator=torch.Generator().manual_seed(2))
    labels[0, 3:] = -100  # of different lengths
    labels[2, :2] = -100
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], dim=1)
    return x, labels, shifted


CASES = {
    "tokens": (recurrent, CategoricalObservation(shift=True)),
    "classes": (lambda: two_layers(outputs=3), CategoricalObservation(shift=False)),
    "values": (two_layers, GaussianObservation(NOISE)),
}


def case(name):
    """A toy model, its observation, a batch, and the exact information of the batch."""
    make, observation = CASES[name]
    toy = make()
    if name == "tokens":
        x, labels, shifted = sequences()
        return toy, observation, x, labels, softmax_evidence(toy, x, shifted)[1]
    x = rand(4, 5, seed=3)
    if name == "classes":
        labels = torch.tensor([2, 0, -100, 1])
        return toy, observation, x, labels, softmax_evidence(toy, x, labels)[1]
    labels = rand(4, 2, seed=4)
    return toy, observation, x, labels, gaussian_evidence(toy, x, labels, NOISE)[1]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("calls", [1, 2])
def test_exact_columns_are_the_gauss_newton_matrix(name, calls):
    toy, observation, x, labels, expected = case(name)
    close(information(toy, observation, x, labels, calls, columns="exact"), expected)


@pytest.mark.parametrize(
    "name,columns,per_sequence",
    [
        ("tokens", "sampled", False), ("tokens", "rademacher", False), ("tokens", "sampled", True),
        ("classes", "sampled", True), ("classes", "rademacher", False), ("values", "rademacher", True),
        ("values", "sampled", False),
    ],
)  # fmt: skip
def test_drawn_columns_converge_to_it_at_the_root_of_their_number(name, columns, per_sequence):
    # One column for a batch squares a sum over all tokens of all its sequences: cross terms must vanish as well.
    toy, observation, x, labels, expected = case(name)

    def errors(number, seeds):
        found = [
            information(toy, observation, x, labels, columns=columns, per_sequence=per_sequence, num_columns=number,
                        max_columns=10**6, seed=seed)
            for seed in range(seeds)
        ]  # fmt: skip
        each = torch.stack([(f - expected).square().sum().sqrt() / expected.norm() for f in found])
        return float(each.square().mean().sqrt()), float((sum(found) / seeds - expected).norm() / expected.norm())

    few, _ = errors(8, 24)
    many, bias = errors(128, 6)
    assert 2.6 < few / many < 6.0  # 4 = sqrt(128 / 8)
    assert bias < 2.5 * many / 6**0.5  # the mean of six has an error sqrt(6) times smaller
    assert many < 0.35


@pytest.mark.parametrize("calls", [1, 2])
def test_draws_do_not_depend_on_how_a_batch_is_split(calls):
    toy, observation, x, labels, _ = case("classes")
    found = [
        information(toy, observation, x, labels, n, columns="sampled", per_sequence=False, num_columns=3)
        for n in (1, calls, 4)
    ]
    close(found[1], found[0])
    close(found[2], found[0])


def test_folded_columns_keep_the_expected_information():
    toy, observation, x, labels, expected = case("classes")
    found = torch.stack([
        information(toy, observation, x, labels, columns="exact", max_columns=2, seed=seed) for seed in range(150)
    ])  # fmt: skip
    assert torch.linalg.matrix_rank(expected, rtol=1e-9) > 2
    assert all(torch.linalg.matrix_rank(f, rtol=1e-9) == 2 for f in found[:5])
    spread = (found - expected).square().sum((1, 2)).mean().sqrt()
    assert spread > 0.1 * expected.norm()
    assert (found.mean(0) - expected).norm() < 2.5 * spread / 150**0.5


def test_top_k_columns_never_tell_more_than_the_exact_ones():
    toy, observation, x, labels, expected = case("tokens")
    previous = torch.zeros_like(expected)
    for k in (1, 2, 3, 4):
        found = information(toy, observation, x, labels, columns="exact", top_k=k)
        assert torch.linalg.eigvalsh(expected - found).min() > -1e-9
        assert found.trace() > previous.trace()
        previous = found
    close(previous, expected)


def test_damping_adds_to_the_curvature_of_the_logits():
    toy, observation, x, labels, expected = case("classes")
    jacobian = toy.jacobian(x)[labels >= 0]
    differences = (jacobian - jacobian.mean(1, keepdim=True)).flatten(0, 1)
    damped = expected + 0.8 / (jacobian.shape[1] - 1) * differences.T @ differences
    close(information(toy, observation, x, labels, columns="exact", damping=0.8), damped)
    drawn = information(
        toy, observation, x, labels, columns="sampled", damping=0.8, num_columns=1000, per_sequence=False
    )
    assert (drawn - damped).norm() < 0.15 * damped.norm()
    assert (expected - damped).norm() > 0.3 * damped.norm()


@pytest.mark.parametrize("memory", MEMORIES)
def test_draws_from_the_belief_have_its_covariance(memory):
    toy = linear(outputs=3, inputs=4)
    (found, *_others) = memories = create_memories(
        list(toy.params.items()), memory, rank=2, dense_limit=128, block_limit=1024
    )
    generator = torch.Generator().manual_seed(0)
    for m in memories:
        m.set_prior(torch.full((len(m.view.params),), 0.5, dtype=torch.float64))
    if memory == "diagonal_covariance":
        found.add_diagonal(rand(*found.view.shape, seed=1).exp())
    else:
        found.update(rand(4, *found.view.shape, seed=1))
    size = found.view.shape.numel()
    draws = torch.stack([found.sample(generator).reshape(-1) for _ in range(2000)])
    p = found.gain(torch.eye(size, dtype=torch.float64).view(-1, *found.view.shape)).reshape(size, size)
    root = torch.linalg.cholesky(torch.linalg.inv(p))
    white = draws @ root  # of unit covariance
    error = (white.T @ white / len(draws) - torch.eye(size, dtype=torch.float64)).norm()
    assert error < 1.3 * size / len(draws) ** 0.5
    assert white.mean(0).norm() < 2 * (size / len(draws)) ** 0.5
