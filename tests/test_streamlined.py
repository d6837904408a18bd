"""One pass through whole models: bit-for-bit means, variances against samples and the linearised network, refusals."""

import pytest
import torch
import transformers
from conftest import make_batch, make_lora_llama, randomise_b
from peft import LoraConfig, get_peft_model
from predictive import (
    AFTER_ATTENTION,
    F64,
    TARGETS,
    diagonal_belief,
    independent,
    linearised_of,
    linearised_variance,
    make_inputs,
    make_model,
    output_of,
)
from torch import nn

from kalman_peft import AdapterState, Belief, BeliefError, Transition, estimate_curvature, initial_belief, predict
from kalman_peft.filtering.algebra import as_double
from kalman_peft.predictive import NoMomentRule, streamlined, variance_of, weight_variances
from kalman_peft.predictive.moments import lora_variance, rms_norm_variance


KINDS = list(TARGETS)


def pass_through(model, belief, inputs, **options):
    with torch.no_grad(), streamlined(model, belief, **options):
        out = model(**inputs)
    return out, out.get("logits_variance", out.get("pooler_output_variance"))


# -- every architecture ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_means_are_those_of_the_network_bit_for_bit(kind, attn):
    model, inputs = make_model(kind, attn), make_inputs(kind)
    with torch.no_grad():
        plain = model(**inputs)
    out, variance = pass_through(model, diagonal_belief(model), inputs)
    assert type(out) is type(plain)
    for name in set(plain) - {"past_key_values"}:
        assert torch.equal(out[name], plain[name]) and type(out[name]) is torch.Tensor
    assert variance.shape == output_of(out).shape
    assert bool((variance > 0).all())
    with torch.no_grad():
        again = model(**inputs)
    assert torch.equal(output_of(again), output_of(plain))
    assert not any(name.endswith("_variance") for name in again)


KIN = {
    "Mistral": {}, "Qwen2": {}, "Qwen3": {}, "Gemma": {"hidden_activation": "gelu_pytorch_tanh"}, "Phi3": {},
    "DistilBert": {"dim": 8, "hidden_dim": 12, "n_heads": 2, "n_layers": 2}, "ModernBert": {},
}  # fmt: skip


