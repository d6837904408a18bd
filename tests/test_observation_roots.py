"""Square roots, damping and weights of observations against dense matrices in float64, and the rows' random numbers."""

import math

import pytest
import torch

from kalman_peft import CategoricalObservation, GaussianObservation, LikelihoodObservation
from kalman_peft.sampling import RowRandom


F64 = torch.float64
CATEGORICAL = CategoricalObservation(shift=False)


def probabilities():
    """Rows of ordinary, extreme and degenerate probabilities over six labels."""
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.randn(4, 6, generator=generator, dtype=F64).mul(2).softmax(-1)
    special = torch.tensor(
        [
            [0.0, 0.5, 0.0, 0.3, 0.2, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
            [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [1 - 3e-13, 1e-13, 1e-13, 1e-13, 0.0, 0.0],
            [1e-13, 1e-300, 1e-13, 1 - 2e-13, 0.0, 1e-310],
        ],
        dtype=F64,
    )
    return torch.cat([ordinary, special])


CENTRED = torch.eye(6, dtype=F64) - 1 / 6  # what damping adds: on differences of logits


def curvature(p):
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def labels_of(p, seed=1):
    return torch.multinomial(p, 1, generator=torch.Generator().manual_seed(seed))[:, 0]


@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_categorical_roots_are_the_damped_curvature(damping):
    p = probabilities()
    roots = CATEGORICAL.roots(p, labels_of(p), damping)
    assert roots.shape == (len(p), 5, 6) and torch.isfinite(roots).all()
    expected = curvature(p) + damping * CENTRED
    torch.testing.assert_close(roots.mT @ roots, expected, rtol=1e-10, atol=1e-14)


def test_categorical_roots_survive_underflow_in_float32():
    logits = torch.tensor([[0.0, -50.0, -90.0, -200.0], [-60.0, 0.0, -95.0, 0.0], [-200.0, -90.0, -50.0, 0.0]])
    p = logits.softmax(-1)
    roots = CATEGORICAL.roots(p, torch.zeros(3).long()).double()
    exact = logits.double().softmax(-1)
    torch.testing.assert_close(roots.mT @ roots, curvature(exact), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 4, 5, 9])
def test_top_k_tells_less_and_singles_out_the_label(top_k):
    p = probabilities()[:5]
    targets = p.argmin(-1)  # the last that the k likeliest would hold
    targets[4] = 3
    roots = CATEGORICAL.roots(p, targets, top_k=top_k)
    assert roots.shape == (5, min(top_k, 5), 6)
    coarse, full = roots.mT @ roots, curvature(p)
    assert torch.linalg.eigvalsh(full - coarse).min() > -1e-12
    if top_k >= 5:
        torch.testing.assert_close(coarse, full)
    else:
        assert (full - coarse).diagonal(dim1=1, dim2=2).sum(-1).max() > 1e-3
    # The score onehot - p of the label is one of the coarse model's own, whose covariance at the label is 1/p - 1.
    e = torch.nn.functional.one_hot(targets, 6).double() - p
    solved = torch.linalg.lstsq(coarse, e[..., None], driver="gelsd").solution[..., 0]
    torch.testing.assert_close((coarse @ solved[..., None])[..., 0], e, rtol=1e-8, atol=1e-10)
    own = p.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close((e * solved).sum(-1), 1 / own - 1)


def test_top_k_with_damping():
    p = probabilities()[:5]
    targets = labels_of(p)
    coarse, damped = (CATEGORICAL.roots(p, targets, d, top_k=2) for d in (0.0, 0.1))
    assert damped.shape == coarse.shape
    for n in range(5):  # differences between two labels and any other, the latter as its labels share it
        chosen = p[n].scatter(0, targets[n : n + 1], 2.0).topk(2).indices
        groups = torch.zeros(3, 6, dtype=F64)
        groups[[0, 1], chosen] = 1.0
        groups[2] = p[n].scatter(0, chosen, 0.0) / p[n].scatter(0, chosen, 0.0).sum()
        added = groups.mT @ (torch.eye(3, dtype=F64) - 1 / 3) @ groups
        torch.testing.assert_close(
            damped[n].mT @ damped[n], coarse[n].mT @ coarse[n] + 0.1 * added, rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_softened_residuals_and_surprises_solve_with_the_damped_curvature(damping):
    p = probabilities()
    targets = labels_of(p)
    x = torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    h = curvature(p)
    damped = h + damping * torch.eye(6, dtype=F64)
    before = p.clone()
    torch.testing.assert_close(
        CATEGORICAL.soften(p, x, damping),
        (h @ torch.linalg.solve(damped, x[..., None]))[..., 0],
        rtol=1e-8,
        atol=1e-10,
    )
    e = torch.nn.functional.one_hot(targets, 6).double() - p
    torch.testing.assert_close(
        CATEGORICAL.surprise(p, targets, damping), (e * torch.linalg.solve(damped, e)).sum(-1), rtol=1e-8, atol=1e-10
    )
    assert torch.equal(p, before)
    assert torch.equal(CATEGORICAL.soften(p, x, 0.0), x)


def test_roots_and_surprise_of_a_gaussian():
    outputs, targets = torch.zeros(3, 2, dtype=F64), torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]], dtype=F64)
    observation = GaussianObservation(0.25)
    roots = observation.roots(outputs, targets)
    torch.testing.assert_close(roots.mT @ roots, (torch.eye(2, dtype=F64) * 4).expand(3, 2, 2))
    torch.testing.assert_close(observation.surprise(outputs, targets, 0.7), torch.tensor([20.0, 0.0, 36.0], dtype=F64))


