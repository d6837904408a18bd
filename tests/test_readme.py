"""The Python blocks of the README run, on a tiny model and data in place of the Hub's.

A block that cannot run offline has `<!-- not run: why -->` above it.
"""

import re
from pathlib import Path

import learning
import pytest
import sft
import torch
from datasets import Dataset
from predictive import diagonal_belief, make_inputs, make_model
from training import dataset
from transformers import DataCollatorForSeq2Seq, DecisionTransformerConfig, DecisionTransformerModel

import kalman_peft
from kalman_peft import AdapterState, Belief, ContinualLearner


README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>.+?) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
BLOCKS = list(BLOCK.finditer(README))
# What is made smaller: steps, and lengths beyond those of the tiny model. TRL asks for bf16, which needs a GPU or the flag.
SHORTER = {
    "max_steps=200": "max_steps=2, use_cpu=True",
    "max_length=1024": "max_length=24",
    "max_length=384": "max_length=24",
}


def heading(block):
    return re.findall(r"^#+ (.+)$", README[: block.start()], re.MULTILINE)[-1]


RUN = [block for block in BLOCKS if block["why"] is None]


def hub(name, *args, **kwargs):
    """In place of `load_dataset`: rows with the columns that the named dataset has."""
    if name == "openai/gsm8k":
        pairs = zip(sft.words(16, 1), sft.words(16, 2), strict=True)
        return Dataset.from_list([{"question": q, "answer": a} for q, a in pairs])
    if name == "Salesforce/wikitext":
        return Dataset.from_list([{"text": " ".join(sft.words(120, seed))} for seed in range(200)])
    assert name in ("trl-lib/Capybara", "HuggingFaceTB/smoltalk"), name
    return sft.chats(40, seed=len(name))


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Working folder, a model under the Hub's names, and what a reader is taken to have."""
    sft.model().unload().save_pretrained(tmp_path / "tiny")
    sft.tokenizer().save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", hub)
    pushed = []
    monkeypatch.setattr(ContinualLearner, "push_to_hub", lambda self, repo_id, **options: pushed.append(repo_id))
    collator = DataCollatorForSeq2Seq(learning.TOKENIZER, label_pad_token_id=-100)
    rows = dataset(12)
    model = learning.model(random_b=True)
    names = {name: getattr(kalman_peft, name) for name in kalman_peft.__all__}
    return names | {
        "torch": torch, "model": model, "tokenizer": learning.TOKENIZER, "collator": collator, "pushed": pushed,
        "loader": torch.utils.data.DataLoader(rows, 4, collate_fn=collator), "batch": collator(list(dataset(3))),
        "tasks": {name: learning.TASKS[name] for name in "ab"}, "held_out": learning.EVALS,
    }  # fmt: skip


def run(block, namespace):
    code = re.sub(r'"HuggingFaceTB/SmolLM2-135M(-Instruct)?"', '"tiny"', block["code"])
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    exec(compile(code, f"README.md, {heading(block)}", "exec"), namespace)
    return namespace


def block_of(title):
    return next(block for block in RUN if heading(block) == title)


def test_in_your_own_script(prepared):
    found = run(block_of("In your own script"), prepared)
    assert found["trainer"].state.global_step == 2
    Belief.from_pretrained("out").check(found["trainer"].model)


def test_with_trl(prepared):
    found = run(block_of("With TRL"), prepared)
    assert found["trainer"].state.global_step == 2
    Belief.from_pretrained("out").check(found["trainer"].model)


def test_loko(prepared):
    before = AdapterState(prepared["model"]).flatten().clone()
    found = run(block_of("LoKO: an optimizer without a learning rate"), prepared)
    assert found["optimizer"].param_groups[0]["steps"] == 3
    assert not torch.equal(before, AdapterState(prepared["model"]).flatten())


def test_task_after_task(prepared):
    found = run(block_of("Task after task"), prepared)
    assert [task["name"] for task in found["learner"].tasks] == ["a", "b"]
    assert Path("out/smoothed/a/adapter_model.safetensors").is_file() and Path("matrix.png").is_file()
    assert found["pushed"] == ["me/tasks"]


def test_predicting_with_uncertainty(prepared):
    model = prepared["model"]
    belief = kalman_peft.initial_belief(model, structure="diagonal", prior_precision=1e4)
    found = run(block_of("Predicting with uncertainty"), prepared | {"belief": belief})
    assert found["out"].logits_variance.shape == found["out"].logits.shape
    torch.testing.assert_close(found["probabilities"].sum(-1), torch.ones(found["out"].logits.shape[:-1]))


def test_predicting_by_every_method(prepared):
    """A classifier and a language model, each with a belief of its own."""
    model, llama = make_model("bert"), make_model("llama")
    batch, tokens = make_inputs("bert"), make_inputs("llama")
    beliefs = [diagonal_belief(m, 1e-3) for m in (model, llama)]
    AdapterState(model).load({key: t + 0.1 for key, t in beliefs[0].mean.items()})
    model.save_pretrained("path/to/second")
    model.load_adapter("path/to/second", "first")
    validation = kalman_peft.predictive.posterior_predictive(model, beliefs[0], batch, "linearized")
    block = [block for block in RUN if heading(block) == "Predicting with uncertainty"][1]
    code = block["code"].replace("[330, 389]", "[3, 8]")
    found = {
        "model": model, "belief": beliefs[0], "batch": batch, "validation": validation, "labels": torch.arange(len(batch["input_ids"])) % 3,
        "llama": llama, "its_belief": beliefs[1], "tokens": tokens,
    }  # fmt: skip
    exec(compile(code, "README.md", "exec"), found)
    rows = len(batch["input_ids"])
    assert found["found"].covariance.shape == (rows, 3, 3) and found["fitted"].scale > 0


def test_kalman_bayesian_networks(prepared):
    torch.manual_seed(0)
    config = DecisionTransformerConfig(
        state_dim=3,
        act_dim=2,
        hidden_size=16,
        n_layer=1,
        n_head=2,
        n_inner=16,
        max_ep_len=32,
        activation_function="relu",
    )
    inputs = {
        "states": torch.randn(2, 4, 3), "actions": torch.randn(2, 4, 2), "returns_to_go": torch.randn(2, 4, 1),
        "timesteps": torch.arange(4).expand(2, 4),
    }  # fmt: skip
    classifier, batch = make_model("bert"), make_inputs("bert")
    found = run(
        block_of("Kalman Bayesian networks"),
        prepared
        | {"decision_transformer": DecisionTransformerModel(config), "inputs": inputs, "actions": torch.randn(2, 2)}
        | {"peft_model": classifier, "ids": batch["input_ids"], "mask": batch["attention_mask"]}
        | {"labels": torch.arange(len(batch["input_ids"])) % 3},
    )
    assert found["mean"].shape == found["variance"].shape == (2, 2) and bool((found["variance"] > 0).all())


def test_every_block_is_run_or_says_why_not():
    tested = {
        "In your own script", "With TRL", "LoKO: an optimizer without a learning rate", "Task after task",
        "Predicting with uncertainty", "Kalman Bayesian networks",
    }  # fmt: skip
    assert len(BLOCKS) == README.count("```python")
    twice = ["Predicting with uncertainty"]
    assert sorted(heading(block) for block in RUN) == sorted([*tested, *twice])
    assert [block["why"] for block in BLOCKS if block["why"]] == ["needs axolotl"]
