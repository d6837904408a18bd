"""Predictions from one belief by every method: samples, ensembles, links, fitted scales, and what they refuse."""

import json
import math

import pytest
import torch
from conftest import make_batch, make_lora_bert, make_lora_llama, randomise_b
from peft import get_peft_model_state_dict
from predictive import F64, diagonal_belief, make_inputs, make_model
from torch import nn

from kalman_peft import AdapterState, Belief, estimate_curvature
from kalman_peft.filtering.algebra import as_double
from kalman_peft.predictive import (
    FittedScale,
    Predictive,
    ensembled,
    fit_scale,
    linearized,
    pairwise_probabilities,
    posterior_predictive,
    probit_probabilities,
    sampled,
    select,
    streamlined,
)


NUMBERS = {"num_labels": 40.0, "prior_precision": 300.0}


def make_classifier():
    model, inputs = make_model("bert"), make_batch()
    inputs["labels"] = torch.tensor([0, 2, 1])
    return model, inputs


def snapshots(model, count=3):
    """Adapters that differ, as of separate trainings."""
    base = AdapterState(model, warn_excluded=False).snapshot(F64)
    generator = torch.Generator().manual_seed(4)
    return [
        {k: v + 0.2 * torch.randn(v.shape, dtype=F64, generator=generator) for k, v in base.items()}
        for _ in range(count)
    ]


# -- Monte Carlo -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["diagonal", "low_rank", "ekfac", "dense"])
def test_samples_of_a_linear_model_have_the_linearised_covariance(structure):
    """With A known the logits are linear in B: no approximation is left but the number of draws."""
    model = make_model("bert", targets=["classifier"])
    inputs = make_batch() | {"labels": torch.tensor([0, 2, 1])}
    options = {"rank": 4} if structure == "low_rank" else {}
    precision, record = estimate_curvature(model, [inputs], structure=structure, space="adapter", **options)
    (pair,) = AdapterState(model)
    known = {pair.key_a: 1e12, pair.key_b: 2.0}
    belief = Belief(AdapterState(model).snapshot(F64), as_double(precision), {"curvature": record})
    numbers = {"num_labels": 40.0, "prior_precision": known}
    if structure == "dense":  # its solves need a matrix that is not singular in float64
        numbers["prior_precision"] = {pair.key_a: 1e8, pair.key_b: 2.0}
    exact = linearized(model, belief, inputs, **numbers)
    generator = torch.Generator().manual_seed(0)
    found = sampled(model, belief, inputs, draws=1500, stacked=500, generator=generator, **numbers)
    assert torch.allclose(found.variance, exact.variance, rtol=5 * (2 / 1500) ** 0.5)
    assert bool(((found.logits - exact.logits).abs() < 5 * (exact.variance / 1500).sqrt()).all())
    # Averages over draws are what the links approximate.
    assert torch.allclose(found.probabilities, exact.probabilities, atol=0.06)


def test_moments_are_those_of_all_draws():
    model, inputs = make_classifier()
    belief = diagonal_belief(model, 0.05)
    found = sampled(model, belief, inputs, draws=5, generator=torch.Generator().manual_seed(3))
    generator, outputs = torch.Generator().manual_seed(3), []
    state = AdapterState(model, warn_excluded=False)
    for _ in range(5):
        noise = belief.precision.sample(0.0, generator)
        state.load({k: m + noise[k] for k, m in belief.mean.items()})
        with torch.no_grad():
            outputs.append(model(**inputs).logits)
    state.load(belief.mean)
    logits = torch.stack(outputs)
    assert torch.allclose(found.logits, logits.mean(0), rtol=1e-10)
    assert torch.allclose(found.variance, logits.var(0), rtol=1e-10)
    assert torch.allclose(found.probabilities, logits.softmax(-1).mean(0), rtol=1e-10)
    assert not found.logits.requires_grad


@pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
def test_stacked_draws_are_the_same(kind):
    model, inputs = make_model(kind), make_inputs(kind)
    belief = diagonal_belief(model, 0.05)
    options = {"positions": "last", "entries": [3, 5]} if kind == "llama" else {}
    found = [
        sampled(model, belief, inputs, draws=5, stacked=n, generator=torch.Generator().manual_seed(3), **options)
        for n in (1, 2)
    ]
    for name, value in found[0].fields().items():
        assert torch.allclose(value, getattr(found[1], name), rtol=1e-6, atol=1e-9)


def test_the_model_is_unchanged_also_after_an_error():
    model, inputs = make_classifier()
    belief = diagonal_belief(model, 0.05)
    before = {name: p.clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    sampled(model, belief, inputs, draws=2)
    ensembled(model, snapshots(model), inputs)
    calls = []

    def fail(module, args, output):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("on purpose")

    for run in (
        lambda: sampled(model, belief, inputs),
        lambda: sampled(model, belief, inputs, stacked=10, draws=30),
        lambda: ensembled(model, snapshots(model), inputs),
    ):
        calls.clear()
        handle = model.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            run()
        handle.remove()
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) and p.requires_grad == flags[name]


# -- ensembles -------------------------------------------------------------------------------------------------------


def test_an_ensemble_is_the_average_of_its_adapters(tmp_path):
    model, inputs = make_classifier()
    adapters = snapshots(model)
    own = AdapterState(model).snapshot(F64)
    outputs = []
    for number, adapter in enumerate(adapters):
        AdapterState(model).load(adapter)
        with torch.no_grad():
            outputs.append(model(**inputs).logits)
        model.save_pretrained(tmp_path / str(number))
    AdapterState(model).load(own)
    logits = torch.stack(outputs)
    for given in (adapters, [str(tmp_path / str(i)) for i in range(3)]):
        found = ensembled(model, given, inputs)
        assert torch.allclose(found.probabilities, logits.softmax(-1).mean(0), rtol=1e-10)
        assert torch.allclose(found.variance, logits.var(0), rtol=1e-8)
    for name, adapter in zip(("second", "third"), adapters[1:], strict=True):
        model.add_adapter(name, model.peft_config["default"])
        model.set_adapter(name)
        AdapterState(model).load(adapter)
    model.set_adapter("default")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    named = ensembled(model, ["second", "third", adapters[0]], inputs)
    assert torch.allclose(named.probabilities, logits.softmax(-1).mean(0), rtol=1e-10)
    assert model.active_adapters == ["default"] and model.active_adapter == "default"
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_trained_heads_are_part_of_an_ensemble(tmp_path):
    model, inputs = make_lora_bert().eval(), make_batch() | {"labels": torch.tensor([0, 2, 1])}
    head = model.get_base_model().classifier.modules_to_save["default"]
    before = head.weight.detach().clone()
    saved, outputs = [], []
    for number in range(2):
        with torch.no_grad():
            head.weight.copy_(before + number + 1)
            outputs.append(model(**inputs).logits)
        saved.append({k: v.clone() for k, v in get_peft_model_state_dict(model).items()})
        model.save_pretrained(tmp_path / str(number))
    head.weight.data.copy_(before)
    for given in (saved, [tmp_path / "0", tmp_path / "1"]):
        found = ensembled(model, given, inputs)
        assert torch.allclose(found.logits, torch.stack(outputs).mean(0), rtol=1e-10)
    assert not torch.equal(outputs[0], outputs[1]) and torch.equal(head.weight, before)


def test_raises_when_an_ensemble_does_not_fit():
    model, inputs = make_classifier()
    one, two, _ = snapshots(model)
    key = next(iter(one))
    for adapters, match in (
        ([one], "at least 2"),
        ([one, "missing"], "neither a folder nor an adapter"),
        ([one, two | {"other.weight": torch.zeros(1)}], "other.weight"),
        ([one, {k: v for k, v in two.items() if k != key}], "lacks"),
        ([one, two | {key: torch.zeros(1, 1)}], "another shape"),
    ):
        with pytest.raises(ValueError, match=match):
            ensembled(model, adapters, inputs)


# -- one call --------------------------------------------------------------------------------------------------------


