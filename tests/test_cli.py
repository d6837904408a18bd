"""The command line: each command on a tiny model, exit codes, messages, configuration files, and the launcher."""

import json
import subprocess
import sys

import learning
import pytest
import sft
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from kalman_peft import AdapterState, Belief, ContinualLearner, __version__
from kalman_peft.cli import COMMANDS, main
from kalman_peft.losses import divergence_from_base, mean_loss


RUN = ["--use_cpu", "--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--report_to", "none",
       "--disable_tqdm", "true", "--save_strategy", "no", "--source_heldout", "4", "--max_length", "12"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, its tokenizer, and data."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    sft.model().unload().save_pretrained(folder / "model")
    sft.tokenizer().save_pretrained(folder / "model")
    sft.pairs(12).to_json(folder / "target.jsonl")
    sft.texts(12, seed=9).to_json(folder / "keep.jsonl")
    sft.chats(12).to_json(folder / "chats.jsonl")
    (folder / "words.txt").write_text("\n".join(sft.words(8, seed=3)) + "\n")
    return folder


def call(*arguments):
    return main([str(a) for a in arguments])


def trained(place, name, *options):
    folder = place / name
    if not folder.exists():
        assert call("train", "--model", place / "model", "--dataset", place / "target.jsonl", "--source",
                    place / "keep.jsonl", "--output_dir", folder, "--learning_rate", "1e-2", *RUN, *options) == 0  # fmt: skip
    return folder


# -- training --------------------------------------------------------------------------------------------------------


def test_train_as_a_process_with_a_configuration_file(place):
    folder = place / "configured"
    config = place / "run.yaml"
    config.write_text(
        f"model: {place / 'model'}\ndataset: {place / 'target.jsonl'}\noutput_dir: {folder}\nmax_length: 12\n"
        f"source: [wiki={place / 'keep.jsonl'}, '{place / 'words.txt'}']\nsource_weights: {{wiki: 2, words: 1}}\n"
        "source_heldout: 2\nlearning_rate: 1e-2\nmax_steps: 5\nuse_cpu: true\nreport_to: none\nlogging_steps: 1\n"
        "save_strategy: 'no'\neval_dataset: null\nlora_r: 2\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "kalman_peft.cli", "train", "--config", config, "--max_steps", "2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"Wrote adapter and belief to {folder}."
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 2  # the flag, not the file
    assert any({"source/wiki/loss", "source/words/loss"} <= entry.keys() for entry in state["log_history"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "model"), folder)
    belief = Belief.from_pretrained(folder)
    assert belief.check(model).pairs[0].a.shape[0] == 2
    assert [task["name"] for task in belief.info["lineage"]] == ["wiki", "words"]
    assert "kalman_peft" in (folder / "README.md").read_text()


def test_train_goes_on_from_an_adapter_and_its_belief(place):
    first, second = trained(place, "out"), place / "next"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "model"), first)
    assert call("train", "--model", place / "model", "--dataset", place / "keep.jsonl", "--adapter", first, "--belief",
                first, "--output_dir", second, *RUN[:-4], "--optimizer", "loko") == 0  # fmt: skip
    mean = Belief.from_pretrained(second).mean
    assert all(torch.equal(mean[key], value) for key, value in Belief.from_pretrained(first).mean.items())
    later = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "model"), second)
    assert not torch.equal(AdapterState(model).flatten(), AdapterState(later).flatten())
    assert "LoKO" in (second / "README.md").read_text()


def test_train_with_trl_on_conversations(place):
    folder = place / "sft"
    assert call("train", "--sft", "--model", place / "model", "--dataset", place / "chats.jsonl", "--source",
                place / "keep.jsonl", "--output_dir", folder, *RUN, "--packing", "--bf16", "false",
                "--assistant_only_loss") == 0  # fmt: skip
    assert json.loads((folder / "trainer_state.json").read_text())["log_history"][0]["mean_token_accuracy"] >= 0
    Belief.from_pretrained(folder)


def test_train_through_the_launcher(place, capfd):
    config = place / "accelerate.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: 'no'\nnum_machines: 1\n"
        "num_processes: 1\nuse_cpu: true\n"
    )
    missing = place / "missing.jsonl"
    assert call("train", "--accelerate_config", config, "--model", place / "model", "--dataset", missing, *RUN) == 1
    assert f"kalman-peft train: error: There is no file {missing}." in capfd.readouterr().err


