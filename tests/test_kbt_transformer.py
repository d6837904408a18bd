"""Kalman updates of a decision transformer and of LoRA factors: against transformers, dense filters and sampling."""

import math
from typing import Any

import pytest
import torch
from conftest import make_lora_bert, randomise_b
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import DecisionTransformerConfig, DecisionTransformerModel

from kalman_peft import AdapterState
from kalman_peft.kbt import KalmanAdapter, KalmanDecisionTransformer


F64 = torch.float64


def make_decision(dtype=F64, **overrides):
    torch.manual_seed(0)
    options = {
        "state_dim": 3, "act_dim": 2, "hidden_size": 8, "n_layer": 2, "n_head": 2, "max_ep_len": 16, "n_inner": 12,
        "action_tanh": False, "initializer_range": 0.3,
    }  # fmt: skip
    config = DecisionTransformerConfig(**(options | overrides))
    model: Any = DecisionTransformerModel._from_config(config, attn_implementation="eager")
    return model.to(dtype).eval()


def contexts(batch=3, steps=4, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)

    def normal(width):
        return torch.randn(batch, steps, width, generator=generator, dtype=F64).to(dtype)

    start = torch.randint(0, 8, (batch, 1), generator=generator)
    return {
        "states": normal(3), "actions": normal(2), "returns_to_go": normal(1), "timesteps": start + torch.arange(steps)
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    "overrides", [{}, {"action_tanh": True}, {"activation_function": "gelu_new"}, {"activation_function": "gelu"}]
)
def test_without_variance_it_is_the_decision_transformer_bit_for_bit(dtype, overrides):
    model = make_decision(dtype, **overrides)
    net, inputs = KalmanDecisionTransformer(model, 0.0), contexts(dtype=dtype)
    found = net.predict(inputs)
    assert torch.equal(found.mean, model(**inputs).action_preds[:, -1])
    assert (found.variance == 0).all()


def test_padding_on_the_left_is_not_attended():
    model, inputs = make_decision(), contexts()
    inputs["attention_mask"] = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    net = KalmanDecisionTransformer(model, 0.0)
    expected = model(**inputs).action_preds[:, -1]
    torch.testing.assert_close(net.predict(inputs).mean, expected, rtol=0, atol=0)
    other = {k: v.clone() for k, v in inputs.items()}
    other["states"][0, :2] = 7.0
    uncertain = KalmanDecisionTransformer(model, 0.1)
    for part in ("mean", "variance"):
        found = getattr(uncertain.predict(inputs), part), getattr(uncertain.predict(other), part)
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def jacobians(model, names, inputs):
    outputs = model(**inputs).action_preds[:, -1].reshape(-1)
    parameters = dict(model.named_parameters())
    wanted = [parameters[n] for n in names]
    rows = [torch.autograd.grad(o, wanted, retain_graph=True, allow_unused=True) for o in outputs]
    return [
        torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(row, wanted, strict=True)])
        for row in rows
    ]


def test_for_small_variances_the_update_is_the_extended_kalman_filters():
    # A head and an embedding whose rows are neurons: the same as a dense filter, reduced to blocks by row.
    model = make_decision()
    net = KalmanDecisionTransformer(model, {"predict_action.0": 1e-6, "embed_state": 1e-6}, noise=1e-6)
    names = ["predict_action.0.weight", "predict_action.0.bias", "embed_state.weight", "embed_state.bias"]
    inputs, targets = contexts(1), torch.tensor([[0.3, -0.2]], dtype=F64)
    j = torch.stack(jacobians(model, names, inputs))
    head, width = net.gaussians["predict_action.0"], net.gaussians["embed_state"]
    variances = [head.prior_variance] * 18 + [width.prior_variance] * 32
    c = torch.diag(torch.tensor(variances, dtype=F64))
    before = torch.cat([p.detach().reshape(-1).clone() for n in names for p in [model.get_parameter(n)]])
    error = (targets - model(**inputs).action_preds[:, -1]).detach()[0]
    # What the propagated variances have beyond the slopes (there, positions are independent) counts as noise.
    extra = (net.predict(inputs).variance[0] - (j @ c @ j.T).diagonal()).clamp(min=0)
    gain = c @ j.T @ torch.linalg.inv(j @ c @ j.T + 1e-6 * torch.eye(2, dtype=F64) + torch.diag(extra))
    net.update(inputs, targets)
    after = torch.cat([p.detach().reshape(-1) for n in names for p in [model.get_parameter(n)]])
    # Second-order terms of the moments are of the order of the variances.
    torch.testing.assert_close(after - before, gain @ error, rtol=2e-3, atol=1e-9)
    dense = (c - gain @ j @ c)[18:42, 18:42]  # of embed_state.weight, (8, 3)
    found = torch.stack([width.covariance()[n, :3, :3] for n in range(8)])
    blocks = torch.stack([dense[3 * n : 3 * n + 3, 3 * n : 3 * n + 3] for n in range(8)])
    torch.testing.assert_close(found, blocks, rtol=2e-3, atol=1e-12)


