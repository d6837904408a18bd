"""The LoKO optimizer: what it observes, what it refuses, and that its state survives."""

import copy
import io

import pytest
import torch
from conftest import make_batch, make_lora_bert, make_lora_llama, randomise_b
from torch import nn

from kalman_peft import AdapterState, CategoricalObservation, LoKO, create_loko_optimizer
from kalman_peft.belief import Belief
from kalman_peft.loko.planning import interval
from kalman_peft.precision import DiagonalPrecision


def batches(n, **kwargs):
    return [make_batch(seed=s, **kwargs) for s in range(n)]


def run(model, optimizer, data):
    losses = []
    for batch in data:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        losses.append(optimizer.observe(model(**inputs).logits, batch["labels"]).item())
        optimizer.step()
    return losses


def test_loss_and_score_are_those_of_the_model(batch):
    model = make_lora_llama()
    optimizer = create_loko_optimizer(model, memory="diagonal", max_decrease=None, prior_tokens=1.0)
    out = model(**batch)
    params = list(AdapterState(model).parameters().values())
    tokens = (batch["labels"][:, 1:] != -100).sum()
    expected = torch.autograd.grad(-out.loss * tokens, params, retain_graph=True)
    loss = optimizer.observe(out.logits, batch["labels"])
    torch.testing.assert_close(loss.float(), out.loss.detach().float())
    found = {
        id(p): part
        for view, score in zip(optimizer._views, optimizer._harvest._score, strict=True)
        for p, part in zip(view.params, view.slices(score), strict=True)
    }
    for p, g in zip(params, expected, strict=True):
        torch.testing.assert_close(found[id(p)], g, rtol=1e-5, atol=1e-6)  # the model's own loss is float32
    assert all(p.grad is None for p in params)


def test_diagonal_step_is_precision_weighted(batch):
    # theta + g / (prior + draw^2), with prior known and the draw read from the buffer.
    model = make_lora_llama()
    view = AdapterState(model)
    optimizer = LoKO(
        view.parameters().items(), CategoricalObservation(shift=True), memory="diagonal", max_decrease=None,
        prior_precision=dict.fromkeys(view.parameters(), 50.0),
    )  # fmt: skip
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    optimizer.observe(model(**inputs).logits, batch["labels"])
    before = {id(p): p.detach().clone() for p in view.parameters().values()}
    harvest = optimizer._harvest
    score, (draw,) = [s.clone() for s in harvest._score], [[c.clone() for c in d] for d in harvest._draws]
    optimizer.step()
    for view, g, c in zip(optimizer._views, score, draw, strict=True):
        for p, part in zip(view.params, view.slices(g / (50.0 + c.square())), strict=True):
            torch.testing.assert_close(p.detach(), before[id(p)] + part)


def test_accumulation_equals_one_batch(batch):
    # At a step with draws, and at one without.
    model = make_lora_llama()
    start = copy.deepcopy(model.state_dict())
    results = []
    for split in (False, True):
        model.load_state_dict(start)
        optimizer = create_loko_optimizer(model, curvature_every=3, first_draws=0)
        parts = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)] if split else [batch]
        for _ in range(2):
            for part in parts:
                optimizer.observe(
                    model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits, part["labels"]
                )
            optimizer.step()
        results.append(AdapterState(model).flatten().clone())
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("memory", ["kronecker", "diagonal"])
def test_learns_and_beats_its_start(memory, batch):
    model = make_lora_llama(torch.float32)
    optimizer = create_loko_optimizer(model, memory=memory)
    losses = run(model, optimizer, [batch] * 25)
    assert losses[-1] < 0.6 * losses[0]
    assert {"kl", "trace_p", "gain_norm", "innovation"} <= optimizer.diagnostics.keys()
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 12


