"""What weighs LoKO's information and bounds its steps, against the update written out with dense matrices."""

import pytest
import torch
from toys import EXACT, F64, Linear

from kalman_peft import GaussianObservation
from kalman_peft.loko import MEMORIES


PRIOR = 2.0


def posterior(toy, x, labels, weight, prior=None, variance=0.5):
    """Step and precision after one batch whose likelihood has the given power."""
    prior = PRIOR * torch.eye(toy.size, dtype=F64) if prior is None else prior
    score, information, _, _ = toy.evidence(x, labels, variance)
    precision = prior + weight * information
    return torch.linalg.solve(precision, weight * score), precision


def precision_of(toy):
    return toy.optimizer._memories[0].tensors["precision"][0]


@pytest.mark.parametrize("kind", ["classes", "tokens", "values"])
@pytest.mark.parametrize("tempering,correlation", [(1.0, 0.0), (0.3, 0.0), (1.0, 0.5), (0.5, 1.0)])
def test_tempering_and_correlation_weigh_the_likelihood(kind, tempering, correlation):
    toy = Linear(kind, known=PRIOR, tempering=tempering, correlation=correlation, **EXACT)
    x, labels = toy.batch(0)
    _, _, count, sequences = toy.evidence(x, labels)
    assert (count, sequences) == ((13, 5) if kind == "tokens" else (5, 5))
    weight = tempering * (count / sequences) ** -correlation
    step, precision = posterior(toy, x, labels, weight)
    before = toy.theta
    toy.step(0)
    torch.testing.assert_close(toy.theta - before, step)
    torch.testing.assert_close(precision_of(toy), precision)
    assert toy.optimizer.diagnostics["effective_observations"] == pytest.approx(count * tempering)


def test_adaptive_noise_follows_the_misfit():
    decay, misfit, energies = 0.6, 1.0, None
    toy = Linear(known=PRIOR, adaptive_noise=decay, **EXACT)
    precision = PRIOR * torch.eye(toy.size, dtype=F64)
    for seed in range(4):
        x, _ = toy.batch(seed)
        labels = (3 * x).argmin(-1).clamp_max(3) if seed == 0 else toy(2 * x).argmin(-1)  # unexpected ones
        score, information, _, _ = toy.evidence(x, labels)
        energy = score @ torch.linalg.solve(precision, score)
        expected = torch.linalg.solve(precision, information).trace()
        step, precision = posterior(toy, x, labels, 1 / max(1.0, misfit), precision)
        before = toy.theta
        toy.observe(x, labels)
        toy.optimizer.step()
        torch.testing.assert_close(toy.theta - before, step)
        assert toy.optimizer.diagnostics["innovation"] == pytest.approx(float(energy / expected))
        energies = energies or (expected, expected)
        energies = tuple(
            decay * held + (1 - decay) * new for held, new in zip(energies, (energy, expected), strict=True)
        )
        misfit = float(energies[0] / energies[1])
        assert toy.optimizer.param_groups[0]["misfit"] == pytest.approx(misfit)
    assert misfit > 1.1


def test_an_iterated_step_judges_the_data_once():
    # Misfit, innovation and noise are those of the batch at the weights before the step.
    results = []
    for iterations in (1, 3):
        toy = Linear(
            "values", known=PRIOR, adaptive_noise=0.5, noise_decay=0.5, estimate_noise=True,
            observation=GaussianObservation(), **EXACT,
        )  # fmt: skip
        for seed in range(3):
            for _ in range(iterations - 1):
                toy.observe(*toy.batch(seed))
                toy.optimizer.relinearise()
            toy.step(seed)
        group = toy.optimizer.param_groups[0]
        results.append(
            torch.cat(
                [
                    toy.theta,
                    torch.tensor([group["misfit"], group["variance"], toy.optimizer.diagnostics["innovation"]]),
                ]
            )
        )
    torch.testing.assert_close(results[0], results[1])  # a linear model: iterating changes nothing


