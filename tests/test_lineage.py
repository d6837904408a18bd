"""Fingerprints of data, and what a belief says it comes from."""

import subprocess
import sys
from collections import UserDict

import numpy as np
import pytest
import torch
from conftest import make_batch, make_lora_llama
from datasets import Dataset
from torch.utils.data import IterableDataset, Subset
from training import dataset, make_tokenizer, rows, trainer

from kalman_peft import Belief, data_fingerprint
from kalman_peft.lineage import LINEAGE, base_fingerprint, describe, fit_lineage, join_lineages, lineage_entry


ROWS = [{"input_ids": [1, 2, 3], "text": "ab", "w": [0.5, 1.0]}, {"input_ids": [4], "text": "c", "w": []}]


@pytest.fixture
def tokenizer():
    return make_tokenizer()


class Stream(IterableDataset):
    def __iter__(self):
        yield from ROWS


def test_fingerprint_is_the_same_in_every_run():
    code = (
        "from datasets import Dataset; from kalman_peft import data_fingerprint as f; "
        f"rows = {ROWS!r}; print(f(rows), f(Dataset.from_list(rows)), f(Dataset.from_list(rows).select(range(1))))"
    )
    here = Dataset.from_list(ROWS)
    expected = [data_fingerprint(ROWS), data_fingerprint(here), data_fingerprint(here.select(range(1)))]
    # Strings hash differently from run to run.
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == expected
    assert len(set(expected)) == 3
    assert expected[1] == f"datasets:{here._fingerprint}"


def test_fingerprint_depends_on_values_not_on_containers():
    first = data_fingerprint(ROWS)
    as_tensors = [{k: torch.tensor(v) if k != "text" else v for k, v in row.items()} for row in ROWS]
    as_arrays = [UserDict({k: np.array(v) if k != "text" else v for k, v in reversed(row.items())}) for row in ROWS]
    assert {data_fingerprint(x) for x in (as_tensors, as_arrays, tuple(ROWS), Subset(ROWS, [0, 1]))} == {first}
    assert data_fingerprint([{"a": torch.ones(2, dtype=torch.bfloat16)}]) == data_fingerprint([{"a": [1.0, 1.0]}])
    assert data_fingerprint(Stream()) == data_fingerprint(Stream()) != first  # its size is not known


@pytest.mark.parametrize(
    "other",
    [
        ROWS[:1],
        ROWS[::-1],
        [*ROWS, ROWS[0]],
        [{**ROWS[0], "text": "abc"}, ROWS[1]],
        [{**ROWS[0], "input_ids": [1, 2, 4]}, ROWS[1]],
        [{**ROWS[0], "input_ids": [[1, 2, 3]]}, ROWS[1]],
        [{**ROWS[0], "input_ids": [1.0, 2.0, 3.0]}, ROWS[1]],
        [{**ROWS[0], "input_ids": [[1], [2, 3]]}, ROWS[1]],
        [{**ROWS[0], "new": None}, ROWS[1]],
    ],
)
def test_fingerprint_tells_other_data(other):
    assert data_fingerprint(other) != data_fingerprint(ROWS)


def test_fingerprint_looks_at_all_rows_or_evenly_spaced_ones():
    long = rows(70)
    for changed in (0, 35, 69):
        other = [*long[:changed], *rows(1, seed=5), *long[changed + 1 :]]
        assert data_fingerprint(long) != data_fingerprint(other)
        # Of 35 rows every second one is looked at, the first among them.
        assert (data_fingerprint(long, 35) != data_fingerprint(other, 35)) == (changed % 2 == 0)
    assert data_fingerprint(long, 35) != data_fingerprint(long[:69], 35)


def test_rows_may_be_pairs_of_tensors_or_other_objects():
    pairs = [(torch.eye(3), 1), (torch.zeros(3, 3), 2)]
    assert data_fingerprint(pairs) == data_fingerprint([list(p) for p in pairs])
    assert data_fingerprint(pairs) != data_fingerprint(pairs[::-1])
    assert data_fingerprint([{"o": object()}]) == data_fingerprint([{"o": object()}])


