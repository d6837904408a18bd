"""The linearised predictive against explicit Jacobians and dense covariances, on tiny models of each architecture."""

import sys

import pytest
import torch
from conftest import make_batch, make_lora_llama
from predictive import F64, diagonal_belief, linearised_variance, make_inputs, make_model
from torch.func import functional_call, jacrev

from kalman_peft import AdapterState, Belief, estimate_curvature, initial_belief
from kalman_peft.filtering.algebra import as_double
from kalman_peft.precision import precision_from_tensors
from kalman_peft.predictive import linearized, streamlined, weight_variances
from kalman_peft.predictive.posterior import posterior


NUMBERS = {"num_labels": 40.0, "prior_precision": 3.0}
STRUCTURES = ["diagonal", "low_rank", "kronecker", "ekfac", "dense"]


def make_classifier():
    model, inputs = make_model("bert"), make_batch()
    inputs["labels"] = torch.tensor([0, 2, 1])
    return model, inputs


def curvature_belief(model, inputs, structure):
    options = {"rank": 4} if structure == "low_rank" else {}
    precision, record = estimate_curvature(model, [inputs], structure=structure, space="adapter", **options)
    state = AdapterState(model, warn_excluded=False)
    return Belief(state.snapshot(F64), as_double(precision), {"curvature": record})


def explicit_jacobian(model, inputs, pick=lambda logits: logits):
    """(n, C, D) by reverse mode through the whole forward, in the order of the adapter's keys."""
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = AdapterState(model, warn_excluded=False).parameters()
    weights = {names[id(p)]: p.detach() for p in parameters.values()}
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    found = jacrev(lambda w: pick(functional_call(model, w, (), inputs).logits))(weights)
    shape = next(iter(found.values())).shape[:2]
    return torch.cat([found[name].reshape(*shape, -1) for name in weights], dim=2)


def dense_covariance(belief, **numbers):
    return torch.linalg.inv(posterior(belief, **numbers).precision.to_dense())