def poisson(outputs, counts):
    return (outputs.exp() - counts * outputs).sum(-1)


def several_labels(outputs, labels):
    return torch.nn.functional.binary_cross_entropy_with_logits(outputs, labels, reduction="none").sum(-1)


def student(outputs, y):
    return (2.5 * torch.log1p((outputs - y).square() / 4)).sum(-1)


def likelihood_rows(name):
    generator = torch.Generator().manual_seed(3)
    width = 1 if name == "poisson" else 4
    outputs = torch.randn(5, width, generator=generator, dtype=F64)
    if name == "poisson":
        return poisson, outputs, torch.randint(0, 6, (5, 1), generator=generator).double()
    if name == "bernoulli":
        return several_labels, outputs, torch.randint(0, 2, (5, 4), generator=generator).double()
    return student, outputs, 4 * torch.randn(5, 4, generator=generator, dtype=F64)


@pytest.mark.parametrize("name", ["poisson", "bernoulli", "student"])
def test_any_likelihood_has_its_gradient_and_positive_hessian(name):
    function, outputs, targets = likelihood_rows(name)
    observation, width = LikelihoodObservation(function), outputs.shape[1]
    rows = torch.tensor([0, 1, 3, 4, 5])
    out = torch.zeros(6, width, dtype=F64)
    observation.residual(observation.expect(outputs), targets, out, rows)
    roots = observation.roots(outputs, targets, 0.01)
    negative = False
    for n, row in enumerate(rows):
        z = outputs[n].clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(function(z[None], targets[n : n + 1]).sum(), z)
        torch.testing.assert_close(out[row], gradient)
        hessian = torch.autograd.functional.hessian(
            lambda z, n=n: function(z[None], targets[n : n + 1]).sum(), outputs[n]
        )
        values, vectors = torch.linalg.eigh(hessian)
        negative |= bool(values[0] < 0)
        expected = vectors @ torch.diag(values.clamp_min(0) + 0.01) @ vectors.T
        torch.testing.assert_close(roots[n].T @ roots[n], expected)
    assert out[2].abs().max() == 0
    assert negative == (name == "student")
    torch.testing.assert_close(observation.loss(outputs, outputs, targets), function(outputs, targets))


def test_random_roots_of_a_likelihood_have_its_curvature():
    function, outputs, targets = likelihood_rows("bernoulli")
    n = 20_000
    drawn = LikelihoodObservation(function).random_root(
        outputs[:1].expand(n, -1), targets[:1].expand(n, -1), RowRandom(torch.arange(n), 0)
    )
    p = outputs[0].sigmoid()
    check_second_moment(drawn, torch.diag(p * (1 - p)))


def check_second_moment(drawn, expected):
    """Each entry within 4.5 standard errors."""
    products = drawn[:, :, None] * drawn[:, None, :]
    error = products.std(0) / len(drawn) ** 0.5
    assert ((products.mean(0) - expected).abs() <= 4.5 * error + 1e-9).all()