def test_every_trainable_tensor_moves_with_a_classification_head():
    model = make_lora_bert(torch.float32, target_modules=["value"]).eval()  # dropout would hide the descent
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in n for n in before)
    data = make_batch(lengths=(5, 3), prompt=0)
    data["labels"] = torch.tensor([2, 0])
    # With 1e3 labels' worth of prior, two labels would take long to halve the loss.
    optimizer = create_loko_optimizer(model, prior="initialisation", prior_tokens=30.0)
    losses = run(model, optimizer, [data] * 20)
    assert losses[-1] < losses[0] / 2
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert not torch.equal(p, before[n]), n


@pytest.mark.parametrize("memory", ["kronecker", "diagonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [1, 3])
def test_resume_is_bitwise_exact(memory, dtype, every):
    def fresh():
        model = make_lora_llama(dtype, attn="sdpa")
        return model, create_loko_optimizer(
            model, memory=memory, curvature_every=every, first_draws=2, forgetting=0.99
        )

    data = batches(7)
    model, optimizer = fresh()
    run(model, optimizer, data)
    other, first = fresh()
    run(other, first, data[:4])
    file = io.BytesIO()
    torch.save((first.state_dict(), other.state_dict()), file)
    file.seek(0)
    saved, weights = torch.load(file, weights_only=True)
    other, second = fresh()
    other.load_state_dict(weights)
    second.load_state_dict(saved)
    run(other, second, data[4:])
    assert torch.equal(AdapterState(model).flatten(), AdapterState(other).flatten())
    for a, b in zip(optimizer._memories, second._memories, strict=True):
        for key in a.tensors:
            assert a.tensors[key].dtype == torch.float32
            assert torch.equal(a.tensors[key], b.tensors[key]), key


def test_priors_follow_the_initialisation(batch):
    model = make_lora_llama(torch.float32, random_b=False)
    optimizer = create_loko_optimizer(model, prior_tokens=100.0)
    view = AdapterState(model)
    run(model, optimizer, [batch])
    for memory in optimizer._memories:
        for name, p, prior in zip(memory.view.names, memory.view.params, memory.prior, strict=True):
            if "lora_A" in name:
                assert prior.item() == pytest.approx(3 * p.shape[1], rel=0.7)  # Kaiming-uniform: 1 / (3 d_in)
            else:
                assert prior > 0
    assert len(view) == 6


def first_draw_fisher(model, batch):
    """Sums of the squared scores of the labels that the filter draws first, over the labels; by parameter."""
    optimizer = create_loko_optimizer(model, memory="diagonal")
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    optimizer.observe(model(**inputs).logits, batch["labels"])
    columns = optimizer._harvest._draws[0]
    count = float((batch["labels"][:, 1:] != -100).sum())
    return {
        name: part.square() / count
        for view, column in zip(optimizer._views, columns, strict=True)
        for name, part in zip(view.names, view.slices(column), strict=True)
    }


@pytest.mark.parametrize("memory", ["diagonal", "kronecker", "dense"])
def test_priors_by_formula(memory, batch):
    # Pooled: prior_tokens times the mean Fisher of all weights. Else that of each parameter; of lora_A its start's.
    priors = {}
    model = make_lora_llama(torch.float32, random_b=False)
    randomise_b(model, std=0.1)
    start = copy.deepcopy(model.state_dict())
    fisher = first_draw_fisher(model, batch)
    for prior in ("auto", "initialisation", "pooled"):
        model.load_state_dict(start)
        optimizer = create_loko_optimizer(model, prior=prior, prior_tokens=100.0, memory=memory)
        begin = AdapterState(model).snapshot()
        run(model, optimizer, [batch])
        priors[prior] = {
            name: value.item() for m in optimizer._memories for name, value in zip(m.view.names, m.prior, strict=True)
        }
    assert priors["auto"] == priors["initialisation"]  # as for all token models
    every = torch.cat([f.flatten() for f in fisher.values()])
    floor = 1e-3 * torch.stack([f.mean() for f in fisher.values()]).mean()
    for name, f in fisher.items():
        own = 1 / begin[name].square().mean() if "lora_A" in name else 100 * torch.maximum(f.mean(), floor)
        assert priors["initialisation"][name] == pytest.approx(float(own), rel=1e-4), name
        assert priors["pooled"][name] == pytest.approx(float(100 * every.mean()), rel=1e-4), name


@pytest.mark.parametrize("regression", [False, True])
def test_prior_is_pooled_unless_labels_are_tokens(regression):
    model = make_lora_bert(torch.float32, num_labels=1 if regression else 3).eval()
    optimizer = create_loko_optimizer(model)
    group = optimizer.param_groups[0]
    assert group["prior"] == "pooled" and group["prior_tokens"] == 1e3
    data = make_batch(lengths=(5, 3), prompt=0)
    data["labels"] = torch.tensor([0.3, -1.0]) if regression else torch.tensor([2, 0])
    run(model, optimizer, [data])
    assert len({p for m in optimizer._memories for p in m.prior.tolist()}) == 1
    assert create_loko_optimizer(make_lora_llama()).param_groups[0]["prior"] == "initialisation"


def test_an_empty_observation_changes_nothing(batch, caplog):
    model = make_lora_llama(torch.float32)
    optimizer = create_loko_optimizer(model)
    run(model, optimizer, [batch])
    before = AdapterState(model).flatten().clone()
    run(model, optimizer, [{**batch, "labels": torch.full_like(batch["labels"], -100)}])
    assert torch.equal(AdapterState(model).flatten(), before)
    assert "no label" in caplog.text


def test_a_first_step_without_labels_leaves_the_prior_to_the_next(batch):
    model = make_lora_llama(torch.float32)
    optimizer = create_loko_optimizer(model, curvature_every=10, first_draws=1)
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    losses = run(model, optimizer, [empty, batch, batch, batch])
    assert all(torch.isfinite(p).all() for p in AdapterState(model).parameters().values())
    assert optimizer.param_groups[0]["settled"] and losses[-1] < losses[1]


def test_tempering_scales_prior_and_data_alike(batch):
    # Half the likelihood and half the belief, with half the prior, is the same filter with twice the covariance.
    steps = []
    for temper in (1.0, 0.5):
        model = make_lora_llama(torch.float64)
        view = AdapterState(model)
        optimizer = LoKO(
            view.parameters().items(), CategoricalObservation(shift=True), max_decrease=None, tempering=temper,
            prior_precision=dict.fromkeys(view.parameters(), 400.0 * temper),
        )  # fmt: skip
        optimizer.set_belief(diagonal_belief(model), 2.0)
        for p in view.parameters().values():
            p.data.add_(0.05)
        before = view.flatten().clone()
        run(model, optimizer, [batch])
        steps.append(view.flatten() - before)
    torch.testing.assert_close(steps[0], steps[1])


def test_draws_count_for_the_steps_until_the_next(batch):
    model = make_lora_llama(torch.float32)
    optimizer = create_loko_optimizer(model, curvature_every=4, first_draws=2)
    seen = []
    for _ in range(10):
        drew = optimizer.draws_curvature
        run(model, optimizer, [batch])
        seen.append(interval(optimizer.param_groups[0]) if drew else 0)
    assert seen == [1, 3, 0, 0, 4, 0, 0, 0, 4, 0]


def test_step_size_obeys_the_trust_region(batch):
    for option, key in (("max_decrease", "decrease"), ("max_kl", "kl")):  # a share of the loss; nats per label
        model = make_lora_llama(torch.float32)
        options = {"max_decrease": None, "max_kl": None, "prior_tokens": 1e-3} | {option: 1e-4}
        optimizer = create_loko_optimizer(model, **options)
        (loss,) = run(model, optimizer, [batch])
        bound = 1e-4 * (loss if option == "max_decrease" else 1)
        assert float(optimizer.diagnostics[key]) == pytest.approx(bound, rel=1e-3)
        assert float(optimizer.diagnostics["trust"]) < 1


def diagonal_belief(model):
    view = AdapterState(model)
    return Belief(
        view.snapshot(),
        DiagonalPrecision({k: torch.rand(p.shape, generator=torch.Generator().manual_seed(0)) for k, p in view.parameters().items()}),
    )  # fmt: skip


def test_belief_as_prior_adds_its_share_of_gradient_and_information(batch):
    def one(belief_strength, mode):
        model = make_lora_llama(torch.float32)
        belief = diagonal_belief(model)
        for p in AdapterState(model).parameters().values():
            p.data.add_(0.1)
        optimizer = create_loko_optimizer(
            model, memory="diagonal", max_decrease=None, belief=belief, belief_strength=belief_strength,
            belief_mode=mode,
        )  # fmt: skip
        before = AdapterState(model).snapshot()
        run(model, optimizer, [batch])
        after = AdapterState(model).snapshot()
        precisions = {
            name: part
            for m in optimizer._memories
            for name, part in zip(m.view.names, m.view.slices(m.tensors["precision"]), strict=True)
        }
        return belief, before, after, precisions

    tokens = int((batch["labels"][:, 1:] != -100).sum())
    belief, before, free, plain = one(0.0, "factor")
    _, _, after, precise = one(3.0, "factor")
    _, _, penalised, same = one(3.0, "penalty")
    for k, f in belief.precision.entries.items():
        torch.testing.assert_close(precise[k], plain[k] + 3.0 * tokens * f)
        torch.testing.assert_close(same[k], plain[k])
        score = (free[k] - before[k]) * plain[k]  # g of the likelihood
        pull = 3.0 * tokens * f * 0.1
        torch.testing.assert_close(after[k] - before[k], (score - pull) / precise[k], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(penalised[k] - before[k], (score - pull) / plain[k], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options,match",
    [
        ({"memory": "full"}, "memory must be one of"),
        ({"rank": 0}, "rank must be"),
        ({"curvature_every": 0}, "curvature_every must be"),
        ({"prior_tokens": 0.0}, "prior_tokens must be positive"),
        ({"prior_tokens": float("nan")}, "prior_tokens must be positive"),
        ({"first_draws": -1}, "first_draws must be"),
        ({"trust_decay": -1.0}, "trust_decay must be"),
        ({"forgetting": 0.0}, "forgetting must be in"),
        ({"process_noise": -1.0}, "process_noise is a variance"),
        ({"max_kl": -1.0}, "max_kl must be positive"),
        ({"tempering": 0.0}, "tempering must be"),
    ],
)
def test_raises_when_an_option_is_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        create_loko_optimizer(make_lora_llama(), **options)


def test_raises_when_nothing_was_observed(batch):
    optimizer = create_loko_optimizer(make_lora_llama())
    with pytest.raises(RuntimeError, match="without an observation"):
        optimizer.step()
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0)


def test_skips_a_batch_that_is_not_finite_and_keeps_the_state(batch, caplog):
    model = make_lora_llama(torch.float32)
    optimizer = create_loko_optimizer(model, max_skipped=2)
    run(model, optimizer, [batch])
    before, memory = AdapterState(model).flatten().clone(), optimizer._memories[0].tensors["precision"].clone()
    for k in range(3):
        loss = optimizer.observe(model(input_ids=batch["input_ids"]).logits * float("nan"), batch["labels"])
        assert not torch.isfinite(loss)
        if k < 2:
            optimizer.step()
            assert f"NaN or Inf ({k + 1} in a row)" in caplog.text
        else:
            with pytest.raises(FloatingPointError, match="3 batches in a row"):
                optimizer.step()
    assert torch.equal(AdapterState(model).flatten(), before)
    assert torch.equal(optimizer._memories[0].tensors["precision"], memory)


def test_raises_when_checkpointing_is_reentrant(batch):
    model = make_lora_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    optimizer = create_loko_optimizer(model)
    with pytest.raises(ValueError, match="use_reentrant"):
        optimizer.observe(model(input_ids=batch["input_ids"]).logits, batch["labels"])


def test_raises_when_the_saved_filter_does_not_fit():
    saved = create_loko_optimizer(make_lora_llama(r=2)).state_dict()
    with pytest.raises(ValueError, match="another shape"):
        create_loko_optimizer(make_lora_llama(r=3)).load_state_dict(saved)
    with pytest.raises(ValueError, match="memory='kronecker', this one 'diagonal'"):
        create_loko_optimizer(make_lora_llama(r=2), memory="diagonal").load_state_dict(saved)


def test_raises_when_the_state_is_foreign_or_the_optimizer_is_copied(batch):
    model = make_lora_llama()
    optimizer = create_loko_optimizer(model)
    foreign = torch.optim.AdamW(AdapterState(model).parameters().values()).state_dict()
    with pytest.raises(ValueError, match="not one of LoKO"):
        optimizer.load_state_dict(foreign)
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match="one parameter group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="named_parameters"):
        LoKO(model.parameters(), CategoricalObservation(shift=True))
    with pytest.raises(ValueError, match=r"set_belief"):
        optimizer.belief_strength = 1.0


def test_raises_when_the_belief_is_over_another_adapter():
    belief = diagonal_belief(make_lora_llama(r=2))
    with pytest.raises(ValueError, match="use the rank"):
        create_loko_optimizer(make_lora_llama(r=3), belief=belief)


def test_innovation_is_one_for_labels_that_the_model_expects():
    # Labels drawn from the model itself: the score is distributed as the draws are.
    model = make_lora_llama(torch.float64)
    ratios = []
    for seed in range(40):
        batch = make_batch(lengths=(8, 8, 8), seed=seed)
        logits = model(input_ids=batch["input_ids"]).logits
        generator = torch.Generator().manual_seed(1000 + seed)
        drawn = torch.multinomial(logits.detach().softmax(-1).reshape(-1, 17), 1, generator=generator).view(3, 8)
        labels = torch.cat([torch.full((3, 1), -100), drawn[:, :-1]], dim=1)
        optimizer = create_loko_optimizer(
            model, memory="diagonal", seed=seed, tempering=0.1, first_draws=1, max_decrease=1e-9
        )
        optimizer.observe(logits, labels)
        optimizer.step()
        ratios.append(float(optimizer.diagnostics["innovation"]))
    assert 0.5 < sorted(ratios)[20] < 2.0


@pytest.mark.parametrize("gain", ["memory", "joint"])
def test_kl_of_a_step_is_that_under_the_information_gathered(gain, batch):
    model = make_lora_llama(torch.float64)
    optimizer = create_loko_optimizer(model, memory="dense", gain=gain, prior_tokens=5.0, curvature_every=1)
    run(model, optimizer, [batch, batch])
    memory, before = optimizer._memories[0], optimizer._views[0].read()
    run(model, optimizer, [batch])
    step = optimizer._views[0].read() - before
    information = memory.precision[0] - torch.diag(memory.view.expand(memory.prior))
    kl = step @ information @ step / (2 * optimizer.param_groups[0]["tokens"])
    assert optimizer.diagnostics["kl"] == pytest.approx(float(kl))


def test_raises_without_a_trainable_parameter():
    model = make_lora_llama()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        create_loko_optimizer(model)


def test_raises_when_the_model_is_no_peft_model():
    with pytest.raises(TypeError, match="PeftModel"):
        create_loko_optimizer(nn.Linear(2, 2))


def test_learning_rate_scales_the_step_and_schedulers_act(batch):
    model = make_lora_llama(torch.float32)
    optimizer = create_loko_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = AdapterState(model).flatten().clone()
    run(model, optimizer, [batch])
    scheduler.step()
    assert torch.equal(AdapterState(model).flatten(), before)