def test_learning_moves_all_layers_and_lowers_the_error():
    model = make_decision(torch.float32)
    net = KalmanDecisionTransformer(model, 0.05, noise=0.01)
    names = set(net.gaussians)
    assert {"embed_timestep", "embed_action", "encoder.h.1.attn.c_attn", "encoder.h.0.mlp.c_proj"} < names
    inputs = contexts(40, dtype=torch.float32)
    targets = torch.stack([inputs["states"][:, -1].sum(-1), inputs["states"][:, -1, 0]], 1)
    rows = {name: g.rows() for name, g in net.gaussians.items()}
    start = (net.predict(inputs).mean - targets).square().mean()
    for _ in range(3):
        net.update(inputs, targets)
    assert (net.predict(inputs).mean - targets).square().mean() < 0.15 * start
    for name, gaussian in net.gaussians.items():
        assert not torch.equal(gaussian.rows(), rows[name]), name
        assert (gaussian.variances() > 0).all()


def test_predictive_variance_is_near_that_of_sampled_weights():
    model = make_decision()
    net, inputs = KalmanDecisionTransformer(model, 0.002), contexts()
    found = net.predict(inputs)
    rows = {name: g.rows() for name, g in net.gaussians.items()}
    generator, draws = torch.Generator().manual_seed(0), []
    for _ in range(400):
        for name, g in net.gaussians.items():
            noise = torch.randn(rows[name].shape, generator=generator, dtype=F64)
            g.write(rows[name] + g.prior_variance**0.5 * noise, g.factor)
        draws.append(model(**inputs).action_preds[:, -1].detach())
    sampled = torch.stack(draws)
    # Positions and branches share weights, which the propagated variances do not know.
    ratio = found.variance / sampled.var(0)
    assert (ratio > 0.3).all() and (ratio < 2.5).all()


def test_refuses_training_mode_and_cross_attention():
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        KalmanDecisionTransformer(make_decision().train())
    with pytest.raises(ValueError, match="add_cross_attention=True is not supported"):
        KalmanDecisionTransformer(make_decision(add_cross_attention=True))


def test_refuses_a_batch_with_nan_and_keeps_its_state(tmp_path):
    net = KalmanDecisionTransformer(make_decision(), 0.05)
    before = [g.rows() for g in net.gaussians.values()]
    inputs = contexts()
    inputs["states"][2, 1, 0] = math.nan
    with pytest.raises(ValueError, match="`states` has NaN or Inf"):
        net.update(inputs, torch.zeros(3, 2, dtype=F64))
    assert all(torch.equal(a, g.rows()) for a, g in zip(before, net.gaussians.values(), strict=True))


def test_resumes_as_if_it_had_not_stopped(tmp_path):
    whole = KalmanDecisionTransformer(make_decision(torch.float32), 0.05, relaxation=0.01)
    inputs = contexts(6, dtype=torch.float32)
    targets = torch.zeros(6, 2)
    whole.update({k: v[:3] for k, v in inputs.items()}, targets[:3])
    whole.save_pretrained(tmp_path)
    fresh = KalmanDecisionTransformer(make_decision(torch.float32), 0.3)
    fresh.load(tmp_path)
    for net in (whole, fresh):
        net.update({k: v[3:] for k, v in inputs.items()}, targets[3:])
    for name, gaussian in whole.gaussians.items():
        assert torch.equal(gaussian.rows(), fresh.gaussians[name].rows())
        assert torch.equal(gaussian.factor, fresh.gaussians[name].factor)


# -- adapters ------------------------------------------------------------------------------------------------------


