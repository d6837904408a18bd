"""How strongly a belief holds: schedules, prior precision, evidence, offloading, warm start and refits in training."""

import json
import math

import pytest
import torch
from conftest import make_batch, make_lora_llama
from training import dataset, make_tokenizer, trainer, weights
from transformers import DataCollatorForSeq2Seq, HfArgumentParser

from kalman_peft import AdapterState, Belief, KalmanConfig, LaplaceCallback, estimate_curvature
from kalman_peft.laplace import add_penalty_gradient, proximal_step, schedule_factor, squared_distance


DIAGONAL = {"laplace_structure": "diagonal", "laplace_space": "adapter"}


def fitted(structure="kronecker", space="delta_w", shift=0.1):
    model = make_lora_llama()
    belief = Belief.fit(model, [make_batch()], structure=structure, space=space, progress_bar=False)
    belief.mean = {key: m.double() for key, m in belief.mean.items()}
    for p in AdapterState(model).parameters().values():
        p.data.add_(shift)
    return model, belief


# -- penalty ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule,values",
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.95, 0.5, 0]),
        ("cosine", [1, (1 + math.cos(0.05 * math.pi)) / 2, 0.5, 0]),
        ("warmup", [0, 0.5, 1, 1]),
    ],
)
def test_schedules(schedule, values):
    assert [schedule_factor(schedule, x) for x in (0.0, 0.05, 0.5, 1.0)] == pytest.approx(values)


def test_raises_when_the_schedule_is_unknown():
    with pytest.raises(ValueError, match="schedule must be one of"):
        schedule_factor("step", 0.5)


@pytest.mark.parametrize("space", ["adapter", "delta_w"])
def test_gradient_with_a_prior_precision_is_that_of_the_penalty(space):
    model, belief = fitted(space=space)
    state = AdapterState(model)
    add_penalty_gradient(belief, state, 3.0, 0.7)
    point = state.snapshot()
    direction = {key: torch.randn(p.shape, dtype=p.dtype) for key, p in state.parameters().items()}

    def penalty(step):
        moved = {key: point[key].double() + step * direction[key] for key in point}
        distance = sum((moved[key] - belief.mean[key]).square().sum() for key in moved)
        return 3.0 * belief.energy(moved) + 0.35 * distance

    slope = (penalty(1e-4) - penalty(-1e-4)) / 2e-4
    ours = sum((state.parameters()[key].grad * direction[key]).sum() for key in point)
    torch.testing.assert_close(ours, slope, rtol=1e-6, atol=1e-9)
    expected = sum((point[key].double() - belief.mean[key]).square().sum() for key in point)
    torch.testing.assert_close(squared_distance(belief, state), expected)


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_proximal_step_with_a_prior_precision_minimises(structure):
    model, belief = fitted(structure, "adapter")
    state = AdapterState(model)
    start = {key: p.detach().clone() for key, p in state.parameters().items()}
    proximal_step(belief, state, 2.0, 0.5)
    # The gradient of 2 R + 0.5 / 2 |x - mean|^2 + 1/2 |x - start|^2 vanishes.
    _, slope = belief.energy_and_gradient(state.parameters())
    for key, p in state.tensors().items():
        total = 2.0 * slope[key] + 0.5 * (p - belief.mean[key]) + (p - start[key])
        torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "optimizer,form", [("adamw_torch", "gradient"), ("adamw_torch", "proximal"), ("loko", "gradient")]
)
def test_offloading_changes_nothing_on_a_cpu(tmp_path, optimizer, form):
    results = []
    for offload in (False, True):
        run = trainer(
            tmp_path / str(offload), make_tokenizer(), source=dataset(12, seed=9), laplace_offload=offload,
            laplace_form=form, optimizer=optimizer,
        )  # fmt: skip
        run.train()
        results.append(weights(run))
        assert run.belief.mean.keys() and all(m.device.type == "cpu" for m in run.belief.mean.values())
    assert torch.equal(*results)


