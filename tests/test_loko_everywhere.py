"""LoKO wherever the Trainer goes: quantised and compiled models, its options, its tasks, and what it refuses by name."""

import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_llama, make_lora_llama, randomise_b
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from training import dataset, make_tokenizer, rows, trainer, weights
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    TrainerCallback,
)

from kalman_peft import AdapterState, Belief, KalmanConfig, KalmanTrainer
from kalman_peft.compiled import keep_saved_tensors
from kalman_peft.loko import LoKO


QUIET = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def loko(tmp_path, tokenizer):
    """Train with LoKO, and give the trainer back."""
    made = []

    def train(resume=None, callback=None, **options):
        made.append(1)
        options = {"optimizer": "loko", "save_strategy": "no"} | options
        run = trainer(tmp_path / f"run{len(made)}", tokenizer, **options)
        if callback is not None:
            run.add_callback(callback)
        run.train(resume_from_checkpoint=resume)
        return run

    return train


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tokenizer):
    """The adapter after some steps of LoKO and nothing else, computed once."""

    @functools.cache
    def train(steps=4, rows=12):
        run = trainer(
            tmp_path_factory.mktemp("plain"), tokenizer, train=dataset(rows), optimizer="loko", max_steps=steps,
            save_strategy="no",
        )  # fmt: skip
        run.train()
        return weights(run)

    return train


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def small_llama(**options):
    return make_lora_llama(torch.float32, attn="sdpa", random_b=False, **options)


# -- quantised base models ---------------------------------------------------------------------------------------------


