"""ContinualLearner against the filter's functions by hand: predict, train, update, smooth, scores, streams, refusals."""

import json
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import make_llama, make_lora_bert, randomise_b
from datasets import Dataset
from learning import EVALS, NAMES, TASKS, TOKENIZER, config, contents, learner, model, ramps, stream
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from kalman_peft import (
    AdapterState,
    Belief,
    BeliefError,
    ContinualLearner,
    DriftCallback,
    Transition,
    predict,
    smooth,
    update,
)
from kalman_peft.continual import runs as module
from kalman_peft.continual.evaluation import score_matrix
from kalman_peft.metrics import continual_metrics


class Logged(TrainerCallback):
    """Keeps the log of every run, though each run has a copy of the callback."""

    entries: ClassVar[list] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append(dict(logs))

    def __deepcopy__(self, memo):
        return self


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learnt")
    Logged.entries = []
    run = learner(folder, eval_datasets=EVALS, curvature_samples=100, callbacks=[Logged()])
    for name, data in TASKS.items():
        run.learn(name, data)
    return run


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key].to(value)), key


# -- the filter ----------------------------------------------------------------------------------------------------


def test_belief_is_prediction_plus_all_labels_of_the_curvature(learnt):
    records, made = learnt.records(), model()
    before = Belief.from_pretrained(learnt.store.initial)
    for index, record in enumerate(records):
        predicted = predict(before, Transition(1e-3) if index else Transition())
        assert record.transition.process_noise == (1e-3 if index else 0)
        PeftModel.load_adapter(made, str(learnt.store.task(index)), f"t{index}")
        state = AdapterState(made, f"t{index}")
        same(record.belief.mean, state.snapshot())
        curvature = record.increment.scale(1 / record.info["num_labels"])
        expected = update(predicted, record.belief.mean, curvature, record.info["num_labels"])
        for key, entries in expected.precision.entries.items():
            torch.testing.assert_close(record.belief.precision.entries[key], entries, rtol=1e-5, atol=0)
        assert record.info["curvature"]["num_sequences"] == len(TASKS[record.name])
        assert record.info["num_labels"] == sum(
            sum(label != -100 for label in row["labels"]) for row in TASKS[record.name]
        )
        before = record.belief
    assert records[-1].belief.info["filtering"]["tasks"] == 3
    assert [entry["name"] for entry in records[-1].belief.info["lineage"]] == list(NAMES)
    assert len({entry["data"] for entry in records[-1].belief.info["lineage"]}) == 3


def test_what_a_transition_does_is_logged(learnt):
    entries = learnt.tasks
    assert entries[0]["figures"]["stability"] == 1
    assert all(0 < entry["figures"]["stability"] < 1 for entry in entries[1:])
    assert all(entry["figures"]["plasticity"] == pytest.approx(1e-3, rel=0.05) for entry in entries[1:])
    logged = [entry for entry in Logged.entries if "filter/stability" in entry]
    assert [entry["filter/stability"] for entry in logged] == [entry["figures"]["stability"] for entry in entries]
    strengths = [entry["laplace/strength"] for entry in logged]
    assert strengths == pytest.approx([1 / entry["num_labels"] for entry in entries])


def test_mode_minimises_mean_loss_and_the_belief_shared_over_the_labels(tmp_path):
    """A long run ends where the two gradients cancel, here computed without the Trainer."""
    run = learner(tmp_path, made=model(random_b=True), prior_precision=30.0, strength=2.0,
                  configured={"max_steps": 400, "lr_scheduler_type": "cosine", "per_device_train_batch_size": 12})  # fmt: skip
    run.learn("a", TASKS["a"])
    state, loss = AdapterState(run.model), 0.0
    for row in TASKS["a"]:
        logits = run.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        loss = loss + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    gradients = torch.autograd.grad(loss, list(state.parameters().values()))
    start = Belief.from_pretrained(run.store.initial).mean
    pulls = [2.0 * 30.0 * (p.detach() - start[key]) for key, p in state.parameters().items()]
    data, pull = (torch.cat([g.reshape(-1) for g in part]) for part in (gradients, pulls))
    assert data.norm() > 5
    assert (data + pull).norm() < 0.02 * data.norm()