def test_labels_that_do_not_count_in_a_likelihood():
    observation = LikelihoodObservation(poisson)
    assert observation.observed(torch.tensor([3, -100, 0])).tolist() == [True, False, True]
    assert observation.observed(torch.tensor([[3, 1], [-100, 2]])).tolist() == [True, False]
    assert observation.observed(torch.tensor([-100.0, 1.0])).all()
    assert observation.targets(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)).shape == (6, 5)


def test_raises_when_an_observation_is_misused():
    p, y = torch.full((1, 4), 0.25), torch.zeros(1).long()
    likelihood, gaussian = LikelihoodObservation(poisson), GaussianObservation()
    for wrong, match in [
        (lambda: likelihood.draw(p), r"LikelihoodObservation; use columns='exact', 'rademacher'"),
        (lambda: likelihood.root(p, p), "fisher='empirical'"),
        (
            lambda: likelihood.roots(p, p, top_k=2),
            "top_k=2 needs a categorical observation, got LikelihoodObservation",
        ),
        (lambda: gaussian.roots(p, p, top_k=2), "top_k=2 needs a categorical observation, got GaussianObservation"),
        (lambda: likelihood.surprise(p, p, 0.1), "outlier_threshold is not supported for LikelihoodObservation"),
        (lambda: likelihood.soften(p, p, 0.1), "form='softmax' needs a categorical observation, got Likelihood"),
        (lambda: gaussian.soften(p, p, 0.1), "form='softmax' needs a categorical observation, got Gaussian"),
        (lambda: likelihood.roots(torch.zeros(1, 513), torch.zeros(1, 513)), "up to 512 outputs, got 513"),
        (lambda: likelihood.targets(torch.zeros(2, 4), torch.zeros(3, 4)), "do not fit outputs"),
        (lambda: LikelihoodObservation(lambda z, y: z.sum()).loss(p, p, y), "not one value per row"),
    ]:
        with pytest.raises(ValueError, match=match):
            wrong()


def test_uniform_numbers_are_uniform_and_independent():
    u = RowRandom(torch.arange(20_000), 5).uniform(6)
    assert u.dtype == F64 and u.min() >= 0 and u.max() < 1
    for column in u.T:  # Kolmogorov-Smirnov, level 1e-6
        distance = (column.sort().values - (torch.arange(20_000) + 0.5) / 20_000).abs().max()
        assert distance < 2.7 / 20_000**0.5
    centred = (u - 0.5) * 12**0.5
    check_second_moment(centred, torch.eye(6, dtype=F64))
    neighbours = torch.stack([centred[:-1, 0], centred[1:, 0]], dim=1)
    check_second_moment(neighbours, torch.eye(2, dtype=F64))
    seeds = [RowRandom(torch.arange(20_000), seed).uniform(1)[:, 0] for seed in (0, 1, 2, 2**40)]
    check_second_moment((torch.stack(seeds, dim=1) - 0.5) * 12**0.5, torch.eye(4, dtype=F64))


def test_normal_numbers_and_signs_have_their_moments():
    x = RowRandom(torch.arange(20_000) * 2**20, 1).normal(3)
    check_second_moment(x, torch.eye(3, dtype=F64))
    assert (x.mean(0).abs() < 4.5 / 20_000**0.5).all()
    assert ((x**4).mean(0) - 3).abs().max() < 4.5 * (96 / 20_000) ** 0.5
    inside = (x.abs() < 1).double().mean(0)
    assert (inside - math.erf(0.5**0.5)).abs().max() < 4.5 * 0.5 / 20_000**0.5
    signs = RowRandom(torch.arange(20_000), 1).signs(70)
    assert signs.shape == (20_000, 70) and signs.abs().eq(1).all()
    second = signs.double().T @ signs.double() / 20_000
    assert (second - torch.eye(70)).abs().max() < 5.5 / 20_000**0.5
    assert signs.double().mean(0).abs().max() < 5 / 20_000**0.5


def test_numbers_belong_to_their_row():
    keys = torch.randint(0, 2**40, (50,), generator=torch.Generator().manual_seed(0))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    whole, turned = RowRandom(keys, 7), RowRandom(keys[order], 7)
    for draw in ("words", "uniform", "signs", "normal"):
        assert torch.equal(getattr(whole, draw)(5)[order], getattr(turned, draw)(5))
        assert torch.equal(getattr(whole, draw)(5)[3:9], getattr(RowRandom(keys[3:9], 7), draw)(5))
    assert not torch.equal(whole.words(5), RowRandom(keys, 8).words(5))
    assert len(set(whole.words(5).flatten().tolist())) == 250