def test_max_kl_bounds_the_step():
    bound = 1e-4
    toy = Linear(known=PRIOR, max_kl=bound, **EXACT)
    x, labels = toy.batch(0)
    step, precision = posterior(toy, x, labels, 1.0)
    kl = step @ (precision - PRIOR * torch.eye(toy.size, dtype=F64)) @ step / (2 * 5)
    assert kl > 10 * bound
    before = toy.theta
    toy.step(0)
    torch.testing.assert_close(toy.theta - before, step * (bound / kl).sqrt())
    assert float(toy.optimizer.diagnostics["kl"]) == pytest.approx(bound)


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_trust_region_shrinks_with_the_labels_seen(decay):
    options = EXACT | {"max_decrease": 1e-3, "trust_decay": decay, "prior_tokens": 7.0, "tempering": 0.5}
    toy = Linear(known=PRIOR, **options)
    precision = PRIOR * torch.eye(toy.size, dtype=F64)
    for seed in range(3):
        x, labels = toy.batch(seed)
        score, _, count, _ = toy.evidence(x, labels)
        step, precision = posterior(toy, x, labels, 0.5, precision)
        loss = torch.nn.functional.cross_entropy(toy(x).detach(), labels)
        bound = float(loss) * 1e-3 * (7 / (7 + 5 * (seed + 1))) ** decay
        scale = bound / float(score @ step / count)
        assert scale < 1
        before = toy.theta
        toy.step(seed)
        torch.testing.assert_close(toy.theta - before, scale * step)
        assert float(toy.optimizer.diagnostics["decrease"]) == pytest.approx(bound)


def test_columns_count_for_the_steps_until_the_next():
    toy = Linear(known=PRIOR, **EXACT | {"curvature_every": 3, "first_draws": 2})
    precision, drawn = PRIOR * torch.eye(toy.size, dtype=F64), []
    for seed, weight in enumerate([1, 2, 0, 3, 0, 0, 3]):
        x, labels = toy.batch(seed)
        score, information, _, _ = toy.evidence(x, labels)
        precision = precision + weight * information
        drawn.append(toy.optimizer.draws_curvature)
        before = toy.theta
        toy.step(seed)
        torch.testing.assert_close(precision_of(toy), precision)
        torch.testing.assert_close(toy.theta - before, torch.linalg.solve(precision, score))
    assert drawn == [True, True, False, True, False, False, True]


def test_several_draws_share_the_information():
    single, several = (
        Linear(columns="sampled", per_sequence=False, num_columns=number) for number in (1, 4)
    )  # fmt: skip
    columns = []
    for toy in (single, several):
        toy.observe(*toy.batch(0))
        harvest = toy.optimizer._harvest
        columns.append(harvest.reduce(toy.optimizer._intake.plan, 64).columns)
    for one, four in zip(*columns, strict=True):
        assert len(one) == 1 and len(four) == 4
        torch.testing.assert_close(2 * four[0], one[0])
        assert not torch.allclose(four[0], four[1])


def test_estimated_noise_is_the_running_mean_of_squared_residuals():
    decay, held, weight = 0.7, 0.0, 0.0
    toy = Linear(
        "values", known=PRIOR, estimate_noise=True, noise_decay=decay, observation=GaussianObservation(), **EXACT
    )
    precision = PRIOR * torch.eye(toy.size, dtype=F64)
    for seed in range(4):
        x, y = toy.batch(seed)
        fresh = float((y - toy(x).detach()).square().mean())
        held, weight = decay * held + (1 - decay) * fresh, decay * weight + 1 - decay
        step, precision = posterior(toy, x, y, 1.0, precision, variance=held / weight)
        before = toy.theta
        toy.step(seed)
        assert toy.optimizer.diagnostics["variance"] == pytest.approx(held / weight)
        torch.testing.assert_close(toy.theta - before, step)
        torch.testing.assert_close(precision_of(toy), precision)


def test_estimated_noise_makes_the_step_independent_of_the_labels_scale():
    # Labels and weights in other units: the same filter, with the prior in theirs.
    steps = []
    for scale in (1.0, 100.0):
        toy = Linear("values", estimate_noise=True, observation=GaussianObservation(), max_decrease=None)
        for p in (toy.w, toy.b):
            p.data.zero_()
        for seed in range(3):
            x, y = toy.batch(seed)
            toy.observe(x, scale * y)
            toy.optimizer.step()
        steps.append(toy.theta / scale)
    torch.testing.assert_close(steps[0], steps[1])


def test_average_is_polynomial_and_stays_apart_from_the_filter():
    plain, averaged = Linear(), Linear(averaging=True)
    mean = None
    for t in range(1, 8):
        plain.step(t)
        averaged.step(t)
        assert torch.equal(plain.theta, averaged.theta)
        mean = plain.theta if mean is None else mean + 9 / (t + 8) * (plain.theta - mean)
        averaged.optimizer.eval()
        torch.testing.assert_close(averaged.theta, mean)
        averaged.optimizer.eval()  # twice is once
        averaged.optimizer.train()
        assert torch.equal(plain.theta, averaged.theta)
        averaged.optimizer.train()
    assert not torch.allclose(mean, plain.theta)