def test_callback_keeps_an_offloaded_belief_where_it_is(monkeypatch):
    from types import SimpleNamespace

    model, belief = fitted()
    moved = []
    monkeypatch.setattr(Belief, "to", lambda self, device: moved.append(torch.device(device).type) or self)
    for offload in (False, True):
        LaplaceCallback(belief, offload=offload).on_train_begin(SimpleNamespace(), None, None, model=model)
    assert moved == ["cpu", "cpu"]


# -- in training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["ekfac", "block_tridiagonal", "low_rank", "dense"])
@pytest.mark.parametrize("form", ["gradient", "proximal", "loko"])
def test_every_structure_trains_and_is_saved(tmp_path, structure, form):
    run = trainer(
        tmp_path, make_tokenizer(), source=dataset(12, seed=9), laplace_structure=structure, laplace_space="adapter",
        laplace_warmup_steps=1, max_steps=2, laplace_rank=4, **{"optimizer": "loko"} if form == "loko" else {"laplace_form": form},
    )  # fmt: skip
    run.train()
    saved = Belief.from_pretrained(tmp_path / "checkpoint-2")
    assert saved.precision.structure == structure
    state = AdapterState(run.model).parameters()
    torch.testing.assert_close(saved.energy(state), run.belief.energy(state), rtol=1e-4, atol=1e-9)
    assert run.belief.energy(state) > 0


def test_arguments_reach_the_engine(tmp_path, monkeypatch):
    seen = {}
    fit = Belief.fit

    def spy(model, data, **options):
        seen.update(options)
        return fit(model, data, **options)

    monkeypatch.setattr(Belief, "fit", spy)
    run = trainer(
        tmp_path, make_tokenizer(), source=dataset(12, seed=9), laplace_fisher="empirical", laplace_reduction="token",
        laplace_num_samples=2, laplace_rank=3, laplace_dense_limit=4, laplace_offload=True, max_steps=1,
    )  # fmt: skip
    run.train()
    expected = {
        "structure": "kronecker", "space": "delta_w", "fisher": "empirical", "reduction": "token", "num_samples": 2,
        "rank": 3, "dense_limit": 4, "offload": True, "seed": 42, "progress_bar": False,
    }  # fmt: skip
    assert seen == expected
    assert run.belief.info["curvature"]["reduction"] == "token"


def test_schedule_is_followed_and_logged(tmp_path):
    for optimizer in ("adamw_torch", "loko"):
        run = trainer(
            tmp_path / optimizer, make_tokenizer(), source=dataset(12, seed=9), optimizer=optimizer,
            laplace_strength=8.0, laplace_schedule="linear",
        )  # fmt: skip
        run.train()
        path = [e["laplace/strength"] for e in run.state.log_history if "laplace/strength" in e]
        assert path == [8.0, 6.0, 4.0, 2.0]
        assert run.laplace_strength == 8.0
        run.create_model_card()
        assert "was 8 on a linear schedule" in (tmp_path / optimizer / "README.md").read_text()


def test_warm_start_is_part_of_the_belief(tmp_path):
    run = trainer(
        tmp_path, make_tokenizer(), source=dataset(20, seed=9), laplace_warmup_steps=3,
        laplace_warmup_learning_rate=1e-2, per_device_eval_batch_size=16, **DIAGONAL,
    )  # fmt: skip
    start = AdapterState(run.model).snapshot()
    run.train()
    assert any(not torch.equal(m, start[key]) for key, m in run.belief.mean.items())
    assert all(f.any() for key, f in run.belief.precision.entries.items())  # no factor is blind
    record = run.belief.info["warm_start"]
    assert (record["steps"], record["learning_rate"], len(record["losses"])) == (3, 1e-2, 3)
    assert record["losses"][-1] < record["losses"][0]
    first = next(e for e in run.state.log_history if "loss" in e)
    assert first["laplace/warmup_loss"] == record["losses"][-1]
    assert first["source/rise"] == pytest.approx(first["source/loss"] - first["source/loss_start"]) != 0
    assert first["laplace/drift"] == 0.0  # training starts at the mean
    assert sum("laplace/warmup_loss" in e for e in run.state.log_history) == 1
    run.create_model_card()
    assert "after 3 steps on source data" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("optimizer,space", [("adamw_torch", "adapter"), ("loko", "delta_w")])