def batch(n=2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 17, (n, 6), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_adapter_update_is_the_extended_kalman_filters_by_row():
    model = make_lora_bert().eval()
    randomise_b(model)
    net = KalmanAdapter(model, variance_a=1e-6, variance_b=2e-6, damping=0.0)
    state, inputs, label = AdapterState(model), batch(1), torch.tensor([2])
    parameters = state.parameters()
    logits = model(**inputs).logits[0]
    j = torch.stack(
        [torch.cat([g.reshape(-1) for g in torch.autograd.grad(z, list(parameters.values()), retain_graph=True)])
         for z in logits]
    )  # fmt: skip
    c = torch.cat(
        [torch.full((p.numel(),), 2e-6 if "lora_B" in key else 1e-6, dtype=F64) for key, p in parameters.items()]
    )
    p = logits.softmax(-1).detach()
    h = torch.diag(p) - torch.outer(p, p)
    after = torch.linalg.inv(torch.diag(1 / c) + j.T @ h @ j)
    step = after @ j.T @ (F.one_hot(label[0], 3).double() - p)
    before = state.flatten().clone()
    net.update(inputs, label)
    torch.testing.assert_close(state.flatten() - before, step, rtol=1e-3, atol=1e-12)
    start = 0
    for key, parameter in parameters.items():
        rows, width = parameter.shape
        for n in range(rows):
            block = after[start : start + width, start : start + width]
            torch.testing.assert_close(net.gaussians[key].covariance()[n], block, rtol=1e-4, atol=1e-14)
            start += width
    assert start == len(before)


def test_adapter_learns_a_classifier_and_leaves_the_base_alone():
    model = make_lora_bert(torch.float32).eval()
    for name, p in model.named_parameters():  # logits should depend visibly on the input
        if p.dim() == 2 and "lora_" not in name:
            torch.nn.init.normal_(p, std=0.6)
    base = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    net = KalmanAdapter(model, variance_b=0.3)
    inputs = batch(24)
    randomise_b(model, std=1.0)  # labels that some adapter explains
    labels = model(**inputs).logits.argmax(-1)
    for pair in AdapterState(model):
        pair.b.data.zero_()
    losses = [net.update(inputs, labels)["loss"] for _ in range(4)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    found = net.predict(inputs)
    torch.testing.assert_close(found.mean.sum(-1), torch.ones(24), rtol=1e-5, atol=1e-5)
    assert (found.variance > 0).all()


def test_adapter_with_known_factors_is_the_model(dtype=F64):
    model = make_lora_bert().eval()
    randomise_b(model)
    net = KalmanAdapter(model, variance_a=0.0, variance_b=0.0)
    found, inputs = net.predict(batch()), batch()
    assert torch.equal(found.mean, model(**inputs).logits.softmax(-1).detach()) and (found.variance == 0).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_adapter_of_several_outputs_and_samples_at_once(attention):
    # One step from all rows: the slopes are those of each output by itself.
    torch.manual_seed(0)
    model = make_lora_bert().eval()
    model.set_attn_implementation(attention)
    randomise_b(model)
    net = KalmanAdapter(model, variance_b=0.1)
    logits = net.forward(batch()).mean
    found = net._scaled_slopes(logits)
    parameters = AdapterState(model).parameters()
    for m, z in enumerate(model(**batch()).logits.reshape(-1)):
        for key, g in zip(
            parameters, torch.autograd.grad(z, list(parameters.values()), retain_graph=True), strict=True
        ):
            scaled = g * net.gaussians[key].prior_variance ** 0.5
            torch.testing.assert_close(found[key][m], scaled, rtol=1e-7, atol=1e-10)
    before = AdapterState(model).flatten().clone()
    net.update(batch(), torch.tensor([0, 2]), sequential=False)
    assert net.updates == 2 and not torch.equal(before, AdapterState(model).flatten())


def test_adapter_of_a_decision_transformer_is_refused_by_name_of_what_is_missing():
    model = get_peft_model(make_decision(), LoraConfig(r=2, target_modules=["c_attn"])).eval()
    net = KalmanAdapter(model)
    with pytest.raises(AttributeError, match="logits"):
        net.predict(contexts())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"variance_a": -1.0}, "variance_a must be"), ({"variance_b": math.inf}, "variance_b must be")],
)
def test_adapter_raises_for(options, message):
    with pytest.raises(ValueError, match=message):
        KalmanAdapter(make_lora_bert().eval(), **options)
    with pytest.raises(ValueError, match="training mode"):
        KalmanAdapter(make_lora_bert().train())
