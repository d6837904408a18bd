"""Source data: several, weighted, streaming, written by the model itself; and the warm start on them."""

import json
import math

import pytest
import torch
from conftest import make_batch, make_llama, make_lora_bert, make_lora_llama
from datasets import Dataset, DatasetDict
from torch.utils.data import IterableDataset
from training import dataset, make_tokenizer, rows, trainer, weights

from kalman_peft import AdapterState, Belief, sample_source, warm_start
from kalman_peft.losses import mean_loss, mean_loss_gradient
from kalman_peft.self_source import rows_from_tensors, tensors_from_rows
from kalman_peft.sources import first_rows, parse_weights, split_sources


class Stream(IterableDataset):
    def __init__(self, data):
        self.data, self.read = data, 0

    def __iter__(self):
        for row in self.data:
            self.read += 1
            yield row


def ids(data):
    return [tuple(data[i]["input_ids"]) for i in range(len(data))]


# -- splitting ---------------------------------------------------------------------------------------------------


def test_one_dataset_is_split_without_overlap():
    data = dataset(12)
    split = split_sources(data, num_samples=5, num_heldout=4)
    assert split.weights == {"source": 1.0}
    assert ids(split.fit["source"]) == ids(data)[:5]
    assert ids(split.heldout["source"]) == ids(data)[-4:]
    assert split_sources(data, num_heldout=0).heldout == {}
    assert split_sources(data, fit=False, num_heldout=12).fit == {}


@pytest.mark.parametrize("kind", ["torch", "datasets", "generator"])
def test_a_stream_is_read_once_and_no_further_than_needed(kind):
    data = rows(12)
    stream = Stream(data)
    given = {
        "torch": stream, "datasets": Dataset.from_list(data).to_iterable_dataset(), "generator": iter(stream),
    }[kind]  # fmt: skip
    split = split_sources(given, num_samples=5, num_heldout=4)
    assert ids(split.heldout["source"]) == ids(data)[:4]
    assert ids(split.fit["source"]) == ids(data)[4:9]
    if kind != "datasets":
        assert stream.read == 9
    assert ids(first_rows(Stream(data), 3)) == ids(first_rows(dataset(12), 3)) == ids(data)[:3]


def test_several_sources_are_named_and_weighted():
    a, b = dataset(12), dataset(9, seed=1)
    split = split_sources({"code": a, "chat": b}, weights={"chat": 1, "code": 3}, num_samples=4, num_heldout=2)
    assert split.weights == {"code": 0.75, "chat": 0.25}
    assert [len(x) for x in split.fit.values()] == [4, 4]
    assert ids(split.heldout["chat"]) == ids(b)[-2:]
    assert split_sources([a, b], weights=[1, 1], num_heldout=1).weights == {"0": 0.5, "1": 0.5}
    assert split_sources(DatasetDict({"x": a, "y": b}), num_heldout=1).weights == {"x": 0.5, "y": 0.5}
    assert split_sources([rows(20), rows(20)]).weights == {"0": 0.5, "1": 0.5}
    assert split_sources(rows(20)).weights == {"source": 1.0}


def test_weights_are_read_from_json():
    assert parse_weights('{"a": 2, "b": 1}') == {"a": 2, "b": 1}
    assert parse_weights("[2, 1.5]") == [2, 1.5]
    assert parse_weights(None) is None


@pytest.mark.parametrize(
    "given,match",
    [
        ("{a: 1", "is no JSON"),
        ("3", "must be a mapping or a list"),
        ({"a": -1.0, "b": 2.0}, "numbers >= 0 with a positive sum"),
        ([0.0, 0.0], "numbers >= 0 with a positive sum"),
        ([float("nan"), 1.0], "numbers >= 0 with a positive sum"),
        ({"a": "much"}, "numbers >= 0 with a positive sum"),
    ],
)
def test_raises_when_weights_are_no_weights(given, match):
    with pytest.raises(ValueError, match=f"source_weights.*{match}"):
        parse_weights(given)


@pytest.mark.parametrize(
    "given,weights,match",
    [
        ({"a": dataset(8), "b": dataset(8)}, {"a": 1.0}, "source_weights names"),
        ([dataset(8), dataset(8)], [1.0], "source_weights has 1 entries for 2 sources"),
        ({"a": dataset(8), "b": dataset(3)}, None, "`source_dataset` 'b' has 3 sequences"),
        (Stream(rows(4)), None, "none is left for the curvature"),
        ({}, None, "at least one dataset"),
        ({1: dataset(8)}, None, "named by strings"),
        (7, None, "is no dataset, got int"),
    ],
)
def test_raises_when_sources_do_not_fit(given, weights, match):
    with pytest.raises(ValueError, match=match):
        split_sources(given, weights=weights, num_heldout=4)


