"""The independent-mechanism contrast: its zero, gradient and invariance, and its life in a Trainer."""

import math
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from conftest import make_lora_llama
from training import dataset, make_tokenizer, trainer, weights
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from kalman_peft import AdapterState, Belief, ImaCallback, KalmanConfig, create_loko_optimizer
from kalman_peft.ima import add_ima_gradient, contrast_and_gradient, effective_ranks


F64 = torch.float64


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def stack(n=3, d=7, r=4, seed=0):
    return torch.randn(n, d, r, generator=torch.Generator().manual_seed(seed), dtype=F64)


def reference(b, epsilon=0.0):
    """1/2 [sum log diag - log det] of B^T B + epsilon I."""
    gram = b.T @ b + epsilon * torch.eye(b.shape[1], dtype=b.dtype)
    return (gram.diagonal().log().sum() - torch.logdet(gram)) / 2


@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_contrast_is_that_of_the_definition(epsilon):
    columns = stack()
    found, _ = contrast_and_gradient(columns, epsilon)
    # The share of 1e-6 that keeps parallel columns finite changes it by no more.
    torch.testing.assert_close(found, torch.stack([reference(b, epsilon) for b in columns]), rtol=0, atol=2e-5)
    assert (found > 0.05).all()


@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_zero_exactly_where_columns_are_orthogonal(epsilon):
    q = torch.linalg.qr(stack()).Q * torch.tensor([0.1, 1.0, 3.0, 20.0], dtype=F64)
    contrast, gradient = contrast_and_gradient(q, epsilon)
    assert contrast.abs().max() < 1e-12 and gradient.abs().max() < 1e-10
    q[:, :, 1] += 1e-3 * q[:, :, 0]
    assert (contrast_and_gradient(q, epsilon)[0] > 1e-9).all()


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 2.0])
def test_gradient_is_autograds(epsilon):
    columns = stack().requires_grad_()
    contrast, gradient = contrast_and_gradient(columns, epsilon)
    torch.testing.assert_close(gradient, torch.autograd.grad(contrast.sum(), columns)[0], rtol=1e-9, atol=1e-10)


def test_contrast_does_not_see_the_lengths_of_columns():
    columns, scales = stack(), torch.tensor([1e-3, 0.5, 2.0, 400.0], dtype=F64)
    contrast = contrast_and_gradient(columns)[0]
    torch.testing.assert_close(contrast_and_gradient(columns * scales)[0], contrast, rtol=1e-10, atol=1e-10)
    assert (contrast_and_gradient(columns * scales, 1e-3)[0] < contrast).all()  # the guard does


def test_parallel_and_zero_columns_are_finite():
    columns = stack()
    columns[0] = columns[0, :, :1]
    columns[1] = 0.0
    columns[2, :, 2] = 0.0
    contrast, gradient = contrast_and_gradient(columns, 1e-6)
    assert torch.isfinite(contrast).all() and torch.isfinite(gradient).all()
    assert 3 / 2 * math.log(1e5) < contrast[0] < 3 / 2 * math.log(1e6) and contrast[1] == 0
    assert (gradient[1] == 0).all()


@pytest.mark.parametrize("factors", ["both", "a", "b"])
def test_every_factor_gets_its_own_gradient(factors):
    model = make_lora_llama(rank_pattern={"q_proj": 3, "down_proj": 1}, alpha_pattern={})
    state = AdapterState(model)
    for p in state.parameters().values():
        p.grad = torch.full_like(p, 0.25)
    total, mean = add_ima_gradient(state, 0.7, factors, 0.01)
    expected = []
    for pair in state:
        for side, p in (("a", pair.a), ("b", pair.b)):
            columns = p.detach().clone().requires_grad_()
            c = reference(columns.T if side == "a" else columns, 0.01)
            used = factors in (side, "both") and pair.rank > 1
            g = torch.autograd.grad(c, columns)[0] if used else torch.zeros_like(p)
            torch.testing.assert_close(p.grad, 0.25 + 0.7 * g, rtol=1e-3, atol=1e-4)
            expected += [c.detach()] if used else []
    torch.testing.assert_close(total.double(), torch.stack(expected).sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mean.double(), torch.stack(expected).mean(), rtol=1e-4, atol=1e-4)


def test_frozen_factors_are_left_alone():
    state = AdapterState(make_lora_llama())
    for pair in state:
        pair.a.requires_grad_(False)
    add_ima_gradient(state, 1.0)
    assert all(pair.a.grad is None and pair.b.grad is not None for pair in state)


