"""LoKO inside KalmanTrainer: tempering, iterated steps, observations, beliefs as priors, regression and drift."""

import math

import pytest
import torch
from conftest import make_batch, make_lora_bert, make_lora_llama
from datasets import Dataset, IterableDataset
from toys import F64
from training import dataset, make_tokenizer, trainer, weights
from transformers import DataCollatorWithPadding, TrainerCallback

from kalman_peft import (
    AdapterState,
    Belief,
    CategoricalObservation,
    DriftCallback,
    GaussianObservation,
    KalmanConfig,
    KalmanTrainer,
    LaplaceCallback,
    LikelihoodObservation,
    create_loko_optimizer,
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize(
    "options,expected",
    [
        ({"max_steps": -1, "num_train_epochs": 3}, 1 / 3),
        ({"max_steps": -1, "num_train_epochs": 0.5}, 1.0),
        ({"max_steps": 6, "gradient_accumulation_steps": 2}, 12 / 48),
        ({"max_steps": -1, "num_train_epochs": 3, "loko_tempering": 0.9}, 0.9),
        ({"max_steps": -1, "num_train_epochs": 3, "loko_mode": "paper"}, 1.0),
    ],
)
def test_repeated_data_are_tempered(tmp_path, tokenizer, options, expected):
    run = trainer(tmp_path, tokenizer, optimizer="loko", **options)
    assert run.create_optimizer().param_groups[0]["tempering"] == pytest.approx(expected)


ITERATED = {
    "loko_gain": "joint",
    "loko_curvature_every": 1,
    "loko_tempering": 1.0,
    "save_strategy": "no",
    "max_steps": 2,
}


def iterated(folder, tokenizer, iterations, seen=None):
    run = trainer(
        folder, tokenizer, make_lora_llama(F64, attn="sdpa", random_b=False), optimizer="loko", train=dataset(16),
        gradient_accumulation_steps=2, loko_iterations=iterations, loko_prior_tokens=30.0, **ITERATED,
    )  # fmt: skip
    observe = run._observe

    def recorded(model, inputs):
        if seen is not None:
            seen.append({key: value.clone() for key, value in inputs.items()})
        return observe(model, inputs)

    run._observe = recorded
    run.train()
    return run


def test_iterated_steps_are_those_of_a_hand_written_loop(tmp_path, tokenizer):
    seen = []
    run = iterated(tmp_path, tokenizer, 3, seen)
    assert len(seen) == 2 * 2 * 3
    model = make_lora_llama(F64, attn="sdpa", random_b=False)
    optimizer = create_loko_optimizer(model, gain="joint", curvature_every=1, prior_tokens=30.0, seed=run.args.seed)
    for start in (0, 6):
        for iteration in range(3):
            for batch in seen[start : start + 2]:
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                optimizer.observe(logits, batch["labels"])
            if iteration < 2:
                optimizer.relinearise()
        optimizer.step()
    torch.testing.assert_close(AdapterState(model).flatten(), weights(run), rtol=1e-9, atol=1e-11)
    for memory, other in zip(optimizer._memories, run._kalman._memories, strict=True):
        torch.testing.assert_close(memory.traces(), other.traces())
    once = iterated(tmp_path, tokenizer, 1)
    assert (weights(once) - weights(run)).abs().max() > 1e-6


@pytest.mark.parametrize(
    "options,match",
    [
        ({"loko_iterations": 0}, "loko_iterations must be >= 1"),
        ({"loko_iterations": 2, "loko_mode": "paper"}, "loko_iterations=2 needs .* got 'paper'"),
        ({"loko_iterations": 2, "loko_gain": "memory"}, "loko_iterations=2 needs .*'memory'"),
        ({"loko_iterations": 2, "loko_curvature_every": 3}, "loko_iterations=2 needs .* and 3"),
        ({"loko_belief_mode": "prior"}, "laplace_space='adapter'.* got 'delta_w'"),
        ({"loko_belief_mode": "prior", "laplace_space": "adapter", "forgetting_budget": 0.1}, "forgetting_budget=None, got 0.1"),
        ({"loko_belief_mode": "prior", "laplace_space": "adapter", "laplace_schedule": "linear"}, "laplace_schedule='constant', got 'linear'"),
        ({"loko_belief_mode": "prior", "laplace_space": "adapter", "laplace_refit_steps": 2}, "laplace_refit_steps=0, got 2"),
        ({"loko_belief_mode": "prior", "laplace_space": "adapter", "loko_forgetting": 0.9}, "loko_forgetting=0.9 would relax the belief"),
        ({"loko_belief_mode": "posterior"}, "loko_belief_mode must be one of"),
    ],
)  # fmt: skip
def test_raises_when_options_of_the_run_exclude_each_other(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        KalmanConfig(str(tmp_path), optimizer="loko", use_cpu=True, **options)


def test_raises_at_the_first_step_when_iterations_do_not_fit_the_task(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, optimizer="loko", loko_iterations=2)
    with pytest.raises(ValueError, match="loko_curvature_every=1 and loko_gain='joint'"):
        run.train()
    run = trainer(tmp_path, tokenizer, optimizer="loko", loko_iterations=2, loko_gain="joint", loko_columns="sampled")
    with pytest.raises(
        ValueError, match="loko_curvature_every=1 and loko_gain='joint'"
    ):  # and not first where a step has no draw
        run.train()


def test_raises_when_a_penalty_or_an_observation_has_no_place(tmp_path, tokenizer):
    belief = Belief.fit(make_lora_llama(torch.float32), [make_batch()], progress_bar=False)

    def build(optimizer, **kwargs):
        config = KalmanConfig(str(tmp_path), optimizer=optimizer, use_cpu=True)
        return KalmanTrainer(make_lora_llama(torch.float32), config, train_dataset=dataset(), **kwargs)

    with pytest.raises(ValueError, match=r"LaplaceCallback adds to `.grad`.*belief="):
        build("loko", callbacks=[LaplaceCallback(belief)])
    with pytest.raises(ValueError, match="observation= needs optimizer='loko'"):
        build("adamw_torch", observation=CategoricalObservation(shift=True))
    build("adamw_torch", callbacks=[LaplaceCallback(belief)])


# -- beliefs ----------------------------------------------------------------------------------------------------------


def believing(folder, tokenizer, mode, **options):
    return trainer(
        folder, tokenizer, source=dataset(12, seed=9), optimizer="loko", loko_belief_mode=mode, laplace_space="adapter",
        laplace_strength=0.1, laplace_warmup_steps=0 if options else 2, loko_prior_tokens=10.0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["prior", "factor", "penalty"])
def test_resume_with_a_belief_equals_not_stopping(tmp_path, tokenizer, mode):
    whole = believing(tmp_path / "whole", tokenizer, mode)
    whole.train()
    moved = (whole.belief.mean, AdapterState(whole.model, warn_excluded=False).snapshot())
    assert max(float((moved[1][k] - moved[0][k]).abs().max()) for k in moved[0]) > 0.02  # the mean is not the start
    resumed = believing(tmp_path / "resumed", tokenizer, mode)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(resumed))
    assert resumed._kalman.param_groups[0]["belief_counted"] == (mode == "prior")
    for memory, other in zip(whole._kalman._memories, resumed._kalman._memories, strict=True):
        assert all(torch.equal(tensor, other.tensors[key]) for key, tensor in memory.tensors.items())


def test_belief_modes_differ_and_prior_counts_the_labels_of_the_run(tmp_path, tokenizer):
    found = {}
    for mode in ("prior", "factor", "penalty"):
        run = believing(tmp_path / mode, tokenizer, mode, save_strategy="no")
        run.train()
        found[mode] = weights(run)
        if mode == "prior":
            labels = run._kalman._prior._num_labels
    assert not torch.equal(found["prior"], found["factor"]) and not torch.equal(found["factor"], found["penalty"])
    rows = dataset()
    per_row = sum(sum(label != -100 for label in row["labels"][1:]) for row in rows) / len(rows)
    assert labels == pytest.approx(per_row * 4 * 4)


def test_raises_when_the_prior_belief_is_elsewhere(tmp_path, tokenizer):
    model = make_lora_llama(torch.float32, attn="sdpa")
    belief = Belief.fit(model, [make_batch()], space="adapter", progress_bar=False)
    for p in AdapterState(model).parameters().values():
        p.data.add_(0.1)
    run = trainer(
        tmp_path, tokenizer, model, belief=belief, optimizer="loko", loko_belief_mode="prior", laplace_space="adapter"
    )
    with pytest.raises(ValueError, match=r"starts at the belief's mean, but .*lora_A.* is elsewhere"):
        run.train()


# -- tasks ------------------------------------------------------------------------------------------------------------


def texts(labels):
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 17, (len(labels), 5), generator=generator)
    return [
        {"input_ids": r.tolist(), "attention_mask": [1] * 5, "labels": y} for r, y in zip(ids, labels, strict=True)
    ]


