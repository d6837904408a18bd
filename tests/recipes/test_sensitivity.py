"""The sensitivity benchmark tries what it says, on sentences, numbers and a language model, each run once."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification


pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes" / "benchmarks"))

import sensitivity as benchmark
import sensitivity_runs
from sensitivity import LANGUAGE_KNOBS, TEXT_KNOBS, Knob

from kalman_peft.loko.options import LoKODefaults, LoKOOptions
from kalman_peft.observations import CategoricalObservation
from recipe_tools.prequential import parse_options


# -- what is tried ---------------------------------------------------------------------------------------------------


def test_values_are_factors_of_the_middle():
    assert Knob(0.5).tried() == pytest.approx([0.05, 0.15, 0.5, 1.5, 5])
    assert Knob(16, "int").tried() == [2, 5, 16, 48, 160] and Knob(1, "int").tried() == [1, 3, 10]
    assert Knob(0.99, "complement").tried() == pytest.approx([0.999, 0.997, 0.99, 0.97, 0.9])
    assert Knob(4, values=(1, 2, 4)).tried() == [1, 2, 4]


def test_a_default_is_run_once():
    assert Knob(0.5).run("max_decrease", 0.5) == Knob(0.5).run("max_decrease") == "loko"
    assert Knob(0.5, off=True).run("damping", 0.5) == "loko:damping=0.5"
    knob = Knob(1.0, base="mode=paper")
    assert knob.run("initial_bound", 1.0) == "loko:mode=paper"
    assert knob.run("initial_bound", 3.0) == "loko:mode=paper,initial_bound=3.0"
    assert Knob(0.99).run("noise_decay:regression", 0.9) == "loko:noise_decay=0.9"


@pytest.mark.parametrize("knobs, tokens", [(TEXT_KNOBS, False), (LANGUAGE_KNOBS, True)])
def test_every_run_is_one_that_the_optimizer_takes(knobs, tokens):
    observation = CategoricalObservation(shift=tokens)
    for name, knob in knobs.items():
        option = benchmark.option_of(name)
        defaults = LoKOOptions(**parse_options(knob.run(name).partition(":")[2])).resolve(observation)
        if not knob.off:  # the middle is what the others are compared with
            assert defaults[option] == pytest.approx(knob.middle), name
        for value in knob.tried():
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # an option without effect
                options = LoKOOptions(**parse_options(knob.run(name, value).partition(":")[2])).resolve(observation)
            assert options[option] == pytest.approx(value), name


def test_all_numbers_are_covered():
    texts = {benchmark.option_of(name) for name in TEXT_KNOBS}
    numbers = {n for n, v in LoKODefaults.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    assert numbers - texts - LANGUAGE_KNOBS.keys() == {"seed", "max_skipped"}


# -- sentences and numbers -------------------------------------------------------------------------------------------


@pytest.fixture
def text_arguments(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [f"{'good' if k % 2 else 'bad'} film {k}\t{k % 2}" for k in range(40)]
    (tmp_path / "rows.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    return [
        "--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.tsv"), "--samples", "24", "--batch_size",
        "8", "--seeds", "0", "1", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip


def test_knobs_on_a_stream_are_measured_once(tmp_path, text_arguments, monkeypatch):
    knobs = ["max_decrease", "block_limit", "noise_decay:regression"]
    record = benchmark.main([*text_arguments, "--knobs", *knobs])
    found = record["knobs"]["max_decrease"]
    assert found["values"] == pytest.approx([0.05, 0.15, 0.5, 1.5, 5]) and len(set(found["losses"])) > 2
    assert found["losses"][2] == found["default"]
    runs = tmp_path / "out" / "runs" / "b8"
    assert len(list(runs.iterdir())) == 2 * 5  # by seed; not twice at the default
    traces = [json.loads((runs / f"loko-s{seed}.json").read_text())["trace"]["loss"] for seed in (0, 1)]
    assert found["default"] == pytest.approx(sum(map(sum, traces)) / 48, abs=1e-6)
    assert record["knobs"]["block_limit"]["conditions"] == "memory=block, r=2"
    assert (tmp_path / "out" / "r2" / "runs").is_dir()
    numbers = record["knobs"]["noise_decay:regression"]
    assert numbers["unit"] == "squared error" and 0 < numbers["default"] < 1 and len(set(numbers["losses"])) > 1
    assert (tmp_path / "out" / "sensitivity.png").read_bytes().startswith(b"\x89PNG")

    def never(*_):
        raise AssertionError("run again")

    monkeypatch.setattr(sensitivity_runs.Runner, "model", never)
    assert benchmark.main([*text_arguments, "--knobs", "max_decrease"]) == record  # the others stay
    with pytest.raises(AssertionError, match="run again"):
        benchmark.main([*text_arguments, "--knobs", "rank"])


# -- a language model ------------------------------------------------------------------------------------------------


@pytest.fixture
def language_arguments(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question": f"{k} and 1?", "answer": f"{k + 1}" + "." * 40 * (k % 5 == 0)} for k in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        "--task", "lm", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"), "--samples", "12",
        "--batch_size", "4", "--max_length", "40", "--eval_items", "4", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip


def test_a_language_model_learns_from_short_problems(tmp_path, language_arguments, monkeypatch):
    record = benchmark.main([*language_arguments, "--knobs", "max_decrease", "correlation"])
    found = record["knobs"]["max_decrease"]
    assert found["default"] < record["start"] and len(set(found["losses"])) > 1
    assert len(set(record["knobs"]["correlation"]["losses"])) == 3
    files = {path.name for path in (tmp_path / "out" / "lm").iterdir()}
    assert {"start-s0.json", "loko-s0.json", "loko_correlation=0.5-s0.json"} <= files and len(files) == 2 + 4 + 2
    assert str(tmp_path) not in (tmp_path / "out" / "lm" / "loko-s0.json").read_text()
    assert (tmp_path / "out" / "sensitivity_lm.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sensitivity_runs.LanguageRuns, "_train", lambda *_: pytest.fail("run again"))
    assert benchmark.main([*language_arguments, "--knobs", "max_decrease"]) == record
    with pytest.raises(ValueError, match=r"other settings.*--output_dir"):
        benchmark.main([*language_arguments, "--knobs", "max_decrease", "--eval_items", "3"])


def test_long_problems_are_left_out(tmp_path, language_arguments):
    o, _ = benchmark.parse(language_arguments)
    runs = benchmark.Bench(o).runs("rank", LANGUAGE_KNOBS["rank"])
    assert isinstance(runs, sensitivity_runs.LanguageRuns)
    assert max(map(len, runs.train["input_ids"])) <= 40 and len(runs.train) < 54 and len(runs.heldout) == 4
    batches = runs._batches(0)
    assert [len(b["input_ids"]) for b in batches] == [4, 4, 4]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, runs._batches(0), strict=True))
    assert not torch.equal(batches[0]["labels"], runs._batches(1)[0]["labels"])
    with pytest.raises(ValueError, match="at most 40 tokens; raise --max_length"):
        benchmark.main([*language_arguments, "--samples", "60"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "imdb"], "--task imdb"),
        (["--task", "lm", "--knobs", "max_columns"], "known for lm"),
        (["--knobs", "correlation"], r"unknown ['correlation']"),
        (["--seeds"], "--seeds"),
        (["--samples", "0"], "--samples"),
    ],
)
def test_raises_when_options_do_not_fit(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(arguments)
    assert message in capsys.readouterr().err