def test_refit_takes_the_curvature_at_the_present_weights(tmp_path, space, optimizer):
    run = trainer(
        tmp_path, make_tokenizer(), source=dataset(12, seed=9), optimizer=optimizer, laplace_refit_steps=3,
        laplace_space=space, max_steps=4, laplace_fisher="empirical", save_steps=3, source_heldout=4,
    )  # fmt: skip
    start = AdapterState(run.model).snapshot()
    run.train()
    assert run.belief.info["curvature"]["step"] == 3
    assert all(torch.equal(m, start[key]) for key, m in run.belief.mean.items())  # the mean stays
    model = make_lora_llama(torch.float32, attn="sdpa", random_b=False)
    saved = Belief.from_pretrained(tmp_path / "checkpoint-3")
    assert "step" not in saved.info["curvature"]  # the one in force until then
    from safetensors.torch import load_file

    adapter = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    AdapterState(model).load(adapter)
    collate = DataCollatorForSeq2Seq(make_tokenizer(), label_pad_token_id=-100)
    batches = [collate([dataset(12, seed=9)[i] for i in range(j, j + 4)]) for j in (0, 4)]
    expected, _ = estimate_curvature(model, batches, space=space, fisher="empirical", progress_bar=False)
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(run.belief.precision.tensors()[name], tensor, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("optimizer,space", [("adamw_torch", "adapter"), ("loko", "delta_w")])
def test_resuming_warm_start_refit_and_schedule_equals_not_stopping(tmp_path, optimizer, space):
    def fresh(folder):
        return trainer(
            folder, make_tokenizer(), source=dataset(12, seed=9), optimizer=optimizer, laplace_space=space,
            laplace_warmup_steps=2, laplace_refit_steps=2, laplace_schedule="cosine", max_steps=5, save_steps=1,
        )  # fmt: skip

    whole = fresh(tmp_path / "whole")
    whole.train()
    for step in (2, 3):  # where a refit is due, and in between
        resumed = fresh(tmp_path / f"resumed{step}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert torch.equal(weights(whole), weights(resumed))
        for name, tensor in whole.belief.precision.tensors().items():
            assert torch.equal(tensor, resumed.belief.precision.tensors()[name])
        assert whole._source_metrics() == resumed._source_metrics()


def test_refits_do_not_disturb_accumulated_gradients(tmp_path):
    results = []
    for size, accumulation in ((8, 1), (2, 4)):
        run = trainer(
            tmp_path / f"{size}", make_tokenizer(), source=dataset(12, seed=9), train=dataset(32), max_steps=3,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, laplace_strength=5.0,
            laplace_refit_steps=1, laplace_fisher="empirical", laplace_schedule="linear", gradient_checkpointing=True,
        )  # fmt: skip
        run.train()
        results.append(weights(run))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["gradient", "proximal"])
def test_evidence_chooses_logs_and_resumes(tmp_path, form):
    def fresh(folder):
        return trainer(
            folder, make_tokenizer(), source=dataset(12, seed=9), laplace_strength="evidence", laplace_evidence_steps=2,
            laplace_warmup_steps=2, laplace_form=form, max_steps=5, save_steps=3, **DIAGONAL,
        )  # fmt: skip

    whole = fresh(tmp_path / "whole")
    whole.train()
    entries = [e for e in whole.state.log_history if "loss" in e]
    assert all({"laplace/strength", "laplace/prior_precision", "laplace/log_evidence"} <= e.keys() for e in entries)
    assert len({e["laplace/strength"] for e in entries}) == 3  # at steps 0, 2 and 4
    state = json.loads((tmp_path / "whole" / "checkpoint-3" / "kalman_state.json").read_text())
    assert state["laplace_strength"] == entries[2]["laplace/strength"]
    assert state["prior_precision"] == entries[2]["laplace/prior_precision"]
    whole.create_model_card()
    assert "by the marginal likelihood" in (tmp_path / "whole" / "README.md").read_text()
    resumed = fresh(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.prior_precision == resumed.prior_precision


def test_evidence_counts_the_labels_of_the_run(tmp_path, monkeypatch):
    seen = {}

    def spy(prior, target, state, mean, **options):
        seen.update(options)
        return 2.0, 30.0, -1.0

    monkeypatch.setattr("kalman_peft.belief_trainer.maximise_evidence", spy)
    data = dataset(12)
    labels = sum(sum(x != -100 for x in row["labels"][1:]) for row in data)
    few = sum(sum(x != -100 for x in data[i]["labels"][1:]) for i in range(8))
    run = trainer(
        tmp_path, make_tokenizer(), source=dataset(12, seed=9), laplace_strength="evidence", source_samples=8,
        max_steps=8, **DIAGONAL,
    )  # fmt: skip
    run.train()
    assert seen["num_observed"] == few
    assert seen["num_labels"] == pytest.approx(few / 8 * 12)  # 8 steps of 4 see all 12 sequences
    assert abs(seen["num_labels"] - labels) < 0.2 * labels
    assert run._laplace.strength == 2.0
    assert run._laplace.prior_precision == pytest.approx(30.0 / seen["num_labels"])


def test_penalty_in_the_log_contains_the_prior_precision():
    from types import SimpleNamespace

    model, belief = fitted()
    callback = LaplaceCallback(belief, 2.0, prior_precision=0.5)
    callback.on_train_begin(SimpleNamespace(), None, None, model=model)
    for _ in range(2):
        metrics = callback.metrics()
        expected = 2 * metrics["laplace/drift"] + 0.25 * float(squared_distance(belief, AdapterState(model)))
        assert metrics["laplace/penalty"] == pytest.approx(expected)
        assert metrics["laplace/prior_precision"] == 0.5
        callback.on_pre_optimizer_step(SimpleNamespace(), None, None)


# -- arguments -------------------------------------------------------------------------------------------------------


def test_arguments_are_read_from_a_command_line(tmp_path):
    (args,) = HfArgumentParser(KalmanConfig).parse_args_into_dataclasses([  # type: ignore[arg-type]
        "--output_dir", str(tmp_path), "--use_cpu", "--laplace_strength", "3.5", "--source_weights", '{"a": 1, "b": 3}',
        "--source_self_prompts", "one", "two",
    ])  # fmt: skip
    assert args.laplace_strength == 3.5
    assert args.source_weights == {"a": 1, "b": 3}
    assert args.source_self_prompts == ["one", "two"]
    assert not args.uses_evidence
    (args,) = HfArgumentParser(KalmanConfig).parse_args_into_dataclasses([
        "--output_dir", str(tmp_path), "--use_cpu", "--laplace_strength", "evidence", "--laplace_space", "adapter",
    ])  # fmt: skip
    assert args.uses_evidence


@pytest.mark.parametrize(
    "options,match",
    [
        ({"laplace_strength": "much"}, "laplace_strength must be a number or 'evidence', got 'much'"),
        ({"laplace_strength": "-1"}, "laplace_strength must be >= 0"),
        ({"laplace_strength": "evidence"}, "'evidence' is not supported in laplace_space='delta_w'"),
        ({"laplace_strength": "evidence", "laplace_space": "adapter", "optimizer": "loko"}, "'evidence' is not supported with optimizer='loko'"),
        ({"laplace_strength": "evidence", "laplace_space": "adapter", "forgetting_budget": 0.1}, "not both"),
        ({"laplace_strength": "evidence", "laplace_space": "adapter", "laplace_schedule": "linear"}, "laplace_strength='evidence' chooses it"),
        ({"forgetting_budget": 0.1, "laplace_schedule": "cosine"}, "forgetting_budget chooses it"),
        ({"laplace_schedule": "step"}, "laplace_schedule must be one of"),
        ({"laplace_warmup_steps": -1}, "laplace_warmup_steps must be >= 0"),
        ({"laplace_refit_steps": -1}, "laplace_refit_steps must be >= 0"),
        ({"laplace_evidence_steps": 0}, "laplace_evidence_steps must be >= 1"),
        ({"laplace_num_samples": 0}, "laplace_num_samples must be >= 1"),
        ({"laplace_dense_limit": -1}, "laplace_dense_limit must be >= 0"),
        ({"laplace_warmup_learning_rate": 0.0}, "laplace_warmup_learning_rate must be positive"),
        ({"laplace_fisher": "sampled", "laplace_reduction": "sequence"}, "laplace_reduction.*means nothing for fisher='sampled'"),
        ({"laplace_fisher": "empirical", "laplace_num_samples": 2}, "laplace_num_samples: num_samples must be >= 1, and 1"),
        ({"laplace_structure": "dense"}, "laplace_space='adapter'"),
        ({"laplace_structure": "ekfac", "laplace_form": "proximal"}, "laplace_form='proximal' is not supported for laplace_structure='ekfac'"),
        ({"laplace_rank": 0}, "laplace_rank must be >= 1"),
        ({"source_self_length": 1}, "source_self_length must be >= 2"),
        ({"source_weights": "[1, -2]"}, "source_weights must be numbers >= 0"),
    ],
)  # fmt: skip
def test_raises_when_the_arguments_contradict_each_other(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        KalmanConfig(str(tmp_path), use_cpu=True, **options)


def test_warns_of_options_without_effect(tmp_path):
    with pytest.warns(UserWarning, match="laplace_evidence_steps: no effect without laplace_strength='evidence'"):
        KalmanConfig(str(tmp_path), laplace_evidence_steps=5, use_cpu=True)
    with pytest.warns(UserWarning, match="laplace_warmup_learning_rate: no effect without laplace_warmup_steps"):
        KalmanConfig(str(tmp_path), laplace_warmup_learning_rate=0.1, use_cpu=True)


@pytest.mark.parametrize(
    "options,match",
    [
        ({"laplace_warmup_steps": 2}, "laplace_warmup_steps=2 needs"),
        ({"laplace_schedule": "linear"}, "laplace_schedule='linear' needs"),
        ({"laplace_offload": True}, "laplace_offload=True needs"),
        ({"laplace_refit_steps": 2}, "laplace_refit_steps=2 needs source data"),
    ],
)
def test_raises_when_there_is_nothing_to_regularise_with(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        trainer(tmp_path, make_tokenizer(), **options)


def test_raises_when_a_given_belief_does_not_go_with_the_options(tmp_path):
    belief = Belief.fit(make_lora_llama(torch.float32), [make_batch()], progress_bar=False)
    for options, match in (
        ({"laplace_warmup_steps": 2}, "`belief=` is given"),
        ({"laplace_refit_steps": 2}, "laplace_refit_steps=2 needs source data"),
        ({"laplace_strength": "evidence", "laplace_space": "adapter"}, "for a `belief` in space 'delta_w'"),
    ):
        with pytest.raises(ValueError, match=match):
            trainer(tmp_path, make_tokenizer(), belief=belief, **options)


def test_raises_when_a_warm_start_meets_a_checkpoint_without_a_belief(tmp_path):
    plain = trainer(tmp_path / "plain", make_tokenizer())
    plain.train()
    run = trainer(tmp_path / "run", make_tokenizer(), source=dataset(12), laplace_warmup_steps=2)
    with pytest.raises(ValueError, match="has no belief, and laplace_warmup_steps=2"):
        run.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))


@pytest.mark.parametrize("option", [{"strength": -1.0}, {"prior_precision": -1.0}, {"prior_precision": math.inf}])
def test_raises_when_the_callback_gets_a_negative_number(option):
    _, belief = fitted()
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be >= 0 and finite"):
        LaplaceCallback(belief, **option)
