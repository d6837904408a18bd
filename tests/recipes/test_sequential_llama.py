"""The recipe of tasks in a row: methods differ where they should, figures add up, and no run is repeated."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sequential_llama as recipe
import torch
from datasets import Dataset

from kalman_peft.metrics import continual_metrics
from recipe_tools.domains import load_domain, split_spec
from recipe_tools.plots import look
from recipe_tools.runs import read_run
from recipe_tools.sequence_report import as_matrix, run_figures, summarise_sequences, table_cells
from recipe_tools.sequences import KINDS, averages, canonical, mixed, noise_of, read_method
from recipe_tools.targets import GENERATED


METHODS = [
    "sequential", "sequential:lr=1e-3", "l2:to=start,strength=1e3", "ewc:strength=1e4",
    "filter:structure=low_rank,rank=2,q=1e-3,layers=layers\\.1\\.", "filter", "loko:q=1e-3", "replay:share=0.3",
    "separate", "joint",
]  # fmt: skip


@pytest.fixture
def arguments(tmp_path, tokenizer, model):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, words in {"ab": "ab", "cd": "cd"}.items():
        rows = [{"question": f"{name} {k}", "answer": words * (1 + k % 3)} for k in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [{"text": f"some general words, number {k}, of which nothing is learnt and which should stay " * 2}
             for k in range(6)]  # fmt: skip
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return [
        "--model", str(tmp_path / "model"), "--domains", *(f"{n}:{tmp_path / n}.jsonl" for n in ("ab", "cd")),
        "--text", str(tmp_path / "text.jsonl"), "--max_steps", "3", "--batch_size", "2", "--r", "2", "--eval_items",
        "3", "--text_items", "2", "--curvature_samples", "3", "--learning_rate", "2e-2", "--threads", "1",
        "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip


def stored(folder):
    found = {}
    for path in sorted((folder / "runs").glob("*.json")):
        record = json.loads(path.read_text())
        found[(record["run"]["method"], record["run"]["order"], record["run"]["seed"])] = record
    return found


def test_all_methods_run_once_and_their_figures_add_up(arguments, tmp_path, monkeypatch):
    arguments = [*arguments, "--methods", *METHODS]
    summary, folder = recipe.main(arguments), tmp_path / "out"
    runs = {method: record for (method, _, _), record in stored(folder).items()}
    assert runs.keys() == set(map(canonical, METHODS)) and len(runs) == len(METHODS)
    assert not (folder / "states").exists() or not list((folder / "states").iterdir())
    first = as_matrix(runs["sequential"]["scores"])
    for method, run in runs.items():
        matrix = as_matrix(run["scores"])
        assert matrix.shape == (3, 2) and matrix[0] == pytest.approx(first[0])
        if run["kind"] in ("replay", "separate"):  # the first task is the same as without
            assert matrix[1, 0] == pytest.approx(first[1, 0], abs=1e-5)
        if method != "sequential" and run["kind"] != "joint":
            assert matrix[2, 1] != first[2, 1]
    assert np.isnan(as_matrix(runs["separate"]["scores"])[1:]).sum() == 2
    assert np.isnan(as_matrix(runs["joint"]["scores"])[1]).all()
    results = summary["results"]["0,1"]
    assert results["sequential"]["forgetting"]["mean"] == continual_metrics(first, False)["forgetting"]
    assert results["joint"]["minus_first"]["mean"] == pytest.approx(
        as_matrix(runs["joint"]["scores"])[-1].mean() - first[-1].mean()
    )
    # A strong pull to the start keeps the start; sequential training does not.
    held = as_matrix(runs["l2:to=start,strength=1000"]["scores"])
    assert abs(held[2] - held[0]).max() < abs(first[2] - first[0]).max()
    smoothed = {name for name in results if name.endswith(", smoothed")}
    assert smoothed == {f"{canonical(m)}, smoothed" for m in METHODS if "q=" in m}
    assert results["sequential, neighbours averaged"]["learning_loss"]["mean"] > 0
    # Process noise lets go of something; without any, all is kept.
    kept = {method: run["figures"][1]["stability"] for method, run in runs.items() if run["figures"]}
    assert kept["filter:structure=ekfac"] == kept["ewc:strength=10000"] == 1
    assert all(0 < kept[canonical(method)] < 1 for method in METHODS if "q=" in method)
    report = (folder / "report.md").read_text()
    assert "| sequential |" in report and "cd.jsonl" in report and str(tmp_path) not in report
    pictures = {path.name for path in (folder / "order-0,1").iterdir()}
    assert {"learning_forgetting.png", "matrix-sequential.png"} <= pictures and len(pictures) == len(METHODS) - 1

    monkeypatch.setattr(recipe, "learn", lambda *_: pytest.fail("a run was repeated"))
    assert recipe.main(arguments) == summary
    with pytest.raises(ValueError, match=r"other settings: settings\.lora_alpha was 16, is 3\. Choose"):
        recipe.main([*arguments, "--lora_alpha", "3"])


def test_orders_and_seeds_are_paired(arguments, tmp_path):
    arguments = [*arguments, "--methods", "sequential", "--orders", "0,1", "1,0", "--seeds", "0", "1"]
    summary, runs = recipe.main([*arguments, "--keep_states"]), stored(tmp_path / "out")
    assert runs["sequential", "1,0", 1]["names"] == ["cd", "ab"] and len(runs) == 4
    assert summary["results"].keys() == {"all orders", "0,1", "1,0"}
    found = [
        run_figures(runs["sequential", order, seed])[""]["average_loss"] for order in ("0,1", "1,0") for seed in (0, 1)
    ]
    cell = summary["results"]["all orders"]["sequential"]["average_loss"]
    assert cell["mean"] == pytest.approx(np.mean(found)) and cell["ci95"] == pytest.approx(
        3.182 * np.std(found, ddof=1) / 2
    )
    # Held-out rows are the same whatever the order and the seed.
    starts = [dict(zip(run["names"], run["scores"][0], strict=True)) for run in runs.values()]
    assert all(start == pytest.approx(starts[0]) for start in starts)


def test_a_killed_filter_goes_on_from_its_files(arguments, tmp_path, monkeypatch):
    arguments = [*arguments, "--methods", "filter:structure=diagonal,q=1e-3"]
    write = recipe.write_json
    monkeypatch.setattr(recipe, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        recipe.main(arguments)
    monkeypatch.setattr(recipe, "write_json", write)
    learner = recipe.learn.__globals__["ContinualLearner"]
    monkeypatch.setattr(learner, "_train", lambda *_: pytest.fail("a task was learnt again"))
    recipe.main(arguments)
    assert len(stored(tmp_path / "out")) == 1


def test_seconds_of_a_run_that_was_killed_are_not_counted(arguments, tmp_path, monkeypatch):
    arguments = [*arguments, "--methods", "filter:structure=diagonal"]
    learner = recipe.learn.__globals__["ContinualLearner"]
    learn, calls = learner.learn, []

    def dying(self, name, *rest):
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return learn(self, name, *rest)

    monkeypatch.setattr(learner, "learn", dying)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(arguments)
    summary = recipe.main([*arguments, "--seeds", "0", "1"])
    killed, whole = (stored(tmp_path / "out")["filter:structure=diagonal", "0,1", seed] for seed in (0, 1))
    assert killed["seconds"] is None and whole["seconds"] > 0 and calls == ["ab", "cd", "ab", "cd", "ab", "cd"]
    row = summary["results"]["0,1"]["filter:structure=diagonal"]
    assert row["seconds"] == {"mean": whole["seconds"], "ci95": None} and row["average_loss"]["ci95"] is not None


def test_runs_of_other_data_or_another_base_are_refused(arguments, tmp_path):
    def settings(folder):
        found = [argument.replace(str(tmp_path), str(folder)) for argument in arguments]
        return recipe.Runner(recipe.parse(found)).settings

    first = settings(tmp_path)
    assert first["files"].keys() == {"domains/ab", "domains/cd", "text/0", "model"}
    moved = shutil.copytree(tmp_path, tmp_path / "moved", copy_function=shutil.copyfile)  # other times, other paths
    (moved / "model" / "optimizer.bin.tmp").write_text("left by something else")
    assert settings(moved) == first
    weights = moved / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    (moved / "ab.jsonl").write_text((moved / "ab.jsonl").read_text().replace("abab", "zqzq"))
    other = settings(moved)
    assert {name for name, mark in other["files"].items() if mark != first["files"][name]} == {"domains/ab", "model"}
    identity = {"method": "joint", "settings": json.loads(json.dumps(first))}
    (tmp_path / "run.json").write_text(json.dumps({"run": identity}))
    assert read_run(tmp_path / "run.json", identity)
    with pytest.raises(ValueError, match=r"other settings: settings\.files\.domains/ab was '\w{64}', is '\w{64}'; "):
        read_run(tmp_path / "run.json", identity | {"settings": other})


def test_a_word_of_the_recipes_own_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikipedia").write_text("something else of that name")
    assert "files" not in recipe.Runner(recipe.parse([])).settings


# -- parts ---------------------------------------------------------------------------------------------------------


def test_replay_takes_the_place_of_the_tasks_own_rows():
    tasks = [Dataset.from_list([{"task": t, "row": k} for k in range(20)]) for t in range(3)]
    for share, expected in ((0.01, {2: 19, 1: 1}), (0.05, {2: 19, 1: 1}), (0.25, {2: 15, 1: 3, 0: 2})):
        rows = mixed(tasks[2], tasks[:2], share, seed=0)
        counts = {t: rows["task"][:].count(t) for t in set(rows["task"][:])}
        assert counts == expected and len(rows) == 20


def test_neighbours_are_averaged():
    found = averages([{"w": torch.tensor(float(x))} for x in (1, 3, 8)])
    assert [float(adapter["w"]) for adapter in found] == [2, 4, 5.5]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("filter", "filter:structure=ekfac"),
        ("filter:q=1e-04,structure=diagonal,strength=1", "filter:structure=diagonal,q=0.0001"),
        ("l2:strength=1e-3", "l2:to=previous"),
        ("loko:q=1.23456789e-5", "loko:memory=kronecker,q=1.23456789e-05"),
        ("joint", "joint"),
        ("ewc:lr=4e-03", "ewc:strength=1,lr=0.004"),
    ],
)
def test_methods_have_one_spelling(text, expected):
    assert canonical(text) == canonical(expected) == expected


def test_noise_goes_where_layers_says():
    assert noise_of(read_method("filter:q=0.5")[1]) == 0.5
    assert noise_of(read_method("loko:q=0.5,layers=layers\\.(2[0-9])\\.")[1]) == {"layers\\.(2[0-9])\\.": 0.5}


def test_differences_are_to_the_first_method():
    run = {"kind": "x", "own": {}, "seconds": 1.0, "text": {"before": 1.0, "after": {"loss": 1.5, "kl": 0.2}}}
    runs = {name: [run | {"scores": [[2.0, 2.0], [1.0, 2.0], [last, 1.0]]}] for name, last in (("a", 3.0), ("b", 1.5))}
    result = summarise_sequences(runs)
    assert "minus_first" not in result["a"] and result["b"]["minus_first"]["mean"] == pytest.approx(-0.75)
    assert result["a"]["forgetting"]["mean"] == 2 and result["b"]["text_rise"]["mean"] == 0.5
    # Before any task 2, just after learning 1 and 1, the first rises by 2: beyond the reference point; by .5.
    assert result["a"]["hypervolume"]["mean"] == 0 and result["b"]["hypervolume"]["mean"] == pytest.approx(1 * 0.5)
    headings, rows = table_cells(result, "news")
    assert "rise of news loss" in headings and "minus a" in headings and rows[1][2] == "-0.750"


def test_no_two_of_many_methods_look_alike():
    assert len({look(index) for index in range(len(recipe.METHODS))}) == len(recipe.METHODS)


@pytest.mark.skipif(not importlib.util.find_spec("reasoning_gym"), reason="reasoning-gym is not installed")
def test_generated_domains_differ_from_each_other_and_hold_out_rows():
    first, second = (load_domain(name, limit_train=6, limit_eval=4, seed=1) for name in GENERATED[1:3])
    assert (len(first.train), len(first.heldout)) == (6, 4)
    assert not set(first.train["question"]) & {*first.heldout["question"], *second.train["question"]}
    again = load_domain(GENERATED[1], limit_train=6, limit_eval=4, seed=2)
    assert again.heldout[:] == first.heldout[:] and again.train[:] != first.train[:]
    assert GENERATED[1] in first.provenance and GENERATED[2] not in first.provenance


def test_a_domain_is_a_name_and_its_data(tmp_path):
    assert split_spec("caesar_cipher") == ("caesar_cipher",) * 2
    assert split_spec("chat:owner/name:part") == ("chat", "owner/name:part")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"question": str(k), "answer": "a"}) for k in range(20)))
    domain = load_domain(f"x:{tmp_path / 'rows.jsonl'}", limit_train=4, limit_eval=2, seed=0)
    assert (domain.name, len(domain.train), len(domain.heldout)) == ("x", 4, 2)
    with pytest.raises(ValueError, match="is no domain"):
        split_spec("owner/name")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--domains", "caesar_cipher"], "at least two"),
        (["--domains", "caesar_cipher", "x:y.jsonl", "x:z.jsonl"], "a name twice"),
        (["--orders", "0,1"], "each must name the places"),
        (["--orders", "a,1,2"], "each must name the places"),
        (["--methods", "lion"], "the kind is none of"),
        (["--methods", "ewc:q=1"], "ewc has no option"),
        (["--methods", "filter:structure=kronecker"], "structure must be one of"),
        (["--methods", "filter:layers=x"], "give q= too"),
        (["--methods", "filter:rank=3"], "goes with structure=low_rank"),
        (["--methods", "filter:decay=2"], "decay must be in"),
        (["--methods", "filter:prior=0"], "prior must be above 0"),
        (["--methods", "replay:share=0"], "between 0 and 1"),
        (["--methods", "filter:q=1,layers=("], "layers must be a regular expression"),
        (["--methods", "filter:decay=0"], "with decay=0"),
        (["--methods", "ewc:strength=1,strength=2"], "strength is given twice"),
        (["--methods", "ewc:strength=True"], "strength must be in"),
        (["--domains", "a:caesar_cipher", "..:word_sorting"], "A task's name becomes a folder's"),
        (["--seeds", "-1"], "--seeds [-1]: each must be in"),
        (["--learning_rate", "nan"], "--learning_rate must be above 0"),
        (["--threads", "-1"], "--threads must not be negative"),
        (["--r", "0"], "must be positive"),
        (["--max_steps", "0"], "must be positive"),
    ],
)
def test_raises_when_options_do_not_fit(arguments, message, capsys):
    with pytest.raises(SystemExit):
        recipe.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ("methods: sequential", "methods must be a list"),
        ("orders: [0, 1]", "each of orders must be text"),
        ("max_steps: 1.5", "max_steps must be a whole number, got 1.5"),
        ("bf16: 'False'", "bf16 must be true or false"),
        ("learning_rate: high", "learning_rate must be a number"),
        ("- 3", "must hold options with their values"),
        ("a: [", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_raises_when_the_yaml_does_not_fit(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(SystemExit):
        recipe.parse(["--config", str(tmp_path / "c.yaml")])
    assert message in capsys.readouterr().err


def test_yaml_takes_a_small_number_for_text(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-3\nrows: null\nbf16: no\n")
    options = recipe.parse(["--config", str(tmp_path / "c.yaml")])
    assert (options.learning_rate, options.rows, options.bf16) == (1e-3, None, False)


def test_no_run_is_counted_twice():
    options = recipe.parse(["--seeds", "1", "0", "1", "--orders", "0,1,2", "0, 1, 2", "2,1,0"])
    assert options.seeds == [1, 0] and options.orders == ["0,1,2", "2,1,0"]


def test_the_file_of_the_whole_grid_is_read():
    file = Path(recipe.__file__).with_suffix(".yaml")
    options = recipe.parse(["--config", str(file), "--seeds", "5"])
    assert options.seeds == [5] and len(options.orders) == 2 and len(options.domains) == 4
    assert {read_method(method)[0] for method in options.methods} == KINDS.keys()


def test_raises_under_a_launcher(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        recipe.parse([])
    assert "one process" in capsys.readouterr().err