# -- beliefs ---------------------------------------------------------------------------------------------------------


def test_curvature_is_that_of_the_library(place):
    folder = place / "start"
    assert call("curvature", "--model", place / "model", "--dataset", place / "keep.jsonl", "--samples", 6, "--output_dir",
                folder, "--laplace_structure", "diagonal", "--laplace_fisher", "empirical", "--max_length", 12) == 0  # fmt: skip
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "model"), folder)
    belief = Belief.from_pretrained(folder)
    belief.check(model)
    rows = [sft.tokenizer()(text + "</s>")["input_ids"] for text in sft.texts(12, seed=9)["text"][:6]]
    batches = [{"input_ids": torch.tensor([row]), "labels": torch.tensor([row])} for row in rows]
    expected = Belief.fit(model, batches, structure="diagonal", fisher="empirical", progress_bar=False)
    assert (
        belief.info["curvature"]["num_tokens"] == expected.info["curvature"]["num_tokens"] == sum(map(len, rows)) - 6
    )
    for key, entries in expected.precision.entries.items():
        torch.testing.assert_close(belief.precision.entries[key], entries, rtol=1e-4, atol=1e-9)


@pytest.fixture(scope="module")
def learner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    one = learning.learner(folder / "a", configured={"max_steps": 1}, eval_datasets=learning.EVALS)
    for name in ("a", "b"):
        one.learn(name, learning.TASKS[name])
    return folder / "a", one


def test_smooth_needs_no_model(learner, capsys):
    folder, one = learner
    expected = {name: belief.mean for name, belief in one.smooth().items()}
    before = (folder / "smoothed" / "a" / "belief.safetensors").read_bytes()
    (folder / "smoothed" / "a" / "belief.safetensors").unlink()
    assert call("smooth", folder) == 0
    assert (folder / "smoothed" / "a" / "belief.safetensors").read_bytes() == before
    assert "smoothed/b" in capsys.readouterr().out
    found = Belief.from_pretrained(folder / "smoothed" / "a")
    assert all(torch.equal(found.mean[key], value) for key, value in expected["a"].items())
    ContinualLearner.from_pretrained(folder, learning.model(), learning.config(folder.parent / "copy"))


def test_merge_writes_belief_and_adapter(learner, tmp_path):
    folder, _ = learner
    parts = [folder / "tasks" / name for name in ("000-a", "001-b")]
    output = tmp_path / "merged"
    assert call("merge", parts[0], "--prior", folder / "initial", "--output_dir", output) == 0
    one, alone = Belief.from_pretrained(output), Belief.from_pretrained(parts[0])
    for key, value in alone.mean.items():  # of one party, the merged belief is its own
        torch.testing.assert_close(one.mean[key], value, rtol=1e-4, atol=1e-6)
    model = PeftModel.from_pretrained(learning.model().unload(), output)
    for key, value in AdapterState(model, warn_excluded=False).parameters().items():
        torch.testing.assert_close(value.detach(), one.mean[key])
    assert call("merge", parts[0], "--prior", folder / "initial", "--output_dir", output) == 1


# -- measuring and telling -------------------------------------------------------------------------------------------