def sequences(folder, tokenizer, data, outputs=3, callbacks=(), observation=None, **options):
    model = make_lora_bert(torch.float32, num_labels=outputs)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    base = {
        "optimizer": "loko", "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1,
        "per_device_train_batch_size": 8, "save_strategy": "no",
    }  # fmt: skip
    return KalmanTrainer(
        model=model, args=KalmanConfig(str(folder), **(base | options)), train_dataset=data, eval_dataset=Dataset.from_list(texts([0, 1] * 4)) if outputs > 1 else None,
        data_collator=DataCollatorWithPadding(tokenizer), callbacks=list(callbacks), observation=observation,
    )  # fmt: skip


def test_regression_estimates_its_noise_and_learns(tmp_path, tokenizer):
    generator = torch.Generator().manual_seed(0)
    labels = (5 + 0.5 * torch.randn(64, generator=generator)).tolist()
    run = sequences(tmp_path, tokenizer, Dataset.from_list(texts(labels)), outputs=1, num_train_epochs=6)
    run.train()
    entries = [e for e in run.state.log_history if "loss" in e]
    assert all(e["kalman/variance"] > 0 for e in entries) and entries[0]["loss"] > 4 * entries[-1]["loss"]
    assert run.optimizer.optimizer.param_groups[0]["tempering"] == pytest.approx(1 / 6)
    with torch.no_grad():
        out = run.model(input_ids=torch.tensor([r["input_ids"] for r in texts(labels)])).logits
    assert abs(float(out.mean()) - 5) < 0.5


