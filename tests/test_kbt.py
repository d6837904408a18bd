"""Kalman Bayesian networks: moments against quadrature and sampling, updates against Kalman, RLS and KBNN's own form."""

import copy
import json
import math
from typing import cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kalman_peft.kbt import KalmanFeedforward, Moments, softmax_moments
from kalman_peft.kbt.layers import layer_moments
from kalman_peft.kbt.moments import activation_moments, attention_moments, known, relu_moments
from kalman_peft.kbt.rows import RowGaussian


F64 = torch.float64


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def integrate(f, mu, sigma, points=400_001):
    """E f(x) for x ~ N(mu, sigma^2): the trapezoidal rule over 12 standard deviations."""
    x = torch.linspace(-12, 12, points, dtype=F64)
    weights = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    return torch.trapezoid(f(mu + sigma * x) * weights, x)


def network(*widths, seed=0, act=nn.ReLU, **options):
    torch.manual_seed(seed)
    layers = []
    for i in range(len(widths) - 1):
        layers += [nn.Linear(widths[i], widths[i + 1])] + ([act()] if i < len(widths) - 2 else [])
    model = nn.Sequential(*layers).double()
    return KalmanFeedforward(model, options.pop("variance", 0.5), **options)


# -- moments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [-3.0, -0.4, 0.0, 0.7, 5.0])
@pytest.mark.parametrize("sigma", [0.1, 1.0, 2.5])
def test_relu_moments_are_exact(mu, sigma):
    mean = torch.tensor(mu, dtype=F64, requires_grad=True)
    found = relu_moments(Moments(mean, torch.tensor(sigma**2, dtype=F64)))
    first, second = integrate(F.relu, mu, sigma), integrate(lambda x: F.relu(x).square(), mu, sigma)
    torch.testing.assert_close(found.mean.detach(), first, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.variance, second - first**2, rtol=1e-7, atol=1e-8)
    # The slope is the smoother's Cov(x, f) / Var x.
    covariance = integrate(lambda x: (x - mu) * F.relu(x), mu, sigma)
    slope = torch.autograd.grad(found.mean, mean)[0]
    torch.testing.assert_close(slope, covariance / sigma**2, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("function", [F.gelu, torch.tanh, F.silu])
def test_activation_moments_by_quadrature(function):
    for mu, sigma in ((-1.0, 0.5), (0.3, 0.8), (2.0, 0.2)):
        mean = torch.tensor([mu], dtype=F64, requires_grad=True)
        found = activation_moments(Moments(mean, torch.tensor([sigma**2], dtype=F64)), function)
        first = integrate(function, mu, sigma)
        second = integrate(lambda x, f=function: f(x).square(), mu, sigma)
        torch.testing.assert_close(found.mean.detach()[0], first, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found.variance[0], second - first**2, rtol=1e-6, atol=1e-8)
        covariance = integrate(lambda x, f=function, m=mu: (x - m) * f(x), mu, sigma)
        slope = torch.autograd.grad(found.mean.sum(), mean)[0][0]
        torch.testing.assert_close(slope, covariance / sigma**2, rtol=1e-6, atol=1e-7)


def test_gelu_mean_is_the_closed_form():
    mu, v = normal(9), normal(9, seed=1).square()
    c = mu / (1 + v).sqrt()
    density = (-c.square() / 2).exp() / math.sqrt(2 * math.pi)
    expected = mu * torch.special.ndtr(c) + v / (1 + v).sqrt() * density
    torch.testing.assert_close(activation_moments(Moments(mu, v), F.gelu).mean, expected, rtol=1e-7, atol=1e-7)


def test_softmax_corrections_are_half_the_second_derivatives():
    z, v = normal(5), 1e-3 * normal(5, seed=1).square()
    found = softmax_moments(Moments(z, v))
    step, p = 1e-4, z.softmax(-1)
    first, second = torch.zeros(5, 5, dtype=F64), torch.zeros(5, 5, dtype=F64)  # by input j, output i
    for j in range(5):
        d = torch.zeros(5, dtype=F64)
        d[j] = step
        up, down = (z + d).softmax(-1), (z - d).softmax(-1)
        first[j], second[j] = (up - down) / (2 * step), (up - 2 * p + down) / step**2
    torch.testing.assert_close(found.mean, p + (v[:, None] * second).sum(0) / 2, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.variance, (v[:, None] * first.square()).sum(0), rtol=1e-7, atol=1e-12)
    assert found.mean.sum() == pytest.approx(1.0, abs=1e-14)


def test_softmax_moments_against_sampling():
    z, v = normal(4), 0.05 * (1 + normal(4, seed=1).square())
    draws = (z + v.sqrt() * normal(400_000, 4, seed=2)).softmax(-1)
    found = softmax_moments(Moments(z, v))
    gain = (draws.mean(0) - z.softmax(-1)).abs()
    assert ((found.mean - draws.mean(0)).abs() < 0.15 * gain + 3e-4).all()
    torch.testing.assert_close(found.variance, draws.var(0), rtol=0.12, atol=1e-4)


def test_softmax_means_stay_probabilities_for_huge_variances():
    z, v = normal(200, 6, scale=3), 100 * normal(200, 6, seed=1).square()
    mean = softmax_moments(Moments(z, v)).mean
    assert (mean > 0).all()
    torch.testing.assert_close(mean.sum(-1), torch.ones(200, dtype=F64), rtol=1e-12, atol=1e-12)


def test_attention_variance_against_sampling():
    scale = 0.02
    q, k, v = (Moments(normal(3, 4, seed=s), scale * (0.5 + normal(3, 4, seed=s + 9).square())) for s in range(3))
    mask = torch.full((3, 3), -1e30, dtype=F64).triu(1)
    found = attention_moments(q, k, v, 0.5, mask)
    n = 40_000
    draws = [m.mean + m.variance.sqrt() * normal(n, 3, 4, seed=20 + i) for i, m in enumerate((q, k, v))]
    out = (draws[0] @ draws[1].mT * 0.5 + mask).softmax(-1) @ draws[2]
    # Scores that share a query or a key count as independent: their covariance is what is left out.
    ratio = found.variance / out.var(0)
    assert (ratio > 0.6).all() and (ratio < 1.6).all() and (found.variance[0] / v.variance[0] - 1).abs().max() < 1e-12
    assert (found.mean - out.mean(0)).abs().max() < 0.02


def test_linear_layer_moments_are_exact():
    layer = nn.Linear(3, 2).double()
    gaussian = RowGaussian(layer.weight, layer.bias, 0.3)
    gaussian.factor = normal(2, 4, 4, seed=3, scale=0.4)
    x = Moments(normal(5, 3), normal(5, 3, seed=1).square())
    found = layer_moments(layer, x, gaussian)
    n = 300_000
    rows = gaussian.rows() + torch.einsum("nij,snj->sni", gaussian.factor, normal(n, 2, 4, seed=4))
    z = x.mean[0] + x.variance[0].sqrt() * normal(n, 3, seed=5)
    out = torch.einsum("sni,si->sn", rows, torch.cat([z, torch.ones(n, 1, dtype=F64)], 1))
    torch.testing.assert_close(found.variance[0], out.var(0), rtol=0.02, atol=0)
    torch.testing.assert_close(found.mean[0].detach(), out.mean(0), rtol=0, atol=0.02)


# -- updates -------------------------------------------------------------------------------------------------------


def test_a_linear_neuron_is_updated_as_by_kalman():
    net = network(3, 1, noise=0.4)
    gaussian = net.gaussians["0"]
    gaussian.factor = normal(1, 4, 4, seed=3)
    w, c = gaussian.rows()[0], gaussian.covariance()[0]
    x, y = normal(1, 3, seed=1), normal(1, 1, seed=2)
    h = torch.cat([x[0], torch.ones(1, dtype=F64)])
    gain = c @ h / (h @ c @ h + 0.4)
    seen = net.update({"x": x}, y)
    torch.testing.assert_close(gaussian.rows()[0], w + gain * (y[0, 0] - h @ w), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(gaussian.covariance()[0], c - torch.outer(gain, h @ c), rtol=1e-8, atol=1e-8)
    assert seen["innovation"] == pytest.approx(float((y[0, 0] - h @ w) ** 2 / (h @ c @ h + 0.4)))


@pytest.mark.parametrize("sequential", [True, False])
def test_one_linear_layer_over_a_stream_is_recursive_least_squares(sequential):
    net = network(4, 3, noise=0.2, variance=2.0)
    start = net.gaussians["0"].rows()
    x, y = normal(30, 4, seed=1), normal(30, 3, seed=2)
    for i in range(0, 30, 6):
        net.update({"x": x[i : i + 6]}, y[i : i + 6], sequential=sequential)
    h = torch.cat([x, torch.ones(30, 1, dtype=F64)], 1)
    precision = torch.eye(5, dtype=F64) / (2.0 / 5) + h.T @ h / 0.2
    mean = torch.linalg.solve(precision, start.T / (2.0 / 5) + h.T @ y / 0.2).T
    torch.testing.assert_close(net.gaussians["0"].rows(), mean, rtol=1e-8, atol=1e-8)
    covariance = torch.linalg.inv(precision).expand(3, 5, 5)
    torch.testing.assert_close(net.gaussians["0"].covariance(), covariance, rtol=1e-8, atol=1e-8)


def test_positions_that_share_a_neuron_are_updated_together():
    # One output that sums three positions of one neuron: a Kalman update with the sum of the inputs.
    class Summed(KalmanFeedforward):
        def forward(self, inputs):
            found = super().forward({"x": inputs["x"]})
            return Moments(found.mean.sum(1), found.variance.sum(1))

    torch.manual_seed(0)
    net = Summed(nn.Sequential(nn.Linear(3, 1, bias=False)).double(), 0.9, noise=1e-4)
    x, y = 1 + 0.1 * normal(1, 3, 3), torch.tensor([[2.0]], dtype=F64)
    w, h = net.gaussians["0"].rows()[0], x[0].sum(0)
    gain = 0.3 * h / (0.3 * h @ h + 1e-4)
    net.update({"x": x}, y)
    torch.testing.assert_close(net.gaussians["0"].rows()[0], w + gain * (2.0 - h @ w), rtol=1e-8, atol=1e-8)
    assert torch.linalg.eigvalsh(net.gaussians["0"].covariance()).min() > 0


def kbnn(rows, covariances, x, y, noise):
    """The published recursion for layers of linear neurons and ReLUs, position by position as its equations stand."""
    z, v, tape = x, torch.zeros_like(x), []
    for layer, (w, c) in enumerate(zip(rows, covariances, strict=True)):
        z1 = torch.cat([z, torch.ones(1, dtype=F64)])
        v1 = torch.cat([v, torch.zeros(1, dtype=F64)])
        a = w @ z1
        s = torch.einsum("i,nij,j->n", z1, c, z1) + (w.square() + c.diagonal(dim1=1, dim2=2)) @ v1
        tape.append((z1, v1, a, s))
        if layer < len(rows) - 1:
            t = a / s.sqrt()
            below, density = torch.special.ndtr(t), (-t.square() / 2).exp() / math.sqrt(2 * math.pi)
            z = a * below + s.sqrt() * density
            v = (a.square() + s) * below + a * s.sqrt() * density - z.square()
    new_rows, new_covariances = [], []
    # Output: y ~ N(a, noise).
    k = tape[-1][3] / (tape[-1][3] + noise)
    mean, variance = tape[-1][2] + k * (y - tape[-1][2]), tape[-1][3] - k * tape[-1][3]  # of a
    for layer in reversed(range(len(rows))):
        w, c = rows[layer], covariances[layer]
        z1, v1, a, s = tape[layer]
        pull = torch.einsum("nij,j->ni", c, z1) / s[:, None]  # L_w
        new_rows.insert(0, w + pull * (mean - a)[:, None])
        new_covariances.insert(0, c + pull[:, :, None] * pull[:, None, :] * (variance - s)[:, None, None])
        if layer:
            gains = (v1 * w / s[:, None])[:, :-1]  # Cov(z, a) / Var a, (N, d)
            z_mean = z1[:-1] + gains.T @ (mean - a)
            z_variance = v1[:-1] + gains.square().T @ (variance - s)
            _, _, a, s = tape[layer - 1]
            t = a / s.sqrt()
            k = s * torch.special.ndtr(t) / v1[:-1]  # Cov(a, z') / Var z'
            mean, variance = a + k * (z_mean - z1[:-1]), s + k.square() * (z_variance - v1[:-1])
    return new_rows, new_covariances


@pytest.mark.parametrize("widths", [(3, 1), (3, 5, 1), (3, 4, 5, 1), (2, 3, 3, 3, 1)])
def test_feedforward_updates_are_those_of_kbnn(widths):
    net = network(*widths, noise=0.3, variance=0.8)
    for i in range(3):  # unlike covariances
        net.update({"x": normal(1, widths[0], seed=10 + i)}, normal(1, 1, seed=20 + i))
    rows = [g.rows() for g in net.gaussians.values()]
    covariances = [g.covariance() for g in net.gaussians.values()]
    x, y = normal(1, widths[0], seed=1), normal(1, 1, seed=2)
    expected, spreads = kbnn(rows, covariances, x[0], y[0], 0.3)
    net.update({"x": x}, y)
    for index, gaussian in enumerate(net.gaussians.values()):
        torch.testing.assert_close(gaussian.rows(), expected[index], rtol=1e-8, atol=1e-8)
        if index >= len(rows) - 2:  # before that KBNN takes the messages of several neurons as independent
            torch.testing.assert_close(gaussian.covariance(), spreads[index], rtol=1e-8, atol=1e-8)


def test_categorical_update_is_the_extended_kalman_filter_for_small_variances():
    # Information form: C+^-1 = C^-1 + G^T H G with H = diag(p) - p p^T, w+ = w + C+ G^T (y - p), one neuron at a time.
    net = network(3, 3, variance=1e-5, likelihood="categorical", damping=0.0)
    gaussian = net.gaussians["0"]
    w, c = gaussian.rows(), gaussian.covariance()
    x = normal(1, 3, seed=1)
    h = torch.cat([x[0], torch.ones(1, dtype=F64)])
    p = (w @ h).softmax(-1)
    dense = torch.block_diag(*c)
    slopes = torch.kron(torch.eye(3, dtype=F64), h[None])  # of the logits, (3, 12)
    information = slopes.T @ (torch.diag(p) - torch.outer(p, p)) @ slopes
    after = torch.linalg.inv(torch.linalg.inv(dense) + information)
    step = (after @ slopes.T @ (F.one_hot(torch.tensor(2), 3).double() - p)).reshape(3, 4)
    net.update({"x": x}, torch.tensor([2]))
    torch.testing.assert_close(gaussian.rows() - w, step, rtol=1e-4, atol=1e-12)
    for n in range(3):
        block = after[4 * n : 4 * n + 4, 4 * n : 4 * n + 4]
        torch.testing.assert_close(gaussian.covariance()[n] - c[n], block - c[n], rtol=1e-4, atol=1e-15)


def test_categorical_learning_separates_classes():
    net = network(2, 8, 3, likelihood="categorical", variance=1.0)
    angle = 2 * math.pi * torch.arange(90) / 90
    x, y = torch.stack([angle.cos(), angle.sin()], 1).double(), torch.arange(90) * 3 // 90
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    net.update({"x": x[order]}, y[order])
    found = net.predict({"x": x})
    assert (found.mean.argmax(-1) == y).double().mean() > 0.85
    torch.testing.assert_close(found.mean.sum(-1), torch.ones(90, dtype=F64))


def test_which_class_is_left_out_does_not_matter():
    x = normal(1, 3, seed=1)
    ends = []
    for order in (torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1])):
        net = network(3, 3, likelihood="categorical", variance=0.7)
        gaussian = net.gaussians["0"]
        gaussian.write(gaussian.rows()[order], gaussian.factor)
        net.update({"x": x}, torch.tensor([int((order == 1).nonzero())]))
        ends.append(net.gaussians["0"].rows()[order.argsort()])
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.Tanh])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_without_variance_the_network_is_itself_bit_for_bit(act, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.LayerNorm(7), act(), nn.Linear(7, 3)).to(dtype)
    net = KalmanFeedforward(model, 0.0)
    x = normal(9, 4).to(dtype)
    found = net.predict({"x": x})
    assert torch.equal(found.mean, model(x)) and (found.variance == 0).all()
    before = [p.clone() for p in model.parameters()]
    net.update({"x": x}, normal(9, 3).to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("structure", ["full", "diagonal"])
@pytest.mark.parametrize("relaxation", [0.0, 0.01])
def test_covariances_stay_positive(structure, relaxation):
    # 1e4 updates, almost noiseless and repetitive, in float32: differences of covariances would lose their sign.
    layer = nn.Linear(3, 4)
    gaussian = RowGaussian(layer.weight, layer.bias, 1.0, structure)
    slopes = torch.cat([normal(10_000, 1, 4, 4, scale=0.01) + 1, normal(10_000, 1, 4, 4, seed=1)], 1).float()
    for row in slopes:
        gaussian.factor = gaussian.relaxed(relaxation)
        scaled = gaussian.scaled(row)
        root = torch.linalg.cholesky(scaled.flatten(1) @ scaled.flatten(1).mT + 1e-6 * torch.eye(2))
        gaussian.factor = gaussian.reduced(
            torch.linalg.solve_triangular(root, scaled.flatten(1), upper=False).view(2, 4, 4)
        )
    values = torch.linalg.eigvalsh(gaussian.covariance().double())
    assert torch.isfinite(gaussian.factor).all() and (values > 0).all() and values.max() < 1.01
    assert (values.max() > 1e-4) == (relaxation > 0)


def test_a_network_learns_a_thousand_times_and_stays_positive():
    torch.manual_seed(0)
    net = KalmanFeedforward(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), 1.0, noise=1e-4)
    x = normal(1000, 3).float()
    seen = net.update({"x": x}, torch.stack([F.relu(x.sum(1)), x[:, 0]], 1))
    assert net.updates == 1000 and math.isfinite(seen["loss"])
    for gaussian in net.gaussians.values():
        values = torch.linalg.eigvalsh(gaussian.covariance().double())
        assert (values > 0).all() and values.max() < 1.01 * gaussian.prior_variance