def test_decay_starts_a_task_nearer_to_the_start(tmp_path, monkeypatch):
    run = learner(tmp_path, decay=0.5)
    run.learn("a", TASKS["a"])
    start, before = (Belief.from_pretrained(folder).mean for folder in (run.store.initial, run.store.task(0)))
    seen = {}

    def train(self, work, index, predicted, *args):
        seen.update(AdapterState(self.model).snapshot())
        raise KeyboardInterrupt

    monkeypatch.setattr(ContinualLearner, "_train", train)
    with pytest.raises(KeyboardInterrupt):
        run.learn("b", TASKS["b"])
    for key, value in seen.items():
        torch.testing.assert_close(value, (start[key] + before[key]) / 2)


@pytest.mark.parametrize(("structure", "rank"), [("low_rank", 3), ("ekfac", None), ("dense", None)])
def test_structures(tmp_path, structure, rank):
    run = learner(tmp_path, structure=structure, rank=rank)
    for name in ("a", "b"):
        run.learn(name, TASKS[name])
    first, second = run.records()
    assert first.belief.precision.structure == structure
    if rank:
        assert second.belief.precision.rank == rank
    smoothed = run.smooth()
    assert smoothed["a"].info["filtering"]["precision"] == "smoothed"
    assert smoothed["a"].precision.to_dense().trace() > first.belief.precision.to_dense().trace()


@pytest.mark.parametrize("memory", ["diagonal", "low_rank"])
def test_loko_carries_its_belief_and_adds_no_second_prior(tmp_path, memory):
    configured = {"optimizer": "loko", "loko_memory": memory, "loko_curvature_every": 1, "max_steps": 3}
    run = learner(tmp_path, configured=configured)
    for name in ("a", "b"):
        run.learn(name, TASKS[name])
    first, second = run.records()
    predicted = predict(first.belief, Transition(1e-3))
    gained = second.belief.precision.to_dense() - predicted.precision.to_dense()
    assert torch.linalg.eigvalsh(gained.double()).min() > -1e-3 * gained.norm()
    # Three steps of 4 sequences add what their labels tell, far from LoKO's own prior of thousands of labels.
    fresh = learner(tmp_path / "fresh", configured=configured, process_noise=0.0)
    fresh.learn("b", TASKS["b"])
    prior = fresh.records()[0].belief.precision.to_dense().trace()
    assert 0 < gained.trace() < 0.05 * prior
    assert second.increment is None and second.belief.info["filtering"]["tasks"] == 2
    run.smooth(covariance=memory == "diagonal")
    assert not any(m._forward_hooks for m in run.model.modules())


# -- files ---------------------------------------------------------------------------------------------------------


def test_smoothed_tasks_are_adapters_of_plain_peft(learnt):
    found = learnt.smooth()
    start = Belief.from_pretrained(learnt.store.initial).mean
    for (name, belief), expected in zip(found.items(), smooth(learnt.records(), start=start), strict=True):
        folder = learnt.store.smoothed(name)
        same(belief.mean, expected.mean)
        loaded = AdapterState(PeftModel.from_pretrained(make_llama(torch.float32, "sdpa"), folder))
        same(loaded.snapshot(), expected.mean)
        same(Belief.from_pretrained(folder).mean, expected.mean)
    filtered = load_file(learnt.store.task(2) / "adapter_model.safetensors")
    same(load_file(learnt.store.smoothed("c") / "adapter_model.safetensors"), filtered)
    moved = load_file(learnt.store.smoothed("a") / "adapter_model.safetensors")
    assert any(
        not torch.equal(t, load_file(learnt.store.task(0) / "adapter_model.safetensors")[k]) for k, t in moved.items()
    )


def test_what_is_done_is_not_done_again(learnt, monkeypatch):
    before = contents(learnt.store.folder)
    monkeypatch.setattr(module, "TaskTrainer", None)
    again = learner(learnt.store.folder, made=model(random_b=True), eval_datasets=EVALS, curvature_samples=100)
    assert [again.learn(name, data) for name, data in TASKS.items()] == learnt.tasks
    assert contents(learnt.store.folder) == before
    same(AdapterState(again.model).snapshot(), learnt.records()[-1].belief.mean)