# -- written by the model itself -----------------------------------------------------------------------------------


def test_sequences_are_those_of_the_base_model_and_reproducible():
    base, model = make_llama(torch.float32), make_lora_llama(torch.float32)
    for part in model.modules():
        part.training = True
    model.get_base_model().lm_head.training = False  # modes come back one by one
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    settings = model.get_base_model().generation_config
    settings.repetition_penalty = 5.0  # would bias the draws
    torch.manual_seed(3)
    state = torch.get_rng_state()
    options = {"num_sequences": 7, "length": 9, "batch_size": 3, "progress_bar": False}
    first = sample_source(model, make_tokenizer(), **options, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.get_base_model().generation_config is settings
    torch.manual_seed(4)
    assert sample_source(model, make_tokenizer(), **options, seed=5) == first
    assert sample_source(base, make_tokenizer(), **options, seed=5) == first  # the adapter has no say
    assert sample_source(model, make_tokenizer(), **options | {"batch_size": 7}, seed=5) == first
    assert sample_source(model, make_tokenizer(), **options, seed=6) != first
    assert len(first) == 7
    assert all(len(row["input_ids"]) == 9 and row["input_ids"][0] == 1 for row in first)
    assert all(row["labels"] == [-100, *row["input_ids"][1:]] for row in first)
    assert len({tuple(row["input_ids"]) for row in first}) == 7
    assert rows_from_tensors(tensors_from_rows(first)) == first


def test_draws_follow_the_distribution_of_the_model():
    model = make_llama(torch.float64)
    n = 3000
    drawn = sample_source(model, make_tokenizer(), n, 3, batch_size=1000, progress_bar=False)
    with torch.no_grad():
        p = model(input_ids=torch.tensor([[1]])).logits[0, -1].softmax(-1)
        counts = torch.bincount(torch.tensor([row["input_ids"][1] for row in drawn]), minlength=17) / n
        assert ((counts - p).abs() < 4 * (p * (1 - p) / n).sqrt() + 1 / n).all()
        after = int(p.argmax())
        chosen = [row["input_ids"][2] for row in drawn if row["input_ids"][1] == after]
        q = model(input_ids=torch.tensor([[1, after]])).logits[0, -1].softmax(-1)
        counts = torch.bincount(torch.tensor(chosen), minlength=17) / len(chosen)
        assert ((counts - q).abs() < 4 * (q * (1 - q) / len(chosen)).sqrt() + 1 / len(chosen)).all()


def test_starts_from_prompts_or_from_random_tokens():
    model = make_lora_llama(torch.float32)
    drawn = sample_source(model, make_tokenizer(), 5, 8, prompts=["t3 t4 t5", "t6"], batch_size=2, progress_bar=False)
    assert [row["input_ids"][:1] for row in drawn] == [[3], [3], [6], [6], [3]]
    assert drawn[0]["labels"][:4] == [-100, -100, -100, drawn[0]["input_ids"][3]]
    assert rows_from_tensors(tensors_from_rows(drawn)) == drawn
    model.get_base_model().config.bos_token_id = None
    drawn = sample_source(model, None, 20, 4, progress_bar=False)
    assert len({row["input_ids"][0] for row in drawn}) > 5
    assert all(row["labels"][0] == -100 for row in drawn)


def test_adapters_are_enabled_again_after_an_exception(monkeypatch):
    model = make_lora_llama(torch.float32)
    batch = make_batch()
    before = model(input_ids=batch["input_ids"]).logits
    settings = model.get_base_model().generation_config

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.get_base_model(), "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample_source(model, make_tokenizer(), 2, 4, progress_bar=False)
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, before)
    assert model.get_base_model().generation_config is settings


