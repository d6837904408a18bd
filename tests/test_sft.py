"""KalmanSFTTrainer inside TRL: data of every kind, packing, the penalty, resumption, LoKO; and the callback alone."""

import subprocess
import sys

import pytest
import sft
import torch
from conftest import make_batch
from datasets import Dataset, IterableDataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from kalman_peft import (
    AdapterState,
    Belief,
    KalmanConfig,
    KalmanSFTConfig,
    KalmanSFTTrainer,
    KalmanTrainer,
    LaplaceCallback,
)


TOKENIZER = sft.tokenizer()
PACKED = {"packing": True, "max_length": 24}


def trainer(folder, model=None, train=None, source=None, belief=None, peft_config=None, eval_dataset=None, **options):
    options = sft.SFT | {"source_heldout": 4, "source_samples": 8} | options
    if options.get("optimizer") != "loko":
        options.setdefault("learning_rate", 1e-2)
    return KalmanSFTTrainer(
        model=sft.model() if model is None else model,
        args=KalmanSFTConfig(str(folder), **options),
        train_dataset=sft.texts() if train is None else train,
        eval_dataset=eval_dataset,
        source_dataset=source,
        belief=belief,
        peft_config=peft_config,
        processing_class=TOKENIZER,
    )


def weights(run):
    return AdapterState(run.model, warn_excluded=False).flatten().clone()


def ids(text):
    return TOKENIZER(text)["input_ids"]


# -- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["texts", "pairs", "chats"])
def test_source_is_prepared_as_training_data(tmp_path, kind):
    data = getattr(sft, kind)(12, seed=5)
    run = trainer(tmp_path, train=data, source=data, source_samples=12, source_heldout=3)
    parts = [*run._sources.fit["source"], *run._sources.heldout["source"]]
    assert [(row["input_ids"], row["labels"]) for row in parts] == [
        (row["input_ids"], row["labels"]) for row in run.train_dataset
    ]


def test_only_completions_are_labels(tmp_path):
    run = trainer(tmp_path, train=sft.pairs(12), source=sft.pairs(12, seed=9))
    raw = sft.pairs(12, seed=9)
    for row, given in zip(run._sources.fit["source"], raw, strict=False):
        prompt, completion = ids(given["prompt"]), [*ids(given["completion"]), TOKENIZER.eos_token_id]
        assert row["input_ids"] == prompt + completion
        assert row["labels"] == [-100] * len(prompt) + completion
    run.train()
    expected = sum(len(ids(given["completion"])) + 1 for given in raw.select(range(8)))
    assert run.belief.info["curvature"]["num_tokens"] == expected


def test_chat_template_and_assistant_only_loss(tmp_path):
    run = trainer(tmp_path, train=sft.chats(12), source=sft.chats(12, seed=9), assistant_only_loss=True)
    row, message = run._sources.fit["source"][0], sft.chats(12, seed=9)[0]["messages"]
    assert row["input_ids"] == ids(f"<user> {message[0]['content']} <assistant> {message[1]['content']}</s>")
    assert [label for label in row["labels"] if label != -100] == [*ids(message[1]["content"]), 3]
    run.train()
    assert run.state.log_history[0]["laplace/drift"] >= 0


def test_source_of_another_kind_tokenised_or_streaming(tmp_path):
    tokenised = [{"input_ids": [7, 8, 9, 3], "labels": [-100, 8, 9, 3]}] * 6
    stream = IterableDataset.from_generator(lambda: iter(sft.texts(40, seed=3)))
    run = trainer(
        tmp_path, train=sft.pairs(12), source={"tokens": Dataset.from_list(tokenised), "stream": stream, "chat": sft.chats()},
        source_samples=2, source_heldout=1,
    )  # fmt: skip
    fit = run._sources.fit
    assert {name: len(part) for name, part in fit.items()} == {"tokens": 2, "stream": 2, "chat": 2}
    assert fit["tokens"][0]["labels"] == [-100, 8, 9, 3]
    assert fit["stream"][0]["labels"] == [*ids(sft.texts(40, seed=3)[1]["text"]), 3]  # the first is held out
    run.train()
    assert any({"source/stream/loss", "source/chat/loss"} <= entry.keys() for entry in run.state.log_history)


def test_self_written_source(tmp_path):
    run = trainer(tmp_path, source="self", source_self_length=6, source_samples=3, source_heldout=2)
    run.train()
    assert run.belief.source["input_ids"].shape == (5, 6)