def test_observation_replaces_the_models_own(tmp_path, tokenizer):
    def poisson(outputs, counts):
        return (outputs.exp() - counts.float() * outputs).sum(-1)

    labels = torch.poisson(torch.full((64,), 4.0), generator=torch.Generator().manual_seed(0)).long()
    data = Dataset.from_list(texts([[int(y)] for y in labels]))
    run = sequences(tmp_path, tokenizer, data, 1, observation=LikelihoodObservation(poisson), num_train_epochs=6)
    run.train()
    with torch.no_grad():
        rate = run.model(input_ids=torch.tensor([r["input_ids"] for r in data])).logits.exp()
    assert float(rate.mean()) == pytest.approx(float(labels.float().mean()), rel=0.2)
    fixed = sequences(tmp_path, tokenizer, data, 1, observation=GaussianObservation(2.0))
    optimizer = fixed.create_optimizer()
    assert optimizer.observation.variance == 2.0 and not optimizer.estimates_noise


@pytest.mark.parametrize("mode", ["kalman", "paper"])
def test_evaluation_between_steps_and_resuming_after_it(tmp_path, tokenizer, mode):
    data = Dataset.from_list(texts([0, 1, 2, 0] * 16))
    averaging = {} if mode == "paper" else {"loko_averaging": True}
    options = {"max_steps": 6, "loko_mode": mode, "save_strategy": "steps", "save_steps": 3} | averaging
    plain = sequences(tmp_path / "plain", tokenizer, data, **options)
    plain.train()
    results = []
    for name, checkpoint in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-3")):
        run = sequences(tmp_path / name, tokenizer, data, eval_strategy="steps", eval_steps=1, **options)
        run.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        assert run._kalman.param_groups[0]["evaluating"]
        assert torch.equal(weights(run), weights(plain))  # looking does not change the filter
        with_average = weights(run)
        run._kalman.train()
        results.append((with_average, weights(run)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][0], results[0][1]) == (mode == "paper")


# -- drift ------------------------------------------------------------------------------------------------------------


def stream(shift):
    """Labels that are mostly 0, and from the 30th batch on mostly 2 if they shift."""
    generator = torch.Generator().manual_seed(2)
    common = torch.tensor([0] * 240 + [2 if shift else 0] * 160)
    labels = common.where(torch.rand(400, generator=generator) < 0.9, torch.randint(0, 3, (400,), generator=generator))
    return IterableDataset.from_generator(lambda: iter(texts(labels.tolist())))


