"""The evidence against Gaussian integrals by dense linear algebra, and its maximum against conjugate answers."""

import math

import pytest
import torch
from conftest import make_batch, make_lora_llama

from kalman_peft import AdapterState, estimate_curvature, log_evidence, maximise_evidence
from kalman_peft.losses import mean_loss_gradient
from kalman_peft.precision import DensePrecision, DiagonalPrecision, KroneckerPrecision
from kalman_peft.precision.factor import EigenFactor
from kalman_peft.precision.kronecker import KroneckerBlocks


SHAPES = {"a": torch.Size((2, 3)), "b": torch.Size((4, 2))}
DIMENSION = 14


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state(seed):
    return {key: draw(*shape, seed=seed + i) for i, (key, shape) in enumerate(SHAPES.items())}


def flat(named):
    return torch.cat([named[key].reshape(-1) for key in SHAPES])


def unflat(vector):
    return {"a": vector[:6].view(SHAPES["a"]), "b": vector[6:].view(SHAPES["b"])}


def spd(n, seed, rank=None):
    x = draw(n, rank or n, seed=seed)
    return x @ x.mT / n


def pair(structure):
    """Lambda and H of one structure; singular, as curvatures are."""
    if structure == "diagonal":
        return [
            DiagonalPrecision({k: x.abs() * (x > -0.5) for k, x in state(seed).items()}) for seed in (10, 20)
        ]  # fmt: skip
    if structure == "dense":
        return [DensePrecision(spd(DIMENSION, seed, rank=9), SHAPES) for seed in (10, 20)]
    # Kronecker products are closed under addition where one side agrees.
    right = {key: EigenFactor.from_dense(spd(shape[1], 5)) for key, shape in SHAPES.items()}
    return [
        KroneckerPrecision(
            KroneckerBlocks(
                {k: (EigenFactor.from_dense(spd(s[0], seed, rank=1)), right[k]) for k, s in SHAPES.items()}
            )
        )
        for seed in (10, 20)
    ]


def dense_evidence(prior, target, gradient, theta, mean, weight, count, delta):
    """log of int N(x; mean, P^-1) exp(-n [g u + u H u / 2]) dx, u = x - theta, with all its constants."""
    p = weight * prior.to_dense() + delta * torch.eye(DIMENSION, dtype=torch.float64)
    h = count * target.to_dense()
    # Complete the square in x by hand: exponent = -x M x / 2 + c x + rest.
    m = p + h
    c = p @ flat(mean) + h @ flat(theta) - count * gradient
    rest = -flat(mean) @ p @ flat(mean) / 2 - flat(theta) @ h @ flat(theta) / 2 + count * gradient @ flat(theta)
    half_log_2pi = DIMENSION / 2 * math.log(2 * math.pi)
    log_prior = torch.linalg.slogdet(p).logabsdet / 2 - half_log_2pi
    log_integral = c @ torch.linalg.solve(m, c) / 2 - torch.linalg.slogdet(m).logabsdet / 2 + half_log_2pi
    return float(log_prior + rest + log_integral)


@pytest.mark.parametrize("structure", ["diagonal", "dense", "kronecker"])
def test_equals_the_dense_gaussian_integral(structure):
    prior, target = pair(structure)
    theta, mean, gradient = state(1), state(3), {k: 0.1 * g for k, g in state(7).items()}
    for strength, delta in ((1e-2, 1.0), (1.0, 1e-2), (30.0, 5.0)):
        for observed in (50, 8):
            ours = log_evidence(
                prior, target, theta, mean, num_labels=50, strength=strength, prior_precision=delta, gradient=gradient,
                num_observed=observed,
            )  # fmt: skip
            dense = dense_evidence(prior, target, flat(gradient), theta, mean, 50 * strength, observed, delta)
            assert ours == pytest.approx(dense, rel=1e-9, abs=1e-7)