def test_effective_rank_counts_equal_directions():
    state = AdapterState(make_lora_llama(r=3, random_b=False))
    assert (effective_ranks(state) == 0).all()
    q = torch.linalg.qr(stack(1, 8, 3)).Q[0]
    for count, pair in enumerate(state.pairs[:3], start=1):
        pair.a.data.zero_()[:, :3] = torch.eye(3, dtype=F64)
        pair.b.data.copy_(torch.cat([q[:, :count], torch.zeros(8, 3 - count, dtype=F64)], 1)[: pair.b.shape[0]])
    one, two = state.pairs[0], state.pairs[3]
    two.a.data.copy_(stack(1, *two.a.shape)[0])
    two.b.data.copy_(stack(1, *two.b.shape, seed=1)[0])
    found = effective_ranks(state)
    assert found[0] == pytest.approx(1.0, abs=1e-6) and one.b.shape[0] == 8
    shares = torch.linalg.svdvals(two.b.data @ two.a.data)
    shares = shares[:3] / shares.sum()
    assert float(found[3]) == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_a_run_with_it_ends_with_columns_further_apart(tmp_path, tokenizer, optimizer):
    contrasts, ranks = [], []
    for weight in (0.0, 0.3):
        run = trainer(tmp_path, tokenizer, optimizer=optimizer, ima_weight=weight, max_steps=25, learning_rate=3e-2,
                      save_strategy="no")  # fmt: skip
        run.train()
        state = AdapterState(run.model)
        contrasts.append(float(add_ima_gradient(state, 0.0)[1]))
        ranks.append(float(effective_ranks(state).mean()))
        logged = [e for e in run.state.log_history if "ima/contrast" in e]
        assert len(logged) == (25 if weight else 0)
        if weight:
            assert logged[-1]["ima/penalty"] == pytest.approx(weight * logged[-1]["ima/contrast"] * 2 * len(state))
    assert contrasts[1] < 0.7 * contrasts[0] and ranks[1] > ranks[0]


def test_a_stock_trainer_logs_it_too(tmp_path, tokenizer):
    run = Trainer(
        model=make_lora_llama(torch.float32, attn="sdpa", random_b=False),
        args=TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], logging_steps=1),
        train_dataset=dataset(), data_collator=DataCollatorForSeq2Seq(tokenizer), callbacks=[ImaCallback(0.1)],
    )  # fmt: skip
    run.train()
    assert all("ima/contrast" in e for e in run.state.log_history if "loss" in e)


def test_first_step_is_the_sum_of_both_gradients(tmp_path, tokenizer):
    # SGD with lr 1: the step is minus (loss gradient + weight * gradient of c), for any accumulation.
    model = make_lora_llama(torch.float32, attn="sdpa")
    start = AdapterState(model).snapshot()
    add_ima_gradient(AdapterState(model), 0.2)
    pull = {key: cast(torch.Tensor, p.grad).clone() for key, p in AdapterState(model).parameters().items()}
    model.zero_grad()
    for accumulation in (1, 4):
        ends = []
        for weight in (0.0, 0.2):
            AdapterState(model).load(start)
            run = trainer(
                tmp_path, tokenizer, model=model, ima_weight=weight, optimizer="sgd", learning_rate=1.0, max_steps=1,
                gradient_accumulation_steps=accumulation, per_device_train_batch_size=2, max_grad_norm=0.0,
                train=dataset(2 * accumulation), lr_scheduler_type="constant", save_strategy="no",
            )  # fmt: skip
            run.train()
            ends.append(AdapterState(model).snapshot())
        for key, g in pull.items():
            torch.testing.assert_close(ends[0][key] - ends[1][key], g, rtol=1e-3, atol=1e-5)


def test_resume_equals_not_stopping_beside_a_belief(tmp_path, tokenizer):
    def fresh(folder):
        return trainer(folder, tokenizer, source=dataset(12, seed=9), optimizer="adamw_torch", ima_weight=0.1)

    whole, resumed = fresh(tmp_path / "whole"), fresh(tmp_path / "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(resumed))
    entry = next(e for e in whole.state.log_history if "ima/contrast" in e)
    assert "laplace/penalty" in entry
    Belief.from_pretrained(tmp_path / "whole" / "checkpoint-2").check(whole.model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ima_weight": -0.1}, "ima_weight must be >= 0 and finite, got -0.1"),
        ({"ima_weight": math.inf}, "ima_weight must be"),
        ({"ima_weight": math.nan}, "ima_weight must be"),
        ({"ima_weight": 1.0, "ima_factors": "c"}, "ima_factors must be one of"),
        ({"ima_weight": 1.0, "ima_epsilon": 0.0}, "ima_epsilon must be > 0"),
        ({"ima_weight": 1.0, "optimizer": "loko"}, "ima_weight=1.0 is not supported with optimizer='loko'"),
    ],
)
def test_raises_for_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        KalmanConfig(str(tmp_path), use_cpu=True, **options)


def test_warns_of_options_without_effect(tmp_path):
    with pytest.warns(UserWarning, match="ima_factors: no effect without ima_weight"):
        KalmanConfig(str(tmp_path), ima_factors="b", use_cpu=True)


def test_raises_where_nothing_can_be_kept_apart(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="no trainable factor of rank 2 or more"):
        trainer(tmp_path, tokenizer, make_lora_llama(torch.float32, "sdpa", r=1), ima_weight=0.1).train()


def test_raises_for_loko_and_scaled_gradients():
    model = make_lora_llama()
    with pytest.raises(ValueError, match="LoKO does not read"):
        ImaCallback(0.1).on_train_begin(
            SimpleNamespace(), None, None, model=model, optimizer=create_loko_optimizer(model)
        )
    with pytest.raises(ValueError, match="ImaCallback does not support fp16"):
        ImaCallback(0.1).on_train_begin(SimpleNamespace(fp16=True), None, None, model=model)
