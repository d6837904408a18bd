"""Records of tasks in files: bit for bit, and refused where they do not belong together."""

import gc
import os
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from state_space import F64, LAYOUT, SHAPES, STRUCTURES, rand, run, start_state

from kalman_peft import Belief, BeliefError, TaskRecord, Transition, initial_belief, interpolate, smooth
from kalman_peft.continual.stored import Stored
from kalman_peft.filtering import increment_of, smooth_each


A0, _, A1, _ = SHAPES
STEPS = [Transition(0.1), Transition({"lora_B": 0.2, "lora_A": 0.1}, 0.9), Transition({A0: 0.3}, 0.5)]


def same(one, other):
    a, b = one.tensors(), other.tensors()
    assert type(one) is type(other) and a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_records_come_back_bit_for_bit(tmp_path, structure, dtype):
    records, _, _, prior = run(structure, STEPS)
    if dtype == torch.float32:
        belief = initial_belief(start_state(), 0.3, structure)
        records = [TaskRecord("first", belief, STEPS[2], belief.precision.scale(2.0), {"seed": 1, "data": "abc"})]
    for t, record in enumerate(records):
        record.save_pretrained(tmp_path / str(t))
    again = [TaskRecord.from_pretrained(tmp_path / str(t)) for t in range(len(records))]
    for one, other in zip(records, again, strict=True):
        assert (one.name, one.info, one.belief.info) == (other.name, other.info, other.belief.info)
        same(one.belief.precision, other.belief.precision)
        same(one.increment, other.increment)
        assert all(torch.equal(one.belief.mean[k], other.belief.mean[k]) for k in SHAPES)
        like = one.belief.precision.like
        assert one.transition.decay == other.transition.decay
        assert one.transition.noise(SHAPES, like) == other.transition.noise(SHAPES, like)
    for one, other in zip(smooth(records, start=prior.mean), smooth(again, start=prior.mean), strict=True):
        same(one.precision, other.precision)
        assert all(torch.equal(one.mean[k], other.mean[k]) for k in SHAPES)


@pytest.mark.parametrize("covariance", [True, False])
def test_smoothing_holds_few_records_however_many_there_are(tmp_path, covariance):
    records, _, _, prior = run("low_rank", [Transition(0.1, 0.9)] * 9)
    folders = [tmp_path / str(t) for t in range(len(records))]
    for record, folder in zip(records, folders, strict=True):
        record.save_pretrained(folder)
    alive, most = weakref.WeakSet(), 0

    def read(folder):
        nonlocal most
        record = TaskRecord.from_pretrained(folder)
        alive.add(record.belief)
        gc.collect()
        most = max(most, len(alive))
        return record

    stored = Stored(folders, read)
    found = dict(smooth_each(stored, start=prior.mean, covariance=covariance, rank=6))
    assert most <= 3
    for t, expected in enumerate(smooth(records, start=prior.mean, covariance=covariance, rank=6)):
        same(found[t].precision, expected.precision)
        assert all(torch.equal(found[t].mean[k], expected.mean[k]) for k in SHAPES)
    between = interpolate(stored, 3.5, start=prior.mean, rank=6)
    assert most <= 4
    same(between.precision, interpolate(records, 3.5, start=prior.mean, rank=6).precision)


def test_the_state_before_any_task_comes_back(tmp_path):
    for structure in STRUCTURES:  # a basis or columns of no direction are tensors without entries
        belief = initial_belief(start_state(), {"lora_A": 2.0, "lora_B": 0.1}, structure)
        belief.save_pretrained(tmp_path / structure)
        same(Belief.from_pretrained(tmp_path / structure).precision, belief.precision)


def test_tensors_of_noise_and_the_order_of_patterns_are_kept(tmp_path):
    q = rand(2, 3).square()
    step = Transition({"z|lora": 1.0, "lora_A": 2.0, A1: q, "lora_B": 3.0})
    belief = initial_belief(start_state(), 1.0, "diagonal", dtype=F64)
    TaskRecord("t", belief, step).save_pretrained(tmp_path)
    again = TaskRecord.from_pretrained(tmp_path)
    assert again.increment is None
    assert list(again.transition.process_noise) == list(step.process_noise)
    found, expected = (s.noise(SHAPES, belief.precision.like) for s in (again.transition, step))
    assert torch.equal(found.pop(A1), expected.pop(A1)) and found == expected


