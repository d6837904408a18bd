"""The folder of a ContinualLearner: whose it is, what a kill or damage leaves, and what each error says to do."""

import json
import logging
import shutil

import pytest
import torch
from conftest import make_llama
from learning import TASKS, config, contents, learner, model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from kalman_peft import BeliefError, ContinualLearner
from kalman_peft.continual import store
from kalman_peft.continual.sharing import _files


CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}


class Halt(TrainerCallback):
    """Ends the process's run at a step, as a kill does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Poison(TrainerCallback):
    """Training that diverges: NaN in the adapter after the second step, at a learning rate of 0.01."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2 and args.learning_rate == 1e-2:
            next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two tasks, smoothed."""
    run = learner(tmp_path_factory.mktemp("two"))
    for name in ("a", "b"):
        run.learn(name, TASKS[name])
    run.smooth()
    return run.store.folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another learner, of one task."""
    run = learner(tmp_path_factory.mktemp("other"), made=model(random_b=True))
    run.learn("x", TASKS["c"])
    return run.store.folder


@pytest.fixture(scope="module")
def halted(tmp_path_factory):
    """A learner that was killed after its last checkpoint, and the bytes that it would have left."""
    folder = tmp_path_factory.mktemp("halted")
    with pytest.raises(KeyboardInterrupt):
        learner(folder / "halted", configured=CHECKPOINTS, callbacks=[Halt(5)]).learn("a", TASKS["a"])
    learner(folder / "whole", configured=CHECKPOINTS).learn("a", TASKS["a"])
    return folder / "halted", contents(folder / "whole")


@pytest.fixture
def copy(two, tmp_path):
    return shutil.copytree(two, tmp_path / "copy")


# -- whose folder it is --------------------------------------------------------------------------------------------


def test_a_task_that_the_index_lacks_is_taken_up(copy):
    index = json.loads((copy / "continual.json").read_text())
    (copy / "continual.json").write_text(json.dumps(index | {"tasks": index["tasks"][:1]}))
    assert [entry["name"] for entry in learner(copy).tasks] == ["a", "b"]
    assert json.loads((copy / "continual.json").read_text()) == index


@pytest.mark.parametrize("source", ["other", "own", "unfinished"])
def test_a_foreign_task_is_refused(copy, other, source):
    place = copy / "tasks" / "002-x"
    shutil.copytree(other / "tasks" / "000-x" if source == "other" else copy / "tasks" / "001-b", place)
    if source == "unfinished":
        (place / "task.json").unlink()
    with pytest.raises(BeliefError, match=r"002-x(/task\.json is damaged or missing| is not task 2 of this learner)"):
        learner(copy)


def test_another_learners_tasks_under_this_index_are_refused(copy, other):
    shutil.copytree(other, copy, dirs_exist_ok=True)  # what a push that deletes nothing left on the Hub
    with pytest.raises(BeliefError, match="000-a is not task 1 of this learner"):
        ContinualLearner.from_pretrained(copy, make_llama(torch.float32, "sdpa"), config(copy.parent / "went on"))


def test_goes_on_from_the_same_learner_only(two, other, tmp_path):
    def again(source):
        base = make_llama(torch.float32, "sdpa")
        return ContinualLearner.from_pretrained(source, base, config(tmp_path / "mine"), **options)

    options = {k: v for k, v in learner(tmp_path / "x").trainer_options.items()}
    again(two).learn("c", TASKS["c"])
    assert len(again(two).tasks) == 3  # the same script after a kill
    shutil.copytree(two, tmp_path / "moved")
    assert len(again(tmp_path / "moved").tasks) == 3
    with pytest.raises(ValueError, match="holds a learner that was not begun from"):
        again(other)
    copied = shutil.copytree(two, tmp_path / "begun here")
    with pytest.raises(ValueError, match=r"output_dir='.*begun here' holds a learner that was not begun from"):
        ContinualLearner.from_pretrained(other, model(), config(copied))
    # A copy that was cut short is made anew.
    origin = json.loads((tmp_path / "mine" / "origin.json").read_text())
    (tmp_path / "mine" / "continual.json").unlink()
    with pytest.raises(ValueError, match="holds a learner that was not begun from"):
        again(other)
    (tmp_path / "mine" / "origin.json").write_text(json.dumps(origin | {"complete": False}))
    shutil.rmtree(tmp_path / "mine" / "tasks" / "002-c")
    assert [entry["name"] for entry in again(two).tasks] == ["a", "b"]


