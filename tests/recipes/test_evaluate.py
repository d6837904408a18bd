import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from recipe_tools.encoding import IGNORE_INDEX, encode_pair, tokenize_supervised, tokenize_text
from recipe_tools.evaluate import choice_accuracy, kl_from_base, text_loss
from recipe_tools.scoring import evaluating, length_sorted_batches, score_rows


@pytest.fixture
def rows(tokenizer):
    texts = ["a short one", "a text of middling length, say", "b", "the longest of all these texts by a fair margin"]
    problems = [{"question": f"{text}?", "answer": text} for text in texts]
    return tokenize_supervised(Dataset.from_list(problems), tokenizer)


@pytest.fixture
def lora(model):
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", lora_dropout=0.5)
    return get_peft_model(model, config)


def by_hand(model, rows):
    """Return the per-token losses, one unpadded row and one token at a time."""
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        for position, label in enumerate(row["labels"]):
            if label != IGNORE_INDEX and position:
                losses.append(logits[position - 1].logsumexp(-1) - logits[position - 1, label])
    return torch.stack(losses)


def test_text_loss_equals_a_hand_computation(model, rows):
    losses = by_hand(model, rows)
    result = text_loss(model, rows)
    assert result["tokens"] == len(losses)
    assert result["loss"] == pytest.approx(losses.mean().item(), rel=1e-6)


@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
@pytest.mark.parametrize("side", ["left", "right"])
def test_text_loss_ignores_batching_and_padding_side(model, rows, tokenizer, monkeypatch, max_tokens, side):
    monkeypatch.setattr(tokenizer, "padding_side", side)
    assert text_loss(model, rows, max_tokens=max_tokens)["loss"] == pytest.approx(
        text_loss(model, rows)["loss"], rel=1e-6
    )


def test_rows_keep_their_order(model, rows):
    scores = score_rows(model, rows, max_tokens=100)
    for row, nll in zip(rows, scores.nll, strict=True):
        torch.testing.assert_close(nll, by_hand(model, [row]), rtol=1e-5, atol=1e-5)


def test_raises_without_labels(model, rows):
    masked = [dict(row, labels=[IGNORE_INDEX] * len(row["labels"])) for row in rows]
    with pytest.raises(ValueError, match="No token"):
        text_loss(model, masked)


def test_batches_hold_each_row_once_and_obey_the_bound():
    lengths = [5, 90, 3, 40, 41, 200, 7]
    batches = length_sorted_batches(lengths, 100)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 100 for batch in batches)


def test_training_flags_are_restored(model):
    model.train()
    model.model.layers[0].eval()
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
        raise RuntimeError("stop")
    assert model.training and not model.model.layers[0].training and torch.is_grad_enabled()


def test_choice_accuracy_ranks_by_likelihood(model, tokenizer):
    contexts, continuations = ["Ab c", "Ab c"], [" de", " something longer"]
    sums = [
        -by_hand(model, [encode_pair(tokenizer, *pair)]).sum() for pair in zip(contexts, continuations, strict=True)
    ]
    best = int(torch.stack(sums).argmax())
    means = [value / len(text) for value, text in zip(sums, continuations, strict=True)]
    best_norm = int(torch.stack(means).argmax())
    items = [{"contexts": contexts, "continuations": continuations, "label": label} for label in (0, 1)]
    result = choice_accuracy(model, tokenizer, items, max_tokens=30)
    assert result["correct"] == [best == 0, best == 1]
    assert result["correct_norm"] == [best_norm == 0, best_norm == 1]
    assert result["accuracy"] == 0.5
    expected = -torch.stack(sums).log_softmax(0).mean().item()
    assert result["loss"] == pytest.approx(expected, rel=1e-5)


def test_kl_is_zero_at_first_and_right_afterwards(lora, tokenizer):
    rows = tokenize_text(Dataset.from_list([{"text": "some words here"}, {"text": "others"}]), tokenizer)
    start = kl_from_base(lora, rows)
    assert start["kl"] == pytest.approx(0, abs=1e-9)
    assert start["loss"] == start["base_loss"]
    torch.manual_seed(1)
    for name, p in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    divergence, tokens = 0.0, 0
    lora.eval()
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            tuned = lora(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            with lora.disable_adapter():
                base = lora(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        divergence += (base.exp() * (base - tuned)).sum().item()
        tokens += len(tuned)
    lora.train()
    after = kl_from_base(lora, rows, max_tokens=20)
    assert after["tokens"] == tokens
    assert after["kl"] == pytest.approx(divergence / tokens, rel=1e-5)
    assert after["kl"] > 1e-3
    assert after["loss"] == pytest.approx(text_loss(lora, rows)["loss"], rel=1e-5)
    assert after["base_loss"] == pytest.approx(start["base_loss"], rel=1e-5)
    assert lora.training


def test_kl_to_a_separate_base_is_the_same(model, rows):
    base = copy.deepcopy(model)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.nn.init.normal_(lora.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    base.train()
    expected = kl_from_base(lora, rows)
    assert kl_from_base(lora, rows, base=base) == pytest.approx(expected) and expected["kl"] > 1e-3
    assert base.training
    # Where the weights below the adapter have changed, only a separate base tells.
    with torch.no_grad():
        lora.base_model.model.lm_head.weight.mul_(1.5)
    assert kl_from_base(lora, rows, base=base)["base_loss"] == pytest.approx(expected["base_loss"])
    assert kl_from_base(lora, rows)["base_loss"] != pytest.approx(expected["base_loss"], rel=1e-3)
    assert kl_from_base(base, rows, base=base)["kl"] == pytest.approx(0, abs=1e-9)


def test_kl_needs_an_adapter_or_a_base(model, rows):
    with pytest.raises(TypeError, match=r"PeftModel.*or give `base`"):
        kl_from_base(model, rows)
