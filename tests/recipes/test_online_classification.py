"""The online recipe predicts before it learns, tunes on seeds of their own, resumes, and adds up what it measured."""

import json
import math
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

import online_classification as recipe
from recipe_tools.online_report import (
    T975,
    interval,
    online_markdown,
    online_table,
    plot_online,
    summarise_runs,
)
from recipe_tools.prequential import Learner, Trace, canonical, run_stream, smooth, summarise

from .test_classification_data import write_idx


METHODS = ["adamw:0.01", "adagrad:0.01", "sgd:0.1", "loko"]


def tiny_bert(vocab=130):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def adapted():
    model = tiny_bert()
    return get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))


def make_stream(batches=5, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 130, (batches, size, 6), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[:, 0] % 2} for row in ids]


# -- one pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_batch_is_predicted_before_it_is_learned(method):
    model, stream = adapted(), make_stream()
    untouched = adapted().eval()
    trace = run_stream(model, Learner(method, model, 0), stream)
    with torch.no_grad():
        expected = [cross_entropy(untouched(**{k: v for k, v in b.items() if k != "labels"}).logits, b["labels"],
                                  reduction="none") for b in stream]  # fmt: skip
    assert trace.loss[:4] == pytest.approx(expected[0].tolist(), abs=1e-6)
    assert trace.loss[4:8] != pytest.approx(expected[1].tolist(), abs=1e-6)  # by then it had learned
    assert len(trace.loss) == len(trace.correct) == 20 and len(trace.step_seconds) == 5
    assert (trace.diagnostics != {}) == (method == "loko")
    if method == "loko":
        assert all(len(values) == 5 for values in trace.diagnostics.values())


def test_sgd_is_that_of_a_loop_by_hand():
    model, reference, stream = adapted(), adapted().eval(), make_stream()
    trace = run_stream(model, Learner("sgd:0.1", model, 0), stream)
    losses, correct = [], []
    for batch in stream:
        logits = reference(**{k: v for k, v in batch.items() if k != "labels"}).logits
        loss = cross_entropy(logits, batch["labels"], reduction="none")
        losses += loss.tolist()
        correct += (logits.argmax(-1) == batch["labels"]).int().tolist()
        reference.zero_grad()
        loss.mean().backward()
        with torch.no_grad():
            for p in reference.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
    assert trace.loss == pytest.approx(losses, abs=1e-5) and trace.correct == correct


def test_a_stream_that_diverges_gets_no_credit_for_the_rest():
    model = adapted()
    trace = run_stream(model, Learner("sgd:1e30", model, 0), make_stream())
    assert trace.diverged and 4 <= len(trace.loss) < 20
    found = summarise(trace, {"all": (0, 20), "start": (0, 4)})
    assert found["all"]["log_loss"] == math.inf and found["start"]["log_loss"] == pytest.approx(
        sum(trace.loss[:4]) / 4
    )
    assert found["all"]["accuracy"] == sum(trace.correct) / 20


def test_options_of_loko_reach_it():
    optimizer = Learner("loko:memory=diagonal,max_decrease=0.25,max_kl=None", adapted(), 3).optimizer
    group = optimizer.param_groups[0]
    assert (group["memory"], group["max_decrease"], group["max_kl"], group["seed"]) == ("diagonal", 0.25, None, 3)


def test_methods_have_one_spelling():
    assert canonical("adamw:1e-3") == canonical("adamw:0.001") == "adamw:0.001"
    assert canonical("loko:") == "loko" and canonical("loko:seed=1") == "loko:seed=1"


@pytest.mark.parametrize(
    "method, message",
    [("lion:1e-3", "none of"), ("adamw:fast", "positive learning rate"), ("sgd:-1", "positive"), ("adamw", "positive"),
     ("loko:rank", "not OPTION=VALUE"), ("loko:=3", "not OPTION=VALUE")],
)  # fmt: skip
def test_raises_when_a_method_cannot_be_read(method, message):
    with pytest.raises(ValueError, match=message):
        canonical(method)


# -- adding up -------------------------------------------------------------------------------------------------------


def test_averages_are_trailing():
    assert smooth([1, 2, 3, 4, 5], 2) == [1, 1.5, 2.5, 3.5, 4.5]
    assert smooth([1.0, 3.0], 10) == [1, 2]