@pytest.mark.parametrize("name", KIN)
def test_relatives_of_these_models_need_no_rules_of_their_own(name):
    encoder = name in ("DistilBert", "ModernBert")
    options = {
        "vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 32, "pad_token_id": 0,
    }  # fmt: skip
    cls = getattr(transformers, name + ("ForSequenceClassification" if encoder else "ForCausalLM"))
    torch.manual_seed(0)
    base = cls(getattr(transformers, name + "Config")(**(options | KIN[name]))).to(F64)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"), autocast_adapter_dtype=False).eval()
    randomise_b(model)
    inputs = make_batch()
    inputs.pop("labels")
    with torch.no_grad():
        plain = model(**inputs)
    out, variance = pass_through(model, diagonal_belief(model, 1e-9), inputs)
    assert torch.equal(out.logits, plain.logits)
    # Gemma's logit of the padding token is 0 whatever the weights: its embedding is.
    assert bool((variance[..., 1:] > 0).all()) and bool((variance >= 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_no_variance_in_no_variance_out(kind):
    model, inputs = make_model(kind), make_inputs(kind)
    out, variance = pass_through(model, diagonal_belief(model, zero=(".weight",)), inputs)
    assert torch.equal(variance, torch.zeros_like(variance))
    with torch.no_grad():
        assert torch.equal(output_of(out), output_of(model(**inputs)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_uncertain_last_layer_equals_the_linearised_network(kind):
    """Nothing is approximated there: all of it rests on known hidden states."""
    model, inputs = make_model(kind, targets=[TARGETS[kind][1]]), make_inputs(kind)
    belief = diagonal_belief(model, 1e-12)
    _, variance = pass_through(model, belief, inputs)
    expected = linearised_variance(model, inputs, weight_variances(belief))
    assert torch.allclose(variance, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
def test_an_uncertain_last_layer_equals_samples_of_the_adapter(kind):
    """Also far from linear: the products of A and B and their variances are exact."""
    model, inputs = make_model(kind, targets=[TARGETS[kind][1]]), make_inputs(kind)
    belief = diagonal_belief(model, 0.1)
    _, variance = pass_through(model, belief, inputs)
    state, generator, n = AdapterState(model, warn_excluded=False), torch.Generator().manual_seed(0), 200_000
    (layer,) = (m for m in model.modules() if hasattr(m, "lora_A") and len(m.lora_A))
    caught = []
    handle = layer.register_forward_hook(lambda module, args, out: caught.append(args[0]))
    with torch.no_grad():
        model(**inputs)
        handle.remove()
        keys, found = list(belief.mean), weight_variances(belief)
        a, b = (
            belief.mean[k] + found[k].sqrt() * torch.randn(n, *found[k].shape, dtype=F64, generator=generator)
            for k in keys
        )
        x = caught[0].reshape(-1, caught[0].shape[-1])[:4]
        update = state.pairs[0].scaling * torch.einsum("nor,nri,ti->nto", b, a, x)
    expected = update.var(0)
    found = variance.reshape(-1, variance.shape[-1])[: len(expected)]
    assert torch.allclose(found, expected, rtol=0.03, atol=0)


VALUES = {"llama": "v_proj", "gpt2": "c_attn", "bert": "value", "roberta": "value", "vit": "v_proj"}


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", VALUES)
def test_attention_over_adapted_values_equals_the_linearised_one(kind, attn):
    """Positions share A and B: exact, whatever the length."""
    model = make_model(kind, attn, targets=[VALUES[kind]], depth=1)
    belief = diagonal_belief(model, 1e-12)
    variances = weight_variances(belief)
    if kind == "gpt2":  # queries and keys count as known, also where one layer makes them and the values
        (pair,) = AdapterState(model)
        pair.b.data[:16] = 0
        belief.mean[pair.key_b][:16] = 0
        variances[pair.key_b][:16] = 0
    (after,) = (m for name, m in model.named_modules() if name.endswith(AFTER_ATTENTION))
    caught = []
    after.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    for length in (3, 25):
        inputs = make_inputs(kind, length)
        model(**inputs)
        expected = linearised_of(caught.pop()[0, -1], model, variances)
        pass_through(model, belief, inputs)
        found = variance_of(caught.pop())[0, -1]
        # Eager attention of Llama rounds its weights to float32.
        assert torch.allclose(found, expected, rtol=1e-8 if attn == "sdpa" else 1e-4, atol=0)


def last_position(output):
    return output[:, -1] if output.dim() == 3 else output


# Without queries and keys, which count as known.
NO_QUERIES = {
    "llama": ["v_proj", "down_proj"], "bert": ["value", "output.dense"], "minilm": ["value"], "roberta": ["value"],
    "vit": ["v_proj", "fc1"],
}  # fmt: skip


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("queries", [True, False])
def test_variances_deep_in_the_network_follow_the_linearised_ones(queries, depth):
    """Of any length. What is left comes from channels, that count as independent, and from queries and keys."""
    logs = []
    kinds = KINDS if queries else list(NO_QUERIES)
    for kind in kinds:
        model = make_model(kind, targets=None if queries else NO_QUERIES[kind], width=64, depth=depth)
        belief = diagonal_belief(model, 1e-9)
        for length in (5, 26, 82):
            inputs = make_inputs(kind, length)
            expected = linearised_variance(model, inputs, weight_variances(belief), last_position)
            found = last_position(pass_through(model, belief, inputs)[1])
            logs.append((found.sum() / expected.sum()).log())
    ratios = torch.stack(logs).exp().view(len(kinds), 3)
    assert bool((ratios > (0.36 if queries else 0.5)).all()) and bool((ratios < 1.9).all())
    typical = ratios.log().mean(0).exp()
    assert bool((typical > (0.6 if queries else 0.9)).all()) and bool((typical < 1.25).all())
    assert 0.8 < typical[2] / typical[0] < 1.4


def test_variances_are_large_where_the_linearised_ones_are():
    """Rank and size of single outputs, as correlation of their logarithms."""
    found = []
    for kind in KINDS:
        model, inputs = make_model(kind), make_inputs(kind)
        belief = diagonal_belief(model, 1e-9)
        _, variance = pass_through(model, belief, inputs)
        expected = linearised_variance(model, inputs, weight_variances(belief))
        seen = expected > 1e-3 * expected.mean()
        found.append(float(torch.corrcoef(torch.stack([variance[seen].log(), expected[seen].log()]))[0, 1]))
    assert min(found) > 0.35 and sum(found) / len(found) > 0.65


def test_the_linearised_network_equals_samples_of_the_adapter_for_small_variances():
    """So that the comparisons above are with the right thing."""
    model, inputs = make_model("llama"), make_inputs("llama")
    belief = diagonal_belief(model, 1e-9)
    found, generator = weight_variances(belief), torch.Generator().manual_seed(0)
    state, outputs = AdapterState(model), []
    with torch.no_grad():
        for _ in range(300):
            noise = {k: torch.randn(v.shape, dtype=F64, generator=generator) for k, v in found.items()}
            state.load({k: m + found[k].sqrt() * noise[k] for k, m in belief.mean.items()})
            outputs.append(model(**inputs).logits)
    state.load(belief.mean)
    expected, sampled = linearised_variance(model, inputs, found), torch.stack(outputs).var(0)
    assert abs(sampled.sum() / expected.sum() - 1) < 0.15
    seen = expected > 1e-3 * expected.mean()
    assert abs((sampled / expected)[seen].mean() - 1) < 0.05


def test_a_stock_trainer_predicts_logits_and_variances(tmp_path):
    model, inputs = make_model("bert"), make_inputs("bert")
    belief = diagonal_belief(model)
    rows = [{name: t[i] for name, t in inputs.items()} for i in range(3)]
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, per_device_eval_batch_size=2)
    with streamlined(model, belief):
        found = transformers.Trainer(model, arguments).predict(rows)
    logits, variance = (torch.from_numpy(p) for p in found.predictions)
    out, expected = pass_through(model, belief, inputs)
    assert torch.allclose(logits, out.logits, rtol=1e-6, atol=0) and torch.allclose(
        variance, expected, rtol=1e-6, atol=0
    )


# -- a whole block by hand -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_llama_layer_equals_the_rules_written_out(attn):
    """Grouped queries, rotary embeddings, SwiGLU, residuals and norms, with LoRA on the values and the down projection."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    overrides = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    model = make_lora_llama(attn=attn, model_overrides=overrides, target_modules=targets).eval()
    belief = diagonal_belief(model, 0.02)
    ids = make_batch(lengths=(6,))["input_ids"]
    out, variance = pass_through(model, belief, {"input_ids": ids})
    spread = weight_variances(belief)
    llama = model.get_base_model().model
    layer, attention = llama.layers[0], llama.layers[0].self_attn
    state = {pair.name.split(".")[-1]: pair for pair in AdapterState(model)}

    def project(name, module, x, v):
        if name not in state:
            return module(x), v @ module.weight.square().T
        pair = state[name]
        factors, own = (pair.a, pair.b), (spread[pair.key_a], spread[pair.key_b])
        return module(x), lora_variance(x, v, module.base_layer.weight, factors, independent(*own), pair.scaling)

    def heads(x, count):
        return x.view(1, 6, count, 2).transpose(1, 2)

    with torch.no_grad():
        x = llama.embed_tokens(ids)
        h = layer.input_layernorm(x)
        cos, sin = llama.rotary_emb(x, torch.arange(6)[None])
        q, k = apply_rotary_pos_emb(heads(attention.q_proj(h), 4), heads(attention.k_proj(h), 2), cos, sin)
        k, values = (t.repeat_interleave(2, 1) for t in (k, heads(attention.v_proj(h), 2)))
        mean = nn.functional.scaled_dot_product_attention(q, k, values, is_causal=True)
        # A query's values are the projection of its mixed input.
        seen = torch.ones(6, 6, dtype=torch.bool).tril()
        mixed = (q @ k.mT * 2**-0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ h[:, None]
        _, v = project("v_proj", attention.v_proj, mixed, None)
        v = torch.stack([v[:, head, :, 2 * (head // 2) : 2 * (head // 2) + 2] for head in range(4)], 1)
        mean, v = (t.transpose(1, 2).reshape(1, 6, 8) for t in (mean, v))
        mean, v = project("o_proj", attention.o_proj, mean, v)
        x = x + mean
        normed, nv = layer.post_attention_layernorm(x), None
        nv = rms_norm_variance(x, v, 1, layer.post_attention_layernorm.weight, 1e-6)
        gate, gv = project("gate_proj", layer.mlp.gate_proj, normed, nv)
        up, uv = project("up_proj", layer.mlp.up_proj, normed, nv)
        s = gate.sigmoid()
        gv, gate = (s * (1 + gate * (1 - s))) ** 2 * gv, gate * s
        mean, mv = project("down_proj", layer.mlp.down_proj, gate * up, gate**2 * uv + up**2 * gv + gv * uv)
        x, v = x + mean, v + mv
        v = rms_norm_variance(x, v, 1, llama.norm.weight, 1e-6) @ model.get_base_model().lm_head.weight.square().T
        logits = model.get_base_model().lm_head(llama.norm(x))
    rtol = 1e-10 if attn == "sdpa" else 1e-5  # eager attention rounds its weights to float32
    assert torch.allclose(out.logits, logits, rtol=rtol, atol=rtol)
    assert torch.allclose(variance, v, rtol=rtol, atol=0)


def test_padding_does_not_reach_other_positions():
    model = make_lora_llama().eval()
    belief, batch = diagonal_belief(model), make_batch(lengths=(6, 4))
    _, both = pass_through(model, belief, batch)
    alone = {name: t[1:, :4] for name, t in batch.items()}
    _, one = pass_through(model, belief, alone)
    assert torch.allclose(both[1:, :4], one, rtol=1e-10, atol=0)


def test_16_bit_models_have_float32_variances():
    model = make_lora_llama(torch.bfloat16).eval()
    belief = initial_belief(model, 1e4, "diagonal")
    with torch.no_grad():
        plain = model(**make_batch())
    out, variance = pass_through(model, belief, make_batch())
    assert torch.equal(out.logits, plain.logits) and out.logits.dtype == torch.bfloat16
    assert variance.dtype == torch.float32
    exact = make_lora_llama().eval()
    _, expected = pass_through(exact, initial_belief(exact, 1e4, "diagonal", dtype=F64), make_batch())
    assert abs(variance.double().log().mean() - expected.log().mean()) < 0.05


def test_autocast_rounds_means_but_not_variances():
    model = make_lora_llama(torch.float32).eval()
    belief = initial_belief(model, 1e4, "diagonal")
    _, expected = pass_through(model, belief, make_batch())
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            plain = model(**make_batch())
        out, variance = pass_through(model, belief, make_batch())
    assert torch.equal(out.logits, plain.logits) and out.logits.dtype == torch.bfloat16
    assert variance.dtype == torch.float32
    assert abs((variance / expected).log().mean()) < 0.05
    with torch.inference_mode(), streamlined(model, belief):
        assert torch.equal(model(**make_batch()).logits_variance, expected)


def test_variances_are_differentiable_in_the_input():
    model = make_lora_llama().eval()
    embeddings = model.get_input_embeddings()(make_batch()["input_ids"]).detach().requires_grad_()
    with streamlined(model, diagonal_belief(model)):
        total = model(inputs_embeds=embeddings).logits_variance.sum()
    (slope,) = torch.autograd.grad(total, embeddings)
    assert bool((slope.abs().sum(-1) > 0).all())
    with torch.no_grad(), streamlined(model, diagonal_belief(model)):
        step = 1e-6 * slope
        moved = model(inputs_embeds=embeddings + step).logits_variance.sum()
        back = model(inputs_embeds=embeddings - step).logits_variance.sum()
    assert torch.allclose((moved - back) / 2, (slope * step).sum(), rtol=1e-3, atol=0)


# -- beliefs ---------------------------------------------------------------------------------------------------------


def test_the_mean_is_the_beliefs_and_the_weights_come_back():
    model = make_lora_llama().eval()
    before = AdapterState(model).snapshot(F64)
    belief = diagonal_belief(model)
    moved = Belief({k: m + 0.1 for k, m in belief.mean.items()}, belief.precision, belief.info)
    with torch.no_grad():
        plain = model(**make_batch())
    out, _ = pass_through(model, moved, make_batch())
    assert not torch.allclose(out.logits, plain.logits)
    with pytest.raises(RuntimeError, match="on purpose"), streamlined(model, moved):
        raise RuntimeError("on purpose")
    for key, value in AdapterState(model).tensors().items():
        assert torch.equal(value, before[key])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("structure", ["diagonal", "low_rank", "kronecker", "ekfac", "dense"])
def test_variances_of_a_curvature_are_the_diagonal_of_its_posterior(structure):
    model = make_lora_llama()
    options = {"rank": 4} if structure == "low_rank" else {}
    precision, record = estimate_curvature(model, [make_batch()], structure=structure, space="adapter", **options)
    belief = Belief(AdapterState(model).snapshot(F64), precision, {"curvature": record})
    found = weight_variances(belief, num_labels=40.0, prior_precision=3.0)
    dense = 40.0 * precision.to_dense().double()
    inverse = torch.linalg.inv(dense + 3.0 * torch.eye(len(dense), dtype=F64)).diagonal()
    flat = torch.cat([found[key].reshape(-1) for key in precision.coordinates()]).double()
    assert torch.allclose(flat, inverse, rtol=1e-4, atol=0)
    with pytest.raises(BeliefError, match=r"num_labels.*prior_precision"):
        weight_variances(belief)


@pytest.mark.parametrize("structure", ["kronecker", "ekfac"])
@pytest.mark.parametrize("where", ["lm_head", "v_proj"])
@pytest.mark.parametrize("rank", [8, 3])
def test_correlations_within_a_factor_equal_the_linearised_network(where, rank, structure):
    """With all directions of the long sides, and with three of them."""
    model, inputs = make_model("llama", targets=[where], depth=1), make_inputs("llama", 9)
    batch = inputs | {"labels": inputs["input_ids"]}
    options = {"rank": rank, "dense_limit": 4 if rank < 8 else 256, "progress_bar": False}
    precision, record = estimate_curvature(model, [batch], structure, space="adapter", **options)
    belief = Belief(AdapterState(model).snapshot(F64), as_double(precision), {"curvature": record})
    posterior = {"num_labels": 1e12, "prior_precision": 1e10}
    caught = []
    attended = model.get_submodule("base_model.model.model.layers.0.self_attn.o_proj")
    attended.register_forward_pre_hook(lambda module, args: caught.append(args[0]))

    def last_position_of(**options):
        variance = pass_through(model, belief, inputs, **posterior, **options)[1]
        return (variance if where == "lm_head" else variance_of(caught.pop()))[0, -1]

    logits = model(**inputs).logits
    output = (logits if where == "lm_head" else caught.pop())[0, -1]
    dense = posterior["num_labels"] * belief.precision.to_dense()
    covariance = torch.linalg.inv(dense + posterior["prior_precision"] * torch.eye(len(dense), dtype=F64))
    (pair,) = AdapterState(model)
    parameters = {pair.key_a: pair.a, pair.key_b: pair.b}
    eye = torch.eye(len(output), dtype=F64)
    rows = torch.autograd.grad(
        output, [parameters[key] for key in precision.coordinates()], eye, is_grads_batched=True
    )
    jacobian = torch.cat([row.flatten(1) for row in rows], 1)
    expected = torch.einsum("ki,ij,kj->k", jacobian, covariance, jacobian)
    assert torch.allclose(last_position_of(), expected, rtol=1e-7, atol=0)
    with pytest.raises(ValueError, match="structure must be one of"):
        last_position_of(structure="half")
    # It is not what the diagonal says.
    alone, diagonal = last_position_of(structure="diagonal"), jacobian.square() @ covariance.diagonal()
    assert torch.allclose(alone, diagonal, rtol=1e-7, atol=0) and not torch.allclose(
        alone, expected, rtol=0.01, atol=0
    )


def test_filter_states_and_loko_beliefs_hold_their_prior():
    model = make_lora_llama()
    state = predict(initial_belief(model, 4.0, "diagonal"), Transition(process_noise=0.5))
    assert all(torch.allclose(v, torch.full_like(v, 0.75)) for v in weight_variances(state).values())
    with pytest.raises(ValueError, match="Leave them out"):
        weight_variances(state, num_labels=3.0)
    loko = Belief(state.mean, state.precision.scale(0.1), {"num_labels": 10})
    assert all(torch.allclose(v, torch.full_like(v, 0.75)) for v in weight_variances(loko).values())
    assert all(torch.allclose(v, torch.full_like(v, 1.5)) for v in weight_variances(loko, num_labels=5).values())
    with pytest.raises(ValueError, match="holds its prior"):
        weight_variances(loko, prior_precision=1.0)


def test_raises_when_a_belief_gives_no_variances():
    model = make_lora_llama()
    for options, match in (
        ({"space": "delta_w", "structure": "diagonal"}, "space='adapter'"),
        ({"structure": "block_tridiagonal", "space": "adapter"}, "block_tridiagonal"),
    ):
        belief = Belief.fit(model, [make_batch()], **options)
        with pytest.raises(BeliefError, match=match):
            weight_variances(belief, num_labels=3.0, prior_precision=1.0)


# -- refusals --------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A layer with a weight and a function that no rule is known for."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, dtype=F64))

    def forward(self, x):
        return self.weight * x.exp()


def test_raises_when_a_module_has_no_rule():
    model = make_lora_llama().eval()
    model.get_base_model().model.norm = Odd()
    with pytest.raises(NoMomentRule, match=r"exp\(\).*module 'model.norm' of type Odd.*register_rule"):
        pass_through(model, diagonal_belief(model), make_batch())


def test_raises_when_something_would_lose_the_variance():
    model = make_lora_llama().eval()
    belief, batch = diagonal_belief(model), make_batch()
    with streamlined(model, belief):
        with pytest.raises(ValueError, match=r"generate\(\)"):
            model.generate(input_ids=batch["input_ids"], max_new_tokens=2)
        with pytest.raises(ValueError, match="use_cache=False"):
            model(**batch, use_cache=True)
        with pytest.raises(ValueError, match="return_dict"):
            model(**batch, return_dict=False)
        with pytest.raises(ValueError, match="nested"), streamlined(model, belief):
            pass
        with pytest.raises(ValueError, match=r"eval\(\)"):
            model.train()(**batch)


def test_raises_when_only_queries_and_keys_are_adapted():
    model = make_lora_llama(target_modules=["q_proj", "k_proj"]).eval()
    with pytest.raises(NoMomentRule, match="Adapt values"):
        pass_through(model, diagonal_belief(model), make_batch())


def test_raises_when_the_adapter_is_not_as_it_should_be():
    model = make_lora_llama().eval()
    belief = diagonal_belief(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"), streamlined(model, belief):
        pass
    model.unmerge_adapter()
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    with pytest.raises(ValueError, match="set_adapter"), streamlined(model, belief, adapter_name="default"):
        pass
    dora = make_lora_llama(use_dora=True).eval()
    with pytest.raises(ValueError, match="DoRA"), streamlined(dora, diagonal_belief(dora)):
        pass
    flex = make_lora_llama().eval()
    flex.get_base_model().config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"), streamlined(flex, diagonal_belief(flex)):
        pass
