"""The recipe of predicted uncertainty: every method on the same rows, of text, images and lettered answers."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification


pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes" / "benchmarks"))

import prediction_cost
import uncertainty as recipe
from datasets import Dataset
from rich.console import Console

from kalman_peft.uncertainty_metrics import uncertainty_metrics
from recipe_tools import uncertainty_tasks
from recipe_tools.uncertainty_tasks import Sizes, choice_problem

from .test_classification_data import idx


LINES = [
    "MAP", "MAP, temperature", "streamlined", "streamlined, scale", "linearised, diagonal, variances",
    "linearised, diagonal", "linearised, full", "linearised, full, scale", "Monte Carlo, 2 draws", "ensemble of 2",
]  # fmt: skip
SMALL = [
    "--train", "16", "--validation", "8", "--test", "12", "--outside_rows", "9", "--epochs", "1", "--batch_size", "8",
    "--r", "2", "--draws", "2", "--members", "2",
]  # fmt: skip


def tiny_bert(vocab):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


@pytest.fixture
def text_arguments(tmp_path, tokenizer):
    tiny_bert(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [f"{'good' if k % 2 else 'bad'} film {k}\t{k % 2}" for k in range(40)]
    (tmp_path / "rows.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    pairs = [f"a thing {k}\tthing {k}\t{k % 2}" for k in range(10)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["sentence1\tsentence2\tlabel", *pairs]))
    return [
        "--task", "sst2", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.tsv"),
        "--outside", "mrpc", "--outside_data", str(tmp_path / "pairs.tsv"), "--output_dir", str(tmp_path / "out"),
        *SMALL,
    ]  # fmt: skip


@pytest.mark.parametrize("belief", ["kronecker", "loko"])
def test_text_is_judged_by_every_method_and_resumed(tmp_path, text_arguments, belief, monkeypatch):
    arguments = [*text_arguments, "--seeds", "0", "1", "--belief", belief]
    summary = recipe.main(arguments)
    folder = tmp_path / "out" / "sst2"
    assert list(summary["results"]) == LINES
    for name, line in summary["results"].items():
        for metric in (*recipe.METRICS, "seconds"):
            assert line[metric]["mean"] is not None or metric == "auroc_errors", (name, metric)
        assert 0 <= line["accuracy"]["mean"] <= 1 and 0 <= line["auroc_ood"]["mrpc"]["mean"] <= 1
    assert summary["results"]["linearised, full"]["passes"] == {"forward": 1, "backward": 2}
    run = json.loads((folder / "runs" / "s0.json").read_text())["results"]
    assert (run["MAP"]["fit"] is None) and run["streamlined, scale"]["fit"]["scale"] > 0
    assert run["MAP, temperature"]["accuracy"] == run["MAP"]["accuracy"]
    chosen = [p.get("chosen") for p in summary["prior_precisions"]]
    assert (
        chosen == [None, None] if belief == "loko" else all(c in (1.0, 10.0, 100.0, 1000.0, 10000.0) for c in chosen)
    )
    report = (folder / "report.md").read_text()
    assert "rows.tsv" in report and str(tmp_path) not in report + (folder / "summary.json").read_text()
    monkeypatch.setattr(recipe, "load_or_train", lambda *_: pytest.fail("a run was repeated"))
    assert recipe.main(arguments) == summary
    with pytest.raises(ValueError, match="other settings"):
        recipe.main([*arguments, "--draws", "3"])


def test_a_saved_adapter_with_its_belief_is_judged(tmp_path, text_arguments):
    o = recipe.parse([*text_arguments, "--members", "1"])
    problem = recipe.make_problem(o, 0)
    how = recipe.Training(2, 4, 1, 8, 1e-2, "diagonal")
    model, belief, _ = recipe.load_or_train(problem, how, 1, 0, None)
    model.save_pretrained(tmp_path / "adapter")
    belief.save_pretrained(tmp_path / "adapter")
    summary = recipe.main([*text_arguments, "--members", "1", "--adapter", str(tmp_path / "adapter")])
    assert list(summary["results"]) == LINES[:-1]
    test = problem.batches(problem.parts["test"], 12)[0]
    with torch.no_grad():
        expected = uncertainty_metrics(model(**test).logits.softmax(-1), test["labels"])
    assert summary["results"]["MAP"]["nll"]["mean"] == pytest.approx(expected["nll"], rel=1e-4)


def test_images_are_judged_under_a_shift_and_against_others(tmp_path, monkeypatch):
    monkeypatch.setenv("KALMAN_PEFT_CACHE", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(0)
    for name in ("mnist", "fashion"):
        (tmp_path / name).mkdir()
        for stem, n in (("train", 16), ("t10k", 40)):
            pixels = torch.randint(0, 256, (n, 8, 8), generator=generator, dtype=torch.uint8).numpy()
            (tmp_path / name / f"{stem}-images-idx3-ubyte").write_bytes(idx(pixels))
            labels = (torch.arange(n) % 10).to(torch.uint8).numpy()
            (tmp_path / name / f"{stem}-labels-idx1-ubyte").write_bytes(idx(labels))
    arguments = [
        "--task", "mnist", "--images", str(tmp_path / "mnist"), "--pretrain_epochs", "1", "--prior_precisions", "100",
        "--output_dir", str(tmp_path / "out"), *SMALL,
    ]  # fmt: skip
    other = ["--outside", "fashion", "--outside_images", str(tmp_path / "fashion")]
    summary = recipe.main([*arguments, *other])
    line = summary["results"]["streamlined"]
    assert list(line["auroc_ood"]) == ["fashion"] and list(line["shifted"]) == ["turned by 60 to 90 degrees"]
    assert line["shifted"]["turned by 60 to 90 degrees"]["nll"]["mean"] > 0
    headings, rows = recipe.cells(summary["results"])
    assert "AUROC fashion" in headings and all(len(row) == len(headings) for row in rows)
    o = recipe.parse(arguments)  # without others: the task's own negatives
    assert list(recipe.make_problem(o, 0).outside) == ["negatives"]


def test_lettered_answers_are_judged_at_the_last_token(monkeypatch, tokenizer, model):
    rows = [
        {"contexts": [f"Question: {k}?\nAnswer:"] * 4, "continuations": [" w", " x", " y", " z"], "label": k % 4}
        for k in range(30)
    ]
    rows += [{"contexts": ["Question: few?\nAnswer:"] * 3, "continuations": [" u", " v", " w"], "label": 1}]
    monkeypatch.setattr(uncertainty_tasks, "load_choices", lambda name: Dataset.from_list(rows))
    monkeypatch.setattr(uncertainty_tasks, "load_base", lambda name, dtype: model)
    letters = {f" {letter}": tokenizer(letter)["input_ids"] for letter in "ABCD"}

    class Spaced:  # the toy tokenizer has a token per character
        pad_token_id = tokenizer.pad_token_id

        def __call__(self, text, **options):
            return {"input_ids": letters[text]} if text in letters else tokenizer(text)

    monkeypatch.setattr(uncertainty_tasks, "load_tokenizer", lambda name: Spaced())
    problem = choice_problem("arc_easy", "tiny", "hellaswag", Sizes(10, 8, 8, 8), 60, 0)
    (batch,) = problem.batches(problem.parts["test"], 8)
    assert [row[-1].item() for row in batch["labels"]] == [letters[f" {'ABCD'[c]}"][0] for c in batch["choice"]]
    assert not batch["attention_mask"][:, -1].any() and (batch["labels"][:, :-1] == -100).all()
    text = tokenizer.decode(problem.parts["test"][0]["ids"])
    assert text.endswith("\nA. w\nB. x\nC. y\nD. z\nAnswer:")
    how = recipe.Training(2, 4, 1, 4, 1e-2, "ekfac")
    model, belief, members = recipe.load_or_train(problem, how, 2, 0, None)
    judge = recipe.Judge(problem, model, belief, members, 4, 0)
    assert judge.choose_prior([100.0]) == {"chosen": 100.0, "nll": {}, "edge": False}
    cache = {}
    for row in recipe.table_rows(2, 2):
        found = judge.judge(row, cache)
        assert found["nll"] > 0 and 0 <= found["auroc_ood"]["hellaswag"] <= 1
    predicted = cache["map", "{}", False]["test"][0]
    logits = model(input_ids=batch["input_ids"][:, :-1], attention_mask=batch["attention_mask"][:, :-1]).logits
    entries = problem.select["entries"]
    assert torch.allclose(predicted.logits, logits[:, -1, entries].detach(), atol=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--task", "imdb"], ["--outside", "sst2"], ["--task", "mnist", "--model", "minilm"],
        ["--task", "mnist", "--data", "x.tsv"], ["--images", "x"], ["--belief", "dense"], ["--draws", "1"],
        ["--prior_precisions", "0"], ["--seeds", "1", "1"], ["--test", "0"], ["--adapter", "missing"],
        ["--task", "digits", "--outside_images", "x"],
    ],
)  # fmt: skip
def test_exits_when_options_do_not_fit(arguments):
    with pytest.raises(SystemExit):
        recipe.parse(arguments)


def test_the_smoke_configuration_is_read():
    o = recipe.parse(["--config", str(Path(recipe.__file__).with_name("uncertainty_smoke.yaml"))])
    assert o.task == "digits" and o.prior_precisions == [10.0, 1000.0] and o.model == "vit"


# -- cost ------------------------------------------------------------------------------------------------------------


def test_the_cost_of_predictions_is_measured_and_shown(monkeypatch, tmp_path, model):
    tiny_bert(130).save_pretrained(tmp_path / "bert")
    o = prediction_cost.PredictionOptions(model=str(tmp_path / "bert"), batch=2, tokens=5, rounds=1, draws=2, r=2)
    result = prediction_cost.benchmark(o)
    assert result["results"][prediction_cost.MAP]["ratio"] == 1.0
    assert all(line["milliseconds"] > 0 for line in result["results"].values()) and len(result["results"]) == 7
    for target in result["targets"].values():
        assert isinstance(target["met"], bool)
    console = Console(width=200, record=True)
    prediction_cost.show(result, console)
    text = console.export_text()
    assert "Monte Carlo, 2 draws stacked" in text and "peak memory" in text
    assert "aten::" in prediction_cost.profile(o)
    for structure in ("diagonal", "low_rank"):
        other = prediction_cost.PredictionOptions(model="vit", batch=1, rounds=1, draws=2, r=2, structure=structure)
        assert len(prediction_cost.benchmark(other)["results"]) == 7
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
    monkeypatch.setattr(prediction_cost, "make_model", lambda o: adapted)
    causal = prediction_cost.PredictionOptions(model="smollm2", batch=1, tokens=5, rounds=1, draws=2, r=2)
    assert len(prediction_cost.benchmark(causal)["results"]) == 7


@pytest.mark.parametrize("name, value", [("batch", 0), ("draws", 1), ("structure", "dense"), ("rounds", 0)])
def test_raises_when_nothing_would_be_measured(name, value):
    with pytest.raises(ValueError, match=name):
        prediction_cost.PredictionOptions(**{name: value})