def quantised(folder, bits):
    """A tiny 8- or 4-bit LoRA model, and the same with its base dequantised."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_llama(torch.float32, attn="sdpa", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    how = {8: {"load_in_8bit": True}, 4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}[bits]
    found = []
    for whole in (False, True):
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(**how), dtype=torch.float32
        )
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
        found.append(get_peft_model(model.dequantize().float() if whole else model, config))
        randomise_b(found[-1], std=0.02)
    return found


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_base_trains_as_the_dequantised_one(tmp_path, loko, bits):
    # With a belief: the source loss is measured before training, in evaluation mode.
    moves, curves = [], []
    for model in quantised(tmp_path / "model", bits):
        start = AdapterState(model).flatten().clone()
        run = loko(
            model=model, train=dataset(4, prompt=0), source=dataset(12, seed=9), max_steps=6,
            laplace_strength=1.0, loko_tempering=1.0,
        )  # fmt: skip
        moves.append(weights(run) - start)
        curves.append(losses(run))
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=0.02 if bits == 8 else 1e-3)  # 8 bits round the inputs too
    assert torch.cosine_similarity(*moves, dim=0) > (0.98 if bits == 8 else 0.9999)


@pytest.mark.parametrize("bits", [8, 4])
def test_curvature_of_a_quantised_base(tmp_path, bits):
    from conftest import make_batch

    models = quantised(tmp_path / "model", bits)
    energies = []
    for model in models:
        belief = Belief.fit(model, [make_batch()], fisher="empirical", structure="diagonal", progress_bar=False)
        moved = {k: p + 0.1 for k, p in AdapterState(model).parameters().items()}
        energies.append(float(belief.energy(moved)))
    assert energies[0] == pytest.approx(energies[1], rel=0.1 if bits == 8 else 1e-3)


def test_raises_when_4_bit_layers_pass_no_gradient(tmp_path, tokenizer):
    model = quantised(tmp_path / "model", 4)[0]
    layer = next(m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu"))
    trainer(tmp_path, tokenizer, model=model, optimizer="loko")
    assert not layer.support_avx512bf16_for_cpu
    layer.weight.quant_state.packing_format_for_cpu = True  # as the first evaluation sets on some CPUs
    with pytest.raises(ValueError, match="no gradient passes"):
        trainer(tmp_path, tokenizer, model=model, optimizer="loko")


# -- compiled models ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_eager(loko):
    # The third batch is longer: its graph is compiled at a step without a draw, and then used at one with a draw.
    lengths = (5, 5, 6, 6)
    data = Dataset.from_list(
        [
            {"input_ids": ids, "attention_mask": [1] * n, "labels": ids}
            for k, n in enumerate(lengths)
            for ids in [[3 + (k + j) % 14 for j in range(n)]]
        ]
    )
    options = {"loko_first_draws": 0, "loko_curvature_every": 3, "per_device_train_batch_size": 1, "max_steps": 4}
    options |= {"train": data, "train_sampling_strategy": "sequential", "gradient_accumulation_steps": 1}
    small = {"model_overrides": {"num_hidden_layers": 1}}
    eager = loko(model=small_llama(**small), **options)
    compiled = loko(model=small_llama(**small), torch_compile=True, torch_compile_backend="aot_eager", **options)
    assert type(compiled.model_wrapped).__name__ == "OptimizedModule"
    torch.testing.assert_close(weights(compiled), weights(eager), rtol=1e-5, atol=1e-6)


def test_the_cache_on_disk_does_not_mix_runs(tmp_path, monkeypatch):
    # Graphs that another run compiled there may overwrite what they saved at their first backward pass.
    from torch._inductor.codecache import compiled_fx_graph_hash

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    graph, inputs = torch.fx.symbolic_trace(torch.nn.Linear(2, 2)), [torch.ones(1, 2)]
    outside = compiled_fx_graph_hash(graph, inputs, {}, [])[0]
    assert compiled_fx_graph_hash(graph, inputs, {}, [])[0] == outside
    with keep_saved_tensors():
        assert compiled_fx_graph_hash(graph, inputs, {}, [])[0] != outside


def test_graphs_compiled_before_are_not_used(loko, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append(1))
    loko(max_steps=1)
    assert not calls
    loko(max_steps=1, torch_compile=True, torch_compile_backend="eager")
    assert calls


# -- checkpointing and precision ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": '{"preserve_rng_state": false}'},
    ],
)
def test_checkpointing_changes_nothing(loko, plain, options):
    torch.testing.assert_close(weights(loko(**options)), plain(), rtol=1e-5, atol=1e-7)


def test_bf16_autocast_and_bf16_weights(loko, plain):
    start = AdapterState(small_llama()).flatten()
    exact = plain() - start
    autocast = weights(loko(bf16=True)) - start
    assert not torch.equal(exact, autocast)
    assert torch.cosine_similarity(exact, autocast, dim=0) > 0.9
    half = loko(model=small_llama().to(torch.bfloat16), train=dataset(4), max_steps=8, loko_tempering=1.0)
    assert all(p.dtype == torch.bfloat16 for p in half.model.parameters())
    assert losses(half)[-1] < 0.95 * losses(half)[0]
    assert all(t.dtype == torch.float32 for memory in half._kalman._memories for t in memory.tensors.values())


# -- accumulation, logs, schedules -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_logged_losses_are_those_of_the_trainer(loko, average, drop_last):
    # 11 sequences: 6 batches (the last of one sequence) or 5, in steps of 4 and 2 or of 4 and 1; two epochs.
    options = {
        "train": dataset(11, prompt=0), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
        "average_tokens_across_devices": average, "dataloader_drop_last": drop_last, "num_train_epochs": 2,
        "max_steps": -1,
    }  # fmt: skip
    frozen = loko(learning_rate=1e-12, **options)
    adamw = loko(optimizer="adamw_torch", learning_rate=1e-12, **options)
    assert len(losses(adamw)) == 4
    assert losses(frozen) == pytest.approx(losses(adamw), rel=1e-4)
    assert "grad_norm" not in frozen.state.log_history[0]


@pytest.mark.parametrize(
    "schedule,options,factors",
    [
        ("linear", {}, (None, 2 / 3)),
        ("cosine", {}, (None, 0.75)),
        ("polynomial", {"lr_scheduler_kwargs": {"power": 2.0, "lr_end": 0.0}}, (None, 4 / 9)),
        ("constant", {"learning_rate": 0.5}, (0.5, None)),
        ("linear", {"warmup_steps": 2}, (0, None)),
    ],
)
def test_a_schedule_scales_the_kalman_step(loko, plain, schedule, options, factors):
    start = AdapterState(small_llama()).flatten()
    moves = plain(1) - start, plain(2) - plain(1)

    run = None
    for k, factor in enumerate(factors):
        if factor is None:
            continue
        run = loko(callback=StopAt(k + 1), max_steps=3, lr_scheduler_type=schedule, **options)
        base = start if k == 0 else plain(1)
        torch.testing.assert_close(weights(run) - base, factor * moves[k], rtol=1e-3, atol=1e-6)
    if factors[0] == 0:  # the filter has seen the batch all the same
        assert run._kalman.param_groups[0]["steps"] == 1 and run._kalman.param_groups[0]["tokens"] > 0


# -- checkpoints and further options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["kronecker", "diagonal"])
def test_resume_inside_an_epoch_with_accumulation(tmp_path, loko, memory):
    # 11 sequences in batches of 2 make steps of 2, 2 and 2 batches; the checkpoint is after the first two steps.
    options = {
        "train": dataset(11), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 5,
        "save_strategy": "steps", "save_steps": 2, "loko_memory": memory, "loko_process_noise": 1e-3,
        "lr_scheduler_type": "cosine",
    }  # fmt: skip
    whole = loko(model=small_llama(lora_dropout=0.2), **options)
    resumed = loko(model=small_llama(lora_dropout=0.2), resume=str(tmp_path / "run1" / "checkpoint-2"), **options)
    assert resumed.state.global_step == 5
    assert torch.equal(weights(whole), weights(resumed))
    assert losses(whole)[-3:] == losses(resumed)[-3:]


def test_evaluation_between_steps_does_not_disturb_the_filter(loko):
    options = {"eval_dataset": dataset(6, seed=5), "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    watched = loko(gradient_accumulation_steps=2, per_device_train_batch_size=2, **options)
    assert sum("eval_loss" in entry for entry in watched.state.log_history) == 5
    alone = loko(gradient_accumulation_steps=2, per_device_train_batch_size=2)
    assert torch.equal(weights(watched), weights(alone))
    evaluated, predicted = watched.evaluate(), watched.predict(dataset(6, seed=5))
    assert evaluated["eval_loss"] == predicted.metrics["test_loss"]
    assert predicted.predictions.shape[::2] == (6, 17)
    assert torch.equal(weights(watched), weights(alone))


def test_best_model_is_loaded_at_the_end(tmp_path, loko):
    data = dataset(12, seed=5)
    run = loko(
        eval_dataset=data, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=4,
        load_best_model_at_end=True, save_only_model=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    evaluated = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(set(evaluated)) == 4
    assert run.evaluate()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-6)
    assert not (tmp_path / "run1" / "checkpoint-1" / "optimizer.pt").exists()


def test_auto_find_batch_size_starts_again_without_the_broken_step(loko, monkeypatch):
    observe, seen = LoKO.observe, []

    def limited(self, logits, labels, segments=None):
        seen.append(len(labels))
        if len(seen) == 2:  # in the middle of the first step
            raise RuntimeError("CUDA out of memory. (a test)")
        return observe(self, logits, labels, segments)

    options = {"gradient_accumulation_steps": 2, "max_steps": 2}
    plain = loko(per_device_train_batch_size=3, **options)
    monkeypatch.setattr(LoKO, "observe", limited)
    found = loko(per_device_train_batch_size=4, auto_find_batch_size=True, **options)
    assert seen == [4, 4, 3, 3, 3, 3]
    assert torch.equal(weights(found), weights(plain))
    assert found._kalman.param_groups[0]["tempering"] == 1.0  # of batches of 4 the run would see some rows twice
    assert found._kalman.param_groups[0]["tokens"] == plain._kalman.param_groups[0]["tokens"]


@pytest.mark.parametrize(
    "options,changes",
    [
        ({"neftune_noise_alpha": 5.0}, True),
        ({"train_sampling_strategy": "group_by_length"}, True),
        ({"train_sampling_strategy": "sequential"}, True),
        ({"include_num_input_tokens_seen": "all"}, False),
        ({"dataloader_num_workers": 1}, False),
        ({"full_determinism": False, "logging_nan_inf_filter": False}, False),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}, False),
    ],
)
def test_options_of_the_trainer_keep_their_meaning(loko, plain, options, changes):
    run = loko(train=dataset(32), **options)
    assert torch.equal(weights(run), plain(rows=32)) is not changes
    assert all(math.isfinite(loss) for loss in losses(run)) and run.state.global_step == 4
    if "include_num_input_tokens_seen" in options:
        assert run.state.num_input_tokens_seen > 0
    assert not run.model.get_input_embeddings()._forward_hooks  # NEFTune's hook is gone


def test_the_device_cache_is_emptied_as_often_as_asked(loko, monkeypatch):
    calls = []
    monkeypatch.setattr("kalman_peft.trainer.clear_device_cache", lambda: calls.append(1))
    loko(max_steps=4)
    assert not calls
    loko(max_steps=4, torch_empty_cache_steps=2)
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options,match",
    [
        ({"use_liger_kernel": True}, "use_liger_kernel=True is not supported"),
        ({"optim": "sgd"}, "optim=sgd has no effect"),
        ({"optim_args": "a=1"}, "optim_args=a=1 has no effect"),
        ({"optim_target_modules": ["q_proj"]}, "optim_target_modules"),
        ({"adam_beta1": 0.8}, "adam_beta1=0.8 has no effect"),
        ({"parallelism_config": object()}, "parallelism_config"),
        ({"max_grad_norm": 0.5}, "max_grad_norm=0.5 is not supported"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            "activation_checkpointing_kwargs={'use_reentrant': False}",
        ),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "gradient_checkpointing_kwargs={'use_reentrant': False}",
        ),
    ],
)
def test_raises_when_an_option_does_not_go_with_loko(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        KalmanConfig(str(tmp_path), optimizer="loko", **QUIET, **options)


def test_optimizers_mode_follows_training_and_evaluation(loko, monkeypatch):
    # The protocol of schedule-free optimizers: `eval()` before an evaluation, `train()` before a training step.
    calls = []
    monkeypatch.setattr(LoKO, "train", lambda self: calls.append("train"), raising=False)
    monkeypatch.setattr(LoKO, "eval", lambda self: calls.append("eval"), raising=False)
    loko(max_steps=2, eval_dataset=dataset(4), eval_strategy="steps", eval_steps=1)
    assert [call for call, _ in itertools.groupby(calls)] == ["train", "eval", "train", "eval"]


def test_trials_of_a_hyperparameter_search(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", vars)  # which asks for optuna
    from transformers.trainer_utils import HPSearchBackend

    def search(**trial):
        run.hp_search_backend = HPSearchBackend.OPTUNA
        run.hp_space = lambda trial: trial.params
        run.train(trial=SimpleNamespace(number=0, params=trial))
        return run._kalman.param_groups[0]

    run = KalmanTrainer(
        args=KalmanConfig(str(tmp_path), optimizer="loko", max_steps=2, **QUIET),
        model_init=lambda: small_llama(),
        train_dataset=dataset(),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    first = search(loko_rank=3, learning_rate=0.5)
    assert (first["rank"], first["lr"], first["steps"]) == (3, 0.5, 2)
    moved = weights(run)
    second = search(loko_rank=2, learning_rate=1.0)
    assert (second["rank"], second["lr"], second["steps"]) == (2, 1.0, 2)
    assert not torch.equal(moved, weights(run))
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0 is not supported"):
        search(max_grad_norm=1.0)
    with pytest.raises(ValueError, match="model_init makes a new adapter"):
        KalmanTrainer(
            args=KalmanConfig(str(tmp_path), optimizer="loko", source_heldout=2, **QUIET),
            model_init=lambda: small_llama(),
            source_dataset=dataset(),
        )


# -- tasks -------------------------------------------------------------------------------------------------------------


def task(tmp_path, model, data, collator, steps=8, **options):
    options = QUIET | {"optimizer": "loko", "max_steps": steps, "per_device_train_batch_size": 4} | options
    run = KalmanTrainer(
        model=model, args=KalmanConfig(str(tmp_path), **options), train_dataset=data, data_collator=collator
    )
    run.train()
    return run


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_seq2seq(tmp_path, tokenizer, kind):
    from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "d_model": 16, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 2}
    if kind == "t5":
        config = T5Config(**sizes, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0)
        model, targets = T5ForConditionalGeneration(config), ["q", "v"]
    else:
        config = BartConfig(
            **sizes, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, dropout=0.0, bos_token_id=1,
            forced_eos_token_id=None,
        )  # fmt: skip
        model, targets = BartForConditionalGeneration(config), ["q_proj", "v_proj"]
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.4)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="SEQ_2_SEQ_LM"))
    data = [row | {"labels": row["input_ids"][::-1]} for row in rows(4)]
    collator = DataCollatorForSeq2Seq(tokenizer, model=model.get_base_model(), label_pad_token_id=-100)
    run = task(tmp_path, model, Dataset.from_list(data), collator, loko_tempering=1.0)
    assert losses(run)[-1] < 0.97 * losses(run)[0]
    assert losses(run)[-1] == min(losses(run))


def test_token_classification(tmp_path, tokenizer):
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, num_labels=3, pad_token_id=0, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["query", "value"], task_type="TOKEN_CLS")
    data = [row | {"labels": [-100] + [i % 3 for i in row["input_ids"][1:]]} for row in rows(4)]
    run = task(
        tmp_path, get_peft_model(BertForTokenClassification(config), lora), Dataset.from_list(data),
        DataCollatorForTokenClassification(tokenizer),
    )  # fmt: skip
    assert losses(run)[-1] < 0.97 * losses(run)[0]
    assert run._kalman.param_groups[0]["prior_tokens"] == 1e3


def test_packed_batches_train_as_padded_ones(tmp_path, tokenizer):
    data = dataset(12)
    padded = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    # All the information, as random draws belong to places in a batch.
    options = {"loko_columns": "exact", "loko_max_columns": 10_000, "loko_tempering": 1.0}
    runs = [
        task(tmp_path, small_llama(), data, collator, steps=4, **options)
        for collator in (padded, DataCollatorWithFlattening())
    ]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-4)
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]), rtol=1e-3, atol=1e-5)