def test_evaluate_gives_losses_and_divergence(place, capsys):
    folder, file = trained(place, "out"), place / "figures.json"
    capsys.readouterr()
    assert call("evaluate", "--model", place / "model", "--adapter", folder, "--dataset", f"kept={place / 'keep.jsonl'}",
                place / "target.jsonl", "--output", file, "--samples", 5, "--max_length", 12) == 0  # fmt: skip
    found = json.loads(file.read_text())
    assert set(found) == {"kept", "target"} and f"| kept | {found['kept']['loss']:.4f} |" in capsys.readouterr().out
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "model"), folder)
    batch = sft.tokenizer()([t + "</s>" for t in sft.texts(12, seed=9)["text"][:5]], padding=True, return_tensors="pt")
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    with torch.no_grad():
        q = model(**batch).logits[:, :-1].log_softmax(-1)
        with model.disable_adapter():
            p = model(**batch).logits[:, :-1].log_softmax(-1)
    counts = batch["labels"][:, 1:] != -100
    assert found["kept"]["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1)[counts].mean()), rel=1e-4)
    assert found["kept"]["loss"] == pytest.approx(mean_loss(model, [dict(batch)]), rel=1e-5)
    assert found["kept"]["labels"] == int(counts.sum())
    assert divergence_from_base(model, [dict(batch)])["kl"] == pytest.approx(found["kept"]["kl"], rel=1e-5)


def test_divergence_raises_when_there_is_nothing_to_compare():
    batch = {"input_ids": torch.tensor([[6, 7, 8]]), "labels": torch.tensor([[-100, -100, -100]])}
    model = sft.model()
    with pytest.raises(ValueError, match="no labels that count"):
        divergence_from_base(model, [batch])
    with pytest.raises(TypeError, match="must be a PeftModel"):
        divergence_from_base(model.unload(), [batch])


def test_report_of_a_training(place, capsys):
    folder = trained(place, "out")
    assert call("report", folder) == 0
    text = (folder / "report.md").read_text()
    assert text.strip() in capsys.readouterr().out
    last = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    rise = next(entry["source/rise"] for entry in last if "source/rise" in entry)
    assert f"{rise:.4g}" in text and "kronecker in delta_w space" in text
    assert (folder / "training.png").read_bytes()[:4] == b"\x89PNG"


def test_report_of_tasks(learner, tmp_path):
    folder, one = learner
    assert call("report", folder, "--output_dir", tmp_path, "--figures", "false") == 0
    text = (tmp_path / "report.md").read_text()
    assert "| start | " in text and f"| forgetting | {one.metrics()['forgetting']:.4g} |" in text
    assert not list(tmp_path.glob("*.png"))


def test_card_says_what_the_folder_records(place):
    folder = trained(place, "out")
    whole = (folder / "README.md").read_text()
    (place / "results.md").write_text("Twice as good.")
    assert call("card", folder, "--license", "apache-2.0", "--results", place / "results.md", "--tags", "maths") == 0
    text = (folder / "README.md").read_text()
    assert "license: apache-2.0" in text and "Twice as good." in text and "- maths" in text and "2 steps" in text
    assert "Its strength was 100 at the end of training" in text
    loss = next(line for line in whole.splitlines() if line.startswith("Loss on held-out source data"))
    assert loss in text
    assert "Optimizer" not in text  # no file records it


# -- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["train", "--model", "m", "--dataset", "d", "--nonsense", "1"], "--nonsense"),
        (["train", "--model", "m", "--dataset", "d", "--use_cpu", "--laplace_strength", "-1"], "laplace_strength must be"),
        (["train", "--model", "m", "--dataset", "d", "--adapter", "a", "--lora_r", "4"], "lora_r: of a new adapter"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["train", "--accelerate_config", "nowhere.yaml"], "there is no such file"),
        (["evaluate", "--model", "m", "--adapter", "a", "--dataset", "d", "--batch_size", "0"], "batch_size"),
        (["report"], "arguments are required: --folder"),
    ],
)  # fmt: skip
def test_wrong_usage_ends_with_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_configuration_file_with_an_unknown_option(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("modle: m\n")
    with pytest.raises(SystemExit) as ended:
        call("train", "--config", tmp_path / "x.yaml")
    assert ended.value.code == 2 and "unknown options ['modle']" in capsys.readouterr().err


def test_failures_are_one_line_and_with_debug_a_traceback(tmp_path, capsys, place):
    arguments = ["report", tmp_path / "nothing"]
    assert call(*arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("kalman-peft report: error: ") and "holds nothing" in error
    assert call(*arguments, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err
    assert call("smooth", tmp_path) == 1
    assert "is no folder of a ContinualLearner" in capsys.readouterr().err
    (tmp_path / "chat.jsonl").write_text('{"messages": []}\n')
    assert call("train", "--model", place / "model", "--dataset", tmp_path / "chat.jsonl", *RUN) == 1
    assert "--sft` takes conversations" in capsys.readouterr().err


def test_help_of_every_command_has_examples(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        text = capsys.readouterr().out
        assert ended.value.code == 0 and f"examples:\n  kalman-peft {name}" in text
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"kalman-peft {__version__}\n"