def close(found, expected, rtol=1e-8):
    return torch.allclose(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_covariance_of_a_classifier_is_that_of_the_explicit_jacobian(structure):
    model, inputs = make_classifier()
    belief = curvature_belief(model, inputs, structure)
    found = linearized(model, belief, inputs, **NUMBERS)
    jacobian = explicit_jacobian(model, inputs)
    sigma = dense_covariance(belief, **NUMBERS)
    expected = jacobian @ sigma @ jacobian.mT
    with torch.no_grad():
        assert torch.equal(found.logits, model(**inputs).logits)
    assert found.covariance.shape == (3, 3, 3)
    assert close(found.covariance, expected)
    assert torch.equal(found.variance, found.covariance.diagonal(dim1=1, dim2=2))
    assert torch.allclose(found.probabilities.sum(-1), torch.ones(3, dtype=F64))
    alone = linearized(model, belief, inputs, structure="diagonal", **NUMBERS)
    assert close(alone.covariance, jacobian @ sigma.diagonal().diag() @ jacobian.mT)
    if structure != "diagonal":
        assert not torch.allclose(alone.covariance, found.covariance, rtol=1e-3)


@pytest.mark.parametrize("kind", ["bert", "roberta", "vit"])
def test_diagonal_variances_are_those_of_the_linearised_network(kind):
    model, inputs = make_model(kind), make_inputs(kind)
    belief = diagonal_belief(model)
    found = linearized(model, belief, inputs)
    assert close(found.variance, linearised_variance(model, inputs, weight_variances(belief)))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("structure", ["low_rank", "ekfac"])
def test_the_last_token_of_a_language_model(structure, side):
    model, inputs = make_lora_llama(attn="sdpa").eval(), make_batch(side=side)
    belief = curvature_belief(model, inputs, structure)
    places = torch.tensor([5, 3, 4]) if side == "right" else torch.tensor([5, 5, 5])
    entries = [3, 7, 11]
    jacobian = explicit_jacobian(model, inputs, lambda z: z[torch.arange(3), places][:, entries])
    expected = jacobian @ dense_covariance(belief, **NUMBERS) @ jacobian.mT
    found = linearized(model, belief, inputs, positions="last", entries=entries, **NUMBERS)
    assert close(found.covariance, expected)
    given = linearized(model, belief, inputs, positions=places, entries=entries, **NUMBERS)
    assert torch.equal(given.covariance, found.covariance)


def test_the_rows_of_a_large_batch_are_taken_in_parts(monkeypatch):
    model, inputs = make_classifier()
    belief = diagonal_belief(model)
    whole = linearized(model, belief, inputs)
    monkeypatch.setattr(sys.modules["kalman_peft.predictive.linearized"], "BUDGET", 1)
    parts = linearized(model, belief, inputs)
    assert torch.allclose(parts.covariance, whole.covariance, rtol=1e-10)
    assert torch.allclose(parts.logits, whole.logits, rtol=1e-10)
    llama, places = make_lora_llama(attn="sdpa").eval(), torch.tensor([5, 3, 4])
    options = {"entries": [3, 7]}
    last = linearized(llama, diagonal_belief(llama), make_batch(), positions="last", **options)
    given = linearized(llama, diagonal_belief(llama), make_batch(), positions=places, **options)
    assert torch.allclose(given.covariance, last.covariance, rtol=1e-10)


@pytest.mark.parametrize("structure", ["diagonal", "low_rank"])
def test_the_monte_carlo_estimate_is_unbiased(structure):
    model, inputs = make_classifier()
    belief = curvature_belief(model, inputs, structure)
    generator = torch.Generator().manual_seed(0)
    exact = linearized(model, belief, inputs, **NUMBERS)
    found = linearized(model, belief, inputs, samples=300, generator=generator, **NUMBERS)
    assert torch.allclose(found.logits, exact.logits, rtol=1e-10)
    # Each entry's standard deviation is at most sqrt(2 / 300) of the geometric mean of the two variances.
    size = (exact.variance[:, :, None] * exact.variance[:, None, :]).sqrt()
    assert bool(((found.covariance - exact.covariance).abs() < 4.5 * (2 / 300) ** 0.5 * size).all())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_variances_of_all_tokens_and_the_whole_vocabulary_come_from_draws(kind):
    model, inputs = make_model(kind), make_inputs(kind)
    belief = diagonal_belief(model)
    generator = torch.Generator().manual_seed(0)
    found = linearized(model, belief, inputs, samples=200, generator=generator)
    expected = linearised_variance(model, inputs, weight_variances(belief))
    assert found.covariance is None and found.variance.shape == expected.shape
    seen = inputs["attention_mask"].bool() if "attention_mask" in inputs else ...
    ratio = (found.variance / expected)[seen]
    assert abs(float(ratio.mean()) - 1) < 0.06 and float(ratio.max()) < 1.7 and float(ratio.min()) > 0.5
    few = linearized(model, belief, inputs, samples=3, generator=generator, entries=[4, 5])
    assert few.variance.shape == (*expected.shape[:2], 2)


def test_the_model_is_unchanged_and_the_mean_is_the_beliefs():
    model, inputs = make_classifier()
    belief = diagonal_belief(model)
    moved = Belief({k: m + 0.1 for k, m in belief.mean.items()}, belief.precision, belief.info)
    before = {name: p.clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for options in ({}, {"samples": 2}):
        found = linearized(model, moved, inputs, **options)
        assert not torch.allclose(found.logits, linearized(model, belief, inputs).logits)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks for m in model.modules())


def test_frozen_adapters_have_the_same_covariance():
    model, inputs = make_classifier()
    belief = diagonal_belief(model)
    expected = linearized(model, belief, inputs).covariance
    for p in model.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(linearized(model, belief, inputs).covariance, expected)


def test_float32_models_and_beliefs():
    model, inputs = make_classifier()
    belief = curvature_belief(model, inputs, "low_rank")
    expected = linearized(model, belief, inputs, **NUMBERS)
    single = make_classifier()[0].float()
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in belief.precision.tensors().items()}
    precision = precision_from_tensors("low_rank", "adapter", tensors)
    lower = Belief({k: m.float() for k, m in belief.mean.items()}, precision, belief.info)
    for samples in (None, 2):
        found = linearized(single, lower, inputs, samples=samples, **NUMBERS)
        assert found.covariance.dtype == torch.float32 and found.logits.dtype == torch.float32
    found = linearized(single, lower, inputs, **NUMBERS)
    assert torch.allclose(found.covariance.double(), expected.covariance, rtol=1e-3, atol=1e-5)


def test_the_last_layer_equals_a_single_pass():
    """There streamlined prediction is the linearised one."""
    model = make_model("bert", targets=["classifier"])
    inputs, belief = make_inputs("bert"), diagonal_belief(model, 1e-12)
    with torch.no_grad(), streamlined(model, belief):
        expected = model(**inputs).logits_variance
    assert torch.allclose(linearized(model, belief, inputs).variance, expected, rtol=1e-8)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_raises_when_there_are_too_many_logits():
    model, belief = make_lora_llama().eval(), None
    belief = diagonal_belief(model)
    with pytest.raises(ValueError, match=r"positions='last'.*samples="):
        linearized(model, belief, make_batch())
    wide = make_lora_llama(model_overrides={"vocab_size": 200}).eval()
    with pytest.raises(ValueError, match="entries="):
        linearized(wide, diagonal_belief(wide), make_batch(), positions="last")


def test_raises_when_an_option_is_out_of_range():
    model, inputs = make_classifier()
    belief = diagonal_belief(model)
    for options, match in (
        ({"structure": "kronecker"}, "structure must be one of"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"positions": "last"}, "positions is for logits"),
    ):
        with pytest.raises(ValueError, match=match):
            linearized(model, belief, inputs, **options)
    llama = make_lora_llama().eval()
    with pytest.raises(ValueError, match="positions must be"):
        linearized(llama, diagonal_belief(llama), make_batch(), positions="first")


def test_raises_when_the_model_is_not_as_it_should_be():
    model, inputs = make_classifier()
    belief = diagonal_belief(model)
    with pytest.raises(ValueError, match=r"eval\(\)"):
        linearized(model.train(), belief, inputs)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        linearized(model, belief, inputs)
    dora = make_lora_llama(use_dora=True).eval()
    with pytest.raises(ValueError, match="DoRA"):
        linearized(dora, initial_belief(dora, 1.0, "diagonal"), make_batch())