def test_weights_outside_the_factors_go_with_their_task(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def rows(seed):
        return Dataset.from_list([{"input_ids": torch.randint(3, 17, (6,), generator=generator).tolist(),
                                   "attention_mask": [1] * 6, "labels": i % 3} for i in range(12)])  # fmt: skip

    made = make_lora_bert(torch.float32)
    with pytest.warns(UserWarning, match="trained without its protection"):
        run = learner(tmp_path, made=made, data_collator=None,
                      compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())})  # fmt: skip
    tasks = {"a": rows(0), "b": rows(1)}
    for name, data in tasks.items():
        run.learn(name, data, eval_dataset=data)
    heads = []
    for index, name in enumerate(tasks):
        heads.append(
            {
                k: t
                for k, t in load_file(run.store.task(index) / "adapter_model.safetensors").items()
                if "classifier" in k
            }
        )
        run.smooth()
        smoothed = load_file(run.store.smoothed(name) / "adapter_model.safetensors")
        same(heads[-1], {k: t for k, t in smoothed.items() if "classifier" in k})
    assert heads[0] and not any(torch.equal(t, heads[1][k]) for k, t in heads[0].items())
    matrix, names = run.scores()
    assert names == ["a", "b"] and matrix[1, 0] == run.tasks[0]["scores"]["a"]["eval_accuracy"]
    assert np.isnan(matrix[:2, 1]).all() and np.isfinite(matrix[:, 0]).all() and np.isfinite(matrix[2]).all()
    assert run.metrics().keys() == continual_metrics(matrix).keys()


def test_goes_on_from_a_copy_as_it_would_have(learnt, tmp_path):
    first = learner(tmp_path / "first", eval_datasets=EVALS, curvature_samples=100)
    for name in NAMES[:2]:
        first.learn(name, TASKS[name])
    options = {k: learnt.trainer_options[k] for k in ("processing_class", "data_collator")}
    second = ContinualLearner.from_pretrained(
        first.store.folder, make_llama(torch.float32, "sdpa"), config(tmp_path / "second"), process_noise=1e-3,
        eval_datasets=EVALS, curvature_samples=100, **options,
    )  # fmt: skip
    second.learn("c", TASKS["c"])
    assert contents(second.store.folder) == contents(learnt.store.folder)
    other = config(tmp_path / "third", learning_rate=5e-3)
    third = ContinualLearner.from_pretrained(first.store.folder, model(), other, **options)
    assert third.learn("c", TASKS["c"])["index"] == 2 and third.structure == "diagonal"
    with pytest.raises(ValueError, match="structure='dense', but the learner was begun with 'diagonal'"):
        ContinualLearner.from_pretrained(first.store.folder, model(), config(tmp_path / "4"), structure="dense")
    with pytest.raises(FileNotFoundError, match="was it made by a ContinualLearner"):
        ContinualLearner.from_pretrained(tmp_path, model(), config(tmp_path / "5"))


# -- scores --------------------------------------------------------------------------------------------------------


def test_scores_are_of_every_task_at_every_moment(learnt):
    matrix, names = learnt.scores()
    assert matrix.shape == (4, 3) and names == list(NAMES) and np.isfinite(matrix).all()
    assert learnt.metrics() == continual_metrics(matrix, higher_is_better=False)
    figure = learnt.plot(learnt.store.folder.parent / "matrix.png")
    assert figure.axes[1].get_ylabel() == "loss" and figure.axes[0].images[0].get_cmap().name == "Blues_r"
    made = model()
    for row, folder in enumerate([learnt.store.initial, *(learnt.store.task(i) for i in range(3))]):
        PeftModel.load_adapter(made, str(folder), f"t{row}")
        made.set_adapter(f"t{row}")
        made.eval()
        total = count = 0
        for item in EVALS["b"]:
            labels = torch.tensor(item["labels"][1:])
            with torch.no_grad():
                logits = made(input_ids=torch.tensor([item["input_ids"]])).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
        assert matrix[row, 1] == pytest.approx(total / count, rel=0.05)  # the Trainer averages over batches