def test_the_interval_is_students():
    found = interval([1.0, 2.0, 4.0])
    assert found["mean"] == pytest.approx(7 / 3)
    assert found["ci95"] == pytest.approx(4.303 * np.std([1, 2, 4], ddof=1) / math.sqrt(3), rel=1e-3)
    assert interval([2.0]) == {"mean": 2.0, "ci95": None}
    assert interval([1.0, math.inf]) == {"mean": None, "ci95": None}
    assert len(T975) == 30 and sorted(T975, reverse=True) == list(T975)


def test_students_t_covers():
    generator = random.Random(0)
    draws = [[generator.gauss(0, 1) for _ in range(3)] for _ in range(4000)]
    covered = sum(abs(found["mean"]) < found["ci95"] for found in map(interval, draws)) / len(draws)
    assert covered == pytest.approx(0.95, abs=0.015)


def make_traces(losses):
    return [Trace(correct=[int(x < 1) for x in row], loss=row, step_seconds=[0.5]) for row in losses]


def test_differences_are_paired_by_seed(tmp_path):
    first = make_traces([[1.0, 3.0, 1.0, 1.0], [0.2, 0.2, 0.2, 0.2], [0.5, 0.5, 0.5, 0.5]])
    second = make_traces([[x - 0.1 for x in t.loss] for t in first])
    result = summarise_runs({"adamw:0.001": first, "loko": second}, {"all": (0, 4), "last half": (2, 4)})
    assert result["adamw:0.001"]["all"]["log_loss"]["mean"] == pytest.approx((1.5 + 0.2 + 0.5) / 3)
    assert result["adamw:0.001"]["last half"]["log_loss"]["mean"] == pytest.approx((1 + 0.2 + 0.5) / 3)
    assert result["loko"]["minus_first"]["mean"] == pytest.approx(-0.1)
    assert result["loko"]["minus_first"]["ci95"] == pytest.approx(0, abs=1e-9)  # though the seeds differ a lot
    assert "minus_first" not in result["adamw:0.001"]
    text = online_markdown(result)
    assert "| loko | " in text and "| -0.100 ± 0.000 | 500 |" in text and "Student" in text
    assert online_table(result, "x").row_count == 2
    plot_online({"16": {"adamw:0.001": first, "loko": second}}, tmp_path / "curves.png", window=2, shift_at=2)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_diverged_method_is_marked(tmp_path):
    good, bad = make_traces([[1.0] * 4]), [Trace([1], [0.1], [0.1], {}, True)]
    result = summarise_runs({"adamw:0.1": good, "sgd:9": bad}, {"all": (0, 4)})
    assert result["sgd:9"]["diverged"] == 1
    assert "sgd:9 (diverged: 1) | infinite" in online_markdown(result)
    plot_online({"4": {"adamw:0.1": good, "sgd:9": bad}}, tmp_path / "curves.png")


# -- the whole recipe ------------------------------------------------------------------------------------------------