@pytest.mark.parametrize("averaging", [False, True])
def test_raises_when_it_observes_or_steps_in_evaluation_mode(averaging):
    toy = Linear(averaging=averaging).run(2)
    x, labels = toy.batch(2)
    toy.observe(x, labels)
    toy.optimizer.eval()
    kept = toy.theta
    for call in (lambda: toy.observe(x, labels), toy.optimizer.step, toy.optimizer.relinearise):
        with pytest.raises(RuntimeError, match=r"evaluation mode; call optimizer.train\(\) first"):
            call()
    assert torch.equal(toy.theta, kept)
    toy.optimizer.train()
    toy.optimizer.step()
    assert torch.equal(toy.theta, Linear(averaging=averaging).run(3).theta)


@pytest.mark.parametrize("averaging", [False, True])
def test_posterior_mean_puts_the_average_in_place_and_takes_it_back(averaging):
    toy = Linear(averaging=averaging).run(4)
    live = toy.theta
    with toy.optimizer.posterior_mean():
        mean = toy.theta
        assert torch.equal(mean, live) != averaging
        with pytest.raises(RuntimeError, match="evaluation mode"):
            toy.optimizer.step()
    assert torch.equal(toy.theta, live)
    with pytest.raises(KeyError), toy.optimizer.posterior_mean():
        raise KeyError
    assert torch.equal(toy.theta, live)
    toy.optimizer.eval()
    with toy.optimizer.posterior_mean():
        assert torch.equal(toy.theta, mean)
    assert torch.equal(toy.theta, mean)  # still in evaluation mode
    toy.optimizer.train()
    toy.step(4)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_sampled_weights_are_taken_back_bit_for_bit(memory, dtype):
    toy = Linear(memory=memory, dtype=dtype)
    with pytest.raises(RuntimeError, match="not settled"), toy.optimizer.sample():
        pass
    toy.run(3)
    kept, draws = toy.theta, []
    for scale, seed in ((1.0, 0), (1.0, 0), (2.0, 0), (1.0, 1), (0.0, 0)):
        with toy.optimizer.sample(torch.Generator().manual_seed(seed), scale):
            draws.append((toy.theta - kept).double())
        assert torch.equal(toy.theta, kept)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[3]) and not draws[4].any()
    torch.testing.assert_close(
        draws[2], 2 * draws[0], rtol=1e-6 if dtype == F64 else 0.05, atol=1e-6 if dtype == F64 else 0.02
    )
    with pytest.raises(KeyError), toy.optimizer.sample():
        raise KeyError
    assert torch.equal(toy.theta, kept)


def test_sampled_weights_have_the_variance_of_the_belief():
    toy = Linear(known=PRIOR, **EXACT).run(3)
    kept, generator, draws = toy.theta, torch.Generator().manual_seed(0), []
    for _ in range(3000):
        with toy.optimizer.sample(generator):
            draws.append(toy.theta - kept)
    found, expected = torch.stack(draws).T.cov(), torch.linalg.inv(precision_of(toy))
    error = (expected.diagonal()[:, None] * expected.diagonal() + expected.square()).sqrt() / 3000**0.5
    assert ((found - expected).abs() < 5 * error).all()


def test_inflating_widens_the_belief_and_opens_the_trust_region():
    toy = Linear(known=PRIOR, **EXACT | {"max_decrease": 1e-3, "trust_decay": 1.0, "prior_tokens": 30.0}).run(4)
    before, eye = precision_of(toy).clone(), PRIOR * torch.eye(toy.size, dtype=F64)
    weights = toy.theta
    toy.optimizer.inflate(4.0)
    torch.testing.assert_close(precision_of(toy), eye + (before - eye) / 4)
    assert toy.optimizer.param_groups[0]["tokens"] == 5.0 and torch.equal(toy.theta, weights)
    x, labels = toy.batch(4)
    loss = float(toy.observe(x, labels))
    toy.optimizer.step()
    bound = loss * 1e-3 * 30 / (30 + 10)
    assert float(toy.optimizer.diagnostics["decrease"]) == pytest.approx(bound)
    for factor in (1.0, 0.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="factor must be > 1"):
            toy.optimizer.inflate(factor)