def test_every_method_is_called_alike():
    model, inputs = make_classifier()
    belief = diagonal_belief(model)
    with torch.no_grad():
        logits = model(**inputs).logits
        with streamlined(model, belief):
            variance = model(**inputs).logits_variance
    found = {
        m: posterior_predictive(model, belief, inputs, m) for m in ("map", "streamlined", "linearized", "sampled")
    }
    for name in ("map", "streamlined", "linearized"):
        assert torch.equal(found[name].logits, logits)
    assert torch.equal(found["map"].probabilities, logits.softmax(-1))
    assert not found["map"].variance.any()
    assert torch.equal(found["streamlined"].variance, variance)
    assert torch.equal(found["streamlined"].probabilities, probit_probabilities(logits, variance))
    linear = found["linearized"]
    assert torch.equal(linear.probabilities, pairwise_probabilities(logits, linear.covariance))
    assert torch.equal(linear.marginal().probabilities, probit_probabilities(logits, linear.variance))
    assert found["sampled"].variance.shape == logits.shape
    for prediction in found.values():
        assert torch.allclose(prediction.probabilities.sum(-1), torch.ones(3, dtype=F64))
    with pytest.raises(ValueError, match="method must be one of"):
        posterior_predictive(model, belief, inputs, "laplace")


def test_curvatures_take_their_numbers():
    model, inputs = make_classifier()
    precision, record = estimate_curvature(model, [inputs], structure="kronecker", space="adapter")
    belief = Belief(AdapterState(model).snapshot(F64), precision, {"curvature": record})
    for method in ("streamlined", "linearized", "sampled"):
        assert bool((posterior_predictive(model, belief, inputs, method, **NUMBERS).variance > 0).all())
        with pytest.raises(ValueError, match="num_labels"):
            posterior_predictive(model, belief, inputs, method)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("method", ["map", "streamlined", "linearized", "sampled"])
def test_the_last_token_of_every_row(method, side):
    model, inputs = make_lora_llama(attn="sdpa").eval(), make_batch(side=side)
    randomise_b(model)
    belief = diagonal_belief(model)
    found = posterior_predictive(model, belief, inputs, method, positions="last", entries=[3, 4, 9])
    assert found.logits.shape == found.variance.shape == (3, 3)
    if method != "sampled":
        with torch.no_grad():
            logits = model(**inputs).logits
        places = [5, 3, 4] if side == "right" else [5, 5, 5]
        assert torch.equal(found.logits, torch.stack([logits[i, p, [3, 4, 9]] for i, p in enumerate(places)]))


def test_choosing_logits():
    logits = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(select(logits, {}), logits)
    assert torch.equal(select(logits, {}, "last"), logits[:, -1])
    assert torch.equal(select(logits, {}, torch.tensor([0, 2])), torch.stack([logits[0, 0], logits[1, 2]]))
    assert torch.equal(select(logits, {}, None, [1]), logits[..., 1:2])


def test_batches_are_joined():
    model, inputs = make_classifier()
    belief = diagonal_belief(model)
    whole = linearized(model, belief, inputs)
    rows = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(3)]
    joined = Predictive.cat([linearized(model, belief, row) for row in rows])
    assert torch.allclose(joined.covariance, whole.covariance, rtol=1e-8)


# -- links -----------------------------------------------------------------------------------------------------------


def test_links_without_variance_are_softmax_and_ignore_what_logits_share():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator, dtype=F64)
    root = 0.7 * torch.randn(5, 4, 4, generator=generator, dtype=F64)
    covariance = root @ root.mT
    assert torch.allclose(pairwise_probabilities(logits, 0 * covariance), logits.softmax(-1))
    shared = covariance + 7 * torch.ones(4, 4, dtype=F64)
    found = pairwise_probabilities(logits, covariance)
    assert torch.allclose(pairwise_probabilities(logits, shared), found)
    draws = logits[:, None] + torch.randn(5, 20_000, 4, generator=generator, dtype=F64) @ root.mT
    expected = draws.softmax(-1).mean(1)
    assert (expected - found).abs().max() < 0.1
    assert (expected - found).abs().mean() < 0.7 * (expected - logits.softmax(-1)).abs().mean()