def test_the_folder_is_a_belief_and_holds_no_more(tmp_path):
    records, _, _, _ = run("low_rank", [Transition(0.1)])
    records[0].save_pretrained(tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "a")) == [
        "belief.safetensors",
        "belief_config.json",
        "task_record.safetensors",
    ]
    same(Belief.from_pretrained(tmp_path / "a").precision, records[0].belief.precision)


def test_raises_when_record_and_belief_are_of_different_saves(tmp_path):
    records, _, _, _ = run("diagonal", [Transition(0.1)] * 2)
    records[0].save_pretrained(tmp_path)
    records[1].belief.save_pretrained(tmp_path)  # as a kill between the two writes would leave it
    with pytest.raises(BeliefError, match="belongs to another belief"):
        TaskRecord.from_pretrained(tmp_path)


def test_raises_when_a_file_is_missing_or_damaged(tmp_path):
    records, _, _, _ = run("diagonal", [Transition(0.1)])
    with pytest.raises(FileNotFoundError, match=r"task_record\.safetensors"):
        TaskRecord.from_pretrained(tmp_path)
    records[0].save_pretrained(tmp_path)
    path = tmp_path / "task_record.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(BeliefError, match="truncated"):
        TaskRecord.from_pretrained(tmp_path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BeliefError, match="altered"):
        TaskRecord.from_pretrained(tmp_path)
    save_file(load_file(path), path, {"record": '{"format": 99}'})
    with pytest.raises(BeliefError, match="format 99"):
        TaskRecord.from_pretrained(tmp_path)


def test_raises_when_not_finite(tmp_path):
    belief = initial_belief(start_state(), 1.0, "diagonal", dtype=F64)
    record = TaskRecord("t", belief, increment=belief.precision.scale(1.0))
    record.increment.entries[A0][0, 0] = torch.nan
    with pytest.raises(BeliefError, match="NaN or Inf"):
        record.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# -- what the smoother refuses ---------------------------------------------------------------------------------------


def test_raises_when_an_increment_is_of_another_structure():
    belief = initial_belief(start_state(), 1.0, "low_rank", dtype=F64)
    other = initial_belief(start_state(), 1.0, "diagonal", dtype=F64)
    with pytest.raises(BeliefError, match=r"increment_of\(belief"):
        TaskRecord("t", belief, increment=other.precision)
    increment_of(belief, other.precision, 3.0)


def test_smoothed_beliefs_name_the_data_of_all_tasks():
    records, _, _, _ = run("diagonal", [Transition(0.1)] * 3)
    for t, record in enumerate(records):
        record.belief.info["lineage"] = [{"name": str(k)} for k in range(t + 1)]
    labels = [record.belief.info["filtering"]["num_labels"] for record in records]
    for found in (*smooth(records), interpolate(records, 0.5)):
        assert [entry["name"] for entry in found.info["lineage"]] == ["0", "1", "2"]
        assert found.info["filtering"]["num_labels"] == labels[-1] and found.info["filtering"]["kind"] == "smoothed"
    means = smooth(records, covariance=False)
    assert [found.info["filtering"]["num_labels"] for found in means] == labels
    assert len(means[0].info["lineage"]) == 3


@pytest.mark.parametrize("structure", ["low_rank", "ekfac"])
def test_raises_when_increments_are_missing(structure):
    records, _, _, _ = run(structure, [Transition(0.1)] * 3)
    records[0].increment = None  # not needed: nothing comes before
    smooth(records)
    records[1].increment = None
    with pytest.raises(BeliefError, match=r"'task 1' has no increment.*covariance=False"):
        smooth(records)


def test_raises_when_records_do_not_fit_each_other():
    with pytest.raises(BeliefError, match="no task records"):
        smooth([])
    one, _, _, _ = run("diagonal", [Transition(0.1)])
    other, _, _, _ = run("dense", [Transition(0.1)])
    with pytest.raises(BeliefError, match="another structure"):
        smooth([*one, *other])
    drift, _, _, _ = run("diagonal", [Transition(0.1, 0.5)] * 2)
    with pytest.raises(ValueError, match="pass start="):
        smooth(drift)


@pytest.mark.parametrize("position", [-0.5, float("nan"), float("inf")])
def test_raises_when_the_position_is_no_place(position):
    records, _, _, _ = run("diagonal", [Transition(0.1)] * 2)
    with pytest.raises(ValueError, match="position must be"):
        interpolate(records, position)


def test_one_task_is_smooth_already():
    records, _, _, _ = run("diagonal", [Transition(0.1)])
    (belief,) = smooth(records)
    assert torch.equal(LAYOUT.flatten(belief.mean), LAYOUT.flatten(records[0].belief.mean))
    same(belief.precision, records[0].belief.precision)