def test_gains_are_steps_over_scores():
    toy = Linear(known=PRIOR, **EXACT)
    assert toy.optimizer.gains() == {}
    x, labels = toy.batch(0)
    score = toy.evidence(x, labels)[0]
    step, _ = posterior(toy, x, labels, 1.0)
    toy.step(0)
    cut = toy.w.numel()
    found = toy.optimizer.gains()
    assert found == {
        "w": pytest.approx(float(step[:cut].norm() / score[:cut].norm())),
        "b": pytest.approx(float(step[cut:].norm() / score[cut:].norm())),
    }
    assert float(toy.optimizer.diagnostics["gain_norm"]) == pytest.approx(float(step.norm() / score.norm()))


def test_effective_parameters_are_those_that_the_data_determine():
    toy = Linear(known=PRIOR, **EXACT)
    assert toy.optimizer.diagnostics == {}
    toy.run(3)
    covariance = torch.linalg.inv(precision_of(toy))
    diagnostics = toy.optimizer.diagnostics
    assert diagnostics["effective_parameters"] == pytest.approx(float(toy.size - PRIOR * covariance.trace()))
    assert diagnostics["trace_p"] == pytest.approx(float(covariance.trace()))
    assert diagnostics["loss"] > 0 and 0 < float(diagnostics["trust"]) <= 1


@pytest.mark.parametrize("memory", MEMORIES)
def test_effective_parameters_grow_from_none_to_all(memory):
    # Without a trust region: where only a part of a step is taken, a covariance memory learns only a part.
    few = Linear("values", memory=memory, prior_tokens=1e6, max_decrease=None, columns="exact").run(1)
    many = Linear("values", memory=memory, prior_tokens=0.1, max_decrease=None, columns="exact").run(60)
    low, high = (toy.optimizer.diagnostics["effective_parameters"] for toy in (few, many))
    assert 0 <= low < 0.01 * few.size and 0.5 * few.size < high <= few.size


def test_effective_parameters_are_never_negative():
    toy = Linear(known=PRIOR, **EXACT | {"process_noise": 1.0}).run(1)
    assert toy.optimizer.diagnostics["effective_parameters"] == 0.0
    assert torch.linalg.inv(precision_of(toy)).trace() * PRIOR > toy.size


@pytest.mark.parametrize(
    "options", [{"columns": "exact"}, {"columns": "sampled"}, {"columns": "sampled", "per_sequence": False}]
)
@pytest.mark.parametrize("kind", ["classes", "values"])
def test_innovation_is_one_for_labels_that_the_model_expects(kind, options):
    if kind == "values" and options.get("columns") == "sampled":
        options = options | {"columns": "rademacher"}
    energies, expected = [], []
    for seed in range(150):
        toy = Linear(kind, known=PRIOR, seed=seed, memory="diagonal", max_decrease=1e-9, **options)
        x, labels = toy.batch(seed)
        generator = torch.Generator().manual_seed(seed)
        z = toy(x).detach()
        if kind == "values":
            labels = z + 0.5**0.5 * torch.randn(z.shape, generator=generator, dtype=F64)
        else:
            labels = torch.multinomial(z.softmax(-1), 1, generator=generator)[:, 0]
        toy.observe(x, labels)
        toy.optimizer.step()
        share = toy.optimizer.param_groups[0]["expected_energy"]
        expected.append(share)
        energies.append(toy.optimizer.diagnostics["innovation"] * share)
    energies, expected = torch.tensor(energies), torch.tensor(expected)
    ratio = energies.mean() / expected.mean()
    error = ((energies.std() / energies.mean()) ** 2 + (expected.std() / expected.mean()) ** 2).sqrt() / 150**0.5
    assert abs(ratio - 1) < 4 * error and error < 0.15


def test_without_a_step_a_precision_takes_all_information_and_a_covariance_none():
    for memory, shrinks in (("diagonal", True), ("dense", True), ("diagonal_covariance", False)):
        toy = Linear(known=2.0, memory=memory, columns="exact", gain="joint", curvature_every=1)
        toy.optimizer.param_groups[0]["lr"] = 0.0
        weights, before = toy.theta.clone(), toy.optimizer._memories[0].traces()
        toy.step(0)
        after = toy.optimizer._memories[0].traces()
        assert torch.equal(toy.theta, weights)
        assert bool((after < before).all()) == shrinks and (shrinks or torch.equal(after, before))