def test_what_a_kill_left_is_removed(copy):
    stale = [
        "tasks/.002-c.tmp",
        "smoothed/.a.tmp",
        ".initial.tmp",
        "work/001-b",
        "work/001-renamed",
        "work/.001-b.tmp",
    ]
    mine = ["tasks/notes", "work/mine", "smoothed/.hidden", "work/002-c"]
    for name in stale + mine:
        (copy / name).mkdir(parents=True)
    (copy / ".continual.json.123.0.tmp").touch()
    (copy / ".mine.tmp").touch()
    learner(copy)
    assert not [name for name in [*stale, ".continual.json.123.0.tmp"] if (copy / name).exists()]
    assert all((copy / name).exists() for name in [*mine, ".mine.tmp"])


# -- damage --------------------------------------------------------------------------------------------------------


def flip(path):
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path, {"format": "pt"})


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


DAMAGE = [
    ("tasks/001-b/adapter_model.safetensors", cut, "Restore it from a copy, or remove .*001-b and all later tasks"),
    ("tasks/001-b/adapter_model.safetensors", flip, "is not what was written"),
    ("tasks/001-b/adapter_config.json", zeros, "adapter_config.json is damaged or missing"),
    ("tasks/000-a/adapter_model.safetensors", lambda p: p.unlink(), "adapter_model.safetensors is damaged or missing"),
    ("tasks/000-a", shutil.rmtree, "000-a/task.json is damaged or missing"),
    ("tasks/000-a/task.json", cut, "task.json is damaged or missing"),
    ("tasks/000-a/task.json", lambda p: p.write_text("{}"), "task.json is damaged or missing .it lacks"),
    ("initial/start.json", lambda p: p.write_text("{}"), "start.json is damaged or missing .it lacks scores"),
    ("initial", shutil.rmtree, "initial is missing, with the prior"),
    ("continual.json", lambda p: p.unlink(), "but no continual.json, which says with what options"),
    ("continual.json", lambda p: p.write_text("[]"), "continual.json is damaged or missing"),
    ("continual.json", lambda p: p.write_text('{"format": 2}'), "continual.json is damaged or missing .it lacks"),
    ("continual.json", lambda p: p.write_text('{"format": 1}'), "format 1; this version reads 2. Go on with the ver"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_damage_is_named_with_the_remedy(copy, name, damage, message):
    damage(copy / name)
    with pytest.raises(BeliefError, match=message):
        learner(copy)


def test_smoothing_notices_a_damaged_adapter(copy):
    flip(copy / "tasks" / "000-a" / "adapter_model.safetensors")
    with pytest.raises(BeliefError, match=r"000-a.*is not what was written"):
        learner(copy).smooth()


def test_a_damaged_belief_or_record_is_named_with_the_remedy(copy):
    run = learner(copy)
    cut(copy / "tasks" / "000-a" / "belief.safetensors")
    cut(copy / "smoothed" / "a" / "belief.safetensors")
    with pytest.raises(BeliefError, match=r"belief\.safetensors cannot be read.* remove .*000-a and all later tasks"):
        run.records()[0]
    with pytest.raises(BeliefError, match=r"belief\.safetensors cannot be read.* remove .*000-a and all later tasks"):
        run.smooth()
    cut(copy / "tasks" / "001-b" / "belief_config.json")
    with pytest.raises(BeliefError, match=r"belief_config\.json .* remove .*001-b and all later tasks"):
        run.learn("c", TASKS["c"])


def test_a_damaged_start_is_not_copied(copy):
    flip(copy / "initial" / "adapter_model.safetensors")
    with pytest.raises(BeliefError, match=r"initial/adapter_model\.safetensors is damaged or missing "):
        ContinualLearner.from_pretrained(copy, make_llama(torch.float32, "sdpa"), config(copy.parent / "went on"))


def test_the_remedy_for_a_damaged_task_helps(copy):
    index = json.loads((copy / "continual.json").read_text())
    shutil.rmtree(copy / "tasks" / "001-b")
    (copy / "continual.json").write_text(json.dumps(index | {"tasks": index["tasks"][:1]}))
    learner(copy).learn("b", TASKS["b"])
    assert json.loads((copy / "continual.json").read_text()) == index


@pytest.mark.parametrize("damage", [zeros, cut, lambda p: p.unlink()])
def test_a_damaged_configuration_does_not_get_into_a_task(halted, tmp_path, damage):
    folder = shutil.copytree(halted[0], tmp_path / "copy")
    run = learner(folder, configured=CHECKPOINTS)
    run._evaluate = lambda _: (_ for _ in ()).throw(KeyboardInterrupt)  # a kill after training
    with pytest.raises(KeyboardInterrupt):
        run.learn("a", TASKS["a"])
    mode = folder / "work" / "000-a" / "mode"
    damage(mode / "adapter_config.json")
    learner(folder, configured=CHECKPOINTS).learn("a", TASKS["a"])
    assert contents(folder) == halted[1]


# -- others --------------------------------------------------------------------------------------------------------


def test_two_learners_do_not_learn_in_one_folder_at_once(tmp_path):
    first, second = learner(tmp_path), learner(tmp_path)

    class Meanwhile(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(ValueError, match="Another learner is at work in"):
                second.learn("b", TASKS["b"])

    first.trainer_options["callbacks"] = [Meanwhile()]
    first.learn("a", TASKS["a"])
    with pytest.raises(ValueError, match="has changed since this learner was opened"):
        second.learn("b", TASKS["b"])
    third = learner(tmp_path)
    third.learn("b", TASKS["b"])
    assert [entry["name"] for entry in third.tasks] == ["a", "b"]


def test_files_can_be_read_by_others_and_are_the_same_in_every_process(two):
    found = [path for path in two.rglob("*") if path.is_file() and path.name != ".lock"]
    (two / "mode").touch()
    expected = (two / "mode").stat().st_mode
    (two / "mode").unlink()
    assert len(found) > 10 and {path.stat().st_mode for path in found} == {expected}
    targets = json.loads((two / "tasks" / "001-b" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets) and len(targets) > 1


def test_a_learner_that_is_read_writes_nothing(copy, monkeypatch):
    monkeypatch.setattr(store, "write_json", lambda *_: pytest.fail("a file was written"))
    run = learner(copy)
    assert len(run.records()) == 2 and run.start().info["filtering"]["tasks"] == 0


def test_a_relative_folder_stays_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = learner("out")
    run.learn("a", TASKS["a"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run.learn("b", TASKS["b"])
    assert run.store.folder == tmp_path / "out" and not list((tmp_path / "elsewhere").iterdir())


def test_smoothed_tasks_that_lack_a_later_one_are_not_pushed(copy):
    run = learner(copy)
    pushed = lambda: {name for name in _files(run.store) if name.startswith("smoothed/")}  # noqa: E731
    before = pushed()
    assert {name.split("/")[1] for name in before} == {"a", "b"}
    run.learn("c", TASKS["c"])
    assert not pushed()
    run.smooth()
    assert pushed() > before


def test_raises_when_a_name_is_neither_a_folder_nor_a_repository(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder, and no repository's id either"):
        ContinualLearner.from_pretrained("no/such/folder", model(), config(tmp_path))


def test_raises_when_the_folder_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; give a folder"):
        learner(tmp_path / "file")


# -- work on a task ------------------------------------------------------------------------------------------------

WORK = [
    ("checkpoint-4/adapter_model.safetensors", cut, "checkpoint is thrown away"),
    ("checkpoint-4/optimizer.pt", lambda p: p.unlink(), "checkpoint is thrown away"),
    ("checkpoint-4/optimizer.pt", zeros, "checkpoint is thrown away"),
    ("checkpoint-4/whole.json", lambda p: p.write_text(""), "checkpoint is thrown away"),
    ("data.json", cut, "The task is begun anew"),
    ("checkpoint-mine", lambda p: p.mkdir(), ""),
    ("checkpoint-7", lambda p: p.touch(), ""),
    ("mode", lambda p: p.mkdir(), "Training is repeated from the last checkpoint"),
    ("mode", lambda p: p.touch(), "Training is repeated from the last checkpoint"),
]


@pytest.mark.parametrize(("name", "damage", "message"), WORK)
def test_damaged_work_is_begun_anew(halted, tmp_path, caplog, name, damage, message):
    folder = shutil.copytree(halted[0], tmp_path / "copy")
    damage(folder / "work" / "000-a" / name)
    monitored = [logging.getLogger(f"kalman_peft.continual.{part}") for part in ("runs", "task")]
    for logger in monitored:
        logger.addHandler(caplog.handler)
    try:
        learner(folder, configured=CHECKPOINTS).learn("a", TASKS["a"])
    finally:
        for logger in monitored:
            logger.removeHandler(caplog.handler)
    assert contents(folder) == halted[1] and message in caplog.text


def test_a_mode_of_which_a_file_is_missing_is_found_again(halted, tmp_path, monkeypatch):
    folder = shutil.copytree(halted[0], tmp_path / "copy")
    run = learner(folder, configured=CHECKPOINTS)
    monkeypatch.setattr(run, "_update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.learn("a", TASKS["a"])
    (folder / "work" / "000-a" / "mode" / "adapter_model.safetensors").unlink()
    learner(folder, configured=CHECKPOINTS).learn("a", TASKS["a"])
    assert contents(folder) == halted[1]


def test_raises_when_work_is_a_file(tmp_path):
    run = learner(tmp_path)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "000-a").touch()
    with pytest.raises(BeliefError, match="000-a is a file, where the task's work belongs"):
        run.learn("a", TASKS["a"])


def test_options_may_change_until_something_depends_on_them(halted, tmp_path):
    folder = shutil.copytree(halted[0], tmp_path / "copy")
    changed = CHECKPOINTS | {"learning_rate": 5e-3}
    with pytest.raises(ValueError, match=r"000-a holds training with them\. Give the same, or delete that folder"):
        learner(folder, configured=changed)
    shutil.rmtree(folder / "work" / "000-a")
    learner(folder, configured=changed).learn("a", TASKS["a"])
    learner(tmp_path / "fresh", configured=changed).learn("a", TASKS["a"])
    assert contents(folder) == contents(tmp_path / "fresh")


def test_a_task_that_diverged_is_not_kept(tmp_path):
    with pytest.raises(FloatingPointError, match=r"Task 'a' has diverged.*lora_A.*Give a lower learning_rate"):
        learner(tmp_path, configured=CHECKPOINTS, callbacks=[Poison()]).learn("a", TASKS["a"])
    assert list((tmp_path / "work").iterdir()) == []
    calm = CHECKPOINTS | {"learning_rate": 5e-3}
    entry = learner(tmp_path, configured=calm, callbacks=[Poison()]).learn("a", TASKS["a"])
    assert torch.isfinite(torch.tensor(entry["figures"]["covariance_trace"]))


def test_a_name_may_be_as_long_as_a_folders():
    assert store.check_name("é" * 100) and store.check_name("x" * 100)
    with pytest.raises(ValueError, match="200 bytes in UTF-8"):
        store.check_name("漢" * 100)