@pytest.mark.parametrize(
    "options,match",
    [
        ({"num_sequences": 0}, "num_sequences and batch_size must be >= 1"),
        ({"length": 1}, "length >= 2"),
        ({"prompts": []}, "at least one text"),
        ({"prompts": ["t3 t4 t5 t6"], "length": 4}, "has 4 tokens, of a length of 4"),
        ({"prompts": ["t3"], "tokenizer": None}, "prompts need a `tokenizer`"),
    ],
)
def test_raises_when_nothing_can_be_written(options, match):
    with pytest.raises(ValueError, match=match):
        sample_source(make_llama(), **({"tokenizer": make_tokenizer(), "progress_bar": False} | options))


def test_raises_when_the_model_writes_no_sequences(tmp_path):
    with pytest.raises(ValueError, match="needs a causal language model that writes sequences, got Bert"):
        sample_source(make_lora_bert(), None)
    with pytest.raises(ValueError, match="source_dataset='self' needs a causal language model"):
        trainer(tmp_path, make_tokenizer(), model=make_lora_bert(torch.float32), source="self")


# -- losses and the warm start -------------------------------------------------------------------------------------


def test_gradient_of_the_mean_loss_equals_autograd():
    model = make_lora_llama()
    state = AdapterState(model)
    batches = [make_batch(), make_batch(lengths=(5, 7), seed=4)]
    loss, gradient = mean_loss_gradient(state, batches)
    total, count = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        total = total + torch.nn.functional.cross_entropy(logits.mT, labels, reduction="sum")
        count += int((labels != -100).sum())
    expected = torch.autograd.grad(total / count, list(state.parameters().values()))
    assert loss == pytest.approx((total / count).item(), rel=1e-6)
    for g, e in zip(gradient.values(), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-7)  # the library takes the softmax in float32
    assert all(p.grad is None for p in model.parameters())
    kept = {p: torch.ones_like(p) for p in state.parameters().values()}
    for p, grad in kept.items():
        p.grad = grad
        p.requires_grad_(False)
    again = mean_loss_gradient(state, batches)[1]
    assert all(torch.equal(again[key], g) for key, g in gradient.items())
    assert all(p.grad is grad and not p.requires_grad for p, grad in kept.items())
    assert mean_loss(model, batches) == pytest.approx(loss, rel=1e-6)


def test_warm_start_gives_every_factor_curvature_and_lowers_the_loss():
    model = make_lora_llama(torch.float32, random_b=False, lora_dropout=0.5)
    sources = {"a": [make_batch(), make_batch(seed=4)], "b": [make_batch(seed=5)]}
    model.train()
    rng = torch.get_rng_state()
    before = mean_loss(model, sources["b"])
    losses = warm_start(
        model, sources, steps=6, learning_rate=1e-2, weights={"a": 0.25, "b": 0.75}, progress_bar=False
    )
    assert torch.equal(torch.get_rng_state(), rng) and model.training
    assert len(losses) == 6 and mean_loss(model, sources["b"]) < before
    again = make_lora_llama(torch.float32, random_b=False, lora_dropout=0.5)
    warm_start(again, sources, steps=6, learning_rate=1e-2, weights={"a": 0.25, "b": 0.75}, progress_bar=False)
    assert torch.equal(AdapterState(model).flatten(), AdapterState(again).flatten())
    belief = Belief.fit(model, sources["a"], structure="diagonal", space="adapter", progress_bar=False)
    entries = belief.precision.entries
    assert all(f.any() for key, f in entries.items() if "lora_A" in key)


