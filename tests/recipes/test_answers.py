import pytest
import torch
from datasets import Dataset

from recipe_tools.answers import answer_accuracy, final_number, final_text, teacher_forced_answer_accuracy
from recipe_tools.encoding import tokenize_supervised
from recipe_tools.evaluate import text_loss


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3*4=12\n#### 12", "12"),
        ("#### $1,250.00", "1250"),
        ("#### -7", "-7"),
        ("#### -$3.50", "-3.5"),
        ("He has 12 apples, that is 1,234.", "1234"),
        ("the rest is 12-3", "3"),
        ("it falls to -3 degrees", "-3"),
        ("costs $.75 each", "0.75"),
        ("100%", "100"),
        ("#### 5 #### 6\nand 7", "5"),
        ("#### 1000000", "1000000"),
        ("9\nQuestion: 1+1?\nAnswer: #### 2", "9"),
        ("-0.0", "0"),
        ("nothing", None),
        ("", None),
        ("7 apples\n#### none", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_final_text():
    assert final_text(" a, b \nmore") == "a, b"
    assert final_text("steps #### left\n") == "left"
    assert final_text("\nQuestion: next") is None


PROBLEMS = Dataset.from_list([
    {"question": "1?", "answer": "one\n#### 1"},
    {"question": "how many are twelve and thirteen?", "answer": "25\n#### 25"},
    {"question": "what is nine?", "answer": "#### 9"},
])  # fmt: skip


def test_batched_generation_equals_unbatched(model, tokenizer):
    model.train()
    batched = answer_accuracy(model, tokenizer, PROBLEMS, max_new_tokens=12, max_tokens=10_000)
    alone = answer_accuracy(model, tokenizer, PROBLEMS, max_new_tokens=12, max_tokens=1)
    assert [row["completion"] for row in batched["per_item"]] == [row["completion"] for row in alone["per_item"]]
    assert any(row["completion"] for row in batched["per_item"])
    assert [row["answer"] for row in batched["per_item"]] == ["1", "25", "9"]
    assert tokenizer.padding_side == "right" and model.training


def test_generated_answers_are_judged(model, tokenizer, monkeypatch):
    solutions = {"1?": " one\n#### 1", "how many are twelve and thirteen?": " #### 26", "what is nine?": " no idea"}

    def generate(input_ids, attention_mask, generation_config):
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            question = tokenizer.decode(ids[mask.bool()]).split("Question: ")[1].split("\n")[0]
            rows.append(torch.cat([ids, torch.tensor(tokenizer(solutions[question].ljust(20))["input_ids"])]))
        return torch.stack(rows)

    monkeypatch.setattr(model, "generate", generate)
    result = answer_accuracy(model, tokenizer, PROBLEMS)
    assert result["correct"] == [True, False, False]
    assert (result["accuracy"], result["answered"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_forced_answers(model, tokenizer):
    result = teacher_forced_answer_accuracy(model, tokenizer, PROBLEMS, max_tokens=120)
    # The loss is that of training, from the same pass.
    expected = text_loss(model, tokenize_supervised(PROBLEMS, tokenizer))
    assert (result["loss"], result["tokens"]) == (pytest.approx(expected["loss"], rel=1e-6), expected["tokens"])
    hits, losses = [], []
    for row in PROBLEMS:
        prefix, answer = f"Question: {row['question']}\nAnswer: {row['answer']}".rsplit(" ", 1)
        ids = torch.tensor(tokenizer(f"{prefix} {answer}")["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        tail = slice(-len(answer) - 1, None)
        hits.append(bool((logits.argmax(-1) == ids[1:])[tail].all()))
        losses.append(torch.nn.functional.cross_entropy(logits[tail], ids[1:][tail], reduction="none"))
    assert result["forced_correct"] == hits
    assert result["answer_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