def test_is_taken_in_float64_whatever_the_precision_is_held_in():
    prior, target = pair("kronecker")
    narrow = [
        type(p).from_tensors({k: t.float() for k, t in p.tensors().items()}) for p in (prior, target)
    ]  # fmt: skip
    wide = [type(p).from_tensors({k: t.double() for k, t in p.tensors().items()}) for p in narrow]
    options = {"num_labels": 1e7, "strength": 1e4, "prior_precision": 1e6, "gradient": target.matvec(state(7))}
    values = [log_evidence(*both, state(1), state(3), **options) for both in (narrow, wide)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parametrize("structure", ["diagonal", "dense", "kronecker"])
def test_without_a_gradient_the_state_is_taken_as_the_maximum_of_the_posterior(structure):
    prior, target = pair(structure)
    mean, count, strength, delta = state(3), 50, 0.3, 2.0
    p = strength * count * prior.to_dense() + delta * torch.eye(DIMENSION, dtype=torch.float64)
    gradient = state(7)
    # Move to where the posterior's gradient N g(theta) + P (theta - mean) vanishes.
    start = flat(state(1))
    m = p + count * target.to_dense()
    step = -torch.linalg.solve(m, count * flat(gradient) + p @ (start - flat(mean)))
    best = unflat(start + step)
    at_best = flat(gradient) + target.to_dense() @ step
    options = {"num_labels": count, "strength": strength, "prior_precision": delta}
    bare = log_evidence(prior, target, best, mean, **options)
    full = log_evidence(prior, target, best, mean, **options, gradient=unflat(at_best))
    assert bare == pytest.approx(full, rel=1e-9)
    dense = dense_evidence(prior, target, at_best, best, mean, strength * count, count, delta)
    assert bare == pytest.approx(dense, rel=1e-9, abs=1e-7)


def test_finds_the_optimum_of_a_conjugate_problem():
    # y_n ~ N(x, 1), x ~ N(0, 1 / (lambda N)): the mean of n labels has variance 1 / n + 1 / (lambda N), so that the
    # evidence is largest at lambda N = 1 / (ybar^2 - 1 / n).
    count, ybar = 40, 0.7
    one = DiagonalPrecision({"x": torch.ones(1, dtype=torch.float64)})
    for theta in (0.0, 0.5, ybar):  # a Gaussian likelihood: the point of expansion does not matter
        strength, delta, value = maximise_evidence(
            one, one, {"x": torch.tensor([theta], dtype=torch.float64)}, {"x": torch.zeros(1, dtype=torch.float64)},
            num_labels=count, gradient={"x": torch.tensor([theta - ybar], dtype=torch.float64)},
            strengths=(1e-4, 1e4), prior_precisions=(1e-9, 1e-9),
        )  # fmt: skip
        expected = 1 / (ybar**2 - 1 / count)
        assert strength * count == pytest.approx(expected, rel=0.03)
        assert delta == pytest.approx(1e-9)
    assert math.isfinite(value)


@pytest.mark.parametrize("structure", ["diagonal", "dense", "kronecker"])
def test_beats_a_grid_and_is_deterministic(structure):
    prior, target = pair(structure)
    theta, mean = state(1), state(3)
    gradient = target.matvec(state(7))  # a flat direction with a slope would have no finite optimum
    options = {"num_labels": 50, "gradient": gradient, "num_observed": 20}
    ranges = {"strengths": (1e-4, 1e2), "prior_precisions": (1e-3, 1e3)}
    found = maximise_evidence(prior, target, theta, mean, **options, **ranges)
    assert found == maximise_evidence(prior, target, theta, mean, **options, **ranges)
    grid = [
        log_evidence(prior, target, theta, mean, **options, strength=10 ** (i / 3), prior_precision=10 ** (j / 3))
        for i in range(-12, 7) for j in range(-9, 10)
    ]  # fmt: skip
    assert found[2] >= max(grid) - 1e-9


def test_asks_for_more_strength_where_the_gradient_asks_for_nothing():
    prior, target = pair("diagonal")
    here, zero = state(3), {k: 0 * g for k, g in state(7).items()}
    with pytest.warns(UserWarning, match="largest at the bound"):
        strength, _, _ = maximise_evidence(prior, target, here, here, num_labels=50, gradient=zero)
    assert strength == pytest.approx(1e6)
    pulled = maximise_evidence(prior, target, here, here, num_labels=50, gradient=target.matvec(state(7)))
    assert pulled[0] < 100


@pytest.mark.parametrize("structure", ["diagonal", "kronecker", "ekfac", "block_tridiagonal", "low_rank", "dense"])
def test_every_structure_on_a_model(structure):
    model = make_lora_llama()
    options = {"structure": structure, "space": "adapter", "fisher": "empirical", "progress_bar": False}
    prior, _ = estimate_curvature(model, [make_batch()], **options)
    target, _ = estimate_curvature(model, [make_batch(seed=8)], **options)
    adapter = AdapterState(model)
    mean = adapter.snapshot()
    _, gradient = mean_loss_gradient(adapter, [make_batch(seed=8)])
    strength, delta, value = maximise_evidence(
        prior, target, adapter.parameters(), mean, num_labels=100, gradient=gradient
    )
    assert all(math.isfinite(x) and x > 0 for x in (strength, delta)) and math.isfinite(value)
    # Against dense algebra with the combined precision that the structure keeps.
    layout, p = prior.coordinates(), 7.0 * prior.to_dense() + 0.5 * torch.eye(adapter.num_parameters)
    combined = prior.merge(target, 7.0, 20.0).to_dense() + 0.5 * torch.eye(adapter.num_parameters)
    offset, slope = (
        torch.cat([x[k].detach().reshape(-1) for k in layout]).double()
        for x in ({k: adapter.tensors()[k] - mean[k] - 0.1 for k in layout}, gradient)
    )
    b = 20.0 * slope + p @ offset
    dense = -offset @ p @ offset / 2 + b @ torch.linalg.solve(combined, b) / 2
    dense += (torch.linalg.slogdet(p).logabsdet - torch.linalg.slogdet(combined).logabsdet) / 2
    ours = log_evidence(
        prior, target, adapter.tensors(), {k: m + 0.1 for k, m in mean.items()}, num_labels=70, strength=0.1,
        prior_precision=0.5, gradient=gradient, num_observed=20,
    )  # fmt: skip
    assert ours == pytest.approx(float(dense), rel=1e-5)  # the mean is held in float32
    none = log_evidence(prior, target, adapter.parameters(), mean, num_labels=100, gradient=gradient, strength=1e6, prior_precision=1e9)  # fmt: skip
    assert value >= none


@pytest.mark.parametrize(
    "change,match",
    [
        ({"num_observed": 0}, "num_observed must be positive"),
        ({"num_labels": 0}, "num_labels must be positive"),
        ({"strength": 0.0}, "strength and prior_precision must be positive"),
        ({"prior_precision": -1.0}, "strength and prior_precision must be positive"),
    ],
)
def test_raises_when_a_number_is_out_of_range(change, match):
    prior, target = pair("diagonal")
    options = {"num_labels": 10, "strength": 1.0, "prior_precision": 1.0} | change
    with pytest.raises(ValueError, match=match):
        log_evidence(prior, target, state(1), state(3), **options)


def test_raises_when_the_range_is_empty():
    prior, target = pair("diagonal")
    with pytest.raises(ValueError, match="strengths must be a range"):
        maximise_evidence(prior, target, state(1), state(3), num_labels=10, strengths=(2.0, 1.0))


def test_raises_when_structures_differ():
    with pytest.raises(ValueError, match="Cannot merge"):
        log_evidence(
            pair("diagonal")[0], pair("dense")[0], state(1), state(3), num_labels=10, strength=1.0, prior_precision=1.0
        )


def test_raises_in_the_space_of_updates():
    model = make_lora_llama()
    precision, _ = estimate_curvature(model, [make_batch()], progress_bar=False)
    start = AdapterState(model).snapshot()
    with pytest.raises(ValueError, match="use space='adapter'"):
        maximise_evidence(precision, precision, start, start, num_labels=10)