# -- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [PACKED, {"padding_free": True, "max_length": None}])
def test_packed_curvature_is_that_of_the_sequences(tmp_path, options):
    # In float64, with every label: nothing is drawn and nothing depends on who shares a row.
    found = []
    for more in ({}, options):
        kwargs = {"laplace_fisher": "exact", "laplace_structure": "diagonal", "laplace_space": "adapter"} | more
        run = trainer(tmp_path, sft.model(torch.float64), source=sft.pairs(12, seed=9), train=sft.pairs(), **kwargs)
        run._prepare_belief(None)
        found.append(run.belief)
    assert found[0].info["curvature"]["num_sequences"] == found[1].info["curvature"]["num_sequences"] == 8
    for key, entries in found[0].precision.entries.items():
        torch.testing.assert_close(found[1].precision.entries[key], entries, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("form", ["gradient", "proximal"])
@pytest.mark.parametrize("packing", [{}, PACKED])
def test_penalty_acts_as_the_formula_says(tmp_path, form, packing):
    # SGD with rate 0.5: x' = x - 0.5 (g + strength H (x - m)), or the proximal point of x - 0.5 g.
    model, strength, rate = sft.model(torch.float64), 300.0, 0.5
    belief = Belief.fit(model, [make_batch()], progress_bar=False)
    for p in AdapterState(model).parameters().values():
        p.data.add_(0.05)
    start, found = AdapterState(model).snapshot(), {}
    for lam in (0.0, strength):
        AdapterState(model).load(start)
        run = trainer(
            tmp_path, model, belief=belief, laplace_strength=lam, laplace_form=form, optimizer="sgd", max_steps=1,
            learning_rate=rate, lr_scheduler_type="constant", max_grad_norm=0.0, **packing,
        )  # fmt: skip
        run.train()
        found[lam] = AdapterState(model).snapshot()
    if form == "gradient":
        pull = belief.energy_and_gradient(start)[1]
        expected = {k: found[0.0][k] - rate * strength * pull[k].to(start[k]) for k in start}
    else:
        expected = belief.proximal(found[0.0], rate * strength)
    for key, value in expected.items():
        torch.testing.assert_close(found[strength][key], value.to(found[strength][key]), rtol=1e-4, atol=1e-5)
    assert max((found[strength][key] - found[0.0][key]).abs().max() for key in start) > 0.01


# -- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [{}, PACKED])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "loko"])
def test_resume_equals_not_stopping(tmp_path, optimizer, packing):
    def fresh(folder):
        return trainer(
            folder, source=sft.texts(12, seed=9), train=sft.texts(32), optimizer=optimizer, max_steps=4,
            save_strategy="steps", save_steps=2, per_device_train_batch_size=2, gradient_checkpointing=True, **packing,
        )  # fmt: skip

    whole = fresh(tmp_path / "whole")
    whole.train()
    resumed = fresh(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(resumed))
    tokens = [run.state.log_history[-3]["num_tokens"] for run in (whole, resumed)]
    assert tokens[0] > 0
    Belief.from_pretrained(tmp_path / "whole" / "checkpoint-4").check(whole.model)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "sft" in card and ("LoKO" in card) == (optimizer == "loko")


def test_loko_sees_what_the_model_without_packing_sees(tmp_path):
    # The same two sequences, in one row and padded: the same loss and the same step, if nothing is drawn.
    found = []
    for options in ({"max_length": 16}, {"padding_free": True, "max_length": None}):
        run = trainer(
            tmp_path, sft.model(torch.float64), train=sft.pairs(2), optimizer="loko", loko_columns="exact", loko_max_columns=1000,
            max_steps=1, **options,
        )  # fmt: skip
        run.train()
        found.append((run.state.log_history[0]["loss"], weights(run), run.state.log_history[0]["num_tokens"]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-9)
    assert found[0][2] == found[1][2]


def test_loko_logs_the_loss_of_the_fused_head(tmp_path):
    losses = []
    for optimizer in ("adamw_torch", "loko"):
        run = trainer(tmp_path, train=sft.pairs(4), optimizer=optimizer, max_steps=1)
        run.train()
        losses.append(run.state.log_history[0]["loss"])
        seen = run.evaluate(sft.pairs(4))
        assert seen["eval_num_tokens"] == run.state.log_history[0]["num_tokens"] and seen["eval_loss"] > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_model_by_name_with_an_adapter_that_trl_makes(tmp_path):
    from peft import LoraConfig

    sft.model().unload().save_pretrained(tmp_path / "base")
    run = trainer(
        tmp_path / "out", str(tmp_path / "base"), source=sft.texts(12, seed=9), eval_strategy="steps", eval_steps=1,
        eval_dataset=sft.texts(4), peft_config=LoraConfig(r=2, target_modules="all-linear"), model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    before = weights(run)
    run.train()
    assert len(run.belief.mean) == 2 * 2 * 7 and not torch.equal(before, weights(run))
    assert run.args.learning_rate == 1e-2


def test_learning_rate_is_that_of_trl_by_default(tmp_path):
    assert KalmanSFTConfig(str(tmp_path), bf16=False, use_cpu=True).learning_rate == SFTConfig.learning_rate == 2e-5
    config = KalmanSFTConfig(str(tmp_path), optimizer="loko", bf16=False, use_cpu=True)
    assert (config.learning_rate, config.max_grad_norm) == (1.0, 0.0)


# -- the callback alone ----------------------------------------------------------------------------------------------


def preferences():
    return Dataset.from_list(
        [
            {"prompt": a, "chosen": " " + b, "rejected": " " + c}
            for a, b, c in zip(sft.words(4, 0), sft.words(4, 1), sft.words(4, 2), strict=True)
        ]
    )


@pytest.mark.parametrize("stock", [SFTTrainer, DPOTrainer])
def test_callback_in_stock_trainers_of_trl(tmp_path, stock):
    model, strength = sft.model(torch.float64), 3.0
    belief = Belief.fit(model, [make_batch()], progress_bar=False)
    for p in AdapterState(model).parameters().values():
        p.data.add_(0.05)
    start, found = AdapterState(model).snapshot(), []
    config = SFTConfig if stock is SFTTrainer else DPOConfig
    for lam in (0.0, strength):
        model = sft.model(torch.float64)  # another one: DPO adds a reference adapter
        AdapterState(model).load(start)
        run = stock(
            model=model,
            args=config(str(tmp_path), optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0,
                        **sft.SFT | {"max_steps": 1}),
            train_dataset=sft.texts(4) if stock is SFTTrainer else preferences(), processing_class=TOKENIZER,
            callbacks=[LaplaceCallback(belief, strength=lam)],
        )  # fmt: skip
        run.train()
        found.append(AdapterState(model).snapshot())
        assert run.state.log_history[0]["laplace/drift"] > 0
    pull = belief.energy_and_gradient(start)[1]
    for key in pull:
        torch.testing.assert_close(
            found[0][key] - found[1][key], strength * pull[key].to(start[key]), rtol=1e-4, atol=1e-5
        )


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dft"}, "loss_type='dft' is not supported with optimizer='loko'"),
        ({"activation_offloading": True}, "activation_offloading=True is not supported"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}},
            "leave `selective` out",
        ),
    ],
)
def test_raises_when_loko_cannot(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        KalmanSFTConfig(str(tmp_path), optimizer="loko", **sft.SFT | options)
    KalmanSFTConfig(str(tmp_path), **sft.SFT | options)


def test_raises_when_args_are_of_another_trainer(tmp_path):
    with pytest.raises(TypeError, match="must be a KalmanSFTConfig, got KalmanConfig"):
        KalmanSFTTrainer(model=sft.model(), args=KalmanConfig(str(tmp_path), use_cpu=True), train_dataset=sft.texts())
    with pytest.raises(TypeError, match="KalmanTrainer would ignore; use KalmanSFTTrainer"):
        KalmanTrainer(model=sft.model(), args=KalmanSFTConfig(str(tmp_path), **sft.SFT), train_dataset=sft.texts())


def test_raises_when_the_source_has_no_labels_left(tmp_path):
    long = Dataset.from_list([{"prompt": " ".join("abcdefghij" * 2), "completion": " a"}] * 8)
    with pytest.raises(ValueError, match="No sequence of source in `source_dataset` has labels within max_length=16"):
        trainer(tmp_path, train=sft.pairs(), source=long)


def test_without_trl_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['trl'] = None\n"
        "import kalman_peft\n"
        "try:\n    kalman_peft.KalmanSFTTrainer\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "kalman_peft[trl]"' in done.stdout
