"""KalmanTrainer and LaplaceCallback: strength, resumption, logs, files and refusals, in real Trainers."""

import json
import math

import pytest
import torch
from conftest import make_batch, make_llama, make_lora_bert, make_lora_llama
from datasets import Dataset
from peft import LoraConfig, PeftModel
from training import dataset, make_tokenizer, trainer, weights
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from kalman_peft import AdapterState, Belief, KalmanConfig, KalmanTrainer, LaplaceCallback
from kalman_peft.curvature.memory import STRUCTURES
from kalman_peft.laplace import ForgettingBudget, add_penalty_gradient


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("optimizer", ["adamw_torch", "loko"])
def test_whole_path_logs_saves_and_loads(tmp_path, tokenizer, optimizer):
    run = trainer(tmp_path, tokenizer, source=dataset(12, seed=9), optimizer=optimizer)
    run.train()
    entries = [e for e in run.state.log_history if "loss" in e]
    assert len(entries) == 4
    expected = {"laplace/penalty", "laplace/drift", "laplace/strength"}
    if optimizer == "loko":
        expected |= {"kalman/innovation", "kalman/gain_norm", "kalman/trace_p", "kalman/kl"}
    assert expected <= entries[-1].keys()
    assert all(math.isfinite(v) for e in entries for k, v in e.items() if isinstance(v, float))
    final = next(e for e in run.state.log_history if "source/rise" in e)
    assert final["source/rise"] == pytest.approx(final["source/loss"] - final["source/loss_start"])
    run.save_model()
    run.create_model_card()
    for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        Belief.from_pretrained(folder).check(run.model)
        assert (folder / "adapter_model.safetensors").is_file()
    card = (tmp_path / "README.md").read_text()
    assert "kalman_peft" in card and "LoKO" in card if optimizer == "loko" else "adamw" in card
    loaded = PeftModel.from_pretrained(make_llama(torch.float32, attn="sdpa"), tmp_path)
    torch.testing.assert_close(AdapterState(loaded, warn_excluded=False).flatten(), weights(run))


