"""What a ContinualLearner is given: refused by name before anything is written, compared at a restart, carried over."""

import json
import logging

import pytest
import torch
from conftest import make_llama
from learning import TASKS, config, learner, model
from transformers import TrainerCallback

from kalman_peft import BeliefError, ContinualLearner, DriftCallback, Transition


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LOKO = {"optimizer": "loko"}


def base():
    return make_llama(torch.float32, "sdpa")


def went_on(source, folder, made=None, configured=None, **options):
    """From a learner in `source`, with its tests' collator."""
    trainer = {k: v for k, v in learner(folder / "unused").trainer_options.items()}
    return ContinualLearner.from_pretrained(
        source, made or base(), config(folder / "on", **(configured or {})), **trainer, **options
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A learner of one task; process noise by weight, and a drift back to the start."""
    noise = {"v_proj": 0.25, KEY: torch.full((2, 8), 0.5)}
    run = learner(tmp_path_factory.mktemp("one"), process_noise=noise, decay=0.75)
    run.learn("a", TASKS["a"])
    return run


@pytest.fixture(scope="module")
def loko(tmp_path_factory):
    """Two tasks by LoKO with its default memory."""
    run = learner(tmp_path_factory.mktemp("loko"), configured=LOKO)
    for name in ("a", "b"):
        run.learn(name, TASKS[name])
    return run


# -- the wrong kind ------------------------------------------------------------------------------------------------

REFUSED = [
    ({}, {"save_only_model": True}, ValueError, "save_only_model=True: checkpoints without"),
    ({}, {"ignore_data_skip": True}, ValueError, "ignore_data_skip=True: a resumed run"),
    ({}, {"max_steps": -1, "num_train_epochs": 0}, ValueError, "num_train_epochs=0 would learn nothing"),
    ({"process_noise": Transition(1.0)}, {}, TypeError, "process_noise must be a number.*process_noise=t.process_noi"),
    ({"process_noise": "1e-6"}, {}, TypeError, "process_noise must be a number.*got str"),
    ({"process_noise": {"q_proj": "1"}}, {}, TypeError, "process_noise must be a number.*got str"),
    ({"process_noise": None}, {}, TypeError, "process_noise must be a number.*got NoneType"),
    ({"process_noise": torch.ones(3)}, {}, TypeError, "a tensor for no weight in particular"),
    ({"decay": "1"}, {}, TypeError, "decay must be a number"),
    ({"rank": 2.5, "structure": "low_rank"}, {}, TypeError, "rank must be a whole number, got 2.5"),
    ({"curvature_samples": 2.5}, {}, TypeError, "curvature_samples must be a whole number, got 2.5"),
    ({"eval_datasets": [TASKS["a"]]}, {}, TypeError, "eval_datasets must be a mapping.*got a list"),
    ({"eval_datasets": {"a": {"x": TASKS["a"]}}}, {}, TypeError, r"eval_datasets\['a'\] must be one dataset, got a dict"),
    ({"eval_datasets": {"a": None}}, {}, TypeError, r"eval_datasets\['a'\] must be one dataset, got None"),
    ({"eval_datasets": {"a": []}}, {}, ValueError, r"eval_datasets\['a'\] has no data"),
    ({"process_noise": {"typo": 1.0}}, {}, ValueError, r"process_noise: no adapter key matches \['typo'\]"),
    ({"process_noise": {KEY: torch.rand(2, 8)}, "structure": "ekfac"}, {}, ValueError, f"process_noise differs within {KEY}"),
    ({"process_noise": {"v_proj": 1.0}, "decay": 0.0}, {}, BeliefError, "decay=0 without process noise"),
    ({"process_noise": 1e300}, {}, ValueError, r"process_noise=1e\+300 with decay=1 at .* leaves float32"),
    ({"process_noise": 1.0, "decay": 1e-30}, {}, ValueError, "process_noise=1 with decay=1e-30 at .* leaves float32"),
    ({"process_noise": 1e-40, "decay": 0.0}, {}, ValueError, "process_noise=1e-40 with decay=0 at .* leaves float32"),
    ({"prior_precision": {"lora_A": 1.0}}, {}, ValueError, "prior_precision leaves 6 keys without a prior"),
    ({"structure": "block_tridiagonal"}, {}, BeliefError, "cannot start from structure 'block_tridiagonal'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "configured", "kind", "message"), REFUSED)
def test_is_refused_before_anything_is_written(tmp_path, options, configured, kind, message):
    with pytest.raises(kind, match=message):
        learner(tmp_path, configured=configured, **options)
    assert list(tmp_path.iterdir()) == []


DATA = [
    (None, TypeError, "Task 'x': train_dataset must be one dataset, got None"),
    ({"train": TASKS["a"]}, TypeError, "train_dataset must be one dataset, got a dict; take one of its parts"),
    ((row for row in TASKS["a"]), TypeError, "with a length and rows by number, got a generator; a list does"),
]


@pytest.mark.parametrize(("data", "kind", "message"), DATA)
def test_raises_when_data_are_no_dataset(one, data, kind, message):
    with pytest.raises(kind, match=message):
        one.learn("x", data)


def test_raises_when_nothing_is_left_to_count(tmp_path):
    def collator(rows):
        return {k: torch.tensor([r[k][:4] for r in rows]) for k in ("input_ids", "attention_mask")}

    with pytest.raises(ValueError, match=r"batches have no `labels`.*or a data_collator that makes them"):
        learner(tmp_path, data_collator=collator).learn("x", TASKS["a"])
    with pytest.raises(TypeError, match="eval_dataset must be one dataset, got a dict"):
        learner(tmp_path).learn("x", TASKS["a"], eval_dataset={"x": TASKS["a"]})
    dropping = learner(tmp_path / "1", configured={"dataloader_drop_last": True, "per_device_train_batch_size": 16})
    with pytest.raises(ValueError, match=r"dataloader_drop_last=True leaves nothing of 12 sequences.*a batch of 16"):
        dropping.learn("x", TASKS["a"])
    stream = learner(tmp_path / "2", configured={"dataloader_drop_last": True, **LOKO})
    with pytest.raises(ValueError, match="dataloader_drop_last=True would leave the end of a stream unread"):
        stream.learn_stream("s", TASKS["a"], DriftCallback(action="stop"))
    with pytest.raises(ValueError, match="No task is learnt yet; there is nothing to smooth"):
        stream.smooth()


# -- at a restart --------------------------------------------------------------------------------------------------

CHANGED = [
    ({"neftune_noise_alpha": 5.0}, {}, "neftune_noise_alpha=5.0, was None"),
    ({"dataloader_drop_last": True}, {}, "dataloader_drop_last=True, was False"),
    ({}, {"lora_dropout": 0.5}, "lora_dropout=0.5, was 0.0"),
    ({}, {"lora_alpha": 8}, "was made with scaling 1.5 at"),
    ({}, {"dtype": torch.bfloat16}, r"adapter_dtype=\['torch.bfloat16'\].*base_dtype=\['torch.bfloat16'\]"),
]


@pytest.mark.parametrize(("configured", "lora", "message"), CHANGED)
def test_what_changes_the_outcome_may_not_change(one, configured, lora, message):
    dtype = lora.get("dtype", torch.float32)
    made = model(**{k: v for k, v in lora.items() if k != "dtype"}).to(dtype)
    with pytest.raises(ValueError, match=message):
        learner(one.store.folder, made=made, configured=configured, process_noise=one.transition.process_noise, decay=0.75)  # fmt: skip


# -- going on from another -----------------------------------------------------------------------------------------


def test_the_motion_is_carried_over(one, tmp_path, caplog):
    log = logging.getLogger("kalman_peft.continual.options")
    log.addHandler(caplog.handler)
    try:
        run = went_on(one.store.folder, tmp_path)
        noise = run.transition.process_noise
        assert list(noise) == ["v_proj", KEY] and noise["v_proj"] == 0.25 and run.transition.decay == 0.75
        assert torch.equal(noise[KEY], torch.full((2, 8), 0.5)) and not caplog.text
        expected = learner(tmp_path / "expected", process_noise=one.transition.process_noise, decay=0.75)
        for name in ("a", "b"):
            expected.learn(name, TASKS[name])
        assert run.learn("b", TASKS["b"]) == expected.tasks[1]
        anew = went_on(run.store.folder, tmp_path / "2", process_noise=0.125)
        assert "'process_noise': 0.125, 'decay': 0.75" in caplog.text
        assert (anew.transition.process_noise, anew.transition.decay) == (0.125, 0.75)
        assert not (anew.store.folder / "noise.safetensors").exists()
        caplog.clear()
        assert went_on(run.store.folder, tmp_path / "2").transition.process_noise == 0.125 and not caplog.text
        (run.store.folder / "noise.safetensors").unlink()
        with pytest.raises(BeliefError, match=r"noise\.safetensors is damaged or missing"):
            went_on(run.store.folder, tmp_path / "3")
    finally:
        log.removeHandler(caplog.handler)


def test_optimizers_may_change_between_learners(loko, one, tmp_path):
    again = went_on(loko.store.folder, tmp_path / "1", configured=LOKO)
    assert again.learn("c", TASKS["c"])["index"] == 2 and again.structure == "ekfac"
    followed = went_on(loko.store.folder, tmp_path / "2")
    assert followed.learn("c", TASKS["c"])["increment"] and followed.structure == "ekfac"
    with pytest.raises(ValueError, match=r"carries a state of structure 'ekfac'.*set loko_memory='diagonal'"):
        went_on(one.store.folder, tmp_path / "3", configured=LOKO)
    diagonal = went_on(one.store.folder, tmp_path / "4", configured=LOKO | {"loko_memory": "diagonal"})
    assert diagonal.learn("b", TASKS["b"])["index"] == 1
    filtered = diagonal.records()[1].belief
    assert filtered.info["filtering"]["tasks"] == 2 and filtered.precision.structure == "diagonal"


def test_smoothing_lokos_tasks_says_how(loko):
    with pytest.raises(BeliefError, match=r"use learner\.smooth\(covariance=False\)"):
        loko.smooth()
    assert list(loko.smooth(covariance=False)) == ["a", "b"]


def test_raises_when_there_is_nothing_to_go_on_from(one, tmp_path):
    for missing in (tmp_path / "nothing", "./nothing"):
        with pytest.raises(FileNotFoundError, match="is no folder; give a learner's output_dir"):
            went_on(missing, tmp_path)
    learner(tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="was it made by a ContinualLearner that has learnt a task"):
        went_on(tmp_path / "new", tmp_path)


def test_the_dtype_of_the_adapter_is_carried_over(tmp_path):
    def half():
        return make_llama(torch.bfloat16, "sdpa")

    run = learner(tmp_path / "half", made=model().to(torch.bfloat16))
    run.learn("a", TASKS["a"])
    followed = went_on(run.store.folder, tmp_path, made=half())
    assert followed.store.options["adapter_dtype"] == run.store.options["adapter_dtype"] == ["torch.bfloat16"]
    assert json.loads((tmp_path / "on" / "origin.json").read_text())["complete"]


# -- the log -------------------------------------------------------------------------------------------------------


class Halt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_going_on_from_a_checkpoint_says_nothing_of_its_belief(tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        learner(tmp_path, configured=saving, callbacks=[Halt()]).learn("a", TASKS["a"])
    log = logging.getLogger("kalman_peft.belief_trainer")
    log.addHandler(caplog.handler)
    try:
        learner(tmp_path, configured=saving).learn("a", TASKS["a"])
    finally:
        log.removeHandler(caplog.handler)
    assert "Going on with" not in caplog.text