def test_two_classes_are_the_probit_of_their_difference():
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
    (found,) = pairwise_probabilities(torch.tensor([[1.0, -0.4]], dtype=F64), covariance[None])
    assert float(found[0]) == pytest.approx(1 / (1 + math.exp(-1.4 / math.sqrt(1 + math.pi / 8 * 2.0))), rel=1e-12)


def test_scale_and_temperature_act_on_variance_and_logits():
    logits, variance = torch.tensor([[1.0, -2.0, 0.5]], dtype=F64), torch.tensor([[0.5, 1.0, 3.0]], dtype=F64)
    found = probit_probabilities(logits, variance, scale=3.0, temperature=2.0)
    assert torch.allclose(found, probit_probabilities(logits / 2, 3 * variance / 4))
    scaled = Predictive.from_moments(logits, variance).scaled(3.0, 2.0)
    assert torch.allclose(scaled.probabilities, found) and torch.allclose(scaled.variance, 0.75 * variance)
    covariance = variance.diag_embed()
    joint = Predictive.from_moments(logits, covariance=covariance).scaled(3.0, 2.0)
    assert torch.allclose(joint.probabilities, pairwise_probabilities(logits / 2, 0.75 * covariance))
    for options in ({"scale": 0.0}, {"temperature": -1.0}, {"scale": math.inf}):
        with pytest.raises(ValueError, match="must be > 0"):
            probit_probabilities(logits, variance, **options)
        with pytest.raises(ValueError, match="must be > 0"):
            pairwise_probabilities(logits, covariance, **options)


# -- fitted scale ----------------------------------------------------------------------------------------------------