@pytest.mark.parametrize("optimizer", ["adamw_torch", "loko"])
@pytest.mark.parametrize("budget", [None, 0.01])
@pytest.mark.parametrize("bf16", [False, True])
def test_resume_equals_not_stopping(tmp_path, tokenizer, optimizer, budget, bf16):
    def fresh(folder, **kw):
        return trainer(
            folder, tokenizer, source=dataset(12, seed=9), optimizer=optimizer, forgetting_budget=budget, budget_steps=1,
            bf16=bf16, **kw,
        )  # fmt: skip

    whole = fresh(tmp_path / "whole")
    whole.train()
    resumed = fresh(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.laplace_strength == resumed.laplace_strength


@pytest.mark.parametrize("optimizer", ["adamw_torch", "loko"])
def test_an_adapter_in_16_bits_stays_in_16(tmp_path, tokenizer, optimizer):
    def fresh(folder, **kw):
        return trainer(folder, tokenizer, make_lora_llama(torch.bfloat16, "sdpa", random_b=False), optimizer=optimizer,
                       **kw)  # fmt: skip

    whole = fresh(tmp_path / "whole")
    whole.train()
    resumed = fresh(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    best = fresh(tmp_path / "best", eval_dataset=dataset(4), eval_strategy="steps", eval_steps=2,
                 load_best_model_at_end=True)  # fmt: skip
    best.train()
    for run in (whole, resumed, best):
        assert {p.dtype for p in AdapterState(run.model).parameters().values()} == {torch.bfloat16}
    assert torch.equal(weights(whole), weights(resumed))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_resume_equals_not_stopping_in_every_structure(tmp_path, tokenizer, structure):
    def fresh(folder):
        return trainer(
            folder, tokenizer, source=dataset(12, seed=9), optimizer="adamw_torch", laplace_structure=structure,
            laplace_space="adapter", laplace_warmup_steps=1,
        )  # fmt: skip

    whole = fresh(tmp_path / "whole")
    whole.train()
    resumed = fresh(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(resumed))


@pytest.mark.parametrize("optimizer", ["adamw_torch", "loko"])
def test_result_does_not_depend_on_gradient_accumulation(tmp_path, tokenizer, optimizer):
    # 8 sequences per step in any split. In float64, so that no label's draw hangs on rounding.
    results, dtype = [], torch.float64 if optimizer == "loko" else torch.float32
    source = dataset(12, seed=9)
    for size, accumulation in ((8, 1), (2, 4)):
        run = trainer(
            tmp_path / f"{size}", tokenizer, make_lora_llama(dtype, attn="sdpa", random_b=False), source=source, optimizer=optimizer, train=dataset(32),
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=3, laplace_strength=5.0,
        )  # fmt: skip
        run.train()
        if optimizer == "loko":
            assert run._kalman.belief_strength == 5.0
        results.append(weights(run))
    tolerance = {"rtol": 1e-8, "atol": 1e-9} if optimizer == "loko" else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(results[0], results[1], **tolerance)


def test_resume_without_source_keeps_the_belief(tmp_path, tokenizer):
    for optimizer in ("adamw_torch", "loko"):
        folder = tmp_path / optimizer
        whole = trainer(folder, tokenizer, source=dataset(12, seed=9), optimizer=optimizer, laplace_strength=30.0)
        whole.train()
        resumed = trainer(folder / "again", tokenizer, optimizer=optimizer)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert resumed.laplace_strength == 30.0
        assert torch.equal(weights(whole), weights(resumed))


def test_a_filter_made_before_training_gets_the_belief(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, source=dataset(12, seed=9), optimizer="loko", laplace_strength=7.0)
    run.create_optimizer()
    run.train()
    assert run._kalman.belief_strength == 7.0
    assert any("laplace/drift" in e for e in run.state.log_history)


def test_first_logged_loss_is_that_of_the_trainer(tmp_path, tokenizer):
    # Labels from the first position on, which no causal logits explain.
    losses = []
    for optimizer in ("adamw_torch", "loko"):
        run = trainer(tmp_path, tokenizer, train=dataset(4, prompt=0), optimizer=optimizer, max_steps=1)
        run.train()
        losses.append(run.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_mixin_arguments_go_before_any_training_arguments(tmp_path):
    from dataclasses import dataclass

    from transformers import Seq2SeqTrainingArguments

    from kalman_peft.config import KalmanArguments

    @dataclass
    class Arguments(KalmanArguments, Seq2SeqTrainingArguments):
        pass

    args = Arguments(str(tmp_path), optimizer="loko", use_cpu=True)
    assert (args.learning_rate, args.max_grad_norm, args.lr_scheduler_type) == (1.0, 0.0, "constant")
    assert Arguments(str(tmp_path), optimizer="sgd", use_cpu=True).optim == "sgd"
    with pytest.raises(ValueError, match="laplace_structure must be one of"):
        Arguments(str(tmp_path), laplace_structure="nonsense", use_cpu=True)
    assert KalmanArguments().learning_rate == 5e-5


def test_warns_of_options_without_effect(tmp_path):
    with pytest.warns(UserWarning, match="loko_rank: no effect without optimizer='loko'"):
        KalmanConfig(str(tmp_path), loko_rank=4, use_cpu=True)
    with pytest.warns(UserWarning, match="scales LoKO's step"):
        KalmanConfig(str(tmp_path), optimizer="loko", learning_rate=2e-4, use_cpu=True)


def test_penalty_is_added_once_and_exactly(tmp_path, tokenizer):
    # SGD with lr 1: the step is minus (loss gradient + strength * penalty gradient), for any accumulation.
    model, strength = make_lora_llama(torch.float32, attn="sdpa"), 3.0
    belief = Belief.fit(model, [make_batch()], progress_bar=False)
    for p in AdapterState(model).parameters().values():
        p.data.add_(0.05)
    start = AdapterState(model).snapshot()
    pull = belief.energy_and_gradient(start)[1]
    for accumulation in (1, 4):
        steps = []
        for lam in (0.0, strength):
            AdapterState(model).load(start)
            run = trainer(
                tmp_path, tokenizer, model=model, belief=belief, laplace_strength=lam, optimizer="sgd", learning_rate=1.0,
                max_steps=1, gradient_accumulation_steps=accumulation, per_device_train_batch_size=2, max_grad_norm=0.0,
                train=dataset(2 * accumulation), lr_scheduler_type="constant", save_strategy="no",
            )  # fmt: skip
            run.train()
            steps.append(AdapterState(model).snapshot())
        for k in pull:
            torch.testing.assert_close(steps[0][k] - steps[1][k], strength * pull[k], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", ["gradient", "proximal"])
def test_strength_limits(tmp_path, tokenizer, form):
    def model():
        return make_lora_llama(torch.float32, attn="sdpa", random_b=False, lora_dropout=0.3)

    source = dataset(12, seed=9)
    free = trainer(tmp_path / "free", tokenizer, model())
    free.train()
    zero = trainer(tmp_path / "zero", tokenizer, model(), source=source, laplace_strength=0.0, laplace_form=form)
    zero.train()
    assert torch.equal(weights(free), weights(zero))  # bit for bit
    if form == "proximal":
        held = trainer(tmp_path / "held", tokenizer, source=source, laplace_strength=1e9, laplace_form=form)
        held.train()
        drift = held.belief.energy(AdapterState(held.model).parameters())
        assert drift < 1e-6 * zero.belief.energy(AdapterState(zero.model).parameters())


def test_regulariser_reduces_the_rise_of_the_source_loss(tmp_path, tokenizer):
    # What the base model says by itself: whatever is learned from random tokens, it forgets.
    torch.manual_seed(0)
    model = make_lora_llama(torch.float32, attn="sdpa", random_b=False)
    ids = model.generate(torch.full((40, 1), 1), do_sample=True, max_new_tokens=12, min_new_tokens=12, pad_token_id=0)
    source = Dataset.from_list([{"input_ids": r, "attention_mask": [1] * 13, "labels": r} for r in ids.tolist()])
    rises = []
    for strength in (0.0, 300.0):
        run = trainer(
            tmp_path / str(strength),
            tokenizer,
            source=source,
            laplace_strength=strength,
            max_steps=40,
            source_heldout=16,
            learning_rate=3e-2,
        )
        run.train()
        rises.append(run._source_metrics()["source/rise"])
    assert 0 < rises[1] < 0.7 * rises[0]


def test_callback_works_in_a_stock_trainer(tmp_path, tokenizer):
    model = make_lora_llama(torch.float32, attn="sdpa", random_b=False)
    belief = Belief.fit(model, [make_batch()], progress_bar=False)
    args = TrainingArguments(
        str(tmp_path), max_steps=3, use_cpu=True, report_to=[], logging_steps=1, disable_tqdm=True, save_strategy="no",
        per_device_train_batch_size=4,
    )  # fmt: skip
    run = Trainer(
        model, args, train_dataset=dataset(), data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        callbacks=[LaplaceCallback(belief, strength=2.0)],
    )  # fmt: skip
    run.train()
    entries = [e for e in run.state.log_history if "loss" in e]
    assert all("laplace/drift" in e for e in entries)
    assert entries[-1]["laplace/penalty"] == pytest.approx(2 * entries[-1]["laplace/drift"])


def test_gradient_is_added_to_missing_gradients():
    model = make_lora_llama(torch.float32)
    belief = Belief.fit(model, [make_batch()], progress_bar=False)
    state = AdapterState(model)
    for p in state.parameters().values():
        p.data.add_(0.1)
    add_penalty_gradient(belief, state, 2.0)
    for k, g in belief.energy_and_gradient(state.parameters())[1].items():
        torch.testing.assert_close(state.parameters()[k].grad, 2 * g)


def test_budget_raises_and_lowers_the_strength():
    budget = ForgettingBudget(0.01, strength=1.0)
    assert budget.update(0.05) > 1.0
    high = budget.strength
    assert budget.update(0.0) < high
    assert budget.update(float("nan")) == budget.strength
    for _ in range(100):
        budget.update(1.0)
    assert budget.strength == budget.highest
    with pytest.raises(ValueError, match="must be positive"):
        ForgettingBudget(0.0)


def test_budget_is_followed_in_training(tmp_path, tokenizer):
    run = trainer(
        tmp_path, tokenizer, source=dataset(20, seed=9), forgetting_budget=1e-4, budget_steps=2, max_steps=10,
        laplace_strength=None,
    )  # fmt: skip
    run.train()
    path = [e["laplace/strength"] for e in run.state.log_history if "laplace/strength" in e]
    assert path[0] == 1.0 and len(set(path)) > 2
    assert all("source/rise" in e for e in run.state.log_history if "loss" in e)
    state = json.loads((tmp_path / "checkpoint-10" / "kalman_state.json").read_text())
    assert state["laplace_strength"] == run.laplace_strength


def test_peft_config_and_gradient_checkpointing(tmp_path, tokenizer):
    run = KalmanTrainer(
        model=make_llama(torch.float32, attn="sdpa"),
        args=KalmanConfig(
            str(tmp_path), optimizer="loko", max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True,
            gradient_checkpointing=True, gradient_accumulation_steps=2, per_device_train_batch_size=2, source_heldout=2,
        ),
        train_dataset=dataset(),
        source_dataset=dataset(8, seed=5),
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )  # fmt: skip
    before = weights(run)
    run.train()
    assert not torch.equal(before, weights(run))


def test_sequence_classification(tmp_path, tokenizer):
    rows = [
        {"input_ids": r["input_ids"], "attention_mask": r["attention_mask"], "labels": i % 3}
        for i, r in enumerate(dataset(16))
    ]
    from transformers import DataCollatorWithPadding

    run = KalmanTrainer(
        model=make_lora_bert(torch.float32),
        args=KalmanConfig(str(tmp_path), optimizer="loko", max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True, source_heldout=4),
        train_dataset=Dataset.from_list(rows),
        source_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    run.train()
    assert math.isfinite(run.state.log_history[-1]["source/loss"])


@pytest.mark.parametrize(
    "kwargs,match",
    [
        ({"laplace_strength": 1.0, "forgetting_budget": 0.1}, "not both"),
        ({"laplace_strength": "evidence", "laplace_structure": "block_tridiagonal", "laplace_space": "adapter"}, "not supported with laplace_structure='block_tridiagonal'"),
        ({"optimizer": "loko", "max_grad_norm": 1.0}, "max_grad_norm=1.0 is not supported"),
        ({"optimizer": "loko", "weight_decay": 0.1}, "weight_decay=0.1 is not supported"),
        ({"optimizer": "loko", "label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"optimizer": "loko", "laplace_form": "proximal"}, "LoKO takes the belief as its prior"),
        ({"optimizer": "loko", "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "reentrant"),
        ({"laplace_structure": "banded"}, "laplace_structure must be one of"),
        ({"loko_memory": "full"}, "loko_memory must be one of"),
        ({"source_samples": 0}, "source_samples"),
        ({"laplace_strength": -1.0}, "laplace_strength must be >= 0"),
        ({"laplace_rank": 0}, "laplace_rank must be"),
        ({"optimizer": "loko", "loko_forgetting": 2.0}, "loko_forgetting must be in"),
        ({"laplace_form": "proximal", "laplace_structure": "diagonal"}, "not supported for laplace_structure='diagonal'"),
    ],
)  # fmt: skip
def test_raises_when_the_config_contradicts_itself(tmp_path, kwargs, match):
    with pytest.raises(ValueError, match=match):
        KalmanConfig(str(tmp_path), use_cpu=True, **kwargs)


def test_raises_when_arguments_do_not_fit(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="needs `source_dataset=` or `belief=`"):
        trainer(tmp_path, tokenizer, laplace_strength=1.0)
    with pytest.raises(ValueError, match="none is left for the curvature"):
        trainer(tmp_path, tokenizer, source=dataset(4))
    with pytest.raises(TypeError, match="must be a KalmanConfig"):
        KalmanTrainer(make_lora_llama(), TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="has an adapter already"):
        KalmanTrainer(make_lora_llama(), KalmanConfig(str(tmp_path), use_cpu=True), peft_config=LoraConfig())
    with pytest.raises(TypeError, match="must be a PeftModel"):
        run = trainer(tmp_path, tokenizer, model=make_llama(torch.float32), source=dataset())
        run.train()
    belief = Belief.fit(make_lora_llama(torch.float32), [make_batch()], progress_bar=False)
    with pytest.raises(ValueError, match="use the rank"):
        trainer(tmp_path, tokenizer, model=make_lora_llama(torch.float32, r=1, lora_alpha=1.5), belief=belief)


def test_raises_when_the_callback_meets_fp16(tmp_path):
    from types import SimpleNamespace

    model = make_lora_llama(torch.float32)
    callback = LaplaceCallback(Belief.fit(model, [make_batch()], progress_bar=False))
    with pytest.raises(ValueError, match="fp16"):
        callback.on_train_begin(SimpleNamespace(fp16=True), None, None, model=model)


@pytest.mark.parametrize(
    "kwargs,match", [({"strength": -1.0}, "strength must be"), ({"form": "loss"}, "form must be")]
)
def test_raises_when_the_callback_is_misconfigured(kwargs, match):
    belief = Belief.fit(make_lora_llama(torch.float32), [make_batch()], progress_bar=False)
    with pytest.raises(ValueError, match=match):
        LaplaceCallback(belief, **kwargs)


def test_warns_of_a_curvature_without_source(tmp_path, tokenizer):
    with pytest.warns(UserWarning, match=r"laplace_fisher: no effect without `source_dataset="):
        trainer(tmp_path, tokenizer, optimizer="adamw_torch", laplace_fisher="empirical")