def test_diagonal_is_the_diagonal_of_the_full_update_once():
    full, diagonal = network(3, 4, 1, noise=0.1), network(3, 4, 1, noise=0.1, full_limit=0)
    x, y = normal(1, 3), normal(1, 1, seed=1)
    full.update({"x": x}, y)
    diagonal.update({"x": x}, y)
    for one, other in zip(full.gaussians.values(), diagonal.gaussians.values(), strict=True):
        torch.testing.assert_close(one.rows(), other.rows(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(one.variances(), other.variances(), rtol=1e-9, atol=1e-10)


def test_relaxation_goes_back_to_the_prior():
    net = network(3, 2, noise=0.01, relaxation=0.25)
    net.update({"x": normal(20, 3)}, normal(20, 2, seed=1))
    gaussian = net.gaussians["0"]
    before, prior = gaussian.covariance(), gaussian.prior_variance * torch.eye(4, dtype=F64)
    gaussian.factor = gaussian.relaxed(0.25)
    torch.testing.assert_close(gaussian.covariance(), 0.75 * before + 0.25 * prior, rtol=1e-10, atol=1e-12)
    gaussian.factor = gaussian.relaxed(1.0)
    torch.testing.assert_close(gaussian.covariance()[0], prior, rtol=1e-10, atol=1e-12)


def test_conditioning_tightens_and_leaves_the_mean():
    net, learning = network(3, 4, 1), network(3, 4, 1)
    x = normal(1, 3)
    rows = {name: g.rows() for name, g in net.gaussians.items()}
    net.condition({"x": x})
    learning.update({"x": x}, net.model(x).detach())
    for name, gaussian in net.gaussians.items():
        assert torch.equal(gaussian.rows(), rows[name])
        torch.testing.assert_close(gaussian.covariance(), learning.gaussians[name].covariance())
    assert net.updates == 0


# -- refusals and files --------------------------------------------------------------------------------------------


def state(net):
    return [t for g in net.gaussians.values() for t in (g.rows(), g.factor.clone())]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["x", "targets"])
def test_refuses_numbers_that_are_not_finite(bad, where):
    net = network(3, 4, 2, relaxation=0.1)
    x, y = normal(4, 3), normal(4, 2)
    (x if where == "x" else y)[3, 1] = bad
    before = state(net)
    with pytest.raises(ValueError, match=f"`{where}` has NaN or Inf"):
        net.update({"x": x}, y)
    assert all(torch.equal(a, b) for a, b in zip(before, state(net), strict=True)) and net.updates == 0


def test_an_update_that_overflows_changes_nothing():
    net = network(3, 4, 2, relaxation=0.1)
    before = state(net)
    x = normal(2, 3)
    x[1] = 1e200
    with pytest.raises(ValueError, match="The update is not finite, and was not made"):
        net.update({"x": x}, normal(2, 2))
    assert all(torch.equal(a, b) for a, b in zip(before, state(net), strict=True)) and net.updates == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: network(3, 1, likelihood="poisson"), "likelihood must be one of"),
        (lambda: network(3, 1, noise=0.0), "noise must be > 0"),
        (lambda: network(3, 1, damping=-1.0), "damping must be >= 0"),
        (lambda: network(3, 1, relaxation=1.5), r"relaxation must be in \[0, 1\]"),
        (lambda: network(3, 1, variance=-1.0), "variance must be >= 0"),
        (lambda: network(3, 1, variance={"7": 1.0}), "no layer fits the pattern '7'"),
        (lambda: network(3, 1).update({"x": normal(2, 3)}, normal(3, 1)), "same number of samples"),
        (lambda: network(3, 2).update({"x": normal(2, 3)}, normal(2, 1)), "Targets are"),
        (lambda: network(3, 2).update({"x": normal(2, 3)}, torch.tensor([0, 1])), "does not go with targets"),
        (
            lambda: network(3, 2, likelihood="categorical").update({"x": normal(2, 3)}, torch.tensor([0, 2])),
            r"Classes must be \(B,\), in \[0, 2\)",
        ),
    ],
)
def test_raises_for(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_raises_for_layers_without_a_rule():
    net = KalmanFeedforward(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    with pytest.raises(TypeError, match="No moments are known for BatchNorm1d"):
        net.predict({"x": torch.zeros(1, 3)})
    assert layer_moments(nn.Dropout().eval(), known(torch.ones(2))).mean.tolist() == [1, 1]
    with pytest.raises(TypeError, match="Dropout"):
        layer_moments(nn.Dropout(), known(torch.ones(2)))


def test_saved_and_loaded_it_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole = network(3, 4, 2, noise=0.2, relaxation=0.01, full_limit=4)
    fresh = KalmanFeedforward(cast(nn.Sequential, copy.deepcopy(whole.model)), 0.1, full_limit=4)
    x, y = normal(20, 3), normal(20, 2, seed=1)
    whole.update({"x": x[:10]}, y[:10])
    whole.save_pretrained(tmp_path)
    fresh.load(tmp_path)
    assert fresh.updates == 10 and fresh.noise == 0.2
    for net in (whole, fresh):
        net.update({"x": x[10:]}, y[10:])
    assert all(torch.equal(a, b) for a, b in zip(state(whole), state(fresh), strict=True))
    assert json.loads((tmp_path / "kbt_config.json").read_text())["updates"] == 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kbt.safetensors", "kbt_config.json"]


def test_refuses_files_that_do_not_fit(tmp_path):
    network(3, 4, 2).save_pretrained(tmp_path)
    other = network(3, 5, 2)
    before = state(other)
    with pytest.raises(ValueError, match="mean of 0 is"):
        other.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, state(other), strict=True))
    with pytest.raises(ValueError, match="weights that are not uncertain here"):
        network(3, 4, 2, variance={"0": 0.1}).load(tmp_path)
    data = bytearray((tmp_path / "kbt.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "kbt.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="was altered"):
        network(3, 4, 2).load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no kbt\.safetensors"):
        other.load(tmp_path / "elsewhere")