def test_entry_counts_what_a_fit_saw():
    model = make_lora_llama(torch.float32)
    data = {"code": [make_batch()], "chat": [make_batch(seed=4), make_batch(seed=5)]}
    belief = Belief.fit(model, data, weights={"code": 1, "chat": 1}, progress_bar=False)
    code, chat = fit_lineage(belief.info, data)
    assert (code["name"], chat["name"]) == ("code", "chat")
    assert (code["num_labels"], code["num_sequences"], chat["num_sequences"]) == (9, 3, 6)
    state = belief.check(model)
    assert code["base_fingerprint"] == base_fingerprint(state) == describe(state)["base_fingerprint"]
    assert code["data"] != chat["data"]


def test_lineages_join_in_order_and_without_repeats():
    one, two, three = ({"name": name, "data": name} for name in "abc")
    joined = join_lineages({LINEAGE: [one, two]}, {"adapter": {}}, [two, three])
    assert joined == [one, two, three]
    joined[0]["name"] = "changed"
    assert one["name"] == "a"
    assert join_lineages([one, one]) == [one]
    assert join_lineages() == []


def test_trainer_writes_the_lineage_of_its_source(tmp_path, tokenizer):
    source = dataset(12, seed=9)
    run = trainer(tmp_path, tokenizer, source=source, laplace_refit_steps=2)
    run.train()
    run.save_model()
    run.create_model_card()
    fit = source.select(range(8))
    labels = sum(label != -100 for row in fit for label in row["labels"][1:])
    adapter = run.belief.info["adapter"]
    entry = lineage_entry("source", fit, adapter, num_labels=labels, num_sequences=8)
    assert run.belief.info["curvature"]["step"] == 2  # refitted on the same data: one entry
    assert run.belief.info[LINEAGE] == [entry]
    assert Belief.from_pretrained(tmp_path).info[LINEAGE] == [entry]
    assert f"- source (`{entry['data']}`), 8 sequences, {labels} labels\n" in (tmp_path / "README.md").read_text()


def test_refit_of_a_given_belief_adds_to_its_lineage(tmp_path, tokenizer):
    first = trainer(tmp_path / "first", tokenizer, source=dataset(12, seed=9), max_steps=1)
    first.train()
    second = trainer(
        tmp_path / "second", tokenizer, model=first.model, source={"more": dataset(12, seed=8)}, belief=first.belief,
        laplace_refit_steps=1, max_steps=2,
    )  # fmt: skip
    second.train()
    assert [entry["name"] for entry in second.belief.info[LINEAGE]] == ["source", "more"]
    assert [entry["name"] for entry in first.belief.info[LINEAGE]] == ["source"]


def test_own_name_of_a_dataset_and_self_written_ones(tmp_path, tokenizer):
    source = dataset(12, seed=9)
    source.info.dataset_name = "gsm8k"
    assert lineage_entry("source", source, {}, num_labels=None, num_sequences=None)["name"] == "gsm8k"
    assert lineage_entry("maths", source, {}, num_labels=None, num_sequences=None)["name"] == "maths"
    run = trainer(tmp_path, tokenizer, source="self", max_steps=1, source_samples=4, source_self_length=6)
    run.train()
    (entry,) = run.belief.info[LINEAGE]
    assert (entry["name"], entry["num_sequences"], entry["num_labels"]) == ("self", 4, 20)
    assert entry["data"].startswith("rows:")


def test_filter_hands_the_lineage_of_its_prior_on(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, source=dataset(12, seed=9), optimizer="loko", max_steps=2)
    run.train()
    assert run._kalman.belief(run.model).info[LINEAGE] == run.belief.info[LINEAGE] != []
    plain = trainer(tmp_path / "plain", tokenizer, optimizer="loko", max_steps=2)
    plain.train()
    assert LINEAGE not in plain._kalman.belief(plain.model).info