def test_warm_start_takes_the_steps_of_adamw():
    model = make_lora_llama(random_b=False)
    reference = make_lora_llama(random_b=False)
    batch = make_batch()
    warm_start(model, {"source": [batch]}, steps=3, learning_rate=1e-2, progress_bar=False)
    parameters = AdapterState(reference).parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    reference.eval()
    for _ in range(3):
        optimizer.zero_grad()
        reference(**batch).loss.backward()
        optimizer.step()
    # Adam's first step is the sign of the gradient: compare where that is not decided by rounding.
    torch.testing.assert_close(AdapterState(model).flatten(), AdapterState(reference).flatten(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "sources,options,match",
    [
        ({"a": [make_batch()]}, {"steps": 0}, "steps must be >= 1"),
        ({"a": [make_batch()]}, {"steps": 1, "learning_rate": 0.0}, "learning_rate positive"),
        ({"a": [make_batch()], "b": []}, {"steps": 1}, "no batches to warm up on in source 'b'"),
        ({"a": [{"input_ids": torch.ones(1, 3).long()}]}, {"steps": 1}, "no `labels`"),
        ({"a": [make_batch(prompt=6)]}, {"steps": 1}, "no labels that count"),
    ],
)
def test_raises_when_a_warm_start_is_not_possible(sources, options, match):
    with pytest.raises(ValueError, match=match):
        warm_start(make_lora_llama(torch.float32), sources, **options, progress_bar=False)


def test_raises_when_the_model_is_sharded(monkeypatch):
    monkeypatch.setattr("kalman_peft.losses.is_sharded", lambda p: True)
    with pytest.raises(ValueError, match="do not support sharded models"):
        warm_start(make_lora_llama(torch.float32), {"a": [make_batch()]}, steps=1, progress_bar=False)


# -- in the trainer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw_torch", "loko"])
def test_training_on_what_the_model_wrote_is_resumed_from_the_saved_sequences(tmp_path, optimizer):
    def fresh(folder):
        return trainer(
            folder, make_tokenizer(), source="self", optimizer=optimizer, source_samples=6, source_self_length=7,
            laplace_refit_steps=1,
        )  # fmt: skip

    whole = fresh(tmp_path / "whole")
    whole.train()
    saved = Belief.from_pretrained(tmp_path / "whole" / "checkpoint-2")
    assert saved.source["input_ids"].shape == (10, 7) and saved.source["input_ids"].dtype == torch.int32
    assert saved.info["source"] == {
        "kind": "self", "seed": 42, "temperature": 1.0, "length": 7, "prompts": None, "num_heldout": 4,
    }  # fmt: skip
    written = sample_source(make_llama(torch.float32, attn="sdpa"), make_tokenizer(), 10, 7, seed=42, batch_size=4)
    assert rows_from_tensors(saved.source) == written
    saved.check(whole.model)
    assert math.isfinite(whole._source_metrics()["source/rise"])
    whole.create_model_card()
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "written by the base model itself" in card and "fitted again every 1 steps" in card
    resumed = fresh(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(resumed))
    assert resumed._written == written


def test_a_stream_gives_the_belief_of_the_same_rows(tmp_path):
    data = rows(14, seed=9)
    streamed = trainer(tmp_path / "a", make_tokenizer(), source=Stream(data), source_samples=6, max_steps=1)
    listed = trainer(
        tmp_path / "b",
        make_tokenizer(),
        source=Dataset.from_list(data[4:10] + data[:4]),
        source_samples=6,
        max_steps=1,
    )
    for run in (streamed, listed):
        run.train()
    assert torch.equal(weights(streamed), weights(listed))
    assert streamed._source_metrics() == listed._source_metrics()


@pytest.mark.parametrize("optimizer", ["adamw_torch", "loko"])
def test_several_sources_in_training(tmp_path, optimizer):
    sources = {"code": dataset(12, seed=9), "chat": dataset(10, seed=8)}
    run = trainer(
        tmp_path, make_tokenizer(), source=sources, source_weights='{"code": 3, "chat": 1}', optimizer=optimizer,
        source_samples=5, laplace_warmup_steps=2, laplace_refit_steps=2,
    )  # fmt: skip
    run.train()
    record = run.belief.info["curvature"]["sources"]
    assert {name: entry["weight"] for name, entry in record.items()} == {"code": 0.75, "chat": 0.25}
    assert [entry["num_sequences"] for entry in record.values()] == [5, 5]
    final = run.state.log_history[-1]
    for what in ("loss", "rise"):
        mean = 0.75 * final[f"source/code/{what}"] + 0.25 * final[f"source/chat/{what}"]
        assert final[f"source/{what}"] == pytest.approx(mean)
    state = json.loads((tmp_path / "checkpoint-4" / "kalman_state.json").read_text())
    assert state["source_losses_start"].keys() == sources.keys()


@pytest.mark.parametrize(
    "source,options,match",
    [
        ("wikitext", {}, "must be a dataset or 'self'"),
        (None, {"source_weights": [1.0]}, "source_weights=.* needs source data"),
        (None, {"source_self_prompts": ["t3"]}, "source_self_prompts=.* needs source data"),
        (dataset(12), {"source_self_prompts": ["t3"]}, "source_self_prompts needs source_dataset='self'"),
        (dataset(12), {"source_weights": {"a": 1.0}}, "source_weights names"),
    ],
)
def test_raises_when_the_trainer_cannot_take_the_source(tmp_path, source, options, match):
    with pytest.raises(ValueError, match=match):
        trainer(tmp_path, make_tokenizer(), source=source, **options)