@pytest.mark.parametrize("action", ["log", "stop", "inflate"])
def test_drift_raises_an_alarm_after_a_shift_of_the_labels(tmp_path, tokenizer, action):
    callback, tokens = DriftCallback(action=action, factor=5.0), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            tokens.append(optimizer.optimizer.param_groups[0]["tokens"])

    run = sequences(tmp_path, tokenizer, stream(True), callbacks=[callback, Watch()], max_steps=50)
    run.train()
    assert callback.alarms and 30 < callback.alarms[0] <= 36
    step = callback.alarms[0]
    logged = {e["step"]: e["kalman/drift"] for e in run.state.log_history if "loss" in e}
    assert logged[step] > 3 and max(ratio for k, ratio in logged.items() if k < 30) <= 3
    assert run.state.global_step == (step if action == "stop" else 50)
    expected = 8 * step if action != "inflate" else 8 * step / 5
    assert tokens[step - 1] == pytest.approx(expected) and tokens[step - 2] == 8 * (step - 1)


def test_drift_is_quiet_without_a_shift(tmp_path, tokenizer):
    callback = DriftCallback()
    run = sequences(tmp_path, tokenizer, stream(False), callbacks=[callback], max_steps=50)
    run.train()
    assert callback.alarms == [] and run.state.global_step == 50
    assert all(math.isfinite(e["kalman/drift"]) for e in run.state.log_history if "loss" in e)


def test_drift_goes_on_from_a_checkpoint(tmp_path, tokenizer):
    def run(name, callbacks, **options):
        return sequences(
            tmp_path / name, tokenizer, stream(True), callbacks=callbacks, max_steps=40, save_strategy="steps",
            save_steps=20, **options,
        )  # fmt: skip

    whole = DriftCallback(window=3, warmup=10)
    run("whole", [whole]).train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-20")
    for options in ({}, {"restore_callback_states_from_checkpoint": True}):
        resumed = run("resumed", [DriftCallback(window=3, warmup=10)], **options)
        resumed.train(resume_from_checkpoint=checkpoint)
        found = next(c for c in resumed.callback_handler.callbacks if isinstance(c, DriftCallback))
        assert found.state() == whole.state() and found.alarms and found.alarms[0] <= 36
    two = [DriftCallback(window=3, warmup=10), DriftCallback(window=2, warmup=8)]
    run("two", two).train()
    again = [DriftCallback(window=3, warmup=10), DriftCallback(window=2, warmup=8)]
    run("again", again).train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-20"))
    assert [c.state() for c in again] == [c.state() for c in two]


def test_drift_starts_anew_from_a_checkpoint_without_it(tmp_path, tokenizer):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    sequences(tmp_path, tokenizer, stream(False), **options).train()
    callback = DriftCallback(window=3, warmup=10)
    run = sequences(tmp_path, tokenizer, stream(False), callbacks=[callback], **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback._count == 1 and run.state.stateful_callbacks["DriftCallback"] == callback.state()


def test_drift_ratio_is_the_recent_mean_over_the_one_before():
    callback = DriftCallback(threshold=2.0, window=2, warmup=4)
    values = [1.0, 3.0, 2.0, 2.0, 9.0]
    alarms, ratios = zip(*[(callback.update(v), callback.ratio) for v in values], strict=True)
    # Before: [], [], [1], [1, 3], [1, 3, 2]; recent: the last two.
    assert alarms == (False, False, False, False, True)
    assert ratios == pytest.approx((1.0, 1.0, 2.5, 1.0, 5.5 / 2))
    assert [callback.update(50.0) for _ in range(3)] == [False] * 3  # a new mean is made first


@pytest.mark.parametrize(
    "options,match",
    [
        ({"threshold": 1.0}, "threshold must be > 1"),
        ({"threshold": float("nan")}, "threshold must be > 1"),
        ({"factor": 1.0}, "factor must be > 1"),
        ({"window": 0}, "window must be >= 1"),
        ({"window": 5, "warmup": 4}, "warmup >= window"),
        ({"action": "cry"}, "action must be one of"),
    ],
)
def test_raises_when_the_drift_callback_is_misconfigured(options, match):
    with pytest.raises(ValueError, match=match):
        DriftCallback(**options)


def test_raises_when_drift_is_watched_without_loko(tmp_path, tokenizer):
    run = sequences(
        tmp_path, tokenizer, stream(False), callbacks=[DriftCallback()], optimizer="adamw_torch", max_steps=2
    )
    with pytest.raises(ValueError, match="DriftCallback watches LoKO, got AdamW"):
        run.train()