# -- streams -------------------------------------------------------------------------------------------------------


def test_a_shift_in_a_stream_ends_a_task(tmp_path):
    data = stream(ramps(240, 1, 0), ramps(160, 5, 1))
    made = model(r=4, target_modules="all-linear")
    configured = {"optimizer": "loko", "loko_memory": "diagonal", "loko_curvature_every": 1, "loko_num_columns": 4,
                  "max_steps": 7, "logging_steps": 50}  # fmt: skip
    run = learner(tmp_path, made=made, configured=configured)
    found = run.learn_stream("s", data, DriftCallback(2.0, action="stop", window=4))
    (first, second) = (entry["rows"] for entry in found)
    assert first[0] == 0 and first[1] == second[0] and second[1] == 400
    assert 240 < first[1] <= 240 + 4 * 10  # at most ten steps of four after the shift
    assert [entry["name"] for entry in found] == ["s-0", "s-1"]
    assert run.records()[1].belief.info["lineage"][1]["num_sequences"] == second[1] - second[0]
    assert run.learn_stream("s", data, DriftCallback(2.0, action="stop", window=4)) == found
    with pytest.raises(ValueError, match="Stream 's' was begun with other options of detect"):
        run.learn_stream("s", data, DriftCallback(3.0, action="stop", window=4))
    with pytest.raises(ValueError, match="Stream 's' was learnt from other data"):
        run.learn_stream("s", TASKS["a"])


# -- what is refused -----------------------------------------------------------------------------------------------


REFUSED = [
    ({"strength": -1}, {}, "strength must be >= 0"),
    ({"curvature_samples": 0}, {}, "curvature_samples must be >= 1"),
    ({"rank": 2}, {}, "goes with structure='low_rank'"),
    ({"process_noise": -1.0}, {}, "process_noise must be >= 0"),
    ({"decay": 2.0}, {}, r"decay must be in \[0, 1\]"),
    ({"eval_datasets": {"x/y": []}}, {}, "'x/y'"),
    ({"belief": None}, {}, "belief= is no option of a ContinualLearner"),
    ({"eval_dataset": None}, {}, "use eval_datasets="),
    ({"optimizers": (None, None)}, {}, "carries its state from task to task"),
    ({}, {"laplace_strength": 1.0}, "laplace_strength=1.0: the learner sets it"),
    ({}, {"laplace_structure": "diagonal"}, "laplace_structure='diagonal': the learner sets it"),
    ({}, {"push_to_hub": True}, r"use learner.push_to_hub\(repo_id\)"),
    ({"strength": 2.0}, {"optimizer": "loko"}, "strength=2.0 is not supported with optimizer='loko'"),
    ({"prior_precision": 2.0}, {"optimizer": "loko"}, "prior_precision= is not used"),
    ({"structure": "diagonal"}, {"optimizer": "loko"}, "with loko_memory='kronecker' the filter's is 'ekfac'"),
    ({}, {"optimizer": "loko", "loko_memory": "block"}, "cannot carry a belief"),
]


@pytest.mark.parametrize(("options", "configured", "message"), REFUSED)
def test_raises_when_an_option_does_not_fit(tmp_path, options, configured, message):
    with pytest.raises(ValueError, match=message):
        learner(tmp_path, configured=configured, **options)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "a\\b", "a ", 3, "x" * 101, "a\n"])
def test_raises_when_a_name_is_no_folder(tmp_path, name):
    with pytest.raises(ValueError, match="A task's name becomes a folder's"):
        learner(tmp_path).learn(name, TASKS["a"])