def validation(scale=6.0, temperature=1.0, n=3000, classes=4, joint=False, seed=0):
    """Logits with variances that are too small by a known factor, and labels that the right ones explain."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, dtype=F64, generator=generator)
    variance = 0.2 + 3 * torch.rand(n, classes, dtype=F64, generator=generator)
    true = Predictive.from_moments(logits, variance).scaled(scale, temperature)
    labels = torch.multinomial(true.probabilities, 1, generator=generator).squeeze(1)
    return Predictive.from_moments(logits, variance), labels


def nll_of(predictive, labels, scale=1.0, temperature=1.0):
    found = predictive.scaled(scale, temperature).probabilities
    return float(nn.functional.nll_loss(found.log(), labels))


def test_a_fitted_scale_is_the_best_of_a_grid_and_near_the_true_one():
    predictive, labels = validation()
    found = fit_scale(predictive, labels)
    assert found.scale == pytest.approx(6.0, rel=0.35) and found.temperature == 1.0
    grid = torch.logspace(-6, 6, 4001, dtype=F64).tolist()
    values = [nll_of(predictive, labels, s) for s in grid]
    best = min(range(len(grid)), key=values.__getitem__)
    assert found.nll <= values[best] + 1e-12
    assert abs(math.log(found.scale / grid[best])) < 2 * math.log(grid[1] / grid[0])
    assert found.nll == pytest.approx(nll_of(predictive, labels, found.scale), rel=1e-12)
    assert found.nll_before == pytest.approx(nll_of(predictive, labels), rel=1e-12)
    assert found.labels == 3000 and not found.at_bound
    assert fit_scale(predictive, labels) == found
    assert torch.equal(found.apply(predictive).probabilities, predictive.scaled(found.scale).probabilities)


def test_a_fitted_temperature_is_that_of_temperature_scaling():
    predictive, labels = validation(scale=1e-6, temperature=2.5)
    alone = Predictive.from_moments(predictive.logits)
    found = fit_scale(alone, labels, "temperature")
    values = {t: nll_of(alone, labels, 1.0, t) for t in torch.linspace(1, 5, 801, dtype=F64).tolist()}
    best = min(values, key=values.__getitem__)
    assert abs(found.temperature - best) < 0.011 and found.scale == 1.0
    assert found.nll <= values[best] + 1e-12


def test_both_numbers_are_the_best_of_a_grid():
    predictive, labels = validation(scale=4.0, temperature=0.5, n=600)
    found = fit_scale(predictive, labels, "both")
    values = [
        nll_of(predictive, labels, s, t)
        for s in torch.logspace(-2, 3, 41, dtype=F64).tolist()
        for t in torch.logspace(-1, 1, 41, dtype=F64).tolist()
    ]
    assert found.nll <= min(values) + 1e-9
    assert found.nll <= fit_scale(predictive, labels).nll + 1e-9


def test_variances_that_only_harm_are_scaled_away_and_said_to_be():
    predictive, labels = validation(n=500)
    wrong = Predictive.from_moments(4 * nn.functional.one_hot(labels, 4).double(), predictive.variance)
    found = fit_scale(wrong, labels)
    assert found.scale == pytest.approx(1e-6) and found.at_bound


def test_covariances_and_language_models_are_fitted_too():
    predictive, labels = validation(n=400)
    joint = Predictive.from_moments(predictive.logits, covariance=predictive.variance.diag_embed())
    found = fit_scale(joint, labels)
    near = [joint.scaled(found.scale * f).probabilities.log() for f in (1.0, 0.9, 1.1)]
    losses = [float(nn.functional.nll_loss(p, labels)) for p in near]
    assert losses[0] <= min(losses) and losses[0] == pytest.approx(found.nll)
    tokens = Predictive.from_moments(predictive.logits.view(40, 10, 4), predictive.variance.view(40, 10, 4))
    masked = labels.view(40, 10).clone()
    masked[:, :3] = -100
    kept = torch.arange(400).view(40, 10)[:, 3:].flatten()
    rows = Predictive.from_moments(predictive.logits[kept], predictive.variance[kept])
    assert fit_scale(tokens, masked) == fit_scale(rows, labels[kept])


def test_a_fitted_scale_is_a_file(tmp_path):
    found = fit_scale(*validation(n=200), "both")
    found.save(tmp_path / "scale.json")
    assert FittedScale.load(tmp_path / "scale.json") == found
    assert json.loads((tmp_path / "scale.json").read_text())["scale"] == found.scale
    for text in ("{}", "not json", json.dumps({"scale": 1}), json.dumps(vars(found) | {"scale": -1.0})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="no fitted scale"):
            FittedScale.load(tmp_path / "bad.json")


def test_raises_when_there_is_nothing_to_fit_to():
    predictive, labels = validation(n=20)
    nan = predictive.logits.clone()
    nan[3, 1] = math.nan
    average = Predictive(predictive.logits, predictive.variance, predictive.probabilities, gaussian=False)
    for given, targets, options, match in (
        (predictive, torch.full_like(labels, -100), {}, "no validation labels"),
        (Predictive.from_moments(torch.zeros(0, 4)), labels[:0], {}, "no validation labels"),
        (predictive, labels[:-1], {}, "labels must be whole numbers of shape"),
        (predictive, labels.double(), {}, "whole numbers"),
        (predictive, labels + 3, {}, "for 4 classes"),
        (Predictive.from_moments(nan, predictive.variance), labels, {}, "logits .* NaN"),
        (Predictive.from_moments(predictive.logits, nan), labels, {}, "NaN"),
        (Predictive(predictive.logits, -predictive.variance, predictive.probabilities), labels, {}, "negative"),
        (Predictive.from_moments(predictive.logits), labels, {}, "All variances are zero"),
        (predictive, labels, {"fit": "all"}, "fit must be one of"),
        (average, labels, {}, "averages over adapters"),
    ):
        with pytest.raises(ValueError, match=match):
            fit_scale(given, targets, **options)


def test_raises_when_a_number_is_out_of_range():
    model, inputs = make_classifier()
    belief = diagonal_belief(model)
    for options, match in (({"draws": 1}, "draws must be at least 2"), ({"stacked": 0}, "stacked must be")):
        with pytest.raises(ValueError, match=match):
            sampled(model, belief, inputs, **options)
    for method in ("map", "streamlined", "linearized", "sampled"):
        with pytest.raises(ValueError, match=r"eval\(\)"):
            posterior_predictive(model.train(), belief, inputs, method)