@pytest.fixture
def text_arguments(tmp_path, tokenizer):
    tiny_bert(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [f"{'good' if k % 2 else 'bad'} film {k}\t{k % 2}" for k in range(40)]
    (tmp_path / "rows.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    return [
        "--task", "sst2", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.tsv"), "--samples", "20",
        "--r", "2", "--methods", "adamw", "loko", "--rates", "1e-5", "1e-2", "--seeds", "0", "1", "--batch_sizes", "4",
        "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip


def test_text_is_tuned_evaluated_and_resumed(tmp_path, text_arguments, monkeypatch):
    summary = recipe.main(text_arguments)
    folder = tmp_path / "out" / "sst2"
    runs = {path.stem for path in (folder / "runs" / "b4").iterdir()}
    chosen = summary["tuning"]["4"]["adamw"]["chosen"]
    name = chosen.replace(":", "_")
    # Each rate on the tuning seed only; the chosen one and the filter on the others.
    assert runs == {"adamw_1e-05-s100", "adamw_0.01-s100", f"{name}-s0", f"{name}-s1", "loko-s0", "loko-s1"}
    tried = summary["tuning"]["4"]["adamw"]["log_loss"]
    stored = {m: json.loads((folder / "runs" / "b4" / f"{m.replace(':', '_')}-s100.json").read_text()) for m in tried}
    assert tried == pytest.approx({m: np.mean(run["trace"]["loss"]) for m, run in stored.items()}, abs=1e-6)
    assert tried[chosen] == min(tried.values()) and summary["tuning"]["4"]["adamw"]["edge"]
    # All methods of a seed begin with the same model and the same batch.
    starts = {
        m: json.loads((folder / "runs" / "b4" / f"{m}-s1.json").read_text())["trace"]["loss"] for m in (name, "loko")
    }
    assert starts[name][:4] == starts["loko"][:4] and starts[name][4:] != starts["loko"][4:]
    assert (
        "rows.tsv" in (folder / "report.md").read_text() and str(tmp_path) not in (folder / "summary.json").read_text()
    )
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert set(summary["results"]["4"]) == {chosen, "loko"}

    monkeypatch.setattr(recipe, "run_stream", lambda *_: pytest.fail("a run was repeated"))
    assert recipe.main(text_arguments) == summary
    with pytest.raises(ValueError, match="other settings"):
        recipe.main([*text_arguments, "--lora_alpha", "3"])


def test_a_batch_size_of_one_and_a_last_batch_that_is_smaller(text_arguments, tmp_path):
    summary = recipe.main([*text_arguments, "--methods", "adamw:1e-2", "--batch_sizes", "1", "8", "--seeds", "0"])
    traces = {
        b: json.loads((tmp_path / "out" / "sst2" / "runs" / b / "adamw_0.01-s0.json").read_text())["trace"]
        for b in ("b1", "b8")
    }
    assert [len(traces[b]["step_seconds"]) for b in ("b1", "b8")] == [20, 3]
    assert traces["b1"]["loss"][0] == pytest.approx(traces["b8"]["loss"][0], abs=1e-5)
    assert len(traces["b8"]["loss"]) == 20 and summary["tuning"] == {"1": {}, "8": {}}


def test_images_shift_in_mid_stream(tmp_path, monkeypatch):
    monkeypatch.setenv("KALMAN_PEFT_CACHE", str(tmp_path / "cache"))
    write_idx(tmp_path, counts=(10, 10))
    arguments = [
        "--task", "mnist", "--images", str(tmp_path), "--samples", "8", "--methods", "adamw:1e-2", "loko",
        "--pretrain_epochs", "1", "--seeds", "0", "--batch_sizes", "4", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    summary = recipe.main(arguments)
    for row in summary["results"]["4"].values():
        parts = [row[part]["log_loss"]["mean"] for part in ("before the shift", "after the shift")]
        assert row["all"]["log_loss"]["mean"] == pytest.approx(np.mean(parts))
    moved = recipe.make_stream(recipe.parse(arguments))
    upright = recipe.make_stream(recipe.parse([*arguments, "--angles", "0", "0", "--jitter", "0"]))
    shifted, plain = moved.samples(0), upright.samples(0)
    same = [
        torch.allclose(a["pixel_values"], b["pixel_values"], atol=1e-4) for a, b in zip(shifted, plain, strict=True)
    ]
    assert same == [True] * 4 + [False] * 4
    assert [int(a["labels"]) for a in shifted] == [int(b["labels"]) for b in plain]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "imdb"], "--task imdb"),
        (["--task", "mnist", "--model", "roberta-base"], "the model is 'vit'"),
        (["--task", "sst2", "--images", "x"], "--images is for image tasks"),
        (["--task", "mnist", "--data", "x"], "--data is for text tasks"),
        (["--seeds", "0", "1", "--tune_seeds", "1"], "tune on others"),
        (["--methods", "lion"], "none of"),
        (["--angles", "90", "45"], "lower one first"),
        (["--samples", "1"], "at least 2"),
    ],
)
def test_raises_when_options_do_not_fit(arguments, message, capsys):
    with pytest.raises(SystemExit):
        recipe.parse(arguments)
    assert message in capsys.readouterr().err


def test_raises_when_the_stream_is_longer_than_the_data(text_arguments):
    with pytest.raises(ValueError, match="--samples 50: there are 40 only"):
        recipe.main([*text_arguments, "--samples", "50"])


def test_a_stream_is_as_long_as_the_data_by_default(text_arguments):
    place = text_arguments.index("--samples")
    options = recipe.parse(text_arguments[:place] + text_arguments[place + 2 :])
    stream = recipe.make_stream(options)
    assert stream.length == len(stream.samples(0)) == 40 and stream.windows["last half"] == (20, 40)