def test_raises_when_data_do_not_fit(learnt, tmp_path):
    with pytest.raises(ValueError, match="Task 'a' was learnt from other data"):
        learnt.learn("a", TASKS["b"])
    run = learner(tmp_path)
    with pytest.raises(ValueError, match="Task 'x' has no data"):
        run.learn("x", Dataset.from_list([]))
    with pytest.raises(ValueError, match="streaming data cannot be resumed"):
        run.learn("x", TASKS["a"].to_iterable_dataset())
    with pytest.raises(ValueError, match="no label that counts"):
        run.learn("x", TASKS["a"].map(lambda row: {"labels": [-100] * len(row["labels"])}))
    with pytest.raises(ValueError, match="No task is learnt yet"):
        run.metrics()
    with pytest.raises(ValueError, match="No task is learnt yet"):
        run.push_to_hub("me/nothing")
    with pytest.raises(ValueError, match="learn_stream watches LoKO"):
        run.learn_stream("s", TASKS["a"])
    run.learn("x", TASKS["a"])
    with pytest.raises(ValueError, match="Nothing was measured"):
        run.metrics()
    with pytest.raises(ValueError, match=r"None of the tasks \['x'\] was measured; eval_datasets= has \['typo'\]"):
        score_matrix([{"typo": {"eval_loss": 1.0}}] * 2, ["x"], "eval_loss")


def test_raises_when_the_alarm_does_not_stop(tmp_path):
    run = learner(tmp_path, configured={"optimizer": "loko"})
    with pytest.raises(ValueError, match="a task's end needs action='stop'"):
        run.learn_stream("s", TASKS["a"], DriftCallback())


CHANGED = [
    ({"structure": "dense"}, {}, "structure='dense', was 'diagonal'"),
    ({"process_noise": 0.5}, {}, "process_noise=0.5, was 0.001"),
    ({"process_noise": {"layers.0": 0.5}}, {}, r"process_noise=\[\['layers.0', 0.5\]\]"),
    ({"strength": 3.0}, {}, "strength=3.0, was 1.0"),
    ({}, {"learning_rate": 0.5}, "learning_rate=0.5, was 0.01"),
    ({}, {"seed": 1}, "seed=1, was 42"),
    ({}, {"max_steps": 5}, "max_steps=5, was 4"),
]


@pytest.mark.parametrize(("options", "configured", "message"), CHANGED)
def test_raises_when_the_folder_was_begun_otherwise(learnt, options, configured, message):
    with pytest.raises(ValueError, match=message):
        learner(learnt.store.folder, configured=configured, **({"curvature_samples": 100} | options))


def test_raises_when_the_folder_is_of_another_adapter_or_model(learnt):
    with pytest.raises(BeliefError, match="use the rank `r` it was made with"):
        learner(learnt.store.folder, made=model(r=3), curvature_samples=100)
    with pytest.raises(BeliefError, match="over other layers"):
        learner(learnt.store.folder, made=model(target_modules=["q_proj"]), curvature_samples=100)
    other = model()
    other.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.data.add_(1.0)
    with pytest.raises(BeliefError, match="base weights differ"):
        learner(learnt.store.folder, made=other, curvature_samples=100)


def test_raises_when_the_index_is_damaged(tmp_path):
    (tmp_path / "continual.json").write_text("{")
    with pytest.raises(BeliefError, match=r"continual\.json is damaged"):
        learner(tmp_path)
    (tmp_path / "continual.json").write_text(json.dumps({"format": 7}))
    with pytest.raises(BeliefError, match="has format 7; this version reads 2"):
        learner(tmp_path)


def test_puts_an_adapter_on_a_plain_model(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    run = learner(tmp_path, made=make_llama(torch.float32, "sdpa"), peft_config=lora)
    entry = run.learn("a", TASKS["a"])
    assert entry["num_labels"] > 0 and math.isfinite(entry["figures"]["covariance_trace"])
    assert TOKENIZER is run.trainer_options["processing_class"]


def test_loko_with_weights_outside_the_factors_is_refused(tmp_path):
    made = make_lora_bert(torch.float32)
    randomise_b(made)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="outside the adapter's factors"):
        learner(tmp_path, made=made, configured={"optimizer": "loko"})


def test_options_of_the_curvature_are_not_called_useless(tmp_path, recwarn):
    run = learner(tmp_path, configured={"laplace_fisher": "empirical"})
    run.learn(NAMES[0], TASKS[NAMES[0]])
    assert not [w for w in recwarn if "laplace_fisher" in str(w.message)]
